//! A handful of corruptions at random places, and what each must be called.

use lunfs::fsck::finding::{Finding, Kind, Place};
use lunfs::layout::cluster::{ClusterHeader, ClusterMap};
use lunfs::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES, lock_of_inode};
use lunfs::layout::inode::InodeDisk;
use lunfs::layout::lock::{LockKind, LockRecord};
use lunfs::layout::{RECORD_BYTES, seal};
use lunfs::rt::sim::SimRng;
use lunfs::types::{BlockNo, InodeNo};
use zerocopy::FromBytes;

use super::device::Generated;
use super::shape::{Content, Role};

pub type Expected = (Kind, Place);

struct Breaker<'a> {
    device: &'a Generated,
    rng: SimRng,
    expected: Vec<Expected>,
    /// Clusters that were broken: one break each, so that none hides another.
    taken: Vec<u64>,
}

impl Breaker<'_> {
    fn cluster(&mut self) -> u64 {
        loop {
            let cluster = self.rng.between(1, self.device.filled());
            if !self.taken.contains(&cluster) {
                self.taken.push(cluster);
                return cluster;
            }
        }
    }

    /// A random inode of which this is true.
    fn inode(&mut self, fits: impl Fn(Role, &Content) -> bool) -> (u64, u32, InodeNo) {
        self.inode_with(0, fits)
    }

    /// One with so many links at least.
    fn inode_with(&mut self, links: u32, fits: impl Fn(Role, &Content) -> bool) -> (u64, u32, InodeNo) {
        let cluster = self.cluster();
        let all: Vec<u32> = (0..)
            .zip(&self.device.shape.inodes)
            .filter(|(_, inode)| inode.nlink >= links && fits(inode.role, &inode.content))
            .map(|(i, _)| i)
            .collect();
        let i = all[self.rng.below(all.len() as u64) as usize];
        (cluster, i, self.device.ino(cluster, i))
    }

    fn body(&mut self, ino: InodeNo, change: impl FnOnce(&mut InodeDisk)) {
        let mut block = self.device.get(ino.body());
        change(InodeDisk::of_mut(&mut block));
        seal(&mut block[..]);
        self.device.put(ino.body(), block);
    }

    fn is(&mut self, kind: Kind, place: Place) {
        self.expected.push((kind, place));
    }

    /// Marks a block or an inode in its map otherwise; header and map agree.
    fn mark(&mut self, cluster: u64, offset: u64, change: impl FnOnce(&mut ClusterMap, usize)) {
        let g = self.device.g();
        let (map, chunk) = (offset / GROUP_BLOCKS / CHUNKS_PER_MAP, offset / GROUP_BLOCKS % CHUNKS_PER_MAP);
        let at = g.cluster_map(cluster, map);
        let mut block = self.device.get(at);
        let this = ClusterMap::mut_from_bytes(&mut block[..]).unwrap();
        let before = (this.free_blocks(), this.free_inodes());
        change(this, chunk as usize);
        let after = (this.free_blocks(), this.free_inodes());
        assert_ne!(before, after);
        seal(&mut block[..]);
        self.device.put(at, block);
        let mut block = self.device.get(g.cluster_header(cluster));
        let header = ClusterHeader::mut_from_bytes(&mut block[..]).unwrap();
        let summary = &mut header.summaries[map as usize];
        (summary.free_blocks, summary.free_inodes) = ((after.0 as u16).into(), (after.1 as u16).into());
        header.free_blocks = (header.free_blocks.get() - before.0 + after.0).into();
        header.free_inodes = (header.free_inodes.get() - before.1 + after.1).into();
        seal(&mut block[..]);
        self.device.put(g.cluster_header(cluster), block);
    }
}

/// Breaks one thing of each kind; an odd seed also makes what hides others, which then are not made.
pub fn break_some(device: &Generated, seed: u64) -> Vec<Expected> {
    let mut b = Breaker { device, rng: SimRng::new(seed, 77), expected: Vec::new(), taken: Vec::new() };
    let g = device.g();
    let file = |role: Role, _: &Content| matches!(role, Role::File(_) | Role::Big);
    let regular = |role: Role, content: &Content| {
        matches!((role, content), (Role::File(_) | Role::Big, Content::Pieces(_)))
    };
    let with_nodes = |_: Role, content: &Content| matches!(content, Content::Pieces(p) if p.len() > 136);

    // Too many can't be judged where names are unknown; too few can.
    let (_, _, ino) = b.inode_with(2, file);
    b.body(ino, |body| body.nlink = (body.nlink.get() + 1 - 2 * (seed % 2) as u32).into());
    b.is(Kind::Links, Place::of_inode(ino));

    let (_, _, ino) = b.inode(regular);
    b.body(ino, |body| body.blocks = (body.blocks.get() + 1).into());
    b.is(Kind::InodeBlocks, Place::of_inode(ino));

    let (_, _, ino) = b.inode(regular);
    b.body(ino, |body| body.size = 1.into());
    b.is(Kind::BehindEnd, Place::of_inode(ino));

    let (_, _, ino) = b.inode(|role, _| matches!(role, Role::Sub(_) | Role::Top));
    b.body(ino, |body| body.entries = (body.entries.get() - 1).into());
    b.is(Kind::DirectoryEntries, Place::of_inode(ino));

    let (_, _, ino) = b.inode(file);
    let at = lock_of_inode(ino);
    let mut block = device.get(at);
    block[0x90] ^= 1;
    device.put(at, block);
    b.is(Kind::LockUnreadable, Place::of_block(at));

    let cluster = b.cluster();
    let at = g.cluster(cluster);
    let mut block = device.get(at);
    let mut lock = LockRecord::decode(&block[..], device.superblock.volume, at).unwrap();
    lock.kind = LockKind::Inode;
    lock.encode(device.superblock.volume, &mut block[..RECORD_BYTES]);
    device.put(at, block);
    b.is(Kind::LockKind, Place::of_block(at));

    let (cluster, i, ino) = b.inode(|role, _| role == Role::Free);
    let offset = ino.0 - g.cluster(cluster).0;
    b.mark(cluster, offset, |map, chunk| map.chunks[chunk].inodes |= 1 << (u64::from(i) % GROUP_INODES));
    b.is(Kind::InodeUsed, Place::of_inode(ino));

    let (cluster, i, ino) = b.inode(file);
    let offset = ino.0 - g.cluster(cluster).0;
    b.mark(cluster, offset, |map, chunk| map.chunks[chunk].inodes &= !(1 << (u64::from(i) % GROUP_INODES)));
    b.is(Kind::InodeFree, Place::of_inode(ino));

    let (cluster, i, _) = b.inode(regular);
    let Content::Pieces(pieces) = &device.shape.inodes[i as usize].content else { unreachable!() };
    let offset = pieces[pieces.len() / 2].at;
    b.mark(cluster, offset, |map, chunk| {
        let used = map.chunks[chunk].used.get() & !(1 << (offset % GROUP_BLOCKS));
        map.chunks[chunk].used = used.into();
    });
    b.is(Kind::BlockFree, Place::Blocks { first: g.cluster(cluster).0 + offset, blocks: 1 });

    if seed.is_multiple_of(2) {
        // Behind each piece is a gap.
        let (cluster, i, _) = b.inode(|role, content| {
            matches!((role, content), (Role::File(_), Content::Pieces(p)) if (3..100).contains(&p.len()))
        });
        let Content::Pieces(pieces) = &device.shape.inodes[i as usize].content else { unreachable!() };
        let offset = pieces[1].at + pieces[1].blocks;
        b.mark(cluster, offset, |map, chunk| {
            map.chunks[chunk].used = (map.chunks[chunk].used.get() | 1 << (offset % GROUP_BLOCKS)).into();
        });
        b.is(Kind::BlockLost, Place::Blocks { first: g.cluster(cluster).0 + offset, blocks: 1 });
    } else {
        let (_, _, ino) = b.inode(file);
        let mut block = device.get(ino.body());
        block[0x44] ^= 0xff;
        device.put(ino.body(), block);
        b.is(Kind::InodeUnreadable, Place::of_inode(ino));

        let (cluster, i, ino) = b.inode(with_nodes);
        let at = g.cluster(cluster).plus(device.shape.inodes[i as usize].nodes_at + 1);
        let mut block = device.get(at);
        block[100] ^= 1;
        device.put(at, block);
        b.is(Kind::TreeNode, Place::of_inode(ino));
    }

    // The copies in the middle.
    let copies = g.superblock_copies();
    let at: BlockNo = copies[1 + b.rng.below(3) as usize];
    let mut block = device.get(at);
    block[0xa8] ^= 1;
    device.put(at, block);
    b.is(Kind::SuperblockCopy, Place::of_block(at));
    b.expected
}

/// Exactly these, each once.
pub fn compare(seed: u64, expected: &[Expected], found: &[Finding]) {
    let mut expected = expected.to_vec();
    let mut named: Vec<Expected> = found.iter().map(|finding| (finding.kind, finding.place)).collect();
    expected.sort_by_key(|e| format!("{e:?}"));
    named.sort_by_key(|e| format!("{e:?}"));
    assert_eq!(named, expected, "seed {seed}: {found:#?}");
}
