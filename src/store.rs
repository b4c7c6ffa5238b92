//! Metadata blocks: read under a guard, changed in transactions, journalled, put in place.
//!
//! * A block is readable only through a guard of its covering lock; what was cached in an older epoch of
//!   the lock is void (invariant 4).
//! * An operation collects its changes in a [`Plan`] under exclusive tenures (a change without its lock is
//!   refused where it is added) and joins the running transaction with all of them at once. Nothing waits
//!   for a lock, for data or for the kernel after that: a plan that joined is complete.
//! * Commits and checkpoints take no lock and run one at a time, so that a block freed in a durable
//!   transaction has no write under way.
//! * [`Store::settle`] makes everything under one lock durable and in place: that must be true before a lock
//!   leaves the host (invariant 5).
//!
//! Not for: file data, or knowing what blocks mean.

mod checkpoint;
mod plan;

pub use plan::{Plan, Planned};

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lru::LruCache;
use thiserror::Error;

use crate::device::{AlignedBuf, DeviceError};
use crate::heartbeat::Published;
use crate::journal::{Journal, Transaction, record};
use crate::layout::journal::{JournalRecord, RecordKind};
use crate::layout::{Block, LayoutError, Magic, header_of, seal, verify, zero_block};
use crate::lease::{Door, IoClass};
use crate::lock::Guard;
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{Instant, Mutex};
use crate::types::{BLOCK_BYTES, BlockNo, Tenure, VolumeId};

/// Why metadata could not be read or changed.
#[derive(Clone, Debug, Error)]
pub enum StoreError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Damaged(#[from] LayoutError),
    #[error("metadata at block {at}: covered by lock {found}, read under lock {held}")]
    WrongLock { at: BlockNo, found: BlockNo, held: BlockNo },
    #[error("change of block {at} without an exclusive tenure of lock {lock}")]
    NoTenure { at: BlockNo, lock: BlockNo },
    #[error("an operation of {blocks} blocks does not fit into the journal")]
    TooLarge { blocks: usize },
    /// After a failed commit nothing more is committed.
    #[error("an earlier commit failed: {0}")]
    Failed(String),
}

/// A changed block on its way: running, committing or committed.
#[derive(Clone)]
struct Dirty {
    block: Arc<Block>,
    lock: BlockNo,
    tenure: Tenure,
    epoch: u64,
}

struct Clean {
    block: Arc<Block>,
    lock: BlockNo,
    epoch: u64,
}

/// Committed, not in place.
struct Pending {
    dirty: Dirty,
    sequence: u64,
}

type Hook = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Running {
    id: u64,
    blocks: BTreeMap<BlockNo, Dirty>,
    revokes: BTreeMap<BlockNo, (BlockNo, Tenure)>,
    hooks: Vec<Hook>,
    net_blocks: i64,
    net_inodes: i64,
    began: Option<Instant>,
}

struct State {
    clean: LruCache<BlockNo, Clean>,
    running: Running,
    committing: BTreeMap<BlockNo, Dirty>,
    /// What the transaction under way allocates: neither published nor running.
    committing_net: (i64, i64),
    pending: BTreeMap<BlockNo, Pending>,
    /// When the oldest of them was committed.
    pending_since: Option<Instant>,
    /// Id of the last durable transaction.
    durable: u64,
    failed: Option<String>,
}

/// What is committed goes to its place after this long: it bounds replay, and lets others see by reading
/// that a group of inodes exists.
const IN_PLACE_AGE: Duration = Duration::from_secs(10);

/// Called with every block served from the cache: tests compare it with the disk.
pub type HitCheck = Arc<dyn Fn(BlockNo, &Block) + Send + Sync>;

/// The metadata of a mounted volume as this host sees it.
pub struct Store {
    door: Arc<Door>,
    volume: VolumeId,
    published: Arc<Published>,
    state: Mutex<State>,
    /// Held over every commit and checkpoint.
    io: Mutex<Journal>,
    /// The most ring blocks of one transaction.
    limit: usize,
    hit_check: OnceLock<HitCheck>,
    commit_each: AtomicBool,
}

impl Store {
    pub fn new(
        door: Arc<Door>,
        volume: VolumeId,
        journal: Journal,
        published: Arc<Published>,
        cache_blocks: usize,
    ) -> Self {
        let limit = (journal.capacity_blocks() / 4).clamp(8, 8192) as usize;
        let capacity = NonZeroUsize::new(cache_blocks.max(64)).unwrap_or(NonZeroUsize::MIN);
        let running = Running { id: 1, ..Running::default() };
        Store {
            door,
            volume,
            published,
            state: Mutex::new(State {
                clean: LruCache::new(capacity),
                running,
                committing: BTreeMap::new(),
                committing_net: (0, 0),
                pending: BTreeMap::new(),
                pending_since: None,
                durable: 0,
                failed: None,
            }),
            io: Mutex::new(journal),
            limit,
            hit_check: OnceLock::new(),
            commit_each: AtomicBool::new(false),
        }
    }

    /// Compares every block served from the cache with the disk, from now on.
    pub fn set_hit_check(&self, check: HitCheck) {
        let _ = self.hit_check.set(check);
    }

    /// Commits every operation at once, from now on: tests of long work want each of its steps to be durable by
    /// itself, as it is when a commit happens to fall between two.
    pub fn commit_each_step(&self) {
        self.commit_each.store(true, Ordering::Relaxed);
    }

    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    pub fn door(&self) -> &Arc<Door> {
        &self.door
    }

    /// The block as it is now, under the guard of its covering lock.
    pub fn read(&self, guard: &Guard, at: BlockNo, magic: Magic) -> Result<Arc<Block>, StoreError> {
        {
            let mut state = self.state.lock();
            if let Some(dirty) = state.newest(at) {
                if dirty.lock != guard.lock() {
                    return Err(StoreError::WrongLock { at, found: dirty.lock, held: guard.lock() });
                }
                let block = dirty.block.clone();
                return check_magic(block, magic, at);
            }
            if let Some(clean) = state.clean.get(&at)
                && clean.lock == guard.lock()
                && clean.epoch == guard.epoch()
            {
                let block = clean.block.clone();
                drop(state);
                // Past the lease nothing is answered: what is found here goes nowhere.
                if let Some(check) = self.hit_check.get()
                    && self.door.lease().allows()
                {
                    check(at, &block);
                }
                return check_magic(block, magic, at);
            }
        }
        let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
        self.door.read(IoClass::Metadata, at, &mut buf)?;
        let mut block: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
        Arc::make_mut(&mut block).copy_from_slice(&buf);
        verify(&block[..], magic, self.volume, at)?;
        let found = header_of(&block[..]).map_or(BlockNo(0), |h| BlockNo(h.lock.get()));
        if found != guard.lock() {
            return Err(StoreError::WrongLock { at, found, held: guard.lock() });
        }
        let clean = Clean { block: block.clone(), lock: guard.lock(), epoch: guard.epoch() };
        self.state.lock().clean.put(at, clean);
        Ok(block)
    }

    /// The block as it counts under the guard, but never from the cache of clean blocks, which hides what became of
    /// the device: read there, unless a newer image waits here to be put in place. Nothing of it is checked, and
    /// nothing is kept in memory: for checks of whole volumes.
    pub fn look(&self, _covering: &Guard, at: BlockNo) -> Result<Box<Block>, StoreError> {
        let mut block = zero_block();
        let newest = self.state.lock().newest(at).map(|dirty| dirty.block.clone());
        match newest {
            // It gets its checksum when it is committed.
            Some(newest) => {
                block.copy_from_slice(&newest[..]);
                seal(&mut block[..]);
            }
            None => {
                let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
                self.door.read(IoClass::Metadata, at, &mut buf)?;
                block.copy_from_slice(&buf);
            }
        }
        Ok(block)
    }

    /// Is the block in memory, and true under the guard?
    pub fn is_cached(&self, guard: &Guard, at: BlockNo) -> bool {
        let state = self.state.lock();
        state.newest(at).is_some()
            || state.clean.peek(&at).is_some_and(|c| c.lock == guard.lock() && c.epoch == guard.epoch())
    }

    /// Brings adjacent blocks, each under a guard of its own, into memory with one command. Blocks that are
    /// there already, or that don't verify, are left to [`Store::read`].
    pub fn prefetch(
        &self,
        first: BlockNo,
        guards: &[Option<&Guard>],
        magic: Magic,
    ) -> Result<(), StoreError> {
        let mut buf = AlignedBuf::zeroed(guards.len() * BLOCK_BYTES);
        self.door.read(IoClass::Metadata, first, &mut buf)?;
        let mut state = self.state.lock();
        for (i, (guard, bytes)) in guards.iter().zip(buf.chunks_exact(BLOCK_BYTES)).enumerate() {
            let at = first.plus(i as u64);
            let Some(guard) = guard else { continue };
            let lock = header_of(bytes).map(|h| h.lock.get());
            if state.newest(at).is_some()
                || verify(bytes, magic, self.volume, at).is_err()
                || lock != Some(guard.lock().0)
            {
                continue;
            }
            let mut block: Arc<Block> = Arc::new([0; BLOCK_BYTES]);
            Arc::make_mut(&mut block).copy_from_slice(bytes);
            state.clean.put(at, Clean { block, lock: guard.lock(), epoch: guard.epoch() });
        }
        Ok(())
    }

    /// A block that this host wrote in place itself (a birth) and that is true under the guard.
    pub fn remember(&self, guard_lock: BlockNo, epoch: u64, at: BlockNo, block: Arc<Block>) {
        self.state.lock().clean.put(at, Clean { block, lock: guard_lock, epoch });
    }

    /// Joins the running transaction with a whole operation. Waits at most for this host's own journal.
    /// Returns the transaction's id for [`Store::commit`].
    pub fn apply(&self, mut plan: Plan<'_>) -> Result<u64, StoreError> {
        let planned = plan.finish()?;
        let (images, revokes) = (planned.changes.len(), planned.revokes.len());
        let blocks = Journal::blocks_for(images, revokes) as usize;
        if blocks > self.limit {
            return Err(StoreError::TooLarge { blocks });
        }
        let mut state = self.state.lock();
        let full = |running: &Running| {
            let together = (running.blocks.len() + images, running.revokes.len() + revokes);
            Journal::blocks_for(together.0, together.1) as usize > self.limit
        };
        while !state.running.is_empty() && full(&state.running) {
            let id = state.running.id;
            drop(state);
            self.commit(id)?;
            state = self.state.lock();
        }
        if let Some(reason) = &state.failed {
            return Err(StoreError::Failed(reason.clone()));
        }
        let running = &mut state.running;
        running.began.get_or_insert_with(Instant::now);
        for (at, dirty) in planned.changes {
            running.revokes.remove(&at);
            running.blocks.insert(at, dirty);
        }
        for (at, lock, tenure) in planned.revokes {
            running.blocks.remove(&at);
            running.revokes.insert(at, (lock, tenure));
        }
        running.hooks.extend(planned.hooks);
        running.net_blocks += planned.net_blocks;
        running.net_inodes += planned.net_inodes;
        let id = running.id;
        plan.joined();
        for at in planned.dropped {
            state.clean.pop(&at);
        }
        drop(state);
        if self.commit_each.load(Ordering::Relaxed) {
            self.commit(id)?;
        }
        Ok(id)
    }

    /// Id of the running transaction: committing it makes everything so far durable.
    pub fn current(&self) -> u64 {
        let state = self.state.lock();
        if state.running.is_empty() { state.running.id - 1 } else { state.running.id }
    }

    /// Makes all transactions up to `id` durable.
    pub fn commit(&self, id: u64) -> Result<(), StoreError> {
        if self.state.lock().durable >= id {
            return Ok(());
        }
        // Whoever held this meanwhile may have committed ours along.
        let mut journal = self.io.lock();
        self.commit_locked(&mut journal, id)
    }

    fn commit_locked(&self, journal: &mut Journal, id: u64) -> Result<(), StoreError> {
        let (taken, images) = {
            let mut state = self.state.lock();
            if let Some(reason) = &state.failed {
                return Err(StoreError::Failed(reason.clone()));
            }
            if state.durable >= id {
                return Ok(());
            }
            let next = Running { id: state.running.id + 1, ..Running::default() };
            let mut taken = std::mem::replace(&mut state.running, next);
            let images = std::mem::take(&mut taken.blocks);
            state.committing = images.clone();
            state.committing_net = (taken.net_blocks, taken.net_inodes);
            (taken, images)
        };
        // The checksum goes into copies of our own: readers and the next transaction share the originals.
        let mut sealed: BTreeMap<BlockNo, Dirty> = images;
        for dirty in sealed.values_mut() {
            seal(&mut Arc::make_mut(&mut dirty.block)[..]);
        }
        match self.write_transaction(journal, &taken, &sealed) {
            Ok(sequence) => {
                self.committed(journal, taken, sealed, sequence);
                Ok(())
            }
            Err(e) => Err(self.fail("a commit", e)),
        }
    }

    /// What this host acknowledged or is about to acknowledge can't be kept: it commits nothing more and
    /// withdraws, so that others recover it at once.
    fn fail(&self, what: &str, error: StoreError) -> StoreError {
        let reason = error.to_string();
        self.state.lock().failed.get_or_insert_with(|| reason.clone());
        self.door.lease().withdraw(&format!("{what} failed: {reason}"));
        error
    }

    fn write_transaction(
        &self,
        journal: &mut Journal,
        taken: &Running,
        sealed: &BTreeMap<BlockNo, Dirty>,
    ) -> Result<Option<u64>, StoreError> {
        if sealed.is_empty() && taken.revokes.is_empty() {
            return Ok(None);
        }
        let needed = Journal::blocks_for(sealed.len(), taken.revokes.len());
        if journal.free_blocks() < needed {
            self.checkpoint_locked(journal, None)?;
            journal.advance_tail()?;
        }
        let image = |(at, d): (&BlockNo, &Dirty)| -> JournalRecord {
            record(RecordKind::Image, *at, d.lock, d.tenure)
        };
        let images = sealed.iter().map(|(at, d)| (image((at, d)), &*d.block)).collect();
        let revokes = taken
            .revokes
            .iter()
            .map(|(at, (lock, tenure))| record(RecordKind::Revoke, *at, *lock, *tenure))
            .collect();
        let net_blocks = self.published.net_blocks.load(Ordering::Relaxed);
        let net_inodes = self.published.net_inodes.load(Ordering::Relaxed);
        let tx = Transaction {
            images,
            revokes,
            net_blocks: net_blocks + taken.net_blocks,
            net_inodes: net_inodes + taken.net_inodes,
        };
        Ok(Some(journal.append(&tx)?))
    }

    /// The transaction is durable: its blocks wait for their place, what it freed may be used again.
    fn committed(
        &self,
        journal: &mut Journal,
        taken: Running,
        sealed: BTreeMap<BlockNo, Dirty>,
        sequence: Option<u64>,
    ) {
        {
            let mut state = self.state.lock();
            state.committing.clear();
            state.committing_net = (0, 0);
            self.published.net_blocks.fetch_add(taken.net_blocks, Ordering::Relaxed);
            self.published.net_inodes.fetch_add(taken.net_inodes, Ordering::Relaxed);
            state.durable = taken.id;
            if let Some(sequence) = sequence {
                state.pending_since.get_or_insert_with(Instant::now);
                for at in taken.revokes.keys() {
                    if let Some(old) = state.pending.remove(at) {
                        journal.settled(old.sequence, 1);
                    }
                    state.clean.pop(at);
                }
                for (at, dirty) in sealed {
                    state.clean.pop(&at);
                    if let Some(old) = state.pending.insert(at, Pending { dirty, sequence }) {
                        journal.settled(old.sequence, 1);
                    }
                }
            }
        }
        for hook in taken.hooks {
            hook();
        }
    }

    /// Commits what has waited for `age`, and puts in place what has waited long or takes much room.
    pub fn housekeep(&self, age: Duration) -> Result<(), StoreError> {
        let due = {
            let state = self.state.lock();
            let old = state.running.began.is_some_and(|began| began.elapsed() >= age);
            old.then_some(state.running.id)
        };
        if let Some(id) = due {
            self.commit(id)?;
        }
        let mut journal = self.io.lock();
        let old = self.state.lock().pending_since.is_some_and(|since| since.elapsed() >= IN_PLACE_AGE);
        if old || journal.free_blocks() < journal.capacity_blocks() / 2 {
            self.checkpoint_locked(&mut journal, None)?;
            journal.advance_tail()?;
        }
        Ok(())
    }

    /// Everything under a lock durable, in place and flushed.
    pub fn settle(&self, lock: BlockNo) -> Result<(), StoreError> {
        if is_planted(Bug::LeavesUnsettled) {
            return Ok(());
        }
        let mut journal = self.io.lock();
        let running = {
            let state = self.state.lock();
            let mine = state.running.blocks.values().any(|d| d.lock == lock)
                || state.running.revokes.values().any(|(l, _)| *l == lock);
            mine.then_some(state.running.id)
        };
        if let Some(id) = running {
            self.commit_locked(&mut journal, id)?;
        }
        if !self.checkpoint_locked(&mut journal, Some(lock))? {
            // File data written in place under this lock has to be durable, too.
            self.flush_data(IoClass::Metadata)?;
        }
        Ok(())
    }

    /// A flush that failed may have lost what it was to make durable, and the next one would succeed without it.
    fn flush_data(&self, class: IoClass) -> Result<(), StoreError> {
        self.door.flush(class).map_err(|e| self.fail("a flush", e.into()))
    }

    /// Free and all blocks of the journal's ring; `None` while a commit or checkpoint is under way, so that
    /// whoever only looks never waits for the device.
    pub fn journal_space(&self) -> Option<(u64, u64)> {
        let journal = self.io.try_lock()?;
        Some((journal.free_blocks(), journal.capacity_blocks()))
    }

    /// Everything durable.
    pub fn sync(&self) -> Result<(), StoreError> {
        let id = self.current();
        if self.state.lock().durable >= id {
            // Nothing to commit, but data written in place may not be durable.
            return self.flush_data(IoClass::Data);
        }
        // The commit's flush began after everything that this transaction exposes was written.
        self.commit(id)
    }

    /// Blocks and inodes that this slot allocated since mkfs, transactions that are not durable yet included.
    pub fn net(&self) -> (i64, i64) {
        let state = self.state.lock();
        (
            self.published.net_blocks.load(Ordering::Relaxed)
                + state.committing_net.0
                + state.running.net_blocks,
            self.published.net_inodes.load(Ordering::Relaxed)
                + state.committing_net.1
                + state.running.net_inodes,
        )
    }

    /// Everything durable and in place, the journal empty: before leaving.
    pub fn drain(&self) -> Result<(), StoreError> {
        let id = self.current();
        let mut journal = self.io.lock();
        self.commit_locked(&mut journal, id)?;
        self.checkpoint_locked(&mut journal, None)?;
        Ok(journal.advance_tail()?)
    }
}

impl Running {
    fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.revokes.is_empty() && self.hooks.is_empty()
    }
}

impl State {
    fn newest(&self, at: BlockNo) -> Option<&Dirty> {
        self.running
            .blocks
            .get(&at)
            .or_else(|| self.committing.get(&at))
            .or_else(|| self.pending.get(&at).map(|p| &p.dirty))
    }
}

fn check_magic(block: Arc<Block>, magic: Magic, at: BlockNo) -> Result<Arc<Block>, StoreError> {
    let found = header_of(&block[..]).map_or(0, |h| h.magic.get());
    if found != magic.value() {
        return Err(LayoutError::Magic { what: magic.name(), at, found }.into());
    }
    Ok(block)
}
