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
//! * Silencing is in [`silence`](super::silence); the guard is told first, so that it is done even if this
//!   process gets no further.

use std::cell::Cell;
use std::io;
use std::sync::{Arc, Once, OnceLock};

use super::guard::Guard;
use super::nodes::NodeTable;
use super::silence::Silencer;
use crate::fs::api::KernelCaches;
use crate::rt::Instant;
use crate::rt::planted::{Bug, is_planted};
use crate::types::InodeNo;

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
    kernel: Arc<Silencer>,
    nodes: Arc<NodeTable>,
    guard: Arc<Guard>,
    /// Set once INIT was answered.
    inc_epoch: OnceLock<bool>,
    silenced: Once,
}

impl Notifier {
    pub(crate) fn new(kernel: Arc<Silencer>, nodes: Arc<NodeTable>, guard: Arc<Guard>) -> Notifier {
        Notifier { kernel, nodes, guard, inc_epoch: OnceLock::new(), silenced: Once::new() }
    }

    pub(crate) fn set_inc_epoch(&self, usable: bool) {
        let _ = self.inc_epoch.set(usable);
    }

    /// Whatever lives of the inode the kernel knows.
    fn send_inval_all(&self, what: &str, ino: InodeNo, offset: i64) {
        for node in self.nodes.of_inode(ino) {
            self.report(what, ino, self.kernel.send_inval(node, offset));
            // After it: an answer given before may be dropped, and proves nothing.
            self.nodes.taken_in.forgotten(node);
        }
    }

    /// Does the kernel take `INC_EPOCH`? It has an effect (names are looked up anew), so only at the start.
    pub(crate) fn probe_inc_epoch(&self) -> bool {
        match self.kernel.send_inc_epoch() {
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

    fn silence_now(&self) {
        self.guard.tell_to_silence();
        let done = self.kernel.silence(self.nodes.all().into_iter());
        if done.by_force {
            log::error!("the mount has no working abort switch; it was taken off by force");
        }
        if done.refused > 0 {
            let error = io::Error::from_raw_os_error(done.errno);
            log::error!("{} nodes were not invalidated: {error}", done.refused);
        }
        log::warn!("the kernel was silenced: connection aborted, {} nodes invalidated", done.nodes);
    }

    /// Was the kernel silenced by us?
    pub(crate) fn has_silenced(&self) -> bool {
        self.silenced.is_completed()
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
        if is_planted(Bug::KernelInodesKept) {
            return;
        }
        let offset = if is_planted(Bug::KernelPagesKept) { -1 } else { 0 };
        self.send_inval_all("pages of", ino, offset);
    }

    fn forget_names(&self, directory: InodeNo) {
        assert_not_serving("forget_names");
        if self.inc_epoch.get().copied().unwrap_or(false) && !is_planted(Bug::KernelNamesKept) {
            self.report("names in", directory, self.kernel.send_inc_epoch());
        }
        self.send_inval_all("directory", directory, 0);
    }

    /// Who comes second waits for the first: what is said to others next may let them take over.
    fn silence(&self) {
        self.silenced.call_once(|| self.silence_now());
    }

    fn lease_until(&self, until: Instant) {
        self.guard.lease_until(until);
    }
}
