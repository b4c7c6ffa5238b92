//! The lock layer: who may touch what.
//!
//! Locks are cached: a host keeps a lock after use until another asks, so that in steady state no swap
//! happens at all. Inside a host threads share a held lock through ordinary reader/writer access.
//!
//! Invariants kept here:
//! * access is granted only while this host holds the lock on the disk in a sufficient mode;
//! * on acquisition what was cached under the lock is void (its *epoch* changes), unless the change counter
//!   proves that nobody changed it since we last held it;
//! * a lock leaves only after nothing is served under it any more: the kernel forgot what it covers, the
//!   [`Steward`] settled it (durable, in place, flushed), and no thread has access;
//! * a releasing swap ends our hold at its issue;
//! * a dead owner is waited for, never stepped over; a wait never kills.
//!
//! Not for: journals, caches, recovery. Those are behind [`Steward`].

mod census;
mod decide;
mod demand;
mod entry;
mod give;
mod posted;
mod trim;

pub use census::Census;
pub use decide::{Held, Sharer, Step, Wanted, decide};
pub use demand::Demand;
pub use entry::{Access, Guard, InUse};

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use thiserror::Error;

use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::heartbeat::{Liveness, Peers};
use crate::layout::LayoutError;
use crate::layout::demand::Want;
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::lease::IoClass;
use crate::rt::Mutex;
use crate::types::{BlockNo, Owner, Slot};
use decide::Facts;
use entry::Entry;
use posted::Posted;

/// In which mode a lock is wanted on the disk.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum Mode {
    Shared,
    Exclusive,
}

/// A lock: where it is and what it covers. The order is that in which several are taken.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct LockId {
    pub kind: LockKind,
    pub at: BlockNo,
}

/// How long a thread may wait.
#[derive(Clone, Debug, Default)]
pub struct Patience {
    pub may_wait: bool,
    pub interrupt: Option<Arc<AtomicBool>>,
    /// Rather fail than wait for somebody to recover a dead owner.
    pub not_for_the_dead: bool,
}

impl Patience {
    /// As long as it takes.
    pub fn endless() -> Self {
        Patience { may_wait: true, ..Patience::default() }
    }

    fn interrupted(&self) -> bool {
        self.interrupt.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

/// Why a lock could not be had.
#[derive(Clone, Debug, Error)]
pub enum LockError {
    #[error("would have to wait")]
    WouldWait,
    #[error("interrupted")]
    Interrupted,
    #[error("{0} held this and its journal can't be replayed; run fsck.lunfs")]
    Lost(Owner),
    #[error("host \"{name}\" ({owner}) died while it held this and has not been recovered")]
    OwnerDead { name: String, owner: Owner },
    #[error(transparent)]
    Ats(#[from] AtsError),
}

/// What a lock's keeper does before the lock leaves; implemented above the journal and the caches.
pub trait Steward: Send + Sync {
    /// Make the kernel forget what the lock covers. Serving goes on meanwhile.
    fn silence(&self, lock: LockId);
    /// Make everything under the lock durable and in place. Nobody has access to the lock meanwhile.
    fn settle(&self, lock: LockId) -> Result<(), String>;
    /// How the inode under the lock is used on this host.
    fn usage(&self, lock: LockId) -> Usage;
    /// The lock is no longer remembered, after it was silenced and nothing was served under it since.
    fn forgotten(&self, _lock: LockId) {}
    /// What kind of lock lies at an address that came from outside; `None`: no lock.
    fn kind_of(&self, at: BlockNo) -> Option<LockKind>;
}

/// How an inode is used on this host.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Usage {
    pub open: bool,
    /// Open for writing: the lock is held exclusively or not at all.
    pub writable: bool,
}

/// Lock movements of this host.
#[derive(Default, Debug)]
pub struct LockStats {
    /// Grants that took a disk access.
    pub acquired: AtomicU64,
    pub given: AtomicU64,
    /// Waits behind another host, and their nanoseconds.
    pub waits: AtomicU64,
    pub wait_ns: AtomicU64,
}

const SHARDS: usize = 16;

/// All locks of this host.
pub struct LockManager {
    ats: Arc<Ats>,
    me: Owner,
    peers: Arc<Peers>,
    demand: Arc<Demand>,
    shards: [Mutex<BTreeMap<BlockNo, Arc<Entry>>>; SHARDS],
    steward: OnceLock<Weak<dyn Steward>>,
    /// Epochs are unique over all locks, so that a block cached under a lock that was forgotten in between
    /// is never taken for one of its next epoch.
    next_epoch: AtomicU64,
    /// Locks of inodes of which a thread is telling somebody that they are not open here.
    telling: Mutex<BTreeSet<BlockNo>>,
    pub stats: LockStats,
}

/// So many tenures with a change, one after the other, are taken for a habit. One alone is not: two hosts that
/// each make a directory of their own in the root go on to share the root.
const CHANGES_IN_TURN: u8 = 2;
const DEAD_PAUSE: Duration = Duration::from_millis(500);

/// What memory has of a lock when an attempt begins.
struct Known {
    image: Option<Image<LockRecord>>,
    held: Held,
    ended: crate::types::Tenure,
}

enum Attempt {
    Holds { image: Image<LockRecord>, held: Held, unseen: bool },
    MustAsk { image: Image<LockRecord>, ask: Vec<Owner> },
    Dead { image: Image<LockRecord>, owner: Owner },
}

impl LockManager {
    pub fn new(ats: Arc<Ats>, me: Owner, peers: Arc<Peers>, demand: Arc<Demand>) -> Arc<Self> {
        let this = Arc::new(LockManager {
            ats,
            me,
            peers,
            demand,
            shards: Default::default(),
            steward: OnceLock::new(),
            next_epoch: AtomicU64::new(1),
            telling: Mutex::new(BTreeSet::new()),
            stats: LockStats::default(),
        });
        this.demand.set_sink(Arc::downgrade(&this));
        this
    }

    /// Who is asked before a lock leaves. Set once, before the first acquisition.
    pub fn set_steward(&self, steward: Weak<dyn Steward>) {
        let _ = self.steward.set(steward);
    }

    fn steward(&self) -> Option<Arc<dyn Steward>> {
        self.steward.get()?.upgrade()
    }

    pub fn me(&self) -> Owner {
        self.me
    }

    fn shard(&self, at: BlockNo) -> &Mutex<BTreeMap<BlockNo, Arc<Entry>>> {
        // Locks of a group are neighbours; spread groups, not neighbours.
        &self.shards[(at.0 / 16) as usize % SHARDS]
    }

    fn entry(&self, id: LockId) -> Arc<Entry> {
        self.shard(id.at).lock().entry(id.at).or_insert_with(|| Arc::new(Entry::new(id))).clone()
    }

    fn known(&self, at: BlockNo) -> Option<Arc<Entry>> {
        self.shard(at).lock().get(&at).cloned()
    }

    /// Is the lock held here well enough, as far as memory says? A hint.
    pub fn holds(&self, id: LockId, mode: Mode) -> bool {
        self.known(id.at).is_some_and(|e| e.state.lock().held.covers(mode))
    }

    /// Is a share likely to be too little? True for a lock that is elsewhere now and under which this host
    /// changed something in each of its last exclusive tenures: who looks at it may go on to change it, and
    /// asking once for all saves a second hand-over. A tenure in which nothing was changed ends that. A hint.
    pub fn may_need_more(&self, id: LockId) -> bool {
        self.known(id.at).is_some_and(|e| {
            let state = e.state.lock();
            state.held == Held::Nothing && state.changed_tenures >= CHANGES_IN_TURN
        })
    }

    /// The record as last seen; a hint.
    pub fn last_record(&self, id: LockId) -> Option<LockRecord> {
        self.known(id.at)?.state.lock().image.as_ref().map(|i| i.record.clone())
    }

    /// Takes over the lock of a group just born by a plain write of this host: held from birth. Returns the
    /// epoch under which its body is true.
    pub fn adopt_born(&self, record: &LockRecord) -> u64 {
        let entry = self.entry(LockId { kind: record.kind, at: record.address });
        let mut state = entry.state.lock();
        if let LockMode::Exclusive { owner, tenure } = record.mode
            && owner == self.me
        {
            state.held = Held::Exclusive(tenure);
            state.valid_at = Some(record.change_counter);
            state.epoch = self.new_epoch();
            state.image = Some(self.ats.image_of_born(record));
        }
        state.epoch
    }

    /// The birth came to nothing: its locks lie in free space again.
    pub fn forget_born(&self, locks: &[BlockNo]) {
        for at in locks {
            if let Some(entry) = self.shard(*at).lock().remove(at) {
                let mut state = entry.state.lock();
                state.held = Held::Nothing;
                state.image = None;
            }
        }
    }

    fn new_epoch(&self) -> u64 {
        self.next_epoch.fetch_add(1, Ordering::Relaxed)
    }

    /// A nonce that no image on this volume ever carried.
    pub fn fresh_nonce(&self) -> crate::layout::Nonce {
        self.ats.fresh_nonce()
    }

    /// Gets access to what the lock covers, taking the lock on the disk if this host does not hold it in
    /// `mode`. The guard keeps it until dropped.
    pub fn acquire(
        &self,
        id: LockId,
        mode: Mode,
        access: Access,
        patience: &Patience,
    ) -> Result<Guard, LockError> {
        let entry = self.entry(id);
        let mut state = entry.state.lock();
        let mut posted: Option<Posted> = None;
        let result = loop {
            if state.held.covers(mode) && !state.closing {
                if state.admits(access) {
                    break Ok(());
                }
                if !patience.may_wait {
                    break Err(LockError::WouldWait);
                }
                state = entry.queue(state, access, patience);
            } else if !patience.may_wait {
                break Err(LockError::WouldWait);
            } else if state.busy || state.closing || (posted.is_none() && state.polled_for >= Some(mode)) {
                state.queued_mode = state.queued_mode.max(Some(mode));
                state.queued += 1;
                state = entry.wait(state, patience);
                state.queued -= 1;
                if state.queued == 0 {
                    state.queued_mode = None;
                }
            } else {
                state.busy = true;
                let known = Known {
                    image: state.image.clone().filter(|_| posted.is_none()),
                    held: state.held,
                    ended: state.ended,
                };
                drop(state);
                let attempt = self.attempt(id, known, mode, posted.as_mut());
                state = entry.state.lock();
                state.busy = false;
                entry.changed.notify_all();
                match attempt {
                    Err(e) => break Err(e.into()),
                    Ok(Attempt::Holds { image, held, unseen }) => {
                        self.stats.acquired.fetch_add(1, Ordering::Relaxed);
                        let waiters = image.record.waiters;
                        let strange = unseen && posted.is_none();
                        state.adopt(image, held, strange, || self.new_epoch());
                        entry.dirtied.fetch_or(strange && held != Held::Shared, Ordering::AcqRel);
                        if !waiters.without(self.me.slot).is_empty() {
                            self.demand.look_at(waiters.without(self.me.slot));
                        }
                    }
                    Ok(Attempt::Dead { image, owner }) => {
                        if self.peers.liveness(owner) == Liveness::Lost {
                            break Err(LockError::Lost(owner));
                        }
                        let record = image.record.clone();
                        state.image = Some(image);
                        drop(state);
                        if patience.not_for_the_dead {
                            state = entry.state.lock();
                            break Err(LockError::OwnerDead { name: self.name_of(owner), owner });
                        }
                        let wait = posted.get_or_insert_with(|| Posted::new(self));
                        wait.say_dead(id, owner);
                        // The wish stands where everybody can see it, though nobody is there to be rung.
                        let asked = wait.ask(id, mode, &record, &[]);
                        state = entry.state.lock();
                        if let Err(e) = asked {
                            break Err(e.into());
                        }
                        state = entry.changed.wait_timeout(state, DEAD_PAUSE).0;
                    }
                    Ok(Attempt::MustAsk { image, ask }) => {
                        let record = image.record.clone();
                        state.image = Some(image);
                        state.polled_for = state.polled_for.max(Some(mode));
                        drop(state);
                        let wait = posted.get_or_insert_with(|| Posted::new(self));
                        let asked = wait.ask(id, mode, &record, &ask);
                        state = entry.state.lock();
                        if let Err(e) = asked {
                            break Err(e.into());
                        }
                        // The lock may have been changed by this host meanwhile: look before sleeping.
                        if !state.held.covers(mode) || state.closing {
                            state = entry.changed.wait_timeout(state, wait.pause()).0;
                        }
                    }
                }
                if patience.interrupted() {
                    break Err(LockError::Interrupted);
                }
            }
            if patience.interrupted() {
                break Err(LockError::Interrupted);
            }
        };
        if let Some(wait) = posted {
            state.polled_for = None;
            entry.changed.notify_all();
            self.demand.withdraw(id.at);
            self.stats.waits.fetch_add(1, Ordering::Relaxed);
            self.stats.wait_ns.fetch_add(wait.begun.elapsed().as_nanos() as u64, Ordering::Relaxed);
            state.wished = false;
        } else if state.wished && state.queued == 0 && state.polled_for.is_none() {
            // A wish that went with the lock when we gave it away, for threads that then asked nobody.
            state.wished = false;
            self.demand.withdraw(id.at);
        }
        result?;
        state.enter(access);
        let (epoch, held) = (state.epoch, state.held);
        drop(state);
        Ok(Guard::new(entry, access, epoch, held))
    }

    /// Access as far as this host's memory gives it at once: no disk, no waiting.
    pub fn try_held(&self, id: LockId, mode: Mode, access: Access) -> Option<Guard> {
        let entry = self.known(id.at)?;
        let mut state = entry.state.lock();
        if !state.held.covers(mode) || state.closing || !state.admits(access) {
            return None;
        }
        state.enter(access);
        let (epoch, held) = (state.epoch, state.held);
        drop(state);
        Some(Guard::new(entry, access, epoch, held))
    }

    /// Access without waiting for anybody, of this host or another: what memory or one look at the disk gives.
    pub fn try_acquire(&self, id: LockId, mode: Mode, access: Access) -> Result<Option<Guard>, LockError> {
        let entry = self.entry(id);
        let mut state = entry.state.lock();
        if !state.held.covers(mode) || state.closing {
            if state.busy || state.closing || state.polled_for.is_some() {
                return Ok(None);
            }
            state.busy = true;
            let known = Known { image: state.image.clone(), held: state.held, ended: state.ended };
            drop(state);
            let attempt = self.attempt(id, known, mode, None);
            state = entry.state.lock();
            state.busy = false;
            entry.changed.notify_all();
            match attempt? {
                Attempt::Holds { image, held, unseen } => {
                    self.stats.acquired.fetch_add(1, Ordering::Relaxed);
                    let waiters = image.record.waiters.without(self.me.slot);
                    state.adopt(image, held, unseen, || self.new_epoch());
                    // Forgotten, or never known: what happened in that tenure is not known either.
                    entry.dirtied.fetch_or(unseen && held != Held::Shared, Ordering::AcqRel);
                    if !waiters.is_empty() {
                        self.demand.look_at(waiters);
                    }
                }
                Attempt::MustAsk { image, .. } | Attempt::Dead { image, .. } => {
                    state.image = Some(image);
                    return Ok(None);
                }
            }
        }
        if !state.admits(access) {
            return Ok(None);
        }
        state.enter(access);
        let (epoch, held) = (state.epoch, state.held);
        drop(state);
        Ok(Some(Guard::new(entry, access, epoch, held)))
    }

    /// One look at the lock and, where that may do, one swap.
    fn attempt(
        &self,
        id: LockId,
        known: Known,
        mode: Mode,
        wait: Option<&mut Posted<'_>>,
    ) -> Result<Attempt, AtsError> {
        let Known { image, held, ended } = known;
        let (mut image, mut fresh) = match image {
            // Optimistic: compare with what we last saw. Only a swap proves an old image; anything else is
            // decided on a new one.
            Some(image) => (image, false),
            None => (self.ats.read(IoClass::Lock, id.at)?, true),
        };
        let granted_after = wait.map(|wait| *wait.first_look.get_or_insert(image.record.swap_counter));
        loop {
            let record = &image.record;
            let owner = match record.mode {
                LockMode::Exclusive { owner, .. } if owner != self.me => {
                    self.check_life(id, owner)?;
                    self.peers.liveness(owner)
                }
                _ => Liveness::Living,
            };
            let next_asks = match record.next {
                Some(next) if next != self.me && self.peers.liveness(next) == Liveness::Living => {
                    let shares = record.mode == LockMode::Shared && record.sharers.contains(next.slot);
                    // An image speaks only of requests older than itself; who was granted its share waits
                    // no more.
                    self.demand
                        .request_of(next, id.at)?
                        .is_some_and(|r| r.since < record.swap_counter && !(shares && r.want == Want::Shared))
                }
                _ => false,
            };
            let mut sharers = Vec::new();
            if record.mode == LockMode::Shared && mode == Mode::Exclusive {
                for slot in record.sharers.without(self.me.slot).iter() {
                    sharers.push((slot, self.sharer(slot)?));
                }
            }
            let sharer =
                |slot| sharers.iter().find(|(s, _)| *s == slot).map_or(Sharer::Nobody, |(_, sharer)| *sharer);
            let facts =
                Facts { me: self.me, want: mode, granted_after, ended, owner, next_asks, sharer: &sharer };
            match decide(record, &facts, held) {
                Step::Granted { .. } | Step::Wait { .. } | Step::OwnerDead(_) if !fresh => {
                    image = self.ats.read(IoClass::Lock, id.at)?;
                    fresh = true;
                }
                Step::Granted { held, unseen } => {
                    if self.is_settled(&image)? {
                        return Ok(Attempt::Holds { image, held, unseen });
                    }
                    (image, fresh) = (self.ats.read(IoClass::Lock, id.at)?, true);
                }
                Step::Take { to, held } => {
                    (image, fresh) = match self.ats.swap(IoClass::Lock, &image, &to)? {
                        Swapped::Done(image) => {
                            // Done is not durable: nobody acts on an image before a flush.
                            if self.is_settled(&image)? {
                                return Ok(Attempt::Holds { image, held, unseen: false });
                            }
                            (self.ats.read(IoClass::Lock, id.at)?, true)
                        }
                        Swapped::Miscompare(found) => (found, true),
                    }
                }
                Step::Wait { ask } => return Ok(Attempt::MustAsk { image, ask }),
                Step::OwnerDead(owner) => return Ok(Attempt::Dead { image, owner }),
            }
        }
    }

    /// Flushes what was seen. False: the device may have taken it back, it has to be read again.
    fn is_settled(&self, image: &Image<LockRecord>) -> Result<bool, AtsError> {
        match self.ats.settle(IoClass::Lock, image) {
            Ok(()) => Ok(true),
            Err(AtsError::Forgotten) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// A lock that names a life that its slot never had is damaged: nobody could ever be asked for it.
    fn check_life(&self, id: LockId, owner: Owner) -> Result<(), AtsError> {
        if self.peers.last_seen(owner.slot).is_some_and(|r| r.incarnation >= owner.incarnation) {
            return Ok(());
        }
        if self.peers.has(owner.slot) && self.peers.fresh(owner.slot)?.incarnation >= owner.incarnation {
            return Ok(());
        }
        let (what, field, value) = ("lock", "owner", owner.incarnation.0);
        Err(LayoutError::Field { what, at: id.at, field, value }.into())
    }

    fn name_of(&self, owner: Owner) -> String {
        self.peers.last_seen(owner.slot).map(|r| r.host_name).unwrap_or_default()
    }

    /// Who stands behind a share bit; a slot that seems empty is read again now, after the image was.
    fn sharer(&self, slot: Slot) -> Result<Sharer, AtsError> {
        let record = match self.peers.last_seen(slot) {
            Some(record) if record.living(slot).is_some() => record,
            _ => self.peers.fresh(slot)?,
        };
        let owner = Owner { slot, incarnation: record.incarnation };
        if record.incarnation.0 == 0 {
            return Ok(Sharer::Nobody);
        }
        Ok(match self.peers.liveness(owner) {
            Liveness::Living => Sharer::Living(owner),
            Liveness::Settled => Sharer::Nobody,
            Liveness::Dead | Liveness::Lost => Sharer::Dead(owner),
        })
    }
}
