//! Reader/writer lock that a simulation can see through; see `sync` for how.
//!
//! Invariant: readers share, a writer is alone. Which of several waiters comes next is open; a
//! thread that holds a read guard must not ask for another one (a waiting writer may be between).
//!
//! Not for the locks on the disk: those have their own room.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{self, PoisonError, TryLockError};

use super::sim::hooks::{self, WaitPoint};

/// Shared or exclusive access.
pub struct RwLock<T: ?Sized> {
    point: WaitPoint,
    inner: sync::RwLock<T>,
}

/// Shared access, until dropped.
#[must_use = "the lock is released when the guard is dropped"]
pub struct RwLockReadGuard<'a, T: ?Sized> {
    point: &'a WaitPoint,
    /// None only while being dropped.
    inner: Option<sync::RwLockReadGuard<'a, T>>,
}

/// Exclusive access, until dropped.
#[must_use = "the lock is released when the guard is dropped"]
pub struct RwLockWriteGuard<'a, T: ?Sized> {
    point: &'a WaitPoint,
    /// None only while being dropped.
    inner: Option<sync::RwLockWriteGuard<'a, T>>,
}

const GUARD_IN_USE: &str = "a lock guard is used while it is dropped";

impl<T> RwLock<T> {
    pub const fn new(value: T) -> Self {
        RwLock { point: WaitPoint::new(), inner: sync::RwLock::new(value) }
    }

    pub fn into_inner(self) -> T {
        self.inner.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: ?Sized> RwLock<T> {
    #[track_caller]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        let inner = if hooks::is_simulated() {
            hooks::before_lock();
            loop {
                match self.inner.try_read() {
                    Ok(inner) => break inner,
                    Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                    Err(TryLockError::WouldBlock) => {
                        self.point.wait_for_release("a read lock", std::any::type_name::<T>());
                    }
                }
            }
        } else {
            self.inner.read().unwrap_or_else(PoisonError::into_inner)
        };
        RwLockReadGuard { point: &self.point, inner: Some(inner) }
    }

    #[track_caller]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        let inner = if hooks::is_simulated() {
            hooks::before_lock();
            loop {
                match self.inner.try_write() {
                    Ok(inner) => break inner,
                    Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                    Err(TryLockError::WouldBlock) => {
                        self.point.wait_for_release("a write lock", std::any::type_name::<T>());
                    }
                }
            }
        } else {
            self.inner.write().unwrap_or_else(PoisonError::into_inner)
        };
        self.point.taken();
        RwLockWriteGuard { point: &self.point, inner: Some(inner) }
    }

    pub fn try_read(&self) -> Option<RwLockReadGuard<'_, T>> {
        hooks::before_lock();
        let inner = match self.inner.try_read() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        Some(RwLockReadGuard { point: &self.point, inner: Some(inner) })
    }

    pub fn try_write(&self) -> Option<RwLockWriteGuard<'_, T>> {
        hooks::before_lock();
        let inner = match self.inner.try_write() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        self.point.taken();
        Some(RwLockWriteGuard { point: &self.point, inner: Some(inner) })
    }

    pub fn get_mut(&mut self) -> &mut T {
        self.inner.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Default> Default for RwLock<T> {
    fn default() -> Self {
        RwLock::new(T::default())
    }
}

impl<T: ?Sized> fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RwLock")
    }
}

impl<T: ?Sized> Deref for RwLockReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.inner.as_ref().expect(GUARD_IN_USE)
    }
}

impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.inner.as_ref().expect(GUARD_IN_USE)
    }
}

impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.inner.as_mut().expect(GUARD_IN_USE)
    }
}

impl<T: ?Sized> Drop for RwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        drop(self.inner.take());
        self.point.released();
        hooks::after_unlock();
    }
}

impl<T: ?Sized> Drop for RwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        drop(self.inner.take());
        self.point.released();
        hooks::after_unlock();
    }
}
