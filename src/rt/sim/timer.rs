//! Timers of a simulation: the end of a thread's wait, or an event that runs by itself.
//!
//! Invariant: the order is (time, random tie, order of making), so it follows from the seed alone.

use std::cmp::Ordering;

use super::thread::Tid;

/// Runs on whichever thread holds the baton, between two threads' turns; it must not block.
pub type Event = Box<dyn FnOnce() + Send>;

pub enum Action {
    Wake { tid: Tid, wait_seq: u64 },
    Event(Event),
}

pub struct Timer {
    pub at: u64,
    pub tie: u64,
    pub seq: u64,
    pub action: Action,
}

impl Timer {
    fn key(&self) -> (u64, u64, u64) {
        (self.at, self.tie, self.seq)
    }
}

impl PartialEq for Timer {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Timer {}

impl PartialOrd for Timer {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Timer {
    /// Reversed: a binary heap yields its greatest, and we want the earliest.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}
