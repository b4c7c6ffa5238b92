//! One path: an open disk, and the two ways to send a command over it.
//!
//! * [`Timed`]: by a thread of the path's crew, so that who asked waits until his deadline and no longer (`crew`). For
//!   locks, beats, single blocks and everything about paths, which go before what waits in the disk's queue; and for all
//!   reads where another path could serve.
//! * [`Direct`]: by the thread that asks, on its memory, without a copy and without a deadline: who has to wait for a
//!   write would otherwise have to believe that it may come at any time. For data and flushes.
//!
//! What a command tells of the path is kept ([`Path::condition`]); what is done about it is decided in `paths`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::answer::{PathState, judge};
use super::classify::Disk;
use super::crew::{Crew, Timed};
use super::door::{Node, SgAnswer, SgCommand, SgData};
use super::hold::Hold;
use super::timing;
use crate::device::AlignedBuf;
use crate::device::scsi::cdb::{Cdb, opcode};
use crate::device::scsi::transport::{Data, Limits, Reply, Transport, TransportError, status};
use crate::rt::{Condvar, Instant, Mutex};

/// Up to here a transfer is a look at a lock, a beat or a block of metadata.
pub const SMALL_BYTES: usize = 4096;
/// A path in doubt with so many of them in the kernel is not asked any more until some come back.
const STUCK: usize = 4;

pub type Outcome = Result<Reply, TransportError>;

/// Rung when a path's condition changes.
#[derive(Default)]
pub struct Bell {
    rung: Mutex<u64>,
    changed: Condvar,
}

impl Bell {
    pub fn ring(&self) {
        *self.rung.lock() += 1;
        self.changed.notify_all();
    }

    pub fn count(&self) -> u64 {
        *self.rung.lock()
    }

    /// Waits until it was rung more often than `seen` times, or until `until`.
    pub fn wait(&self, seen: u64, until: Instant) {
        let mut rung = self.rung.lock();
        while *rung == seen {
            let (guard, late) = self.changed.wait_until(rung, until);
            if late {
                return;
            }
            rung = guard;
        }
    }
}

/// May the path be used?
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Condition {
    Up,
    /// To be looked at before it is used again.
    Doubtful {
        why: String,
        since: Instant,
        doubt: Doubt,
    },
}

/// What must be shown of a path before it is used again; the later ones include the earlier.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Doubt {
    /// That it answers: it was silent for longer than somebody could wait. An answer that comes late shows it as well.
    Silent,
    /// That it is ready.
    Unready,
    /// That it leads to the same unit, and is registered: the nexus was lost, and its target may live another life.
    Lost,
}

/// The disk at its end, and what its answers tell of it: what a thread that stays behind still needs.
pub struct Line {
    disk: Disk,
    node: Arc<dyn Node>,
    flush_timeout: Duration,
    condition: Mutex<Condition>,
    /// The kernel has no disk behind this node any more.
    dead: AtomicBool,
    /// How often it came into doubt.
    doubts: AtomicU64,
    bell: Arc<Bell>,
}

/// One path to a unit.
pub struct Path {
    line: Arc<Line>,
    crew: Arc<Crew>,
    pub hold: Hold,
}

impl Path {
    /// A path in doubt: somebody has to look at it first.
    pub fn new(disk: Disk, node: Arc<dyn Node>, hold: Hold, bell: Arc<Bell>) -> Path {
        let condition = Condition::Doubtful { why: "new".into(), since: Instant::now(), doubt: Doubt::Lost };
        let line = Line {
            disk,
            node,
            flush_timeout: hold.flush_timeout(),
            condition: Mutex::new(condition),
            dead: AtomicBool::new(false),
            doubts: AtomicU64::new(0),
            bell,
        };
        Path { line: Arc::new(line), crew: Arc::default(), hold }
    }

    pub fn disk(&self) -> &Disk {
        &self.line.disk
    }

    pub fn node(&self) -> &Arc<dyn Node> {
        &self.line.node
    }

    pub fn condition(&self) -> Condition {
        self.line.condition.lock().clone()
    }

    pub fn is_up(&self) -> bool {
        *self.line.condition.lock() == Condition::Up
    }

    /// It was looked at, and so much was shown of it: it may be used, unless something worse was heard of it meanwhile.
    pub fn set_up(&self, shown: Doubt) -> bool {
        let mut condition = self.line.condition.lock();
        if matches!(*condition, Condition::Doubtful { doubt, .. } if doubt > shown) {
            return false;
        }
        *condition = Condition::Up;
        drop(condition);
        self.line.bell.ring();
        true
    }

    /// It must be looked at.
    pub fn doubt(&self, why: &str, doubt: Doubt) {
        self.line.doubt(why, doubt);
    }

    /// How often it came into doubt: it may be out of it again before anybody looks.
    pub fn doubts(&self) -> u64 {
        self.line.doubts.load(Ordering::SeqCst)
    }

    /// Has the kernel removed the disk?
    pub fn is_dead(&self) -> bool {
        self.line.dead.load(Ordering::SeqCst)
    }

    /// Are several commands in the kernel that nobody waits for any more?
    pub fn is_stuck(&self) -> bool {
        self.crew.busy() >= STUCK
    }

    /// How well its port serves, by what the kernel knows of ALUA; smaller is better, `None`: not at all.
    pub fn rank(&self) -> Option<u8> {
        match self.line.disk.dir.text("device/access_state").as_deref() {
            Some("standby" | "unavailable" | "offline") => None,
            Some("active/non-optimized" | "transitioning" | "lba dependent") => Some(1),
            _ => Some(0),
        }
    }

    /// See the module's header.
    pub fn timed(self: &Arc<Self>) -> Timed {
        Timed::over(&self.line, &self.crew, self.hold.replays())
    }

    pub fn direct(self: &Arc<Self>) -> Direct {
        Direct(self.clone())
    }
}

impl Line {
    /// The path must be looked at.
    pub fn doubt(&self, why: &str, doubt: Doubt) {
        let mut condition = self.condition.lock();
        match &mut *condition {
            Condition::Up => {
                log::warn!("{}: {why}; the path is looked at before it is used again", self.disk.name);
                *condition = Condition::Doubtful { why: why.into(), since: Instant::now(), doubt };
                self.doubts.fetch_add(1, Ordering::SeqCst);
                drop(condition);
                self.bell.ring();
            }
            Condition::Doubtful { doubt: until_now, .. } => *until_now = doubt.max(*until_now),
        }
    }

    /// A path that was silent and nothing worse has carried out a command, perhaps one that nobody waits for any more: a look
    /// at it would show no more. Looks have time-outs of their own, and where answers are slow the only path would be out
    /// for several of them, which is most of a lease.
    fn answered(&self, outcome: &Outcome) {
        if !matches!(outcome, Ok(reply) if reply.status == status::GOOD) {
            return;
        }
        let mut condition = self.condition.lock();
        let Condition::Doubtful { doubt: Doubt::Silent, since, why } = &*condition else { return };
        let (away, why) = (since.elapsed().as_millis(), why.clone());
        *condition = Condition::Up;
        drop(condition);
        log::warn!("{}: the path serves again after {away} ms ({why})", self.disk.name);
        self.bell.ring();
    }

    pub fn send(&self, cdb: &Cdb, data: SgData<'_>, at_head: bool) -> Outcome {
        let len = data.len_bytes();
        let timeout = match cdb.opcode() {
            opcode::SYNCHRONIZE_CACHE_16 => self.flush_timeout,
            _ => timing::COMMAND,
        };
        let mut command = SgCommand { cdb: cdb.bytes(), data, timeout, at_head };
        let ended: io::Result<SgAnswer> = self.node.sg_io(&mut command);
        let (outcome, state) = judge(ended, len, || self.disk.dir.scsi_state() == "running");
        match state {
            PathState::Fine => self.answered(&outcome),
            PathState::Slow(why) | PathState::Standby(why) => self.doubt(&why, Doubt::Unready),
            PathState::Lost(why) => {
                if matches!(outcome, Err(TransportError::NotSent(_))) {
                    self.dead.store(true, Ordering::SeqCst);
                }
                self.doubt(&why, Doubt::Lost);
            }
        }
        outcome
    }
}

/// Nothing is sent after the moment that was said.
pub fn too_late() -> Outcome {
    Err(TransportError::NotSent("its time was over".into()))
}

/// By the thread that asks; see the module's header.
pub struct Direct(Arc<Path>);

impl Transport for Direct {
    fn execute(&self, cdb: &Cdb, data: Data<'_>, limits: Limits) -> Outcome {
        let joined;
        let data = match data {
            Data::None => SgData::None,
            Data::In(buf) => SgData::In(buf),
            Data::Out([part]) => SgData::Out(part),
            Data::Out(parts) => {
                joined = AlignedBuf::copy_of(&parts.concat());
                SgData::Out(&joined)
            }
        };
        if Instant::now() > limits.send_until {
            return too_late();
        }
        self.0.line.send(cdb, data, false)
    }

    fn replays(&self) -> bool {
        self.0.hold.replays()
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.crew.close();
    }
}
