//! Messages to the kernel by the /dev/fuse descriptor, and the order in which a mount is silenced. Shared by the
//! daemon ([`notify`](super::notify)) and the guard ([`guard`](super::guard)), which do the same with descriptors
//! of their own.
//!
//! Silencing aborts first, forgets names then, inodes last:
//!
//! * An abort alone leaves open files and mappings showing cached pages, and names their attributes.
//! * Invalidating first lets the kernel fill its caches again.
//! * A lookup that was answered just before the abort is taken in after it; `INC_EPOCH` after the abort makes its
//!   name void. Its attributes were never valid (`taken_in`), and a page is locked until its READ has ended.
//!
//! Not for: deciding when.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use zerocopy::{Immutable, IntoBytes, KnownLayout};

use super::fusectl::AbortSwitch;
use super::mounting;
use super::native::abi::{InvalInode, OutHeader, notify};
use super::request::NodeId;
use crate::rt::planted::{Bug, is_planted};

/// An invalidation as it is written.
#[derive(IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct InvalMessage {
    header: OutHeader,
    body: InvalInode,
}

/// Of a message that nobody asked for.
fn header(message_bytes: usize, code: i32) -> OutHeader {
    OutHeader { len: (message_bytes as u32).into(), error: code.into(), unique: 0.into() }
}

/// Which mount, as the system sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub mountpoint: PathBuf,
    /// Major and minor.
    pub device: (u32, u32),
}

/// What silencing did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Silenced {
    pub(crate) nodes: u64,
    /// Nodes that the kernel refused to invalidate, and its last reason.
    pub(crate) refused: u64,
    pub(crate) errno: i32,
    /// The abort switch was missing or broken; the mount was taken off by force.
    pub(crate) by_force: bool,
}

/// Speaks to the kernel about one mount.
pub(crate) struct Silencer {
    device: OwnedFd,
    abort: Option<AbortSwitch>,
    place: Place,
}

impl Silencer {
    /// `device` is a duplicate of the mount's /dev/fuse descriptor.
    pub(crate) fn new(device: OwnedFd, abort: Option<AbortSwitch>, place: Place) -> Silencer {
        Silencer { device, abort, place }
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    pub(crate) fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    pub(crate) fn abort_switch(&self) -> Option<BorrowedFd<'_>> {
        self.abort.as_ref().map(AbortSwitch::descriptor)
    }

    fn write(&self, message: &[u8]) -> io::Result<()> {
        loop {
            match nix::unistd::write(&self.device, message) {
                Ok(_) => return Ok(()),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// One message. An inode that the kernel doesn't know is no error.
    fn send(&self, message: &[u8]) -> io::Result<()> {
        match self.write(message) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            sent => sent,
        }
    }

    fn inval_message(node: NodeId, offset: i64) -> InvalMessage {
        InvalMessage {
            header: header(size_of::<InvalMessage>(), notify::INVAL_INODE),
            body: InvalInode { node: node.0.into(), offset: offset.into(), len: 0.into() },
        }
    }

    /// Attributes of the node, and from `offset` on its pages; none if that is negative.
    pub(crate) fn send_inval(&self, node: NodeId, offset: i64) -> io::Result<()> {
        self.send(Self::inval_message(node, offset).as_bytes())
    }

    pub(crate) fn send_inc_epoch(&self) -> io::Result<()> {
        self.send(header(size_of::<OutHeader>(), notify::INC_EPOCH).as_bytes())
    }

    /// Is nothing left of the mount, so that nobody can see what the kernel cached? Its root stays in the kernel's
    /// memory as long as anybody has a file of it open.
    pub(crate) fn is_mount_gone(&self) -> bool {
        let asked = self.write(Self::inval_message(NodeId::ROOT, -1).as_bytes());
        asked.is_err_and(|error| error.raw_os_error() == Some(libc::ENOENT))
    }

    /// Ends the connection and makes the kernel forget these nodes. Needs no memory. May be done twice.
    pub(crate) fn silence(&self, nodes: impl Iterator<Item = NodeId>) -> Silenced {
        let mut done = Silenced::default();
        if self.abort.as_ref().is_none_or(|switch| switch.abort().is_err()) {
            done.by_force = true;
            mounting::unmount_by_force(&self.place.mountpoint, self.place.device);
        }
        if is_planted(Bug::GuardOnlyAborts) {
            return done;
        }
        // Kernels that don't know it have no names to forget.
        let _ = self.send_inc_epoch();
        for node in nodes {
            done.nodes += 1;
            if let Err(error) = self.send_inval(node, 0) {
                done.refused += 1;
                done.errno = error.raw_os_error().unwrap_or(libc::EIO);
            }
        }
        done
    }
}
