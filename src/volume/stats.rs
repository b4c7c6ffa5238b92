//! Counters of a mounted volume, taken without touching the device and without waiting for it.
//!
//! All of them only grow, except `journal`, `latency`, `locks.known`, `locks.held_*` and `locks.wanted`. They are
//! read one after the other, not at one moment: what happens meanwhile shows in some and not in others.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::Volume;
use crate::ats::{BlockKind, CauseCounts};
use crate::lease::{CommandCounts, IoClass, TimingSummary};

/// What a host did on a volume since it mounted.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeStats {
    /// The volume's id and label.
    pub volume: String,
    pub label: String,
    /// This host on the volume.
    pub slot: u16,
    pub incarnation: u64,
    pub commands: CommandsByClass,
    pub swaps: SwapCounts,
    pub latency: LatencyStats,
    pub locks: LockCounts,
    /// Absent while a commit or checkpoint is under way.
    pub journal: Option<JournalStats>,
    pub slowest_beat_ns: u64,
}

/// Device commands by what they were for (see [`IoClass`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CommandsByClass {
    pub beat: CommandCounts,
    pub demand: CommandCounts,
    pub lock: CommandCounts,
    pub journal: CommandCounts,
    pub metadata: CommandCounts,
    pub data: CommandCounts,
    pub setup: CommandCounts,
}

/// Compare-and-writes by how they ended; beats included.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SwapCounts {
    pub done: u64,
    pub miscompared: u64,
    pub unknown: u64,
    pub own_had_landed: u64,
    /// Commands that the device refused for a moment (busy, unit attention) and that were issued again.
    pub refused: u64,
    /// Swaps that did not simply succeed, each counted once.
    pub causes: CausesByKind,
}

/// Why swaps did not simply succeed, by what they were to change (`docs/miscompare.md`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CausesByKind {
    pub lock: CauseCounts,
    pub heartbeat: CauseCounts,
    pub doorbell: CauseCounts,
}

/// How long things took.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LatencyStats {
    /// The device's answer to one compare-and-write, whatever it was.
    pub compare_and_write: TimingSummary,
    /// The device's answer to reads and writes of at most 4 KiB.
    pub small_read: TimingSummary,
    pub small_write: TimingSummary,
    /// Whole swaps: repeated commands, looks at the block and our own pauses included.
    pub swap: TimingSummary,
    /// From a command that got no answer until it was known what became of it.
    pub resolve: TimingSummary,
}

/// Locks in memory and their movements.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LockCounts {
    pub known: u64,
    pub held_shared: u64,
    pub held_exclusive: u64,
    pub wanted: u64,
    /// Grants that took a disk access, and locks passed on or let go because another asked.
    pub acquired: u64,
    pub given: u64,
    /// Ended waits behind other hosts, and their nanoseconds.
    pub waits: u64,
    pub wait_ns: u64,
}

/// The ring of this host's journal, in blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct JournalStats {
    pub free_blocks: u64,
    pub capacity_blocks: u64,
}

impl CommandsByClass {
    /// Commands that operations caused: everything but beats, doorbell polls and mounting.
    pub fn operations(&self) -> CommandCounts {
        [self.lock, self.journal, self.metadata, self.data]
            .iter()
            .fold(CommandCounts::default(), |sum, c| sum.plus(c))
    }

    /// Commands that time causes: beats and doorbell polls.
    pub fn idle(&self) -> CommandCounts {
        self.beat.plus(&self.demand)
    }

    /// What was added since `earlier`, class by class.
    pub fn since(&self, earlier: &CommandsByClass) -> CommandsByClass {
        CommandsByClass {
            beat: self.beat.since(&earlier.beat),
            demand: self.demand.since(&earlier.demand),
            lock: self.lock.since(&earlier.lock),
            journal: self.journal.since(&earlier.journal),
            metadata: self.metadata.since(&earlier.metadata),
            data: self.data.since(&earlier.data),
            setup: self.setup.since(&earlier.setup),
        }
    }
}

impl Volume {
    /// The counters of this mount.
    pub fn stats(&self) -> VolumeStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let commands = |class| self.door.counts(class);
        let me = self.heartbeat.me();
        let (census, moved, swaps) = (self.locks.census(), &self.locks.stats, self.locks.swap_stats());
        VolumeStats {
            volume: self.superblock.volume.to_string(),
            label: self.superblock.label.clone(),
            slot: me.slot.0,
            incarnation: me.incarnation.0,
            commands: CommandsByClass {
                beat: commands(IoClass::Beat),
                demand: commands(IoClass::Demand),
                lock: commands(IoClass::Lock).plus(&commands(IoClass::Wish)),
                journal: commands(IoClass::Journal),
                metadata: commands(IoClass::Metadata),
                data: commands(IoClass::Data),
                setup: commands(IoClass::Setup),
            },
            swaps: SwapCounts {
                done: get(&swaps.done),
                miscompared: get(&swaps.miscompared),
                unknown: get(&swaps.unknown),
                own_had_landed: get(&swaps.own_had_landed),
                refused: get(&swaps.refused),
                causes: CausesByKind {
                    lock: swaps.causes(BlockKind::Lock),
                    heartbeat: swaps.causes(BlockKind::Heartbeat),
                    doorbell: swaps.causes(BlockKind::Doorbell),
                },
            },
            latency: LatencyStats {
                compare_and_write: self.door.compare_and_write_time().summary(),
                small_read: self.door.small_times().0.summary(),
                small_write: self.door.small_times().1.summary(),
                swap: swaps.swap_time.summary(),
                resolve: swaps.resolve_time.summary(),
            },
            locks: LockCounts {
                known: census.known,
                held_shared: census.held_shared,
                held_exclusive: census.held_exclusive,
                wanted: census.wanted,
                acquired: get(&moved.acquired),
                given: get(&moved.given),
                waits: get(&moved.waits),
                wait_ns: get(&moved.wait_ns),
            },
            journal: self
                .store
                .journal_space()
                .map(|(free_blocks, capacity_blocks)| JournalStats { free_blocks, capacity_blocks }),
            slowest_beat_ns: self.heartbeat.slowest_beat().as_nanos() as u64,
        }
    }
}
