//! What the scheduler knows of one thread.

use std::panic::Location;
use std::sync::Arc;

use super::core::Baton;
use crate::rt::HostTag;

/// Index of a thread in its simulation, in the order of spawning.
pub type Tid = u32;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Running,
    Ready,
    /// Could run, were its host not frozen.
    Frozen,
    Blocked,
    /// Its host was killed: it runs again only to be unwound at the end.
    Killed,
    Finished,
}

/// What a blocked thread waits for; for reports only.
#[derive(Clone, Copy)]
pub struct Wait {
    pub what: &'static str,
    pub of: &'static str,
    pub at: &'static Location<'static>,
    /// The thread that held it when the wait began.
    pub holder: Option<Tid>,
}

pub struct Thread {
    pub name: String,
    /// Whose clock the thread reads and whose threads it starts.
    pub host: Option<HostTag>,
    /// With whom it dies or freezes; differs from `host` only inside `on_host`.
    pub home: Option<HostTag>,
    pub status: Status,
    pub wait: Option<Wait>,
    /// Grows with each end of a wait, so that a timer of an earlier wait is void.
    pub wait_seq: u64,
    /// The queue the thread stands in while blocked.
    pub queue: Option<u64>,
    /// The queue of those who wait for this thread's end.
    pub join_queue: u64,
    pub baton: Arc<Baton>,
    /// Where the seed chose priorities, the greatest runs.
    pub priority: u64,
}
