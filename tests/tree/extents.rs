//! Do extents say of each block of a file what a table of blocks says?

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::time::Instant;

use lunfs::fs::extents::{Extent, ExtentTree, Freed, MAX_EXTENT_BLOCKS, MAX_FILE_BLOCKS, Mapping, Run};
use lunfs::layout::inode::CONTENT_BYTES;
use lunfs::tree::mem::{MemError, MemStore};
use lunfs::tree::{Cost, Tree, TreeError, TreeKind};
use lunfs::types::BlockNo;
use proptest::prelude::*;

use super::{OWNER, VOLUME, assert_within, cases};

const VOLUME_BLOCKS: u64 = 1 << 40;

struct File {
    extents: ExtentTree,
    store: MemStore,
    root: Vec<u8>,
}

impl File {
    fn new() -> Self {
        Self::on(ExtentTree::new(VOLUME, OWNER, VOLUME_BLOCKS))
    }
    /// On a tree of tiny nodes, which is deep.
    fn tiny() -> Self {
        let tree = Tree { volume: VOLUME, owner: OWNER, kind: TreeKind::Tiny };
        Self::on(ExtentTree::on(tree, VOLUME_BLOCKS))
    }
    fn on(extents: ExtentTree) -> Self {
        let mut root = vec![0; CONTENT_BYTES];
        extents.init(&mut root).unwrap();
        File { extents, store: MemStore::default(), root }
    }
    fn insert(&mut self, logical: u64, physical: u64, blocks: u64, unwritten: bool) -> Result<(), MemError> {
        let extent = Extent { logical, physical: BlockNo(physical), blocks, unwritten };
        self.extents.insert(&mut self.store, &mut self.root, extent)
    }
    fn all(&mut self) -> Vec<Extent> {
        let mut out = Vec::new();
        self.extents
            .list(&mut self.store, &self.root, 0, |e| {
                out.push(e);
                ControlFlow::Continue(())
            })
            .unwrap();
        out
    }
    fn level(&self) -> u8 {
        self.extents.tree().root_level(&self.root).unwrap()
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// At, length, unwritten; continue the physical run of the block before?
    Insert(u64, u64, bool, bool),
    Punch(u64, u64, u32),
    MarkWritten(u64, u64, u32),
    Truncate(u64, u32),
}

const SPACE: u64 = 3000;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        50 => (0..SPACE, 1u64..12, any::<bool>(), any::<bool>()).prop_map(|(a, n, u, c)| Op::Insert(a, n, u, c)),
        12 => (0..SPACE, 1u64..60, 1u32..6).prop_map(|(a, n, s)| Op::Punch(a, n, s)),
        20 => (0..SPACE, 1u64..60, 1u32..6).prop_map(|(a, n, s)| Op::MarkWritten(a, n, s)),
        1 => (0..SPACE, 1u32..20).prop_map(|(a, s)| Op::Truncate(a, s)),
    ]
}

type Model = BTreeMap<u64, (u64, bool)>;

/// Takes the freed runs out of the model and says that all of them were in the range.
fn free_in_model(model: &mut Model, range: std::ops::Range<u64>, runs: &[Run]) {
    let freed: Vec<u64> = runs.iter().flat_map(|r| r.start.0..r.start.0 + r.blocks).collect();
    let set: BTreeSet<u64> = freed.iter().copied().collect();
    assert_eq!(set.len(), freed.len());
    let before = model.len();
    model.retain(|logical, (physical, _)| !(set.contains(physical) && range.contains(logical)));
    assert_eq!(before - model.len(), freed.len());
}

fn against_a_table(mut f: File, ops: Vec<Op>) {
    let mut model = Model::new();
    let mut next_physical = 10u64;
    for op in ops {
        f.store.take_cost();
        match op {
            Op::Insert(at, n, unwritten, follow) => {
                let level = f.level();
                let before = at.checked_sub(1).and_then(|b| model.get(&b)).map(|(p, _)| p + 1);
                // The block after what lies before may be in use elsewhere in this file.
                let wanted = before.filter(|_| follow).filter(|p| {
                    model.values().all(|(used, _)| !(*p..p + n).contains(used))
                        && p + n < next_physical + 100_000
                });
                let physical = wanted.unwrap_or(next_physical);
                next_physical = next_physical.max(physical + n) + 20;
                let free = model.range(at..at + n).next().is_none();
                let got = f.insert(at, physical, n, unwritten);
                match free {
                    true => got.unwrap(),
                    false => assert!(matches!(got, Err(MemError::Tree(TreeError::Exists { .. })))),
                }
                if free {
                    model.extend((0..n).map(|i| (at + i, (physical + i, unwritten))));
                }
                assert_within(&mut f.store, ExtentTree::insert_cost(level, 1));
            }
            Op::Punch(at, n, steps) => {
                let mut from = Some(at);
                while let Some(start) = from {
                    let level = f.level();
                    let freed: Freed =
                        f.extents.punch(&mut f.store, &mut f.root, start..at + n, steps).unwrap();
                    assert_within(&mut f.store, ExtentTree::punch_cost(level, steps));
                    assert!(freed.runs.len() <= steps as usize);
                    free_in_model(&mut model, at..at + n, &freed.runs);
                    from = freed.resume;
                }
                assert!(model.range(at..at + n).next().is_none());
            }
            Op::MarkWritten(at, n, steps) => {
                let mut from = Some(at);
                while let Some(start) = from {
                    let level = f.level();
                    from = f.extents.mark_written(&mut f.store, &mut f.root, start..at + n, steps).unwrap();
                    assert_within(&mut f.store, ExtentTree::mark_written_cost(level, steps));
                }
                model.range_mut(at..at + n).for_each(|(_, block)| block.1 = false);
            }
            Op::Truncate(at, steps) => loop {
                let level = f.level();
                let freed = f.extents.truncate_from(&mut f.store, &mut f.root, at, steps).unwrap();
                assert_within(&mut f.store, ExtentTree::truncate_cost(level, steps));
                free_in_model(&mut model, at..u64::MAX, &freed.runs);
                if freed.resume.is_none() {
                    assert!(model.range(at..).next().is_none());
                    break;
                }
            },
        }
    }
    compare(&mut f, &model);
    let level = f.level();
    f.store.take_cost();
    while f.extents.truncate_from(&mut f.store, &mut f.root, 0, 50).unwrap().resume.is_some() {}
    assert!(level == 0 || f.store.take_cost().allocations == 0);
    assert!(f.all().is_empty() && f.store.blocks.is_empty());
}

fn compare(f: &mut File, model: &Model) {
    f.extents.tree().verify_tree(&mut f.store, &f.root).unwrap();
    let all = f.all();
    let table: Model = all
        .iter()
        .flat_map(|e| (0..e.blocks).map(|i| (e.logical + i, (e.physical.0 + i, e.unwritten))))
        .collect();
    assert_eq!(&table, model);
    for pair in all.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        assert!(
            a.end() < b.logical || a.physical.plus(a.blocks) != b.physical || a.unwritten != b.unwritten,
            "not joined: {a:?} {b:?}"
        );
    }
    for logical in 0..SPACE + 100 {
        match f.extents.lookup(&mut f.store, &f.root, logical).unwrap() {
            Mapping::Extent(e) => {
                assert_eq!(model.get(&logical), Some(&(e.physical_of(logical).unwrap().0, e.unwritten)));
            }
            Mapping::Hole { until } => {
                assert!(!model.contains_key(&logical));
                assert_eq!(until, model.range(logical..).next().map_or(MAX_FILE_BLOCKS, |(k, _)| *k));
            }
        }
        let data = model.range(logical..).find(|(_, (_, unwritten))| !unwritten).map(|(k, _)| *k);
        assert_eq!(f.extents.next_data(&mut f.store, &f.root, logical).unwrap(), data);
        let hole = (logical..).find(|l| model.get(l).is_none_or(|(_, unwritten)| *unwritten)).unwrap();
        assert_eq!(f.extents.next_hole(&mut f.store, &f.root, logical).unwrap(), hole);
    }
}

proptest! {
    #![proptest_config(cases(32))]

    #[test]
    fn says_what_a_table_of_blocks_says(ops in prop::collection::vec(op(), 1..1200)) {
        against_a_table(File::new(), ops);
    }

    #[test]
    fn says_it_with_tiny_nodes_and_many_levels(ops in prop::collection::vec(op(), 1..1200)) {
        against_a_table(File::tiny(), ops);
    }
}

#[test]
fn appending_grows_the_last_extent_in_place() {
    let mut f = File::new();
    for i in 0..10_000 {
        f.insert(i, 500 + i, 1, false).unwrap();
    }
    assert_eq!(f.all(), [Extent { logical: 0, physical: BlockNo(500), blocks: 10_000, unwritten: false }]);
    assert_eq!(f.store.take_cost(), Cost::default());
}

#[test]
fn extents_reach_the_largest_file_and_no_further() {
    let mut f = File::new();
    let full = MAX_EXTENT_BLOCKS;
    f.insert(MAX_FILE_BLOCKS - full, 1, full, false).unwrap();
    f.insert(0, full + 1, full, true).unwrap();
    // Continues the first one, which is as long as can be.
    f.insert(full, 2 * full + 1, 5, true).unwrap();
    assert_eq!(f.all().len(), 3);
    for (logical, physical, blocks) in [
        (MAX_FILE_BLOCKS, 1, 1),
        (u64::MAX, 1, 1),
        (2 * full, 0, 1),
        (2 * full, 1, 0),
        (2 * full, 1, full + 1),
        (2 * full, u64::MAX, 5),
        (2 * full, VOLUME_BLOCKS, 1),
        (2 * full, 1, u64::MAX),
    ] {
        let got = f.insert(logical, physical, blocks, false);
        assert!(matches!(got, Err(MemError::Tree(TreeError::Range { .. }))), "{logical} {physical} {blocks}");
    }
}

#[test]
fn writing_a_preallocated_file_in_order_needs_two_extents() {
    let mut f = File::new();
    f.insert(0, 100, 1000, true).unwrap();
    for i in 0..1000 {
        assert_eq!(f.extents.mark_written(&mut f.store, &mut f.root, i..i + 1, 1).unwrap(), None);
        assert!(f.all().len() <= 2);
    }
    assert_eq!(f.all(), [Extent { logical: 0, physical: BlockNo(100), blocks: 1000, unwritten: false }]);
}

pub fn speed() {
    const RUNS: u64 = 100_000;
    let mut f = File::new();
    let rate = |start: Instant| (RUNS as f64 / start.elapsed().as_secs_f64()) as u64;
    let start = Instant::now();
    (0..RUNS).for_each(|i| f.insert(i * 2, 10 + i * 3, 1, false).unwrap());
    println!("extent inserts/s, ascending, none joins: {}", rate(start));
    println!("{:?}", f.extents.tree().verify_tree(&mut f.store, &f.root).unwrap());
    let start = Instant::now();
    for i in 0..RUNS {
        let at = i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % RUNS * 2;
        assert!(matches!(f.extents.lookup(&mut f.store, &f.root, at), Ok(Mapping::Extent(_))));
    }
    println!("extent lookups/s: {}", rate(start));
    let start = Instant::now();
    while f.extents.truncate_from(&mut f.store, &mut f.root, 0, 100).unwrap().resume.is_some() {}
    println!("extents truncated/s: {}", rate(start));
    let mut f = File::new();
    f.insert(0, 100, RUNS, true).unwrap();
    let start = Instant::now();
    (0..RUNS)
        .for_each(|i| assert_eq!(f.extents.mark_written(&mut f.store, &mut f.root, i..i + 1, 1), Ok(None)));
    println!("unwritten blocks marked/s, ascending: {}", rate(start));
}
