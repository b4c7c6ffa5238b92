//! What a connection's thread sends, and when it may.
//!
//! * A request is not handed to libiscsi after its `send_until`. What libiscsi was given since its queue was empty is one
//!   *batch*; the earliest `send_until` of the batch is kept: if that passes before the queue is empty, or if this
//!   thread was stopped in between, the connection is closed by a reset, and what was not sent never is. A batch is
//!   added to for [`TOP_UP`] only, so that what was sent long ago does not stand for what was not.
//! * If this process is stopped while libiscsi sends, the kernel kills it after [`timing::SEND`] ([`super::deadman`]): data of
//!   plain changes never leaves later than that after the last look at the clock. Handing over and reading count as
//!   sending: from version 1.20.3 libiscsi sends from within the call that queues something, be it data that the
//!   target asked for in an answer just read.

use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::time::Duration;

use super::callbacks::{self, on_command};
use super::event_loop::Loop;
use super::pending::{Record, Request};
use super::{deadman::Deadman, ffi, socket, timing};
use crate::device::scsi::transport::TransportError;
use crate::rt::Instant;

/// For so long a batch is added to; then it has to be sent before there is another.
const TOP_UP: Duration = Duration::from_millis(100);

impl Loop<'_> {
    /// Hands over what waits, if libiscsi may have it, and sends what the socket takes. True: all that was handed over
    /// is sent. Never sends what is out of date.
    pub(super) fn send(&mut self) -> Result<bool, String> {
        let can_send = self.can_send();
        let hands_over = !self.waiting.is_empty() && self.takes_more(can_send);
        if !can_send && !hands_over {
            return Ok(false);
        }
        let changes = (can_send && self.holds_plain_changes())
            || (hands_over && self.waiting.iter().any(Request::is_plain_change));
        self.within_time(changes, |this| this.send_now(hands_over))?;
        Ok(self.look_at_batch())
    }

    /// Runs what may send something; if that may be a plain change, this process has [`timing::SEND`] for it.
    pub(super) fn within_time(
        &mut self,
        changes: bool,
        sends: impl FnOnce(&mut Self) -> Result<(), String>,
    ) -> Result<(), String> {
        if !changes || self.deadman.is_none() {
            return sends(self);
        }
        // Before the look at the clock: a stop at any moment after it ends this process or is noticed.
        let armed = self.deadman.as_mut().map(|deadman| deadman.arm(timing::SEND));
        armed.transpose().map_err(|e| format!("no timer: {e}"))?;
        let result = sends(self);
        match self.deadman.as_mut().map(Deadman::rest) {
            Some(Err(e)) => result.and(Err(format!("the timer does not stop: {e}"))),
            _ => result,
        }
    }

    fn send_now(&mut self, hands_over: bool) -> Result<(), String> {
        let now = Instant::now();
        self.tick(now)?;
        if self.batch_until.is_some_and(|until| now > until) && self.is_sending() {
            return Err("the target did not take what was to be sent in time".into());
        }
        // A single command without data is one packet anyway.
        let corked = !hands_over
            || self.waiting.len() > 1
            || self.waiting.iter().any(Request::sends_data)
            || self.is_sending();
        if corked {
            socket::cork(self.context, true);
        }
        let handed = if hands_over { self.hand_over(now) } else { Ok(()) };
        let sent = handed.and_then(|()| match self.can_send() {
            true => self.service_now(libc::POLLOUT),
            false => Ok(()),
        });
        if corked {
            socket::cork(self.context, false);
        }
        sent
    }

    fn can_send(&self) -> bool {
        self.events() & c_int::from(libc::POLLOUT) != 0
    }

    pub(super) fn is_sending(&self) -> bool {
        callbacks::is_sending(self.context)
    }

    /// Is all sent that libiscsi was given? Then the batch is over.
    pub(super) fn look_at_batch(&mut self) -> bool {
        let over = !self.is_sending();
        if over {
            self.inner.retired.borrow_mut().clear();
            (self.batch_until, self.batch_since) = (None, None);
        }
        over
    }

    /// May libiscsi have more? Not where the target's window is what keeps it from sending.
    fn takes_more(&mut self, can_send: bool) -> bool {
        let is_fresh = |since: Instant| since.elapsed() < TOP_UP;
        self.look_at_batch() || (can_send && self.batch_since.is_some_and(is_fresh))
    }

    /// Can data of a command that must not come late be sent now?
    pub(super) fn holds_plain_changes(&self) -> bool {
        !self.inner.retired.borrow().is_empty()
            || self.inner.records.borrow().values().any(|record| record.is_plain_change)
    }

    /// Hands waiting requests to libiscsi, those that may still be sent.
    fn hand_over(&mut self, now: Instant) -> Result<(), String> {
        self.batch_since.get_or_insert(now);
        let mut batch = std::mem::take(&mut self.waiting).into_iter();
        while let Some(mut request) = batch.next() {
            if request.limits.send_until < now {
                request.asker.answer(Err(TransportError::NotSent("its time was over".into())));
                continue;
            }
            let limits = request.limits;
            let record = match Record::new(request, now) {
                Ok(record) => record,
                Err(mut request) => {
                    request.asker.answer(Err(TransportError::NotSent("libiscsi has no memory".into())));
                    continue;
                }
            };
            if record.changes_data {
                self.batch_until =
                    Some(self.batch_until.map_or(limits.send_until, |b| b.min(limits.send_until)));
            }
            self.next_deadline =
                Some(self.next_deadline.map_or(limits.answer_until, |next| next.min(limits.answer_until)));
            let (id, task) = (self.next_id, record.task());
            self.next_id += 1;
            self.inner.records.borrow_mut().insert(id, record);
            // SAFETY: the task and what it points to live in the record until libiscsi has called back or the
            // context is gone; the private value is a number, not a pointer.
            let queued = unsafe {
                ffi::iscsi_scsi_command_async(
                    self.context,
                    self.lun,
                    task,
                    on_command,
                    null_mut(),
                    id as *mut c_void,
                )
            };
            if queued != 0 {
                // Every failure of this call comes before the command is queued: not a byte of it was sent.
                if let Some(mut record) = self.inner.records.borrow_mut().remove(&id) {
                    record.answer(Err(TransportError::NotSent(self.error())));
                }
                self.waiting.extend(batch);
                return Err(self.error());
            }
        }
        Ok(())
    }
}
