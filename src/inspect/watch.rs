//! Watching heartbeat slots: who moves, who is silent and for how long.
//!
//! Invariant: a host is judged by whether its slot *changes* while we look, on our own clock. The wall
//! clock in a slot is shown and decides nothing. Slots are compared as bytes, so that a slot that this
//! program can't decode (a newer protocol, a torn write) counts as moving all the same.
//!
//! Not for: declaring a host dead in order to recover it (`heartbeat`).

use std::time::Duration;

use super::{InspectError, Volume};
use crate::device::{AlignedBuf, BlockDevice};
use crate::durations::dead_after;
use crate::layout::RECORD_BYTES;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::rt::{self, Instant};
use crate::types::{BLOCK_BYTES, BlockNo, Slot};

/// What watching showed about one slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It changed while we watched.
    Moving,
    /// Claimed as live, unchanged so far, but not for long enough to be called dead.
    Silent,
    /// Claimed as live and unchanged for its whole dead time and hold time.
    Dead,
    /// Its host left, gave up or was recovered, or the slot was never claimed.
    Ended,
    /// Claimed by nobody we can name: the slot can't be decoded.
    Unreadable,
}

/// One slot under watch.
#[derive(Clone, Debug)]
pub struct WatchedSlot {
    pub slot: Slot,
    pub address: BlockNo,
    pub record: Result<SlotRecord, InspectError>,
    /// When we saw it change last, and how far its wall clock was ahead of ours then.
    pub last_change: Option<Change>,
    raw: [u8; RECORD_BYTES],
    first_seen: Instant,
}

/// A change of a slot as we saw it.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub seen: Instant,
    /// Positive: the host's wall clock is ahead of ours. Exact to about one polling interval.
    pub skew_ms: Option<i64>,
}

/// All slots of a volume, read again and again.
pub struct SlotWatch<'v, 'd> {
    volume: &'v Volume<'d>,
    pub slots: Vec<WatchedSlot>,
    started: Instant,
}

impl<'v, 'd> SlotWatch<'v, 'd> {
    pub fn start(volume: &'v Volume<'d>) -> Result<Self, InspectError> {
        let bytes = read_slot_region(volume)?;
        // Taken after the read: a beat that lands in between must not shorten the wait.
        let started = Instant::now();
        let slots = volume
            .geometry()
            .all_slots()
            .zip(bytes.chunks_exact(BLOCK_BYTES))
            .map(|(slot, block)| WatchedSlot {
                slot,
                address: volume.geometry().slot(slot),
                record: decode(volume, slot, block),
                last_change: None,
                raw: raw_of(block),
                first_seen: started,
            })
            .collect();
        Ok(SlotWatch { volume, slots, started })
    }

    /// Reads all slots once more.
    pub fn poll(&mut self) -> Result<(), InspectError> {
        let bytes = read_slot_region(self.volume)?;
        let (now, wall_ns) = (Instant::now(), wall_ns());
        for (watched, block) in self.slots.iter_mut().zip(bytes.chunks_exact(BLOCK_BYTES)) {
            if block[..RECORD_BYTES] == watched.raw {
                continue;
            }
            watched.raw = raw_of(block);
            watched.record = decode(self.volume, watched.slot, block);
            let skew_ms = watched.record.as_ref().ok().map(|r| r.wall_ns.saturating_sub(wall_ns) / 1_000_000);
            watched.last_change = Some(Change { seen: now, skew_ms });
        }
        Ok(())
    }

    /// Polls until `span` has passed since the start.
    pub fn run(&mut self, span: Duration) -> Result<(), InspectError> {
        let step = self.poll_interval();
        while self.started.elapsed() < span {
            rt::sleep(step.min(span.saturating_sub(self.started.elapsed())));
            self.poll()?;
        }
        Ok(())
    }

    /// A slot that changed since the start.
    pub fn first_moving(&self) -> Option<&WatchedSlot> {
        self.slots.iter().find(|s| s.last_change.is_some())
    }

    pub fn watched_for(&self) -> Duration {
        self.started.elapsed()
    }

    /// A fraction of the quickest beat: what the age of a beat is exact to.
    pub fn poll_interval(&self) -> Duration {
        let beat_ms = self.live().map(|r| r.durations.beat_ms).filter(|ms| *ms > 0).min();
        let beat_ms = beat_ms.unwrap_or(self.volume.superblock.durations.beat_ms);
        Duration::from_millis(u64::from(beat_ms / 8).clamp(10, 250))
    }

    /// Long enough to see every living host beat: somewhat more than two of the slowest beats. Zero
    /// when no slot claims to be live.
    pub fn two_beats(&self) -> Duration {
        let beat_ms = self.live().map(|r| r.durations.beat_ms).max().unwrap_or(0);
        Duration::from_millis(u64::from(beat_ms) * 5 / 2)
    }

    /// Unchanged for this long, all hosts of this volume are dead: the longest dead time, hold time
    /// included, that any slot ever published, and not less than the superblock's.
    pub fn full_dead_time(&self) -> Duration {
        let records = self.slots.iter().filter_map(|s| s.record.as_ref().ok());
        let slots = records.map(|r| dead_after(&r.durations)).max().unwrap_or_default();
        slots.max(dead_after(&self.volume.superblock.durations))
    }

    fn live(&self) -> impl Iterator<Item = &SlotRecord> {
        self.slots.iter().filter_map(|s| s.record.as_ref().ok()).filter(|r| r.state == SlotState::Live)
    }
}

impl WatchedSlot {
    /// The record's bytes when we read them last.
    pub fn raw(&self) -> &[u8; RECORD_BYTES] {
        &self.raw
    }

    /// How long the slot has been unchanged, as far as we know.
    pub fn unchanged_for(&self) -> Duration {
        self.last_change.map_or(self.first_seen, |c| c.seen).elapsed()
    }

    pub fn verdict(&self) -> Verdict {
        match &self.record {
            Err(_) if self.last_change.is_some() => Verdict::Moving,
            Err(_) => Verdict::Unreadable,
            Ok(record) if !matches!(record.state, SlotState::Live) => Verdict::Ended,
            Ok(record) if self.unchanged_for() >= dead_after(&record.durations) => Verdict::Dead,
            Ok(_) if self.last_change.is_some() => Verdict::Moving,
            Ok(_) => Verdict::Silent,
        }
    }

    /// How the host is called in messages.
    pub fn host_name(&self) -> &str {
        match &self.record {
            Ok(record) if !record.host_name.is_empty() => &record.host_name,
            _ => "(unnamed host)",
        }
    }
}

/// Blocks watched as bytes only, for a volume that can't be decoded.
pub struct ByteWatch<'d> {
    dev: &'d dyn BlockDevice,
    first: BlockNo,
    before: AlignedBuf,
}

impl<'d> ByteWatch<'d> {
    pub fn start(dev: &'d dyn BlockDevice, first: BlockNo, blocks: u64) -> Result<Self, InspectError> {
        let before = AlignedBuf::zeroed(blocks as usize * BLOCK_BYTES);
        let mut watch = ByteWatch { dev, first, before };
        watch.before = watch.read()?;
        Ok(watch)
    }

    /// Does any byte differ from what it was at the start?
    pub fn moved(&self) -> Result<bool, InspectError> {
        Ok(self.read()?[..] != self.before[..])
    }

    fn read(&self) -> Result<AlignedBuf, InspectError> {
        let mut buf = AlignedBuf::zeroed(self.before.len());
        self.dev
            .read(self.first.offset_bytes(), &mut buf)
            .map_err(|source| InspectError::Device { at: self.first, source })?;
        Ok(buf)
    }
}

fn read_slot_region(volume: &Volume<'_>) -> Result<AlignedBuf, InspectError> {
    volume.read_run(volume.geometry().slot(Slot(0)), volume.geometry().slots.into())
}

fn raw_of(block: &[u8]) -> [u8; RECORD_BYTES] {
    let mut raw = [0; RECORD_BYTES];
    raw.copy_from_slice(&block[..RECORD_BYTES]);
    raw
}

/// The record in `block`; if it fails its check, the block is read again by itself.
fn decode(volume: &Volume<'_>, slot: Slot, block: &[u8]) -> Result<SlotRecord, InspectError> {
    let at = volume.geometry().slot(slot);
    SlotRecord::decode(block, volume.id(), at).or_else(|_| volume.slot(slot))
}

/// This host's wall clock in nanoseconds since 1970.
pub fn wall_ns() -> i64 {
    let (secs, nanos) = rt::wall_clock();
    secs.saturating_mul(1_000_000_000).saturating_add(i64::from(nanos))
}
