//! Counters of swaps. They only grow.

use std::sync::atomic::{AtomicU64, Ordering};

use super::cause::{Cause, CauseCounts};
use super::record::BlockKind;
use crate::lease::Timing;

const KINDS: usize = BlockKind::ALL.len();
const CAUSES: usize = Cause::ALL.len();

/// Swaps by how they ended.
#[derive(Default)]
pub struct AtsStats {
    /// Answered "swapped".
    pub done: AtomicU64,
    /// Ended with another image in the block.
    pub miscompared: AtomicU64,
    /// Commands without a usable answer; the content of the block decided.
    pub unknown: AtomicU64,
    /// "Miscompare" against our own image: the command had been executed before (a retry below us).
    pub own_had_landed: AtomicU64,
    /// Commands refused and certainly not executed (busy, unit attention), and issued again.
    pub refused: AtomicU64,
    causes: [[AtomicU64; CAUSES]; KINDS],
    /// Whole swaps that ended well or by another's image: device time, our pauses and the looks at the block.
    pub swap_time: Timing,
    /// From the issue of the first command without an answer until it was known what became of it.
    pub resolve_time: Timing,
}

impl AtsStats {
    pub(super) fn count(&self, kind: BlockKind, cause: Cause) {
        self.causes[kind as usize][cause as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Swaps of one kind of block that did not simply succeed.
    pub fn causes(&self, kind: BlockKind) -> CauseCounts {
        let mut counts = CauseCounts::default();
        for cause in Cause::ALL {
            counts.set(*cause, self.causes[kind as usize][*cause as usize].load(Ordering::Relaxed));
        }
        counts
    }
}
