//! What a golden image holds: every structure of the format, as three hosts and a crash leave them. From one seed, in
//! simulated time, so that making it again gives the same bytes as long as the code is the same.

use std::time::Duration;

use lunfs::device::sim::SimLunOptions;
use lunfs::fs::api::{Operations, SetAttributes, SetTime, Timestamp};
use lunfs::layout::demand::{DoorbellRecord, Request, RequestBlock, Want};
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::zero_block;
use lunfs::rt;
use lunfs::rt::sim::{Simulation, spawn_on};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::{InodeNo, Slot, SlotSet};

const BLOCK: u64 = 4096;

/// Names so long that a directory of them has two levels of nodes below its root.
pub const LARGE_NAMES: u64 = 3600;
pub const LARGE: &[u8] = b"large";

pub fn make(logical_block: u32) -> Vec<u8> {
    let lun = SimLunOptions { logical_block_bytes: logical_block, ..SimLunOptions::default() };
    let formatted = Formatted::hasty_on(5, lun);
    Simulation::new(42).run(move || {
        let mut cluster = Cluster::start(&formatted, 3);
        cluster.on(0, tree);
        // One that died and was recovered.
        cluster.on(1, |fs| {
            let mode = libc::S_IFREG | 0o600;
            let ino = fs.mknod(&cx(), fs.root(), b"of-one-that-died", mode, 0).unwrap().value.ino;
            fs.write(&cx(), ino, None, 0, b"and was recovered", false).unwrap();
            fs.sync(&cx()).unwrap();
        });
        cluster.kill(1);
        rt::sleep(Duration::from_secs(60));
        // One that left.
        let left = cluster.hosts.remove(0);
        let volume = left.volume.clone();
        joined(spawn_on(left.tag, "leave", move || volume.leave())).unwrap();
        // One that died with a journal that nobody replayed, and with what it wanted of others.
        let me = cluster.hosts[0].volume.heartbeat().me();
        let wanted = cluster.on(0, last_work);
        cluster.kill(0);
        let geometry = cluster.superblock.geometry;
        let volume = cluster.superblock.volume;
        cluster.lun.clear_observer();
        let request = RequestBlock {
            address: geometry.request(me.slot),
            incarnation: me.incarnation,
            sequence: 1 << 20,
            requests: vec![
                Request { lock: lock_of_inode(wanted), want: Want::Exclusive, since: 7 },
                Request { lock: geometry.cluster(1), want: Want::Shared, since: 2 },
                Request { lock: lock_of_inode(geometry.root()), want: Want::Openers, since: 3 },
            ],
        };
        let mut block = zero_block();
        request.encode(volume, &mut block);
        cluster.lun.overwrite(request.address.offset_bytes(), &block[..]);
        let mut doorbell = DoorbellRecord::new(geometry.doorbell(me.slot));
        doorbell.ringers = SlotSet::of(Slot(0)).with(Slot(1));
        doorbell.swap_counter = 9;
        let mut block = zero_block();
        doorbell.encode(volume, &mut block[..]);
        cluster.lun.overwrite(doorbell.address.offset_bytes(), &block[..512]);
        cluster.lun.contents(0, geometry.size_bytes() as usize)
    })
}

fn tree(fs: &dyn Operations) {
    let root = fs.root();
    let mkdir = |parent, name: &[u8]| fs.mkdir(&cx(), parent, name, 0o755).unwrap().value.ino;
    let node = |parent, name: &[u8], mode, rdev| fs.mknod(&cx(), parent, name, mode, rdev).unwrap().value.ino;
    let file = |parent, name: &[u8]| node(parent, name, libc::S_IFREG | 0o644, 0);
    let write = |ino, at: u64, data: &[u8]| drop(fs.write(&cx(), ino, None, at, data, false).unwrap());

    let files = mkdir(root, b"files");
    file(files, b"empty");
    let inline = file(files, b"inline");
    write(inline, 0, b"as short as it can be");
    let extents = file(files, b"extents");
    write(extents, 0, &pattern(1, 3 * BLOCK + 17));
    // Every second block: more extents than the body of an inode holds.
    let fragments = file(files, b"fragments");
    (0..220).for_each(|i| write(fragments, 2 * i * BLOCK, &pattern(i, 300)));
    let holes = file(files, b"holes");
    write(holes, 0, &pattern(2, 100));
    write(holes, 100 * BLOCK, &pattern(3, 2 * BLOCK));
    let set = SetAttributes { size: Some(1 << 40), ..SetAttributes::default() };
    fs.setattr(&cx(), holes, &set).unwrap();
    let unwritten = file(files, b"unwritten");
    fs.fallocate(&cx(), unwritten, None, 0, 20 * BLOCK, 0).unwrap();
    write(unwritten, 5 * BLOCK, &pattern(4, BLOCK));
    let punched = file(files, b"punched");
    write(punched, 0, &pattern(5, 9 * BLOCK));
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fs.fallocate(&cx(), punched, None, 3 * BLOCK, 2 * BLOCK, punch).unwrap();
    let owned = file(files, b"attributes");
    let set = SetAttributes {
        mode: Some(0o4711),
        uid: Some(70_000),
        gid: Some(12),
        atime: Some(SetTime::At(Timestamp { secs: -5, nanos: 1 })),
        mtime: Some(SetTime::At(Timestamp { secs: 5_000_000_000, nanos: 999_999_999 })),
        ..SetAttributes::default()
    };
    fs.setattr(&cx(), owned, &set).unwrap();

    let others = mkdir(root, b"others");
    fs.symlink(&cx(), others, b"symlink", b"../files/inline").unwrap();
    fs.symlink(&cx(), others, b"long-symlink", &[b'x'; 3000]).unwrap();
    node(others, b"pipe", libc::S_IFIFO | 0o640, 0);
    node(others, b"socket", libc::S_IFSOCK | 0o600, 0);
    node(others, b"block-device", libc::S_IFBLK | 0o660, 0x0000_0801);
    node(others, b"character-device", libc::S_IFCHR | 0o666, 0x0000_0103);
    fs.link(&cx(), extents, others, b"hard-link").unwrap();

    let hashed = mkdir(root, b"hashed");
    for i in 0..150 {
        file(hashed, format!("a-file-with-a-name-of-some-length-{i:03}").as_bytes());
    }
    let large = mkdir(root, LARGE);
    for i in 0..LARGE_NAMES {
        let name = format!("{i:05}{}", "-so-long-that-few-fit-into-a-node".repeat(6));
        fs.link(&cx(), inline, large, &name.as_bytes()[..200]).unwrap();
    }
    let deep = mkdir(mkdir(mkdir(root, b"a"), b"b"), b"c");
    file(deep, "n\u{e4}me of m\u{f6}re th\u{e4}n ASCII".as_bytes());
    file(deep, b"\xff\xfe not UTF-8 \n");
    fs.sync(&cx()).unwrap();
}

/// Ends with all of it committed and little of it in place; gives an inode.
fn last_work(fs: &dyn Operations) -> InodeNo {
    let root = fs.root();
    let lookup = |parent, name: &[u8]| fs.lookup(&cx(), parent, name).unwrap().value.ino;
    let mode = libc::S_IFREG | 0o644;
    // Nodes that are made, and freed while the journal still has their images.
    let shrunk = fs.mkdir(&cx(), root, b"shrunk", 0o755).unwrap().value.ino;
    let name = |i: u32| format!("{i:03}{}", "-a-long-name".repeat(15)).into_bytes();
    let target = lookup(lookup(root, b"files"), b"extents");
    for i in 0..60 {
        fs.link(&cx(), target, shrunk, &name(i)).unwrap();
    }
    fs.sync(&cx()).unwrap();
    for i in 3..60 {
        fs.unlink(&cx(), shrunk, &name(i)).unwrap();
    }
    let renamed = lookup(root, b"hashed");
    fs.rename(&cx(), renamed, b"a-file-with-a-name-of-some-length-000", shrunk, b"moved-here", 0).unwrap();
    for i in 1..40 {
        fs.unlink(&cx(), renamed, format!("a-file-with-a-name-of-some-length-{i:03}").as_bytes()).unwrap();
    }
    // Open, and without a name.
    for name in [b"orphan".as_slice(), b"orphan-with-blocks"] {
        let ino = fs.mknod(&cx(), root, name, mode, 0).unwrap().value.ino;
        fs.open(&cx(), ino, libc::O_RDWR).unwrap();
        if name.len() > 6 {
            fs.write(&cx(), ino, None, 0, &pattern(8, 5 * BLOCK), false).unwrap();
        }
        fs.unlink(&cx(), root, name).unwrap();
    }
    let replayed = fs.mknod(&cx(), root, b"in-the-journal", mode, 0).unwrap().value.ino;
    fs.write(&cx(), replayed, None, 0, &pattern(9, 2 * BLOCK), false).unwrap();
    fs.sync(&cx()).unwrap();
    replayed
}

fn pattern(seed: u64, len: u64) -> Vec<u8> {
    // A few different bytes, so that it packs well.
    (0..len).map(|i| (seed * 31 + i / 97) as u8).collect()
}
