//! A small volume with something of every kind, and the means to break it block by block.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use lunfs::device::BlockDevice;
use lunfs::device::sim::{LunSnapshot, SimLun, SimLunOptions};
use lunfs::fs::api::Operations;
use lunfs::fs::dirtree::DirTree;
use lunfs::fsck::finding::Finding;
use lunfs::fsck::repair::{Allow, Repaired, repair};
use lunfs::fsck::{self, Report};
use lunfs::heartbeat::HostIdentity;
use lunfs::layout::cluster::{ClusterHeader, ClusterMap};
use lunfs::layout::geometry::Geometry;
use lunfs::layout::inode::{CONTENT_BYTES, InodeDisk};
use lunfs::layout::lock::LockRecord;
use lunfs::layout::slot::SlotRecord;
use lunfs::layout::superblock::Superblock;
use lunfs::layout::{Block, seal, zero_block};
use lunfs::rt::HostTag;
use lunfs::rt::sim::{Simulation, on_host};
use lunfs::testing::audit::audit;
use lunfs::testing::cluster::{Cluster, Formatted, cx};
use lunfs::types::{BlockNo, InodeNo, Slot};
use lunfs::volume::{FencingMode, MountOptions, Volume};
use zerocopy::FromBytes;

/// What names lead to: type, size, links and contents.
pub type Listing = BTreeMap<String, (u32, u64, u32, Vec<u8>)>;

/// The inodes of the population.
#[derive(Clone, Copy)]
pub struct Inodes {
    pub dir: InodeNo,
    /// So many extents that they have a tree node.
    pub file: InodeNo,
    /// Three whole blocks, each an extent.
    pub other: InodeNo,
    pub small: InodeNo,
    pub a: InodeNo,
    pub b: InodeNo,
}

#[derive(Clone)]
pub struct Populated {
    pub superblock: Superblock,
    pub inodes: Inodes,
    pub listing: Listing,
    lun: SimLunOptions,
    snapshot: LunSnapshot,
}

const BLOCK: u64 = 4096;

fn populate(fs: &dyn Operations) -> Inodes {
    let root = fs.root();
    let mkdir = |parent, name: &[u8]| fs.mkdir(&cx(), parent, name, 0o755).unwrap().value.ino;
    let create =
        |parent, name: &[u8]| fs.mknod(&cx(), parent, name, libc::S_IFREG | 0o644, 0).unwrap().value.ino;
    let dir = mkdir(root, b"dir");
    for i in 0..200 {
        create(dir, format!("a-name-that-takes-some-room-{i:04}").as_bytes());
    }
    let (file, other, small) = (create(root, b"file"), create(root, b"other"), create(root, b"small"));
    for i in 0..200u64 {
        fs.write(&cx(), file, None, i * 2 * BLOCK, &[i as u8 + 1; 4096], false).unwrap();
    }
    for i in 0..3u64 {
        fs.write(&cx(), other, None, i * 2 * BLOCK, &[0xee; 4096], false).unwrap();
    }
    fs.write(&cx(), small, None, 0, b"inline", false).unwrap();
    fs.symlink(&cx(), root, b"link", b"dir/x").unwrap();
    let a = mkdir(root, b"a");
    let b = mkdir(a, b"b");
    create(b, b"deep");
    Inodes { dir, file, other, small, a, b }
}

fn list(fs: &dyn Operations, path: &str, ino: InodeNo, into: &mut Listing) {
    let mut cookie = 0;
    loop {
        let entries = fs.readdir(&cx(), ino, cookie, 1 << 16, false).unwrap().value;
        let Some(last) = entries.last() else { return };
        cookie = last.cookie;
        for entry in &entries {
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let name = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
            let at = fs.lookup(&cx(), ino, &entry.name).unwrap().value;
            let attributes = fs.getattr(&cx(), at.ino).unwrap().value;
            let contents = match attributes.mode & libc::S_IFMT {
                libc::S_IFREG => fs.read(&cx(), at.ino, None, 0, 1 << 22).unwrap().value.to_vec(),
                libc::S_IFLNK => fs.readlink(&cx(), at.ino).unwrap().value,
                _ => Vec::new(),
            };
            let size = if attributes.mode & libc::S_IFMT == libc::S_IFDIR { 0 } else { attributes.size };
            into.insert(name.clone(), (attributes.mode, size, attributes.nlink, contents));
            if attributes.mode & libc::S_IFMT == libc::S_IFDIR {
                list(fs, &name, at.ino, into);
            }
        }
    }
}

/// Made once.
pub fn populated() -> &'static Populated {
    static ONCE: OnceLock<Populated> = OnceLock::new();
    ONCE.get_or_init(|| {
        let formatted = Formatted::tiny(4);
        Simulation::new(1).run(move || {
            let cluster = Cluster::start(&formatted, 1);
            let lun = cluster.lun.clone();
            let inodes = cluster.on(0, populate);
            let mut listing = Listing::new();
            let root = cluster.root();
            cluster.on(0, |fs| list(fs, "", root, &mut listing));
            let superblock = cluster.superblock.clone();
            cluster.finish();
            let snapshot = lun.snapshot();
            Populated { superblock, inodes, listing, lun: formatted.lun.clone(), snapshot }
        })
    })
}

/// A copy of the volume to break.
pub struct Broken {
    pub lun: SimLun,
    pub geometry: Geometry,
    pub superblock: Superblock,
    pub inodes: Inodes,
}

pub fn host(tag: u16) -> HostIdentity {
    HostIdentity {
        name: format!("host{tag}"),
        uuid: [tag as u8 + 50; 16],
        boot_id: [tag as u8; 16],
        pid: 1,
        pid_namespace: 1,
        is_gone: |_| false,
    }
}

impl Broken {
    /// Inside a simulation.
    pub fn new(from: &Populated) -> Self {
        let lun = SimLun::new(from.lun.clone());
        lun.restore(&from.snapshot);
        let superblock = from.superblock.clone();
        Broken { lun, geometry: superblock.geometry, superblock, inodes: from.inodes }
    }

    pub fn get(&self, at: BlockNo) -> Box<Block> {
        let mut block = zero_block();
        block.copy_from_slice(&self.lun.contents(at.offset_bytes(), 4096));
        block
    }

    pub fn put(&self, at: BlockNo, bytes: &[u8]) {
        self.lun.overwrite(at.offset_bytes(), bytes);
    }

    /// Something that nothing can be read from.
    pub fn garbage(&self, at: BlockNo) {
        self.put(at, &[0x5a; 4096]);
    }

    pub fn sealed(&self, at: BlockNo, change: impl FnOnce(&mut Block)) {
        let mut block = self.get(at);
        change(&mut block);
        seal(&mut block[..]);
        self.put(at, &block[..]);
    }

    pub fn body(&self, ino: InodeNo, change: impl FnOnce(&mut InodeDisk)) {
        self.sealed(ino.body(), |block| change(InodeDisk::of_mut(block)));
    }

    pub fn read_body(&self, ino: InodeNo) -> Box<InodeDisk> {
        Box::new(*InodeDisk::of(&self.get(ino.body())))
    }

    pub fn lock(&self, at: BlockNo, change: impl FnOnce(&mut LockRecord)) {
        let mut block = self.get(at);
        let mut record = LockRecord::decode(&block[..], self.superblock.volume, at).unwrap();
        change(&mut record);
        record.encode(self.superblock.volume, &mut block[..]);
        self.put(at, &block[..]);
    }

    pub fn slot(&self, slot: u16, change: impl FnOnce(&mut SlotRecord)) {
        let at = self.geometry.slot(Slot(slot));
        let mut block = self.get(at);
        let mut record = SlotRecord::decode(&block[..], self.superblock.volume, at).unwrap();
        change(&mut record);
        record.encode(self.superblock.volume, &mut block[..]);
        self.put(at, &block[..]);
    }

    /// The cluster of the small file.
    pub fn cluster(&self) -> u64 {
        self.geometry.cluster_of(self.inodes.small.body()).unwrap()
    }

    pub fn header(&self, change: impl FnOnce(&mut ClusterHeader)) {
        self.sealed(self.geometry.cluster_header(self.cluster()), |block| {
            change(ClusterHeader::mut_from_bytes(&mut block[..]).unwrap());
        });
    }

    /// Changes the map of the cluster that has a block; the header counts it.
    pub fn map_of(&self, at: BlockNo, change: impl FnOnce(&mut ClusterMap, usize, u64)) {
        let cluster = self.geometry.cluster_of(at).unwrap();
        let offset = at.0 - self.geometry.cluster(cluster).0;
        let mut counts = (0, 0);
        self.sealed(self.geometry.cluster_map(cluster, 0), |block| {
            let map = ClusterMap::mut_from_bytes(&mut block[..]).unwrap();
            change(map, (offset / 16) as usize, offset % 16);
            counts = (map.free_blocks(), map.free_inodes());
        });
        self.sealed(self.geometry.cluster_header(cluster), |block| {
            let header = ClusterHeader::mut_from_bytes(&mut block[..]).unwrap();
            header.summaries[0].free_blocks = (counts.0 as u16).into();
            header.summaries[0].free_inodes = (counts.1 as u16).into();
            (header.free_blocks, header.free_inodes) = (counts.0.into(), counts.1.into());
        });
    }

    /// Works on the entries of a directory whose tree is all in its root.
    pub fn entries(
        &self,
        directory: InodeNo,
        change: impl FnOnce(&DirTree, &mut [u8; CONTENT_BYTES]) -> i64,
    ) {
        let tree = DirTree::new(self.superblock.volume, directory, self.superblock.hash_seed);
        self.body(directory, |body| {
            let more = change(&tree, &mut body.content);
            body.entries = body.entries.get().saturating_add_signed(more).into();
        });
    }

    /// What a check finds.
    pub fn check(&self) -> (Report, Vec<Finding>) {
        audit(&self.lun)
    }

    pub fn repair(&self, allow: Allow) -> (Repaired, Vec<Finding>) {
        self.try_repair(allow).expect("a repair that ends")
    }

    /// None: it was refused, with a reason.
    pub fn try_repair(&self, allow: Allow) -> Option<(Repaired, Vec<Finding>)> {
        let tag = HostTag(7);
        let device: Arc<dyn BlockDevice> = self.lun.attach(tag);
        let mut told = Vec::new();
        let repaired = on_host(tag, || repair(device, &host(7), allow, &mut told));
        match repaired {
            Ok(repaired) => Some((repaired, told)),
            Err(e) => {
                eprintln!("refused: {e}");
                None
            }
        }
    }

    pub fn examine(&self) -> Result<(Report, Vec<Finding>), fsck::FsckError> {
        let tag = HostTag(7);
        let device: Arc<dyn BlockDevice> = self.lun.attach(tag);
        let mut told = Vec::new();
        on_host(tag, || fsck::examine(device, &mut told)).map(|report| (report, told))
    }

    /// Mounts, lists everything, leaves.
    pub fn listing(&self) -> Listing {
        let tag = HostTag(3);
        let device: Arc<dyn BlockDevice> = self.lun.attach(tag);
        on_host(tag, || {
            let options =
                MountOptions { host: host(3), read_only: false, cache_mib: 4, fencing: FencingMode::Auto };
            let volume = Volume::mount(device, options).unwrap();
            let mut found = Listing::new();
            list(&*volume.operations(), "", self.geometry.root(), &mut found);
            volume.leave().unwrap();
            found
        })
    }
}
