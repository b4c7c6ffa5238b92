//! What can be set for a simulated LUN, and how long its commands take.

use std::time::Duration;

use super::command::CommandKind;
use crate::rt::clock::nanos_of;
use crate::rt::sim::SimRng;

/// Least and most; each command draws its own.
pub type Span = (Duration, Duration);

const fn micros(least: u64, most: u64) -> Span {
    (Duration::from_micros(least), Duration::from_micros(most))
}

/// How long commands take to reach their execution, and answers to come back. Commands overtake one
/// another as their draws fall.
#[derive(Clone, Copy, Debug)]
pub struct Latency {
    pub read: Span,
    pub write: Span,
    pub compare_and_write: Span,
    pub flush: Span,
    /// Discards and zeroings.
    pub discard: Span,
    /// Added for each MiB.
    pub per_mib: Duration,
    pub answer: Span,
    /// One command in so many takes up to `slow_by` longer; 0 for none.
    pub slow_one_in: u64,
    pub slow_by: Duration,
}

impl Default for Latency {
    /// A flash array over a fabric, with rare hiccups.
    fn default() -> Self {
        Latency {
            read: micros(80, 300),
            write: micros(80, 400),
            compare_and_write: micros(100, 500),
            flush: micros(300, 3000),
            discard: micros(200, 2000),
            per_mib: Duration::from_micros(400),
            answer: micros(20, 150),
            slow_one_in: 100,
            slow_by: Duration::from_millis(20),
        }
    }
}

impl Latency {
    /// No time passes; the order of commands is still open.
    pub fn none() -> Self {
        let none = micros(0, 0);
        Latency {
            read: none,
            write: none,
            compare_and_write: none,
            flush: none,
            discard: none,
            per_mib: Duration::ZERO,
            answer: none,
            slow_one_in: 0,
            slow_by: Duration::ZERO,
        }
    }

    /// Time from issue to execution.
    pub(super) fn out(&self, kind: CommandKind, len: u64, rng: &mut SimRng) -> Duration {
        let span = match kind {
            CommandKind::Read => self.read,
            CommandKind::Write => self.write,
            CommandKind::CompareAndWrite => self.compare_and_write,
            CommandKind::Flush => self.flush,
            CommandKind::Discard | CommandKind::WriteZeroes => self.discard,
        };
        let moved = if matches!(kind, CommandKind::Read | CommandKind::Write) { len } else { 0 };
        let transfer = (u128::from(nanos_of(self.per_mib)) * u128::from(moved)) >> 20;
        let mut nanos = draw(span, rng).saturating_add(transfer as u64);
        if self.slow_one_in > 0 && rng.below(self.slow_one_in) == 0 {
            nanos = nanos.saturating_add(rng.between(0, nanos_of(self.slow_by)));
        }
        Duration::from_nanos(nanos)
    }

    /// Time from execution to answer.
    pub(super) fn back(&self, rng: &mut SimRng) -> Duration {
        Duration::from_nanos(draw(self.answer, rng))
    }
}

fn draw(span: Span, rng: &mut SimRng) -> u64 {
    rng.between(nanos_of(span.0), nanos_of(span.1))
}

/// What a simulated LUN is like.
#[derive(Clone, Debug)]
pub struct SimLunOptions {
    /// 512 or 4096.
    pub logical_block_bytes: u32,
    pub size_bytes: u64,
    pub volatile_cache: bool,
    /// Published in the geometry; bounds every random delay.
    pub hold_time: Duration,
    /// Does the LUN have reservations?
    pub fencing: bool,
    pub latency: Latency,
    /// When a host gives up waiting for an answer.
    pub deadline: Duration,
    /// The most commands a host has on their way; more wait at the host. None for no limit.
    pub queue_depth: Option<u32>,
    /// How many of the last commands a failure prints.
    pub trace_len: usize,
    /// None draws one from the simulation; outside of one it is 0.
    pub seed: Option<u64>,
}

impl Default for SimLunOptions {
    fn default() -> Self {
        SimLunOptions {
            logical_block_bytes: 512,
            size_bytes: 64 << 30,
            volatile_cache: true,
            hold_time: Duration::from_secs(5),
            fencing: false,
            latency: Latency::default(),
            deadline: Duration::from_secs(2),
            queue_depth: None,
            trace_len: 200,
            seed: None,
        }
    }
}
