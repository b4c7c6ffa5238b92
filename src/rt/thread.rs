//! Threads, and which simulated host a thread belongs to.
//!
//! Invariant: every thread of LunFS is made here; a thread made by a simulated thread is simulated
//! and belongs to the same host. Dropping a [`JoinHandle`] lets its thread go on.
//!
//! Not for thread pools; rooms build what they need from these.

use std::fmt;

use super::sim::hooks;

/// Deep call chains live in `fs`, not in workers; many small stacks keep a host with hundreds of
/// waiting threads cheap.
const STACK_BYTES: usize = 512 * 1024;

/// Names a simulated host. Only tests and the simulated LUN give it a meaning.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostTag(pub u16);

impl fmt::Debug for HostTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {}", self.0)
    }
}

impl fmt::Display for HostTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {}", self.0)
    }
}

/// The host the calling thread belongs to; None outside a simulation and for its test harness.
pub fn current_host() -> Option<HostTag> {
    hooks::current_host()
}

/// Lets other threads run.
#[track_caller]
pub fn yield_now() {
    if !hooks::yield_now() {
        std::thread::yield_now();
    }
}

/// A thread that was started by [`spawn`].
pub struct JoinHandle<T>(Inner<T>);

enum Inner<T> {
    Os(std::thread::JoinHandle<T>),
    Sim(hooks::SimJoin<T>),
}

impl<T> JoinHandle<T> {
    /// Waits for the thread's end; Err carries the payload if it panicked.
    #[track_caller]
    pub fn join(self) -> std::thread::Result<T> {
        match self.0 {
            Inner::Os(handle) => handle.join(),
            Inner::Sim(handle) => handle.join(),
        }
    }

    /// Has the thread ended, so that `join` would not wait?
    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Inner::Os(handle) => handle.is_finished(),
            Inner::Sim(handle) => handle.is_finished(),
        }
    }
}

/// Calls `f`; a panic in it is an answer, for a service that must outlive one bad request. In a
/// simulation nothing is caught: there a panic fails the run, and cancelled threads unwind to their end.
pub fn catch_panic<T>(f: impl FnOnce() -> T) -> std::thread::Result<T> {
    if hooks::is_simulated() {
        return Ok(f());
    }
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(f))
}

/// Starts a thread. A system that refuses one (limits, memory) is met like the standard library
/// does: by a panic, because no caller can do its work without it.
#[track_caller]
pub fn spawn<T, F>(name: &str, f: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    match try_spawn(name, f) {
        Ok(handle) => handle,
        Err(error) => panic!("can't start thread {name}: {error}"),
    }
}

/// Like [`spawn`], for threads on whose punctuality the lease depends: they come before all that are not real-time,
/// where the system allows it. They do little.
#[track_caller]
pub fn spawn_urgent<T, F>(name: &str, f: F) -> JoinHandle<T>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    spawn(name, move || {
        hurry();
        f()
    })
}

/// Like [`spawn_urgent`], but a refusal by the system is an answer.
#[track_caller]
pub fn try_spawn_urgent<T, F>(name: &str, f: F) -> std::io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    try_spawn(name, move || {
        hurry();
        f()
    })
}

fn hurry() {
    if !hooks::is_simulated() {
        // Linux keeps a priority for each thread, and 0 is the one that asks (sched(7)).
        let _ = rustix::process::setpriority_process(None, -20);
    }
}

/// Like [`spawn`], but a refusal by the system is an answer.
#[track_caller]
pub fn try_spawn<T, F>(name: &str, f: F) -> std::io::Result<JoinHandle<T>>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    if hooks::is_simulated() {
        return Ok(JoinHandle(Inner::Sim(hooks::spawn(name, f)?)));
    }
    let builder = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    Ok(JoinHandle(Inner::Os(builder.spawn(f)?)))
}
