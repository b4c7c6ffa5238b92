//! The door: the device behind the lease check, counted by what commands are for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{EndCause, Lease, Timing};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed, Fencing};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Condvar, Instant, Mutex};
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo};

/// What a command is for; counted apart, because some cost per second and others per operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoClass {
    /// Own beats and reading those of others.
    Beat,
    /// Doorbells and request blocks looked at or written by the demand thread.
    Demand,
    /// Lock blocks.
    Lock,
    /// The doorbell and request traffic of a wait: hints, which a device may forget.
    Wish,
    Journal,
    /// Metadata blocks in place.
    Metadata,
    Data,
    /// Mounting and leaving.
    Setup,
    /// The last word of a host that withdraws: a swap of its own slot, the one change that passes after the
    /// end of the lease. It compares with the host's last beat, so it changes nothing once somebody else did.
    Farewell,
}

const CLASSES: usize = 9;

/// Commands issued through a door, by class.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CommandCounts {
    pub reads: u64,
    pub writes: u64,
    /// Compare-and-writes, whatever their outcome.
    pub swaps: u64,
    pub flushes: u64,
    pub bytes_read: u64,
    pub bytes_written: u64,
}

impl CommandCounts {
    /// All commands.
    pub fn commands(&self) -> u64 {
        self.reads + self.writes + self.swaps + self.flushes
    }

    /// What was added since `earlier`.
    pub fn since(&self, earlier: &CommandCounts) -> CommandCounts {
        CommandCounts {
            reads: self.reads - earlier.reads,
            writes: self.writes - earlier.writes,
            swaps: self.swaps - earlier.swaps,
            flushes: self.flushes - earlier.flushes,
            bytes_read: self.bytes_read - earlier.bytes_read,
            bytes_written: self.bytes_written - earlier.bytes_written,
        }
    }

    /// The sum of two counts.
    pub fn plus(&self, other: &CommandCounts) -> CommandCounts {
        CommandCounts {
            reads: self.reads + other.reads,
            writes: self.writes + other.writes,
            swaps: self.swaps + other.swaps,
            flushes: self.flushes + other.flushes,
            bytes_read: self.bytes_read + other.bytes_read,
            bytes_written: self.bytes_written + other.bytes_written,
        }
    }
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    writes: AtomicU64,
    swaps: AtomicU64,
    flushes: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

/// A wait for a command to be gone ends with the lease; it looks this often.
const HOLD_CHECK: Duration = Duration::from_millis(200);

/// The device behind the lease. See the module header of [`super`].
pub struct Door {
    device: Arc<dyn BlockDevice>,
    lease: Arc<Lease>,
    geometry: DeviceGeometry,
    counters: [Counters; CLASSES],
    /// Data writes that ended, and how many of them a flush has covered.
    data_written: AtomicU64,
    data_flushed: AtomicU64,
    /// Changes that ended and must outlive a power cut, how many of them a flush has covered, and under which
    /// count of resets.
    changed: AtomicU64,
    covered: Mutex<Covered>,
    known_resets: AtomicU64,
    /// Signs of a reset that the device itself did not count.
    noticed_resets: AtomicU64,
    flushing: Mutex<Flushing>,
    flushed: Condvar,
    /// Plain changes on their way, and until when one that timed out may still come.
    changing: AtomicU64,
    may_come_until: Mutex<Option<Instant>>,
    /// Answered commands of at most a block, from issue to answer.
    small_read_time: Timing,
    small_write_time: Timing,
    compare_and_write_time: Timing,
}

/// A plain change from before its lease check until its answer.
struct Changing<'a>(&'a AtomicU64);

impl<'a> Changing<'a> {
    fn begin(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Changing(count)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[derive(Default)]
struct Covered {
    changed: u64,
    resets: u64,
}

/// Flushes are shared: who needs one waits for the next that begins after it asked.
#[derive(Default)]
struct Flushing {
    running: bool,
    begun: u64,
    /// Number of the last flush that failed, and of the last that ended at all.
    failed: u64,
    ended: u64,
    error: Option<DeviceError>,
}

/// Runs a command; if it was answered, `timing` gets to know how long that took.
fn timed<T>(
    command: impl FnOnce() -> Result<T, DeviceError>,
    timing: Option<&Timing>,
) -> Result<T, DeviceError> {
    let issued = Instant::now();
    let answer = command();
    if let (Some(timing), Ok(_)) = (timing, &answer) {
        timing.record(issued.elapsed());
    }
    answer
}

impl Door {
    pub fn new(device: Arc<dyn BlockDevice>, lease: Arc<Lease>) -> Self {
        let geometry = device.geometry();
        Door {
            lease,
            geometry,
            counters: Default::default(),
            data_written: AtomicU64::new(0),
            data_flushed: AtomicU64::new(0),
            changed: AtomicU64::new(0),
            covered: Mutex::new(Covered { changed: 0, resets: device.resets() }),
            known_resets: AtomicU64::new(device.resets()),
            noticed_resets: AtomicU64::new(0),
            flushing: Mutex::new(Flushing::default()),
            flushed: Condvar::new(),
            changing: AtomicU64::new(0),
            may_come_until: Mutex::new(None),
            small_read_time: Timing::default(),
            small_write_time: Timing::default(),
            compare_and_write_time: Timing::default(),
            device,
        }
    }

    /// How often the device may have forgotten what was not flushed.
    pub fn resets(&self) -> u64 {
        self.device.resets() + self.noticed_resets.load(Ordering::Acquire)
    }

    /// The disk shows an older state than this host wrote: the device forgot, whether it counted that or not.
    pub fn notice_reset(&self) {
        self.noticed_resets.fetch_add(1, Ordering::AcqRel);
    }

    /// How long the device took to answer compare-and-writes, whatever it answered.
    pub fn compare_and_write_time(&self) -> &Timing {
        &self.compare_and_write_time
    }

    /// How long it took to answer reads and writes of at most a block.
    pub fn small_times(&self) -> (&Timing, &Timing) {
        (&self.small_read_time, &self.small_write_time)
    }

    pub fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    /// Reservations of the device.
    pub fn fencing(&self) -> Option<&dyn Fencing> {
        self.device.fencing()
    }

    pub fn lease(&self) -> &Arc<Lease> {
        &self.lease
    }

    fn check(&self, op: &'static str, offset_bytes: u64, executed: Executed) -> Result<(), DeviceError> {
        if self.lease.allows() {
            return Ok(());
        }
        Err(DeviceError::LeaseEnded { op, offset_bytes, executed })
    }

    pub fn read(&self, class: IoClass, at: BlockNo, buf: &mut [u8]) -> Result<(), DeviceError> {
        let counters = &self.counters[class as usize];
        if class != IoClass::Farewell {
            self.check("read", at.offset_bytes(), Executed::No)?;
        }
        counters.reads.fetch_add(1, Ordering::Relaxed);
        counters.bytes_read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let small = buf.len() <= BLOCK_BYTES;
        timed(|| self.device.read(at.offset_bytes(), buf), small.then_some(&self.small_read_time))?;
        if class == IoClass::Farewell {
            return Ok(());
        }
        self.check("read", at.offset_bytes(), Executed::Maybe)
    }

    pub fn write(&self, class: IoClass, at: BlockNo, data: &[u8]) -> Result<(), DeviceError> {
        let counters = &self.counters[class as usize];
        let _changing = Changing::begin(&self.changing);
        self.check("write", at.offset_bytes(), Executed::No)?;
        counters.writes.fetch_add(1, Ordering::Relaxed);
        counters.bytes_written.fetch_add(data.len() as u64, Ordering::Relaxed);
        let written = self.until_known(class, "write", at, || {
            let change = || self.device.write(at.offset_bytes(), data);
            timed(change, (data.len() <= BLOCK_BYTES).then_some(&self.small_write_time))
        });
        if class == IoClass::Data {
            self.data_written.fetch_add(1, Ordering::AcqRel);
        }
        written?;
        self.check("write", at.offset_bytes(), Executed::Maybe)
    }

    /// A plain change whose answer never came may still execute, over what another host writes there once it has
    /// the lock. So its caller, who holds the lock, stays here until the device can't hold the command any longer,
    /// and the change is made again. A lease that ends meanwhile leaves the waiting to the others: their dead
    /// time contains the hold time.
    fn until_known(
        &self,
        class: IoClass,
        op: &'static str,
        at: BlockNo,
        mut change: impl FnMut() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        loop {
            let issued = Instant::now();
            self.look_for_reset()?;
            let resets = self.resets();
            let outcome = change();
            self.ended(class);
            match outcome {
                // Executed before the reset or after it: nobody knows. Once more, and it is known.
                Ok(()) if self.geometry.volatile_cache && self.resets() != resets => {
                    self.check(op, at.offset_bytes(), Executed::Maybe)?;
                }
                Err(e) if e.may_come_later() && is_planted(Bug::LateWriteNotAwaited) => return Ok(()),
                Err(DeviceError::Fenced { .. }) if is_planted(Bug::ConflictIgnored) => return Ok(()),
                Err(e) if e.may_come_later() => {
                    log::warn!("{e}; it is made again once it can't come any more");
                    let gone = issued + self.geometry.hold_time;
                    {
                        let mut until = self.may_come_until.lock();
                        *until = (*until).max(Some(gone));
                    }
                    while self.lease.allows() && Instant::now() < gone {
                        rt::sleep(HOLD_CHECK.min(gone.saturating_duration_since(Instant::now())));
                    }
                    self.check(op, at.offset_bytes(), Executed::Maybe)?;
                }
                known => return known.inspect_err(|e| self.notice(e)),
            }
        }
    }

    /// Who was shut out of the device is dead to the others.
    fn notice(&self, error: &DeviceError) {
        if matches!(error, DeviceError::Fenced { .. }) {
            self.lease.end(EndCause::ShutOut, "another host fenced this one at the device");
        }
    }

    /// After the end of the lease: will no plain change of this host execute any more?
    pub fn changes_are_over(&self) -> bool {
        !self.lease.allows()
            && self.changing.load(Ordering::SeqCst) == 0
            && self.may_come_until.lock().is_none_or(|until| Instant::now() >= until)
    }

    /// For `ats` only. `expected` and `new` are one logical block long, at the start of block `at`.
    pub(crate) fn compare_and_write(
        &self,
        class: IoClass,
        at: BlockNo,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        let counters = &self.counters[class as usize];
        if class == IoClass::Farewell {
            counters.swaps.fetch_add(1, Ordering::Relaxed);
            return self.device.compare_and_write(at.offset_bytes(), expected, new);
        }
        self.check("compare-and-write", at.offset_bytes(), Executed::No)?;
        counters.swaps.fetch_add(1, Ordering::Relaxed);
        self.look_for_reset()?;
        let resets = self.resets();
        let swap = || self.device.compare_and_write(at.offset_bytes(), expected, new);
        let outcome = timed(swap, Some(&self.compare_and_write_time)).inspect_err(|e| {
            self.notice(e);
            if class == IoClass::Beat {
                self.lease.beat_failed(&e.to_string());
            }
        })?;
        if self.geometry.volatile_cache && self.resets() != resets {
            // It may have been taken back; the content decides.
            let error = std::io::Error::other("the device was reset meanwhile");
            return Err(DeviceError::io("compare-and-write", at.offset_bytes(), Executed::Maybe, error));
        }
        self.check("compare-and-write", at.offset_bytes(), Executed::Maybe)?;
        Ok(outcome)
    }

    /// Whatever was answered before this call survives a power cut once it returns. Costs nothing on a
    /// device without a volatile cache. Callers at the same time share one flush that began after each asked.
    pub fn flush(&self, class: IoClass) -> Result<(), DeviceError> {
        if !self.geometry.volatile_cache {
            return self.check("flush", 0, Executed::No);
        }
        let mut state = self.flushing.lock();
        let mine = state.begun + 1;
        while state.ended < mine {
            if state.running {
                state = self.flushed.wait(state);
                continue;
            }
            state.running = true;
            state.begun += 1;
            let number = state.begun;
            drop(state);
            let data_written = self.data_written.load(Ordering::Acquire);
            let outcome = self.check("flush", 0, Executed::No).and_then(|()| {
                self.counters[class as usize].flushes.fetch_add(1, Ordering::Relaxed);
                let changed = self.changed.load(Ordering::Acquire);
                self.device.flush()?;
                self.look_for_reset()?;
                let mut covered = self.covered.lock();
                covered.changed = covered.changed.max(changed);
                drop(covered);
                self.check("flush", 0, Executed::Maybe)
            });
            state = self.flushing.lock();
            state.running = false;
            state.ended = number;
            match outcome {
                Ok(()) => {
                    self.data_flushed.fetch_max(data_written, Ordering::AcqRel);
                }
                Err(e) => {
                    state.failed = number;
                    state.error = Some(e);
                }
            }
            self.flushed.notify_all();
        }
        // A later flush that went well proves nothing about writes that a failed one was to cover.
        match &state.error {
            Some(e) if state.failed >= mine => Err(e.clone()),
            _ => Ok(()),
        }
    }

    /// A change ended that a power cut must not take back, unless it is a hint or a beat.
    fn ended(&self, class: IoClass) {
        if !matches!(class, IoClass::Beat | IoClass::Demand | IoClass::Wish) {
            self.changed.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// To be called before each change and after each flush: a reset takes back changes that no flush had covered.
    /// If there were any, this host can't say what the disk holds of what it did.
    fn look_for_reset(&self) -> Result<(), DeviceError> {
        let resets = self.resets();
        if !self.geometry.volatile_cache || resets == self.known_resets.load(Ordering::Acquire) {
            return Ok(());
        }
        if is_planted(Bug::ResetsNotCounted) {
            return Ok(());
        }
        let mut covered = self.covered.lock();
        if resets != covered.resets {
            covered.resets = resets;
            self.known_resets.store(resets, Ordering::Release);
            if self.changed.load(Ordering::Acquire) > covered.changed {
                let reason = "the device was reset and may have forgotten changes that no flush had covered";
                self.lease.withdraw(reason);
                return Err(DeviceError::io("flush", 0, Executed::Maybe, std::io::Error::other(reason)));
            }
        }
        Ok(())
    }

    /// Was file data written that no flush has covered yet? A commit that exposes it must not reach the
    /// medium before it.
    pub fn has_unflushed_data(&self) -> bool {
        self.geometry.volatile_cache
            && self.data_written.load(Ordering::Acquire) > self.data_flushed.load(Ordering::Acquire)
    }

    pub fn discard(&self, at: BlockNo, blocks: u64) -> Result<(), DeviceError> {
        let _changing = Changing::begin(&self.changing);
        self.check("discard", at.offset_bytes(), Executed::No)?;
        let len_bytes = blocks * BLOCK_BYTES_U64;
        self.until_known(IoClass::Data, "discard", at, || self.device.discard(at.offset_bytes(), len_bytes))
    }

    pub fn write_zeroes(&self, class: IoClass, at: BlockNo, blocks: u64) -> Result<(), DeviceError> {
        let _changing = Changing::begin(&self.changing);
        self.check("write zeroes", at.offset_bytes(), Executed::No)?;
        self.counters[class as usize].writes.fetch_add(1, Ordering::Relaxed);
        let len_bytes = blocks * BLOCK_BYTES_U64;
        self.until_known(class, "write zeroes", at, || {
            self.device.write_zeroes(at.offset_bytes(), len_bytes)
        })?;
        self.check("write zeroes", at.offset_bytes(), Executed::Maybe)
    }

    /// Commands of one class so far.
    pub fn counts(&self, class: IoClass) -> CommandCounts {
        let c = &self.counters[class as usize];
        CommandCounts {
            reads: c.reads.load(Ordering::Relaxed),
            writes: c.writes.load(Ordering::Relaxed),
            swaps: c.swaps.load(Ordering::Relaxed),
            flushes: c.flushes.load(Ordering::Relaxed),
            bytes_read: c.bytes_read.load(Ordering::Relaxed),
            bytes_written: c.bytes_written.load(Ordering::Relaxed),
        }
    }

    /// Commands that operations caused: everything but beats, doorbell polls and mounting.
    pub fn operation_counts(&self) -> CommandCounts {
        [IoClass::Lock, IoClass::Wish, IoClass::Journal, IoClass::Metadata, IoClass::Data]
            .into_iter()
            .map(|class| self.counts(class))
            .fold(CommandCounts::default(), |sum, c| sum.plus(&c))
    }

    /// Commands that time causes: beats and doorbell polls.
    pub fn idle_counts(&self) -> CommandCounts {
        self.counts(IoClass::Beat).plus(&self.counts(IoClass::Demand))
    }
}
