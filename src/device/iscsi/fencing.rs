//! Reservations of an iSCSI LUN: the rules are `scsi::reservation`'s, the sessions are ours. The key is registered on
//! each session that changes anything.
//!
//! A host gets its key from the slot that it claims, and claims it by a compare-and-write, which the reservation of those
//! that are there already refuses to strangers. So who opens the device with reservations joins as a *visitor* first:
//! registered under a key that names nobody, until it registers under its own, or leaves.

use std::sync::Arc;
use std::time::Duration;

use super::session::Session;
use super::timing;
use crate::device::scsi::reservation::visitor_key;
use crate::device::scsi::transport::{Limits, Transport};
use crate::device::scsi::unit::{Problem, Unit};
use crate::device::{DeviceError, Fencing, FencingKey};
use crate::rt::{Instant, sleep};

/// A path and how long it may take.
type On<'a> = (&'a dyn Transport, Limits);

pub struct IscsiFencing {
    unit: Arc<Unit>,
    sessions: Vec<Arc<Session>>,
    visitor: u64,
}

impl IscsiFencing {
    /// `None`: the target knows no reservations.
    pub fn probe(unit: Arc<Unit>, sessions: Vec<Arc<Session>>) -> Result<Option<IscsiFencing>, Problem> {
        let fencing = IscsiFencing { unit, sessions, visitor: visitor_key() };
        match fencing.on(0, read_keys) {
            Ok(()) => {
                let visitor = fencing.visitor;
                fencing.on_all(|unit, (path, limits)| unit.join_path(path, visitor, limits))?;
                Ok(Some(fencing))
            }
            Err(Problem::Unsupported) => Ok(None),
            Err(problem) => Err(problem),
        }
    }

    /// Asks on one session until there is an answer; what is asked can be asked twice.
    fn on(
        &self,
        index: usize,
        mut ask: impl FnMut(&Unit, On<'_>) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let session = &self.sessions[index % self.sessions.len()];
        let until = Instant::now() + timing::ADMIN * 2;
        let mut after = 0;
        loop {
            let Some(path) = session.path(after, until) else {
                return Err(Problem::Unknown { why: session.trouble(), later: false });
            };
            match ask(&self.unit, (&*path.connection, Limits::within(timing::ADMIN))) {
                Err(Problem::Passing(_) | Problem::Unknown { .. }) if Instant::now() < until => {
                    if !path.connection.is_up() {
                        after = path.generation;
                    }
                    sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    fn on_all(&self, ask: impl Fn(&Unit, On<'_>) -> Result<(), Problem>) -> Result<(), Problem> {
        (0..self.sessions.len()).try_for_each(|index| self.on(index, &ask))
    }
}

fn read_keys(unit: &Unit, (path, limits): On<'_>) -> Result<(), Problem> {
    unit.read_keys(path, limits).map(drop)
}

fn error(op: &'static str) -> impl Fn(Problem) -> DeviceError {
    move |problem| problem.into_error(op, 0, 0, timing::ADMIN)
}

/// A visitor that never became anybody leaves no registration behind.
impl Drop for IscsiFencing {
    fn drop(&mut self) {
        if self.unit.key().is_some() {
            return;
        }
        for session in &self.sessions {
            if let Some(path) = session.path(0, Instant::now()) {
                let limits = Limits::within(Duration::from_secs(1));
                let _ = self.unit.unregister_path(&*path.connection, self.visitor, limits);
            }
        }
    }
}

impl Fencing for IscsiFencing {
    fn register(&self, key: FencingKey) -> Result<(), DeviceError> {
        self.on_all(|unit, (path, limits)| unit.register_path(path, key.value(), limits))
            .map_err(error("register"))?;
        self.unit.adopt_key(Some(key));
        Ok(())
    }

    fn fence(&self, key: FencingKey) -> Result<(), DeviceError> {
        self.on(0, |unit, (path, limits)| unit.fence_key(path, key, limits))
            .map_err(error("preempt and abort"))
    }

    fn fence_all_others(&self) -> Result<usize, DeviceError> {
        let own = self.unit.key().map_or(self.visitor, FencingKey::value);
        let mut fenced = 0;
        self.on(0, |unit, (path, limits)| {
            fenced = unit.fence_others(path, own, limits)?;
            Ok(())
        })
        .map_err(error("preempt and abort"))?;
        Ok(fenced)
    }

    fn unregister(&self) -> Result<(), DeviceError> {
        let Some(key) = self.unit.key() else { return Ok(()) };
        // From now on nobody asks whether it is still registered.
        self.unit.adopt_key(None);
        self.on_all(|unit, (path, limits)| unit.unregister_path(path, key.value(), limits))
            .map_err(error("unregister"))
    }
}
