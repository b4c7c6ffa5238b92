//! What `rt` asks the simulation; every answer says "not simulated" so far.

use std::time::Duration;

use super::super::thread::HostTag;

pub fn is_simulated() -> bool {
    false
}
pub fn boot_nanos() -> Option<u64> {
    None
}
pub fn wall_nanos() -> Option<u64> {
    None
}
pub fn random_u64() -> Option<u64> {
    None
}
pub fn sleep(_span: Duration) -> bool {
    false
}
pub fn yield_now() -> bool {
    false
}
pub fn current_host() -> Option<HostTag> {
    None
}
pub fn before_lock() {}
pub fn after_unlock() {}

pub struct SimJoin<T>(std::marker::PhantomData<T>);

impl<T> SimJoin<T> {
    pub fn join(self) -> std::thread::Result<T> {
        Err(Box::new("no simulation"))
    }
    pub fn is_finished(&self) -> bool {
        false
    }
}

pub fn spawn<T, F>(_name: &str, _f: F) -> SimJoin<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    SimJoin(std::marker::PhantomData)
}

/// Where simulated threads wait for a lock or a notification.
pub struct WaitPoint;

impl WaitPoint {
    pub const fn new() -> Self {
        WaitPoint
    }
    pub fn taken(&self) {}
    pub fn released(&self) {}
    pub fn wait_for_release(&self, _what: &'static str, _of: &'static str) {}
    pub fn wait_for_notify(
        &self,
        _span: Option<Duration>,
        _of: &'static str,
        release: impl FnOnce(),
    ) -> bool {
        release();
        false
    }
    pub fn notify(&self, _all: bool) {}
}
