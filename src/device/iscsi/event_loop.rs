//! The thread that owns a connection: it alone calls libiscsi.
//!
//! It takes requests from a queue, hands them to libiscsi, and polls the socket and an eventfd. It never blocks on
//! anything else once logged in, so it keeps every deadline:
//!
//! * What is sent, and until when: [`super::sending`].
//! * A request is answered at its `answer_until` at the latest. If it changes data the connection ends with it, so
//!   that the target ends the command at the next login.

use std::ffi::{CStr, c_int};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::callbacks::Inner;
use super::connection::{Login, Shared, State};
use super::deadman::Deadman;
use super::ffi::{self, Context};
use super::pending::Request;
use super::timing;
use crate::device::scsi::transport::TransportError;
use crate::rt::Instant;

/// The thread's own.
pub(super) struct Loop<'a> {
    pub shared: &'a Shared,
    pub context: *mut Context,
    pub inner: &'a Inner,
    pub(super) lun: c_int,
    pub(super) next_id: u64,
    pub(super) waiting: Vec<Request>,
    /// The earliest `send_until` of the changes in the batch that libiscsi is sending.
    pub(super) batch_until: Option<Instant>,
    /// When the first of the batch was handed over; `None`: libiscsi's queue is empty.
    pub(super) batch_since: Option<Instant>,
    /// The earliest moment at which a deadline has to be looked at.
    pub(super) next_deadline: Option<Instant>,
    /// When this thread last looked at the time: it never sleeps for longer than `SLEEP`.
    alive_at: Instant,
    pub redirected: Option<String>,
    pub(super) deadman: Option<Deadman>,
}

/// The longest sleep of a connection's thread.
const SLEEP: Duration = Duration::from_millis(500);

impl Loop<'_> {
    /// The thread, from beginning to end.
    pub fn run(shared: &Arc<Shared>, login: &Login) {
        let inner = Inner::default();
        inner.install();
        let mut this = Loop {
            shared,
            context: null_mut(),
            inner: &inner,
            lun: c_int::from(login.lun),
            next_id: 1,
            waiting: Vec::new(),
            batch_until: None,
            batch_since: None,
            next_deadline: None,
            alive_at: Instant::now(),
            redirected: None,
            deadman: None,
        };
        let ended = this.log_in(login).and_then(|()| {
            this.deadman = Some(Deadman::new().map_err(|e| format!("no timer: {e}"))?);
            shared.set(State::Up);
            this.serve()
        });
        let why = match ended {
            Ok(()) => "closed".to_owned(),
            Err(why) => why,
        };
        let redirected = this.redirected.take();
        // Before anybody hears of the end: what was on its way is answered, what comes is refused.
        drop(this);
        shared.set(State::Down { why, redirected });
    }

    /// What libiscsi says of its last error.
    pub fn error(&self) -> String {
        // SAFETY: the context lives; the text is a NUL-terminated string inside it.
        let text = unsafe { CStr::from_ptr(ffi::iscsi_get_error(self.context)) };
        text.to_string_lossy().trim().to_owned()
    }

    fn serve(&mut self) -> Result<(), String> {
        loop {
            {
                let mut queue = self.shared.queue.lock();
                if queue.closed {
                    return Ok(());
                }
                self.waiting.append(&mut queue.requests);
            }
            // What could be sent was sent; more may go.
            if self.send()? && !self.waiting.is_empty() {
                continue;
            }
            self.look_at_deadlines()?;
            let waiting = self.waiting.iter().map(|request| request.limits.send_until).min();
            let until = waiting.into_iter().chain(self.next_deadline).min();
            // What can be sent is sent above, by itself.
            let revents = self.poll(until)? & !libc::POLLOUT;
            if revents != 0 {
                self.service(revents)?;
            }
        }
    }

    pub(super) fn events(&self) -> c_int {
        // SAFETY: the context lives and is this thread's.
        unsafe { ffi::iscsi_which_events(self.context) }
    }

    /// Was this thread stopped (SIGSTOP, a debugger, a virtual machine's pause)? Then what was under way and is out of
    /// date must not be sent, not even the rest of it: a host that is paused may be dead to the others by now.
    pub(super) fn tick(&mut self, now: Instant) -> Result<(), String> {
        let stopped = now.saturating_duration_since(self.alive_at) > SLEEP + timing::STALL;
        self.alive_at = now;
        if stopped && self.holds_changes_past(now) {
            return Err("this process was stopped, and what it was sending is out of date".into());
        }
        Ok(())
    }

    fn holds_changes_past(&self, now: Instant) -> bool {
        let records = self.inner.records.borrow();
        records.values().any(|record| record.changes_data && record.limits.send_until < now)
    }

    /// Lets libiscsi do what the socket is ready for: while logging in, and then to read.
    pub fn service(&mut self, revents: libc::c_short) -> Result<(), String> {
        // Older versions of libiscsi only note what the target asks for.
        let may_send = revents & libc::POLLOUT != 0 || cfg!(libiscsi_sends_at_once);
        self.within_time(may_send && self.holds_plain_changes(), |this| {
            this.tick(Instant::now())?;
            this.service_now(revents)
        })
    }

    pub(super) fn service_now(&mut self, revents: libc::c_short) -> Result<(), String> {
        // SAFETY: the context lives and is this thread's; callbacks find their loop by the thread.
        let result = unsafe { ffi::iscsi_service(self.context, c_int::from(revents)) };
        if self.inner.broken.get() {
            // What libiscsi says now may be of a command long ago.
            return Err("the connection broke".into());
        }
        if result < 0 {
            return Err(format!("the connection broke ({})", self.error()));
        }
        Ok(())
    }

    /// Sleeps until the socket, a request or a deadline; says what the socket is ready for.
    pub fn poll(&mut self, until: Option<Instant>) -> Result<libc::c_short, String> {
        let shared = self.shared;
        shared.asleep.store(true, Ordering::SeqCst);
        let nothing_new = {
            let queue = shared.queue.lock();
            queue.requests.is_empty() && !queue.closed
        };
        let longest = SLEEP;
        let span = match until {
            _ if !nothing_new => Duration::ZERO,
            Some(until) => until.saturating_duration_since(Instant::now()).min(longest),
            None => longest,
        };
        // Up to the next millisecond, or the last one would be spent spinning.
        let timeout =
            PollTimeout::try_from(span.as_micros().div_ceil(1000) as i32).unwrap_or(PollTimeout::ZERO);
        // SAFETY: the context lives and is this thread's.
        let fd = unsafe { ffi::iscsi_get_fd(self.context) };
        if fd < 0 {
            return Err("the connection is closed".into());
        }
        // SAFETY: libiscsi keeps the descriptor open; it is borrowed for this call only.
        let socket = unsafe { BorrowedFd::borrow_raw(fd) };
        let events = PollFlags::from_bits_truncate(self.events() as libc::c_short);
        let mut fds = [PollFd::new(socket, events), PollFd::new(shared.wake.as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, timeout);
        shared.asleep.store(false, Ordering::SeqCst);
        match polled {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => return Err(format!("poll: {e}")),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        if ready(&fds[1]).contains(PollFlags::POLLIN) {
            let _ = shared.wake.read();
        }
        debug_assert_eq!(fds[0].as_fd().as_raw_fd(), fd);
        Ok(ready(&fds[0]).bits())
    }

    /// Answers what is over; ends the connection where that is the only way to be sure.
    fn look_at_deadlines(&mut self) -> Result<(), String> {
        let now = Instant::now();
        self.waiting.retain_mut(|request| {
            let over = request.limits.send_until < now;
            if over {
                request.asker.answer(Err(TransportError::NotSent("its time was over".into())));
            }
            !over
        });
        if self.batch_until.is_some_and(|until| now > until) && !self.look_at_batch() {
            return Err("the target did not take what was to be sent in time".into());
        }
        if self.next_deadline.is_some_and(|next| now < next) {
            return Ok(());
        }
        let mut next: Option<Instant> = None;
        let mut silent = false;
        for record in self.inner.records.borrow_mut().values_mut() {
            // A target that doesn't answer this long, or a connection that leads nowhere: a new one will show.
            let patience = record.patience;
            let at = if record.is_awaited() { record.limits.answer_until } else { patience };
            if now < at {
                next = Some(next.map_or(at, |n| n.min(at)));
                continue;
            }
            if record.is_awaited() {
                record.detach();
                record.answer(Err(TransportError::TimedOut));
            }
            if now >= patience {
                silent = true;
            } else {
                next = Some(next.map_or(patience, |n| n.min(patience)));
            }
        }
        self.next_deadline = next;
        if silent { Err("the target did not answer".into()) } else { Ok(()) }
    }
}

impl Drop for Loop<'_> {
    fn drop(&mut self) {
        let left = {
            let mut queue = self.shared.queue.lock();
            queue.closed = true;
            std::mem::take(&mut queue.requests)
        };
        if !self.context.is_null() {
            // SAFETY: the context is this thread's and not used after this. It calls back for what is on its way.
            unsafe { ffi::iscsi_destroy_context(self.context) };
        }
        for (_, mut record) in self.inner.records.borrow_mut().drain() {
            record.answer(Err(TransportError::Broken("the connection ended".into())));
        }
        self.inner.retired.borrow_mut().clear();
        // Dropping them says that they were not sent.
        self.waiting.clear();
        drop(left);
        Inner::withdraw();
    }
}
