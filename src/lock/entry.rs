//! One lock in this host's memory, and the guard that gives a thread access.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{Held, LockId, Mode, Patience, Wanted};
use crate::ats::Image;
use crate::layout::lock::LockRecord;
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{Condvar, Instant, Mutex, MutexGuard};
use crate::types::{BlockNo, Tenure};

/// How a thread uses what the lock covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Together with other readers of this host.
    Read,
    /// Together with readers, while data that the lock covers is written in place: the lock does not step
    /// down to a share meanwhile.
    Overwrite,
    /// Alone.
    Write,
}

pub(super) struct Entry {
    pub id: LockId,
    pub state: Mutex<State>,
    pub changed: Condvar,
    /// Something covered was changed in this tenure: the change counter rises when the lock leaves.
    pub dirtied: AtomicBool,
}

#[derive(Default)]
pub(super) struct State {
    /// The record as we last saw or wrote it.
    pub image: Option<Image<LockRecord>>,
    pub held: Held,
    /// The highest tenure of ours that has ended.
    pub ended: Tenure,
    /// What was cached under an older epoch is void.
    pub epoch: u64,
    /// The change counter at which this epoch's cached blocks are true.
    pub valid_at: Option<u64>,
    readers: u32,
    overwriters: u32,
    writer: bool,
    writers_waiting: u32,
    /// Answers on their way to a reader that may cache them, and pins.
    in_use: u32,
    /// Accesses granted so far: tells whether anything was served in between.
    pub served: u64,
    /// `served` when the table was last trimmed.
    pub served_at_trim: u64,
    /// Our last so many exclusive tenures all brought a change: the next thread of ours may come to change it.
    pub changed_tenures: u8,
    /// A thread works on the disk block.
    pub busy: bool,
    /// The lock is about to leave: no access is granted.
    pub closing: bool,
    /// Readers are slowed down, so that a round without service comes to be.
    pub throttle: bool,
    /// A thread asks other hosts for this mode.
    pub polled_for: Option<Mode>,
    /// Threads that wait because the lock is leaving or busy, and the strongest mode among them.
    pub queued: u32,
    pub queued_mode: Option<Mode>,
    /// A wish of ours was posted when the lock was given away while threads of ours waited.
    pub wished: bool,
    /// Others who asked.
    pub wanted: Vec<Wanted>,
    pub giving: bool,
    pub granted_at: Option<Instant>,
    /// Nothing was done with the lock since it was granted.
    pub unused: bool,
    pub last_use: Option<Instant>,
}

/// A condvar wait that an interrupt must be able to end is cut into pieces of this length.
const INTERRUPT_CHECK: Duration = Duration::from_millis(20);
const THROTTLE_PAUSE: Duration = Duration::from_micros(300);

impl State {
    pub fn admits(&self, access: Access) -> bool {
        match access {
            Access::Read | Access::Overwrite => !self.writer && self.writers_waiting == 0,
            Access::Write => !self.writing() && self.readers == 0,
        }
    }

    /// Nobody has access, and every answer was delivered.
    pub fn idle(&self) -> bool {
        !self.writing() && self.readers == 0 && self.in_use == 0
    }

    /// Something under the lock is being changed.
    pub fn writing(&self) -> bool {
        self.writer || self.overwriters > 0
    }

    pub fn enter(&mut self, access: Access) {
        self.served += 1;
        self.unused = false;
        match access {
            Access::Read => self.readers += 1,
            Access::Overwrite => self.overwriters += 1,
            Access::Write => self.writer = true,
        }
    }

    /// A use ended. True: the next one should begin a little later.
    fn used(&mut self) -> bool {
        if !self.wanted.is_empty() {
            self.last_use = Some(Instant::now());
        }
        self.throttle
    }

    /// Our hold ends: called at the issue of the swap that gives it away.
    pub fn let_go(&mut self) {
        if let Held::Exclusive(tenure) = self.held {
            self.ended = self.ended.max(tenure);
        }
        self.held = Held::Nothing;
    }

    /// Takes over what the disk says. `strange`: the image names us although we did not ask.
    pub fn adopt(
        &mut self,
        image: Image<LockRecord>,
        held: Held,
        strange: bool,
        new_epoch: impl FnOnce() -> u64,
    ) {
        let counter = image.record.change_counter;
        if self.held == Held::Nothing {
            self.granted_at = Some(Instant::now());
            self.unused = true;
        }
        if (self.valid_at != Some(counter) || strange) && !(self.epoch > 0 && is_planted(Bug::CacheKept)) {
            self.epoch = new_epoch();
        }
        self.valid_at = Some(counter);
        self.image = Some(image);
        if let (Held::Exclusive(old), true) = (self.held, self.held != held) {
            self.ended = self.ended.max(old);
        }
        self.held = held;
    }
}

impl Entry {
    pub fn new(id: LockId) -> Self {
        Entry {
            id,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            dirtied: AtomicBool::new(false),
        }
    }

    pub fn wait<'a>(&'a self, state: MutexGuard<'a, State>, patience: &Patience) -> MutexGuard<'a, State> {
        if patience.interrupt.is_some() {
            return self.changed.wait_timeout(state, INTERRUPT_CHECK).0;
        }
        self.changed.wait(state)
    }

    /// Waits for other threads of this host to leave.
    pub fn queue<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        access: Access,
        patience: &Patience,
    ) -> MutexGuard<'a, State> {
        if access == Access::Write {
            state.writers_waiting += 1;
        }
        state = self.wait(state, patience);
        if access == Access::Write {
            state.writers_waiting -= 1;
            if state.writers_waiting == 0 {
                self.changed.notify_all();
            }
        }
        state
    }
}

/// Access to what a lock covers, until dropped.
pub struct Guard {
    entry: Arc<Entry>,
    access: Access,
    epoch: u64,
    held: Held,
}

impl Guard {
    pub(super) fn new(entry: Arc<Entry>, access: Access, epoch: u64, held: Held) -> Self {
        Guard { entry, access, epoch, held }
    }

    pub fn id(&self) -> LockId {
        self.entry.id
    }

    pub fn lock(&self) -> BlockNo {
        self.entry.id.at
    }

    /// Cached blocks of another epoch are void.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    pub fn access(&self) -> Access {
        self.access
    }

    /// The tenure under which changes may be made: held exclusively, and no reader relies on what changes.
    pub fn tenure(&self) -> Option<Tenure> {
        match (self.held, self.access) {
            (Held::Exclusive(tenure), Access::Write | Access::Overwrite) => Some(tenure),
            _ => None,
        }
    }

    pub fn is_exclusive(&self) -> bool {
        matches!(self.held, Held::Exclusive(_))
    }

    /// Something the lock covers was changed.
    pub fn mark_changed(&self) {
        self.entry.dirtied.store(true, Ordering::Release);
    }

    /// The record as it stood on the disk when the lock was granted or last swapped by us.
    pub fn record(&self) -> Option<LockRecord> {
        self.entry.state.lock().image.as_ref().map(|i| i.record.clone())
    }
}

impl Guard {
    /// Keeps the lock on this host, without keeping other threads of it out: for an answer on its way, or
    /// for as long as the kernel may do something under the lock without asking.
    pub fn in_use(&self) -> InUse {
        self.entry.state.lock().in_use += 1;
        InUse { entry: self.entry.clone() }
    }
}

/// The lock stays on this host until this is dropped.
pub struct InUse {
    entry: Arc<Entry>,
}

impl Drop for InUse {
    fn drop(&mut self) {
        let throttled = {
            let mut state = self.entry.state.lock();
            state.in_use -= 1;
            state.used()
        };
        self.entry.changed.notify_all();
        if throttled {
            crate::rt::sleep(THROTTLE_PAUSE);
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let throttled = {
            let mut state = self.entry.state.lock();
            match self.access {
                Access::Read => state.readers -= 1,
                Access::Overwrite => state.overwriters -= 1,
                Access::Write => state.writer = false,
            }
            state.used() && state.in_use == 0
        };
        self.entry.changed.notify_all();
        if throttled {
            crate::rt::sleep(THROTTLE_PAUSE);
        }
    }
}
