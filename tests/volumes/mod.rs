//! Volumes made by hand: formatted by the library, then given hosts, locks, waits and a small tree, block
//! by block, as hosts would have left them.

#![allow(dead_code)] // Each test file uses its part.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use lunfs::device::BlockDevice;
use lunfs::device::open::{OpenOptions as DeviceOptions, open_device};
use lunfs::format::{FormatOptions, format};
use lunfs::fs::dirtree::{DirTarget, DirTree, Inserted};
use lunfs::layout::cluster::{ClusterHeader, ClusterMap};
use lunfs::layout::demand::{Request, RequestBlock, Want};
use lunfs::layout::geometry::{GROUP_BLOCKS, GROUP_INODES, Geometry, lock_of_inode};
use lunfs::layout::inode::{Form, InodeDisk};
use lunfs::layout::lock::{LockKind, LockMode, LockRecord};
use lunfs::layout::slot::{Durations, SlotRecord, SlotState};
use lunfs::layout::superblock::Superblock;
use lunfs::layout::{Block, seal, zero_block};
use lunfs::tree::mem::MemStore;
use lunfs::types::{BLOCK_BYTES, BlockNo, Incarnation, InodeNo, Owner, Slot, SlotSet, Tenure};
use zerocopy::IntoBytes;

/// Runs one of our programs.
pub fn run(program: &str, args: &[&str]) -> Output {
    let path = match program {
        "mkfs" => env!("CARGO_BIN_EXE_mkfs-lunfs"),
        _ => env!("CARGO_BIN_EXE_lunfs"),
    };
    Command::new(path).args(args).output().unwrap()
}

pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A formatted file and what is needed to change its blocks behind everybody's back.
pub struct Volume {
    pub path: PathBuf,
    pub superblock: Superblock,
    pub file: File,
}

pub const DURATIONS: Durations = Durations { beat_ms: 40, lease_ms: 200, dead_ms: 500, hold_ms: 100 };

impl Volume {
    /// A tiny volume with four slots.
    pub fn tiny(dir: &Path) -> Self {
        let path = dir.join("volume");
        let geometry = Geometry::tiny(4);
        let options = DeviceOptions { create_size: Some(geometry.size_bytes()), ..DeviceOptions::default() };
        let dev = open_device(path.to_str().unwrap(), options).unwrap();
        let wish =
            FormatOptions { label: "handmade".into(), geometry: Some(geometry), ..FormatOptions::default() };
        let mut superblock = format(&*dev, &wish).unwrap().superblock;
        drop(dev);
        // Quick terms, so that tests need not wait for seconds.
        superblock.durations = Durations { hold_ms: 0, ..DURATIONS };
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let volume = Volume { path, superblock, file };
        let mut block = zero_block();
        for at in volume.superblock.geometry.superblock_copies().into_iter().chain([BlockNo(0)]) {
            volume.superblock.encode(at, &mut block);
            volume.put(at, &block[..]);
        }
        volume
    }

    pub fn spec(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub fn geometry(&self) -> Geometry {
        self.superblock.geometry
    }

    pub fn device(&self) -> std::sync::Arc<dyn BlockDevice> {
        open_device(self.spec(), DeviceOptions { read_only: true, ..DeviceOptions::default() }).unwrap()
    }

    pub fn put(&self, at: BlockNo, bytes: &[u8]) {
        self.file.write_all_at(bytes, at.offset_bytes()).unwrap();
    }

    pub fn get(&self, at: BlockNo) -> Box<Block> {
        let mut block = zero_block();
        self.file.read_exact_at(&mut block[..], at.offset_bytes()).unwrap();
        block
    }

    /// Checksum of the whole file and its length: equal before and after, nothing was written.
    pub fn fingerprint(&self) -> (u32, u64) {
        let bytes = std::fs::read(&self.path).unwrap();
        (crc32fast::hash(&bytes), self.file.metadata().unwrap().size())
    }

    pub fn slot_record(&self, slot: u16, state: SlotState, name: &str) -> SlotRecord {
        let mut record = SlotRecord::new_free(self.geometry().slot(Slot(slot)));
        record.state = state;
        record.incarnation = Incarnation(u64::from(slot) + 1);
        record.host_name = name.into();
        record.logical_block_bytes = 512;
        record.protocol = 1;
        record.durations = DURATIONS;
        record.wall_ns = lunfs::inspect::watch::wall_ns();
        record
    }

    pub fn put_slot(&self, record: &SlotRecord) {
        let mut block = zero_block();
        record.encode(self.superblock.volume, &mut block[..]);
        self.put(record.address, &block[..512]);
    }

    pub fn put_lock(&self, record: &LockRecord) {
        let mut block = self.get(record.address);
        record.encode(self.superblock.volume, &mut block[..]);
        self.put(record.address, &block[..]);
    }

    pub fn put_requests(&self, slot: u16, requests: Vec<Request>) {
        let mut block = zero_block();
        let address = self.geometry().request(Slot(slot));
        let incarnation = Incarnation(u64::from(slot) + 1);
        RequestBlock { address, incarnation, sequence: 1, requests }
            .encode(self.superblock.volume, &mut block);
        self.put(address, &block[..]);
    }

    pub fn put_sealed(&self, at: BlockNo, bytes: &[u8]) {
        let mut block = bytes.to_vec();
        seal(&mut block);
        self.put(at, &block);
    }

    fn enter(&self, directory: InodeNo, name: &str, child: InodeNo, mode: u32) {
        let mut block = self.get(directory.body());
        let body = InodeDisk::of_mut(&mut block);
        let tree = DirTree::new(self.superblock.volume, directory, self.superblock.hash_seed);
        let target = DirTarget { ino: child, generation: 1, kind: (mode >> 12) as u8 };
        let mut store = MemStore::default();
        let key = match tree.insert(&mut store, &mut body.content, name.as_bytes(), target).unwrap() {
            Inserted::Done(key) => key,
            other => panic!("{other:?}"),
        };
        self.put_sealed(directory.body(), &block[..]);

        let mut body = InodeDisk::new_free(self.superblock.volume, child);
        body.mode = mode.into();
        body.nlink = 1.into();
        body.generation = 1.into();
        body.parent = directory.0.into();
        body.parent_key = key.into();
        body.form = Form::Inline.code();
        if mode & libc::S_IFMT == libc::S_IFDIR {
            body.form = Form::Tree.code();
            let tree = DirTree::new(self.superblock.volume, child, self.superblock.hash_seed);
            tree.init(&mut body.content).unwrap();
        }
        self.put_sealed(child.body(), body.as_bytes());
    }

    /// alpha (slot 0) lives and holds `/vms/disk.img` exclusively; beta (slot 1) lives, waits for it and
    /// shares the root with alpha; gamma (slot 2) is claimed and silent; delta (slot 3) left. Also a
    /// request of beta for something that is no lock.
    pub fn populate(&self) -> Population {
        let g = self.geometry();
        let records = [
            self.slot_record(0, SlotState::Live, "alpha"),
            self.slot_record(1, SlotState::Live, "beta"),
            self.slot_record(2, SlotState::Live, "gamma"),
            SlotRecord {
                settled_up_to: Incarnation(4),
                net_blocks: 100,
                ..self.slot_record(3, SlotState::Left, "delta")
            },
        ];
        records.iter().for_each(|r| self.put_slot(r));

        // One inode group in cluster 0, its first two inodes used.
        let group = BlockNo((g.cluster(0).0 + g.cluster_overhead(0)).next_multiple_of(GROUP_BLOCKS));
        let chunk = ((group.0 - g.cluster(0).0) / GROUP_BLOCKS) as usize;
        let mut map = ClusterMap::new_empty(&g, self.superblock.volume, 0, 0);
        map.chunks[chunk].used = u16::MAX.into();
        map.chunks[chunk].group = 1;
        map.chunks[chunk].inodes = 0b11;
        self.put_sealed(g.cluster_map(0, 0), map.as_bytes());
        let mut header = ClusterHeader::new_empty(&g, self.superblock.volume, 0);
        header.summaries[0].written = 1;
        header.groups = 1.into();
        self.put_sealed(g.cluster_header(0), header.as_bytes());
        let inode = |i: u64| InodeNo(group.0 + GROUP_INODES + i);
        for i in 0..GROUP_INODES {
            self.put_lock_anew(&LockRecord::new_free(LockKind::Inode, lock_of_inode(inode(i))));
            let free = InodeDisk::new_free(self.superblock.volume, inode(i));
            self.put_sealed(inode(i).body(), free.as_bytes());
        }
        let (vms, disk) = (inode(0), inode(1));
        self.enter(g.root(), "vms", vms, 0o40755);
        self.enter(vms, "disk.img", disk, 0o100644);

        let owner = |slot: u16| Owner { slot: Slot(slot), incarnation: Incarnation(u64::from(slot) + 1) };
        let mut lock = LockRecord::new_free(LockKind::Inode, lock_of_inode(disk));
        lock.mode = LockMode::Exclusive { owner: owner(0), tenure: Tenure(7) };
        lock.openers = SlotSet::of(Slot(0)).with(Slot(2));
        lock.waiters = SlotSet::of(Slot(1));
        lock.next = Some(owner(1));
        (lock.swap_counter, lock.change_counter) = (12, 3);
        self.put_lock(&lock);
        let mut shared = LockRecord::new_free(LockKind::Inode, lock_of_inode(g.root()));
        shared.mode = LockMode::Shared;
        shared.sharers = SlotSet::of(Slot(0)).with(Slot(1));
        shared.swap_counter = 2;
        self.put_lock(&shared);
        let mut cluster = LockRecord::new_free(LockKind::Cluster, g.cluster(1));
        cluster.mode = LockMode::Exclusive { owner: owner(2), tenure: Tenure(1) };
        cluster.swap_counter = 1;
        self.put_lock(&cluster);
        self.put_requests(
            1,
            vec![
                Request { lock: lock.address, want: Want::Exclusive, since: 9 },
                Request { lock: BlockNo(5), want: Want::Shared, since: 0 },
            ],
        );
        Population { records, vms, disk }
    }

    fn put_lock_anew(&self, record: &LockRecord) {
        let mut block = [0; BLOCK_BYTES];
        record.encode(self.superblock.volume, &mut block);
        self.put(record.address, &block);
    }
}

/// What [`Volume::populate`] made.
pub struct Population {
    pub records: [SlotRecord; 4],
    pub vms: InodeNo,
    pub disk: InodeNo,
}

/// Beats for slots until `body` is done.
pub fn while_beating<T>(volume: &Volume, records: &[SlotRecord], body: impl FnOnce() -> T) -> T {
    use std::sync::atomic::{AtomicBool, Ordering};
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut records = records.to_vec();
            while !stop.load(Ordering::Relaxed) {
                for record in &mut records {
                    record.beat += 1;
                    record.wall_ns = lunfs::inspect::watch::wall_ns();
                    volume.put_slot(record);
                }
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
        stop.store(true, Ordering::Relaxed);
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
