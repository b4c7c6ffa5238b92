//! Mutex and condition variable that a simulation can see through.
//!
//! Both wrap the standard ones. A simulated thread only ever *tries* the inner mutex; if it is held,
//! the thread waits in the scheduler until its holder, which runs on the same scheduler, releases it.
//!
//! Invariants: a panic of a holder poisons nothing that a caller sees; what a panicking holder left
//! half done is the caller's business, as it is with any early return. Waiters are woken in no
//! particular order (in a simulation: at random), and waits may end without a notification.
//!
//! Not for a static that two simulations of one process share at the same time.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{self, PoisonError, TryLockError};
use std::time::Duration;

use super::clock::Instant;
use super::sim::hooks::{self, WaitPoint};

/// Mutual exclusion; may be held across device I/O and sleeps.
pub struct Mutex<T: ?Sized> {
    point: WaitPoint,
    inner: sync::Mutex<T>,
}

/// Access to what a [`Mutex`] protects, until dropped.
#[must_use = "the mutex is released when the guard is dropped"]
pub struct MutexGuard<'a, T: ?Sized> {
    mutex: &'a Mutex<T>,
    /// None only inside a condition variable's wait and while being dropped.
    inner: Option<sync::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Self {
        Mutex { point: WaitPoint::new(), inner: sync::Mutex::new(value) }
    }

    pub fn into_inner(self) -> T {
        self.inner.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> Mutex<T> {
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let inner = if hooks::is_simulated() {
            hooks::before_lock();
            self.lock_simulated()
        } else {
            self.inner.lock().unwrap_or_else(PoisonError::into_inner)
        };
        MutexGuard { mutex: self, inner: Some(inner) }
    }

    /// The guard, if nobody holds the mutex now.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        hooks::before_lock();
        let inner = self.try_inner()?;
        self.point.taken();
        Some(MutexGuard { mutex: self, inner: Some(inner) })
    }

    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    #[track_caller]
    fn lock_simulated(&self) -> sync::MutexGuard<'_, T> {
        loop {
            if let Some(inner) = self.try_inner() {
                self.point.taken();
                return inner;
            }
            self.point.wait_for_release("a mutex", std::any::type_name::<T>());
        }
    }

    fn try_inner(&self) -> Option<sync::MutexGuard<'_, T>> {
        match self.inner.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Mutex::new(T::default())
    }
}

impl<T> From<T> for Mutex<T> {
    fn from(value: T) -> Self {
        Mutex::new(value)
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.try_inner() {
            Some(value) => f.debug_tuple("Mutex").field(&&*value).finish(),
            None => f.write_str("Mutex(held)"),
        }
    }
}

impl<'a, T: ?Sized> MutexGuard<'a, T> {
    /// The mutex this guard holds.
    pub fn mutex(guard: &Self) -> &'a Mutex<T> {
        guard.mutex
    }
}

/// `inner` is only None where no caller can hold a reference to the guard.
const GUARD_IN_USE: &str = "a mutex guard is used during its own wait";

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.inner.as_ref().expect(GUARD_IN_USE)
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect(GUARD_IN_USE)
    }
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if let Some(inner) = self.inner.take() {
            drop(inner);
            self.mutex.point.released();
            hooks::after_unlock();
        }
    }
}

impl<T: ?Sized + fmt::Debug> fmt::Debug for MutexGuard<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&**self, f)
    }
}

/// Waiting for a change of what a [`Mutex`] protects.
pub struct Condvar {
    point: WaitPoint,
    inner: sync::Condvar,
}

impl Condvar {
    pub const fn new() -> Self {
        Condvar { point: WaitPoint::new(), inner: sync::Condvar::new() }
    }

    /// Releases the mutex, waits for a notification, takes the mutex again. May return without one.
    #[track_caller]
    pub fn wait<'a, T>(&self, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        if hooks::is_simulated() {
            return self.wait_simulated(guard, None).0;
        }
        guard.inner =
            guard.inner.take().map(|inner| self.inner.wait(inner).unwrap_or_else(PoisonError::into_inner));
        guard
    }

    /// Like [`Self::wait`], for at most `span`; true says that the time ran out.
    #[track_caller]
    pub fn wait_timeout<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        span: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        if hooks::is_simulated() {
            return self.wait_simulated(guard, Some(span));
        }
        let mut timed_out = false;
        guard.inner = guard.inner.take().map(|inner| {
            let (inner, outcome) =
                self.inner.wait_timeout(inner, span).unwrap_or_else(PoisonError::into_inner);
            timed_out = outcome.timed_out();
            inner
        });
        (guard, timed_out)
    }

    /// Like [`Self::wait`], until `deadline` at the latest; true says that it has passed.
    #[track_caller]
    pub fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        deadline: Instant,
    ) -> (MutexGuard<'a, T>, bool) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (guard, true);
        }
        let (guard, _) = self.wait_timeout(guard, left);
        // The standard library's clock stands still while the machine is suspended and ours does
        // not, so ours decides.
        (guard, Instant::now() >= deadline)
    }

    /// Waits while `condition` holds.
    #[track_caller]
    pub fn wait_while<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        mut condition: impl FnMut(&mut T) -> bool,
    ) -> MutexGuard<'a, T> {
        while condition(&mut guard) {
            guard = self.wait(guard);
        }
        guard
    }

    /// Wakes one waiter, whichever.
    pub fn notify_one(&self) {
        self.inner.notify_one();
        self.point.notify(false);
    }

    pub fn notify_all(&self) {
        self.inner.notify_all();
        self.point.notify(true);
    }

    #[track_caller]
    fn wait_simulated<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        span: Option<Duration>,
    ) -> (MutexGuard<'a, T>, bool) {
        let mutex = guard.mutex;
        let inner = guard.inner.take();
        // Nobody else runs between entering the queue and releasing the mutex: no lost notification.
        let timed_out = self.point.wait_for_notify(span, std::any::type_name::<T>(), || {
            drop(inner);
            mutex.point.released();
        });
        guard.inner = Some(mutex.lock_simulated());
        (guard, timed_out)
    }
}

impl Default for Condvar {
    fn default() -> Self {
        Condvar::new()
    }
}

impl fmt::Debug for Condvar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Condvar")
    }
}
