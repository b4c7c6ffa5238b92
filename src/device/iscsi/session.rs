//! A session that lasts: one connection after the other, each looked at before it is used.
//!
//! A thread keeps it. When a connection breaks it makes the next, and asks there, before anybody else may: which unit
//! is it, has it still its size, is this host still registered. Another unit behind the same name is never used.
//!
//! A login under the session's name ends the old session at the target with everything in it. So who sees the next
//! connection knows that what went out over the one before can't be executed any more; a change whose outcome is
//! unknown may be made again then ([`Path::generation`]).

use std::sync::Arc;
use std::time::Duration;

use super::connection::{Connection, Login, State};
use super::timing;
use crate::device::scsi::inquiry::Description;
use crate::device::scsi::transport::Limits;
use crate::device::scsi::unit::{Problem, Unit};
use crate::rt::{self, Condvar, Instant, JoinHandle, Mutex};

/// A connection that serves, and the how-manieth it is.
#[derive(Clone)]
pub struct Path {
    pub connection: Arc<Connection>,
    pub generation: u64,
}

#[derive(Default)]
struct Now {
    path: Option<Path>,
    generations: u64,
    /// Why there is no connection at the moment.
    trouble: Option<String>,
    stop: bool,
}

struct Shared {
    login: Login,
    unit: Arc<Unit>,
    now: Mutex<Now>,
    changed: Condvar,
    /// What the first connection of the device found.
    expected: Description,
}

/// One session of a device.
pub struct Session {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

/// Logs in and looks at the unit; what is found is to be compared by the caller.
fn connect(login: &Login, unit: &Unit) -> Result<(Connection, Description), String> {
    let mut login = login.clone();
    // A target may send a login elsewhere, and the new place again; not for ever.
    for _ in 0..4 {
        let until = Instant::now() + timing::LOGIN + timing::STALL;
        let connection = Connection::start(login.clone()).map_err(|e| e.to_string())?;
        match connection.wait_for_login(until) {
            State::Up => {
                let limits = Limits::within(timing::ADMIN);
                let looked = unit
                    .draw_attentions(&connection, limits)
                    .and_then(|_| unit.describe(&connection, limits))
                    .map_err(|problem| problem.to_string())?;
                return Ok((connection, looked));
            }
            State::Down { redirected: Some(portal), .. } => login.portal = portal,
            State::Down { why, .. } => return Err(why),
            State::LoggingIn => return Err("no answer to the login".into()),
        }
    }
    Err("the target sends logins in circles".into())
}

impl Session {
    /// Makes the first connection of the first session: what it finds is what the device is.
    pub fn first(login: Login, unit: Arc<Unit>) -> Result<(Session, Description), String> {
        let (connection, found) = connect(&login, &unit)?;
        Ok((Session::keep(login, unit, connection, found.clone())?, found))
    }

    /// Makes another session to the same unit.
    pub fn another(login: Login, unit: Arc<Unit>, expected: &Description) -> Result<Session, String> {
        let (connection, found) = connect(&login, &unit)?;
        match found.differs_from(expected) {
            Some(why) => Err(why),
            None => Session::keep(login, unit, connection, expected.clone()),
        }
    }

    fn keep(
        login: Login,
        unit: Arc<Unit>,
        connection: Connection,
        expected: Description,
    ) -> Result<Session, String> {
        let path = Path { connection: Arc::new(connection), generation: 1 };
        let now = Now { path: Some(path), generations: 1, ..Now::default() };
        let shared =
            Arc::new(Shared { login, unit, now: Mutex::new(now), changed: Condvar::new(), expected });
        let mine = shared.clone();
        let keeper = rt::try_spawn("iscsi-keeper", move || mine.keep()).map_err(|e| e.to_string())?;
        Ok(Session { shared, keeper: Some(keeper) })
    }

    /// The connection that serves, newer than `after`; waits for one until `until`.
    pub fn path(&self, after: u64, until: Instant) -> Option<Path> {
        let mut now = self.shared.now.lock();
        loop {
            if let Some(path) = now.path.as_ref().filter(|path| path.generation > after) {
                return Some(path.clone());
            }
            if now.stop || Instant::now() >= until {
                return None;
            }
            now = self.shared.changed.wait_until(now, until).0;
        }
    }

    /// Why there is none.
    pub fn trouble(&self) -> String {
        let now = self.shared.now.lock();
        format!("no connection to the target: {}", now.trouble.as_deref().unwrap_or("it just broke"))
    }
}

impl Shared {
    fn is_stopped(&self) -> bool {
        self.now.lock().stop
    }

    fn keep(&self) {
        let mut pause = timing::RETRY_FIRST;
        loop {
            let current = self.now.lock().path.clone();
            if let Some(path) = current {
                let Some(why) = path.connection.wait_for_end(Instant::now() + Duration::from_secs(1)) else {
                    if self.is_stopped() {
                        return;
                    }
                    continue;
                };
                let mut now = self.now.lock();
                now.path = None;
                if now.stop {
                    return;
                }
                now.trouble = Some(why.clone());
                drop(now);
                log::warn!("iSCSI: {}: {why}; logging in again", self.login.target);
                // What the target had in its cache may be gone; nobody can tell.
                self.unit.note_reset();
                pause = timing::RETRY_FIRST;
            }
            if self.is_stopped() {
                return;
            }
            match self.connect_again() {
                Ok(connection) => {
                    // Between the break and now the target may have been another one for a while.
                    self.unit.note_reset();
                    let mut now = self.now.lock();
                    now.generations += 1;
                    let generation = now.generations;
                    now.path = Some(Path { connection: Arc::new(connection), generation });
                    now.trouble = None;
                    drop(now);
                    self.changed.notify_all();
                    log::warn!("iSCSI: {}: logged in again", self.login.target);
                }
                Err(why) => {
                    let mut now = self.now.lock();
                    if now.trouble.as_ref() != Some(&why) {
                        log::warn!("iSCSI: {}: {why}", self.login.target);
                    }
                    now.trouble = Some(why);
                    if !now.stop {
                        let until = Instant::now() + pause;
                        drop(self.changed.wait_until(now, until));
                    }
                    pause = (pause * 2).min(timing::RETRY_LONGEST);
                }
            }
        }
    }

    fn connect_again(&self) -> Result<Connection, String> {
        let (connection, found) = connect(&self.login, &self.unit)?;
        if let Some(why) = found.differs_from(&self.expected) {
            return Err(why);
        }
        let limits = Limits::within(timing::ADMIN);
        match self.unit.confirm_registration(&connection, limits) {
            // Fenced: it may still read.
            Ok(()) | Err(Problem::Fenced) => Ok(connection),
            Err(problem) => Err(problem.to_string()),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut now = self.shared.now.lock();
        now.stop = true;
        let path = now.path.take();
        drop(now);
        self.shared.changed.notify_all();
        if let Some(path) = path {
            path.connection.close();
            path.connection.wait_for_end(Instant::now() + timing::STALL);
        }
        if let Some(keeper) = self.keeper.take().filter(JoinHandle::is_finished) {
            let _ = keeper.join();
        }
    }
}
