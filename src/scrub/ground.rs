//! What a scrub stands on: reads from the device at a limited rate, and locks, held together or not at all.
//!
//! Not for: judging what was read.

use std::cell::{Cell, RefCell};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Options, ScrubError, long_wait};
use crate::ats::AtsError;
use crate::device::AlignedBuf;
use crate::durations::dead_after;
use crate::heartbeat::Liveness;
use crate::layout::geometry::{Geometry, lock_of_inode};
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::layout::superblock::Superblock;
use crate::layout::{Block, LayoutError, Magic, verify, zero_block};
use crate::lease::IoClass;
use crate::lock::{Access, Guard, LockError, LockId, Mode, Patience};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Instant};
use crate::tree::{NodeRead, TreeError};
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo, VolumeId};
use crate::volume::Volume;

/// A read costs at least as much as this many bytes.
const LEAST_COST: u64 = 16 << 10;
/// Sleeps are cut into pieces of this length, so that an end is soon seen.
const SLEEP: Duration = Duration::from_millis(50);
/// How long a second lock is waited for while one is held.
const TOGETHER: Duration = Duration::from_secs(1);
/// How often several locks are tried to be held together.
const TRIES: u32 = 8;
/// Reads of a block that fails its check: one that is being written passes in the end.
const READS: u32 = 5;
const REREAD_AFTER: Duration = Duration::from_millis(10);

pub(super) struct Ground<'s> {
    volume: &'s Volume,
    options: &'s Options,
    pub superblock: Superblock,
    pub geometry: Geometry,
    pub id: VolumeId,
    bytes_read: Cell<u64>,
    /// Until then what was read is not paid for.
    paid_at: Cell<Instant>,
    next_ask: Cell<Instant>,
    asked: Cell<u64>,
    /// Why nothing can be read any more.
    device_failed: RefCell<Option<String>>,
}

/// With what right blocks are read.
#[derive(Clone, Copy)]
pub(super) enum Eyes<'g> {
    /// Without any: what lies on the device just now.
    Glance,
    /// Under these locks.
    Look(&'g [Guard]),
}

impl Eyes<'_> {
    pub fn is_look(&self) -> bool {
        matches!(self, Eyes::Look(_))
    }
}

/// Why a lock can't be had: the end of the scrub, or a reason to leave the case.
pub(super) enum NoLock {
    End(ScrubError),
    Leave(String),
}

impl From<ScrubError> for NoLock {
    fn from(e: ScrubError) -> Self {
        NoLock::End(e)
    }
}

impl<'s> Ground<'s> {
    pub fn new(volume: &'s Volume, options: &'s Options) -> Self {
        let superblock = volume.superblock().clone();
        let now = Instant::now();
        Ground {
            volume,
            options,
            geometry: superblock.geometry,
            id: superblock.volume,
            superblock,
            bytes_read: Cell::new(0),
            paid_at: Cell::new(now),
            next_ask: Cell::new(now),
            asked: Cell::new(0),
            device_failed: RefCell::new(None),
        }
    }

    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.get()
    }

    pub fn asked(&self) -> u64 {
        self.asked.get()
    }

    /// May the scrub go on? Asked before anything is told.
    pub fn go_on(&self) -> Result<(), ScrubError> {
        // First: a mount that lost its lease also cancels what is asked of it, and this is why.
        let lease = self.volume.door().lease();
        if !lease.allows() {
            let reason = lease.reason().unwrap_or_else(|| "its lease ended".into());
            return Err(ScrubError::LeaseEnded(reason));
        }
        if self.options.cancelled.load(Ordering::Relaxed) {
            return Err(ScrubError::Cancelled);
        }
        self.device_failed.borrow().clone().map_or(Ok(()), |e| Err(ScrubError::Device(e)))
    }

    /// A block that can't be read is damage where others can be; else the device, or the way to it, fails.
    fn unreadable(&self, at: BlockNo, error: &dyn std::fmt::Display) -> String {
        let mut probe = AlignedBuf::zeroed(BLOCK_BYTES);
        let elsewhere = [BlockNo(0), self.geometry.volume_lock()].into_iter().filter(|b| *b != at);
        let all_fail =
            elsewhere.into_iter().all(|b| self.volume.door().read(IoClass::Metadata, b, &mut probe).is_err());
        let text = format!("block {at} can't be read: {error}");
        if all_fail {
            self.device_failed.borrow_mut().get_or_insert_with(|| text.clone());
        }
        text
    }

    /// Sleeps until then, or until the scrub has to end.
    pub fn sleep_until(&self, then: Instant) -> Result<(), ScrubError> {
        loop {
            self.go_on()?;
            let left = then.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            rt::sleep(left.min(SLEEP));
        }
    }

    /// Sleeps off what was read since the last call. To be called while no lock is held.
    pub fn pay(&self) -> Result<(), ScrubError> {
        match self.options.bytes_per_s {
            0 => self.go_on(),
            _ => self.sleep_until(self.paid_at.get()),
        }
    }

    fn spend(&self, bytes: u64) {
        self.bytes_read.set(self.bytes_read.get() + bytes);
        if let Some(cost) = (bytes.max(LEAST_COST) * 1_000_000_000).checked_div(self.options.bytes_per_s) {
            let from = self.paid_at.get().max(Instant::now());
            self.paid_at.set(from + Duration::from_nanos(cost));
        }
    }

    /// Blocks as they lie on the device.
    pub fn raw(&self, at: BlockNo, blocks: u64) -> Result<AlignedBuf, String> {
        if at.0.checked_add(blocks).is_none_or(|end| end > self.geometry.size_blocks) {
            return Err(format!("block {at} lies outside the volume"));
        }
        let mut buf = AlignedBuf::zeroed(blocks as usize * BLOCK_BYTES);
        self.spend(buf.len() as u64);
        let read = self.volume.door().read(IoClass::Metadata, at, &mut buf);
        read.map(|()| buf).map_err(|e| self.unreadable(at, &e))
    }

    pub fn block(&self, eyes: Eyes<'_>, covered_by: BlockNo, at: BlockNo) -> Result<Box<Block>, String> {
        let guard = match eyes {
            Eyes::Glance => None,
            Eyes::Look(guards) => guards.iter().find(|g| g.lock() == covered_by),
        };
        let planted = is_planted(Bug::LooksWithoutLocks);
        debug_assert!(
            guard.is_some() || !eyes.is_look() || planted,
            "a look at block {at} without lock {covered_by}"
        );
        let Some(guard) = guard else {
            let mut block = zero_block();
            block.copy_from_slice(&self.raw(at, 1)?);
            return Ok(block);
        };
        if at.0 >= self.geometry.size_blocks {
            return Err(format!("block {at} lies outside the volume"));
        }
        self.spend(BLOCK_BYTES as u64);
        self.volume.store().look(guard, at).map_err(|e| self.unreadable(at, &e))
    }

    /// A block that passes its check, or what is wrong with it for certain: the same bytes twice.
    pub fn checked<T>(
        &self,
        eyes: Eyes<'_>,
        covered_by: BlockNo,
        at: BlockNo,
        decode: impl Fn(&Block) -> Result<T, LayoutError>,
    ) -> Result<T, String> {
        let mut before: Option<Box<Block>> = None;
        let mut said = String::new();
        for _ in 0..READS {
            let read = self.block(eyes, covered_by, at);
            match read.as_ref().map(|block| decode(block)) {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(e)) => said = e.to_string(),
                Err(e) => said = e.clone(),
            }
            let block = read.ok();
            if before.is_some() && block == before {
                break;
            }
            before = block;
            rt::sleep(REREAD_AFTER);
        }
        Err(said)
    }

    pub fn lock_id(kind: LockKind, at: BlockNo) -> LockId {
        LockId { kind, at }
    }

    pub fn inode_lock(&self, ino: InodeNo) -> LockId {
        Self::lock_id(LockKind::Inode, lock_of_inode(ino))
    }

    pub fn cluster_lock(&self, cluster: u64) -> LockId {
        Self::lock_id(LockKind::Cluster, self.geometry.cluster(cluster))
    }

    /// Does another host hold this exclusively, as far as a glance tells? Its name.
    pub fn held_by(&self, id: LockId) -> Option<String> {
        let mode = if self.is_writable(id) { Mode::Exclusive } else { Mode::Shared };
        if self.volume.locks().holds(id, mode) {
            return None;
        }
        let decode = |block: &Block| LockRecord::decode(&block[..], self.id, id.at);
        let record = self.checked(Eyes::Glance, id.at, id.at, decode).ok()?;
        let LockMode::Exclusive { owner, .. } = record.mode else { return None };
        let peers = self.volume.heartbeat().peers();
        if owner == self.volume.heartbeat().me() || peers.liveness(owner) == Liveness::Settled {
            return None;
        }
        Some(peers.last_seen(owner.slot).map_or_else(|| owner.to_string(), |r| r.host_name))
    }

    fn is_writable(&self, id: LockId) -> bool {
        id.kind == LockKind::Inode && self.volume.fs().usage(id).writable
    }

    /// All these locks, shared, at the same time. They come in the global order.
    pub fn hold(&self, ids: &[LockId]) -> Result<Vec<Guard>, NoLock> {
        debug_assert!(ids.is_sorted_by(|a, b| a < b), "locks out of order: {ids:?}");
        if is_planted(Bug::LooksWithoutLocks) {
            return Ok(Vec::new());
        }
        for id in ids {
            if let Some(holder) = self.held_by(*id) {
                if self.options.leave_busy {
                    return Err(NoLock::Leave(format!("host '{holder}' holds it exclusively")));
                }
                // At the agreed rate, however many cases there are.
                self.sleep_until(self.next_ask.get())?;
                let pause = Duration::from_secs(1) / self.options.asks_per_s.max(1);
                self.next_ask.set(Instant::now() + pause);
                self.asked.set(self.asked.get() + 1);
            }
        }
        let long = long_wait(dead_after(&self.volume.heartbeat().record().durations));
        for _ in 0..TRIES {
            // Each alone first: nobody waits long for one while another is held.
            if ids.len() > 1 {
                for id in ids {
                    drop(self.get(*id, long)?);
                }
            }
            let patience = if ids.len() > 1 { TOGETHER } else { long };
            let mut guards = Vec::with_capacity(ids.len());
            for id in ids {
                match self.get(*id, patience) {
                    Ok(guard) => guards.push(guard),
                    Err(NoLock::Leave(_)) if ids.len() > 1 => break,
                    Err(e) => return Err(e),
                }
            }
            if guards.len() == ids.len() {
                return Ok(guards);
            }
        }
        Err(NoLock::Leave("its locks could not be had together, they move all the time".into()))
    }

    fn get(&self, id: LockId, most: Duration) -> Result<Guard, NoLock> {
        self.go_on()?;
        // With a writable open here the lock is held exclusively or not at all.
        let mode = if self.is_writable(id) { Mode::Exclusive } else { Mode::Shared };
        let locks = self.volume.locks();
        match locks.try_acquire(id, mode, Access::Read) {
            Ok(Some(guard)) => return Ok(guard),
            Ok(None) => {}
            Err(e) => return Err(self.no_lock(id, e, most)),
        }
        let timer = Timer::start(most, self.options.cancelled.clone(), self.volume);
        let patience = Patience { interrupt: Some(timer.over.clone()), ..Patience::endless() };
        locks.acquire(id, mode, Access::Read, &patience).map_err(|e| self.no_lock(id, e, most))
    }

    fn no_lock(&self, id: LockId, error: LockError, waited: Duration) -> NoLock {
        if let Err(end) = self.go_on() {
            return NoLock::End(end);
        }
        NoLock::Leave(match error {
            LockError::Interrupted => {
                let by = self.held_by(id).map_or(String::new(), |host| format!("; host '{host}' holds it"));
                format!("its {} lock did not come within {} s{by}", id.kind.name(), waited.as_secs())
            }
            LockError::Ats(AtsError::Damaged(e)) => format!("its lock is damaged: {e}"),
            other => other.to_string(),
        })
    }
}

/// Ends a wait for a lock.
struct Timer {
    over: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

impl Timer {
    fn start(most: Duration, cancelled: Arc<AtomicBool>, volume: &Volume) -> Self {
        let timer = Timer { over: Arc::default(), done: Arc::default() };
        let (over, done, lease) = (timer.over.clone(), timer.done.clone(), volume.door().lease().clone());
        let until = Instant::now() + most;
        rt::spawn("scrub-wait", move || {
            while !done.load(Ordering::Relaxed) {
                if Instant::now() >= until || cancelled.load(Ordering::Relaxed) || !lease.allows() {
                    return over.store(true, Ordering::Relaxed);
                }
                rt::sleep(SLEEP.min(until.saturating_duration_since(Instant::now())));
            }
        });
        timer
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}

/// Why a tree node can't be used: a sentence.
pub(super) struct BadNode(pub String);

impl From<TreeError> for BadNode {
    fn from(e: TreeError) -> Self {
        BadNode(e.to_string())
    }
}

/// The nodes of an inode's tree; remembers which were read.
pub(super) struct Nodes<'g, 's> {
    pub ground: &'g Ground<'s>,
    pub eyes: Eyes<'g>,
    pub covered_by: BlockNo,
    pub met: Vec<BlockNo>,
}

impl<'g, 's> Nodes<'g, 's> {
    pub fn of(ground: &'g Ground<'s>, eyes: Eyes<'g>, ino: InodeNo) -> Self {
        Nodes { ground, eyes, covered_by: lock_of_inode(ino), met: Vec::new() }
    }
}

impl NodeRead for Nodes<'_, '_> {
    type Error = BadNode;
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, BadNode> {
        self.met.push(at);
        let id = self.ground.id;
        let decode = |block: &Block| {
            verify(&block[..], Magic::TreeNode, id, at)?;
            Ok(Arc::new(*block))
        };
        self.ground.checked(self.eyes, self.covered_by, at, decode).map_err(BadNode)
    }
}
