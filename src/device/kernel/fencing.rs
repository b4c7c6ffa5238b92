//! Reservations of a disk of this kernel: the rules are `scsi::reservation`'s; the key is registered on each path.
//!
//! To the target the nexus is the machine's adapter, not a process of ours. So a registration outlives the process that
//! made it, and whoever registers on the same path takes it over. Two rules follow:
//!
//! * One process of a machine uses a disk with reservations, shown by a lock on its node that ends with the last thread
//!   of the process, also one that the kernel keeps in a command. So whoever gets it knows that nothing of the one
//!   before is on its way, and may replace its key.
//! * Who opens with reservations joins as a *visitor* first (see `iscsi::fencing`), and gives that back if it never
//!   becomes anybody.
//!
//! A path that is in doubt while keys change gets the new key when it is looked at again (`paths`).

use std::sync::Arc;
use std::time::Duration;

use super::door::Node;
use super::path::Path;
use super::paths::Paths;
use super::timing;
use crate::device::scsi::reservation::visitor_key;
use crate::device::scsi::transport::{Limits, Transport};
use crate::device::scsi::unit::{Problem, Unit};
use crate::device::{DeviceError, Fencing, FencingKey};
use crate::rt::{Instant, sleep};

/// udev holds the lock for a moment while it looks at a disk.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

pub struct KernelFencing {
    unit: Arc<Unit>,
    paths: Arc<Paths>,
    visitor: u64,
    /// Holds the lock.
    _node: Arc<dyn Node>,
}

impl KernelFencing {
    /// `None`: the target knows no reservations. `node` is the device as it was named.
    pub fn probe(
        unit: Arc<Unit>,
        paths: Arc<Paths>,
        node: Arc<dyn Node>,
    ) -> Result<Option<KernelFencing>, String> {
        let until = Instant::now() + LOCK_PATIENCE;
        while !node.try_lock().map_err(|e| format!("locking its node: {e}"))? {
            if Instant::now() >= until {
                return Err(
                    "another process of this machine uses it with reservations, and to the target both are \
                            the same"
                        .into(),
                );
            }
            sleep(Duration::from_millis(20));
        }
        let fencing = KernelFencing { unit, paths, visitor: visitor_key(), _node: node };
        match fencing.on_one(|unit, path, limits| unit.read_keys(path, limits).map(drop)) {
            Ok(()) => {}
            Err(Problem::Unsupported) => return Ok(None),
            Err(problem) => return Err(problem.to_string()),
        }
        let visitor = fencing.visitor;
        fencing
            .on_all(Some(visitor), |unit, path, limits| unit.join_path(path, visitor, limits))
            .map_err(|problem| problem.to_string())?;
        Ok(Some(fencing))
    }

    /// On one path, and on another if that one fails: for what may be asked twice.
    fn on_one(
        &self,
        mut ask: impl FnMut(&Unit, &dyn Transport, Limits) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let until = Instant::now() + timing::ADMIN * 2;
        loop {
            let Some(path) = self.paths.one(until) else {
                return Err(Problem::Unknown { why: self.paths.trouble(), later: false });
            };
            match ask(&self.unit, &path.timed(), Limits::within(timing::ADMIN)) {
                Err(Problem::Passing(_) | Problem::Unknown { .. }) if Instant::now() < until => {
                    sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    /// On each path that is in use, which then carries `key`; one that fails is left to whoever looks at it.
    fn on_all(
        &self,
        key: Option<u64>,
        ask: impl Fn(&Unit, &dyn Transport, Limits) -> Result<(), Problem>,
    ) -> Result<(), Problem> {
        let until = Instant::now() + timing::ADMIN * 2;
        let mut done: Vec<Arc<Path>> = Vec::new();
        loop {
            // No path comes into use with the old key while this is held.
            let mut registered = self.paths.registered();
            let up = self.paths.up();
            let left: Vec<_> = up.iter().filter(|path| !done.iter().any(|d| Arc::ptr_eq(d, path))).collect();
            if left.is_empty() && !up.is_empty() {
                registered.key = key;
                return Ok(());
            }
            for path in left {
                match ask(&self.unit, &path.timed(), Limits::within(timing::ADMIN)) {
                    Ok(()) => done.push(path.clone()),
                    Err(Problem::Passing(_) | Problem::Unknown { .. }) if Instant::now() < until => {}
                    Err(problem) => return Err(problem),
                }
            }
            drop(registered);
            if self.paths.up().is_empty() && self.paths.one(until).is_none() {
                return Err(Problem::Unknown { why: self.paths.trouble(), later: false });
            }
            sleep(Duration::from_millis(5));
        }
    }
}

fn error(op: &'static str) -> impl Fn(Problem) -> DeviceError {
    move |problem| problem.into_error(op, 0, 0, timing::ADMIN)
}

/// A visitor that never became anybody leaves no registration behind.
impl Drop for KernelFencing {
    fn drop(&mut self) {
        let mut registered = self.paths.registered();
        if registered.key.take() != Some(self.visitor) {
            return;
        }
        for path in self.paths.up() {
            let limits = Limits::within(Duration::from_secs(1));
            let _ = self.unit.unregister_path(&path.timed(), self.visitor, limits);
        }
    }
}

impl Fencing for KernelFencing {
    fn register(&self, key: FencingKey) -> Result<(), DeviceError> {
        let value = key.value();
        self.on_all(Some(value), |unit, path, limits| unit.register_path(path, value, limits))
            .map_err(error("register"))?;
        self.unit.adopt_key(Some(key));
        Ok(())
    }

    fn fence(&self, key: FencingKey) -> Result<(), DeviceError> {
        self.on_one(|unit, path, limits| unit.fence_key(path, key, limits))
            .map_err(error("preempt and abort"))
    }

    fn fence_all_others(&self) -> Result<usize, DeviceError> {
        let own = self.unit.key().map_or(self.visitor, FencingKey::value);
        let mut fenced = 0;
        self.on_one(|unit, path, limits| {
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
        self.on_all(None, |unit, path, limits| unit.unregister_path(path, key.value(), limits))
            .map_err(error("unregister"))
    }
}
