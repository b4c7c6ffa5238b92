//! What a check can find: a name, how bad it is, and what a repair does about it.
//!
//! The names are an interface: `docs/fsck.md` explains each, scripts read them from `--json`, and a test breaks
//! a volume deliberately for each of them. A finding never changes its name.

use std::fmt;

use serde::Serialize;

use crate::types::{BlockNo, InodeNo, Slot};

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is wrong; something is still to be done, or could not be judged.
    Note,
    /// Wrong, but everything that files and names say is still there.
    Error,
    /// Names, attributes or contents of something are damaged or gone.
    Loss,
}

/// Who lets a repair happen.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Repair {
    /// Loses nothing and has one possible outcome: `-p` and `-y`.
    Safe,
    /// Gives something up, or guesses: `-y` only.
    Lossy,
}

/// Repairs of an earlier phase come first, and the volume is checked again before the next: what allocates
/// must find the maps true, and nothing is called lost while something that may own it is not whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Phase {
    /// Superblocks, slots, journals, locks, headers, maps.
    Structure,
    /// Blocks and inodes that are used and marked free.
    Marks,
    /// Inodes, trees, names.
    Files,
    /// What is marked used and belongs to nobody; the sums.
    Leftovers,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $kind:ident, $name:literal, $severity:ident, $repair:ident, $phase:ident;)*) => {
        /// The name of a finding.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub enum Kind { $($(#[$doc])* $kind,)* }

        impl Kind {
            pub const ALL: &[Kind] = &[$(Kind::$kind,)*];

            pub const fn name(self) -> &'static str {
                match self { $(Kind::$kind => $name,)* }
            }
            pub const fn severity(self) -> Severity {
                match self { $(Kind::$kind => Severity::$severity,)* }
            }
            pub const fn repair(self) -> Repair {
                match self { $(Kind::$kind => Repair::$repair,)* }
            }
            pub const fn phase(self) -> Phase {
                match self { $(Kind::$kind => Phase::$phase,)* }
            }
        }
    };
}

kinds! {
    /// The superblock in block 0 is damaged, older than a copy, or not what most copies say.
    Superblock, "superblock", Error, Safe, Structure;
    /// A copy of the superblock is damaged or differs.
    SuperblockCopy, "superblock-copy", Error, Safe, Structure;
    /// A heartbeat slot can't be read, or contradicts itself.
    Slot, "slot", Error, Safe, Structure;
    /// A doorbell can't be read.
    Doorbell, "doorbell", Error, Safe, Structure;
    /// A request block can't be read.
    Request, "request", Error, Safe, Structure;
    /// The header of a journal that holds nothing can't be read, or names a life that never was.
    JournalHeader, "journal-header", Error, Safe, Structure;
    /// A host ended without leaving; what it had committed is not in place yet.
    JournalPending, "journal-pending", Note, Safe, Structure;
    /// The journal of a host that ended without leaving can't be replayed.
    JournalDamaged, "journal-damaged", Loss, Lossy, Structure;
    /// A lock can't be read.
    LockUnreadable, "lock-unreadable", Error, Safe, Structure;
    /// A lock says that it covers something else.
    LockKind, "lock-kind", Error, Safe, Structure;
    /// A lock names an owner or a tenure that never was.
    LockOwner, "lock-owner", Error, Safe, Structure;
    /// A lock names slots that the volume does not have.
    LockSlots, "lock-slots", Error, Safe, Structure;
    /// The volume lock says maintenance, and nobody is at it.
    Maintenance, "maintenance", Note, Safe, Structure;
    /// A cluster's header can't be read.
    ClusterHeader, "cluster-header", Error, Safe, Structure;
    /// A cluster's header counts something else than its maps.
    ClusterCounts, "cluster-counts", Error, Safe, Structure;
    /// A cluster's map can't be read.
    ClusterMap, "cluster-map", Error, Safe, Structure;
    /// A cluster's map marks the cluster's own blocks as free.
    ClusterOwn, "cluster-own", Error, Safe, Structure;

    /// A block of a file or directory is marked free.
    BlockFree, "block-free", Error, Safe, Marks;
    /// An inode in use is marked free.
    InodeFree, "inode-free", Error, Safe, Marks;

    /// An inode can't be read.
    InodeUnreadable, "inode-unreadable", Loss, Lossy, Files;
    /// An inode's attributes contradict each other.
    InodeFields, "inode-fields", Loss, Lossy, Files;
    /// An inode counts other blocks than it has.
    InodeBlocks, "inode-blocks", Error, Safe, Files;
    /// A file's size is impossible.
    InodeSize, "inode-size", Loss, Lossy, Files;
    /// A file has written blocks behind its end.
    BehindEnd, "behind-end", Error, Safe, Files;
    /// A node of a file's or directory's tree can't be used.
    TreeNode, "tree-node", Loss, Lossy, Files;
    /// An extent is impossible, overlaps another, or lies where no file's blocks can be.
    Extent, "extent", Loss, Lossy, Files;
    /// A block belongs to two.
    BlockTwice, "block-twice", Loss, Lossy, Files;
    /// A directory counts other entries than it has.
    DirectoryEntries, "directory-entries", Error, Safe, Files;
    /// A directory's entry can't be used.
    Entry, "entry", Loss, Lossy, Files;
    /// An entry is where lookups of its name don't find it.
    EntryPlace, "entry-place", Error, Safe, Files;
    /// Two entries of a directory have one name.
    EntryTwice, "entry-twice", Error, Lossy, Files;
    /// An entry names an inode that is not in use.
    EntryDangling, "entry-dangling", Loss, Lossy, Files;
    /// An entry says another generation or type than its inode.
    EntryTarget, "entry-target", Error, Lossy, Files;
    /// An inode with links is listed as an orphan.
    OrphanLinked, "orphan-linked", Error, Safe, Files;
    /// A directory has two names.
    DirectoryTwice, "directory-twice", Error, Lossy, Files;
    /// A directory says another parent, or another name's key there.
    DirectoryParent, "directory-parent", Error, Safe, Files;
    /// Directories contain each other and can't be reached from the root.
    DirectoryLoop, "directory-loop", Error, Lossy, Files;
    /// A link count is not the number of names.
    Links, "links", Error, Safe, Files;
    /// An inode in use has no name.
    Nameless, "nameless", Error, Lossy, Files;
    /// An inode without links is in no list of orphans.
    OrphanUnlisted, "orphan-unlisted", Error, Safe, Files;

    /// A free inode is marked used.
    InodeUsed, "inode-used", Error, Safe, Leftovers;
    /// Blocks that are marked used belong to nobody.
    BlockLost, "block-lost", Error, Safe, Leftovers;
    /// The slots' sums of what was allocated differ from what is allocated.
    NetAllocation, "net-allocation", Error, Safe, Leftovers;
}

/// Where it is. A repair knows from this what to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    Volume,
    Slot(u16),
    Block(u64),
    Blocks {
        first: u64,
        blocks: u64,
    },
    Cluster(u64),
    Map {
        cluster: u64,
        map: u64,
    },
    Inode(u64),
    /// An entry of a directory by its key, and the inode it names.
    Entry {
        directory: u64,
        key: u64,
        inode: u64,
    },
}

impl Place {
    pub fn of_slot(slot: Slot) -> Self {
        Place::Slot(slot.0)
    }
    pub fn of_block(at: BlockNo) -> Self {
        Place::Block(at.0)
    }
    pub fn of_inode(ino: InodeNo) -> Self {
        Place::Inode(ino.0)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Volume => write!(f, "volume"),
            Place::Slot(slot) => write!(f, "slot {slot}"),
            Place::Block(at) => write!(f, "block {at:#x}"),
            Place::Blocks { first, blocks: 1 } => write!(f, "block {first:#x}"),
            Place::Blocks { first, blocks } => write!(f, "blocks {first:#x} to {:#x}", first + blocks - 1),
            Place::Cluster(index) => write!(f, "cluster {index}"),
            Place::Map { cluster, map } => write!(f, "cluster {cluster}, map {map}"),
            Place::Inode(ino) => write!(f, "inode {ino:#x}"),
            Place::Entry { directory, key, .. } => write!(f, "directory {directory:#x}, key {key:#x}"),
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    pub kind: Kind,
    pub place: Place,
    /// A sentence for people.
    pub text: String,
    /// What the value in question should be, where a repair needs it.
    pub should_be: u64,
}

impl Finding {
    pub fn new(kind: Kind, place: Place, text: impl Into<String>) -> Self {
        Finding { kind, place, text: text.into(), should_be: 0 }
    }
    pub fn should_be(mut self, value: u64) -> Self {
        self.should_be = value;
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]: {}", self.place, self.kind.name(), self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_its_own_and_is_explained() {
        let docs = include_str!("../../docs/fsck.md");
        let mut names: Vec<_> = Kind::ALL.iter().map(|k| k.name()).collect();
        for kind in Kind::ALL {
            let severity = format!("{:?}", kind.severity()).to_lowercase();
            let repair = format!("{:?}", kind.repair()).to_lowercase();
            let row = format!("| `{}` | {severity} | {repair} |", kind.name());
            assert!(docs.contains(&row), "docs/fsck.md has no row that begins with: {row}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Kind::ALL.len());
    }
}
