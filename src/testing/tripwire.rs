//! Kills a host after exactly so many of its commands, in the instant in which the last of them executed.
//!
//! Invariants: what the wire counts are commands that change the LUN or make it durable (a host that dies after
//! a read leaves what one that died before it left), beats excepted, which come by the clock and not by what the
//! host does; the judge behind it sees every command, first.
//!
//! Not for: faults of commands (`device::sim`), or judging anything.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::device::sim::{CommandKind, Executed, LunObserver};
use crate::rt::HostTag;
use crate::rt::sim::kill_host;

/// What is counted, and when the host dies.
struct Armed {
    host: HostTag,
    /// Bytes whose commands don't count: the host's own slot.
    beats: Range<u64>,
    left: u64,
    tripped: bool,
}

/// An observer of a LUN before its judge.
pub struct Tripwire {
    judge: Arc<dyn LunObserver>,
    armed: Mutex<Option<Armed>>,
}

impl Tripwire {
    pub fn new(judge: Arc<dyn LunObserver>) -> Arc<Self> {
        Arc::new(Tripwire { judge, armed: Mutex::new(None) })
    }

    fn armed(&self) -> MutexGuard<'_, Option<Armed>> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on: kills `host` as its command number `at` (from 1) executes. `beats` are the bytes of its slot.
    pub fn arm(&self, host: HostTag, beats: Range<u64>, at: u64) {
        *self.armed() = Some(Armed { host, beats, left: at, tripped: false });
    }

    /// No more killing. Did it happen?
    pub fn disarm(&self) -> bool {
        self.armed().take().is_some_and(|armed| armed.tripped)
    }

    /// Has the host been killed?
    pub fn tripped(&self) -> bool {
        self.armed().as_ref().is_some_and(|armed| armed.tripped)
    }
}

impl LunObserver for Tripwire {
    fn executed(&self, c: &Executed<'_>) {
        self.judge.executed(c);
        let mut armed = self.armed();
        let Some(wire) = armed.as_mut().filter(|w| w.host == c.host && !w.tripped) else { return };
        let counts = c.kind.changes() || c.kind == CommandKind::Flush;
        if !counts || wire.beats.contains(&c.offset_bytes) && c.kind != CommandKind::Flush {
            return;
        }
        wire.left = wire.left.saturating_sub(1);
        if wire.left == 0 {
            wire.tripped = true;
            let host = wire.host;
            drop(armed);
            kill_host(host);
        }
    }

    fn power_cut(&self) {
        self.judge.power_cut();
    }
}
