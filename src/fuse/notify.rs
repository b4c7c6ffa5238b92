//! Makes the kernel forget: our side of [`KernelCaches`].
//!
//! Notifications are written to a duplicate of the /dev/fuse descriptor by ourselves, because the
//! transport's library doesn't know all of them (`INC_EPOCH`).
//!
//! Rules, each of which prevents a deadlock or a stale read:
//!
//! * Never from a thread that serves the kernel or runs a waiting request: invalidating pages waits for
//!   requests that hold them, and one of those may be the caller's own. [`ServingMark`] catches it.
//! * Names are forgotten by `INC_EPOCH`, never by `INVAL_ENTRY` or `EXPIRE_ONLY`: those wait for every
//!   lookup or create pending in that directory, and such a request may wait for the very lock that is being
//!   given up. Without `INC_EPOCH` names are never cached (see `capabilities`).
//! * Silencing aborts first and invalidates then. An abort alone leaves open files and mappings showing
//!   cached pages; invalidating first lets the kernel fill its caches again.
//!
//! Place of the guard: a separate small process will hold a duplicate of this descriptor, the abort switch
//! and the node table in shared memory, and do what [`Notifier::silence`] does when the daemon can't.

use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use zerocopy::byteorder::little_endian::{I32, I64, U32, U64};
use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::fusectl::AbortSwitch;
use super::nodes::NodeTable;
use super::request::NodeId;
use crate::fs::api::KernelCaches;
use crate::types::InodeNo;

const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_INC_EPOCH: i32 = 8;

/// The header of every message to the kernel; `unique` is zero for notifications.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct OutHeader {
    len: U32,
    error: I32,
    unique: U64,
}

#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InvalInode {
    header: OutHeader,
    node: U64,
    offset: I64,
    len: I64,
}

fn header(message_bytes: usize, code: i32) -> OutHeader {
    OutHeader { len: U32::new(message_bytes as u32), error: I32::new(code), unique: U64::new(0) }
}

thread_local! {
    static SERVING: Cell<u32> = const { Cell::new(0) };
}

/// While it lives, this thread serves the kernel and may send no notification that can wait.
pub struct ServingMark(());

impl ServingMark {
    pub fn enter() -> ServingMark {
        SERVING.set(SERVING.get() + 1);
        ServingMark(())
    }
    pub fn is_set() -> bool {
        SERVING.get() > 0
    }
}

impl Drop for ServingMark {
    fn drop(&mut self) {
        SERVING.set(SERVING.get() - 1);
    }
}

/// Sends notifications for one mount.
pub struct Notifier {
    device: OwnedFd,
    nodes: Arc<NodeTable>,
    /// Set once INIT was answered.
    inc_epoch: OnceLock<bool>,
    abort: OnceLock<AbortSwitch>,
    silenced: AtomicBool,
    /// Called when the abort switch is missing or broken.
    last_resort: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Notifier {
    /// `device` is a duplicate of the mount's /dev/fuse descriptor.
    pub(crate) fn new(device: OwnedFd, nodes: Arc<NodeTable>) -> Notifier {
        Notifier {
            device,
            nodes,
            inc_epoch: OnceLock::new(),
            abort: OnceLock::new(),
            silenced: AtomicBool::new(false),
            last_resort: OnceLock::new(),
        }
    }

    pub(crate) fn set_inc_epoch(&self, usable: bool) {
        let _ = self.inc_epoch.set(usable);
    }

    pub(crate) fn set_abort_switch(&self, switch: AbortSwitch) {
        let _ = self.abort.set(switch);
    }

    pub(crate) fn set_last_resort(&self, end: Box<dyn Fn() + Send + Sync>) {
        let _ = self.last_resort.set(end);
    }

    pub fn is_silenced(&self) -> bool {
        self.silenced.load(Ordering::Acquire)
    }

    /// Whatever lives of the inode the kernel knows.
    fn send_inval_all(&self, what: &str, ino: InodeNo, offset: i64) {
        for node in self.nodes.of_inode(ino) {
            self.report(what, ino, self.send_inval(node, offset));
            // After it: an answer given before may be dropped, and proves nothing.
            self.nodes.taken_in.forgotten(node);
        }
    }

    /// One message. An inode or name that the kernel doesn't know is no error.
    fn send(&self, message: &[u8]) -> io::Result<()> {
        loop {
            match nix::unistd::write(&self.device, message) {
                Ok(_) | Err(nix::errno::Errno::ENOENT) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn send_inval(&self, node: NodeId, offset: i64) -> io::Result<()> {
        let message = InvalInode {
            header: header(size_of::<InvalInode>(), NOTIFY_INVAL_INODE),
            node: U64::new(node.0),
            offset: I64::new(offset),
            len: I64::new(0),
        };
        self.send(message.as_bytes())
    }

    fn send_inc_epoch(&self) -> io::Result<()> {
        self.send(header(size_of::<OutHeader>(), NOTIFY_INC_EPOCH).as_bytes())
    }

    /// Does the kernel take `INC_EPOCH`? It has an effect (names are looked up anew), so only at the start.
    pub(crate) fn probe_inc_epoch(&self) -> bool {
        match self.send_inc_epoch() {
            Ok(()) => true,
            Err(error) => {
                log::info!("the kernel refuses INC_EPOCH: {error}");
                false
            }
        }
    }

    /// The kernel's attributes of the inode, not its pages. Waits for nothing, so a serving thread may.
    pub fn forget_attributes(&self, ino: InodeNo) {
        self.send_inval_all("attributes of", ino, -1);
    }

    fn report(&self, what: &str, ino: InodeNo, outcome: io::Result<()>) {
        match outcome {
            Ok(()) => {}
            // The connection is gone: nothing of it can be asked of us any more.
            Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {}
            Err(error) => log::error!("the kernel did not forget {what} {ino:?}: {error}"),
        }
    }
}

fn assert_not_serving(what: &str) {
    if ServingMark::is_set() {
        log::error!("{what} called from a thread that serves the kernel; it may wait for itself");
        debug_assert!(false, "{what} from a serving thread");
    }
}

impl KernelCaches for Notifier {
    fn forget_inode(&self, ino: InodeNo) {
        assert_not_serving("forget_inode");
        self.send_inval_all("pages of", ino, 0);
    }

    fn forget_names(&self, directory: InodeNo) {
        assert_not_serving("forget_names");
        if self.inc_epoch.get().copied().unwrap_or(false) {
            self.report("names in", directory, self.send_inc_epoch());
        }
        self.send_inval_all("directory", directory, 0);
    }

    fn silence(&self) {
        if self.silenced.swap(true, Ordering::AcqRel) {
            return;
        }
        let aborted = match self.abort.get() {
            Some(switch) => switch.abort(),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        };
        if let Err(error) = aborted {
            log::error!("the abort switch of the mount failed ({error}); closing it by force");
            if let Some(end) = self.last_resort.get() {
                end();
            }
        }
        let nodes = self.nodes.all();
        let count = nodes.len();
        for node in nodes {
            if let Err(error) = self.send_inval(node, 0) {
                log::error!("node {} was not invalidated: {error}", node.0);
            }
        }
        log::warn!("the kernel was silenced: connection aborted, {count} nodes invalidated");
    }
}
