//! A deterministic simulation of hosts, threads and time, behind [`crate::rt`].
//!
//! [`Simulation::run`] runs a closure and all threads it starts so that exactly one runs at a time.
//! Who runs next, which coin tosses make a thread give way, how late timers are: all of it follows
//! from one seed. Time is virtual and moves only when nobody can run. So a failing interleaving is
//! found by trying seeds and seen again by naming one: `LUNFS_SIM_SEED=7 cargo test name_of_test`.
//!
//! ```
//! use lunfs::rt::{self, sim::Simulation};
//! use std::time::Duration;
//!
//! let slept = Simulation::new(7).run(|| {
//!     let start = rt::Instant::now();
//!     let child = rt::spawn("child", || rt::sleep(Duration::from_secs(3600)));
//!     child.join().unwrap();
//!     start.elapsed()
//! });
//! assert!(slept >= Duration::from_secs(3600));
//! ```
//!
//! What a test must know:
//!
//! * The run ends when the root closure returns; threads that are left are then unwound (their drops
//!   run). Any panic in any thread, a deadlock, or a limit fails the run and prints the seed.
//! * Threads switch at blocking points (sleep, device I/O, contended locks, waits, join, yield) and,
//!   by a coin, at locks, unlocks and notifications; nowhere else. Code between two such points is
//!   atomic, so races on plain atomics are not explored.
//! * Don't hold a `std` lock across a blocking point, and don't wait by `std` means at all.
//! * Each host has its own clock origin; an [`crate::rt::Instant`] means nothing on another host.
//!
//! Not for weak memory orderings, and not for measuring speed.

mod core;
mod event;
pub(crate) mod hooks;
mod host;
mod options;
mod report;
pub(crate) mod rng;
mod state;
#[cfg(test)]
mod tests;
mod thread;
mod timer;
mod trace;
mod wait;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use event::{Completion, ThreadTag, after, is_killed, is_over, mark, now, on_failure, this_thread};
pub use hooks::{Killed, is_simulated};
pub use host::{freeze_host, host_clock, is_frozen, kill_host, on_host, spawn_on, thaw_host};
pub use options::Options;
pub use report::{Failure, FailureKind, Finished, Reporter};
pub use rng::SimRng;

pub(super) use self::core::planted;

use self::core::Core;
use self::state::State;
use crate::rt::clock::nanos_of;
use crate::rt::planted::Bug;

/// How often `run` looks whether a run still makes steps.
const WATCH_EVERY: Duration = Duration::from_secs(5);

/// One run, to be set up and started.
pub struct Simulation {
    seed: u64,
    options: Options,
}

impl Simulation {
    pub fn new(seed: u64) -> Self {
        Simulation { seed, options: Options::default() }
    }

    /// Everything that can be set, at once.
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// Fails a run that needs more virtual time.
    pub fn max_time(mut self, limit: Duration) -> Self {
        self.options.max_time = nanos_of(limit);
        self
    }

    /// Fails a run that needs more scheduling steps.
    pub fn max_steps(mut self, limit: u64) -> Self {
        self.options.max_steps = limit;
        self
    }

    /// Probability that a thread gives way at a lock, an unlock or a notification; else the seed's.
    pub fn preempt(mut self, probability: f64) -> Self {
        self.options.preempt = Some(probability);
        self
    }

    /// Takes one rule out of the code under test.
    pub fn planted(mut self, bug: Option<Bug>) -> Self {
        self.options.planted = bug;
        self
    }

    /// How many of the last scheduling events a failure prints.
    pub fn trace_len(mut self, entries: usize) -> Self {
        self.options.trace_len = entries;
        self
    }

    /// Runs `root` to its end and panics with a report if anything went wrong.
    pub fn run<T: Send + 'static>(self, root: impl FnOnce() -> T + Send + 'static) -> T {
        match self.try_run(root) {
            Ok(finished) => finished.value,
            Err(failure) => panic!("{failure}"),
        }
    }

    /// Runs `root` to its end; a failure is an answer.
    pub fn try_run<T: Send + 'static>(
        self,
        root: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Finished<T>, Failure> {
        assert!(!is_simulated(), "a simulation inside a simulation");
        let value = Arc::new(Mutex::new(None));
        let stall_limit = self.options.stall_limit;
        let core = Core::new(self.seed, self.options);
        let slot = value.clone();
        let body = Box::new(move || {
            let result = root();
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        });
        let spawned = core.spawn("root", None, 0, body);
        if let Err(error) = spawned {
            panic!("can't start the root thread of a simulation: {error}");
        }
        core.start();
        let state = wait_for_end(&core, stall_limit);
        conclude(&core, state, &value)
    }
}

/// Waits until all threads have left, or are given up.
fn wait_for_end(core: &Core, stall_limit: Duration) -> MutexGuard<'_, State> {
    let mut state = core.lock();
    let mut steps = state.steps;
    let mut stalled = Duration::ZERO;
    loop {
        let stuck = state.failure.as_ref().is_some_and(|f| f.kind == FailureKind::Stuck);
        if state.done && (state.alive == 0 || stuck || stalled > WATCH_EVERY) {
            return state;
        }
        let (guard, timeout) =
            core.ended.wait_timeout(state, WATCH_EVERY).unwrap_or_else(PoisonError::into_inner);
        state = guard;
        if !timeout.timed_out() {
            continue;
        }
        stalled = if state.steps == steps { stalled + WATCH_EVERY } else { Duration::ZERO };
        steps = state.steps;
        if stalled >= stall_limit && !state.done {
            let running = state.running;
            let text = format!(
                "thread {running} has not reached a blocking point for {stall_limit:?}: does it spin, or \
                 wait outside the simulation?\n{}",
                report::describe_threads(&state)
            );
            state.failure = Some(Failure::new(FailureKind::Stall, state.seed, text));
            return state;
        }
    }
}

/// Turns the final state into the run's answer; what the run leaves behind is dropped here.
fn conclude<T>(
    core: &Core,
    mut state: MutexGuard<'_, State>,
    value: &Mutex<Option<T>>,
) -> Result<Finished<T>, Failure> {
    let garbage = std::mem::take(&mut state.garbage);
    let reporters = std::mem::take(&mut state.reporters);
    let trace_hash = state.trace.hash();
    let (time, steps) = (Duration::from_nanos(state.now), state.steps);
    let failure = state.failure.take().map(|mut failure| {
        failure.trace = report::describe_trace(&state);
        failure
    });
    let seed = state.seed;
    drop(state);
    drop(garbage);
    if let Some(mut failure) = failure {
        for (name, reporter) in &reporters {
            // A reporter looks at things a failed run left behind; its own panic adds nothing.
            if let Ok(text) = catch_unwind(AssertUnwindSafe(reporter)) {
                failure.trace.push_str(&format!("{name}:\n{text}"));
            }
        }
        return Err(failure);
    }
    match value.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(value) => Ok(Finished { value, trace_hash, time, steps, switches: core.switches() }),
        None => Err(Failure {
            kind: FailureKind::Panic,
            seed,
            message: "the root thread was killed with its host".to_owned(),
            trace: String::new(),
        }),
    }
}

/// The seeds to try: one from `LUNFS_SIM_SEED`, a range from `LUNFS_SIM_SEEDS=A..B`, or the default.
pub fn seeds(default: std::ops::Range<u64>) -> std::ops::Range<u64> {
    if let Ok(seed) = std::env::var("LUNFS_SIM_SEED")
        && let Ok(seed) = seed.trim().parse::<u64>()
    {
        return seed..seed.saturating_add(1);
    }
    if let Ok(range) = std::env::var("LUNFS_SIM_SEEDS")
        && let Some((from, to)) = range.split_once("..")
        && let (Ok(from), Ok(to)) = (from.trim().parse::<u64>(), to.trim().parse::<u64>())
    {
        // So that whoever asked for the range knows which tests heard it.
        println!("seeds {from}..{to}");
        return from..to;
    }
    default
}
