//! Allocation: which cluster, which blocks, which inode.
//!
//! * Allocation state is metadata of a cluster, covered by the cluster's lock; a host that holds it
//!   exclusively allocates without a single swap. Hosts start in different clusters.
//! * Blocks that were freed become allocatable only when the freeing transaction is durable (*frozen* until
//!   then): data is written at once. An inode needs no such delay, its body changes by transactions alone.
//! * Inodes come in groups that a cluster turns from free space once and never back. A group is born owned
//!   by its creator, by one plain write that is flushed before the transaction that marks it: that is why a
//!   create needs no swap.
//! * Space under other hosts' locks is asked for before "no space" is said.
//!
//! Not for: extents or directories (`fs`), or net counts across hosts (`heartbeat`).

mod birth;
mod bitmap;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{IntoBytes, transmute_mut, transmute_ref};

use crate::layout::cluster::{ClusterHeader, ClusterMap};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES, Geometry, lock_of_inode};
use crate::layout::lock::LockKind;
use crate::layout::{Block, LayoutError, Magic};
use crate::lock::{Access, Guard, LockError, LockId, LockManager, Mode, Patience};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{Instant, Mutex};
use crate::store::{Plan, Store, StoreError};
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo};

/// Why nothing could be allocated or freed.
#[derive(Debug, Error)]
pub enum AllocError {
    #[error("no space left on the volume")]
    NoSpace,
    #[error("block {at} is no allocatable block")]
    NotAllocatable { at: BlockNo },
    #[error("block {at} is free already")]
    FreeTwice { at: BlockNo },
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<LayoutError> for AllocError {
    fn from(e: LayoutError) -> Self {
        AllocError::Store(e.into())
    }
}

/// How long a cluster that could give no inode is passed by.
const BARREN: Duration = Duration::from_secs(2);

/// What an operation needs of one cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// Free blocks: for data and for as many tree nodes as the operation could need at worst.
    pub blocks: u32,
    /// Also one inode.
    pub inode: bool,
}

/// A cluster this host may allocate from, until dropped.
pub struct Space {
    pub cluster: u64,
    pub guard: Guard,
}

/// What is known of a cluster without its lock: hints only.
#[derive(Clone, Copy, Default)]
struct Hint {
    known: bool,
    free_blocks: u32,
    free_inodes: u32,
    /// Chunk where the last search ended.
    cursor: u64,
    /// Chunk where the last inode came from.
    inode_cursor: u64,
    births: u32,
    /// Until then not looked at for inodes: other hosts hold the locks of the free ones, and there was no room
    /// for new ones.
    barren_until: Option<Instant>,
}

struct State {
    hints: BTreeMap<u64, Hint>,
    /// Per chunk (counted over the whole volume): blocks that were freed in transactions that are not
    /// durable yet.
    frozen: BTreeMap<u64, u16>,
    /// The cluster this host last allocated from.
    current: u64,
}

/// The allocator of a mounted volume.
pub struct Allocator {
    geometry: Geometry,
    locks: Arc<LockManager>,
    store: Arc<Store>,
    state: Arc<Mutex<State>>,
    home: u64,
}

impl Allocator {
    pub fn new(geometry: Geometry, locks: Arc<LockManager>, store: Arc<Store>) -> Self {
        let clusters = geometry.clusters();
        // Hosts start as far from each other as the volume allows.
        let home = u64::from(locks.me().slot.0) * clusters / u64::from(geometry.slots);
        let state = State { hints: BTreeMap::new(), frozen: BTreeMap::new(), current: home };
        Allocator { geometry, locks, store, state: Arc::new(Mutex::new(state)), home }
    }

    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn lock_id(&self, cluster: u64) -> LockId {
        LockId { kind: LockKind::Cluster, at: self.geometry.cluster(cluster) }
    }

    /// A cluster with room for `need`, `near` if that one will do without asking anybody; none of `not`.
    pub fn space(
        &self,
        near: Option<u64>,
        need: Need,
        not: &BTreeSet<u64>,
        patience: &Patience,
    ) -> Result<Space, AllocError> {
        let clusters = self.geometry.clusters();
        let (current, mut order) = {
            let state = self.state.lock();
            (state.current, Vec::new())
        };
        order.extend(near.filter(|c| *c < clusters));
        order.extend([current, self.home]);
        order.retain(|cluster| !not.contains(cluster));
        // Held clusters first: they cost nothing.
        for cluster in order.iter().copied() {
            if self.locks.holds(self.lock_id(cluster), Mode::Exclusive)
                && let Some(space) = self.open(cluster, need, patience)?
            {
                return Ok(space);
            }
        }
        if !patience.may_wait {
            return Err(LockError::WouldWait.into());
        }
        // Then whatever nobody else holds.
        let all = || (0..clusters).map(|i| (self.home + i) % clusters).filter(|c| !not.contains(c));
        for cluster in order.into_iter().chain(all()) {
            if !self.may_fit(cluster, need) {
                continue;
            }
            let Some(guard) =
                self.locks.try_acquire(self.lock_id(cluster), Mode::Exclusive, Access::Write)?
            else {
                continue;
            };
            if let Some(space) = self.fits(Space { cluster, guard }, need)? {
                return Ok(space);
            }
        }
        // Then everybody is asked, whatever the hints say.
        for cluster in all() {
            if let Some(space) = self.open(cluster, need, patience)? {
                return Ok(space);
            }
        }
        Err(AllocError::NoSpace)
    }

    fn may_fit(&self, cluster: u64, need: Need) -> bool {
        let state = self.state.lock();
        state.hints.get(&cluster).is_none_or(|hint| !hint.known || enough(hint, need))
    }

    fn open(&self, cluster: u64, need: Need, patience: &Patience) -> Result<Option<Space>, AllocError> {
        let guard = self.locks.acquire(self.lock_id(cluster), Mode::Exclusive, Access::Write, patience)?;
        self.fits(Space { cluster, guard }, need)
    }

    /// The cluster, to give back what lies in it.
    pub fn space_of(&self, block: BlockNo, patience: &Patience) -> Result<Space, AllocError> {
        let cluster = self.geometry.cluster_of(block).ok_or(AllocError::NotAllocatable { at: block })?;
        let guard = self.locks.acquire(self.lock_id(cluster), Mode::Exclusive, Access::Write, patience)?;
        Ok(Space { cluster, guard })
    }

    fn fits(&self, space: Space, need: Need) -> Result<Option<Space>, AllocError> {
        let at = self.geometry.cluster_header(space.cluster);
        let block = self.store.read(&space.guard, at, Magic::ClusterHeader)?;
        let header = ClusterHeader::parse_cached(&block, &self.geometry, space.cluster)?;
        // What is frozen counts as free in the header; a cluster with little more than that is passed by.
        let frozen = self.frozen_blocks(space.cluster);
        let mut state = self.state.lock();
        let hint = state.hints.entry(space.cluster).or_default();
        hint.known = true;
        hint.free_blocks = header.free_blocks.get().saturating_sub(frozen);
        hint.free_inodes = header.free_inodes.get();
        if !enough(hint, need) {
            return Ok(None);
        }
        state.current = space.cluster;
        Ok(Some(space))
    }

    /// Has this cluster room for `need`, given what the plan took already?
    pub fn has_room(&self, plan: &Plan<'_>, space: &Space, need: Need) -> Result<bool, AllocError> {
        let at = self.geometry.cluster_header(space.cluster);
        let block = plan.read(&space.guard, at, Magic::ClusterHeader)?;
        let header = ClusterHeader::parse_cached(&block, &self.geometry, space.cluster)?;
        let hint = Hint {
            free_blocks: header.free_blocks.get().saturating_sub(self.frozen_blocks(space.cluster)),
            free_inodes: header.free_inodes.get(),
            barren_until: self.state.lock().hints.get(&space.cluster).and_then(|h| h.barren_until),
            ..Hint::default()
        };
        Ok(enough(&hint, need))
    }

    /// Blocks of a cluster that were freed in transactions that are not durable yet.
    fn frozen_blocks(&self, cluster: u64) -> u32 {
        let first = self.chunk_of(self.geometry.cluster(cluster));
        let chunks = self.geometry.cluster_len(cluster) / GROUP_BLOCKS;
        let state = self.state.lock();
        state.frozen.range(first..first + chunks).map(|(_, blocks)| blocks.count_ones()).sum()
    }

    /// Number of a chunk, over the whole volume.
    fn chunk_of(&self, block: BlockNo) -> u64 {
        block.0 / GROUP_BLOCKS
    }

    fn header<'p>(&self, plan: &'p mut Plan<'_>, space: &Space) -> Result<&'p mut ClusterHeader, AllocError> {
        let at = self.geometry.cluster_header(space.cluster);
        let block = plan.update(&space.guard, at, Magic::ClusterHeader)?;
        ClusterHeader::parse_cached(block, &self.geometry, space.cluster)?;
        Ok(transmute_mut!(block))
    }

    /// The map, for reading; `None` while it was never written.
    fn map(&self, plan: &Plan<'_>, space: &Space, map: u64) -> Result<Arc<Block>, AllocError> {
        let at = self.geometry.cluster_header(space.cluster);
        let block = plan.read(&space.guard, at, Magic::ClusterHeader)?;
        let header = ClusterHeader::parse_cached(&block, &self.geometry, space.cluster)?;
        if header.summaries[map as usize].written == 0 {
            let mut empty: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
            let map = ClusterMap::new_empty(&self.geometry, self.store.volume(), space.cluster, map);
            Arc::make_mut(&mut empty).copy_from_slice(map.as_bytes());
            return Ok(empty);
        }
        let at = self.geometry.cluster_map(space.cluster, map);
        Ok(plan.read(&space.guard, at, Magic::ClusterMap)?)
    }

    /// Changes one chunk and keeps the summaries true.
    fn change_chunk(
        &self,
        plan: &mut Plan<'_>,
        space: &Space,
        chunk_in_cluster: u64,
        change: impl FnOnce(&mut crate::layout::cluster::Chunk),
    ) -> Result<(), AllocError> {
        let (map, index) = (chunk_in_cluster / CHUNKS_PER_MAP, (chunk_in_cluster % CHUNKS_PER_MAP) as usize);
        let at = self.geometry.cluster_map(space.cluster, map);
        if self.header(plan, space)?.summaries[map as usize].written == 0 {
            let empty = self.map(plan, space, map)?;
            plan.put(&space.guard, at, empty)?;
            self.header(plan, space)?.summaries[map as usize].written = 1;
        }
        let block = plan.update(&space.guard, at, Magic::ClusterMap)?;
        let this: &mut ClusterMap = transmute_mut!(block);
        let chunk = &mut this.chunks[index];
        let before = *chunk;
        change(chunk);
        let after = *chunk;
        let free = |c: crate::layout::cluster::Chunk| c.used.get().count_zeros() as i64;
        let inodes =
            |c: crate::layout::cluster::Chunk| if c.group == 1 { c.inodes.count_zeros() as i64 } else { 0 };
        let blocks = free(after) - free(before);
        let free_inodes = inodes(after) - inodes(before);
        let header = self.header(plan, space)?;
        let add = |n: u32, d: i64| (i64::from(n) + d).max(0) as u32;
        header.free_blocks = U32::new(add(header.free_blocks.get(), blocks));
        header.free_inodes = U32::new(add(header.free_inodes.get(), free_inodes));
        header.groups = U32::new(add(header.groups.get(), i64::from(after.group) - i64::from(before.group)));
        let summary = &mut header.summaries[map as usize];
        summary.free_blocks = U16::new(add(summary.free_blocks.get().into(), blocks) as u16);
        summary.free_inodes = U16::new(add(summary.free_inodes.get().into(), free_inodes) as u16);
        plan.net_blocks -= blocks;
        Ok(())
    }

    /// Allocates a run of 1 to `want` blocks, as long as the cluster's fragmentation allows. `keep` blocks stay
    /// free, for the tree nodes that the same operation may need there.
    pub fn blocks(
        &self,
        plan: &mut Plan<'_>,
        space: &Space,
        want: u64,
        keep: u32,
    ) -> Result<(BlockNo, u64), AllocError> {
        let start = self.geometry.cluster(space.cluster);
        let free = self.header(plan, space)?.free_blocks.get();
        let free = free.saturating_sub(self.frozen_blocks(space.cluster)).saturating_sub(keep);
        let want = want.min(u64::from(free)).max(1);
        let (first, len) = self.find_run(plan, space, want, 1)?.ok_or(AllocError::NoSpace)?;
        let mut done = 0;
        while done < len {
            let (chunk, bit) = ((first + done) / GROUP_BLOCKS, (first + done) % GROUP_BLOCKS);
            let count = (GROUP_BLOCKS - bit).min(len - done);
            let mask = bitmap::mask(bit, count);
            self.change_chunk(plan, space, chunk, |c| c.used = U16::new(c.used.get() | mask))?;
            done += count;
        }
        let mut state = self.state.lock();
        state.hints.entry(space.cluster).or_default().cursor = (first + len) / GROUP_BLOCKS;
        Ok((start.plus(first), len))
    }

    /// The first run of `want` free blocks after the cursor, or the longest there is; in units of blocks
    /// from the cluster's start, aligned to `align` blocks.
    fn find_run(
        &self,
        plan: &Plan<'_>,
        space: &Space,
        want: u64,
        align: u64,
    ) -> Result<Option<(u64, u64)>, AllocError> {
        let maps = self.geometry.cluster_maps(space.cluster);
        let cursor = self.state.lock().hints.get(&space.cluster).map_or(0, |h| h.cursor);
        let first_map = (cursor / CHUNKS_PER_MAP).min(maps - 1);
        let at = self.geometry.cluster_header(space.cluster);
        let header_block = plan.read(&space.guard, at, Magic::ClusterHeader)?;
        let header = ClusterHeader::parse_cached(&header_block, &self.geometry, space.cluster)?;
        let mut best: Option<(u64, u64)> = None;
        // The first map is looked at twice: from the cursor on, and in the end from its beginning.
        for step in 0..=maps {
            let map = (first_map + step) % maps;
            if header.summaries[map as usize].free_blocks.get() == 0 {
                continue;
            }
            let from = if step == 0 { cursor % CHUNKS_PER_MAP } else { 0 };
            let block = self.map(plan, space, map)?;
            let this: &ClusterMap = transmute_ref!(&*block);
            let first_chunk = self.chunk_of(self.geometry.cluster(space.cluster)) + map * CHUNKS_PER_MAP;
            let free: Vec<u16> = {
                let state = self.state.lock();
                let frozen = |i: usize| state.frozen.get(&(first_chunk + i as u64)).copied().unwrap_or(0);
                let any = state.frozen.range(first_chunk..first_chunk + CHUNKS_PER_MAP).next().is_some();
                let word = |(i, c): (usize, &crate::layout::cluster::Chunk)| {
                    !(c.used.get() | if any { frozen(i) } else { 0 })
                };
                this.chunks.iter().enumerate().map(word).collect()
            };
            if let Some((start, len)) = bitmap::find_run(&free, from as usize, want, align)
                && best.is_none_or(|(_, l)| l < len)
            {
                best = Some((map * CHUNKS_PER_MAP * GROUP_BLOCKS + start, len));
                if len >= want {
                    break;
                }
            }
        }
        Ok(best)
    }

    /// Frees a run that lies in this cluster. It can be used again once the plan is durable.
    pub fn free_blocks(
        &self,
        plan: &mut Plan<'_>,
        space: &Space,
        first: BlockNo,
        count: u64,
    ) -> Result<(), AllocError> {
        let start = self.geometry.cluster(space.cluster);
        let overhead = self.geometry.cluster_overhead(space.cluster);
        let offset = first.0.wrapping_sub(start.0);
        if offset < overhead || offset + count > self.geometry.cluster_len(space.cluster) {
            return Err(AllocError::NotAllocatable { at: first });
        }
        let mut done = 0;
        while done < count {
            let (chunk, bit) = ((offset + done) / GROUP_BLOCKS, (offset + done) % GROUP_BLOCKS);
            let len = (GROUP_BLOCKS - bit).min(count - done);
            let mask = bitmap::mask(bit, len);
            let mut wrong = None;
            self.change_chunk(plan, space, chunk, |c| {
                if c.group == 1 || c.used.get() & mask != mask {
                    wrong = Some(c.group == 1);
                } else {
                    c.used = U16::new(c.used.get() & !mask);
                }
            })?;
            let at = first.plus(done);
            match wrong {
                Some(true) => return Err(AllocError::NotAllocatable { at }),
                Some(false) => return Err(AllocError::FreeTwice { at }),
                None => self.freeze(plan, self.chunk_of(at), mask),
            }
            done += len;
        }
        Ok(())
    }

    /// Is anything frozen? Then there will be more room after a commit.
    pub fn has_frozen(&self) -> bool {
        !self.state.lock().frozen.is_empty()
    }

    fn freeze(&self, plan: &mut Plan<'_>, chunk: u64, blocks: u16) {
        if is_planted(Bug::FreedReusedEarly) {
            return;
        }
        *self.state.lock().frozen.entry(chunk).or_default() |= blocks;
        let cluster = self.geometry.cluster_of(BlockNo(chunk * GROUP_BLOCKS));
        let thaw = |state: Arc<Mutex<State>>| {
            move || {
                let mut state = state.lock();
                // A cluster that was full is worth another look.
                if let Some(hint) = cluster.and_then(|cluster| state.hints.get_mut(&cluster)) {
                    hint.known = false;
                }
                if let Some(frozen) = state.frozen.get_mut(&chunk) {
                    *frozen &= !blocks;
                    if *frozen == 0 {
                        state.frozen.remove(&chunk);
                    }
                }
            }
        };
        plan.when_durable(thaw(self.state.clone()));
        plan.when_abandoned(thaw(self.state.clone()));
    }

    /// Marks an inode of this cluster as free. Its lock, counters and generation stay.
    pub fn free_inode(&self, plan: &mut Plan<'_>, space: &Space, ino: InodeNo) -> Result<(), AllocError> {
        let at = ino.body();
        let offset = at.0.wrapping_sub(self.geometry.cluster(space.cluster).0);
        if offset >= self.geometry.cluster_len(space.cluster) || offset % GROUP_BLOCKS < GROUP_INODES {
            return Err(AllocError::NotAllocatable { at });
        }
        let bit = 1u8 << (offset % GROUP_BLOCKS - GROUP_INODES);
        let mut wrong = None;
        self.change_chunk(plan, space, offset / GROUP_BLOCKS, |c| {
            if c.group != 1 {
                wrong = Some(AllocError::NotAllocatable { at });
            } else if c.inodes & bit == 0 {
                wrong = Some(AllocError::FreeTwice { at });
            } else {
                c.inodes &= !bit;
                if c.inodes == 0 && is_planted(Bug::GroupsGivenBack) {
                    (c.group, c.used) = (0, U16::ZERO);
                }
            }
        })?;
        if let Some(wrong) = wrong {
            return Err(wrong);
        }
        plan.net_inodes -= 1;
        // Its lock is ours: it can be had again.
        if let Some(hint) = self.state.lock().hints.get_mut(&space.cluster) {
            hint.barren_until = None;
            hint.known = false;
        }
        Ok(())
    }

    /// A free inode of this cluster and access to it, for good if the plan is applied. Groups are born as
    /// needed. `None`: not here; the cluster is passed by for a while, begin anew with another.
    pub fn inode(&self, plan: &mut Plan<'_>, space: &Space) -> Result<Option<(InodeNo, Guard)>, AllocError> {
        // Locks of free inodes may still be with whoever freed them; looking at many costs more than a birth.
        if let Some(found) = self.find_inode(plan, space, 4)? {
            return Ok(Some(found));
        }
        match self.give_birth(plan, space) {
            Ok(()) | Err(AllocError::NoSpace) => {}
            Err(e) => return Err(e),
        }
        let found = self.find_inode(plan, space, usize::MAX)?;
        if found.is_none() {
            let until = Instant::now() + BARREN;
            self.state.lock().hints.entry(space.cluster).or_default().barren_until = Some(until);
        }
        Ok(found)
    }

    /// The first free inode whose lock can be had without asking; gives up after `misses` that can't.
    fn find_inode(
        &self,
        plan: &mut Plan<'_>,
        space: &Space,
        mut misses: usize,
    ) -> Result<Option<(InodeNo, Guard)>, AllocError> {
        let start = self.geometry.cluster(space.cluster);
        let maps = self.geometry.cluster_maps(space.cluster);
        let cursor = self.state.lock().hints.get(&space.cluster).map_or(0, |h| h.inode_cursor);
        // From the cursor on, round to its own map's beginning.
        for step in 0..=maps {
            let map = (cursor / CHUNKS_PER_MAP + step) % maps;
            let first = if step == 0 { (cursor % CHUNKS_PER_MAP) as usize } else { 0 };
            let summary = self.header(plan, space)?.summaries[map as usize];
            if summary.written == 0 || summary.free_inodes.get() == 0 {
                continue;
            }
            let block = self.map(plan, space, map)?;
            let this: &ClusterMap = transmute_ref!(&*block);
            for (i, chunk) in this.chunks.iter().enumerate().skip(first) {
                if chunk.group != 1 || chunk.inodes == u8::MAX {
                    continue;
                }
                let index = map * CHUNKS_PER_MAP + i as u64;
                let group = start.plus(index * GROUP_BLOCKS);
                for bit in (0..GROUP_INODES).filter(|b| chunk.inodes & (1 << b) == 0) {
                    let ino = InodeNo(group.0 + GROUP_INODES + bit);
                    let id = LockId { kind: LockKind::Inode, at: lock_of_inode(ino) };
                    // A lock that another host holds is not worth asking for: there are other inodes.
                    let Some(guard) = self.locks.try_acquire(id, Mode::Exclusive, Access::Write)? else {
                        misses = misses.saturating_sub(1);
                        if misses == 0 {
                            return Ok(None);
                        }
                        continue;
                    };
                    if !self.store.is_cached(&guard, ino.body()) {
                        self.fetch_group(group, bit, &guard)?;
                    }
                    self.change_chunk(plan, space, index, |c| c.inodes |= 1 << bit)?;
                    plan.net_inodes += 1;
                    self.state.lock().hints.entry(space.cluster).or_default().inode_cursor = index;
                    return Ok(Some((ino, guard)));
                }
            }
        }
        Ok(None)
    }

    /// Reads the bodies of a whole group, as far as this host holds their locks: whoever uses one free inode
    /// of it soon uses the next.
    fn fetch_group(&self, group: BlockNo, mine: u64, guard: &Guard) -> Result<(), AllocError> {
        let others: Vec<Option<Guard>> = (0..GROUP_INODES)
            .map(|bit| {
                let id = LockId { kind: LockKind::Inode, at: group.plus(bit) };
                if bit == mine { None } else { self.locks.try_held(id, Mode::Shared, Access::Read) }
            })
            .collect();
        let guards: Vec<Option<&Guard>> = others
            .iter()
            .enumerate()
            .map(|(bit, other)| if bit as u64 == mine { Some(guard) } else { other.as_ref() })
            .collect();
        Ok(self.store.prefetch(group.plus(GROUP_INODES), &guards, Magic::Inode)?)
    }

    /// Does this cluster say that an inode lies there? Read without the lock: for addresses from outside.
    pub fn is_inode(&self, ino: InodeNo) -> Result<bool, AllocError> {
        if self.geometry.is_system_inode(ino) {
            return Ok(true);
        }
        let Some(cluster) = self.geometry.cluster_of(ino.body()) else { return Ok(false) };
        let offset = ino.0 - self.geometry.cluster(cluster).0;
        if offset % GROUP_BLOCKS < GROUP_INODES {
            return Ok(false);
        }
        let id = self.lock_id(cluster);
        let guard = self.locks.acquire(id, Mode::Shared, Access::Read, &Patience::endless())?;
        let space = Space { cluster, guard };
        let plan = self.store.plan();
        let chunk = offset / GROUP_BLOCKS;
        let block = self.map(&plan, &space, chunk / CHUNKS_PER_MAP)?;
        let this: &ClusterMap = transmute_ref!(&*block);
        Ok(this.chunks[(chunk % CHUNKS_PER_MAP) as usize].group == 1)
    }
}

fn enough(hint: &Hint, need: Need) -> bool {
    if need.inode && hint.barren_until.is_some_and(|until| Instant::now() < until) {
        return false;
    }
    let group = if need.inode && hint.free_inodes == 0 { 2 * GROUP_BLOCKS as u32 } else { 0 };
    hint.free_blocks >= need.blocks + group
}
