//! What the scheduler knows: threads, who may run, timers, virtual time; and the choice of what
//! happens next.
//!
//! Invariants: every unfinished thread is in exactly one [`Status`]; `runnable` holds exactly the
//! threads in `Ready`; nothing here depends on addresses, hash seeds or real time, so the same seed
//! makes the same choices. Time moves only when nobody can run.

use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use super::core::Baton;
use super::options::Options;
use super::report::{Failure, FailureKind, describe_threads};
use super::rng::{SimRng, mix};
use super::thread::{Status, Thread, Tid, Wait};
use super::timer::{Action, Event, Timer};
use super::trace::{Happening, Trace};
use crate::rt::HostTag;

/// How often waiting threads are woken for nothing while all are being cancelled, without one of
/// them ending, before they are given up.
const MAX_ROUSE_ROUNDS: u32 = 100;
/// The most switches a cancellation may take.
const MAX_CANCEL_STEPS: u64 = 2_000_000;
/// One choice in so many changes a thread's priority, where the seed chose priorities.
const REPRIORITISE_ONE_IN: u64 = 40;
/// Probabilities of giving way that a seed chooses from.
const PREEMPTS: [f64; 4] = [0.005, 0.03, 0.1, 0.4];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Running,
    /// The root ended or something failed: every thread is being unwound.
    Cancelling,
}

pub struct State {
    pub options: Options,
    pub seed: u64,
    pub phase: Phase,
    pub now: u64,
    pub steps: u64,
    pub threads: Vec<Thread>,
    pub runnable: Vec<Tid>,
    pub running: Tid,
    pub frozen: BTreeSet<HostTag>,
    pub timers: BinaryHeap<Timer>,
    pub trace: Trace,
    pub failure: Option<Failure>,
    /// Nothing is left to run; `run` may return.
    pub done: bool,
    /// Threads of the operating system that have not left the simulation yet.
    pub alive: usize,
    /// Decides who runs, and nothing else, so that drawing a random number elsewhere does not
    /// reshuffle the schedule.
    pub schedule_rng: SimRng,
    pub user_rng: SimRng,
    pub reporters: Vec<(String, super::report::Reporter)>,
    /// Timers that were dropped by a cancellation; freed by `run`, outside the state's lock.
    pub garbage: Vec<Timer>,
    queues: BTreeMap<u64, Vec<Tid>>,
    timer_seq: u64,
    use_priorities: bool,
    preempt: f64,
    cancel_steps: u64,
    rouse_rounds: u32,
}

/// What happens next.
pub enum Next {
    Thread(Tid),
    Event(Event),
    Done,
}

impl State {
    pub fn new(seed: u64, options: Options) -> Self {
        let trace = Trace::new(options.trace_len);
        State {
            seed,
            phase: Phase::Running,
            now: 0,
            steps: 0,
            threads: Vec::new(),
            runnable: Vec::new(),
            running: 0,
            frozen: BTreeSet::new(),
            timers: BinaryHeap::new(),
            trace,
            failure: None,
            done: false,
            alive: 0,
            schedule_rng: SimRng::new(seed, 0),
            user_rng: SimRng::new(seed, 1),
            reporters: Vec::new(),
            garbage: Vec::new(),
            queues: BTreeMap::new(),
            timer_seq: 0,
            // Fair dice rarely starve a thread for long; a quarter of the seeds does.
            preempt: options.preempt.unwrap_or(PREEMPTS[(mix(seed ^ 1) % 4) as usize]),
            options,
            use_priorities: mix(seed).is_multiple_of(4),
            cancel_steps: 0,
            rouse_rounds: 0,
        }
    }

    /// How many chances to give way pass before one is taken.
    pub fn draw_countdown(&mut self) -> u32 {
        if self.preempt <= 0.0 {
            return u32::MAX;
        }
        let most = (2.0 / self.preempt.min(1.0)) as u64 - 2;
        self.schedule_rng.between(0, most).min(u64::from(u32::MAX)) as u32
    }

    /// Enters a new thread as blocked until `make_ready`.
    pub fn add_thread(&mut self, name: &str, host: Option<HostTag>, join_queue: u64) -> Tid {
        let tid = self.threads.len() as Tid;
        let priority = self.schedule_rng.next_u64();
        self.threads.push(Thread {
            name: name.to_owned(),
            host,
            home: host,
            status: Status::Blocked,
            wait: None,
            wait_seq: 0,
            queue: None,
            join_queue,
            baton: Arc::new(Baton::new()),
            priority,
        });
        self.alive += 1;
        self.note(tid, Happening::Spawn);
        tid
    }

    pub fn thread(&mut self, tid: Tid) -> &mut Thread {
        &mut self.threads[tid as usize]
    }

    pub fn note(&mut self, tid: Tid, happening: Happening) {
        self.trace.note(self.now, tid, happening);
    }

    /// Puts the running thread to sleep, in the books; the caller then gives the baton away.
    pub fn set_blocked(&mut self, tid: Tid, wait: Wait, queue: Option<u64>, timeout: Option<u64>) {
        let thread = self.thread(tid);
        thread.status = Status::Blocked;
        thread.wait = Some(wait);
        thread.queue = queue;
        let wait_seq = thread.wait_seq;
        if let Some(queue) = queue {
            self.queues.entry(queue).or_default().push(tid);
        }
        if let Some(timeout) = timeout {
            let jitter = self.schedule_rng.between(0, self.options.timer_jitter);
            self.add_timer(timeout.saturating_add(jitter), Action::Wake { tid, wait_seq });
        }
        self.note(tid, Happening::Block(wait.what));
    }

    /// Lets a thread run again when its turn comes.
    pub fn make_ready(&mut self, tid: Tid) {
        let frozen = self.thread(tid).home.is_some_and(|home| self.frozen.contains(&home));
        self.leave_queue(tid);
        let thread = self.thread(tid);
        thread.wait = None;
        thread.wait_seq += 1;
        if frozen && thread.status != Status::Finished {
            thread.status = Status::Frozen;
        } else {
            thread.status = Status::Ready;
            self.runnable.push(tid);
        }
    }

    /// Takes a thread out of everything it waits in.
    pub fn leave_queue(&mut self, tid: Tid) {
        let Some(queue) = self.thread(tid).queue.take() else { return };
        if let Some(waiting) = self.queues.get_mut(&queue) {
            waiting.retain(|t| *t != tid);
            if waiting.is_empty() {
                self.queues.remove(&queue);
            }
        }
    }

    /// Wakes all that wait in a queue, or one of them at random.
    pub fn wake(&mut self, queue: u64, all: bool) {
        if all {
            for tid in self.queues.remove(&queue).unwrap_or_default() {
                self.make_ready(tid);
            }
        } else if let Some(waiting) = self.queues.get(&queue) {
            let tid = waiting[self.schedule_rng.index(waiting.len())];
            self.make_ready(tid);
        }
    }

    /// Adds a timer `delay` nanoseconds from now; timers of the same time fire in random order.
    pub fn add_timer(&mut self, delay: u64, action: Action) {
        if self.phase == Phase::Cancelling {
            // Nothing fires any more.
            if let Action::Event(_) = action {
                self.garbage.push(Timer { at: u64::MAX, tie: 0, seq: 0, action });
            }
            return;
        }
        self.timer_seq += 1;
        let tie = self.schedule_rng.next_u64();
        let at = self.now.saturating_add(delay);
        self.timers.push(Timer { at, tie, seq: self.timer_seq, action });
    }

    /// Records the first failure and begins to unwind everybody.
    pub fn fail(&mut self, kind: FailureKind, message: String) {
        if self.failure.is_none() {
            self.failure = Some(Failure::new(kind, self.seed, message));
        }
        self.begin_cancel();
    }

    /// From now on every thread only runs to unwind.
    pub fn begin_cancel(&mut self) {
        if self.phase == Phase::Cancelling {
            return;
        }
        self.phase = Phase::Cancelling;
        self.frozen.clear();
        self.garbage.extend(std::mem::take(&mut self.timers));
        for tid in 0..self.threads.len() as Tid {
            if matches!(self.thread(tid).status, Status::Blocked | Status::Frozen | Status::Killed) {
                self.make_ready(tid);
            }
        }
    }

    /// A thread left for good.
    pub fn finish(&mut self, tid: Tid) {
        self.note(tid, Happening::Finish);
        let thread = self.thread(tid);
        thread.status = Status::Finished;
        let join_queue = thread.join_queue;
        self.rouse_rounds = 0;
        self.wake(join_queue, true);
    }

    /// Chooses what happens next; the caller does it.
    pub fn next(&mut self) -> Next {
        loop {
            self.steps += 1;
            if self.phase == Phase::Running && self.steps > self.options.max_steps {
                self.fail(
                    FailureKind::StepLimit,
                    format!("no end after {} scheduling steps\n{}", self.steps, describe_threads(self)),
                );
            }
            if self.phase == Phase::Cancelling && !self.keep_cancelling() {
                return Next::Done;
            }
            if !self.runnable.is_empty() {
                return Next::Thread(self.choose());
            }
            if self.phase == Phase::Running
                && let Some(event) = self.fire_timer()
            {
                return Next::Event(event);
            }
        }
    }

    fn choose(&mut self) -> Tid {
        let mut index = self.schedule_rng.index(self.runnable.len());
        if self.use_priorities {
            let rated = self.runnable.iter().enumerate();
            let best = rated.max_by_key(|(_, tid)| self.threads[**tid as usize].priority);
            index = best.map_or(index, |(i, _)| i);
            if self.schedule_rng.below(REPRIORITISE_ONE_IN) == 0 {
                let tid = self.runnable[index];
                self.thread(tid).priority = self.schedule_rng.next_u64();
            }
        }
        let tid = self.runnable.swap_remove(index);
        self.thread(tid).status = Status::Running;
        if tid != self.running {
            self.note(tid, Happening::Run);
        }
        self.running = tid;
        tid
    }

    /// Moves time to the next timer and fires it; without one nobody will ever run again.
    fn fire_timer(&mut self) -> Option<Event> {
        let Some(timer) = self.timers.pop() else {
            self.fail(
                FailureKind::Deadlock,
                format!("deadlock: nothing can run\n{}", describe_threads(self)),
            );
            return None;
        };
        if timer.at > self.options.max_time {
            self.garbage.push(timer);
            let limit = std::time::Duration::from_nanos(self.options.max_time);
            self.fail(
                FailureKind::TimeLimit,
                format!("no end within {limit:?} of virtual time\n{}", describe_threads(self)),
            );
            return None;
        }
        self.now = self.now.max(timer.at);
        match timer.action {
            Action::Event(event) => {
                self.note(self.running, Happening::Event);
                Some(event)
            }
            Action::Wake { tid, wait_seq } => {
                let thread = self.thread(tid);
                if thread.wait_seq == wait_seq && thread.status == Status::Blocked {
                    thread.baton.set_timed_out();
                    self.note(tid, Happening::Timer);
                    self.make_ready(tid);
                }
                None
            }
        }
    }

    /// While cancelling: false when all are gone or those that are left won't go.
    fn keep_cancelling(&mut self) -> bool {
        self.cancel_steps += 1;
        if self.runnable.is_empty() {
            let left: Vec<Tid> = (0..self.threads.len() as Tid)
                .filter(|tid| self.threads[*tid as usize].status != Status::Finished)
                .collect();
            if left.is_empty() {
                return false;
            }
            self.rouse_rounds += 1;
            if self.rouse_rounds <= MAX_ROUSE_ROUNDS {
                for tid in left {
                    self.thread(tid).baton.set_timed_out();
                    self.make_ready(tid);
                }
            }
        }
        if self.rouse_rounds > MAX_ROUSE_ROUNDS || self.cancel_steps > MAX_CANCEL_STEPS {
            let threads = describe_threads(self);
            self.fail(FailureKind::Stuck, format!("threads don't end when they are cancelled\n{threads}"));
            return false;
        }
        true
    }
}
