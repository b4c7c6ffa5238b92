//! Does a directory keep its names, its cookies and its bounds?

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

use lunfs::fs::dirtree::{DirEntryRef, DirTarget, DirTree, Inserted, NameHash, name_hash};
use lunfs::layout::inode::CONTENT_BYTES;
use lunfs::tree::mem::{MemError, MemStore};
use lunfs::tree::{Cost, TreeError};
use lunfs::types::InodeNo;
use proptest::prelude::*;

use super::{OWNER, VOLUME};

struct Dir {
    dir: DirTree,
    store: MemStore,
    root: Vec<u8>,
}

fn target(n: u64) -> DirTarget {
    DirTarget { ino: InodeNo(n + 1), generation: n as u32, kind: 8 }
}

impl Dir {
    fn new(hash: NameHash) -> Self {
        let dir = DirTree::with_hash(VOLUME, OWNER, [3; 16], hash);
        let mut root = vec![0; CONTENT_BYTES];
        dir.init(&mut root).unwrap();
        Dir { dir, store: MemStore::default(), root }
    }
    fn insert(&mut self, name: &[u8], n: u64) -> Result<Inserted, MemError> {
        self.dir.insert(&mut self.store, &mut self.root, name, target(n))
    }
    fn remove(&mut self, name: &[u8]) -> Option<DirEntryRef> {
        self.dir.remove(&mut self.store, &mut self.root, name).unwrap()
    }
    fn lookup(&mut self, name: &[u8]) -> Option<DirEntryRef> {
        self.dir.lookup(&mut self.store, &self.root, name).unwrap()
    }
    fn list(&mut self, after: u64, limit: usize) -> Vec<(u64, Vec<u8>)> {
        let mut out = Vec::new();
        self.dir
            .list(&mut self.store, &self.root, after, |item| {
                assert!(self.dir.key_fits(&item));
                out.push((item.key, item.name.to_vec()));
                if out.len() < limit { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            })
            .unwrap();
        out
    }
    fn level(&self) -> u8 {
        self.dir.tree().root_level(&self.root).unwrap()
    }
}

/// Three hashes for all names: long runs of collisions. 0 is one of them, which no key may keep.
fn bad_hash(_: &[u8; 16], name: &[u8]) -> u64 {
    name.iter().map(|b| u64::from(*b)).sum::<u64>() % 3
}

fn all_ones(_: &[u8; 16], _: &[u8]) -> u64 {
    u64::MAX
}

fn against_a_map(hash: NameHash, ops: Vec<(u8, u16)>) {
    let mut d = Dir::new(hash);
    let mut model: BTreeMap<Vec<u8>, DirEntryRef> = BTreeMap::new();
    for (n, (what, which)) in ops.into_iter().enumerate() {
        let name = format!("{which}-{}", "x".repeat(usize::from(which % 250))).into_bytes();
        let level = d.level();
        d.store.take_cost();
        let bound = match what {
            0..=5 => {
                let got = d.insert(&name, n as u64).unwrap();
                match (got, model.get(&name)) {
                    (Inserted::Exists(e), Some(old)) => assert_eq!(e, *old),
                    (Inserted::Done(key), None) => {
                        assert!(key > 2 && key < 1 << 63);
                        assert!(model.values().all(|e| e.key != key));
                        model.insert(name, DirEntryRef { key, target: target(n as u64) });
                    }
                    other => panic!("{other:?}"),
                }
                DirTree::insert_cost(level)
            }
            6..=8 => {
                assert_eq!(d.remove(&name), model.remove(&name));
                DirTree::remove_cost(level)
            }
            _ => {
                let new = target(n as u64 + 1_000_000);
                let got = d.dir.set_target(&mut d.store, &mut d.root, &name, new).unwrap();
                assert_eq!(got, model.get(&name).copied());
                if let Some(e) = model.get_mut(&name) {
                    e.target = new;
                }
                DirTree::set_target_cost(level)
            }
        };
        let used = d.store.take_cost();
        assert!(used.allocations <= bound.allocations && used.touched <= bound.touched, "{used:?} {bound:?}");
    }
    for (name, entry) in &model {
        assert_eq!(d.lookup(name), Some(*entry));
        let (target, found) = d.dir.by_key(&mut d.store, &d.root, entry.key).unwrap().unwrap();
        assert_eq!((target, &found), (entry.target, name));
    }
    let mut want: Vec<_> = model.iter().map(|(name, e)| (e.key, name.clone())).collect();
    want.sort_unstable();
    assert_eq!(d.list(0, usize::MAX), want);
    d.dir.tree().verify_tree(&mut d.store, &d.root).unwrap();
    for name in model.keys() {
        d.remove(name).unwrap();
    }
    assert!(d.dir.is_empty(&mut d.store, &d.root).unwrap() && d.store.blocks.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn keeps_names(ops in prop::collection::vec((0u8..10, 0u16..400), 1..800)) {
        against_a_map(name_hash, ops);
    }

    #[test]
    fn keeps_names_that_collide(ops in prop::collection::vec((0u8..10, 0u16..60), 1..400)) {
        against_a_map(bad_hash, ops);
    }
}

#[test]
fn a_listing_goes_on_from_its_cookie_whatever_happens_in_between() {
    let mut d = Dir::new(name_hash);
    let old: Vec<Vec<u8>> = (0..3000).map(|i| format!("old{i}").into_bytes()).collect();
    for (i, name) in old.iter().enumerate() {
        assert!(matches!(d.insert(name, i as u64), Ok(Inserted::Done(_))));
    }
    let (mut seen, mut after, mut round) = (Vec::new(), 0, 0);
    loop {
        let page = d.list(after, 7);
        let Some(last) = page.last() else { break };
        after = last.0;
        seen.extend(page.into_iter().map(|(_, name)| name).filter(|n| n.starts_with(b"old")));
        // Others insert, delete theirs, and delete what was shown last.
        for i in 0..5 {
            assert!(matches!(d.insert(format!("new{round}-{i}").as_bytes(), 1), Ok(Inserted::Done(_))));
        }
        if round > 0 {
            d.remove(format!("new{}-{}", round - 1, round % 5).as_bytes()).unwrap();
        }
        let gone = seen.last().cloned().unwrap_or_default();
        d.remove(&gone);
        round += 1;
    }
    seen.sort_unstable();
    let mut want = old;
    want.sort_unstable();
    assert_eq!(seen, want);
}

#[test]
fn a_full_run_of_collisions_is_no_space_and_a_freed_place_is_used_again() {
    let mut d = Dir::new(all_ones);
    let first = d.dir.first_key(b"anything");
    // Through the tree: 65536 inserts that walk the run would take minutes.
    for index in 0..1u64 << 16 {
        let mut value = vec![1; 13];
        value.extend_from_slice(format!("n{index}").as_bytes());
        d.dir.tree().insert(&mut d.store, &mut d.root, first + index, &value).unwrap();
    }
    assert_eq!(first + 0xffff, (1 << 63) - 1);
    assert_eq!(d.insert(b"one more", 1), Ok(Inserted::Full));
    assert_eq!(d.lookup(b"n65535").unwrap().key, first + 65535);
    assert_eq!(d.remove(b"n777").unwrap().key, first + 777);
    assert_eq!(d.insert(b"one more", 1), Ok(Inserted::Done(first + 777)));
}

#[test]
fn impossible_names_and_damaged_entries_are_errors() {
    let mut d = Dir::new(name_hash);
    assert!(matches!(d.insert(b"", 1), Err(MemError::Tree(TreeError::Range { .. }))));
    assert!(matches!(d.insert(&[b'a'; 256], 1), Err(MemError::Tree(TreeError::Range { .. }))));
    assert!(matches!(d.insert(&[b'a'; 255], 1), Ok(Inserted::Done(_))));
    let key = d.dir.first_key(b"b");
    for bad in [&[1; 5][..], &[1; 13], &[0; 20], b"0123456789abca/b"] {
        d.dir.tree().insert(&mut d.store, &mut d.root, key, bad).unwrap();
        let got = d.dir.lookup(&mut d.store, &d.root, b"b");
        assert!(matches!(got, Err(MemError::Tree(TreeError::Value { .. }))), "{bad:?}");
        let got = d.dir.list(&mut d.store, &d.root, 0, |_| ControlFlow::Continue(()));
        assert!(matches!(got, Err(MemError::Tree(TreeError::Value { .. }))), "{bad:?}");
        d.dir.tree().remove(&mut d.store, &mut d.root, key).unwrap().unwrap();
    }
}

#[test]
fn a_small_directory_needs_no_block() {
    let mut d = Dir::new(name_hash);
    for i in 0..90 {
        assert!(matches!(d.insert(format!("file-name-{i:06}").as_bytes(), i), Ok(Inserted::Done(_))));
    }
    assert_eq!(d.store.take_cost(), Cost::default());
}

pub fn speed() {
    const NAMES: u64 = 100_000;
    let mut d = Dir::new(name_hash);
    let names: Vec<Vec<u8>> = (0..NAMES).map(|i| format!("file-{i:08}.dat").into_bytes()).collect();
    let rate = |start: Instant| (NAMES as f64 / start.elapsed().as_secs_f64()) as u64;
    let start = Instant::now();
    for (i, name) in names.iter().enumerate() {
        assert!(matches!(d.insert(name, i as u64), Ok(Inserted::Done(_))));
    }
    println!("directory inserts/s: {}", rate(start));
    println!("{:?}", d.dir.tree().verify_tree(&mut d.store, &d.root).unwrap());
    let start = Instant::now();
    names.iter().for_each(|name| assert!(d.lookup(name).is_some()));
    println!("directory lookups/s: {}", rate(start));
    let start = Instant::now();
    assert_eq!(d.list(0, usize::MAX).len(), names.len());
    println!("directory listed entries/s: {}", rate(start));
    let start = Instant::now();
    names.iter().for_each(|name| assert!(d.remove(name).is_some()));
    println!("directory removes/s: {}", rate(start));
}
