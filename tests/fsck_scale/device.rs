//! A device that holds what was written to it and makes up the rest: a whole, consistent volume of any size, whose
//! blocks follow from their addresses. So a volume of 64 TiB with ten million files, which are 80 GB of
//! metadata, needs some MiB, and can be changed like any other.
//!
//! Every cluster but the first is filled after one [`Shape`]; the first has the nodes of the root and of one big
//! directory. The system region is what mkfs wrote.
//!
//! Not for: performance of devices (a read costs what making up its blocks costs).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use lunfs::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry};
use lunfs::format::{FormatOptions, format};
use lunfs::fs::dirtree::{DirTarget, DirTree, Inserted};
use lunfs::layout::cluster::{ClusterHeader, ClusterMap};
use lunfs::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES, Geometry};
use lunfs::layout::inode::{CONTENT_BYTES, Form, InodeDisk};
use lunfs::layout::lock::{LockKind, LockMode, LockRecord};
use lunfs::layout::slot::{SlotRecord, SlotState};
use lunfs::layout::superblock::Superblock;
use lunfs::layout::{Block, Header, Magic, RECORD_BYTES, seal, zero_block};
use lunfs::tree::mem::MemStore;
use lunfs::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, Incarnation, InodeNo, Owner, Slot, Tenure};
use zerocopy::IntoBytes;

use super::nodes::{Kind, Shelves, Tree, node_block};
use super::shape::{Content, ENTRY_BYTES, Names, Role, Shape, file_name, key_of, sorted, sub_name};

const LOGICAL_BLOCK: usize = 512;

pub fn cluster_name(cluster: u64) -> String {
    format!("cluster-{cluster:06}")
}
const BIG: &str = "the-big-folder";

pub struct Generated {
    pub superblock: Superblock,
    pub shape: Shape,
    /// Entries of the root: clusters from 1 on, then the big directory.
    root: Vec<(u64, u32)>,
    root_keys: Vec<u64>,
    big: Vec<(u64, u32)>,
    root_nodes: (BlockNo, Shelves),
    big_nodes: (BlockNo, Shelves),
    big_ino: InodeNo,
    stored: RwLock<BTreeMap<u64, Box<Block>>>,
    size_bytes: u64,
    commands: AtomicU64,
    bytes: AtomicU64,
    at_once: AtomicU64,
    most_at_once: AtomicU64,
    /// Time that each read takes more, in microseconds.
    pub latency_us: AtomicU64,
}

/// Nothing but what was written.
struct Blank {
    size_bytes: u64,
    stored: RwLock<BTreeMap<u64, Box<Block>>>,
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|b| *b == 0)
}

/// What both devices do alike.
macro_rules! device {
    ($device:ty) => {
        impl BlockDevice for $device {
            fn geometry(&self) -> DeviceGeometry {
                DeviceGeometry {
                    logical_block_bytes: LOGICAL_BLOCK as u32,
                    size_bytes: self.size_bytes,
                    volatile_cache: false,
                    hold_time: Duration::ZERO,
                }
            }
            fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
                self.begin(buf.len());
                let (mut at, mut rest) = (offset_bytes, buf);
                while !rest.is_empty() {
                    let within = (at % BLOCK_BYTES_U64) as usize;
                    let (now, later) = rest.split_at_mut((BLOCK_BYTES - within).min(rest.len()));
                    let block_no = BlockNo(at / BLOCK_BYTES_U64);
                    match <&mut Block>::try_from(&mut *now) {
                        Ok(block) => self.block(block_no, block),
                        Err(_) => {
                            let mut block = zero_block();
                            self.block(block_no, &mut block);
                            now.copy_from_slice(&block[within..within + now.len()]);
                        }
                    }
                    at += now.len() as u64;
                    rest = later;
                }
                self.end();
                Ok(())
            }
            fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
                let (mut at, mut rest) = (offset_bytes, data);
                while !rest.is_empty() {
                    let within = (at % BLOCK_BYTES_U64) as usize;
                    let (now, later) = rest.split_at((BLOCK_BYTES - within).min(rest.len()));
                    let mut block = zero_block();
                    self.block(BlockNo(at / BLOCK_BYTES_U64), &mut block);
                    block[within..within + now.len()].copy_from_slice(now);
                    self.store(at / BLOCK_BYTES_U64, block);
                    at += now.len() as u64;
                    rest = later;
                }
                Ok(())
            }
            fn compare_and_write(
                &self,
                at: u64,
                old: &[u8],
                new: &[u8],
            ) -> Result<CompareOutcome, DeviceError> {
                // One user at a time: a check writes nothing, and tests break it from one thread.
                let mut found = vec![0; old.len()];
                self.read(at, &mut found)?;
                if found != old {
                    return Ok(CompareOutcome::Miscompare);
                }
                self.write(at, new).map(|()| CompareOutcome::Swapped)
            }
            fn flush(&self) -> Result<(), DeviceError> {
                Ok(())
            }
            fn discard(&self, _: u64, _: u64) -> Result<(), DeviceError> {
                Ok(())
            }
            fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
                self.write(offset_bytes, &vec![0; len_bytes as usize])
            }
            fn resets(&self) -> u64 {
                0
            }
        }
    };
}
device!(Blank);
device!(Generated);

impl Blank {
    fn begin(&self, _: usize) {}
    fn end(&self) {}

    fn block(&self, at: BlockNo, into: &mut Block) {
        match self.stored.read().unwrap().get(&at.0) {
            Some(stored) => into.copy_from_slice(&stored[..]),
            None => into.fill(0),
        }
    }

    fn store(&self, at: u64, block: Box<Block>) {
        match is_zero(&block[..]) {
            true => drop(self.stored.write().unwrap().remove(&at)),
            false => drop(self.stored.write().unwrap().insert(at, block)),
        }
    }
}

impl Generated {
    /// About so many files, filling so much of the volume, in per cent.
    pub fn new(size_bytes: u64, files: u64, full: u64) -> Arc<Self> {
        let blank = Blank { size_bytes, stored: RwLock::default() };
        let superblock = format(&blank, &FormatOptions::default()).unwrap().superblock;
        let (g, seed, volume) = (superblock.geometry, superblock.hash_seed, superblock.volume);
        let filled = g.clusters() - 2;
        assert_eq!(g.cluster_len(filled), g.cluster_blocks, "the last one alone may be shorter");
        let shape = Shape::new(&g, volume, &seed, files / filled, full);

        let tops = (1..=filled).map(cluster_name).chain([BIG.into()]);
        let root = sorted(&seed, tops);
        let mut root_keys = vec![0; root.len()];
        root.iter().for_each(|(key, i)| root_keys[*i as usize] = *key);
        let big = sorted(&seed, (0..filled * shape.big.len() as u64).map(file_name));

        // The first cluster: one group, then the nodes of the root, then those of the big directory.
        let first_chunk = g.cluster_overhead(0).div_ceil(GROUP_BLOCKS);
        let group = g.cluster(0).plus(first_chunk * GROUP_BLOCKS);
        let big_ino = InodeNo(group.0 + GROUP_INODES);
        let root_shelves = Shelves::new(root.len(), ENTRY_BYTES);
        let root_nodes = (group.plus(GROUP_BLOCKS), root_shelves);
        let big_nodes = (root_nodes.0.plus(root_shelves.nodes()), Shelves::new(big.len(), ENTRY_BYTES));
        let stored = blank.stored.into_inner().unwrap();
        // What mkfs wrote of the filled clusters is made up from now on, but for superblocks.
        let keep = |at: &u64| match g.cluster_of(BlockNo(*at)) {
            Some(cluster) if (1..=filled).contains(&cluster) => at - g.cluster(cluster).0 == 2,
            _ => true,
        };
        let stored = stored.into_iter().filter(|(at, _)| keep(at)).collect();
        let this = Generated {
            root,
            root_keys,
            big,
            root_nodes,
            big_nodes,
            big_ino,
            stored: RwLock::new(stored),
            size_bytes,
            commands: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            at_once: AtomicU64::new(0),
            most_at_once: AtomicU64::new(0),
            latency_us: AtomicU64::new(0),
            superblock,
            shape,
        };
        this.system(filled);
        Arc::new(this)
    }

    fn begin(&self, bytes: usize) {
        self.commands.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        let now = self.at_once.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_at_once.fetch_max(now, Ordering::Relaxed);
        let latency = self.latency_us.load(Ordering::Relaxed);
        if latency > 0 {
            std::thread::sleep(Duration::from_micros(latency));
        }
    }

    fn end(&self) {
        self.at_once.fetch_sub(1, Ordering::Relaxed);
    }

    /// The most reads that were under way together.
    pub fn most_at_once(&self) -> u64 {
        self.most_at_once.load(Ordering::Relaxed)
    }

    /// Commands that read, and what they read, since the last call.
    pub fn reads(&self) -> (u64, u64) {
        (self.commands.swap(0, Ordering::Relaxed), self.bytes.swap(0, Ordering::Relaxed))
    }

    pub fn g(&self) -> Geometry {
        self.superblock.geometry
    }

    /// Clusters that are filled: from 1 to this one.
    pub fn filled(&self) -> u64 {
        self.g().clusters() - 2
    }

    pub fn get(&self, at: BlockNo) -> Box<Block> {
        let mut block = zero_block();
        self.block(at, &mut block);
        block
    }

    pub fn put(&self, at: BlockNo, block: Box<Block>) {
        self.store(at.0, block);
    }

    /// Inode `i` of a cluster.
    pub fn ino(&self, cluster: u64, i: u32) -> InodeNo {
        let (group, i) = (u64::from(i) / GROUP_INODES, u64::from(i) % GROUP_INODES);
        let chunk = self.shape.first_chunk + group;
        InodeNo(self.g().cluster(cluster).0 + chunk * GROUP_BLOCKS + GROUP_INODES + i)
    }

    /// As many orphans as fit the bodies of their directories; inodes for more are free ones.
    fn has_orphan(&self, cluster: u64) -> bool {
        cluster <= 64 * u64::from(self.g().slots)
    }

    /// What is written once: root, orphan directories, the first cluster, and a slot with the sums.
    fn system(&self, filled: u64) {
        let g = self.g();
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

    fn put_sealed(&self, at: BlockNo, bytes: &[u8]) {
        let mut block = zero_block();
        block.copy_from_slice(bytes);
        seal(&mut block[..]);
        self.put(at, block);
    }

    fn store(&self, at: u64, block: Box<Block>) {
        self.stored.write().unwrap().insert(at, block);
    }

    /// The block as it is: written, made up, or zero.
    fn block(&self, at: BlockNo, into: &mut Block) {
        if let Some(stored) = self.stored.read().unwrap().get(&at.0) {
            return into.copy_from_slice(&stored[..]);
        }
        into.fill(0);
        let g = self.g();
        let Some(cluster) = g.cluster_of(at) else { return };
        let offset = at.0 - g.cluster(cluster).0;
        if cluster == 0 {
            let (root, big) = (at.0.checked_sub(self.root_nodes.0.0), at.0.checked_sub(self.big_nodes.0.0));
            let volume = self.superblock.volume;
            if let Some(node) = big.filter(|node| *node < self.big_nodes.1.nodes()) {
                self.big_tree(|tree| node_block(into, volume, &self.big_nodes.1, tree, node as usize));
            } else if let Some(node) = root.filter(|node| *node < self.root_nodes.1.nodes()) {
                self.root_tree(|tree| node_block(into, volume, &self.root_nodes.1, tree, node as usize));
            }
        } else if cluster <= self.filled() {
            self.made_up(cluster, offset, into);
        }
    }

    fn made_up(&self, cluster: u64, offset: u64, into: &mut Block) {
        let g = self.g();
        let (shape, volume) = (&self.shape, self.superblock.volume);
        let (lock, overhead) = (g.cluster(cluster), g.cluster_overhead(cluster));
        let groups = shape.first_chunk * GROUP_BLOCKS..(shape.first_chunk + shape.groups) * GROUP_BLOCKS;
        match offset {
            0 => LockRecord::new_free(LockKind::Cluster, lock).encode(volume, &mut into[..RECORD_BYTES]),
            1 => {
                into.copy_from_slice(shape.header.as_bytes());
                let header = Header::new(Magic::ClusterHeader, volume, g.cluster_header(cluster), lock);
                into[..0x40].copy_from_slice(header.as_bytes());
                into[0x40..0x48].copy_from_slice(&cluster.to_le_bytes());
                seal(&mut into[..]);
            }
            2 => {}
            _ if offset < overhead => {
                let Some(map) = &shape.maps[offset as usize - 3] else { return };
                into.copy_from_slice(map.as_bytes());
                let header = Header::new(Magic::ClusterMap, volume, lock.plus(offset), lock);
                into[..0x40].copy_from_slice(header.as_bytes());
                seal(&mut into[..]);
            }
            _ if groups.contains(&offset) && offset % GROUP_BLOCKS < GROUP_INODES => {
                self.lock(lock.plus(offset), into);
            }
            _ if groups.contains(&offset) => {
                let group = (offset - groups.start) / GROUP_BLOCKS;
                let i = group * GROUP_INODES + offset % GROUP_BLOCKS - GROUP_INODES;
                self.body(cluster, i as u32, into);
            }
            _ => {
                if let Some((i, node)) = shape.nodes.get(&offset) {
                    let inode = &shape.inodes[*i as usize];
                    self.with_tree(cluster, *i, &mut |tree| {
                        node_block(into, volume, &inode.nodes, tree, *node as usize);
                    });
                }
            }
        }
    }

    /// Locks as hosts leave them: most free, some still held by a life that left, some shared.
    fn lock(&self, at: BlockNo, into: &mut Block) {
        let mut lock = LockRecord::new_free(LockKind::Inode, at);
        if at.0 % 7 == 3 {
            let owner = Owner { slot: Slot(0), incarnation: Incarnation(1) };
            lock.mode = LockMode::Exclusive { owner, tenure: Tenure(3) };
            (lock.swap_counter, lock.change_counter) = (3, 2);
        }
        lock.encode(self.superblock.volume, &mut into[..RECORD_BYTES]);
    }

    /// File type as entries have it.
    fn kind(&self, i: u32) -> u8 {
        (self.mode(i) >> 12) as u8
    }

    pub fn mode(&self, i: u32) -> u32 {
        let inode = &self.shape.inodes[i as usize];
        match (inode.role, &inode.content) {
            (Role::Free, _) => 0,
            (Role::Top | Role::Sub(_), _) => libc::S_IFDIR | 0o755,
            (_, Content::Symlink) => libc::S_IFLNK | 0o777,
            (_, Content::Pipe) => libc::S_IFIFO | 0o644,
            _ => libc::S_IFREG | 0o644,
        }
    }

    fn generation(&self, i: u32) -> u32 {
        1 + i % 3 * u32::from(self.shape.inodes[i as usize].role != Role::Orphan)
    }

    fn entry(&self, cluster: u64, i: u32, name: &str) -> Vec<u8> {
        value(self.ino(cluster, i), self.generation(i), self.kind(i), name)
    }

    fn root_entry(&self, i: usize) -> Vec<u8> {
        let number = u64::from(self.root[i].1);
        match number == self.filled() {
            true => value(self.big_ino, 1, (libc::S_IFDIR >> 12) as u8, BIG),
            false => self.entry(number + 1, 0, &cluster_name(number + 1)),
        }
    }

    /// The two trees of the first cluster.
    fn big_tree<T>(&self, then: impl FnOnce(&Tree<'_>) -> T) -> T {
        let per_cluster = self.shape.big.len() as u32;
        let value = |i: usize| {
            let number = self.big[i].1;
            let inode = self.shape.big[(number % per_cluster) as usize];
            self.entry(u64::from(1 + number / per_cluster), inode, &file_name(number.into()))
        };
        let (at, key) = (self.big_nodes.0, &|i: usize| self.big[i].0);
        then(&Tree { kind: Kind::Directory, owner: self.big_ino, at, key, value: &value })
    }

    fn root_tree<T>(&self, then: impl FnOnce(&Tree<'_>) -> T) -> T {
        let (at, key) = (self.root_nodes.0, &|i: usize| self.root[i].0);
        let value = |i| self.root_entry(i);
        then(&Tree { kind: Kind::Directory, owner: self.g().root(), at, key, value: &value })
    }

    fn directory(
        &self,
        block: &mut Block,
        ino: InodeNo,
        parent: (InodeNo, u64),
        entries: usize,
        nodes: &(BlockNo, Shelves),
        nlink: u32,
    ) {
        block.copy_from_slice(InodeDisk::new_free(self.superblock.volume, ino).as_bytes());
        let body = InodeDisk::of_mut(block);
        body.mode = (libc::S_IFDIR | 0o755).into();
        body.form = Form::Tree.code();
        body.generation = 1.into();
        body.nlink = nlink.into();
        body.entries = (entries as u64).into();
        body.blocks = nodes.1.nodes().into();
        (body.parent, body.parent_key) = (parent.0.0.into(), parent.1.into());
    }

    fn body(&self, cluster: u64, i: u32, into: &mut Block) {
        let (g, inode) = (self.g(), &self.shape.inodes[i as usize]);
        let ino = self.ino(cluster, i);
        let nodes = (g.cluster(cluster).plus(inode.nodes_at), inode.nodes);
        let names = |names: &Names| names.sorted.len();
        match inode.role {
            Role::Top => {
                let parent = (g.root(), self.root_keys[cluster as usize - 1]);
                let nlink = 2 + self.shape.subs.len() as u32;
                self.directory(into, ino, parent, names(&self.shape.top), &nodes, nlink);
            }
            Role::Sub(sub) => {
                let key = key_of(&self.superblock.hash_seed, &sub_name(sub));
                let parent = (self.ino(cluster, 0), key);
                self.directory(into, ino, parent, names(&self.shape.subs[sub]), &nodes, 2);
            }
            _ => into.copy_from_slice(InodeDisk::new_free(self.superblock.volume, ino).as_bytes()),
        }
        let body = InodeDisk::of_mut(into);
        body.generation = self.generation(i).into();
        body.mode = self.mode(i).into();
        match (inode.role, &inode.content) {
            (Role::Free, _) => {}
            (Role::Top | Role::Sub(_), _) => {}
            (_, content) => {
                body.nlink = inode.nlink.into();
                let (form, size, blocks) = match content {
                    Content::Inline(size) => (Form::Inline, *size, 0),
                    Content::Symlink => (Form::Inline, 11, 0),
                    Content::Pipe => (Form::Empty, 0, 0),
                    Content::Pieces(pieces) => {
                        let end = pieces.last().map_or(0, |p| p.logical + p.blocks);
                        let data: u64 = pieces.iter().map(|p| p.blocks).sum();
                        (Form::Tree, end * BLOCK_BYTES_U64 - 7, data + inode.nodes.nodes())
                    }
                };
                body.form = form.code();
                (body.size, body.blocks) = (size.into(), blocks.into());
                if let Content::Symlink = content {
                    body.content[..11].copy_from_slice(b"the/target/");
                }
            }
        }
        if body.form == Form::Tree.code() {
            self.with_tree(cluster, i, &mut |tree| {
                let content: &mut [u8; CONTENT_BYTES] = &mut InodeDisk::of_mut(into).content;
                inode.nodes.write(content, tree, None);
            });
        }
        seal(&mut into[..]);
    }

    /// The tree of a file or directory of a filled cluster.
    fn with_tree(&self, cluster: u64, i: u32, then: &mut dyn FnMut(&Tree<'_>)) {
        let inode = &self.shape.inodes[i as usize];
        let start = self.g().cluster(cluster);
        let (owner, at) = (self.ino(cluster, i), start.plus(inode.nodes_at));
        let of_names = |names: &Names, name: &dyn Fn(usize) -> String, then: &mut dyn FnMut(&Tree<'_>)| {
            let value = |n: usize| {
                let number = names.sorted[n].1 as usize;
                let name = match number + 1 == names.inodes.len() {
                    true => super::shape::AGAIN.to_owned(),
                    false => name(number),
                };
                self.entry(cluster, names.inodes[number], &name)
            };
            then(&Tree { kind: Kind::Directory, owner, at, key: &|n| names.sorted[n].0, value: &value });
        };
        match (inode.role, &inode.content) {
            (Role::Top, _) => of_names(&self.shape.top, &sub_name, then),
            (Role::Sub(sub), _) => of_names(&self.shape.subs[sub], &|n| file_name(n as u64), then),
            (_, Content::Pieces(pieces)) => {
                let value = |n: usize| {
                    let piece = &pieces[n];
                    let mut value = start.plus(piece.at).0.to_le_bytes().to_vec();
                    value.extend((piece.blocks as u32).to_le_bytes());
                    value.extend(u32::from(piece.unwritten).to_le_bytes());
                    value
                };
                then(&Tree { kind: Kind::Extents, owner, at, key: &|n| pieces[n].logical, value: &value });
            }
            other => panic!("no tree: {other:?}"),
        }
    }
}

fn value(ino: InodeNo, generation: u32, kind: u8, name: &str) -> Vec<u8> {
    let mut value = ino.0.to_le_bytes().to_vec();
    value.extend(generation.to_le_bytes());
    value.push(kind);
    value.extend(name.as_bytes());
    assert_eq!(value.len(), ENTRY_BYTES);
    value
}
