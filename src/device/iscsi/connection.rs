//! One connection to a target, from its making to its end, and the thread that owns it.
//!
//! A connection is made once, serves until something breaks, and is then over: everything that was on its way is
//! answered with [`TransportError::Broken`], later commands with [`TransportError::NotSent`]. It never reconnects;
//! what follows is a new one ([`super::session`]).
//!
//! The thread takes requests from a queue, hands them to libiscsi, and polls the socket and an eventfd. It never
//! blocks on anything else once logged in, so it keeps every deadline:
//!
//! * A request is not handed over after its `send_until`. libiscsi gets more only when it has sent what it has, so
//!   its own queue holds one batch, whose earliest `send_until` is kept: if that passes before the batch is sent,
//!   or if this thread was stopped in between, the connection is closed by a reset, and what was not sent never is.
//! * A request is answered at its `answer_until` at the latest. If it changes data the connection ends with it, so
//!   that the target ends the command at the next login.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::ptr::{null, null_mut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::ffi::{self, Context};
use super::pending::{Asker, Lent, Outcome, Record, Request, Waiter};
use super::timing;
use crate::device::scsi::cdb::Cdb;
use crate::device::scsi::transport::{Data, Limits, Transport, TransportError};
use crate::rt::{self, Condvar, Instant, Mutex};

/// What a session is.
#[derive(Clone)]
pub struct Login {
    pub portal: String,
    pub target: String,
    pub lun: u16,
    pub initiator: String,
    /// The part of the session's identifier that is ours: 24 and 16 bits.
    pub isid: (u32, u16),
    pub user: Option<String>,
    pub password: Option<String>,
}

/// How far a connection has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    LoggingIn,
    Up,
    Down { why: String, redirected: Option<String> },
}

struct Queue {
    requests: Vec<Request>,
    closed: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    /// The thread is in, or about to enter, its sleep: a new request has to wake it.
    asleep: AtomicBool,
    wake: EventFd,
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            // It can only fail if the counter is full, and then the thread wakes up anyway.
            let _ = self.wake.write(1);
        }
    }

    fn set(&self, state: State) {
        *self.state.lock() = state;
        self.changed.notify_all();
    }
}

/// A handle on a connection; the connection ends with it.
pub struct Connection(Arc<Shared>);

impl Connection {
    /// Starts to log in; [`Connection::wait_for_login`] says what came of it.
    pub fn start(login: Login) -> std::io::Result<Connection> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { requests: Vec::new(), closed: false }),
            asleep: AtomicBool::new(false),
            wake: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            state: Mutex::new(State::LoggingIn),
            changed: Condvar::new(),
        });
        let mine = shared.clone();
        rt::try_spawn("iscsi", move || Loop::run(&mine, &login))?;
        Ok(Connection(shared))
    }

    /// `Up`, or why not; `LoggingIn` if it takes longer than `until`.
    pub fn wait_for_login(&self, until: Instant) -> State {
        let mut state = self.0.state.lock();
        while *state == State::LoggingIn && Instant::now() < until {
            state = self.0.changed.wait_until(state, until).0;
        }
        state.clone()
    }

    /// Waits until it is down or `until`; `None`: it still serves.
    pub fn wait_for_end(&self, until: Instant) -> Option<String> {
        let mut state = self.0.state.lock();
        loop {
            match &*state {
                State::Down { why, .. } => return Some(why.clone()),
                _ if Instant::now() >= until => return None,
                _ => state = self.0.changed.wait_until(state, until).0,
            }
        }
    }

    pub fn is_up(&self) -> bool {
        *self.0.state.lock() == State::Up
    }

    /// Tells its thread to end; what is on its way is answered as broken.
    pub fn close(&self) {
        self.0.queue.lock().closed = true;
        self.0.wake();
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Transport for Connection {
    fn execute(&self, cdb: &Cdb, mut data: Data<'_>, limits: Limits) -> Outcome {
        let Some(lent) = Lent::from_data(&mut data) else {
            return Err(TransportError::NotSent("too many pieces of data".into()));
        };
        let waiter = Arc::new(Waiter::default());
        let request = Request { cdb: *cdb, lent, limits, asker: Asker::new(waiter.clone()) };
        {
            let mut queue = self.0.queue.lock();
            if queue.closed {
                return Err(TransportError::NotSent("the connection is closed".into()));
            }
            queue.requests.push(request);
        }
        self.0.wake();
        // From here to the answer the memory in `data` belongs to the connection's thread.
        waiter.wait()
    }
}

/// What libiscsi's callbacks reach: they have no other way to their loop than by thread.
#[derive(Default)]
struct Inner {
    records: RefCell<HashMap<u64, Record>>,
    /// Records whose data-out libiscsi may still have in its queue although they were answered.
    retired: RefCell<Vec<Record>>,
    connected: Cell<Option<c_int>>,
    logged_in: Cell<Option<c_int>>,
    broken: Cell<bool>,
}

thread_local! {
    static INNER: Cell<*const Inner> = const { Cell::new(null()) };
}

/// The loop of this thread, if it has one.
fn with_inner(f: impl FnOnce(&Inner)) {
    let inner = INNER.get();
    if !inner.is_null() {
        // SAFETY: set by `Loop::run` of this thread to a value that outlives every call into libiscsi, and only
        // ever borrowed shared.
        f(unsafe { &*inner });
    }
}

extern "C" fn on_connect(_: *mut Context, status: c_int, _: *mut c_void, _: *mut c_void) {
    with_inner(|inner| inner.connected.set(Some(status)));
}

extern "C" fn on_login(_: *mut Context, status: c_int, _: *mut c_void, _: *mut c_void) {
    with_inner(|inner| inner.logged_in.set(Some(status)));
}

extern "C" fn on_command(_: *mut Context, status: c_int, _: *mut c_void, private: *mut c_void) {
    with_inner(|inner| {
        let Some(mut record) = inner.records.borrow_mut().remove(&(private as u64)) else { return };
        let outcome = match u8::try_from(status) {
            Ok(status) => Ok(record.reply(status)),
            Err(_) if status == ffi::STATUS_CANCELLED => {
                inner.broken.set(true);
                Err(TransportError::Broken("the connection ended".into()))
            }
            Err(_) => Err(TransportError::Garbled("rejected".into())),
        };
        if record.sends_data() && status != ffi::STATUS_GOOD {
            // Refused before all of its data was sent, perhaps: libiscsi's queue may still name it. Here, inside
            // the library, only a copy is made; nobody reads a piece before the next call.
            record.detach();
            record.answer(outcome);
            inner.retired.borrow_mut().push(record);
        } else {
            record.answer(outcome);
        }
    });
}

/// The thread's own.
struct Loop<'a> {
    shared: &'a Shared,
    context: *mut Context,
    inner: &'a Inner,
    lun: c_int,
    next_id: u64,
    waiting: Vec<Request>,
    /// The earliest `send_until` of the changes in the batch that libiscsi is sending.
    batch_until: Option<Instant>,
    /// The earliest moment at which a deadline has to be looked at.
    next_deadline: Option<Instant>,
    /// When this thread last looked at the time: it never sleeps for longer than `SLEEP`.
    alive_at: Instant,
    redirected: Option<String>,
}

/// The longest sleep of a connection's thread.
const SLEEP: Duration = Duration::from_millis(500);

impl Loop<'_> {
    fn run(shared: &Arc<Shared>, login: &Login) {
        let inner = Inner::default();
        INNER.set(&raw const inner);
        let mut this = Loop {
            shared,
            context: null_mut(),
            inner: &inner,
            lun: c_int::from(login.lun),
            next_id: 1,
            waiting: Vec::new(),
            batch_until: None,
            next_deadline: None,
            alive_at: Instant::now(),
            redirected: None,
        };
        let ended = this.log_in(login).and_then(|()| this.serve());
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
    fn error(&self) -> String {
        // SAFETY: the context lives; the text is a NUL-terminated string inside it.
        let text = unsafe { CStr::from_ptr(ffi::iscsi_get_error(self.context)) };
        text.to_string_lossy().trim().to_owned()
    }

    fn log_in(&mut self, login: &Login) -> Result<(), String> {
        let c = |text: &str| CString::new(text).map_err(|_| "a name with a NUL byte".to_owned());
        let (initiator, target, portal) = (c(&login.initiator)?, c(&login.target)?, c(&login.portal)?);
        // SAFETY: each text is NUL-terminated and copied by the library; the context is this thread's alone.
        unsafe {
            self.context = ffi::iscsi_create_context(initiator.as_ptr());
            if self.context.is_null() {
                return Err("libiscsi has no memory".into());
            }
            ffi::iscsi_set_noautoreconnect(self.context, 1);
            ffi::iscsi_set_session_type(self.context, ffi::SESSION_NORMAL);
            ffi::iscsi_set_header_digest(self.context, ffi::HEADER_DIGEST_NONE_CRC32C);
            ffi::iscsi_set_isid_random(self.context, login.isid.0, login.isid.1.into());
            ffi::iscsi_set_tcp_user_timeout(self.context, timing::KERNEL.as_millis() as c_int);
            if ffi::iscsi_set_targetname(self.context, target.as_ptr()) != 0 {
                return Err(self.error());
            }
            if let (Some(user), Some(password)) = (&login.user, &login.password) {
                ffi::iscsi_set_initiator_username_pwd(self.context, c(user)?.as_ptr(), c(password)?.as_ptr());
            }
            // Looks the name up, and that may block; nobody waits for this thread longer than for a login.
            if ffi::iscsi_connect_async(self.context, portal.as_ptr(), on_connect, null_mut()) != 0 {
                return Err(self.error());
            }
        }
        let until = Instant::now() + timing::LOGIN;
        self.serve_until(until, "connecting", |inner| inner.connected.get())?;
        self.linger_never();
        // SAFETY: as above.
        if unsafe { ffi::iscsi_login_async(self.context, on_login, null_mut()) } != 0 {
            return Err(self.error());
        }
        self.serve_until(until, "logging in", |inner| inner.logged_in.get())?;
        self.shared.set(State::Up);
        Ok(())
    }

    /// Services the connection until a callback said something.
    fn serve_until(
        &mut self,
        until: Instant,
        what: &str,
        said: impl Fn(&Inner) -> Option<c_int>,
    ) -> Result<(), String> {
        loop {
            match said(self.inner) {
                Some(ffi::STATUS_GOOD) => return Ok(()),
                Some(ffi::STATUS_REDIRECT) => {
                    // SAFETY: a NUL-terminated string inside the context, which lives.
                    let address = unsafe { CStr::from_ptr(ffi::iscsi_get_target_address(self.context)) };
                    self.redirected = Some(address.to_string_lossy().into_owned());
                    return Err("the target is elsewhere".into());
                }
                Some(_) => return Err(format!("{what}: {}", self.error())),
                None => {}
            }
            if self.shared.queue.lock().closed {
                return Err("closed".into());
            }
            let now = Instant::now();
            if now >= until {
                return Err(format!("{what}: no answer within {} s", timing::LOGIN.as_secs()));
            }
            let revents = self.poll(Some(until))?;
            self.service(revents).map_err(|why| format!("{what}: {why}"))?;
        }
    }

    /// Closing resets the connection and drops what was not sent, also when this process is killed.
    fn linger_never(&self) {
        // SAFETY: the context lives; its descriptor is open as long as it is connected.
        let fd = unsafe { ffi::iscsi_get_fd(self.context) };
        if fd >= 0 {
            // SAFETY: libiscsi keeps the descriptor open; it is borrowed for this call only.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            let linger = libc::linger { l_onoff: 1, l_linger: 0 };
            if let Err(e) = nix::sys::socket::setsockopt(&fd, nix::sys::socket::sockopt::Linger, &linger) {
                log::warn!("iSCSI: SO_LINGER: {e}");
            }
        }
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
            self.tick()?;
            self.hand_over()?;
            if self.events() & c_int::from(libc::POLLOUT) != 0 {
                self.service(libc::POLLOUT)?;
                // What could be sent was sent; more may go.
                if !self.waiting.is_empty() && !self.is_sending() {
                    continue;
                }
            }
            self.look_at_deadlines()?;
            let waiting = self.waiting.iter().map(|request| request.limits.send_until).min();
            let until = waiting.into_iter().chain(self.next_deadline).min();
            let revents = self.poll(until)?;
            if revents != 0 {
                self.service(revents)?;
            }
        }
    }

    fn events(&self) -> c_int {
        // SAFETY: the context lives and is this thread's.
        unsafe { ffi::iscsi_which_events(self.context) }
    }

    /// Has libiscsi anything that is not sent yet?
    fn is_sending(&self) -> bool {
        // SAFETY: the context lives and is this thread's.
        let queued = unsafe { ffi::iscsi_out_queue_length(self.context) };
        queued > 0 || self.events() & c_int::from(libc::POLLOUT) != 0
    }

    /// Was this thread stopped (SIGSTOP, a debugger, a virtual machine's pause)? Then what was under way and is out of
    /// date must not be sent, not even the rest of it: a host that is paused may be dead to the others by now.
    fn tick(&mut self) -> Result<(), String> {
        let now = Instant::now();
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

    /// Hands waiting requests to libiscsi, if it has sent what it had.
    fn hand_over(&mut self) -> Result<(), String> {
        if self.waiting.is_empty() || self.is_sending() {
            return Ok(());
        }
        self.inner.retired.borrow_mut().clear();
        self.batch_until = None;
        let now = Instant::now();
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
                if let Some(mut record) = self.inner.records.borrow_mut().remove(&id) {
                    record.answer(Err(TransportError::NotSent(self.error())));
                }
                self.waiting.extend(batch);
                return Err(self.error());
            }
        }
        Ok(())
    }

    /// Lets libiscsi read and write. Never sends what is out of date.
    fn service(&mut self, revents: libc::c_short) -> Result<(), String> {
        self.tick()?;
        if revents & libc::POLLOUT != 0
            && self.batch_until.is_some_and(|until| Instant::now() > until)
            && self.is_sending()
        {
            return Err("the target did not take what was to be sent in time".into());
        }
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
    fn poll(&mut self, until: Option<Instant>) -> Result<libc::c_short, String> {
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
        if self.batch_until.is_some_and(|until| now > until) {
            if self.is_sending() {
                return Err("the target did not take what was to be sent in time".into());
            }
            self.batch_until = None;
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
        INNER.set(null());
    }
}
