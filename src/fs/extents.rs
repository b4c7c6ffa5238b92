//! Where a file's blocks lie: runs of physical blocks by their first logical block, on a [`Tree`].
//!
//! Invariants: extents don't overlap, don't leave the volume and don't end past the largest file; two
//! that could be one are one ([`MAX_EXTENT_BLOCKS`] aside), so that appending costs no entry. A run that
//! is *unwritten* belongs to the file and reads as zeroes; without the mark a crash between allocating
//! and writing would show old bytes.
//!
//! Each call is whole or absent unless the store itself fails. Calls over a range that may have any
//! number of extents take a limit and say where to go on: each is a transaction of a bounded size.
//!
//! Not for: allocating or freeing the physical blocks: `alloc` gets the runs that are returned here.

mod change;
mod value;

use std::ops::{ControlFlow, Range};

use crate::tree::{Cost, NodeRead, NodeStore, Tree, TreeError, TreeKind, atomically};
use crate::types::{BlockNo, InodeNo, VolumeId};

pub use value::Extent;

/// The largest file: 64 TiB.
pub const MAX_FILE_BLOCKS: u64 = 1 << 34;
/// The longest extent: 256 GiB.
pub const MAX_EXTENT_BLOCKS: u64 = 1 << 26;

/// What lies at a logical block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// The whole extent that has the block.
    Extent(Extent),
    /// No extent up to this block: the next extent's first, or [`MAX_FILE_BLOCKS`].
    Hole { until: u64 },
}

/// Physical blocks that the file no longer uses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    pub start: BlockNo,
    pub blocks: u64,
}

/// What a bounded step freed, and where the next one begins.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[must_use]
pub struct Freed {
    pub runs: Vec<Run>,
    /// `None`: done.
    pub resume: Option<u64>,
}

/// A file's extents. The root's bytes are passed to each call, as to a [`Tree`].
#[derive(Clone, Copy, Debug)]
pub struct ExtentTree {
    tree: Tree,
    /// Blocks of the volume: no extent may reach further.
    volume_blocks: u64,
}

impl ExtentTree {
    pub fn new(volume: VolumeId, owner: InodeNo, volume_blocks: u64) -> Self {
        ExtentTree { tree: Tree { volume, owner, kind: TreeKind::Extents }, volume_blocks }
    }

    /// The tree below, for fsck.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What to reserve for `count` calls of [`ExtentTree::insert`]; the level is [`Tree::root_level`].
    pub const fn insert_cost(level: u8, count: u32) -> Cost {
        Cost::inserts(level, 2 * count).and(Cost::removes(level, count))
    }

    /// For one [`ExtentTree::punch`] with `max_steps`: one split, the rest only removes.
    pub const fn punch_cost(level: u8, max_steps: u32) -> Cost {
        Cost::inserts(level, 2).and(Cost::removes(level, max_steps))
    }

    /// For one [`ExtentTree::mark_written`] with `max_steps`: each extent is changed and may join its
    /// neighbours; only the ends of the range add entries.
    pub const fn mark_written_cost(level: u8, max_steps: u32) -> Cost {
        let ends = Cost::inserts(level, 2);
        let changes = Cost { allocations: 0, touched: max_steps * level as u32 };
        ends.and(changes).and(Cost::removes(level, 2 * max_steps))
    }

    /// For one [`ExtentTree::truncate_from`] with `max_steps`: no allocation.
    pub const fn truncate_cost(level: u8, max_steps: u32) -> Cost {
        Cost::removes(level, max_steps)
    }

    /// A file that is one hole, whatever was in `root`.
    pub fn init(&self, root: &mut [u8]) -> Result<(), TreeError> {
        self.tree.init_root(root)
    }

    /// The extent that has a logical block, or how far the hole goes.
    pub fn lookup<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        logical: u64,
    ) -> Result<Mapping, S::Error> {
        if let Some(extent) = self.at_or_before(store, root, logical)?.filter(|e| logical < e.end()) {
            return Ok(Mapping::Extent(extent));
        }
        let next = match logical.checked_add(1) {
            Some(from) => self.at_or_after(store, root, from)?,
            None => None,
        };
        Ok(Mapping::Hole { until: next.map_or(MAX_FILE_BLOCKS, |e| e.logical) })
    }

    /// Maps a run that lies in a hole; joins its neighbours where it continues them.
    pub fn insert<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        extent: Extent,
    ) -> Result<(), S::Error> {
        extent.check(&self.tree, self.volume_blocks)?;
        let before = self.at_or_before(store, root, extent.end().saturating_sub(1))?;
        if let Some(before) = before.filter(|b| b.end() > extent.logical) {
            return Err(TreeError::Exists { owner: self.tree.owner, key: before.logical }.into());
        }
        let after = self.at_or_after(store, root, extent.end())?;
        let old: Vec<Extent> = before
            .into_iter()
            .filter(|b| b.joins(&extent))
            .chain(after.into_iter().filter(|a| extent.joins(a)))
            .collect();
        let mut new = old.clone();
        new.push(extent);
        self.change(store, root, &old, new)
    }

    /// Makes a hole; extents across its ends are cut. Handles at most `max_steps` extents.
    pub fn punch<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        range: Range<u64>,
        max_steps: u32,
    ) -> Result<Freed, S::Error> {
        atomically(store, root, |store, root| {
            let mut freed = Freed::default();
            let mut from = range.start;
            for _ in 0..max_steps {
                let Some(extent) = self.first_in(store, root, from..range.end)? else { return Ok(freed) };
                let hole = extent.slice(from..range.end);
                freed.runs.push(Run { start: hole.physical, blocks: hole.blocks });
                let rest = [extent.slice(0..from), extent.slice(range.end..u64::MAX)];
                let rest = rest.into_iter().filter(|e| e.blocks > 0).collect();
                self.change_inside(store, root, &[extent], rest)?;
                from = hole.end();
            }
            freed.resume = self.first_in(store, root, from..range.end)?.map(|_| from);
            Ok(freed)
        })
    }

    /// Marks what is unwritten in the range as written; holes stay holes. Handles at most `max_steps`
    /// unwritten extents and returns where to go on, `None` when done.
    pub fn mark_written<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        range: Range<u64>,
        max_steps: u32,
    ) -> Result<Option<u64>, S::Error> {
        // Most calls find nothing to do or one extent: no need for an overlay to look.
        let Some(first) = self.first_unwritten(store, root, range.clone())? else { return Ok(None) };
        atomically(store, root, |store, root| {
            let mut next = Some(first);
            let mut from = range.start;
            for _ in 0..max_steps {
                let Some(extent) = next else { return Ok(None) };
                let head = extent.slice(0..from);
                let written = Extent { unwritten: false, ..extent.slice(from..range.end) };
                let tail = extent.slice(range.end..u64::MAX);
                let mut old = vec![extent];
                if head.blocks == 0
                    && let Some(key) = extent.logical.checked_sub(1)
                {
                    old.extend(self.at_or_before(store, root, key)?.filter(|e| e.joins(&written)));
                }
                if tail.blocks == 0 {
                    let after = self.at_or_after(store, root, extent.end())?;
                    old.extend(after.filter(|e| written.joins(e)));
                }
                let mut new: Vec<Extent> =
                    [head, written, tail].into_iter().filter(|e| e.blocks > 0).collect();
                new.extend(old.iter().skip(1));
                self.change_inside(store, root, &old, new)?;
                from = written.end();
                next = self.first_unwritten(store, root, from..range.end)?;
            }
            Ok(next.map(|_| from))
        })
    }

    /// Unmaps everything from a block on, the end first. Handles at most `max_steps` extents; call again
    /// with the same block while `resume` is set.
    pub fn truncate_from<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        logical: u64,
        max_steps: u32,
    ) -> Result<Freed, S::Error> {
        atomically(store, root, |store, root| {
            let mut freed = Freed::default();
            for _ in 0..max_steps {
                let Some(last) = self.last(store, root)?.filter(|e| e.end() > logical) else {
                    return Ok(freed);
                };
                let gone = last.slice(logical..u64::MAX);
                freed.runs.push(Run { start: gone.physical, blocks: gone.blocks });
                let kept = Some(last.slice(0..logical)).filter(|e| e.blocks > 0);
                self.change_inside(store, root, &[last], kept.into_iter().collect())?;
            }
            freed.resume = self.last(store, root)?.filter(|e| e.end() > logical).map(|_| logical);
            Ok(freed)
        })
    }

    /// Shows the extents from the one that has `from`, or the first after it, until `show` breaks off.
    pub fn list<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        from: u64,
        mut show: impl FnMut(Extent) -> ControlFlow<()>,
    ) -> Result<(), S::Error> {
        let start = self.at_or_before(store, root, from)?.filter(|e| e.end() > from);
        let mut bad = None;
        self.tree.scan(store, root, start.map_or(from, |e| e.logical), |key, value| {
            match self.parse(key, value) {
                Ok(extent) => show(extent),
                Err(e) => {
                    bad = Some(e);
                    ControlFlow::Break(())
                }
            }
        })?;
        bad.map_or(Ok(()), |e| Err(e.into()))
    }

    /// SEEK_DATA: the first block from `from` on that is mapped and written.
    pub fn next_data<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        from: u64,
    ) -> Result<Option<u64>, S::Error> {
        let mut found = None;
        self.list(store, root, from, |extent| {
            if extent.unwritten {
                return ControlFlow::Continue(());
            }
            found = Some(extent.logical.max(from));
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// SEEK_HOLE: the first block from `from` on that is not mapped or not written.
    pub fn next_hole<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        from: u64,
    ) -> Result<u64, S::Error> {
        let mut end = from;
        self.list(store, root, from, |extent| {
            if extent.unwritten || extent.logical > end {
                return ControlFlow::Break(());
            }
            end = extent.end();
            ControlFlow::Continue(())
        })?;
        Ok(end)
    }

    /// The extent with the greatest logical blocks.
    pub fn last<S: NodeRead + ?Sized>(&self, store: &mut S, root: &[u8]) -> Result<Option<Extent>, S::Error> {
        self.at_or_before(store, root, u64::MAX)
    }

    /// An entry of the tree, checked. Fsck uses it on what [`Tree::walk`] shows.
    pub fn parse(&self, key: u64, value: &[u8]) -> Result<Extent, TreeError> {
        Extent::decode(&self.tree, self.volume_blocks, key, value)
    }

    fn at_or_before<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<Extent>, S::Error> {
        let entry = self.tree.get_le(store, root, key)?;
        Ok(entry.map(|e| self.parse(e.key, &e.value)).transpose()?)
    }

    fn at_or_after<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        key: u64,
    ) -> Result<Option<Extent>, S::Error> {
        let entry = self.tree.get_ge(store, root, key)?;
        Ok(entry.map(|e| self.parse(e.key, &e.value)).transpose()?)
    }

    /// The first extent that has blocks in the range.
    fn first_in<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        range: Range<u64>,
    ) -> Result<Option<Extent>, S::Error> {
        if range.is_empty() {
            return Ok(None);
        }
        if let Some(extent) = self.at_or_before(store, root, range.start)?.filter(|e| e.end() > range.start) {
            return Ok(Some(extent));
        }
        Ok(self.at_or_after(store, root, range.start)?.filter(|e| e.logical < range.end))
    }

    fn first_unwritten<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        range: Range<u64>,
    ) -> Result<Option<Extent>, S::Error> {
        let mut found = None;
        if !range.is_empty() {
            self.list(store, root, range.start, |extent| {
                found = Some(extent).filter(|e| e.unwritten && e.logical < range.end);
                match found.is_some() || extent.logical >= range.end {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })?;
        }
        Ok(found)
    }
}
