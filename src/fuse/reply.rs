//! What we answer the kernel, in our own words, and what a transport must do with it.

use std::sync::Arc;
use std::time::Duration;

use super::nodes::NodeTable;
use super::request::NodeId;
use crate::device::AlignedBuf;
use crate::fs::api::{Attributes, DirEntry, FileHandle, VolumeUsage};

/// How long the kernel may believe what it was told. Zero: not beyond the system call that asked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Validity {
    pub name: Duration,
    pub attributes: Duration,
}

/// An open file as the kernel is to treat it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenReply {
    pub handle: FileHandle,
    /// Reads and writes come to us, past the page cache; several at once.
    pub direct_io: bool,
    /// Cached pages are still good.
    pub keep_cache: bool,
}

/// An inode under a name, which the kernel now refers to (and forgets later).
#[derive(Clone, Copy, Debug)]
pub struct EntryReply {
    pub node: NodeId,
    pub attributes: Attributes,
    pub valid: Validity,
}

/// One line of a directory listing.
#[derive(Clone, Debug)]
pub struct ListingEntry {
    pub entry: DirEntry,
    /// Names and attributes may be cached this long. Only for listings with attributes.
    pub valid: Validity,
}

/// A directory listing; the transport sends as many entries as fit.
pub struct Listing {
    pub entries: Vec<ListingEntry>,
    pub plus: bool,
    pub nodes: Arc<NodeTable>,
}

impl Listing {
    /// The node of an entry that goes out with its attributes, with one more reference: to be called *before*
    /// the reply is sent, since the kernel may forget it the moment it has it. `None`: nothing is counted.
    pub fn refer(&self, entry: &DirEntry) -> Option<NodeId> {
        let counts = self.plus && !is_dot(&entry.name);
        counts.then(|| self.nodes.looked_up(entry.ino, generation(entry))).flatten()
    }

    /// The entry did not fit and does not go out.
    pub fn left_out(&self, node: NodeId) {
        self.nodes.forgotten(node, 1);
    }

    /// The number of the entry's inode in a listing without attributes.
    pub fn number(&self, entry: &DirEntry) -> u64 {
        let known = || self.nodes.of_inode(entry.ino).last().map(|node| node.number(entry.ino));
        match generation(entry) {
            // The directory above: the kernel knows it.
            0 => known().unwrap_or(entry.ino.0),
            generation => NodeId::of(entry.ino, generation).number(entry.ino),
        }
    }
}

fn generation(entry: &DirEntry) -> u32 {
    entry.attributes.map_or(entry.generation, |attributes| attributes.generation)
}

/// "." and "..", which the kernel never refers to by a listing.
pub fn is_dot(name: &[u8]) -> bool {
    name == b"." || name == b".."
}

pub enum Reply {
    /// An errno.
    Error(i32),
    Done,
    Entry(EntryReply),
    Attributes {
        node: NodeId,
        attributes: Attributes,
        valid_for: Duration,
    },
    /// The time of birth as well.
    AllAttributes {
        node: NodeId,
        attributes: Attributes,
        valid_for: Duration,
    },
    Target(Vec<u8>),
    Data(AlignedBuf),
    Opened(OpenReply),
    Created(EntryReply, OpenReply),
    Written(u32),
    Listing(Listing),
    Usage(VolumeUsage),
    Offset(u64),
}

/// Where a reply goes. One per request, used exactly once.
pub trait Responder: Send + 'static {
    /// Returns when the kernel has the reply (or refused it for good).
    fn send(self, reply: Reply);
}
