//! One connection to a target, from its making to its end, as those see it who use it. The thread that owns it is in
//! [`super::event_loop`].
//!
//! A connection is made once, serves until something breaks, and is then over: everything that was on its way is
//! answered with [`TransportError::Broken`], later commands with [`TransportError::NotSent`]. It never reconnects;
//! what follows is a new one ([`super::session`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::event_loop::Loop;
use super::pending::{Asker, Lent, Outcome, Request, Waiter};
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

/// What waits for the thread.
pub(super) struct Queue {
    pub requests: Vec<Request>,
    pub closed: bool,
}

/// What the users of a connection and its thread have in common.
pub(super) struct Shared {
    pub queue: Mutex<Queue>,
    /// The thread is in, or about to enter, its sleep: a new request has to wake it.
    pub asleep: AtomicBool,
    pub wake: EventFd,
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

    pub fn set(&self, state: State) {
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
