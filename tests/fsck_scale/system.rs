//! What a generated volume has written in it once: the root and one big directory with the first cluster, in which their
//! nodes are, the orphan directories, and a slot with the sums.

use lunfs::fs::dirtree::{DirTarget, DirTree, Inserted};
use lunfs::layout::cluster::{ClusterHeader, ClusterMap};
use lunfs::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES};
use lunfs::layout::inode::InodeDisk;
use lunfs::layout::slot::{SlotRecord, SlotState};
use lunfs::layout::{RECORD_BYTES, seal, zero_block};
use lunfs::tree::mem::MemStore;
use lunfs::types::{BlockNo, Incarnation, InodeNo, Slot};
use zerocopy::IntoBytes;

use super::device::{Generated, LOGICAL_BLOCK};
use super::shape::Role;

impl Generated {
    /// As many orphans as fit the bodies of their directories; inodes for more are free ones.
    fn has_orphan(&self, cluster: u64) -> bool {
        cluster <= 64 * u64::from(self.g().slots)
    }

    /// What is written once: root, orphan directories, the first cluster, and a slot with the sums.
    pub fn write_system(&self) {
        let (g, filled) = (self.g(), self.filled());
        let volume = self.superblock.volume;
        let mut body = zero_block();
        let nlink = 2 + self.root.len() as u32;
        self.directory(&mut body, g.root(), (InodeNo(0), 0), self.root.len(), &self.root_nodes, nlink);
        let content = &mut InodeDisk::of_mut(&mut body).content;
        self.root_tree(|tree| self.root_nodes.1.write(content, tree, None));
        seal(&mut body[..]);
        self.put(g.root().body(), body);

        let mut orphans = vec![Vec::new(); usize::from(g.slots)];
        let orphan = (0..).zip(&self.shape.inodes).find(|(_, inode)| inode.role == Role::Orphan).unwrap().0;
        for cluster in (1..=filled).filter(|c| self.has_orphan(*c)) {
            let ino = self.ino(cluster, orphan);
            orphans[(cluster % u64::from(g.slots)) as usize].push(ino);
        }
        for (slot, orphans) in g.all_slots().zip(orphans) {
            let directory = g.orphan_directory(slot);
            let mut block = self.get(directory.body());
            let body = InodeDisk::of_mut(&mut block);
            let tree = DirTree::new(volume, directory, self.superblock.hash_seed);
            for ino in &orphans {
                let target = DirTarget { ino: *ino, generation: 1, kind: self.kind(orphan) };
                let name = format!("{:016x}", ino.0);
                let inserted = tree
                    .insert(&mut MemStore::default(), &mut body.content, name.as_bytes(), target)
                    .unwrap();
                assert!(matches!(inserted, Inserted::Done(_)));
            }
            body.entries = (orphans.len() as u64).into();
            seal(&mut block[..]);
            self.put(directory.body(), block);
        }

        let nodes = self.root_nodes.1.nodes() + self.big_nodes.1.nodes();
        let (group, first) = (self.big_ino.0 - GROUP_INODES, self.root_nodes.0.0 - g.cluster(0).0);
        for i in 0..GROUP_INODES {
            let mut block = zero_block();
            self.lock(BlockNo(group + i), &mut block);
            self.put(BlockNo(group + i), block);
            let mut block = zero_block();
            let ino = InodeNo(group + GROUP_INODES + i);
            block.copy_from_slice(InodeDisk::new_free(volume, ino).as_bytes());
            seal(&mut block[..]);
            self.put(ino.body(), block);
        }
        let mut body = zero_block();
        let parent = (g.root(), self.root_keys[filled as usize]);
        self.directory(&mut body, self.big_ino, parent, self.big.len(), &self.big_nodes, 2);
        let content = &mut InodeDisk::of_mut(&mut body).content;
        self.big_tree(|tree| self.big_nodes.1.write(content, tree, None));
        seal(&mut body[..]);
        self.put(self.big_ino.body(), body);

        let mut header = Box::new(ClusterHeader::new_empty(&g, volume, 0));
        let used = |block: u64| block + GROUP_BLOCKS >= first && block < first + nodes;
        for map in 0..g.cluster_maps(0) {
            let start = map * CHUNKS_PER_MAP * GROUP_BLOCKS;
            if start >= first + nodes {
                break;
            }
            let mut this = Box::new(ClusterMap::new_empty(&g, volume, 0, map));
            for (chunk, at) in this.chunks.iter_mut().zip((start..).step_by(GROUP_BLOCKS as usize)) {
                for bit in (0..GROUP_BLOCKS).filter(|bit| used(at + bit)) {
                    chunk.used = (chunk.used.get() | 1 << bit).into();
                }
                if g.cluster(0).0 + at == group {
                    (chunk.group, chunk.inodes) = (1, 1);
                }
            }
            let summary = &mut header.summaries[map as usize];
            header.free_blocks =
                (header.free_blocks.get() - u32::from(summary.free_blocks.get()) + this.free_blocks()).into();
            summary.free_blocks = (this.free_blocks() as u16).into();
            summary.free_inodes = (this.free_inodes() as u16).into();
            summary.written = 1;
            header.free_inodes = (header.free_inodes.get() + this.free_inodes()).into();
            header.groups = (header.groups.get() + u32::from(map == 0)).into();
            self.put_sealed(g.cluster_map(0, map), this.as_bytes());
        }
        self.put_sealed(g.cluster_header(0), header.as_bytes());

        let mut slot = SlotRecord::new_free(g.slot(Slot(0)));
        slot.state = SlotState::Left;
        slot.logical_block_bytes = LOGICAL_BLOCK as u32;
        slot.durations = self.superblock.durations;
        (slot.incarnation, slot.settled_up_to) = (Incarnation(1), Incarnation(1));
        let orphans = (1..=filled).filter(|c| self.has_orphan(*c)).count() as u64;
        assert_eq!(orphans, filled, "every filled cluster has an orphan");
        slot.net_blocks = (filled * self.shape.used_blocks + GROUP_BLOCKS + nodes) as i64;
        slot.net_inodes = (filled * self.shape.used_inodes + 1) as i64;
        let mut block = zero_block();
        slot.encode(volume, &mut block[..RECORD_BYTES]);
        self.put(g.slot(Slot(0)), block);
    }
}
