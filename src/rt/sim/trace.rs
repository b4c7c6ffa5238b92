//! What happened lately in a simulation, and a fingerprint of all that ever happened in it.
//!
//! Invariant: the hash covers every entry, also those the ring has forgotten; two runs with the same
//! hash took the same schedule.

use std::collections::VecDeque;

use super::rng::mix;
use super::thread::Tid;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Happening {
    Spawn,
    Run,
    Block(&'static str),
    Timer,
    Event,
    Finish,
    Kill,
    Freeze,
    Thaw,
    /// A hash of something a user of the simulation wants to be part of the fingerprint.
    Mark(u64),
}

impl Happening {
    fn code(self) -> u64 {
        match self {
            Happening::Spawn => 1,
            Happening::Run => 2,
            // Text is hashed by its bytes: its address differs from run to run.
            Happening::Block(what) => {
                what.bytes().fold(3, |h: u64, b| h.wrapping_mul(31).wrapping_add(u64::from(b)))
            }
            Happening::Timer => 4,
            Happening::Event => 5,
            Happening::Finish => 6,
            Happening::Kill => 7,
            Happening::Freeze => 8,
            Happening::Thaw => 9,
            Happening::Mark(hash) => mix(hash),
        }
    }
}

#[derive(Clone, Copy)]
pub struct Entry {
    pub at: u64,
    pub tid: Tid,
    pub happening: Happening,
}

pub struct Trace {
    ring: VecDeque<Entry>,
    keep: usize,
    hash: u64,
}

impl Trace {
    pub fn new(keep: usize) -> Self {
        Trace { ring: VecDeque::with_capacity(keep), keep, hash: 0 }
    }

    pub fn note(&mut self, at: u64, tid: Tid, happening: Happening) {
        let folded = self.hash.rotate_left(17) ^ at ^ (u64::from(tid) << 40);
        self.hash = mix(folded.wrapping_add(happening.code().wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        if self.keep == 0 || matches!(happening, Happening::Mark(_) | Happening::Event) {
            // Whoever marks has a report of its own; here it would only crowd out the threads.
            return;
        }
        if self.ring.len() == self.keep {
            self.ring.pop_front();
        }
        self.ring.push_back(Entry { at, tid, happening });
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    /// The last entries, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.ring.iter()
    }
}
