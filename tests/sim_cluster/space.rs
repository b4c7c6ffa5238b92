//! Room: what statfs says, what a full volume says, and when freed room is there again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule};
use lunfs::fs::api::{FsError, Operations};
use lunfs::rt;
use lunfs::rt::HostTag;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, Simulation, on_host, seeds};
use lunfs::testing::cluster::{Cluster, cx, joined};
use lunfs::types::InodeNo;

use super::model::{LONG, volumes};

const MS: Duration = Duration::from_millis(1);
const STEP: usize = 64 << 10;

fn free(fs: &dyn Operations) -> u64 {
    fs.statfs(&cx()).unwrap().free_blocks
}

/// Writes a file until the volume is full; how many bytes went in.
fn fill(fs: &dyn Operations, ino: InodeNo) -> u64 {
    let bytes = vec![0x5a; STEP];
    let mut size = 0;
    loop {
        match fs.write(&cx(), ino, None, size, &bytes, false) {
            Ok(answer) => size += u64::from(answer.value),
            Err(FsError::NoSpace) => return size,
            Err(error) => panic!("a full volume says {error}"),
        }
    }
}

fn make(cluster: &Cluster, host: usize, name: &'static [u8]) -> InodeNo {
    let root = cluster.root();
    cluster.on(host, |fs| fs.mknod(&cx(), root, name, 0o644, 0).unwrap().value.ino)
}

#[test]
fn free_room_only_falls_while_files_grow() {
    // Whoever looks while a commit is under way must see what that commit allocates.
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let ino = make(&cluster, 0, b"f");
            cluster.on(0, |fs| fs.sync(&cx())).unwrap();
            let done = Arc::new(AtomicBool::new(false));
            let looking = done.clone();
            let looker = cluster.spawn(0, "looker", move |fs| {
                let mut last = free(&*fs);
                while !looking.load(Ordering::Acquire) {
                    let now = free(&*fs);
                    assert!(now <= last, "{last} blocks were free, now {now}");
                    last = now;
                    rt::sleep(Duration::from_micros(50));
                }
            });
            let writer = cluster.spawn(0, "writer", move |fs| {
                for turn in 0..30 {
                    fs.write(&cx(), ino, None, turn * STEP as u64, &vec![7; STEP], false).unwrap();
                    // Seen as allocated once, so that it would be missed.
                    rt::sleep(MS);
                    fs.sync(&cx()).unwrap();
                }
            });
            joined(writer);
            done.store(true, Ordering::Release);
            joined(looker);
            // And the other host knows within two beats.
            rt::sleep(2000 * MS);
            assert_eq!(cluster.on(0, free), cluster.on(1, free));
            cluster.finish();
        });
    }
}

#[test]
fn a_full_volume_says_so_and_can_be_emptied_and_filled_again() {
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let root = cluster.root();
            let mut sizes = Vec::new();
            for round in 0..3 {
                let (writer, other) = (round % 2, 1 - round % 2);
                let ino = make(&cluster, writer, b"big");
                let size = joined(cluster.spawn(writer, "writer", move |fs| fill(&*fs, ino)));
                sizes.push(size);
                // The other one finds no room either, and says it the same way; names can still be removed.
                let small = joined(cluster.spawn(other, "writer", move |fs| {
                    let made = fs.mknod(&cx(), root, b"other", 0o644, 0);
                    match made {
                        Ok(made) => fill(&*fs, made.value.ino),
                        Err(FsError::NoSpace) => u64::MAX,
                        Err(error) => panic!("{error}"),
                    }
                }));
                if small < u64::MAX {
                    assert!(small <= STEP as u64 * 2, "{small} bytes went into a full volume");
                    cluster.on(other, |fs| fs.unlink(&cx(), root, b"other").map(drop)).unwrap();
                }
                cluster.on(other, |fs| fs.unlink(&cx(), root, b"big").map(drop)).unwrap();
                // What is freed comes back by itself, and without waiting to whoever needs it.
                rt::sleep(if seed % 2 == 0 { 20_000 * MS } else { Duration::ZERO });
            }
            let (least, most) = (sizes.iter().min().unwrap(), sizes.iter().max().unwrap());
            assert!(*least > 1 << 20 && most - least <= 2 << 20, "{sizes:?}");
            cluster.finish();
        });
    }
}

pub fn unlinked_while_open(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = &volumes()[(seed % 4) as usize];
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let cluster = Cluster::start(volume, 2);
        let root = cluster.root();
        rt::sleep(1000 * MS);
        let before = cluster.on(1, free);
        let ino = make(&cluster, 0, b"f");
        let blocks = 64;
        cluster.on(0, |fs| {
            for n in 0..blocks / 16 {
                fs.write(&cx(), ino, None, n * STEP as u64, &vec![n as u8; STEP], false).unwrap();
            }
        });
        let handle = cluster.on(0, |fs| fs.open(&cx(), ino, libc::O_RDWR).unwrap().value.handle);
        cluster.on(1, |fs| fs.unlink(&cx(), root, b"f").map(drop)).unwrap();
        // Long enough for many questions whether it is still open.
        rt::sleep(Duration::from_secs(2 + seed * 3));
        assert!(cluster.on(1, free) + blocks <= before, "freed under an open file");
        let bytes = cluster.on(0, |fs| fs.read(&cx(), ino, Some(handle), 0, 4096).unwrap().value.to_vec());
        assert_eq!(bytes, vec![0; 4096]);
        cluster.on(0, |fs| fs.release(ino, handle));
        let closed = rt::Instant::now();
        // Inodes come in groups, the root may have grown.
        while cluster.on(1, free) + 16 < before || cluster.on(0, free) + 16 < before {
            assert!(closed.elapsed() < Duration::from_secs(12), "its room is still taken");
            rt::sleep(100 * MS);
        }
        cluster.finish();
    });
    finished.map(drop)
}

#[test]
fn room_of_an_open_and_unlinked_file_comes_back_after_its_close() {
    for seed in seeds(0..8) {
        unlinked_while_open(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// A header that could not be written once: the ring's space is given back by the next one.
#[test]
fn a_failed_header_costs_no_room_in_the_journal() {
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 1);
            let (root, store) = (cluster.root(), cluster.hosts[0].volume.store().clone());
            let slot = cluster.hosts[0].volume.heartbeat().me().slot;
            let header = cluster.superblock.geometry.journal(slot).offset_bytes();
            let (free, _) = store.journal_space().expect("nothing is under way");
            let rule = FaultRule::next_of(Fault::IoError, cluster.hosts[0].tag, CommandKind::Write);
            cluster.lun.inject(FaultRule { bytes: Some(header..header + 4096), ..rule });
            cluster.on(0, |fs| {
                fs.mkdir(&cx(), root, b"dir", 0o755).map(drop).unwrap();
                fs.sync(&cx()).unwrap();
            });
            // Put in place by itself, twice: the first header fails.
            rt::sleep(Duration::from_secs(20));
            assert_eq!(cluster.lun.fault_hits().1, 0, "no header was written");
            cluster.on(0, |fs| {
                fs.mkdir(&cx(), root, b"other", 0o755).map(drop).unwrap();
                fs.sync(&cx()).unwrap();
            });
            rt::sleep(Duration::from_secs(20));
            assert_eq!(store.journal_space().map(|(free, _)| free), Some(free), "room was lost");
            cluster.finish();
        });
    }
}

/// What is remembered of directories goes with their locks.
#[test]
fn forgotten_locks_take_what_was_known_of_directories_along() {
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let root = cluster.root();
            let make = |host: usize, names: std::ops::Range<u32>| {
                cluster.on(host, |fs| {
                    for n in names {
                        fs.mkdir(&cx(), root, format!("d{n}").as_bytes(), 0o755).map(drop).unwrap();
                    }
                });
            };
            make(0, 0..40);
            let on_first = &cluster.hosts[0].volume;
            assert!(on_first.fs().directories_known() > 40);
            rt::sleep(Duration::from_secs(1));
            // Twice: what was used since the last time stays.
            on_host(HostTag(0), || {
                on_first.locks().trim(0);
                assert!(on_first.locks().trim(0) >= 40);
            });
            assert!(on_first.fs().directories_known() < 8, "{}", on_first.fs().directories_known());
            // Nothing that counts was forgotten.
            make(1, 40..60);
            for host in [0, 1] {
                cluster.on(host, |fs| {
                    for n in 0..60 {
                        let dir = fs.lookup(&cx(), root, format!("d{n}").as_bytes()).unwrap().value.ino;
                        fs.mkdir(&cx(), dir, &[b'a' + host as u8], 0o755).map(drop).unwrap();
                    }
                });
            }
            cluster.finish();
        });
    }
}
