//! The door: the device behind the lease check, counted by what commands are for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::counts::{CLASSES, CommandCounts, Counters, IoClass};
use super::forgetful::{Change, Flushing, Gate, MOST_RESETS};
use super::{EndCause, Lease, Timing};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed, Fencing};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Condvar, Instant, Mutex};
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo};

/// Before a change whose path failed is made again.
const AGAIN_PAUSE: Duration = Duration::from_millis(50);
/// A wait for a command to be gone ends with the lease; it looks this often.
const HOLD_CHECK: Duration = Duration::from_millis(200);

/// The device behind the lease. See the module header of [`super`].
pub struct Door {
    pub(super) device: Arc<dyn BlockDevice>,
    lease: Arc<Lease>,
    geometry: DeviceGeometry,
    pub(super) counters: [Counters; CLASSES],
    /// Data writes that ended, and how many of them a flush has covered.
    pub(super) data_written: AtomicU64,
    pub(super) data_flushed: AtomicU64,
    /// What a device with a volatile cache may forget, and must not.
    pub(super) gate: Mutex<Gate>,
    pub(super) gate_free: Condvar,
    /// Signs of a reset that the device itself did not count.
    noticed_resets: AtomicU64,
    pub(super) flushing: Mutex<Flushing>,
    pub(super) flushed: Condvar,
    /// Plain changes on their way, and until when one that timed out may still come.
    pub(super) changing: AtomicU64,
    may_come_until: Mutex<Option<Instant>>,
    /// Answered commands of at most a block, from issue to answer.
    small_read_time: Timing,
    small_write_time: Timing,
    compare_and_write_time: Timing,
}

/// A plain change from before its lease check until its answer.
pub(super) struct Changing<'a>(&'a AtomicU64);

impl<'a> Changing<'a> {
    pub(super) fn begin(count: &'a AtomicU64) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Changing(count)
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
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

/// After a change that can't come any more ([`DeviceError::Interrupted`]).
pub(super) fn make_again_soon(error: &DeviceError) {
    log::warn!("{error}; it is made again");
    rt::sleep(AGAIN_PAUSE);
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
            gate: Mutex::new(Gate::new(device.resets())),
            gate_free: Condvar::new(),
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

    pub(super) fn check(
        &self,
        op: &'static str,
        offset_bytes: u64,
        executed: Executed,
    ) -> Result<(), DeviceError> {
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
        loop {
            let nothing_forgotten = self.before_read(class)?;
            timed(|| self.device.read(at.offset_bytes(), buf), small.then_some(&self.small_read_time))?;
            if class == IoClass::Farewell {
                return Ok(());
            }
            self.check("read", at.offset_bytes(), Executed::Maybe)?;
            if nothing_forgotten.is_none_or(|since| self.is_still_so(since)) {
                return Ok(());
            }
        }
    }

    pub fn write(&self, class: IoClass, at: BlockNo, data: &[u8]) -> Result<(), DeviceError> {
        let _changing = Changing::begin(&self.changing);
        self.check("write", at.offset_bytes(), Executed::No)?;
        self.counted_write(class, data.len());
        let written = self.until_known(class, "write", at, Change::Bytes(data), || {
            let change = || self.device.write(at.offset_bytes(), data);
            timed(change, (data.len() <= BLOCK_BYTES).then_some(&self.small_write_time))
        });
        if class == IoClass::Data {
            self.data_written.fetch_add(1, Ordering::AcqRel);
        }
        written?;
        self.keep_few(class)?;
        self.check("write", at.offset_bytes(), Executed::Maybe)
    }

    pub(super) fn counted_write(&self, class: IoClass, len_bytes: usize) {
        let counters = &self.counters[class as usize];
        counters.writes.fetch_add(1, Ordering::Relaxed);
        counters.bytes_written.fetch_add(len_bytes as u64, Ordering::Relaxed);
    }

    /// A plain change whose answer never came may still execute, over what another host writes there once it has
    /// the lock. So its caller, who holds the lock, stays here until the device can't hold the command any longer,
    /// and the change is made again. A lease that ends meanwhile leaves the waiting to the others: their dead
    /// time contains the hold time. Hints ([`IoClass::is_hint`]) are not waited for: the error is the caller's.
    fn until_known(
        &self,
        class: IoClass,
        op: &'static str,
        at: BlockNo,
        content: Change<'_>,
        mut change: impl FnMut() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut rounds = 0;
        loop {
            rounds += 1;
            let entered = self.enter(class)?;
            let (issued, resets) = (Instant::now(), self.resets());
            let outcome = change();
            if let (Some(entered), Ok(())) = (&entered, &outcome) {
                entered.ended(at, content);
            }
            drop(entered);
            match outcome {
                Err(e) if e.may_come_later() && is_planted(Bug::LateWriteNotAwaited) => return Ok(()),
                Err(DeviceError::Fenced { .. }) if is_planted(Bug::ConflictIgnored) => return Ok(()),
                // Whoever writes a hint looks at it again. To wait here would keep a host from hearing others for as long
                // as the device can hold a write, which may be longer than its lease.
                Err(e) if e.may_come_later() && class.is_hint() && !is_planted(Bug::HintAwaited) => {
                    self.may_come_until(issued + self.geometry.hold_time);
                    return Err(e);
                }
                // The same where writes have no way to the device just now, and reads may well have one.
                Err(e) if e.is_to_be_made_again() && class.is_hint() => return Err(e),
                Err(e) if e.may_come_later() => self.wait_until_gone(&e, issued),
                // The path failed in the middle, and another may serve: at once, while the lease is whole.
                Err(e) if e.is_to_be_made_again() => {
                    rounds = 0;
                    make_again_soon(&e);
                }
                Err(e) if e.is_fenced() || rounds > MOST_RESETS => {
                    self.notice(&e);
                    return Err(e);
                }
                // Executed before the reset or after it, or not at all: nobody knows. Once more, and it is known.
                Ok(()) | Err(_) if self.geometry.volatile_cache && self.resets() != resets => {}
                known => return known,
            }
            self.check(op, at.offset_bytes(), Executed::Maybe)?;
        }
    }

    /// Waits until a command issued then can't be executed any more, or the lease ends.
    pub(super) fn wait_until_gone(&self, error: &DeviceError, issued: Instant) {
        log::warn!("{error}; it is made again once it can't come any more");
        let gone = issued + self.geometry.hold_time;
        self.may_come_until(gone);
        while self.lease.allows() && Instant::now() < gone {
            rt::sleep(HOLD_CHECK.min(gone.saturating_duration_since(Instant::now())));
        }
    }

    /// A command that timed out may come until then.
    fn may_come_until(&self, gone: Instant) {
        let mut until = self.may_come_until.lock();
        *until = (*until).max(Some(gone));
    }

    /// Who was shut out of the device is dead to the others.
    pub(super) fn notice(&self, error: &DeviceError) {
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
        self.before_swap(class, at)?;
        counters.swaps.fetch_add(1, Ordering::Relaxed);
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
        let content = Change::Discard(blocks);
        self.until_known(IoClass::Data, "discard", at, content, || {
            self.device.discard(at.offset_bytes(), len_bytes)
        })
    }

    pub fn write_zeroes(&self, class: IoClass, at: BlockNo, blocks: u64) -> Result<(), DeviceError> {
        let _changing = Changing::begin(&self.changing);
        self.check("write zeroes", at.offset_bytes(), Executed::No)?;
        self.counted_write(class, 0);
        let len_bytes = blocks * BLOCK_BYTES_U64;
        self.until_known(class, "write zeroes", at, Change::Zeroes(blocks), || {
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
