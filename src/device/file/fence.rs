//! The emulated fence: what PREEMPT AND ABORT is to a LUN, for hosts that are processes of one machine.
//!
//! * **The list of the fenced** outlives who wrote it, so it is data and not a lock: an extended attribute of the
//!   agreed inode, one number for each registrant: the highest life that is fenced. A filesystem without
//!   extended attributes offers no fence.
//! * **The gate.** Who changes the device holds its registrant's byte shared from before it reads the list until
//!   the change has ended.
//! * **Who fences** writes the list first and then takes the byte exclusively: what was inside has ended by then,
//!   and what comes later reads the list.
//! * A process that was stopped *inside* the gate (SIGSTOP, a debugger) keeps the byte. It is killed: the kernel
//!   then ends its system calls and drops its locks. Nothing else ends it, and nothing else is as sure. The
//!   holder is known by the kernel's own word (`/proc/PID/fdinfo`), not by a number somebody wrote down.
//!
//! Costs a change some two microseconds, the first of several at once a lock more.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{XattrFlags, fgetxattr, fsetxattr};

use super::locks::{LockError, MARKS_AT, RangeLocks, reopen};
use super::sys::{self, LockKind};
use crate::device::{DeviceError, Executed, Fencing, FencingKey};
use crate::rt::{Instant, Mutex, sleep};

/// 8 bytes for each registrant, little-endian.
const LIST: &str = "user.lunfs.fenced";
const REGISTRANTS: usize = 256;
type List = [u8; REGISTRANTS * 8];

/// Held exclusively while the list is changed.
const LIST_BYTE: u64 = MARKS_AT + 4095;
/// One byte for each registrant.
const GATES_AT: u64 = MARKS_AT + 4096;

/// How long a change waits for somebody who fences this very registrant.
const ENTER_PATIENCE: Duration = Duration::from_secs(5);
/// Changes of a process that was killed have this long to end.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(1);

/// The fence of one open device.
pub(super) struct Fence {
    /// A description of its own: its locks are ours alone.
    inode: File,
    /// For who fences: each lock on a description of its own.
    locks: RangeLocks,
    /// Zero: not registered.
    key: AtomicU64,
    registered: Mutex<Registered>,
    /// Changes under way have this long to end before their process is killed.
    patience: Duration,
}

#[derive(Default)]
struct Registered {
    key: Option<FencingKey>,
    /// Changes inside the gate; the first takes the byte for all.
    inside: u32,
}

fn failed(op: &'static str, error: impl Into<std::io::Error>) -> DeviceError {
    DeviceError::io(op, 0, Executed::No, error.into())
}

fn gate(key: FencingKey) -> u64 {
    GATES_AT + u64::from(key.registrant())
}

impl Fence {
    /// `None` where the agreed inode takes no extended attributes.
    pub(super) fn new(inode: &File, patience: Duration) -> std::io::Result<Option<Fence>> {
        let own = reopen(inode, true)?;
        let fence = Fence {
            locks: RangeLocks::new(reopen(inode, true)?, true),
            inode: own,
            key: AtomicU64::new(0),
            registered: Mutex::default(),
            patience,
        };
        Ok(fence.list().is_ok().then_some(fence))
    }

    fn list(&self) -> rustix::io::Result<List> {
        let mut list: List = [0; REGISTRANTS * 8];
        match fgetxattr(&self.inode, LIST, &mut list) {
            // Shorter or longer is not ours: nobody is fenced by it.
            Ok(_) | Err(rustix::io::Errno::NODATA) => Ok(list),
            Err(e) => Err(e),
        }
    }

    fn fenced_life(list: &List, key: FencingKey) -> u64 {
        let at = usize::from(key.registrant()) % REGISTRANTS * 8;
        list.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// Changes one number of the list.
    fn set(&self, op: &'static str, key: FencingKey, to: impl FnOnce(u64) -> u64) -> Result<(), DeviceError> {
        let turn = self.locks.lock(LIST_BYTE, 1, ENTER_PATIENCE);
        let _turn = turn.map_err(|e| busy(op, e))?;
        let mut list = self.list().map_err(|e| failed(op, e))?;
        let life = to(Self::fenced_life(&list, key));
        let at = usize::from(key.registrant()) % REGISTRANTS * 8;
        if let Some(place) = list.get_mut(at..at + 8) {
            place.copy_from_slice(&life.to_le_bytes());
        }
        fsetxattr(&self.inode, LIST, &list, XattrFlags::empty()).map_err(|e| failed(op, e))
    }

    /// Lets a change in, and the fencer wait until it has ended.
    pub(super) fn enter(&self, op: &'static str, offset_bytes: u64) -> Result<Inside<'_>, DeviceError> {
        if self.key.load(Ordering::Acquire) == 0 {
            return Ok(Inside(None));
        }
        let refused = |e: std::io::Error| DeviceError::io(op, offset_bytes, Executed::No, e);
        let mut state = self.registered.lock();
        let Some(key) = state.key else { return Ok(Inside(None)) };
        if state.inside == 0 {
            let since = Instant::now();
            while !sys::try_lock(&self.inode, LockKind::Shared, gate(key), 1).map_err(refused)? {
                if since.elapsed() >= ENTER_PATIENCE {
                    return Err(refused(std::io::ErrorKind::TimedOut.into()));
                }
                sleep(POLL);
            }
        }
        state.inside += 1;
        drop(state);
        let inside = Inside(Some((self, key)));
        let list = self.list().map_err(|e| refused(e.into()))?;
        if Self::fenced_life(&list, key) >= key.life() {
            return Err(DeviceError::Fenced { op, offset_bytes });
        }
        Ok(inside)
    }

    /// Who holds a lock on this byte, as the kernel says.
    fn holders(&self, byte: u64) -> Vec<Pid> {
        let Ok(inode) = self.inode.metadata().map(|m| m.ino().to_string()) else { return Vec::new() };
        let (byte, own) = (byte.to_string(), std::process::id() as i32);
        let names_it = |info: &str| {
            let locks = info.lines().filter(|line| line.starts_with("lock:") && line.contains("OFDLCK"));
            locks.map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|words| {
                let [.., id, start, end] = words.as_slice() else { return false };
                id.rsplit(':').next() == Some(&inode) && *start == byte && *end == byte
            })
        };
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| *pid != own)
            .filter(|pid| {
                let infos = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
                infos.filter_map(|info| std::fs::read_to_string(info.path()).ok()).any(|info| names_it(&info))
            })
            .map(Pid::from_raw)
            .collect()
    }
}

fn busy(op: &'static str, error: LockError) -> DeviceError {
    match error {
        LockError::Io(error) => failed(op, error),
        LockError::Busy { .. } => failed(op, std::io::Error::from(std::io::ErrorKind::TimedOut)),
    }
}

/// A change inside the gate.
pub(super) struct Inside<'a>(Option<(&'a Fence, FencingKey)>);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let Some((fence, key)) = self.0 else { return };
        let mut state = fence.registered.lock();
        state.inside -= 1;
        if state.inside == 0
            && let Err(e) = sys::unlock(&fence.inode, gate(key), 1)
        {
            log::error!("leaving the gate of the fence: {e}");
        }
    }
}

impl Fencing for Fence {
    fn register(&self, key: FencingKey) -> Result<(), DeviceError> {
        const OP: &str = "register";
        // A volume made anew counts its lives from one; what was fenced on the old one is nobody any more.
        let list = self.list().map_err(|e| failed(OP, e))?;
        if Self::fenced_life(&list, key) >= key.life() {
            self.set(OP, key, |_| key.life() - 1)?;
        }
        let mut state = self.registered.lock();
        if state.inside > 0 {
            return Err(failed(OP, std::io::Error::from(std::io::ErrorKind::ResourceBusy)));
        }
        state.key = Some(key);
        self.key.store(key.value(), Ordering::Release);
        Ok(())
    }

    fn fence(&self, key: FencingKey) -> Result<(), DeviceError> {
        const OP: &str = "preempt and abort";
        self.set(OP, key, |fenced| fenced.max(key.life()))?;
        if self.locks.lock(gate(key), 1, self.patience).is_ok() {
            return Ok(());
        }
        for pid in self.holders(gate(key)) {
            log::warn!(
                "process {pid} was stopped in the middle of a write to a device it is shut out of; killing it"
            );
            if let Err(e) = kill(pid, Signal::SIGKILL) {
                log::error!("killing process {pid}: {e}");
            }
        }
        self.locks.lock(gate(key), 1, KILL_PATIENCE).map(drop).map_err(|e| busy(OP, e))
    }

    fn unregister(&self) -> Result<(), DeviceError> {
        let mut state = self.registered.lock();
        if state.inside == 0 {
            state.key = None;
            self.key.store(0, Ordering::Release);
        }
        Ok(())
    }
}
