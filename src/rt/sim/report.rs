//! How a simulation ends: what it found, or why and with which seed it failed.
//!
//! Invariant: every failure names its seed in the form `LUNFS_SIM_SEED=...`, which is the one thing
//! needed to see it again.

use std::fmt;
use std::time::Duration;

use super::state::State;
use super::thread::Status;

/// Text that something taking part in a simulation adds to a failure, such as its last commands.
pub type Reporter = Box<dyn Fn() -> String + Send>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FailureKind {
    /// A thread or an event panicked.
    Panic,
    /// Nothing could run and no timer was set.
    Deadlock,
    TimeLimit,
    StepLimit,
    /// A thread that was cancelled at the end did not end.
    Stuck,
    /// A thread ran, or waited outside the simulation, for very long in real time.
    Stall,
}

/// Why a simulation failed.
#[derive(Clone, Debug)]
pub struct Failure {
    pub kind: FailureKind,
    pub seed: u64,
    pub message: String,
    /// The last events and what reporters had to say.
    pub trace: String,
}

impl Failure {
    pub(super) fn new(kind: FailureKind, seed: u64, message: String) -> Self {
        Failure { kind, seed, message, trace: String::new() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "simulation failed: {}", self.message.trim_end())?;
        write!(f, "{}", self.trace)?;
        write!(f, "run it again with LUNFS_SIM_SEED={}", self.seed)
    }
}

impl std::error::Error for Failure {}

/// A simulation that ended well.
#[derive(Clone, Debug)]
pub struct Finished<T> {
    /// What the root closure returned.
    pub value: T,
    /// Fingerprint of everything that happened: equal for equal seeds.
    pub trace_hash: u64,
    /// Virtual time that passed.
    pub time: Duration,
    pub steps: u64,
    /// How often the baton went to another thread.
    pub switches: u64,
}

/// The last events as text.
pub(super) fn describe_trace(state: &State) -> String {
    let mut text = String::from("last events (virtual time, thread, event):\n");
    for entry in state.trace.entries() {
        let name = state.threads.get(entry.tid as usize).map_or("?", |t| t.name.as_str());
        let at = Duration::from_nanos(entry.at);
        text.push_str(&format!("  {at:>14.6?} {:>3} {name:<20} {:?}\n", entry.tid, entry.happening));
    }
    text
}

/// Every unfinished thread, its host and what it waits for.
pub(super) fn describe_threads(state: &State) -> String {
    let mut text = String::new();
    for (tid, thread) in state.threads.iter().enumerate() {
        if thread.status == Status::Finished {
            continue;
        }
        let host = thread.host.map_or("no host".to_owned(), |h| h.to_string());
        text.push_str(&format!("  thread {tid} {:?} ({host}): {:?}", thread.name, thread.status));
        if let Some(wait) = &thread.wait {
            text.push_str(&format!(", waits for {} {} at {}", wait.what, wait.of, wait.at));
            if let Some(holder) = wait.holder.and_then(|h| state.threads.get(h as usize)) {
                text.push_str(&format!(", held by {:?} ({:?})", holder.name, holder.status));
            }
        }
        text.push('\n');
    }
    text
}
