//! The LUN loses power and comes back while hosts go on: what a flush covered is there, and nobody is told that
//! something is durable which is not.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lunfs::device::AlignedBuf;
use lunfs::device::sim::{Keep, SimLun, SimLunOptions};
use lunfs::fs::api::{FsError, FsResult, Operations};
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::lock::{LockMode, LockRecord};
use lunfs::layout::slot::SlotState;
use lunfs::lease::{Door, IoClass, Lease};
use lunfs::rt;
use lunfs::rt::HostTag;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, freeze_host, seeds, thaw_host};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::BlockNo;

use super::model::LONG;
use super::recovery::settled;

fn volume(seed: u64) -> Formatted {
    let logical_block_bytes = if seed.is_multiple_of(2) { 512 } else { 4096 };
    Formatted::tiny_on(8, SimLunOptions { logical_block_bytes, ..SimLunOptions::default() })
}

fn keep(seed: u64) -> Keep {
    [Keep::Nothing, Keep::Random, Keep::Random][seed as usize % 3]
}

/// Each host appends to a file of its own and notes what was acknowledged as durable, until it is refused.
/// How many hosts went on?
pub fn cuts_among_the_living(seed: u64, bug: Option<Bug>) -> Result<usize, Failure> {
    let volume = volume(seed);
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let mut cluster = Cluster::start(&volume, 3);
        let root = cluster.root();
        let mut rng = SimRng::new(seed, 80);
        let files: Vec<_> = (0..2usize)
            .map(|host| {
                cluster.may_end(host);
                let durable = Arc::new(Mutex::new(0u64));
                let noted = durable.clone();
                let worker = cluster.spawn(host, "worker", move |fs| -> FsResult<()> {
                    let mut rng = SimRng::new(seed, host as u64 + 81);
                    let ino = fs.mknod(&cx(), root, &[b'a' + host as u8], 0o644, 0)?.value.ino;
                    for n in 0..200u64 {
                        let block = vec![n as u8 + 1; 4096];
                        fs.write(&cx(), ino, None, n * 4096, &block, false).map(drop)?;
                        if rng.chance(0.3) {
                            fs.fsync(&cx(), ino, false).map(drop)?;
                            *noted.lock().unwrap() = n + 1;
                        }
                        rt::sleep(Duration::from_micros(rng.below(10_000)));
                    }
                    Ok(())
                });
                (worker, durable)
            })
            .collect();
        cluster.may_end(2);
        for _ in 0..1 + seed % 3 {
            rt::sleep(Duration::from_micros(rng.between(1, 1_500_000)));
            cluster.lun.power_cut(keep(seed));
        }
        let ended: Vec<_> = files.into_iter().map(|(worker, durable)| (joined(worker), durable)).collect();
        for (outcome, durable) in &ended {
            // Who goes on lost nothing, durable or not.
            if outcome.is_ok() {
                *durable.lock().unwrap() = 200;
            }
        }
        rt::sleep(Duration::from_secs(30));
        let lives = |h: &lunfs::testing::cluster::Host| h.volume.door().lease().reason().is_none();
        let living = cluster.hosts.iter().filter(|h| lives(h)).count();
        // Who gave up comes back; if nobody was left, the first recovers the rest.
        let gone: Vec<_> = cluster.hosts.extract_if(.., |h| !lives(h)).map(|h| h.tag).collect();
        for tag in gone {
            cluster.join(tag).unwrap();
        }
        rt::sleep(Duration::from_secs(30));
        for host in 0..cluster.hosts.len() {
            cluster.on(host, |fs| {
                for (file, (_, durable)) in ended.iter().enumerate() {
                    let durable = *durable.lock().unwrap();
                    let Ok(found) = fs.lookup(&cx(), root, &[b'a' + file as u8]) else {
                        assert_eq!(durable, 0, "a durable file is gone");
                        continue;
                    };
                    let (ino, size) = (found.value.ino, found.value.size);
                    drop(found);
                    assert!(size >= durable * 4096, "{size} bytes of {durable} durable blocks");
                    let bytes = fs.read(&cx(), ino, None, 0, size as u32).unwrap().value.to_vec();
                    for (n, block) in bytes.chunks(4096).enumerate().take(durable as usize) {
                        let good = block.iter().all(|b| *b == n as u8 + 1);
                        assert!(good, "block {n} of {durable} durable ones has other bytes");
                    }
                }
            });
        }
        cluster.finish();
        living
    });
    finished.map(|f| f.value)
}

#[test]
fn what_was_acknowledged_survives_a_power_cut_among_living_hosts() {
    for seed in seeds(0..24) {
        let living = cuts_among_the_living(seed, None).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(living, 3, "seed {seed}: a host gave up");
    }
}

/// A host whose changes had all been flushed goes on as if nothing had happened.
#[test]
fn a_quiet_host_goes_on_after_a_power_cut() {
    for seed in seeds(0..12) {
        let volume = volume(seed);
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(&volume, 2);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| {
                let ino = fs.mknod(&cx(), root, b"file", 0o644, 0).unwrap().value.ino;
                fs.write(&cx(), ino, None, 0, &[7; 9000], false).map(drop).unwrap();
                fs.sync(&cx()).unwrap();
                ino
            });
            // In place, and the journal's tail behind it.
            rt::sleep(Duration::from_secs(30));
            for _ in 0..3 {
                cluster.lun.power_cut(keep(seed));
                rt::sleep(Duration::from_millis(SimRng::new(seed, 83).between(1, 3000)));
            }
            for host in [0, 1] {
                cluster.on(host, |fs| {
                    assert_eq!(&*fs.read(&cx(), ino, None, 0, 9000).unwrap().value, &[7; 9000]);
                    fs.mknod(&cx(), root, &[b'0' + host as u8], 0o644, 0).map(drop).unwrap();
                    fs.sync(&cx()).unwrap();
                });
            }
            cluster.finish();
        });
    }
}

/// The LUN forgets what a recoverer has written so far, and the recoverer goes on: a flush after that proves nothing of
/// what came before it.
#[test]
fn a_recovery_that_a_power_cut_meets_loses_nothing() {
    let mut met = 0;
    for seed in seeds(0..20) {
        let volume = Formatted::hasty_on(8, SimLunOptions::default());
        met += Simulation::new(seed)
            .max_time(LONG)
            .try_run(move || {
                let mut cluster = Cluster::start(&volume, 2);
                let root = cluster.root();
                let mut rng = SimRng::new(seed, 84);
                let files = 1 + rng.below(12);
                cluster.on(0, |fs| {
                    for n in 0..files {
                        let dir = fs.mkdir(&cx(), root, format!("d{n}").as_bytes(), 0o755).unwrap().value.ino;
                        fs.mknod(&cx(), dir, b"f", libc::S_IFREG | 0o644, 0).map(drop).unwrap();
                    }
                    fs.sync(&cx()).unwrap();
                });
                cluster.kill(0);
                cluster.may_end(0);
                let marked = |cluster: &Cluster| {
                    cluster.slots().iter().any(|slot| slot.state == SlotState::Recovering)
                };
                while !marked(&cluster) {
                    rt::sleep(Duration::from_micros(100));
                }
                rt::sleep(Duration::from_micros(rng.below(9000)));
                let met = marked(&cluster);
                cluster.lun.power_cut([Keep::Nothing, Keep::Random][seed as usize % 2]);
                rt::sleep(Duration::from_secs(12));
                if cluster.hosts[0].volume.door().lease().reason().is_some() {
                    let tag = cluster.hosts.remove(0).tag;
                    cluster.join(tag).unwrap();
                }
                settled(&cluster);
                cluster.on(0, |fs| {
                    for n in 0..files {
                        let name = format!("d{n}");
                        let dir =
                            fs.lookup(&cx(), root, name.as_bytes()).unwrap_or_else(|e| panic!("{name}: {e}"));
                        let dir = dir.value.ino;
                        fs.lookup(&cx(), dir, b"f").map(drop).unwrap_or_else(|e| panic!("{name}/f: {e}"));
                    }
                });
                cluster.finish();
                u32::from(met)
            })
            .unwrap_or_else(|e| panic!("{e}"))
            .value;
    }
    assert!(met > 0, "no power cut met a recovery");
}

/// The LUN forgets a wish before anybody read it: the holder was not listening just then. It is written again.
pub fn forgotten_wish(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = volume(seed);
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let cluster = Cluster::start(&volume, 2);
        let root = cluster.root();
        cluster.on(0, |fs| {
            fs.mknod(&cx(), root, b"held", 0o644, 0).map(drop).unwrap();
            fs.sync(&cx()).unwrap();
        });
        rt::sleep(Duration::from_secs(30));
        freeze_host(cluster.hosts[0].tag);
        let other = cluster.spawn(1, "other", move |fs| {
            // A command that was on its way when the power failed is an error of the operation.
            while let Err(e) = fs.mknod(&cx(), root, b"made", 0o644, 0).map(drop) {
                assert!(matches!(e, FsError::Io(_)), "{e}");
            }
        });
        rt::sleep(Duration::from_millis(20));
        cluster.lun.power_cut(Keep::Nothing);
        thaw_host(cluster.hosts[0].tag);
        let asked = rt::Instant::now();
        while !other.is_finished() {
            assert!(asked.elapsed() < Duration::from_secs(6), "nobody knows any more what this host wants");
            rt::sleep(Duration::from_millis(50));
        }
        joined(other);
        cluster.finish();
    });
    finished.map(drop)
}

#[test]
fn a_wish_that_the_lun_forgot_is_written_again() {
    for seed in seeds(0..8) {
        forgotten_wish(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// The LUN forgets the swap by which a host gave a share of what it had changed, and with it that the change was counted.
/// The host's own tenure, which had ended, is back on the disk; the lock goes on from there to a host that has what was
/// before the change in its cache, and must not believe it. The number of runs in which that came about.
pub fn forgotten_grant(seed: u64, bug: Option<Bug>) -> Result<u32, Failure> {
    let volume = volume(seed);
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let cluster = Cluster::start(&volume, 3);
        let root = cluster.root();
        let make = move |fs: &dyn Operations, dir, name: &[u8]| {
            // A command that was on its way when the power failed is an error of the operation.
            while let Err(e) = fs.mknod(&cx(), dir, name, libc::S_IFREG | 0o644, 0).map(drop) {
                assert!(matches!(e, FsError::Io(_)), "{e}");
            }
        };
        let dir = cluster.on(0, |fs| fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino);
        for host in [2, 0] {
            cluster.on(host, |fs| {
                make(fs, dir, format!("by {host}").as_bytes());
                fs.sync(&cx()).unwrap();
            });
        }
        // All that was written is covered by flushes by now, so nobody withdraws.
        rt::sleep(Duration::from_secs(30));
        let at = lock_of_inode(dir);
        let lock = || {
            let bytes = cluster.lun.contents(at.offset_bytes(), 4096);
            LockRecord::decode(&bytes, cluster.superblock.volume, at).unwrap()
        };
        let (mine, me) = (lock().mode, cluster.hosts[0].volume.heartbeat().me());
        assert!(matches!(mine, LockMode::Exclusive { owner, .. } if owner == me), "{mine:?}");
        let reader = cluster.spawn(1, "reader", move |fs| {
            while let Err(e) = fs.lookup(&cx(), dir, b"by 0").map(drop) {
                assert!(matches!(e, FsError::Io(_)), "{e}");
            }
        });
        while lock().mode == mine {
            rt::sleep(Duration::from_micros(10));
        }
        cluster.lun.power_cut(Keep::Nothing);
        let forgotten = lock().mode == mine;
        let writer = cluster.spawn(2, "writer", move |fs| make(&*fs, dir, b"by 2 again"));
        joined(writer);
        joined(reader);
        for host in 0..3 {
            cluster.on(host, |fs| {
                for name in [&b"by 2"[..], b"by 0", b"by 2 again"] {
                    fs.lookup(&cx(), dir, name)
                        .map(drop)
                        .unwrap_or_else(|e| panic!("host {host}: {name:?}: {e}"));
                }
            });
        }
        cluster.finish();
        u32::from(forgotten)
    });
    finished.map(|f| f.value)
}

#[test]
fn a_grant_that_the_lun_forgot_does_not_hide_what_was_changed() {
    let forgotten = seeds(0..16).map(|seed| forgotten_grant(seed, None).unwrap_or_else(|e| panic!("{e}")));
    assert!(forgotten.sum::<u32>() > 0, "the LUN never forgot the grant");
}

/// A host reads what it wrote, also when the first it hears of the LUN's reset is the read's own answer.
pub fn read_after_a_reset(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = volume(seed);
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let cluster = Cluster::start(&volume, 2);
        let root = cluster.root();
        let ino = cluster.on(0, |fs| {
            let ino = fs.mknod(&cx(), root, b"file", 0o644, 0).unwrap().value.ino;
            fs.write(&cx(), ino, None, 0, &[1; 40_000], false).map(drop).unwrap();
            fs.sync(&cx()).unwrap();
            ino
        });
        for round in 2..12u8 {
            cluster.on(0, |fs| {
                fs.write(&cx(), ino, None, 0, &[round; 40_000], false).map(drop).unwrap();
            });
            cluster.lun.power_cut(keep(seed));
            cluster.on(0, |fs| {
                let bytes = fs.read(&cx(), ino, None, 0, 40_000).unwrap().value.to_vec();
                assert!(bytes.iter().all(|b| *b == round), "the host reads what was there before its write");
            });
            rt::sleep(Duration::from_micros(SimRng::new(seed, 85).below(3000)));
        }
        let bytes = cluster.on(1, |fs| fs.read(&cx(), ino, None, 0, 40_000).unwrap().value.to_vec());
        assert!(bytes.iter().all(|b| *b == 11), "the other host reads what was there before");
        cluster.finish();
    });
    finished.map(drop)
}

#[test]
fn a_host_reads_what_it_wrote_right_after_a_reset() {
    for seed in seeds(0..12) {
        read_after_a_reset(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// Threads that write their own block again and again through one door, while the LUN forgets: what is there in the end is
/// what each wrote last, also where a write begins while older content of the same block is written again.
#[test]
fn what_is_written_again_overtakes_nothing() {
    // The last one: a read that is issued while older content is written again.
    for seed in seeds(0..60).chain([9034]) {
        Simulation::new(seed).max_time(LONG).run(move || {
            let lun = SimLun::new(SimLunOptions { logical_block_bytes: 4096, ..SimLunOptions::default() });
            let door = Arc::new(Door::new(lun.attach(HostTag(0)), Arc::new(Lease::new())));
            let block = |n: u64| AlignedBuf::copy_of(&[n as u8; 4096]);
            let writers: Vec<_> = (0..6u64)
                .map(|at| {
                    let door = door.clone();
                    rt::spawn("writer", move || {
                        let mut rng = SimRng::new(seed, 86 + at);
                        for n in 1..=120u64 {
                            door.write(IoClass::Metadata, BlockNo(at), &block(n)).unwrap();
                            if rng.chance(0.05) {
                                door.flush(IoClass::Metadata).unwrap();
                            }
                            let mut found = AlignedBuf::zeroed(4096);
                            // One that was on its way when the power failed may never be answered.
                            while door.read(IoClass::Metadata, BlockNo(at), &mut found).is_err() {}
                            assert_eq!(found[0], n as u8, "block {at} went back");
                        }
                    })
                })
                .collect();
            let mut rng = SimRng::new(seed, 85);
            while writers.iter().any(|writer| !writer.is_finished()) {
                rt::sleep(Duration::from_micros(rng.below(9000)));
                lun.power_cut([Keep::Nothing, Keep::Random][seed as usize % 2]);
            }
            writers.into_iter().for_each(|writer| writer.join().unwrap());
            door.flush(IoClass::Metadata).unwrap();
            lun.power_cut(Keep::Nothing);
            for at in 0..6 {
                assert_eq!(lun.contents(at * 4096, 1)[0], 120, "seed {seed}: block {at} was lost");
            }
        });
    }
}
