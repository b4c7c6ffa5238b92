//! The kernel's numbers of inodes: which inode, in which of its lives, and how often the kernel refers to it.
//!
//! An inode's block is used anew after the file is gone, possibly by another host while this host's kernel
//! still refers to the old file (a working directory, a path walk on its way). So a node stands for an inode
//! *and* its generation, and a request means that life of it only: without this a file made "in the removed
//! directory" lands in whatever directory has the block now.
//!
//! A node's number is the inode's, with a tag made of the generation above it: zero in the first life, so
//! that most files are seen under their plain number. Programs see it as `st_ino`, because the transport's
//! library has one number for both; so all hosts show the same one. The table keeps the generation itself,
//! so that two lives with one tag are told apart: the later one gets another tag.
//!
//! Counting: every entry reply makes the kernel refer to a node once more; FORGET takes references back. What
//! the table lists is what must be invalidated when a lock leaves or the kernel is silenced. A count too high
//! costs one useless notification; a count too low would leave stale pages readable, so counting happens
//! before the reply is sent.
//!
//! What the table lists stands in the guard's [`Roster`] as well, entered before the reply is sent, so that the
//! kernel can be silenced when this process is no more.
//!
//! Not for: keeping inodes alive in the filesystem.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::{Mutex, PoisonError};

use super::guard::{Line, Roster};
use super::request::NodeId;
use super::taken_in::TakenIn;
use crate::types::InodeNo;

const SHARDS: usize = 16;
/// A volume's largest inode number is smaller (`layout::geometry::MAX_VOLUME_BYTES` in blocks).
const INODE_BITS: u32 = 48;
/// Lives that share a tag, which the kernel would have to refer to at once before none is left.
const TAGS_TRIED: u16 = 64;

impl NodeId {
    /// The number that a life of an inode has unless its tag is taken.
    pub fn of(ino: InodeNo, generation: u32) -> NodeId {
        NodeId::tagged(ino, generation.saturating_sub(1) as u16)
    }

    fn tagged(ino: InodeNo, tag: u16) -> NodeId {
        NodeId(ino.0 | u64::from(tag) << INODE_BITS)
    }

    /// What programs see as the inode's number.
    pub fn number(self, ino: InodeNo) -> u64 {
        if self == NodeId::ROOT { ino.0 } else { self.0 }
    }

    /// The inode, whatever its life. Not for [`NodeId::ROOT`].
    pub fn inode(self) -> InodeNo {
        InodeNo(self.0 & ((1 << INODE_BITS) - 1))
    }
}

#[derive(Clone, Copy)]
struct Known {
    generation: u32,
    references: u64,
    listed: Line,
}

type Shard = BTreeMap<(InodeNo, u16), Known>;

/// The nodes of one mount.
pub struct NodeTable {
    root: InodeNo,
    pub(super) taken_in: TakenIn,
    roster: Roster,
    shards: [Mutex<Shard>; SHARDS],
}

fn key(node: NodeId) -> (InodeNo, u16) {
    (node.inode(), (node.0 >> INODE_BITS) as u16)
}

impl NodeTable {
    pub fn new(root: InodeNo, roster: Roster) -> NodeTable {
        NodeTable { root, taken_in: TakenIn::default(), roster, shards: Default::default() }
    }

    fn shard(&self, ino: InodeNo) -> std::sync::MutexGuard<'_, Shard> {
        // Inode numbers of one group differ in their low bits.
        let index = (ino.0 ^ (ino.0 >> 4)) as usize % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel is about to get one more reference to this life of the inode. `None`: no number is left.
    pub fn looked_up(&self, ino: InodeNo, generation: u32) -> Option<NodeId> {
        if ino == self.root {
            return Some(NodeId::ROOT);
        }
        let mut shard = self.shard(ino);
        let first = key(NodeId::of(ino, generation)).1;
        // A tag that is free may precede the one this life already has.
        let tags = || (0..TAGS_TRIED).map(|n| first.wrapping_add(n));
        let mine = tags().find(|tag| shard.get(&(ino, *tag)).is_some_and(|k| k.generation == generation));
        let tag = mine.or_else(|| tags().find(|tag| !shard.contains_key(&(ino, *tag))))?;
        let node = NodeId::tagged(ino, tag);
        match shard.entry((ino, tag)) {
            Entry::Occupied(mut known) => known.get_mut().references += 1,
            Entry::Vacant(free) => {
                free.insert(Known { generation, references: 1, listed: self.roster.enter(node)? });
            }
        }
        Some(node)
    }

    /// The kernel gave back `count` references.
    pub fn forgotten(&self, node: NodeId, count: u64) {
        let (ino, tag) = key(node);
        if let Entry::Occupied(mut known) = self.shard(ino).entry((ino, tag)) {
            known.get_mut().references = known.get().references.saturating_sub(count);
            if known.get().references == 0 {
                self.roster.strike(known.remove().listed);
                self.taken_in.forgotten(node);
            }
        }
    }

    /// Which inode, in which life, the kernel means. No generation for the root, which lives but once.
    /// `None`: nothing that the kernel was told of.
    pub fn meaning(&self, node: NodeId) -> Option<(InodeNo, Option<u32>)> {
        if node == NodeId::ROOT {
            return Some((self.root, None));
        }
        let (ino, tag) = key(node);
        self.shard(ino).get(&(ino, tag)).map(|known| (ino, Some(known.generation)))
    }

    /// Every node of this inode that the kernel may know.
    pub fn of_inode(&self, ino: InodeNo) -> Vec<NodeId> {
        if ino == self.root {
            return vec![NodeId::ROOT];
        }
        let shard = self.shard(ino);
        shard.range((ino, 0)..=(ino, u16::MAX)).map(|((ino, tag), _)| NodeId::tagged(*ino, *tag)).collect()
    }

    /// All nodes the kernel may know, the root among them.
    pub fn all(&self) -> Vec<NodeId> {
        let mut nodes = vec![NodeId::ROOT];
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            nodes.extend(shard.keys().map(|(ino, tag)| NodeId::tagged(*ino, *tag)));
        }
        nodes
    }

    /// How many nodes besides the root.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|s| s.lock().unwrap_or_else(PoisonError::into_inner).len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::fuse::guard::GuardMemory;

    const ROOT: InodeNo = InodeNo(9);

    #[test]
    fn a_node_stays_until_every_reference_is_given_back() {
        let table = NodeTable::new(ROOT, Roster::default());
        let node = table.looked_up(InodeNo(70), 1).expect("a number");
        assert_eq!(node, NodeId(70));
        assert_eq!(table.looked_up(InodeNo(70), 1), Some(node));
        table.looked_up(InodeNo(71), 1);
        table.forgotten(node, 1);
        assert_eq!(table.len(), 2);
        table.forgotten(node, 1);
        table.forgotten(NodeId(99), 5);
        assert_eq!(table.all(), [NodeId::ROOT, NodeId(71)]);
        assert_eq!(table.meaning(node), None);
        table.forgotten(NodeId(71), 100);
        assert!(table.is_empty());
    }

    #[test]
    fn what_the_kernel_may_know_stands_in_the_roster() {
        let memory = Arc::new(GuardMemory::new().expect("memory"));
        let table = NodeTable::new(ROOT, Roster::new(memory.clone()));
        let listed = || memory.nodes().collect::<Vec<_>>();
        let nodes: Vec<_> = (70..75).filter_map(|n| table.looked_up(InodeNo(n), 1)).collect();
        table.looked_up(InodeNo(70), 1);
        assert_eq!(listed(), nodes);
        table.forgotten(nodes[0], 1);
        table.forgotten(nodes[1], 1);
        assert_eq!(listed(), [nodes[0], nodes[2], nodes[3], nodes[4]]);
        table.looked_up(InodeNo(90), 1);
        assert_eq!(
            listed(),
            [nodes[0], NodeId(90), nodes[2], nodes[3], nodes[4]],
            "a free line is used again"
        );
        table.looked_up(ROOT, 1);
        assert_eq!(listed().len(), 5, "the guard knows the root by itself");
    }

    #[test]
    fn each_life_of_an_inode_is_a_node_of_its_own() {
        let table = NodeTable::new(ROOT, Roster::default());
        let first = table.looked_up(InodeNo(70), 1).expect("a number");
        let second = table.looked_up(InodeNo(70), 2).expect("a number");
        assert_ne!(first, second);
        assert_eq!(table.meaning(first), Some((InodeNo(70), Some(1))));
        assert_eq!(table.meaning(second), Some((InodeNo(70), Some(2))));
        assert_eq!(table.of_inode(InodeNo(70)), [first, second]);
        assert_eq!((first.inode(), second.inode()), (InodeNo(70), InodeNo(70)));
        table.forgotten(first, 1);
        assert_eq!(table.of_inode(InodeNo(70)), [second]);
    }

    #[test]
    fn lives_with_one_tag_are_told_apart() {
        let table = NodeTable::new(ROOT, Roster::default());
        let (early, late) = (3, 3 + (1 << 16));
        assert_eq!(NodeId::of(InodeNo(70), early), NodeId::of(InodeNo(70), late));
        let first = table.looked_up(InodeNo(70), early).expect("a number");
        let second = table.looked_up(InodeNo(70), late).expect("a number");
        assert_ne!(first, second);
        // Its number stays its number when the other one is free again.
        table.forgotten(first, 1);
        assert_eq!(table.looked_up(InodeNo(70), late), Some(second));
        assert_eq!(table.meaning(second), Some((InodeNo(70), Some(late))));
    }

    #[test]
    fn the_root_is_always_there() {
        let table = NodeTable::new(ROOT, Roster::default());
        assert_eq!(table.looked_up(ROOT, 1), Some(NodeId::ROOT));
        assert_eq!(table.meaning(NodeId::ROOT), Some((ROOT, None)));
        assert_eq!(table.of_inode(ROOT), [NodeId::ROOT]);
        assert!(table.is_empty());
    }
}
