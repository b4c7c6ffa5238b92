//! Which inodes the kernel may still have something cached of.
//!
//! Every entry reply makes the kernel refer to a node once more; FORGET takes references back. What the
//! table lists is what must be invalidated when the kernel is silenced: after an abort open files and
//! mappings go on showing cached pages until each node is invalidated by name. A count too high costs one
//! useless notification; a count too low would leave stale pages readable, so counting happens before the
//! reply is sent.
//!
//! Not for: keeping inodes alive in the filesystem.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use super::request::NodeId;

const SHARDS: usize = 16;

#[derive(Default)]
pub struct NodeTable {
    shards: [Mutex<HashMap<u64, u64>>; SHARDS],
}

impl NodeTable {
    fn shard(&self, node: NodeId) -> std::sync::MutexGuard<'_, HashMap<u64, u64>> {
        // Inode numbers of one group differ in their low bits.
        let index = (node.0 ^ (node.0 >> 4)) as usize % SHARDS;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel is about to get one more reference.
    pub fn looked_up(&self, node: NodeId) {
        *self.shard(node).entry(node.0).or_insert(0) += 1;
    }

    /// The kernel gave back `count` references.
    pub fn forgotten(&self, node: NodeId, count: u64) {
        let mut shard = self.shard(node);
        if let Some(references) = shard.get_mut(&node.0) {
            *references = references.saturating_sub(count);
            if *references == 0 {
                shard.remove(&node.0);
            }
        }
    }

    /// All nodes the kernel may know, the root among them.
    pub fn all(&self) -> Vec<NodeId> {
        let mut nodes = vec![NodeId::ROOT];
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            nodes.extend(shard.keys().map(|n| NodeId(*n)).filter(|n| *n != NodeId::ROOT));
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
    use super::*;

    #[test]
    fn a_node_stays_until_every_reference_is_given_back() {
        let table = NodeTable::default();
        table.looked_up(NodeId(70));
        table.looked_up(NodeId(70));
        table.looked_up(NodeId(71));
        table.forgotten(NodeId(70), 1);
        assert_eq!(table.len(), 2);
        table.forgotten(NodeId(70), 1);
        table.forgotten(NodeId(99), 5);
        assert_eq!(table.all(), [NodeId::ROOT, NodeId(71)]);
        table.forgotten(NodeId(71), 100);
        assert!(table.is_empty());
    }
}
