//! A device that holds what was written to it and makes up the rest: a whole, consistent volume of any size, whose
//! blocks follow from their addresses. So a volume of 64 TiB with ten million files, which are 80 GB of
//! metadata, needs some MiB, and can be changed like any other.
//!
//! Every cluster but the first is filled after one [`Shape`] (`contents`); the first has the nodes of the root and of one
//! big directory. The system region is what mkfs wrote, and what hosts have written since (`system`).
//!
//! Not for: performance of devices (a read costs what making up its blocks costs).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use lunfs::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry};
use lunfs::format::{FormatOptions, format};
use lunfs::layout::geometry::{GROUP_BLOCKS, GROUP_INODES, Geometry};
use lunfs::layout::superblock::Superblock;
use lunfs::layout::{Block, seal, zero_block};
use lunfs::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, InodeNo};

use super::nodes::{Shelves, node_block};
use super::shape::{ENTRY_BYTES, Shape, file_name, sorted};

pub const LOGICAL_BLOCK: usize = 512;

pub fn cluster_name(cluster: u64) -> String {
    format!("cluster-{cluster:06}")
}
pub const BIG: &str = "the-big-folder";

pub struct Generated {
    pub superblock: Superblock,
    pub shape: Shape,
    /// Entries of the root: clusters from 1 on, then the big directory.
    pub root: Vec<(u64, u32)>,
    pub root_keys: Vec<u64>,
    pub big: Vec<(u64, u32)>,
    pub root_nodes: (BlockNo, Shelves),
    pub big_nodes: (BlockNo, Shelves),
    pub big_ino: InodeNo,
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
        this.write_system();
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

    pub fn put_sealed(&self, at: BlockNo, bytes: &[u8]) {
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
}
