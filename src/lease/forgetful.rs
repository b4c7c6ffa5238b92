//! A device with a volatile cache forgets what no flush has covered when it loses power, and also says that it may have when
//! only a session broke. So the door keeps that content until a flush covers it, and writes it again after each reset, before
//! anything else is written, read or said to be durable. The host goes on; only a device that refuses its bytes ends it.
//!
//! * A flush proves what ended before it began, if the device was not reset since. Else all is written again, and the flush
//!   repeated.
//! * Compare-and-writes are not kept: whoever rests on one looks at the block again (`Ats::settle`). A block with unflushed
//!   bytes is not swapped, or writing it again would undo the swap.
//! * Beats and wishes go past the gate: they are hints or look after themselves, and a beat waits for nothing.
//!
//! On devices without a volatile cache nothing here costs anything.

use std::sync::atomic::Ordering;

use super::counts::IoClass;
use super::door::{Changing, Door, make_again_soon};
use super::unflushed::{Rewrite, Unflushed};
use crate::device::{DeviceError, Executed};
use crate::rt::MutexGuard;
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES_U64, BlockNo};

/// Content kept in memory for longer than this many bytes makes the next writer flush.
const MOST_BYTES: u64 = 64 << 20;

/// A device that is reset during each of so many commands in a row is broken: the last error stands.
pub(super) const MOST_RESETS: u32 = 20;

/// What changes pass on a device that may forget them.
pub(super) struct Gate {
    unflushed: Unflushed,
    /// The resets after which all that was unflushed has been written again.
    known_resets: u64,
    /// Changes on their way.
    in_flight: u64,
    /// Somebody writes again what may have been forgotten; everybody else waits.
    rewriting: bool,
}

impl Gate {
    pub fn new(resets: u64) -> Self {
        Gate { unflushed: Unflushed::default(), known_resets: resets, in_flight: 0, rewriting: false }
    }
}

/// Flushes are shared: who needs one waits for the next that begins after it asked.
#[derive(Default)]
pub(super) struct Flushing {
    running: bool,
    begun: u64,
    /// Number of the last flush that failed, and of the last that ended at all.
    failed: u64,
    ended: u64,
    error: Option<DeviceError>,
}

/// What a change makes of its blocks.
#[derive(Clone, Copy)]
pub(super) enum Change<'a> {
    Bytes(&'a [u8]),
    Zeroes(u64),
    Discard(u64),
}

/// A change on its way. As long as it exists nothing is written again.
pub(super) struct Entered<'a>(&'a Door);

impl Entered<'_> {
    /// The change ended well.
    pub fn ended(&self, at: BlockNo, change: Change<'_>) {
        let mut gate = self.0.gate.lock();
        match change {
            Change::Bytes(data) => gate.unflushed.wrote(at, data),
            Change::Zeroes(blocks) => gate.unflushed.zeroed(at, blocks),
            Change::Discard(blocks) => gate.unflushed.discarded(at, blocks),
        }
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut gate = self.0.gate.lock();
        gate.in_flight -= 1;
        if gate.in_flight == 0 {
            self.0.gate_free.notify_all();
        }
    }
}

impl Door {
    /// Does what a command of this class changes have to outlive a reset?
    fn is_kept(&self, class: IoClass) -> bool {
        use IoClass::*;
        self.geometry().volatile_cache && !matches!(class, Beat | Demand | Wish | Farewell)
    }

    /// To be held by each change from before its issue. `None`: the device forgets nothing that matters.
    pub(super) fn enter(&self, class: IoClass) -> Result<Option<Entered<'_>>, DeviceError> {
        if !self.is_kept(class) {
            return Ok(None);
        }
        // Under one guard: a change that began beside a rewriting could be overtaken by what it was to replace.
        self.remember()?.in_flight += 1;
        Ok(Some(Entered(self)))
    }

    /// To be asked before a read is issued: the resets up to which nothing is forgotten, for
    /// [`is_still_so`](Self::is_still_so) once it was answered. `None`: what it reads is not kept here.
    ///
    /// Asking afterwards alone is not enough: a read that is issued while older content is written again, and is
    /// answered after that, finds everything in order and has what was there before.
    pub(super) fn before_read(&self, class: IoClass) -> Result<Option<u64>, DeviceError> {
        if !self.is_kept(class) || is_planted(Bug::ResetsNotCounted) || is_planted(Bug::ReadBeforeRewrite) {
            return Ok(None);
        }
        Ok(Some(self.remember()?.known_resets))
    }

    /// Has the device forgotten nothing since? Otherwise what was read is to be read again.
    pub(super) fn is_still_so(&self, known_resets: u64) -> bool {
        self.resets() == known_resets && self.gate.lock().known_resets == known_resets
    }

    /// Before a swap of a block: what was written there is durable, or writing it again would undo the swap.
    pub(super) fn before_swap(&self, class: IoClass, at: BlockNo) -> Result<(), DeviceError> {
        if self.is_kept(class) && self.gate.lock().unflushed.holds(at) { self.flush(class) } else { Ok(()) }
    }

    /// After a change: memory for what is kept has an end.
    pub(super) fn keep_few(&self, class: IoClass) -> Result<(), DeviceError> {
        if self.is_kept(class) && self.gate.lock().unflushed.bytes() > MOST_BYTES {
            return self.flush(class);
        }
        Ok(())
    }

    /// The device knows all that was written to it: what it may have forgotten has been written again. Nobody writes
    /// anything again while the guard is held.
    fn remember(&self) -> Result<MutexGuard<'_, Gate>, DeviceError> {
        let mut gate = self.gate.lock();
        loop {
            while gate.rewriting {
                gate = self.gate_free.wait(gate);
            }
            let resets = self.resets();
            if resets == gate.known_resets || is_planted(Bug::ResetsNotCounted) {
                return Ok(gate);
            }
            gate.rewriting = true;
            while gate.in_flight > 0 {
                gate = self.gate_free.wait(gate);
            }
            let rewrites = gate.unflushed.rewrites();
            drop(gate);
            let done = self.write_again(&rewrites);
            gate = self.gate.lock();
            gate.rewriting = false;
            self.gate_free.notify_all();
            done?;
            // Another reset meanwhile shows in the next round.
            gate.known_resets = resets;
        }
    }

    fn write_again(&self, rewrites: &[Rewrite]) -> Result<(), DeviceError> {
        if rewrites.is_empty() {
            return Ok(());
        }
        let _changing = Changing::begin(&self.changing);
        let (mut commands, mut bytes) = (0, 0);
        for rewrite in rewrites {
            commands += 1;
            let done = match rewrite {
                Rewrite::Bytes(at, data) => {
                    bytes += data.len() as u64;
                    self.check("write", at.offset_bytes(), Executed::No)?;
                    self.counted_write(IoClass::Metadata, data.len());
                    self.insist("write", *at, || self.device.write(at.offset_bytes(), data))
                }
                Rewrite::Zeroes(at, blocks) => {
                    let len_bytes = blocks * BLOCK_BYTES_U64;
                    bytes += len_bytes;
                    self.check("write zeroes", at.offset_bytes(), Executed::No)?;
                    self.counted_write(IoClass::Metadata, 0);
                    self.insist("write zeroes", *at, || {
                        self.device.write_zeroes(at.offset_bytes(), len_bytes)
                    })
                }
            };
            if let Err(e) = done {
                if self.lease().allows() {
                    let reason = "the device was reset and does not take again what it may have forgotten";
                    self.lease().withdraw(&format!("{reason}: {e}"));
                }
                return Err(e);
            }
        }
        log::warn!(
            "the device was reset and may have forgotten what no flush had covered: {bytes} bytes were written again \
             by {commands} commands"
        );
        Ok(())
    }

    /// A change that is repeated until its outcome is known.
    fn insist(
        &self,
        op: &'static str,
        at: BlockNo,
        mut change: impl FnMut() -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut rounds = 0;
        loop {
            rounds += 1;
            let (issued, resets) = (crate::rt::Instant::now(), self.resets());
            match change() {
                Err(e) if e.may_come_later() => self.wait_until_gone(&e, issued),
                Err(e) if e.is_to_be_made_again() => {
                    rounds = 0;
                    make_again_soon(&e);
                }
                Err(e) if self.resets() == resets || e.is_fenced() || rounds > MOST_RESETS => {
                    self.notice(&e);
                    return Err(e);
                }
                // Of a reset, which the next round of rewriting answers anyway.
                Err(_) => {}
                Ok(()) => return self.check(op, at.offset_bytes(), Executed::Maybe),
            }
            self.check(op, at.offset_bytes(), Executed::Maybe)?;
        }
    }

    /// Whatever was answered before this call survives a power cut once it returns. Costs nothing on a
    /// device without a volatile cache. Callers at the same time share one flush that began after each asked.
    pub fn flush(&self, class: IoClass) -> Result<(), DeviceError> {
        if !self.geometry().volatile_cache {
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
            let outcome = self.flush_once(class);
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
                    // What it was to cover may be gone, and the next flush would not say so.
                    self.notice_reset();
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

    fn flush_once(&self, class: IoClass) -> Result<(), DeviceError> {
        let mut rounds = 0;
        loop {
            rounds += 1;
            let (mark, resets) = {
                let gate = self.remember()?;
                (gate.unflushed.mark(), gate.known_resets)
            };
            self.check("flush", 0, Executed::No)?;
            self.counters[class as usize].flushes.fetch_add(1, Ordering::Relaxed);
            let outcome = self.device.flush();
            let proves = self.resets() == resets || is_planted(Bug::ResetsNotCounted);
            match outcome {
                Ok(()) if proves => {
                    self.gate.lock().unflushed.flushed(mark);
                    return self.check("flush", 0, Executed::Maybe);
                }
                // Whenever it executes, it takes nothing back; the next one proves what this one didn't.
                Err(e) if e.may_come_later() => self.check("flush", 0, Executed::Maybe)?,
                Err(e) if proves || e.is_fenced() || rounds > MOST_RESETS => return Err(e),
                _ => self.check("flush", 0, Executed::Maybe)?,
            }
        }
    }
}
