//! One deliberate corruption for each finding, for all who check volumes.

use super::broken::Broken;
use lunfs::fs::dirtree::DirTarget;
use lunfs::fs::extents::ExtentTree;
use lunfs::fsck::finding::Kind;
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::inode::{Form, InodeDisk};
use lunfs::layout::lock::{LockKind, LockMode};
use lunfs::layout::slot::SlotState;
use lunfs::tree::mem::MemStore;
use lunfs::types::{BlockNo, Incarnation, InodeNo, Owner, Slot, SlotSet, Tenure};

pub type Break = fn(&Broken);
/// What is broken, what that is called, and which names are other than before: gone, and new. A name whose
/// contents or attributes changed is in both.
pub type Case = (Kind, Break, &'static [&'static str], &'static [&'static str]);

pub const SAME: &[&str] = &[];

pub fn target(v: &Broken, ino: InodeNo) -> DirTarget {
    let body = v.read_body(ino);
    DirTarget { ino, generation: body.generation.get(), kind: (body.mode.get() >> 12) as u8 }
}

/// The key of a name in a directory that is all in its root.
pub fn key_of(v: &Broken, directory: InodeNo, name: &str) -> u64 {
    let mut key = 0;
    v.entries(directory, |tree, content| {
        key = tree.lookup(&mut MemStore::default(), content, name.as_bytes()).unwrap().unwrap().key;
        0
    });
    key
}

/// Gives a name another value.
pub fn value_of(v: &Broken, directory: InodeNo, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
    let key = key_of(v, directory, name);
    v.entries(directory, |tree, content| {
        let mut store = MemStore::default();
        let mut value = tree.tree().get(&mut store, content, key).unwrap().unwrap();
        change(&mut value);
        tree.tree().replace(&mut store, content, key, &value).unwrap();
        0
    });
}

pub fn enter(v: &Broken, directory: InodeNo, name: &[u8], target: DirTarget) -> u64 {
    let mut key = 0;
    v.entries(directory, |tree, content| {
        let mut store = MemStore::default();
        assert!(matches!(
            tree.insert(&mut store, content, name, target).unwrap(),
            lunfs::fs::dirtree::Inserted::Done(_)
        ));
        key = tree.lookup(&mut store, content, name).unwrap().unwrap().key;
        1
    });
    key
}

pub fn remove(v: &Broken, directory: InodeNo, name: &[u8]) {
    v.entries(directory, |tree, content| {
        tree.remove(&mut MemStore::default(), content, name).unwrap().unwrap();
        -1
    });
}

/// The first block of a file whose extents are in its root.
pub fn first_block(v: &Broken, ino: InodeNo) -> BlockNo {
    let tree = ExtentTree::new(v.superblock.volume, ino, v.geometry.size_blocks);
    let body = v.read_body(ino);
    tree.last(&mut MemStore::default(), &body.content).unwrap().unwrap().physical
}

/// Moves the last extent of a file elsewhere.
pub fn move_extent(v: &Broken, ino: InodeNo, to: BlockNo) {
    let tree = ExtentTree::new(v.superblock.volume, ino, v.geometry.size_blocks);
    v.body(ino, |body| {
        let mut store = MemStore::default();
        let last = tree.last(&mut store, &body.content).unwrap().unwrap();
        let mut value = tree.tree().get(&mut store, &body.content, last.logical).unwrap().unwrap();
        value[..8].copy_from_slice(&to.0.to_le_bytes());
        tree.tree().replace(&mut store, &mut body.content, last.logical, &value).unwrap();
    });
}

/// A node of the file with many extents.
pub fn node_of(v: &Broken, ino: InodeNo) -> BlockNo {
    let g = v.geometry;
    let mut blocks = (g.first_cluster()..g.size_blocks).map(BlockNo);
    let of = |at: &BlockNo| {
        let block = v.get(*at);
        block[..4] == *b"LnTN" && block[0x40..0x48] == ino.0.to_le_bytes()
    };
    blocks.find(of).expect("a tree node")
}

pub fn free_inode(v: &Broken) -> InodeNo {
    let first = v.inodes.small.0 / 16 * 16;
    let free = |ino: &InodeNo| v.read_body(*ino).form() == Form::Free;
    (first + 8..first + 16).map(InodeNo).find(free).unwrap_or_else(|| {
        let g = v.geometry;
        (g.first_cluster()..g.size_blocks)
            .map(InodeNo)
            .find(|ino| {
                let block = v.get(ino.body());
                block[..4] == *b"LnIN" && InodeDisk::of(&block).form() == Form::Free
            })
            .expect("a free inode")
    })
}

pub const CASES: &[Case] = &[
    (Kind::Superblock, |v| v.garbage(BlockNo(0)), SAME, SAME),
    // Another hash seed, under a good checksum: names would not be found.
    (Kind::Superblock, |v| v.sealed(BlockNo(0), |block| block[0x98] ^= 1), SAME, SAME),
    (Kind::SuperblockCopy, |v| v.sealed(v.geometry.superblock_copies()[1], |b| b[0x98] ^= 1), SAME, SAME),
    (Kind::SuperblockCopy, |v| v.garbage(v.geometry.superblock_copies()[2]), SAME, SAME),
    (Kind::Slot, |v| v.garbage(v.geometry.slot(Slot(2))), SAME, SAME),
    (Kind::Slot, |v| v.garbage(v.geometry.slot(Slot(0))), SAME, SAME),
    (Kind::Slot, |v| v.slot(0, |r| r.settled_up_to = Incarnation(0)), SAME, SAME),
    (Kind::Doorbell, |v| v.garbage(v.geometry.doorbell(Slot(0))), SAME, SAME),
    (Kind::Request, |v| v.garbage(v.geometry.request(Slot(1))), SAME, SAME),
    (Kind::JournalHeader, |v| v.garbage(v.geometry.journal(Slot(0))), SAME, SAME),
    (
        Kind::JournalDamaged,
        |v| {
            v.slot(0, |r| {
                (r.state, r.settled_up_to) = (SlotState::Unrecoverable, Incarnation(0));
            })
        },
        SAME,
        SAME,
    ),
    (Kind::LockUnreadable, |v| v.garbage(lock_of_inode(v.inodes.small)), SAME, SAME),
    (Kind::LockUnreadable, |v| v.garbage(v.geometry.cluster(3)), SAME, SAME),
    (Kind::LockUnreadable, |v| v.garbage(v.geometry.volume_lock()), SAME, SAME),
    (Kind::LockKind, |v| v.lock(lock_of_inode(v.inodes.dir), |r| r.kind = LockKind::Cluster), SAME, SAME),
    (
        Kind::LockOwner,
        |v| {
            v.lock(lock_of_inode(v.inodes.dir), |r| {
                let owner = Owner { slot: Slot(0), incarnation: Incarnation(99) };
                r.mode = LockMode::Exclusive { owner, tenure: Tenure(1) };
            })
        },
        SAME,
        SAME,
    ),
    (
        Kind::LockSlots,
        |v| v.lock(v.geometry.rename_lock(), |r| r.openers = SlotSet::of(Slot(200))),
        SAME,
        SAME,
    ),
    (
        Kind::Maintenance,
        |v| {
            v.lock(v.geometry.volume_lock(), |r| {
                let owner = Owner { slot: Slot(0), incarnation: Incarnation(1) };
                r.mode = LockMode::Exclusive { owner, tenure: Tenure(r.swap_counter) };
            })
        },
        SAME,
        SAME,
    ),
    (Kind::ClusterHeader, |v| v.garbage(v.geometry.cluster_header(v.cluster())), SAME, SAME),
    (Kind::ClusterCounts, |v| v.header(|h| h.free_blocks -= 1), SAME, SAME),
    (Kind::ClusterMap, |v| v.garbage(v.geometry.cluster_map(v.cluster(), 0)), SAME, SAME),
    (
        Kind::ClusterOwn,
        |v| {
            v.map_of(v.geometry.cluster(v.cluster()), |m, c, _| {
                m.chunks[c].used = (m.chunks[c].used.get() & !2).into();
            })
        },
        SAME,
        SAME,
    ),
    (
        Kind::BlockFree,
        |v| {
            v.map_of(first_block(v, v.inodes.other), |m, c, b| {
                m.chunks[c].used = (m.chunks[c].used.get() & !(1 << b)).into();
            })
        },
        SAME,
        SAME,
    ),
    (
        Kind::BlockLost,
        |v| {
            v.map_of(first_block(v, v.inodes.other), |m, _, _| {
                let chunk = m.chunks.iter_mut().find(|c| c.used.get() == 0).unwrap();
                chunk.used = 6.into();
            })
        },
        SAME,
        SAME,
    ),
    (
        Kind::InodeFree,
        |v| v.map_of(v.inodes.small.body(), |m, c, b| m.chunks[c].inodes &= !(1 << (b - 8))),
        SAME,
        SAME,
    ),
    (
        Kind::InodeUsed,
        |v| v.map_of(free_inode(v).body(), |m, c, b| m.chunks[c].inodes |= 1 << (b - 8)),
        SAME,
        SAME,
    ),
    // The checksum alone: the file is there, with what its body says now.
    (
        Kind::InodeUnreadable,
        |v| {
            let mut block = v.get(v.inodes.small.body());
            block[0x100] = b'O';
            v.put(v.inodes.small.body(), &block[..]);
        },
        &["/small"],
        &["/small"],
    ),
    (Kind::InodeUnreadable, |v| v.garbage(v.inodes.small.body()), &["/small"], SAME),
    (Kind::InodeFields, |v| v.body(v.inodes.small, |b| b.mode = 0o170644.into()), &["/small"], SAME),
    (Kind::InodeBlocks, |v| v.body(v.inodes.other, |b| b.blocks += 2), SAME, SAME),
    (Kind::InodeBlocks, |v| v.body(v.inodes.dir, |b| b.blocks += 2), SAME, SAME),
    (Kind::InodeSize, |v| v.body(v.inodes.other, |b| b.size = u64::MAX.into()), SAME, SAME),
    (Kind::BehindEnd, |v| v.body(v.inodes.other, |b| b.size = 100.into()), &["/other"], &["/other"]),
    (Kind::TreeNode, |v| v.garbage(node_of(v, v.inodes.file)), &["/file"], &["/file"]),
    (Kind::Extent, |v| move_extent(v, v.inodes.other, BlockNo(3)), &["/other"], &["/other"]),
    (
        Kind::Extent,
        |v| move_extent(v, v.inodes.other, lock_of_inode(v.inodes.small)),
        &["/other"],
        &["/other"],
    ),
    (
        Kind::BlockTwice,
        |v| {
            let node = node_of(v, v.inodes.file).plus(0);
            move_extent(v, v.inodes.other, node);
        },
        &["/other"],
        &["/other"],
    ),
    (Kind::DirectoryEntries, |v| v.body(v.inodes.dir, |b| b.entries += 1), SAME, SAME),
    (
        Kind::Entry,
        |v| value_of(v, v.geometry.root(), "link", |value| value[13] = b'/'),
        &["/link"],
        &["/lost+found", "/lost+found/INO"],
    ),
    (
        Kind::EntryPlace,
        |v| {
            let key = key_of(v, v.geometry.root(), "small");
            v.entries(v.geometry.root(), |tree, content| {
                let mut store = MemStore::default();
                let value = tree.tree().remove(&mut store, content, key).unwrap().unwrap();
                tree.tree().insert(&mut store, content, key ^ (1 << 40), &value).unwrap();
                0
            });
        },
        SAME,
        SAME,
    ),
    (
        Kind::EntryTwice,
        |v| {
            let key = key_of(v, v.geometry.root(), "small");
            v.entries(v.geometry.root(), |tree, content| {
                let mut store = MemStore::default();
                let value = tree.tree().get(&mut store, content, key).unwrap().unwrap();
                tree.tree().insert(&mut store, content, key + 1, &value).unwrap();
                1
            });
        },
        &["/small"],
        &["/small", "/small.INO"],
    ),
    (
        Kind::EntryDangling,
        |v| {
            let target = DirTarget { ino: free_inode(v), generation: 1, kind: 8 };
            enter(v, v.geometry.root(), b"nobody", target);
        },
        SAME,
        SAME,
    ),
    (Kind::EntryTarget, |v| value_of(v, v.geometry.root(), "small", |value| value[8] += 5), SAME, SAME),
    (
        Kind::OrphanLinked,
        |v| {
            let name = format!("{:016x}", v.inodes.small.0);
            enter(v, v.geometry.orphan_directory(Slot(1)), name.as_bytes(), target(v, v.inodes.small));
        },
        SAME,
        SAME,
    ),
    (
        Kind::DirectoryTwice,
        |v| {
            enter(v, v.inodes.b, b"again", target(v, v.inodes.a));
            v.body(v.inodes.b, |b| b.nlink += 1);
        },
        SAME,
        SAME,
    ),
    (Kind::DirectoryParent, |v| v.body(v.inodes.b, |b| b.parent_key += 1), SAME, SAME),
    (Kind::DirectoryParent, |v| v.body(v.inodes.b, |b| b.parent = v.inodes.dir.0.into()), SAME, SAME),
    (
        Kind::DirectoryLoop,
        |v| {
            remove(v, v.geometry.root(), b"a");
            v.body(v.geometry.root(), |b| b.nlink -= 1);
            let key = enter(v, v.inodes.b, b"circle", target(v, v.inodes.a));
            v.body(v.inodes.b, |b| b.nlink += 1);
            v.body(v.inodes.a, |b| (b.parent, b.parent_key) = (v.inodes.b.0.into(), key.into()));
        },
        &["/a", "/a/b", "/a/b/deep"],
        &["/lost+found", "/lost+found/INO", "/lost+found/INO/b", "/lost+found/INO/b/deep"],
    ),
    (Kind::Links, |v| v.body(v.inodes.small, |b| b.nlink = 5.into()), SAME, SAME),
    (Kind::Links, |v| v.body(v.inodes.a, |b| b.nlink = 2.into()), SAME, SAME),
    (
        Kind::Nameless,
        |v| remove(v, v.geometry.root(), b"small"),
        &["/small"],
        &["/lost+found", "/lost+found/INO"],
    ),
    (
        Kind::OrphanUnlisted,
        |v| {
            remove(v, v.geometry.root(), b"small");
            v.body(v.inodes.small, |b| b.nlink = 0.into());
        },
        &["/small"],
        SAME,
    ),
    (Kind::NetAllocation, |v| v.slot(0, |r| r.net_blocks += 7), SAME, SAME),
];
