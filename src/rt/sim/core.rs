//! Handing the baton: exactly one thread of a simulation runs at a time.
//!
//! Simulated threads are threads of the operating system. Each waits for its own baton (one futex)
//! unless it is its turn; who blocks chooses the next one, gives it the baton and waits.
//!
//! Invariants: only the holder of the baton touches the state (its mutex is never contended but by
//! `run`'s watch); the state's lock is never held while foreign code runs (events, closures, drops).
//! A cancelled thread unwinds by a private payload at its next blocking point; while it unwinds its
//! blocking points still work, but end early rather than never.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, Location, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::atomic::{Ordering::Acquire, Ordering::Release};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{Thread as OsThread, panicking};

use super::options::Options;
use super::report::FailureKind;
use super::state::{Next, Phase, State};
use super::thread::{Status, Tid, Wait};
use super::timer::Event;
use crate::rt::HostTag;
use crate::rt::planted::Bug;

/// Stacks of simulated threads; more than in life, because a debug build's frames are larger.
const STACK_BYTES: usize = 2 * 1024 * 1024;

/// Unwinds a thread that is not needed any more; nobody outside this module sees it.
pub struct Cancelled;

/// What one simulated thread waits on for its turn.
pub struct Baton {
    go: AtomicBool,
    timed_out: AtomicBool,
    os: OnceLock<OsThread>,
}

impl Baton {
    pub fn new() -> Self {
        Baton { go: AtomicBool::new(false), timed_out: AtomicBool::new(false), os: OnceLock::new() }
    }

    pub fn set_timed_out(&self) {
        self.timed_out.store(true, Relaxed);
    }

    fn pass(&self) {
        self.go.store(true, Release);
        if let Some(os) = self.os.get() {
            os.unpark();
        }
    }

    fn wait(&self) {
        while !self.go.swap(false, Acquire) {
            std::thread::park();
        }
    }
}

/// One running simulation.
pub struct Core {
    state: Mutex<State>,
    /// `run` waits here for the end.
    pub ended: Condvar,
    /// Locks, unlocks and notifications until the coin says to give way.
    preempt_in: AtomicU32,
    cancelling: AtomicBool,
    switches: AtomicU64,
    planted: Option<Bug>,
}

/// The simulation and the number of the calling thread.
#[derive(Clone)]
pub struct Current {
    pub core: Arc<Core>,
    pub tid: Tid,
    baton: Arc<Baton>,
}

thread_local! {
    static CURRENT: RefCell<Option<Current>> = const { RefCell::new(None) };
    static SIMULATED: Cell<bool> = const { Cell::new(false) };
    static IN_EVENT: Cell<bool> = const { Cell::new(false) };
}

/// Does the calling thread belong to a simulation?
pub fn is_simulated() -> bool {
    SIMULATED.get()
}

/// The bug planted in the simulation that the calling thread belongs to.
pub fn planted() -> Option<Bug> {
    with_current(|me| me.core.planted).flatten()
}

/// Is the calling thread running an event, so that it must not block?
pub fn in_event() -> bool {
    IN_EVENT.get()
}

/// Calls `f` if the calling thread belongs to a simulation.
pub fn with_current<R>(f: impl FnOnce(&Current) -> R) -> Option<R> {
    if !SIMULATED.get() {
        return None;
    }
    CURRENT.try_with(|cell| cell.try_borrow().ok()?.as_ref().map(f)).ok().flatten()
}

impl Core {
    pub fn new(seed: u64, options: Options) -> Arc<Self> {
        let core = Core {
            planted: options.planted,
            state: Mutex::new(State::new(seed, options)),
            ended: Condvar::new(),
            preempt_in: AtomicU32::new(0),
            cancelling: AtomicBool::new(false),
            switches: AtomicU64::new(0),
        };
        let countdown = core.lock().draw_countdown();
        core.preempt_in.store(countdown, Relaxed);
        Arc::new(core)
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn switches(&self) -> u64 {
        self.switches.load(Relaxed)
    }

    /// Starts a simulated thread; it runs when its turn comes.
    pub fn spawn(
        self: &Arc<Self>,
        name: &str,
        host: Option<HostTag>,
        join_queue: u64,
        body: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<Tid> {
        let (tid, baton) = {
            let mut state = self.lock();
            let tid = state.add_thread(name, host, join_queue);
            (tid, state.thread(tid).baton.clone())
        };
        let shown = host.map_or(name.to_owned(), |h| format!("h{}/{name}", h.0));
        let current = Current { core: self.clone(), tid, baton: baton.clone() };
        let builder = std::thread::Builder::new().name(shown).stack_size(STACK_BYTES);
        match builder.spawn(move || thread_main(current, body)) {
            Ok(handle) => {
                // Nobody passes the baton before we give ours away, so this is in time.
                let _ = baton.os.set(handle.thread().clone());
                self.lock().make_ready(tid);
                Ok(tid)
            }
            Err(error) => {
                let mut state = self.lock();
                state.finish(tid);
                state.alive -= 1;
                Err(error)
            }
        }
    }

    /// Gives the baton to the first thread; for `run`.
    pub fn start(&self) {
        let mut state = self.lock();
        if let Next::Thread(tid) = state.next() {
            let baton = state.thread(tid).baton.clone();
            drop(state);
            baton.pass();
        }
    }

    /// Gives way to whoever is chosen next, and returns when it is `me`'s turn again (never, if `me`
    /// has finished or is given up: the caller of a finished thread just leaves).
    fn switch<'a>(&'a self, mut state: MutexGuard<'a, State>, me: &Current) {
        loop {
            let next = state.next();
            if state.phase == Phase::Cancelling {
                self.cancelling.store(true, Relaxed);
            }
            match next {
                Next::Thread(tid) if tid == me.tid => return,
                Next::Thread(tid) => {
                    let baton = state.thread(tid).baton.clone();
                    let finished = state.thread(me.tid).status == Status::Finished;
                    drop(state);
                    self.switches.fetch_add(1, Relaxed);
                    baton.pass();
                    if !finished {
                        me.baton.wait();
                    }
                    return;
                }
                Next::Event(event) => {
                    drop(state);
                    let outcome = run_event(event);
                    state = self.lock();
                    if let Err(payload) = outcome {
                        let text = payload_text(payload.as_ref());
                        state.fail(FailureKind::Panic, format!("panic in an event: {text}"));
                    }
                }
                Next::Done => {
                    state.done = true;
                    self.ended.notify_all();
                    let finished = state.thread(me.tid).status == Status::Finished;
                    drop(state);
                    if finished {
                        return;
                    }
                    loop {
                        // Given up: `run` has reported us, and our stack stays as it is.
                        std::thread::park();
                    }
                }
            }
        }
    }
}

impl Current {
    /// Blocks this thread until it is woken, roused or its time is over (then true). `release` runs
    /// after the thread has been entered as waiting and before anybody else runs.
    pub fn block(
        &self,
        wait: Wait,
        queue: Option<u64>,
        timeout: Option<u64>,
        release: impl FnOnce(),
    ) -> bool {
        assert!(!in_event(), "an event must not block: {} {} at {}", wait.what, wait.of, wait.at);
        self.baton.timed_out.store(false, Relaxed);
        {
            let mut state = self.core.lock();
            self.notice_panic(&mut state);
            state.set_blocked(self.tid, wait, queue, timeout);
        }
        release();
        self.core.switch(self.core.lock(), self);
        self.baton.timed_out.load(Relaxed)
    }

    /// Unwinds this thread if it has been cancelled; not while it is unwinding anyway.
    pub fn check_cancelled(&self) {
        if self.core.cancelling.load(Relaxed) && !panicking() && !in_event() {
            resume_unwind(Box::new(Cancelled));
        }
    }

    /// Has the run ended for this thread?
    pub fn is_cancelled(&self) -> bool {
        self.core.cancelling.load(Relaxed)
    }

    /// Stays runnable, but lets the choice fall anew.
    pub fn give_way(&self) {
        if in_event() {
            return;
        }
        let mut state = self.core.lock();
        self.notice_panic(&mut state);
        state.thread(self.tid).status = Status::Ready;
        state.runnable.push(self.tid);
        self.core.switch(state, self);
    }

    /// Gives way if the coin says so. Never unwinds: it runs in drops.
    pub fn toss_coin(&self) {
        let left = self.core.preempt_in.load(Relaxed);
        if left > 0 {
            self.core.preempt_in.store(left - 1, Relaxed);
            return;
        }
        if in_event() || panicking() {
            return;
        }
        let countdown = self.core.lock().draw_countdown();
        self.core.preempt_in.store(countdown, Relaxed);
        self.give_way();
    }

    /// Gives the baton away for a thread that was just taken out of the runnable ones.
    pub fn leave(&self) {
        self.core.switch(self.core.lock(), self);
        self.check_cancelled();
    }

    /// A panicking thread that reaches a blocking point in some drop fails the run there: what it
    /// waits for may never come, and the panic would never be heard of.
    fn notice_panic(&self, state: &mut State) {
        if panicking() && state.phase == Phase::Running {
            let who = describe(state, self.tid);
            state.fail(FailureKind::Panic, format!("{who} panicked (its message is above)"));
            self.core.cancelling.store(true, Relaxed);
        }
    }
}

fn describe(state: &mut State, tid: Tid) -> String {
    let thread = state.thread(tid);
    let host = thread.host.map_or("no host".to_owned(), |h| h.to_string());
    format!("thread {tid} {:?} ({host})", thread.name)
}

fn run_event(event: Event) -> std::thread::Result<()> {
    IN_EVENT.set(true);
    let outcome = catch_unwind(AssertUnwindSafe(event));
    IN_EVENT.set(false);
    outcome
}

/// What a simulated thread does from its first turn to its last.
fn thread_main(me: Current, body: Box<dyn FnOnce() + Send>) {
    CURRENT.with(|cell| *cell.borrow_mut() = Some(me.clone()));
    SIMULATED.set(true);
    me.baton.wait();
    let outcome = catch_unwind(AssertUnwindSafe(move || {
        let me = with_current(Clone::clone);
        if let Some(me) = me {
            me.check_cancelled();
        }
        body();
    }));
    let mut state = me.core.lock();
    if let Err(payload) = outcome
        && !payload.is::<Cancelled>()
    {
        let who = describe(&mut state, me.tid);
        let text = format!("{who} panicked: {}", payload_text(payload.as_ref()));
        match &mut state.failure {
            // The panic was noticed on its way; now its message is known.
            Some(failure) if failure.message.starts_with(&format!("{who} panicked (")) => {
                failure.message = text
            }
            _ => state.fail(FailureKind::Panic, text),
        }
    }
    if me.tid == 0 {
        state.begin_cancel();
    }
    state.finish(me.tid);
    me.core.switch(state, &me);
    SIMULATED.set(false);
    CURRENT.with(|cell| cell.borrow_mut().take());
    let mut state = me.core.lock();
    state.alive -= 1;
    me.core.ended.notify_all();
}

/// The text of a panic.
pub fn payload_text(payload: &(dyn Any + Send)) -> &str {
    if let Some(text) = payload.downcast_ref::<&'static str>() {
        text
    } else if let Some(text) = payload.downcast_ref::<String>() {
        text
    } else {
        "(no text)"
    }
}

/// A description of a wait at the caller's place.
#[track_caller]
pub fn wait_for(what: &'static str, of: &'static str) -> Wait {
    Wait { what, of, at: Location::caller(), holder: None }
}
