//! Hosts die: what they had made durable is there, what they had not is whole or absent, and the others go on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lunfs::device::sim::Keep;
use lunfs::fs::api::{FsError, Operations, SetAttributes};
use lunfs::journal::Ring;
use lunfs::layout::journal::JournalHeader;
use lunfs::layout::slot::SlotState;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{self, Failure, SimRng, Simulation, freeze_host, seeds, thaw_host};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, cx, joined};
use lunfs::types::InodeNo;

use super::crash::hasty;
use super::model::{LONG, volumes};

const MS: Duration = Duration::from_millis(1);
/// Dead time of the profile in use, recovery and a beat or two.
const RECOVERED_WITHIN: Duration = Duration::from_secs(20);

/// The bytes of file `n` of a host: inline, a block, several blocks.
fn content(host: usize, n: u64) -> Vec<u8> {
    let len = [40, 4096, 9000][n as usize % 3];
    format!("host {host} file {n} ").bytes().cycle().take(len).collect()
}

fn read_all(fs: &dyn Operations, dir: InodeNo, name: &str) -> Result<Vec<u8>, FsError> {
    let attributes = fs.lookup(&cx(), dir, name.as_bytes())?.value;
    Ok(fs.read(&cx(), attributes.ino, None, 0, attributes.size as u32)?.value.to_vec())
}

/// Files that fit into a small volume.
const MOST: u64 = 150;

/// Makes files; notes how many are durable.
fn work(fs: &dyn Operations, host: usize, dir: InodeNo, durable: &Mutex<u64>, seed: u64) {
    let mut rng = SimRng::new(seed, host as u64 + 500);
    for n in 0..MOST {
        let name = format!("{host}-{n}");
        let ino = fs.mknod(&cx(), dir, name.as_bytes(), 0o644, 0).unwrap().value.ino;
        fs.write(&cx(), ino, None, 0, &content(host, n), false).map(drop).unwrap();
        if rng.chance(0.3) {
            fs.fsync(&cx(), ino, false).map(drop).unwrap();
            *durable.lock().unwrap() = n + 1;
        }
        if rng.chance(0.2) {
            rt::sleep(Duration::from_micros(rng.below(20_000)));
        }
    }
}

/// What a host that died left in a directory: all that was durable, and of the rest nothing half.
fn check(fs: &dyn Operations, host: usize, dir: InodeNo, durable: u64) {
    let mut missing = None;
    for n in 0..MOST {
        let name = format!("{host}-{n}");
        match read_all(fs, dir, &name) {
            // Made and not yet written is what it may look like, too: these are two operations.
            Ok(bytes) if bytes.is_empty() && n >= durable => {}
            Ok(bytes) => {
                assert!(bytes == content(host, n) || n >= durable, "file {n} of {durable} has other bytes");
                let whole = content(host, n);
                assert!(whole.starts_with(&bytes), "file {n} of {durable} shows bytes never written to it");
                assert_eq!(missing, None, "file {n} is there, an older one is not");
            }
            Err(FsError::NotFound) => {
                assert!(n >= durable, "file {n} of {durable} durable ones is gone");
                missing.get_or_insert(n);
            }
            Err(error) => panic!("file {n}: {error}"),
        }
    }
}

/// Is nobody left to be recovered?
pub fn all_settled(cluster: &Cluster) -> bool {
    let open = [SlotState::Live, SlotState::Recovering, SlotState::Withdrawn];
    cluster.slots().iter().all(|slot| !open.contains(&slot.state) || cluster.lives(slot))
}

/// Waits until the dead are recovered.
pub fn settled(cluster: &Cluster) {
    while !all_settled(cluster) {
        rt::sleep(500 * MS);
    }
}

#[test]
fn what_a_dead_host_made_durable_is_there_for_the_others() {
    for seed in seeds(0..12) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 3);
            let dir = cluster.directory(0, b"dir");
            let durable = Arc::new(Mutex::new(0));
            let noted = durable.clone();
            drop(cluster.spawn(0, "worker", move |fs| work(&*fs, 0, dir, &noted, seed)));
            rt::sleep(Duration::from_micros(SimRng::new(seed, 3).below(2_000_000)));
            cluster.kill(0);
            let (died, durable) = (sim::now().unwrap(), *durable.lock().unwrap());
            let other = cluster.spawn(0, "other", move |fs| {
                fs.readdir(&cx(), dir, 0, 1 << 16, false).map(drop).unwrap();
                let first = sim::now().unwrap();
                check(&*fs, 0, dir, durable);
                first
            });
            let took = joined(other) - died;
            let within = RECOVERED_WITHIN + volume.lun.hold_time;
            assert!(took < within, "{took:?} until what the dead host held could be used");
            // The other survivor sees the same, and both work there.
            cluster.on(1, |fs| check(fs, 0, dir, durable));
            for host in 0..2 {
                cluster.on(host, |fs| {
                    fs.mknod(&cx(), dir, format!("after-{host}").as_bytes(), 0o644, 0).map(drop).unwrap();
                });
            }
            cluster.finish();
        });
    }
}

#[test]
fn a_host_that_comes_back_recovers_itself_at_once() {
    for seed in seeds(0..12) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 2);
            let dir = cluster.directory(0, b"dir");
            let mut at_least = 0;
            for round in 0..3 {
                let last = cluster.hosts.iter().position(|h| h.tag.0 == 0).unwrap();
                let durable = Arc::new(Mutex::new(0));
                let noted = durable.clone();
                let dir = match round {
                    0 => dir,
                    _ => cluster.directory(last, [&b""[..], b"dir1", b"dir2"][round]),
                };
                drop(
                    cluster.spawn(last, "worker", move |fs| work(&*fs, 0, dir, &noted, seed + round as u64)),
                );
                rt::sleep(Duration::from_micros(SimRng::new(seed, round as u64).below(1_000_000)));
                let tag = cluster.kill(last);
                let durable = *durable.lock().unwrap();
                at_least += durable;
                // Its process is gone only when its commands are.
                rt::sleep(100 * MS);
                let begun = sim::now().unwrap();
                cluster.join(tag).unwrap();
                let back = cluster.hosts.len() - 1;
                cluster.on(back, |fs| check(fs, 0, dir, durable));
                let took = sim::now().unwrap() - begun;
                assert!(took < Duration::from_secs(2), "{took:?} from the restart to the first answers");
                let other = (0..cluster.hosts.len()).find(|h| cluster.hosts[*h].tag.0 == 1).unwrap();
                cluster.on(other, |fs| check(fs, 0, dir, durable));
            }
            println!("seed {seed}: {at_least} durable files");
            cluster.finish();
        });
    }
}

#[test]
fn a_recoverer_that_dies_is_recovered() {
    for seed in seeds(0..12) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 4);
            let mut rng = SimRng::new(seed, 4);
            let dirs = [cluster.directory(0, b"dir0"), cluster.directory(1, b"dir1")];
            let durable: [Arc<Mutex<u64>>; 2] = Default::default();
            for host in 0..2 {
                let (noted, dir) = (durable[host].clone(), dirs[host]);
                drop(cluster.spawn(host, "worker", move |fs| work(&*fs, host, dir, &noted, seed)));
            }
            rt::sleep(Duration::from_micros(rng.below(1_000_000)));
            cluster.kill(0);
            // About when the survivors find it dead, one of them dies; which one recovers is open.
            rt::sleep(Duration::from_millis(15_000 + rng.below(3000)));
            cluster.kill(0);
            let [first, second] = durable.map(|d| *d.lock().unwrap());
            for host in 0..2 {
                let other = cluster.spawn(host, "other", move |fs| {
                    check(&*fs, 0, dirs[0], first);
                    check(&*fs, 1, dirs[1], second);
                });
                joined(other);
            }
            cluster.finish();
        });
    }
}

#[test]
fn hosts_die_in_the_middle_of_shared_work() {
    // All in one directory: locks are on their way, names are made and removed by all.
    for seed in seeds(0..16) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 4);
            let dir = cluster.directory(0, b"dir");
            let mut workers = BTreeMap::new();
            for host in 0..4usize {
                let worker = cluster.spawn(host, "worker", move |fs| {
                    let mut rng = SimRng::new(seed, host as u64 + 40);
                    for _ in 0..60 {
                        let name = format!("n{}", rng.below(12));
                        let other = format!("n{}", rng.below(12));
                        let (name, other) = (name.as_bytes(), other.as_bytes());
                        let done = match rng.below(6) {
                            0 | 1 => fs.mknod(&cx(), dir, name, 0o644, 0).map(drop),
                            2 => fs.unlink(&cx(), dir, name).map(drop),
                            3 => fs.rename(&cx(), dir, name, dir, other, 0).map(drop),
                            // The answer is let go of before anything else is asked.
                            4 => fs.lookup(&cx(), dir, name).map(|found| found.value.ino).and_then(|ino| {
                                let bytes = vec![host as u8 + 1; 20_000];
                                fs.write(&cx(), ino, None, rng.below(30_000), &bytes, false).map(drop)
                            }),
                            _ => fs.sync(&cx()),
                        };
                        match done {
                            Ok(()) | Err(FsError::NotFound | FsError::Exists | FsError::Stale) => {}
                            Err(error) => panic!("{error}"),
                        }
                        rt::sleep(Duration::from_micros(rng.below(3000)));
                    }
                });
                workers.insert(cluster.hosts[host].tag, worker);
            }
            let mut rng = SimRng::new(seed, 5);
            for _ in 0..2 {
                rt::sleep(Duration::from_micros(rng.below(150_000)));
                let host = rng.index(cluster.hosts.len());
                let tag = cluster.kill(host);
                workers.remove(&tag);
            }
            workers.into_values().for_each(joined);
            settled(&cluster);
            cluster.finish();
        });
    }
}

#[test]
fn a_power_cut_under_a_living_host_loses_nothing_acknowledged() {
    // The journal's write is answered, the LUN loses its cache and is back at once, the flush that follows
    // succeeds: it proves nothing of the write, and the host must not say "durable".
    for seed in seeds(0..60) {
        let volume = &hasty()[(seed % 2) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 1);
            cluster.may_end(0);
            let acknowledged = Arc::new(Mutex::new(0u32));
            let noted = acknowledged.clone();
            drop(cluster.spawn(0, "worker", move |fs| {
                for n in 0.. {
                    let name = format!("f{n}");
                    let made = fs.mknod(&cx(), fs.root(), name.as_bytes(), libc::S_IFREG | 0o644, 0);
                    if made.map(drop).is_err() || fs.sync(&cx()).is_err() {
                        return;
                    }
                    *noted.lock().unwrap() = n + 1;
                }
            }));
            rt::sleep(Duration::from_micros(20_000 + SimRng::new(seed, 7).below(20_000)));
            cluster.lun.power_cut(Keep::Nothing);
            rt::sleep(10 * MS);
            let acknowledged = *acknowledged.lock().unwrap();
            cluster.kill(0);
            rt::sleep(3000 * MS);
            cluster.join(HostTag(1)).unwrap();
            cluster.on(0, |fs| {
                for n in 0..acknowledged {
                    let found = fs.lookup(&cx(), fs.root(), format!("f{n}").as_bytes());
                    found.unwrap_or_else(|e| panic!("file {n} of {acknowledged} acknowledged ones: {e}"));
                }
            });
            settled(&cluster);
            cluster.finish();
        });
    }
}

/// A host sleeps past its lease while another changes what it has in memory. What it needs for its answer is
/// there, and so is the belief that it holds the lock: nothing but the lease can keep it from answering in the
/// instant in which it wakes.
pub fn sleeper(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = &hasty()[(seed % 4) as usize];
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let mut cluster = Cluster::start(volume, 2);
        cluster.may_end(0);
        let root = cluster.root();
        let changed = Arc::new(AtomicBool::new(false));
        let ino = cluster.on(0, |fs| {
            let ino = fs.mknod(&cx(), root, b"f", 0o644, 0).unwrap().value.ino;
            fs.sync(&cx()).unwrap();
            ino
        });
        let seen = changed.clone();
        let reader = cluster.spawn(0, "reader", move |fs| {
            loop {
                let late = seen.load(SeqCst);
                let Ok(answer) = fs.getattr(&cx(), ino) else { return };
                let mode = answer.value.mode & 0o777;
                assert!(!late || mode == 0o600, "the mode was changed long ago, this host says {mode:o}");
                drop(answer);
                rt::sleep(MS);
            }
        });
        rt::sleep(Duration::from_micros(SimRng::new(seed, 8).below(500_000)));
        freeze_host(HostTag(0));
        let writer = cluster.spawn(1, "writer", move |fs| {
            let set = SetAttributes { mode: Some(0o600), ..SetAttributes::default() };
            fs.setattr(&cx(), ino, &set).map(drop).unwrap();
        });
        joined(writer);
        changed.store(true, SeqCst);
        thaw_host(HostTag(0));
        let _ = reader.join();
        cluster.kill(0);
        settled(&cluster);
        cluster.finish();
    });
    finished.map(drop)
}

#[test]
fn a_host_that_slept_past_its_lease_serves_nothing_old() {
    for seed in seeds(0..20) {
        sleeper(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

pub fn damaged_journal(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = &volumes()[(seed % 4) as usize];
    Simulation::new(seed)
        .max_time(LONG)
        .planted(bug)
        .try_run(move || {
            let mut cluster = Cluster::start(volume, 3);
            let (dir, own) = (cluster.directory(0, b"dir"), cluster.directory(1, b"own"));
            cluster.on(1, |fs| fs.getattr(&cx(), cluster.root()).map(drop)).unwrap();
            cluster.on(0, |fs| {
                for n in 0..5 {
                    fs.mknod(&cx(), dir, format!("f{n}").as_bytes(), 0o644, 0).map(drop).unwrap();
                    fs.sync(&cx()).unwrap();
                }
            });
            let slot = cluster.hosts[0].volume.heartbeat().me().slot;
            cluster.kill(0);
            // The first block of its oldest transaction; later ones are whole.
            let (geometry, volume) = (cluster.superblock.geometry, cluster.superblock.volume);
            let ring = Ring::of(&geometry, slot);
            let header = cluster.block(ring.header);
            let header = JournalHeader::decode(&header, volume, ring.header, ring.blocks).unwrap();
            cluster.lun.overwrite(ring.at(header.tail_position).offset_bytes(), &[0x5a; 4096]);
            let waiting = cluster.spawn(0, "other", move |fs| fs.lookup(&cx(), dir, b"f0").map(drop));
            let error = joined(waiting).expect_err("what it held can't be had");
            assert!(matches!(error, FsError::Io(_)), "{error}");
            let record = cluster.slots().swap_remove(usize::from(slot.0));
            assert_eq!(record.state, SlotState::Unrecoverable);
            for host in 0..2 {
                cluster.on(host, |fs| {
                    let name = format!("after-{host}");
                    fs.mknod(&cx(), own, name.as_bytes(), 0o644, 0).map(drop).unwrap();
                });
            }
            cluster.leave();
        })
        .map(drop)
}

#[test]
fn a_damaged_journal_is_a_verdict_and_stops_nobody_else() {
    for seed in seeds(0..4) {
        damaged_journal(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}
