//! Threads for requests that have to wait for another host.
//!
//! The pool grows by a thread per waiting request up to a limit and shrinks when idle, because a waiting
//! request costs nothing but its thread. Beyond the limit requests queue, first come first served, except
//! writes: they go to the front, and a reserve of threads is theirs alone. A queue of readers blocked on a
//! lock must not stand before the write-back that another host's wish for that very lock has caused.
//!
//! Not for: requests that don't wait (they are answered where they were read) and not for ordering: requests
//! of one program arrive one at a time anyway.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

type Job = Box<dyn FnOnce() + Send>;

/// How large the pool may grow and when it shrinks.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// Threads for all kinds of requests.
    pub threads: usize,
    /// Threads beyond that, for writes only.
    pub write_reserve: usize,
    /// A thread without work this long ends.
    pub idle: Duration,
}

impl Default for PoolLimits {
    fn default() -> Self {
        PoolLimits { threads: 448, write_reserve: 64, idle: Duration::from_secs(5) }
    }
}

#[derive(Default)]
struct State {
    writes: VecDeque<Job>,
    others: VecDeque<Job>,
    /// Threads that exist, threads of them waiting for work, threads of them running something else
    /// than a write.
    threads: usize,
    idle: usize,
    busy_with_others: usize,
    most_threads: usize,
    stopping: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
    /// Signalled whenever a thread ends or a job is done.
    quiet: Condvar,
    limits: PoolLimits,
}

/// A handle to the pool; clones share it.
#[derive(Clone)]
pub struct WorkerPool {
    shared: Arc<Shared>,
}

impl WorkerPool {
    pub fn new(limits: PoolLimits) -> Self {
        WorkerPool {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                work: Condvar::new(),
                quiet: Condvar::new(),
                limits,
            }),
        }
    }

    /// Runs the job on a thread of the pool, soon or when one is free. After [`WorkerPool::stop`] it is
    /// dropped, which for a request means an error to its caller.
    pub fn submit(&self, is_write: bool, job: Job) {
        let shared = &self.shared;
        let mut state = shared.lock();
        if state.stopping {
            return;
        }
        if is_write {
            state.writes.push_back(job);
        } else {
            state.others.push_back(job);
        }
        let waiting = state.writes.len() + state.others.len();
        if state.idle >= waiting {
            shared.work.notify_one();
            return;
        }
        let most = shared.limits.threads + if is_write { shared.limits.write_reserve } else { 0 };
        if state.threads < most {
            state.threads += 1;
            state.most_threads = state.most_threads.max(state.threads);
            drop(state);
            self.start_thread();
        } else {
            // An idle thread may be one that was woken for somebody else; whoever frees up takes it.
            shared.work.notify_one();
        }
    }

    fn start_thread(&self) {
        let shared = self.shared.clone();
        if let Err(error) = crate::rt::try_spawn("lunfs-wait", move || shared.run()) {
            let mut state = self.shared.lock();
            state.threads -= 1;
            log::warn!("no thread for a waiting request: {error}; {} run", state.threads);
            if state.threads == 0 {
                // Nobody would ever take it. Dropping the job answers its request with an error.
                state.writes.clear();
                state.others.clear();
            }
        }
    }

    /// Takes no more jobs, drops queued ones and waits up to `patience` for running ones.
    pub fn stop(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        state.stopping = true;
        let dropped = (std::mem::take(&mut state.writes), std::mem::take(&mut state.others));
        self.shared.work.notify_all();
        while state.threads > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            let waited = self.shared.quiet.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let ended = state.threads == 0;
        drop(state);
        drop(dropped);
        ended
    }

    /// Threads now, and the most there were.
    pub fn threads(&self) -> (usize, usize) {
        let state = self.shared.lock();
        (state.threads, state.most_threads)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, state: &mut State) -> Option<(Job, bool)> {
        if let Some(job) = state.writes.pop_front() {
            return Some((job, true));
        }
        if state.busy_with_others < self.limits.threads {
            return state.others.pop_front().map(|job| (job, false));
        }
        None
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some((job, is_write)) = self.take(&mut state) {
                if !is_write {
                    state.busy_with_others += 1;
                }
                drop(state);
                // A panic in one request must not take the thread's place in the count with it.
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                    log::error!("a waiting request panicked");
                }
                state = self.lock();
                if !is_write {
                    state.busy_with_others -= 1;
                }
                continue;
            }
            if state.stopping {
                break;
            }
            state.idle += 1;
            let (woken, timeout) =
                self.work.wait_timeout(state, self.limits.idle).unwrap_or_else(PoisonError::into_inner);
            state = woken;
            state.idle -= 1;
            let nothing_for_us = state.writes.is_empty()
                && (state.others.is_empty() || state.busy_with_others >= self.limits.threads);
            if timeout.timed_out() && nothing_for_us {
                break;
            }
        }
        state.threads -= 1;
        drop(state);
        self.quiet.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const PATIENCE: Duration = Duration::from_secs(20);

    fn pool(threads: usize, write_reserve: usize) -> WorkerPool {
        WorkerPool::new(PoolLimits { threads, write_reserve, idle: Duration::from_millis(50) })
    }

    #[test]
    fn a_write_runs_while_every_ordinary_thread_is_blocked() {
        let pool = pool(3, 1);
        let (release, blocked) = mpsc::channel::<()>();
        let blocked = Arc::new(Mutex::new(blocked));
        for _ in 0..10 {
            let blocked = blocked.clone();
            pool.submit(
                false,
                Box::new(move || {
                    let _ = blocked.lock().map(|b| b.recv());
                }),
            );
        }
        let (done, wait) = mpsc::channel();
        pool.submit(true, Box::new(move || done.send(()).unwrap_or(())));
        wait.recv_timeout(PATIENCE).expect("the write must not queue behind the blocked");
        assert!(pool.threads().1 <= 4);
        drop(release);
        assert!(pool.stop(PATIENCE));
    }

    #[test]
    fn queued_jobs_run_in_order_and_idle_threads_end() {
        let pool = pool(1, 0);
        let (send, receive) = mpsc::channel();
        for i in 0..100 {
            let send = send.clone();
            pool.submit(false, Box::new(move || send.send(i).unwrap_or(())));
        }
        let got: Vec<i32> = (0..100).filter_map(|_| receive.recv_timeout(PATIENCE).ok()).collect();
        assert_eq!(got, (0..100).collect::<Vec<_>>());
        let start = Instant::now();
        while pool.threads().0 > 0 {
            assert!(start.elapsed() < PATIENCE, "an idle thread stays for ever");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(pool.threads().1, 1);
    }

    #[test]
    fn a_panicking_job_leaves_the_pool_usable() {
        let pool = pool(1, 0);
        pool.submit(false, Box::new(|| panic!("on purpose")));
        let (send, receive) = mpsc::channel();
        pool.submit(false, Box::new(move || send.send(()).unwrap_or(())));
        receive.recv_timeout(PATIENCE).expect("the next job runs");
        assert!(pool.stop(PATIENCE));
    }
}
