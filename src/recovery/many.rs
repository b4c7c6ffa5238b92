//! The same for many things, by several threads.
//!
//! Results come in no order. The first error ends it: what was begun ends, nothing else is begun, and when the call
//! returns no thread of it is left.
//!
//! The calling thread works along, so a system that gives no more threads makes it slower and no worse.
//!
//! Not for: work whose parts depend on each other.

use std::sync::Arc;

use super::RecoveryError;
use crate::rt::{self, Mutex};

/// As many commands are under way; arrays answer these at once, and hosts' queues are at least as deep.
const THREADS: usize = 8;
/// Below so many things threads gain nothing.
const ALONE: usize = 16;

struct Shared<T, R> {
    left: Vec<T>,
    done: Vec<R>,
    failed: Option<RecoveryError>,
}

/// `work` on each of `things`.
pub(super) fn at_once<T, R, W>(things: Vec<T>, work: W) -> Result<Vec<R>, RecoveryError>
where
    T: Send + 'static,
    R: Send + 'static,
    W: Fn(T) -> Result<R, RecoveryError> + Send + Sync + 'static,
{
    if things.len() < ALONE {
        return things.into_iter().map(work).collect();
    }
    let shared = Arc::new(Mutex::new(Shared { left: things, done: Vec::new(), failed: None }));
    let work = Arc::new(work);
    let mut threads = Vec::new();
    for _ in 1..THREADS {
        let (shared, work) = (shared.clone(), work.clone());
        match rt::try_spawn("replay", move || take_and_work(&shared, &*work)) {
            Ok(thread) => threads.push(thread),
            Err(e) => {
                log::debug!("replaying with {} threads: {e}", threads.len() + 1);
                break;
            }
        }
    }
    take_and_work(&shared, &*work);
    for thread in threads {
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }
    let mut state = shared.lock();
    match state.failed.take() {
        Some(e) => Err(e),
        None => Ok(std::mem::take(&mut state.done)),
    }
}

/// Until nothing is left, or something failed.
fn take_and_work<T, R>(shared: &Mutex<Shared<T, R>>, work: &dyn Fn(T) -> Result<R, RecoveryError>) {
    loop {
        let mut state = shared.lock();
        let next = if state.failed.is_none() { state.left.pop() } else { None };
        drop(state);
        let Some(thing) = next else { return };
        let result = work(thing);
        let mut state = shared.lock();
        match result {
            Ok(done) => state.done.push(done),
            Err(e) => {
                state.failed.get_or_insert(e);
            }
        }
    }
}
