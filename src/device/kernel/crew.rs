//! The crew of a path: threads that go into the kernel with a command, on memory of their own, while who asked waits
//! until his deadline and no longer.
//!
//! Invariants
//!
//! 1. **A thread that the kernel does not give back stays behind with its memory.** Nothing that it may still write
//!    to or read from belongs to anybody else; what it finds out still tells of the path.
//! 2. **What was not sent by its moment never is**: whoever comes first to the desk, the one who asked or the one who
//!    sends, decides that.
//! 3. **So many threads as are needed, and never more than [`CREW_MAX`]**: a kernel that answers nothing must not cost
//!    all memory there is.
//!
//! Not for: writes of data, which end when the kernel says so (`path::Direct`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::door::SgData;
use super::path::{Doubt, Line, Outcome, SMALL_BYTES, too_late};
use crate::device::AlignedBuf;
use crate::device::scsi::cdb::Cdb;
use crate::device::scsi::transport::{Data, Limits, Transport, TransportError};
use crate::rt::{self, Condvar, Instant, Mutex};

/// Threads that may be in the kernel at once, for one path.
const CREW_MAX: usize = 64;
/// So many stay when there is nothing to do.
const CREW_KEPT: usize = 2;
const IDLE: Duration = Duration::from_secs(30);

/// One command by a thread of the crew; see the module's header.
pub struct Timed {
    line: Arc<Line>,
    crew: Arc<Crew>,
    replays: bool,
}

impl Timed {
    pub fn over(line: &Arc<Line>, crew: &Arc<Crew>, replays: bool) -> Timed {
        Timed { line: line.clone(), crew: crew.clone(), replays }
    }
}

impl Transport for Timed {
    fn execute(&self, cdb: &Cdb, data: Data<'_>, limits: Limits) -> Outcome {
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
            line: self.line.clone(),
            cdb: *cdb,
            lent,
            send_until: limits.send_until,
            desk: desk.clone(),
        };
        if let Err(why) = self.crew.give(job) {
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
                self.line.doubt("no answer in time", Doubt::Silent);
                Err(TransportError::TimedOut)
            }
        }
    }

    fn replays(&self) -> bool {
        self.replays
    }
}

/// Memory of a command that may outlive who asked.
enum Lent {
    None,
    In(AlignedBuf),
    Out(AlignedBuf),
}

impl Lent {
    fn len_bytes(&self) -> usize {
        match self {
            Lent::None => 0,
            Lent::In(buf) | Lent::Out(buf) => buf.len(),
        }
    }
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

struct Job {
    at_head: bool,
    line: Arc<Line>,
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
        let outcome = self.line.send(&self.cdb, data, self.at_head);
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
pub struct Crew {
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

    /// Threads that are in the kernel, or on their way there.
    pub fn busy(&self) -> usize {
        let queue = self.queue.lock();
        queue.threads.saturating_sub(queue.idle)
    }

    /// The threads end when nothing is left to send.
    pub fn close(&self) {
        self.queue.lock().closed = true;
        self.more.notify_all();
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
