//! Background work of a mount: commits, orphans, and the recovery of hosts that died.

use std::sync::Arc;
use std::time::Duration;

use crate::fs::Fs;
use crate::heartbeat::Heartbeat;
use crate::lock::LockManager;
use crate::recovery::Recovery;
use crate::rt::{Condvar, Instant, JoinHandle, Mutex};
use crate::store::Store;

/// Uncommitted changes wait at most this long for their commit.
const COMMIT_AGE: Duration = Duration::from_secs(4);
/// Locks remembered in memory, about 400 bytes each.
const MOST_LOCKS: usize = 256 << 10;
const HOUSEKEEP_PERIOD: Duration = Duration::from_millis(500);
/// Other slots' orphan lists are looked through this often.
const SWEEP_PERIOD: Duration = Duration::from_secs(120);

/// Background work: one thread commits and checkpoints and waits for nobody; another frees orphans and may
/// wait for other hosts.
#[derive(Default)]
pub(super) struct Keeper {
    stop: Mutex<bool>,
    wake: Condvar,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Keeper {
    /// Sleeps for one period; false: stop.
    fn pause(&self) -> bool {
        let until = Instant::now() + HOUSEKEEP_PERIOD;
        let mut stop = self.stop.lock();
        while !*stop && Instant::now() < until {
            stop = self.wake.wait_until(stop, until).0;
        }
        !*stop
    }

    pub(super) fn keep_committing(&self, store: &Store, patience: Duration) {
        let mut failing_since = None;
        while self.pause() && store.door().lease().allows() {
            match store.housekeep(COMMIT_AGE) {
                Ok(()) => failing_since = None,
                Err(e) => {
                    log::error!("background commit: {e}");
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= patience {
                        // What can't be brought into place keeps its lock here, and others wait for that.
                        store.door().lease().withdraw(&format!("writing in place failed for good: {e}"));
                    }
                }
            }
        }
    }

    pub(super) fn keep_reaping(&self, fs: &Fs, locks: &Arc<LockManager>) {
        let mut next_sweep = Instant::now();
        while self.pause() && fs.store().door().lease().allows() {
            if Instant::now() >= next_sweep {
                next_sweep = Instant::now() + SWEEP_PERIOD;
                if let Err(e) = fs.sweep() {
                    log::warn!("looking for orphans: {e}");
                }
            }
            fs.reap();
            // Waits for the kernel, and so for nothing that a commit has to wait for.
            locks.trim(MOST_LOCKS);
        }
    }

    /// Whoever dies is recovered by one of those who live.
    pub(super) fn keep_recovering(&self, recovery: &Recovery, heartbeat: &Heartbeat) {
        while self.pause() && recovery.door().lease().allows() {
            recovery.recover_the_dead(heartbeat.peers());
        }
    }

    pub(super) fn stop(&self) {
        *self.stop.lock() = true;
        self.wake.notify_all();
        for thread in self.threads.lock().drain(..) {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }
}
