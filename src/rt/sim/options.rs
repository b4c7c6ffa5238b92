//! What can be set for one simulation.

use std::time::Duration;

use crate::rt::clock::nanos_of;
use crate::rt::planted::Bug;

/// Limits and probabilities of a simulation; times are nanoseconds.
#[derive(Clone, Debug)]
pub struct Options {
    pub max_time: u64,
    pub max_steps: u64,
    /// How many of the last scheduling events a failure prints.
    pub trace_len: usize,
    /// Probability of giving way at a lock, an unlock or a notification. None: the seed chooses
    /// one, since some bugs need many switches at once and others long stretches without.
    pub preempt: Option<f64>,
    /// Probability that a condition variable's wait ends without a notification.
    pub spurious: f64,
    /// The most by which a timer is late.
    pub timer_jitter: u64,
    /// Does each host have a clock origin and a wall clock of its own?
    pub host_clocks: bool,
    /// Real time without a step after which a run counts as hung.
    pub stall_limit: Duration,
    /// A rule that the code under test does without; in builds with debug assertions only.
    pub planted: Option<Bug>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            max_time: nanos_of(Duration::from_secs(24 * 3600)),
            max_steps: 50_000_000,
            trace_len: 60,
            preempt: None,
            spurious: 0.005,
            timer_jitter: 50_000,
            host_clocks: true,
            stall_limit: Duration::from_secs(180),
            planted: None,
        }
    }
}
