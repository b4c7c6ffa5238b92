//! Byte-range locks on the one inode that all hosts of this machine agree on.
//!
//! All locks are open-file-description (OFD) locks: they belong to an open file description, not to
//! a process, and end when its last descriptor is closed, so a killed process leaves none behind. Closing ours
//! is not enough to give a lock up: another thread that just starts a program has a copy of every descriptor
//! until the program runs. So locks are given up by name.
//!
//! * **Block locks** make a compare-and-write atomic. Only the bytes of that one block are locked,
//!   so a process that is stopped inside a swap blocks that block and no other. They are polled with
//!   a deadline: a lock that is never got is an error, not a hang.
//! * **Marks** stand beyond every possible data byte (from [`MARKS_AT`]) and are held as long as a
//!   device is open: who is here, and through which cache. See [`Presence`].
//!
//! Threads of one process on the same description do *not* exclude each other. So each block lock is
//! taken through a description of its own, from a small pool that opens more on demand; the kernel
//! then arbitrates between threads, processes and several [`RangeLocks`] of one process alike, and no
//! mutex of ours has to be kept consistent with it. Descriptions are opened through
//! `/proc/self/fd`, which names the inode and not the path: a rename can't split the lock.
//!
//! Not for: fairness (waiters poll), or waiting without end (the lock room above does that).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use super::sys::{self, LockKind};
use crate::rt::{Instant, Mutex, sleep, yield_now};

/// First byte of the marks: beyond the end of the largest file that Linux can address usefully, and
/// still far from the largest offset a lock can name.
pub(super) const MARKS_AT: u64 = 1 << 62;
/// Everyone who has the device open; exclusively by who must be alone.
const MARK_PRESENCE: u64 = MARKS_AT;
/// Held shared by who goes past the page cache of the inode.
const MARK_DIRECT: u64 = MARKS_AT + 1;
/// Held shared by who goes through the page cache of the inode.
const MARK_PAGE_CACHE: u64 = MARKS_AT + 2;
// `MARKS_AT + 4095 ..` belongs to the emulated fence (`fence`).

/// Idle descriptions kept; more are opened while more swaps run at once, and closed afterwards.
const IDLE_MAX: usize = 16;
/// First tries give up only the processor: a swap holds its lock for tens of microseconds.
const YIELD_TRIES: u32 = 8;
const BACKOFF_FIRST: Duration = Duration::from_micros(50);
const BACKOFF_LONGEST: Duration = Duration::from_millis(1);

/// Which way I/O reaches the blocks of the inode. Mixing the two over one inode loses coherence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheMode {
    Direct,
    PageCache,
}

/// Why a lock could not be taken.
#[derive(Debug)]
pub(crate) enum LockError {
    /// Another description held it for all of the given time.
    Busy {
        waited: Duration,
    },
    Io(io::Error),
}

/// A pool of open file descriptions of one inode, and the block locks taken through them.
pub(crate) struct RangeLocks {
    /// Keeps the inode reachable; never carries a block lock itself.
    origin: File,
    writable: bool,
    idle: Mutex<Vec<File>>,
}

impl RangeLocks {
    /// `origin` is any open description of the agreed inode.
    pub(crate) fn new(origin: File, writable: bool) -> Self {
        RangeLocks { origin, writable, idle: Mutex::new(Vec::new()) }
    }

    /// Locks `start..start + len` exclusively; polls until `patience` is over.
    pub(crate) fn lock(&self, start: u64, len: u64, patience: Duration) -> Result<RangeGuard<'_>, LockError> {
        let began = Instant::now();
        let file = self.description().map_err(LockError::Io)?;
        let mut pause = BACKOFF_FIRST;
        let mut tries = 0u32;
        loop {
            match sys::try_lock(&file, LockKind::Exclusive, start, len) {
                Ok(true) => return Ok(RangeGuard { locks: self, file: Some(file), start, len }),
                Ok(false) => {}
                Err(err) => {
                    self.give_back(file);
                    return Err(LockError::Io(err));
                }
            }
            let waited = began.elapsed();
            if waited >= patience {
                self.give_back(file);
                return Err(LockError::Busy { waited });
            }
            tries += 1;
            if tries <= YIELD_TRIES {
                yield_now();
            } else {
                sleep(pause.min(patience - waited));
                pause = (pause * 2).min(BACKOFF_LONGEST);
            }
        }
    }

    /// An open file description that nobody else is using.
    fn description(&self) -> io::Result<File> {
        if let Some(file) = self.idle.lock().pop() {
            return Ok(file);
        }
        reopen(&self.origin, self.writable)
    }

    /// Takes back a description that holds no lock.
    fn give_back(&self, file: File) {
        let mut idle = self.idle.lock();
        if idle.len() < IDLE_MAX {
            idle.push(file);
        }
    }
}

/// A held block lock.
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    file: Option<File>,
    start: u64,
    len: u64,
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let Some(file) = self.file.take() else { return };
        match sys::unlock(&file, self.start, self.len) {
            Ok(()) => self.locks.give_back(file),
            // Closing the description releases the lock for certain.
            Err(_) => drop(file),
        }
    }
}

/// A new description of the same inode, whatever its path is called by now.
pub(super) fn reopen(file: &File, writable: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(writable).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Why somebody who is already there keeps us out.
#[derive(Debug)]
pub(crate) enum PresenceError {
    /// We want to be alone and are not, or somebody else is and wants to stay so.
    InUse,
    /// Others reach the inode through the other cache mode.
    OtherCacheMode,
    Io(io::Error),
}

/// The marks that say that this device is open; they end with the value, or with the process.
///
/// Both cache modes at once are refused: direct writes beside page cache writes to neighbouring
/// bytes make the kernel fail to invalidate pages, which leaves stale bytes behind and turns later
/// flushes into EIO (seen with two loop devices over one file). Each opener first sets the mark of
/// its own mode and then looks for the other's, so of two that race at least one sees the other.
pub(crate) struct Presence {
    marks: File,
}

impl Presence {
    pub(crate) fn announce(
        inode: &File,
        writable: bool,
        mode: CacheMode,
        alone: bool,
    ) -> Result<Self, PresenceError> {
        let presence = Presence { marks: reopen(inode, writable).map_err(PresenceError::Io)? };
        let marks = &presence.marks;
        let take = |kind, at| sys::try_lock(marks, kind, at, 1).map_err(PresenceError::Io);
        // A read-only description can't lock exclusively; who only reads need not be alone.
        let kind = if alone && writable { LockKind::Exclusive } else { LockKind::Shared };
        if !take(kind, MARK_PRESENCE)? {
            return Err(PresenceError::InUse);
        }
        let (own, other) = match mode {
            CacheMode::Direct => (MARK_DIRECT, MARK_PAGE_CACHE),
            CacheMode::PageCache => (MARK_PAGE_CACHE, MARK_DIRECT),
        };
        if !take(LockKind::Shared, own)? {
            return Err(PresenceError::InUse);
        }
        if sys::locked_elsewhere(marks, other, 1).map_err(PresenceError::Io)? {
            return Err(PresenceError::OtherCacheMode);
        }
        Ok(presence)
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        // Fails only where the kernel has no memory; then the last close gives them up.
        let _ = sys::unlock(&self.marks, MARK_PRESENCE, MARK_PAGE_CACHE + 1 - MARK_PRESENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locks_of(file: &tempfile::NamedTempFile) -> RangeLocks {
        RangeLocks::new(file.reopen().unwrap(), true)
    }

    #[test]
    fn one_block_excludes_threads_and_leaves_its_neighbour_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let locks = locks_of(&file);
        let held = locks.lock(512, 512, Duration::ZERO).unwrap();
        // Same RangeLocks, so the same process: a shared description would let this pass.
        assert!(matches!(locks.lock(512, 512, Duration::from_millis(5)), Err(LockError::Busy { .. })));
        // A 4096-byte view of the same bytes excludes too.
        assert!(matches!(locks.lock(0, 4096, Duration::ZERO), Err(LockError::Busy { .. })));
        drop(locks.lock(0, 512, Duration::ZERO).unwrap());
        drop(locks.lock(1024, 512, Duration::ZERO).unwrap());
        drop(held);
        drop(locks.lock(512, 512, Duration::ZERO).unwrap());
    }

    #[test]
    fn a_lock_survives_the_rename_of_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"x").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (one, two) = (RangeLocks::new(open(), true), RangeLocks::new(open(), true));
        std::fs::rename(&path, dir.path().join("b")).unwrap();
        std::fs::write(&path, b"another file").unwrap();
        let _held = one.lock(0, 512, Duration::ZERO).unwrap();
        assert!(matches!(two.lock(0, 512, Duration::ZERO), Err(LockError::Busy { .. })));
    }

    #[test]
    fn being_alone_and_cache_modes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let announce = |mode, alone| Presence::announce(file.as_file(), true, mode, alone);
        let first = announce(CacheMode::Direct, false).unwrap();
        let second = announce(CacheMode::Direct, false).unwrap();
        assert!(matches!(announce(CacheMode::PageCache, false), Err(PresenceError::OtherCacheMode)));
        assert!(matches!(announce(CacheMode::Direct, true), Err(PresenceError::InUse)));
        drop((first, second));
        let alone = announce(CacheMode::PageCache, true).unwrap();
        assert!(matches!(announce(CacheMode::PageCache, false), Err(PresenceError::InUse)));
        drop(alone);
        announce(CacheMode::Direct, false).unwrap();
    }

    #[test]
    fn who_is_gone_is_gone_although_a_program_just_started_has_its_descriptors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let announce = |alone| Presence::announce(file.as_file(), true, CacheMode::Direct, alone);
        for alone in [false, true] {
            let presence = announce(alone).unwrap();
            // What a child has between fork and exec: one more descriptor of the same description.
            let copy = presence.marks.try_clone().unwrap();
            drop(presence);
            drop(announce(true).unwrap());
            drop(copy);
        }
        // One that was refused leaves nothing either.
        let here = announce(false).unwrap();
        assert!(announce(true).is_err());
        drop(here);
        drop(announce(true).unwrap());
    }
}
