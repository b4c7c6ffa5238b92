//! What the kernel asks, in our own words.
//!
//! A request borrows names and data from the transport's buffer while it is served on the transport's
//! thread, which is the rule, and is made independent of it ([`Request::into_owned`]) when it has to wait.
//! Numbers are the kernel's: translating node ids to inodes is the handlers' business.

use std::borrow::Cow;

use crate::device::AlignedBuf;
use crate::fs::api::{FileHandle, SetAttributes, Whence};

/// The kernel's number of an inode. The root of the mount is always [`NodeId::ROOT`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct NodeId(pub u64);

impl NodeId {
    pub const ROOT: NodeId = NodeId(1);
}

/// Whose system call it is. All zero for the kernel's own requests (write-back, forget).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
}

pub type Name<'a> = Cow<'a, [u8]>;

/// Bytes to write: in the transport's buffer, or our own aligned copy.
#[derive(Debug)]
pub enum Payload<'a> {
    Borrowed(&'a [u8]),
    Owned(AlignedBuf),
}

impl std::ops::Deref for Payload<'_> {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Payload::Borrowed(data) => data,
            Payload::Owned(data) => data,
        }
    }
}

#[derive(Debug)]
pub struct Request<'a> {
    /// The kernel's number of it; zero where the kernel can't refer to it later.
    pub unique: u64,
    pub caller: Caller,
    pub call: Call<'a>,
}

/// The operations. Flags are those of the system call (`open`, `fallocate`, `renameat2`).
#[derive(Debug)]
pub enum Call<'a> {
    Lookup {
        parent: NodeId,
        name: Name<'a>,
    },
    GetAttributes {
        node: NodeId,
    },
    /// The time of birth as well.
    GetAllAttributes {
        node: NodeId,
    },
    SetAttributes {
        node: NodeId,
        set: SetAttributes,
    },
    ReadLink {
        node: NodeId,
    },
    MakeNode {
        parent: NodeId,
        name: Name<'a>,
        mode: u32,
        rdev: u32,
    },
    MakeDirectory {
        parent: NodeId,
        name: Name<'a>,
        mode: u32,
    },
    MakeSymlink {
        parent: NodeId,
        name: Name<'a>,
        target: Name<'a>,
    },
    Link {
        node: NodeId,
        new_parent: NodeId,
        new_name: Name<'a>,
    },
    Unlink {
        parent: NodeId,
        name: Name<'a>,
    },
    RemoveDirectory {
        parent: NodeId,
        name: Name<'a>,
    },
    Rename {
        parent: NodeId,
        name: Name<'a>,
        new_parent: NodeId,
        new_name: Name<'a>,
        flags: u32,
    },
    Open {
        node: NodeId,
        flags: i32,
    },
    Create {
        parent: NodeId,
        name: Name<'a>,
        mode: u32,
        flags: i32,
    },
    /// A regular file without a name.
    CreateUnnamed {
        parent: NodeId,
        mode: u32,
        flags: i32,
    },
    Read {
        node: NodeId,
        handle: FileHandle,
        offset: u64,
        len: u32,
    },
    Write {
        node: NodeId,
        /// Absent for the kernel's write-back, whose handle is only a guess.
        handle: Option<FileHandle>,
        offset: u64,
        data: Payload<'a>,
        append: bool,
        /// The writer may not keep set-user-id and set-group-id bits.
        drop_privileges: bool,
        /// The descriptor is O_DSYNC or O_SYNC: durable before the answer.
        durable: bool,
    },
    Flush {
        node: NodeId,
        handle: FileHandle,
    },
    Release {
        node: NodeId,
        handle: FileHandle,
    },
    Sync {
        node: NodeId,
        data_only: bool,
    },
    Allocate {
        node: NodeId,
        handle: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
    },
    Seek {
        node: NodeId,
        offset: u64,
        whence: Whence,
    },
    OpenDirectory {
        node: NodeId,
    },
    ReadDirectory {
        node: NodeId,
        cookie: u64,
        /// What the reader has room for.
        max_bytes: u32,
        plus: bool,
    },
    ReleaseDirectory {
        node: NodeId,
        handle: FileHandle,
    },
    Statistics,
    /// All of the volume that this host changed.
    SyncVolume,
}

impl Request<'_> {
    /// The same request without ties to the transport's buffer.
    pub fn into_owned(self) -> Request<'static> {
        Request { unique: self.unique, caller: self.caller, call: self.call.into_owned() }
    }

    /// Writes go first where requests queue: an invalidation on the way to giving up a lock waits for them.
    pub fn is_write(&self) -> bool {
        matches!(self.call, Call::Write { .. })
    }
}

impl Call<'_> {
    /// The thread that the kernel names sent it and waits for the answer. Reads and writes may be the kernel's
    /// own or belong to asynchronous I/O; nobody waits for a release.
    pub fn is_waited_for(&self) -> bool {
        !matches!(
            self,
            Call::Read { .. } | Call::Write { .. } | Call::Release { .. } | Call::ReleaseDirectory { .. }
        )
    }
}

fn own(name: Name<'_>) -> Name<'static> {
    Cow::Owned(name.into_owned())
}

impl Call<'_> {
    fn into_owned(self) -> Call<'static> {
        match self {
            Call::Lookup { parent, name } => Call::Lookup { parent, name: own(name) },
            Call::GetAttributes { node } => Call::GetAttributes { node },
            Call::GetAllAttributes { node } => Call::GetAllAttributes { node },
            Call::CreateUnnamed { parent, mode, flags } => Call::CreateUnnamed { parent, mode, flags },
            Call::SetAttributes { node, set } => Call::SetAttributes { node, set },
            Call::ReadLink { node } => Call::ReadLink { node },
            Call::MakeNode { parent, name, mode, rdev } => {
                Call::MakeNode { parent, name: own(name), mode, rdev }
            }
            Call::MakeDirectory { parent, name, mode } => {
                Call::MakeDirectory { parent, name: own(name), mode }
            }
            Call::MakeSymlink { parent, name, target } => {
                Call::MakeSymlink { parent, name: own(name), target: own(target) }
            }
            Call::Link { node, new_parent, new_name } => {
                Call::Link { node, new_parent, new_name: own(new_name) }
            }
            Call::Unlink { parent, name } => Call::Unlink { parent, name: own(name) },
            Call::RemoveDirectory { parent, name } => Call::RemoveDirectory { parent, name: own(name) },
            Call::Rename { parent, name, new_parent, new_name, flags } => {
                Call::Rename { parent, name: own(name), new_parent, new_name: own(new_name), flags }
            }
            Call::Open { node, flags } => Call::Open { node, flags },
            Call::Create { parent, name, mode, flags } => {
                Call::Create { parent, name: own(name), mode, flags }
            }
            Call::Read { node, handle, offset, len } => Call::Read { node, handle, offset, len },
            Call::Write { node, handle, offset, data, append, drop_privileges, durable } => Call::Write {
                node,
                handle,
                offset,
                data: match data {
                    Payload::Borrowed(data) => Payload::Owned(AlignedBuf::copy_of(data)),
                    Payload::Owned(data) => Payload::Owned(data),
                },
                append,
                drop_privileges,
                durable,
            },
            Call::Flush { node, handle } => Call::Flush { node, handle },
            Call::Release { node, handle } => Call::Release { node, handle },
            Call::Sync { node, data_only } => Call::Sync { node, data_only },
            Call::Allocate { node, handle, offset, len, mode } => {
                Call::Allocate { node, handle, offset, len, mode }
            }
            Call::Seek { node, offset, whence } => Call::Seek { node, offset, whence },
            Call::OpenDirectory { node } => Call::OpenDirectory { node },
            Call::ReadDirectory { node, cookie, max_bytes, plus } => {
                Call::ReadDirectory { node, cookie, max_bytes, plus }
            }
            Call::ReleaseDirectory { node, handle } => Call::ReleaseDirectory { node, handle },
            Call::Statistics => Call::Statistics,
            Call::SyncVolume => Call::SyncVolume,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_made_independent_keeps_its_bytes_in_aligned_memory() {
        let bytes = vec![7u8; 5000];
        let call = Call::Write {
            node: NodeId(5),
            handle: None,
            offset: 3,
            data: Payload::Borrowed(&bytes),
            append: true,
            drop_privileges: false,
            durable: false,
        };
        let request = Request { unique: 0, caller: Caller::default(), call }.into_owned();
        assert!(request.is_write());
        drop(bytes);
        let Call::Write { data, offset: 3, append: true, .. } = &request.call else {
            unreachable!("the kind of a request doesn't change")
        };
        assert_eq!(data.len(), 5000);
        assert!(data.iter().all(|b| *b == 7));
        assert!(AlignedBuf::is_aligned(data, 4096));
    }
}
