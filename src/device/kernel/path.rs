//! One path: an open disk, and the two ways to send a command over it.
//!
//! * [`Timed`]: by a thread of the path's crew, on memory of its own. Who asked waits until his deadline and no longer;
//!   a thread that the kernel does not give back stays behind with its memory. For locks, beats, single blocks and
//!   everything about paths, which go before what waits in the disk's queue; and for all reads where another path could
//!   serve.
//! * [`Direct`]: by the thread that asks, on its memory, without a copy and without a deadline: who has to wait for a
//!   write would otherwise have to believe that it may come at any time. For data and flushes.
//!
//! What a command tells of the path is kept ([`Path::condition`]); what is done about it is decided in `paths`.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::answer::{PathState, judge};
use super::classify::Disk;
use super::door::{Node, SgAnswer, SgCommand, SgData};
use super::hold::Hold;
use super::timing;
use crate::device::AlignedBuf;
use crate::device::scsi::cdb::{Cdb, opcode};
use crate::device::scsi::transport::{Data, Limits, Reply, Transport, TransportError};
use crate::rt::{self, Condvar, Instant, Mutex};

/// Up to here a transfer is a look at a lock, a beat or a block of metadata.
pub const SMALL_BYTES: usize = 4096;
/// Threads that may be in the kernel at once, for one path.
const CREW_MAX: usize = 64;
/// So many stay when there is nothing to do.
const CREW_KEPT: usize = 2;
/// A path in doubt with so many of them in the kernel is not asked any more until some come back.
const STUCK: usize = 4;
const IDLE: Duration = Duration::from_secs(30);

type Outcome = Result<Reply, TransportError>;

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
        nexus_lost: bool,
    },
}

struct Inner {
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
    inner: Arc<Inner>,
    crew: Arc<Crew>,
    pub hold: Hold,
}

impl Path {
    /// A path in doubt: somebody has to look at it first.
    pub fn new(disk: Disk, node: Arc<dyn Node>, hold: Hold, bell: Arc<Bell>) -> Path {
        let condition = Condition::Doubtful { why: "new".into(), since: Instant::now(), nexus_lost: true };
        let inner = Inner {
            disk,
            node,
            flush_timeout: hold.flush_timeout(),
            condition: Mutex::new(condition),
            dead: AtomicBool::new(false),
            doubts: AtomicU64::new(0),
            bell,
        };
        Path { inner: Arc::new(inner), crew: Arc::default(), hold }
    }

    pub fn disk(&self) -> &Disk {
        &self.inner.disk
    }

    pub fn node(&self) -> &Arc<dyn Node> {
        &self.inner.node
    }

    pub fn condition(&self) -> Condition {
        self.inner.condition.lock().clone()
    }

    pub fn is_up(&self) -> bool {
        *self.inner.condition.lock() == Condition::Up
    }

    /// It was looked at, and may be used.
    pub fn set_up(&self) {
        *self.inner.condition.lock() = Condition::Up;
        self.inner.bell.ring();
    }

    /// It must be looked at.
    pub fn doubt(&self, why: &str, nexus_lost: bool) {
        self.inner.doubt(why, nexus_lost);
    }

    /// How often it came into doubt: it may be out of it again before anybody looks.
    pub fn doubts(&self) -> u64 {
        self.inner.doubts.load(Ordering::SeqCst)
    }

    /// Has the kernel removed the disk?
    pub fn is_dead(&self) -> bool {
        self.inner.dead.load(Ordering::SeqCst)
    }

    /// Are several commands in the kernel that nobody waits for any more?
    pub fn is_stuck(&self) -> bool {
        self.crew.busy() >= STUCK
    }

    /// How well its port serves, by what the kernel knows of ALUA; smaller is better, `None`: not at all.
    pub fn rank(&self) -> Option<u8> {
        match self.inner.disk.dir.text("device/access_state").as_deref() {
            Some("standby" | "unavailable" | "offline") => None,
            Some("active/non-optimized" | "transitioning" | "lba dependent") => Some(1),
            _ => Some(0),
        }
    }

    /// See the module's header.
    pub fn timed(self: &Arc<Self>) -> Timed {
        Timed(self.clone())
    }

    pub fn direct(self: &Arc<Self>) -> Direct {
        Direct(self.clone())
    }
}

impl Inner {
    fn doubt(&self, why: &str, nexus_lost: bool) {
        let mut condition = self.condition.lock();
        match &mut *condition {
            Condition::Up => {
                log::warn!("{}: {why}; the path is looked at before it is used again", self.disk.name);
                *condition = Condition::Doubtful { why: why.into(), since: Instant::now(), nexus_lost };
                self.doubts.fetch_add(1, Ordering::SeqCst);
                drop(condition);
                self.bell.ring();
            }
            Condition::Doubtful { nexus_lost: lost, .. } => *lost |= nexus_lost,
        }
    }

    fn send(&self, cdb: &Cdb, data: SgData<'_>, at_head: bool) -> Outcome {
        let len = data.len_bytes();
        let timeout = match cdb.opcode() {
            opcode::SYNCHRONIZE_CACHE_16 => self.flush_timeout,
            _ => timing::COMMAND,
        };
        let mut command = SgCommand { cdb: cdb.bytes(), data, timeout, at_head };
        let ended: io::Result<SgAnswer> = self.node.sg_io(&mut command);
        let (outcome, state) = judge(ended, len, || self.disk.dir.scsi_state() == "running");
        match state {
            PathState::Fine => {}
            PathState::Slow(why) | PathState::Standby(why) => self.doubt(&why, false),
            PathState::Lost(why) => {
                if matches!(outcome, Err(TransportError::NotSent(_))) {
                    self.dead.store(true, Ordering::SeqCst);
                }
                self.doubt(&why, true);
            }
        }
        outcome
    }
}

fn too_late() -> Outcome {
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
        self.0.inner.send(cdb, data, false)
    }

    fn replays(&self) -> bool {
        self.0.hold.replays()
    }
}

/// By a thread of the crew; see the module's header.
pub struct Timed(Arc<Path>);

impl Transport for Timed {
    fn execute(&self, cdb: &Cdb, data: Data<'_>, limits: Limits) -> Outcome {
        let path = &self.0;
        let (lent, into) = match data {
            Data::None => (Lent::None, None),
            Data::In(buf) => (Lent::In(AlignedBuf::zeroed(buf.len())), Some(buf)),
            Data::Out(parts) => (Lent::Out(AlignedBuf::copy_of(&parts.concat())), None),
        };
        let desk = Arc::new(Desk { stage: Mutex::new(Stage::Queued), changed: Condvar::new() });
        // A beat never waits behind bulk data.
        let at_head = lent.len_bytes() <= SMALL_BYTES * 2;
        let job = Job {
            at_head,
            inner: path.inner.clone(),
            cdb: *cdb,
            lent,
            send_until: limits.send_until,
            desk: desk.clone(),
        };
        if let Err(why) = path.crew.give(job) {
            return Err(TransportError::NotSent(why));
        }
        match desk.wait(limits.answer_until) {
            Some((outcome, lent)) => {
                if let (Some(into), Lent::In(buf), Ok(reply)) = (into, &lent, &outcome) {
                    let came = reply.transferred.min(into.len());
                    into[..came].copy_from_slice(&buf[..came]);
                }
                outcome
            }
            None => {
                // It may be slow only; who comes next finds out.
                path.doubt("no answer in time", false);
                Err(TransportError::TimedOut)
            }
        }
    }

    fn replays(&self) -> bool {
        self.0.hold.replays()
    }
}

/// Memory of a command that may outlive who asked.
enum Lent {
    None,
    In(AlignedBuf),
    Out(AlignedBuf),
}

enum Stage {
    Queued,
    Running,
    Done(Outcome, Lent),
    /// Nobody waits any more.
    Left,
}

/// Where the one who asked and the one who sends meet.
struct Desk {
    stage: Mutex<Stage>,
    changed: Condvar,
}

impl Desk {
    /// `None`: it was sent and not answered in time. What was not sent by then never is.
    fn wait(&self, until: Instant) -> Option<(Outcome, Lent)> {
        let mut stage = self.stage.lock();
        loop {
            if matches!(*stage, Stage::Done(..)) {
                let Stage::Done(outcome, lent) = std::mem::replace(&mut *stage, Stage::Left) else {
                    return None;
                };
                return Some((outcome, lent));
            }
            let (guard, late) = self.changed.wait_until(stage, until);
            stage = guard;
            if late && !matches!(*stage, Stage::Done(..)) {
                let sent = matches!(*stage, Stage::Running);
                *stage = Stage::Left;
                return (!sent).then(|| (too_late(), Lent::None));
            }
        }
    }

    fn take(&self, send_until: Instant) -> bool {
        let mut stage = self.stage.lock();
        match *stage {
            Stage::Queued if Instant::now() <= send_until => *stage = Stage::Running,
            Stage::Queued => {
                *stage = Stage::Done(too_late(), Lent::None);
                self.changed.notify_all();
                return false;
            }
            _ => return false,
        }
        true
    }

    fn answer(&self, outcome: Outcome, lent: Lent) {
        let mut stage = self.stage.lock();
        if matches!(*stage, Stage::Running) {
            *stage = Stage::Done(outcome, lent);
            self.changed.notify_all();
        }
    }
}

impl Lent {
    fn len_bytes(&self) -> usize {
        match self {
            Lent::None => 0,
            Lent::In(buf) | Lent::Out(buf) => buf.len(),
        }
    }
}

struct Job {
    at_head: bool,
    inner: Arc<Inner>,
    cdb: Cdb,
    lent: Lent,
    send_until: Instant,
    desk: Arc<Desk>,
}

impl Job {
    fn run(mut self) {
        if !self.desk.take(self.send_until) {
            return;
        }
        let data = match &mut self.lent {
            Lent::None => SgData::None,
            Lent::In(buf) => SgData::In(buf),
            Lent::Out(buf) => SgData::Out(buf),
        };
        let outcome = self.inner.send(&self.cdb, data, self.at_head);
        self.desk.answer(outcome, self.lent);
    }
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
    threads: usize,
    closed: bool,
}

/// Threads that send, as many as are needed.
#[derive(Default)]
struct Crew {
    queue: Mutex<Queue>,
    more: Condvar,
}

impl Crew {
    fn give(self: &Arc<Self>, job: Job) -> Result<(), String> {
        let mut queue = self.queue.lock();
        if queue.idle <= queue.jobs.len() {
            if queue.threads >= CREW_MAX {
                return Err(format!("{CREW_MAX} commands are in the kernel, which does not answer"));
            }
            let mine = self.clone();
            match rt::try_spawn_urgent("scsi-path", move || mine.work()) {
                Ok(_) => queue.threads += 1,
                // One of those there will come to it, or its time will be over.
                Err(_) if queue.threads > 0 => {}
                Err(e) => return Err(format!("no thread to send it: {e}")),
            }
        }
        queue.jobs.push_back(job);
        drop(queue);
        self.more.notify_one();
        Ok(())
    }

    fn busy(&self) -> usize {
        let queue = self.queue.lock();
        queue.threads.saturating_sub(queue.idle)
    }

    fn work(&self) {
        let mut queue = self.queue.lock();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                job.run();
                queue = self.queue.lock();
                continue;
            }
            if queue.closed {
                break;
            }
            queue.idle += 1;
            let (guard, late) = self.more.wait_timeout(queue, IDLE);
            queue = guard;
            queue.idle -= 1;
            if late && queue.jobs.is_empty() && queue.threads > CREW_KEPT {
                break;
            }
        }
        queue.threads -= 1;
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.crew.queue.lock().closed = true;
        self.crew.more.notify_all();
    }
}
