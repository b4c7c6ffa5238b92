//! Bad bytes are an error with a place, never a panic, an endless walk or half an operation.

use std::ops::ControlFlow;
use std::sync::Arc;

use lunfs::fs::dirtree::{DirTarget, DirTree};
use lunfs::fs::extents::{Extent, ExtentTree};
use lunfs::layout::inode::CONTENT_BYTES;
use lunfs::layout::{HEADER_BYTES, seal};
use lunfs::tree::mem::{MemError, MemStore};
use lunfs::tree::{TreeError, TreeKind, TreeVisitor};
use lunfs::types::{BLOCK_BYTES, BlockNo, InodeNo};
use proptest::prelude::*;

use super::{Fixture, OWNER, VOLUME, cases};

/// What happens to the bytes of one node (the root is node 0).
#[derive(Clone, Debug)]
enum Harm {
    Bytes(Vec<(prop::sample::Index, u8)>),
    /// A byte among the first hundred of the tree's part: head and first slots.
    Front(prop::sample::Index, u8),
    /// A random rest behind a good head.
    Rest(Vec<u8>),
    /// Another node's contents, with the identity repaired.
    CopyOf(prop::sample::Index),
    /// An eight-byte value anywhere becomes another node's address.
    Point(prop::sample::Index, prop::sample::Index),
}

fn harm() -> impl Strategy<Value = Harm> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        prop::collection::vec((index(), any::<u8>()), 1..6).prop_map(Harm::Bytes),
        (index(), any::<u8>()).prop_map(|(i, b)| Harm::Front(i, b)),
        prop::collection::vec(any::<u8>(), 512).prop_map(Harm::Rest),
        index().prop_map(Harm::CopyOf),
        (index(), index()).prop_map(|(a, b)| Harm::Point(a, b)),
    ]
}

fn apply(root: &mut [u8], store: &mut MemStore, node: prop::sample::Index, harm: &Harm, reseal: bool) {
    let mut places: Vec<BlockNo> = store.blocks.keys().copied().collect();
    places.sort_unstable();
    let which = node.index(places.len() + 1);
    let at = which.checked_sub(1).map(|i| places[i]);
    let mut block = at.map(|at| *store.blocks[&at]);
    let front = if at.is_some() { HEADER_BYTES } else { 0 };
    let bytes: &mut [u8] = match &mut block {
        Some(block) => &mut block[..],
        None => root,
    };
    match harm {
        Harm::Bytes(changes) => changes.iter().for_each(|(i, b)| bytes[i.index(bytes.len())] = *b),
        Harm::Front(i, b) => bytes[front + i.index(100)] = *b,
        Harm::Rest(rest) => {
            bytes[front + 16..].iter_mut().zip(rest.iter().cycle()).for_each(|(to, from)| *to = *from);
        }
        Harm::CopyOf(other) => {
            if !places.is_empty() {
                let other = &store.blocks[&places[other.index(places.len())]];
                let len = bytes.len() - front;
                bytes[front..].copy_from_slice(&other[HEADER_BYTES..HEADER_BYTES + len]);
            }
        }
        Harm::Point(place, other) => {
            if !places.is_empty() {
                let from = place.index(bytes.len() - 8);
                let target = places[other.index(places.len())];
                bytes[from..from + 8].copy_from_slice(&target.0.to_le_bytes());
            }
        }
    }
    if let (Some(at), Some(mut block)) = (at, block) {
        if reseal {
            seal(&mut block[..]);
        }
        store.blocks.insert(at, Arc::new(block));
    }
}

/// Runs one operation on a copy: if it fails, nothing may have changed.
fn whole_or_absent<T>(
    store: &MemStore,
    root: &[u8],
    work: impl FnOnce(&mut MemStore, &mut [u8]) -> Result<T, MemError>,
) {
    let (mut new_store, mut new_root) = (store.clone(), root.to_vec());
    if let Err(e) = work(&mut new_store, &mut new_root) {
        assert!(!matches!(e, MemError::Tree(TreeError::Unstable { .. })), "{e}");
        assert_eq!(new_root, root, "{e}");
        assert!(new_store.blocks == store.blocks, "{e}");
    }
}

struct Everything(u64);

impl TreeVisitor<MemError> for Everything {
    fn node(&mut self, _: BlockNo, _: u8) {
        self.0 += 1;
    }
    fn entry(&mut self, _: u64, _: &[u8]) {
        self.0 += 1;
    }
    fn damaged(&mut self, _: BlockNo, _: u64, _: u64, _: MemError) {
        self.0 += 1;
    }
}

/// As long as a tiny node takes.
const LONGEST: usize = 40;

fn use_tree(f: &Fixture, probes: &[u64]) {
    let (tree, root) = (f.tree, &f.root[..]);
    let mut store = f.store.clone();
    let mut everything = Everything(0);
    tree.walk(&mut store, root, &mut everything);
    // Each block is met at most once: entries and damage can't outnumber the slots that exist.
    assert!(everything.0 <= (store.blocks.len() as u64 + 2) * 700);
    let _ = tree.last(&mut store, root);
    for key in probes {
        let key = *key;
        let _ = tree.get(&mut store, root, key);
        let _ = tree.get_le(&mut store, root, key);
        let _ = tree.get_ge(&mut store, root, key);
        let mut left = 2000;
        let _ = tree.scan(&mut store, root, key, |_, _| {
            left -= 1;
            if left > 0 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        let value = [7; LONGEST];
        whole_or_absent(&f.store, root, |s, r| tree.insert(s, r, key, &value));
        whole_or_absent(&f.store, root, |s, r| tree.replace(s, r, key, &value));
        whole_or_absent(&f.store, root, |s, r| tree.remove(s, r, key));
        whole_or_absent(&f.store, root, |s, r| tree.rekey(s, r, key, key ^ 0x55, &value));
        whole_or_absent(&f.store, root, |s, r| tree.free_all(s, r, 1));
    }
    // Many in a row: what one leaves behind must not make another panic or run on.
    let mut f = f.clone();
    for key in probes.iter().flat_map(|k| (0..60).map(move |i| k.wrapping_add(i * 7))) {
        let _ = f.insert(key, &[1; LONGEST]);
        let _ = f.remove(key ^ 1);
    }
    for _ in 0..1000 {
        if !matches!(f.tree.free_all(&mut f.store, &mut f.root, 5), Ok(false)) {
            return;
        }
    }
    panic!("freeing goes on for ever");
}

/// A tree of several levels. Its keys are below 16384.
fn sample(kind: TreeKind) -> Fixture {
    let mut f = Fixture::new(kind);
    let (keys, shortest) = if kind == TreeKind::Tiny { (600u64, 0) } else { (5000, 250) };
    for key in 0..keys {
        let len = shortest + (key % 41) as usize;
        f.insert(key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50, &[key as u8; 300][..len]).unwrap();
    }
    assert!(f.level() >= 2);
    f.store.verify = Some(VOLUME);
    f.store.seal_all();
    f
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn a_harmed_tree_is_an_error_and_never_half_an_operation(
        harms in prop::collection::vec((any::<prop::sample::Index>(), harm(), prop::bool::weighted(0.9)), 1..12),
        probes in prop::collection::vec(0u64..16384, 12),
    ) {
        for kind in [TreeKind::Directory, TreeKind::Tiny] {
        let mut f = sample(kind);
        for (node, harm, reseal) in &harms {
            apply(&mut f.root, &mut f.store, *node, harm, *reseal);
        }
        use_tree(&f, &probes);
        }
    }

    #[test]
    fn harmed_directories_and_files_are_errors(
        harms in prop::collection::vec((any::<prop::sample::Index>(), harm(), prop::bool::weighted(0.95)), 1..12),
        probes in prop::collection::vec(0u64..2000, 8),
    ) {
        let dir = DirTree::new(VOLUME, OWNER, [1; 16]);
        let (mut store, mut root) = (MemStore::default(), vec![0; CONTENT_BYTES]);
        let target = DirTarget { ino: InodeNo(9), generation: 1, kind: 4 };
        dir.init(&mut root).unwrap();
        for i in 0..1500 {
            let name = format!("name {i}");
            let _ = dir.insert(&mut store, &mut root, name.as_bytes(), target).unwrap();
        }
        store.verify = Some(VOLUME);
        store.seal_all();
        for (node, harm, reseal) in &harms {
            apply(&mut root, &mut store, *node, harm, *reseal);
        }
        for probe in &probes {
            let name = format!("name {probe}");
            let name = name.as_bytes();
            let _ = dir.lookup(&mut store, &root, name);
            let _ = dir.list(&mut store, &root, probe << 52, |_| ControlFlow::Continue(()));
            whole_or_absent(&store, &root, |s, r| dir.insert(s, r, name, target).map(|_| ()));
            whole_or_absent(&store, &root, |s, r| dir.remove(s, r, name));
            whole_or_absent(&store, &root, |s, r| dir.set_target(s, r, name, target));
        }

        let file = ExtentTree::new(VOLUME, OWNER, 1 << 30);
        let (mut store, mut root) = (MemStore::default(), vec![0; CONTENT_BYTES]);
        file.init(&mut root).unwrap();
        for i in 0..1500 {
            let extent = Extent { logical: i * 4, physical: BlockNo(i * 9 + 1), blocks: 3, unwritten: i % 3 == 0 };
            file.insert(&mut store, &mut root, extent).unwrap();
        }
        store.verify = Some(VOLUME);
        store.seal_all();
        for (node, harm, reseal) in &harms {
            apply(&mut root, &mut store, *node, harm, *reseal);
        }
        for probe in probes {
            let at = probe * 3;
            let _ = file.lookup(&mut store, &root, at);
            let _ = file.next_data(&mut store, &root, at);
            let _ = file.next_hole(&mut store, &root, at);
            let extent = Extent { logical: at | 3, physical: BlockNo(1 << 20), blocks: 1, unwritten: true };
            whole_or_absent(&store, &root, |s, r| file.insert(s, r, extent));
            whole_or_absent(&store, &root, |s, r| file.punch(s, r, at..at + 50, 30).map(|_| ()));
            whole_or_absent(&store, &root, |s, r| file.mark_written(s, r, at..at + 50, 30));
            whole_or_absent(&store, &root, |s, r| file.truncate_from(s, r, at, 40).map(|_| ()));
        }
    }

    #[test]
    fn random_bytes_behind_a_good_head_are_an_error(bytes in prop::collection::vec(any::<u8>(), CONTENT_BYTES)) {
        let mut f = Fixture::new(TreeKind::Directory);
        f.root.copy_from_slice(&bytes);
        use_tree(&f, &[0, 1 << 40]);
        let good = Fixture::new(TreeKind::Directory);
        f.root[..10].copy_from_slice(&good.root[..10]);
        f.root[11] = 0;
        f.root[12..14].copy_from_slice(&4000u16.min(CONTENT_BYTES as u16 - 500).to_le_bytes());
        use_tree(&f, &[0, 1 << 40]);
    }
}

/// One field is broken; the message names the block and the field.
#[test]
fn each_fault_is_named_with_its_block() {
    // Offsets in the block; the node's head is behind the block's.
    let (owner, kind, level, count, heap) = (64, 72, 73, 74, 76);
    let (key, offset, len) = (80 + 12, 80 + 8, 80 + 10);
    for (what, at, byte) in [
        ("lock", 0x28, 1),
        ("owner", owner, 1),
        ("kind", kind, 2),
        ("level", level, 1),
        ("level", level, 200),
        ("count", count + 1, 8),
        ("heap", heap, 0),
        ("heap", heap + 1, 0xff),
        ("key", key + 7, 0xff),
        ("offset", offset + 1, 0xff),
        ("len", len + 1, 0x0f),
    ] {
        let mut f = sample(TreeKind::Directory);
        let leaf = leaf_with(&mut f, 5000);
        let mut block = *f.store.blocks[&leaf];
        block[at] = if what == "lock" { block[at] ^ byte } else { byte };
        if at == heap {
            block[heap + 1] = 0;
        }
        seal(&mut block[..]);
        f.store.blocks.insert(leaf, Arc::new(block));
        let got = f.tree.verify_tree(&mut f.store, &f.root);
        match got {
            Err(MemError::Tree(TreeError::Damaged { owner: OWNER, at, field, .. })) => {
                // A length that leads outside is met as an offset.
                let same = field == what || (what == "len" && field == "offset");
                assert!(same && at == leaf, "{what}: {field} at {at}");
            }
            other => panic!("{what}: {other:?}"),
        }
    }
}

/// The leaf that has a key near this one.
fn leaf_with(f: &mut Fixture, near: u64) -> BlockNo {
    let key = f.tree.get_ge(&mut f.store, &f.root, near).unwrap().unwrap().key;
    let mut probe = f.store.clone();
    probe.take_cost();
    let found = probe.blocks.keys().copied().find(|at| {
        let mut without = f.store.clone();
        without.blocks.remove(at);
        let path_breaks = f.tree.get(&mut without, &f.root, key).is_err();
        let leaf = f.store.blocks[at][HEADER_BYTES + 9] == 0;
        path_breaks && leaf
    });
    found.unwrap()
}

#[test]
fn a_key_past_the_range_of_its_leaf_is_refused() {
    let mut f = sample(TreeKind::Directory);
    let leaf = leaf_with(&mut f, 5000);
    let mut block = *f.store.blocks[&leaf];
    let count = usize::from(block[HEADER_BYTES + 10]);
    // The top byte of the last key.
    block[HEADER_BYTES + 16 + (count - 1) * 12 + 7] = 0x7f;
    seal(&mut block[..]);
    f.store.blocks.insert(leaf, Arc::new(block));
    let got = f.tree.verify_tree(&mut f.store, &f.root);
    assert!(
        matches!(got, Err(MemError::Tree(TreeError::Damaged { field: "key", at, .. })) if at == leaf),
        "{got:?}"
    );
}

#[test]
fn a_removal_that_is_done_does_not_fail_over_the_neighbour_it_leaves() {
    let mut f = Fixture::new(TreeKind::Tiny);
    for key in 1..=4u64 {
        f.insert(key, &[key as u8; 40]).unwrap();
    }
    assert_eq!((f.level(), f.verify().leaves), (1, 2));
    f.remove(1).unwrap().unwrap();
    f.remove(2).unwrap().unwrap();
    let other = f.store.blocks.iter().find(|(_, b)| b[HEADER_BYTES + 16] == 4).map(|(at, _)| *at).unwrap();
    Arc::make_mut(f.store.blocks.get_mut(&other).unwrap())[HEADER_BYTES + 8] ^= 1;
    assert_eq!(f.remove(3), Ok(Some(vec![3; 40])));
    assert_eq!(f.store.blocks.len(), 1);
    let got = f.tree.get(&mut f.store, &f.root, 4);
    assert!(matches!(got, Err(MemError::Tree(TreeError::Damaged { field: "kind", .. }))), "{got:?}");
}

#[test]
fn a_child_that_points_up_is_refused() {
    let mut f = sample(TreeKind::Directory);
    assert!(f.level() >= 1);
    // A second block with the level of its parent: as in a cycle.
    let leaf = leaf_with(&mut f, 100);
    let mut block = *f.store.blocks[&leaf];
    block[HEADER_BYTES + 9] = f.level();
    seal(&mut block[..]);
    f.store.blocks.insert(leaf, Arc::new(block));
    let got = f.tree.get(&mut f.store, &f.root, 100);
    assert!(matches!(got, Err(MemError::Tree(TreeError::Damaged { field: "level", .. }))), "{got:?}");
}

#[test]
fn two_children_that_are_one_block_are_refused() {
    let mut f = Fixture::new(TreeKind::Extents);
    for key in 0..400u64 {
        f.insert(key, &[1; 16]).unwrap();
    }
    assert_eq!(f.level(), 1);
    // The children's addresses are the last values built: both lie at the end of the root.
    let end = f.root.len();
    let first: [u8; 8] = f.root[end - 8..].try_into().unwrap();
    f.root[end - 16..end - 8].copy_from_slice(&first);
    let got = f.tree.verify_tree(&mut f.store, &f.root);
    assert!(matches!(got, Err(MemError::Tree(TreeError::Damaged { field: "key", .. }))), "{got:?}");
}

#[test]
fn a_node_of_another_file_or_kind_is_refused() {
    let mut f = sample(TreeKind::Directory);
    for tree in [
        lunfs::tree::Tree { owner: InodeNo(OWNER.0 + 1), ..f.tree },
        lunfs::tree::Tree { kind: TreeKind::Extents, ..f.tree },
    ] {
        assert!(matches!(
            tree.get(&mut f.store, &f.root, 1),
            Err(MemError::Tree(TreeError::Damaged { field: "owner" | "kind", .. }))
        ));
    }
    assert_eq!(f.store.blocks.values().next().unwrap().len(), BLOCK_BYTES);
}

#[test]
fn a_walk_goes_on_after_a_lost_leaf() {
    let mut f = sample(TreeKind::Directory);
    let all = f.verify();
    let leaf = leaf_with(&mut f, 9000);
    f.store.blocks.remove(&leaf);
    let mut everything = Everything(0);
    let left = f.tree.walk(&mut f.store, &f.root, &mut everything);
    assert_eq!(left.leaves, all.leaves - 1);
    assert!(left.entries < all.entries && left.entries > all.entries / 2);
    assert!(f.tree.verify_tree(&mut f.store, &f.root).is_err());
}

/// What a walk shows, in its order.
#[derive(Default, PartialEq, Debug)]
struct Shown {
    nodes: Vec<BlockNo>,
    entries: Vec<(u64, Vec<u8>)>,
    damaged: Vec<(BlockNo, u64, u64)>,
}

impl TreeVisitor<MemError> for Shown {
    fn node(&mut self, at: BlockNo, _: u8) {
        self.nodes.push(at);
    }
    fn entry(&mut self, key: u64, value: &[u8]) {
        self.entries.push((key, value.to_vec()));
    }
    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, _: MemError) {
        self.damaged.push((at, lo, hi));
    }
}

#[test]
fn the_parts_of_a_walk_are_the_walk() {
    for lost in [None, Some(0), Some(9000), Some(12_000)] {
        let mut f = sample(TreeKind::Tiny);
        if let Some(key) = lost {
            let leaf = leaf_with(&mut f, key);
            f.store.blocks.remove(&leaf);
        }
        let mut whole = Shown::default();
        f.tree.walk(&mut f.store, &f.root, &mut whole);
        assert!(whole.nodes.len() > 50 && whole.damaged.len() == usize::from(lost.is_some()));
        for most in [1, 2, 3, 10, 1000, u32::MAX] {
            let (mut parts, mut from, mut count) = (Shown::default(), 0, 0);
            while let Some(next) = f.tree.walk_part(&mut f.store, &f.root, from, most, &mut parts) {
                assert!(next > from, "no progress at {from:#x}");
                from = next;
                count += 1;
            }
            assert_eq!(parts, whole, "parts of {most} leaves, {count} more than one");
            assert_eq!(count > 0, most < 1000);
        }
    }
}
