//! Does the tree do what a sorted map does, within what it says it costs, and survive any bytes?

#[path = "tree/damage.rs"]
mod damage;
#[path = "tree/directory.rs"]
mod directory;
#[path = "tree/extents.rs"]
mod extents;

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use lunfs::layout::inode::CONTENT_BYTES;
use lunfs::tree::mem::{MemError, MemStore};
use lunfs::tree::{Cost, MAX_VALUE_BYTES, Tree, TreeError, TreeKind, TreeSummary};
use lunfs::types::{InodeNo, VolumeId};
use proptest::prelude::*;

const VOLUME: VolumeId = VolumeId([5; 16]);
const OWNER: InodeNo = InodeNo(4096 + 8);

/// A tree with its store and root.
#[derive(Clone)]
struct Fixture {
    tree: Tree,
    store: MemStore,
    root: Vec<u8>,
}

impl Fixture {
    fn new(kind: TreeKind) -> Self {
        let tree = Tree { volume: VOLUME, owner: OWNER, kind };
        let mut root = vec![0xee; CONTENT_BYTES];
        tree.init_root(&mut root).unwrap();
        Fixture { tree, store: MemStore::default(), root }
    }

    fn insert(&mut self, key: u64, value: &[u8]) -> Result<(), MemError> {
        self.tree.insert(&mut self.store, &mut self.root, key, value)
    }

    fn remove(&mut self, key: u64) -> Result<Option<Vec<u8>>, MemError> {
        self.tree.remove(&mut self.store, &mut self.root, key)
    }

    fn level(&self) -> u8 {
        self.tree.root_level(&self.root).unwrap()
    }

    fn entries(&mut self, from: u64) -> Vec<(u64, Vec<u8>)> {
        let mut out = Vec::new();
        self.tree
            .scan(&mut self.store, &self.root, from, |key, value| {
                out.push((key, value.to_vec()));
                ControlFlow::Continue(())
            })
            .unwrap();
        out
    }

    /// Every node good, and no block in the store that the tree doesn't reach.
    fn verify(&mut self) -> TreeSummary {
        let summary = self.tree.verify_tree(&mut self.store, &self.root).unwrap();
        assert_eq!(summary.nodes, self.store.blocks.len() as u64);
        summary
    }
}

/// What was done since the last look was within what is promised for it.
fn assert_within(store: &mut MemStore, bound: Cost) {
    let used = store.take_cost();
    assert!(used.allocations <= bound.allocations && used.touched <= bound.touched, "{used:?} > {bound:?}");
}

#[derive(Clone, Debug)]
enum Op {
    Insert(u64, usize),
    Replace(u64, usize),
    Remove(u64),
    Rekey(u64, u64, usize),
    /// From, how many, distance, length: enough of them for a tree of three levels.
    InsertMany(u64, u64, u64, usize),
    RemoveRange(u64, u64),
    FreeSome(u32),
}

/// Keys are mostly below this.
const SPACE: u64 = 20_000;

/// How many cases proptest runs here, unless its usual variable says otherwise.
fn cases(usual: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|v| v.parse().ok()).unwrap_or(usual);
    ProptestConfig { cases, ..ProptestConfig::default() }
}

fn key() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0u64..600, 4 => 0..SPACE, 1 => Just(u64::MAX), 1 => Just(0), 2 => any::<u64>()]
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![3 => 0..=40usize, 3 => 200..=MAX_VALUE_BYTES, 1 => Just(MAX_VALUE_BYTES)]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        60 => (key(), len()).prop_map(|(k, l)| Op::Insert(k, l)),
        10 => (key(), len()).prop_map(|(k, l)| Op::Replace(k, l)),
        30 => key().prop_map(Op::Remove),
        6 => (key(), key(), len()).prop_map(|(a, b, l)| Op::Rekey(a, b, l)),
        3 => (0..SPACE, 0u64..2000, 1u64..40, len()).prop_map(|(k, n, d, l)| Op::InsertMany(k, n, d, l)),
        2 => (key(), 0u64..200).prop_map(|(k, n)| Op::RemoveRange(k, n)),
        1 => (0..SPACE, 0..SPACE).prop_map(|(k, n)| Op::RemoveRange(k, n)),
        1 => (1u32..4).prop_map(Op::FreeSome),
    ]
}

/// Dense keys that come and go in runs: leading children leave and lower keys return.
fn churn() -> impl Strategy<Value = Op> {
    let len = || prop_oneof![1 => 0..=40usize, 2 => Just(40usize), 1 => Just(0usize)];
    prop_oneof![
        3 => (0u64..400, 1u64..30, 1u64..4, len()).prop_map(|(k, n, d, l)| Op::InsertMany(k, n, d, l)),
        2 => (0u64..400, 0u64..40).prop_map(|(k, n)| Op::RemoveRange(k, n)),
        3 => (0u64..400, len()).prop_map(|(k, l)| Op::Insert(k, l)),
        2 => (0u64..400).prop_map(Op::Remove),
    ]
}

fn value(key: u64, len: usize, salt: usize) -> Vec<u8> {
    (0..len).map(|i| (key as usize).wrapping_mul(31).wrapping_add(i * 7 + salt) as u8).collect()
}

/// Runs operations on the tree and on a map, comparing answers and holding each to its bound.
fn against_a_map(kind: TreeKind, ops: Vec<Op>) {
    let longest = if kind == TreeKind::Tiny { 40 } else { MAX_VALUE_BYTES };
    let mut f = Fixture::new(kind);
    f.store.verify = Some(VOLUME);
    let mut model: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
    for (salt, op) in ops.into_iter().enumerate() {
        let level = f.level();
        f.store.take_cost();
        match op {
            Op::Insert(key, len) => {
                let v = value(key, len.min(longest), salt);
                let got = f.insert(key, &v);
                match model.contains_key(&key) {
                    true => assert_eq!(got, Err(TreeError::Exists { owner: OWNER, key }.into())),
                    false => assert_eq!(got.map(|()| model.insert(key, v)), Ok(None)),
                }
                assert_within(&mut f.store, Cost::inserts(level, 1));
            }
            Op::Replace(key, len) => {
                let v = value(key, len.min(longest), salt);
                let got = f.tree.replace(&mut f.store, &mut f.root, key, &v);
                match model.get_mut(&key) {
                    None => assert_eq!(got, Err(TreeError::Missing { owner: OWNER, key }.into())),
                    Some(old) => {
                        got.unwrap();
                        *old = v;
                    }
                }
                assert_within(&mut f.store, Cost::inserts(level, 1));
            }
            Op::Remove(key) => {
                assert_eq!(f.remove(key), Ok(model.remove(&key)));
                assert_within(&mut f.store, Cost::removes(level, 1));
            }
            Op::Rekey(old, new, len) => {
                let v = value(new, len.min(longest), salt);
                let got = f.tree.rekey(&mut f.store, &mut f.root, old, new, &v);
                let possible = model.contains_key(&old) && (old == new || !model.contains_key(&new));
                assert_eq!(got.is_ok(), possible, "{got:?}");
                if possible {
                    model.remove(&old);
                    model.insert(new, v);
                }
                assert_within(&mut f.store, Cost::inserts(level, 1).and(Cost::removes(level, 1)));
            }
            Op::InsertMany(from, count, distance, len) => {
                for key in (0..count).map(|i| (from + i * distance) % SPACE) {
                    if let std::collections::btree_map::Entry::Vacant(place) = model.entry(key) {
                        let v = value(key, len.min(longest), salt);
                        f.insert(key, &v).unwrap();
                        place.insert(v);
                    }
                }
            }
            Op::RemoveRange(from, count) => {
                let keys: Vec<u64> =
                    model.range(from..=from.saturating_add(count)).map(|(k, _)| *k).collect();
                for key in keys {
                    assert_eq!(f.remove(key), Ok(model.remove(&key)));
                }
            }
            Op::FreeSome(n) => {
                let done = f.tree.free_all(&mut f.store, &mut f.root, n).unwrap();
                assert_within(&mut f.store, Cost::free_step(level, n));
                let left = f.entries(0);
                assert_eq!(done, left.is_empty());
                assert!(left.iter().all(|(k, v)| model.get(k) == Some(v)));
                let kept = left.last().map(|(k, _)| *k);
                model.retain(|k, _| kept.is_some_and(|last| *k <= last));
                assert_eq!(left.len(), model.len());
            }
        }
        if salt % 16 == 0 {
            f.verify();
        }
    }
    f.verify();
    let all: Vec<_> = model.iter().map(|(k, v)| (*k, v.clone())).collect();
    assert_eq!(f.entries(0), all);
    for probe in
        model.keys().flat_map(|k| [k.saturating_sub(1), *k, k.saturating_add(1)]).chain([0, u64::MAX])
    {
        assert_eq!(f.tree.get(&mut f.store, &f.root, probe).unwrap(), model.get(&probe).cloned());
        let le = f.tree.get_le(&mut f.store, &f.root, probe).unwrap().map(|e| e.key);
        assert_eq!(le, model.range(..=probe).next_back().map(|(k, _)| *k));
        let ge = f.tree.get_ge(&mut f.store, &f.root, probe).unwrap().map(|e| e.key);
        assert_eq!(ge, model.range(probe..).next().map(|(k, _)| *k));
    }
    for key in model.keys() {
        f.remove(*key).unwrap().unwrap();
    }
    assert_eq!((f.verify().nodes, f.level()), (0, 0));
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn does_what_a_sorted_map_does(ops in prop::collection::vec(op(), 1..400)) {
        against_a_map(TreeKind::Directory, ops);
    }

    #[test]
    fn does_it_with_tiny_nodes_and_many_levels(ops in prop::collection::vec(op(), 1..300)) {
        against_a_map(TreeKind::Tiny, ops);
    }

    #[test]
    fn does_it_while_runs_of_keys_come_and_go(ops in prop::collection::vec(churn(), 1..500)) {
        against_a_map(TreeKind::Tiny, ops);
    }
}

#[test]
fn ascending_keys_fill_the_nodes_and_an_emptied_tree_is_inline_again() {
    let mut f = Fixture::new(TreeKind::Extents);
    for key in 0..100_000u64 {
        f.insert(key * 3, &[7; 16]).unwrap();
    }
    let summary = f.verify();
    assert_eq!(summary.entries, 100_000);
    // 64 and 16 bytes of a block are headers.
    let fill = summary.leaf_bytes as f64 / (summary.leaves * 4016) as f64;
    assert!(fill > 0.95, "{fill}");
    assert!(summary.level <= 2, "{summary:?}");
    let mut half = f.clone();
    for key in 0..100_000u64 {
        f.remove(key * 3).unwrap().unwrap();
        // From both ends and the middle in turn, in the copy.
        let k = if key % 2 == 0 { key / 2 } else { 99_999 - key / 2 };
        half.remove(k * 3).unwrap().unwrap();
        if key % 5000 == 0 {
            f.verify();
            half.verify();
        }
    }
    assert_eq!((f.verify(), f.level()), (TreeSummary::default(), 0));
    assert_eq!((half.verify(), half.level()), (TreeSummary::default(), 0));
}

#[test]
fn removing_most_keys_gives_most_blocks_back() {
    let mut f = Fixture::new(TreeKind::Extents);
    let keys: Vec<u64> = (0..30_000u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    for key in &keys {
        f.insert(*key, &[7; 16]).unwrap();
    }
    let full = f.verify();
    for key in keys.iter().filter(|k| *k % 16 != 0) {
        f.remove(*key).unwrap().unwrap();
    }
    let left = f.verify();
    assert!(left.leaves * 4016 <= left.leaf_bytes * 4, "{left:?}");
    assert!(left.nodes * 3 < full.nodes, "{left:?} of {full:?}");
}

#[test]
fn freeing_all_goes_in_bounded_steps_and_leaks_nothing() {
    let mut f = Fixture::new(TreeKind::Extents);
    for key in 0..60_000u64 {
        f.insert(key.wrapping_mul(0x9e37_79b9_7f4a_7c15), &[1; 16]).unwrap();
    }
    let mut calls = 0;
    loop {
        let level = f.level();
        f.store.take_cost();
        let done = f.tree.free_all(&mut f.store, &mut f.root, 10).unwrap();
        assert_within(&mut f.store, Cost::free_step(level, 10));
        f.verify();
        calls += 1;
        if done {
            break;
        }
    }
    assert!(calls > 10);
    assert!(f.store.blocks.is_empty());
    assert!(f.tree.is_empty(&mut f.store, &f.root).unwrap());
}

#[test]
fn a_failed_allocation_changes_nothing() {
    let mut f = Fixture::new(TreeKind::Directory);
    for key in 0..5000u64 {
        let before = f.clone();
        let key = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        f.store.take_cost();
        f.insert(key, &[9; 40]).unwrap();
        let used = f.store.take_cost().allocations;
        for left in 0..used {
            let mut poor = before.clone();
            poor.store.allocations_left = Some(left);
            assert_eq!(poor.insert(key, &[9; 40]), Err(MemError::Injected));
            assert_eq!(poor.root, before.root);
            assert_eq!(poor.store.blocks, before.store.blocks);
        }
    }
}

#[test]
fn a_key_moves_wholly_or_not_at_all() {
    let mut f = Fixture::new(TreeKind::Tiny);
    for key in 0..40u64 {
        f.insert(key * 10, &[1; 40]).unwrap();
    }
    for (old, new) in (0..40u64).flat_map(|o| (0..40u64).map(move |n| (o * 10, n * 10 + 5))) {
        for allocations_left in [Some(0), None] {
            let mut g = f.clone();
            g.store.allocations_left = allocations_left;
            let got = g.tree.rekey(&mut g.store, &mut g.root, old, new, &[2; 40]);
            assert!(got.is_ok() || allocations_left.is_some());
            assert_eq!(g.verify().entries, 40);
            let is = |f: &mut Fixture, key| f.tree.get(&mut f.store, &f.root, key).unwrap();
            assert_eq!(is(&mut g, old).is_some(), got.is_err());
            assert_eq!(is(&mut g, new), got.ok().map(|()| vec![2; 40]));
        }
    }
}

#[test]
fn values_that_are_too_long_and_roots_that_are_too_short_are_refused() {
    let mut f = Fixture::new(TreeKind::Directory);
    let long = vec![0; MAX_VALUE_BYTES + 1];
    assert!(matches!(f.insert(1, &long), Err(MemError::Tree(TreeError::Range { .. }))));
    assert!(f.tree.init_root(&mut [0; 100]).is_err());
    assert!(f.tree.init_root(&mut [0; 5000]).is_err());
}

/// `cargo test --release --test tree -- --ignored --nocapture speed`
#[test]
#[ignore = "measures the tree's speed and asserts nothing; run it by hand"]
fn speed() {
    directory::speed();
    extents::speed();
}
