//! Scenes in which the lack of one rule shows ([`super::rules`] runs them without it). With all rules in place they find
//! nothing. Each says what would happen.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lunfs::device::sim::{CommandKind, Executed, Fault, FaultRule, Keep, LunObserver, SimLunOptions};
use lunfs::device::{BlockDevice, FencingKey};
use lunfs::durations::Profile;
use lunfs::fs::api::{FsError, Operations};
use lunfs::fsck::finding::Finding;
use lunfs::fsck::repair::{Allow, repair};
use lunfs::fsck::{FsckError, Observer, Progress};
use lunfs::layout::geometry::Geometry;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, on_host, seeds, spawn_on};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, Formatted, cx, identity, joined};
use lunfs::volume::{FencingMode, MountOptions, Volume};

use super::crash::hasty;
use super::model::{LONG, volumes};
use super::recovery::settled;
use super::{fencing, revokes};

const MS: Duration = Duration::from_millis(1);

type Outcome = Result<(), Failure>;

fn simulated(
    volume: &Formatted,
    seed: u64,
    bug: Option<Bug>,
    run: impl FnOnce(&Formatted) + Send + 'static,
) -> Outcome {
    let volume = volume.clone();
    Simulation::new(seed).max_time(LONG).planted(bug).try_run(move || run(&volume)).map(drop)
}

fn make(fs: &dyn Operations, name: &str) -> Result<(), FsError> {
    fs.mknod(&cx(), fs.root(), name.as_bytes(), libc::S_IFREG | 0o644, 0).map(drop)
}

fn is_there(fs: &dyn Operations, name: &str) -> bool {
    fs.lookup(&cx(), fs.root(), name.as_bytes()).map(drop).is_ok()
}

/// Makes files, each durable, until it is refused; how many were acknowledged.
fn makes_files(cluster: &Cluster, host: usize) -> Arc<AtomicU32> {
    let durable = Arc::new(AtomicU32::new(0));
    let noted = durable.clone();
    drop(cluster.spawn(host, "worker", move |fs| {
        for n in 0..60 {
            if make(&*fs, &format!("f{n}")).is_err() || fs.sync(&cx()).is_err() {
                return;
            }
            noted.store(n + 1, SeqCst);
            rt::sleep(2 * MS);
        }
    }));
    durable
}

fn has_files(cluster: &Cluster, host: usize, durable: u32) {
    cluster.on(host, |fs| {
        for n in 0..durable {
            assert!(is_there(fs, &format!("f{n}")), "file {n} of {durable} acknowledged ones is gone");
        }
    });
}

/// Files are removed, and the volume is filled: what was a lock must not become data.
pub fn locks_are_for_ever(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&hasty()[(seed % 4) as usize], seed, bug, |volume| {
        let cluster = Cluster::start(volume, 1);
        cluster.on(0, |fs| {
            (0..40).for_each(|n| make(fs, &format!("f{n}")).unwrap());
            fs.sync(&cx()).unwrap();
            (0..40).for_each(|n| {
                fs.unlink(&cx(), fs.root(), format!("f{n}").as_bytes()).map(drop).unwrap();
            });
            fs.sync(&cx()).unwrap();
            revokes::fill(fs, b"all");
        });
        cluster.finish();
    })
}

/// A commit's flush fails, then the LUN loses its cache: what was to be durable was not said to be.
pub fn failed_flush(seed: u64, bug: Option<Bug>) -> Outcome {
    // Of those with a volatile cache.
    simulated(&hasty()[(seed % 2) as usize], seed, bug, move |volume| {
        let mut cluster = Cluster::start(volume, 1);
        cluster.may_end(0);
        let rule = FaultRule::next_of(Fault::IoError, HostTag(0), CommandKind::Flush);
        cluster.lun.inject(FaultRule { skip: (seed / 2 % 6) as u32, ..rule });
        let durable = makes_files(&cluster, 0);
        while cluster.lun.fault_hits().0 == 0 {
            rt::sleep(MS / 4);
        }
        // Time for the answer, and none for a flush that makes up for it.
        rt::sleep(MS);
        cluster.kill(0);
        cluster.lun.power_cut(Keep::Nothing);
        rt::sleep(3000 * MS);
        cluster.join(HostTag(1)).unwrap();
        has_files(&cluster, 0, durable.load(SeqCst));
        settled(&cluster);
        cluster.finish();
    })
}

/// A write of a host that dies is held below it for nearly as long as its device says it can be. Another host must not
/// write the same bytes before that is over.
pub fn held_write(seed: u64, bug: Option<Bug>) -> Outcome {
    let geometry = Geometry::tiny(4);
    let hold_time = Duration::from_secs(8);
    let lun = SimLunOptions { size_bytes: geometry.size_bytes(), hold_time, ..SimLunOptions::default() };
    let volume = Formatted::with_profile(lun, Some(geometry), Profile::Fast);
    simulated(&volume, seed, bug, move |volume| {
        let write = |fs: &dyn Operations, ino, byte| {
            fs.write(&cx(), ino, None, 0, &[byte; 8192], false).map(drop).unwrap();
            fs.fsync(&cx(), ino, false).map(drop).unwrap();
        };
        let mut cluster = Cluster::start(volume, 2);
        let ino = cluster.on(0, |fs| {
            make(fs, "file").unwrap();
            let ino = fs.lookup(&cx(), fs.root(), b"file").unwrap().value.ino;
            write(fs, ino, 1);
            ino
        });
        let late = Fault::Late(7900 * MS);
        cluster.lun.inject(FaultRule::next_of(late, HostTag(0), CommandKind::Write));
        drop(cluster.spawn(0, "writer", move |fs| write(&*fs, ino, 2)));
        rt::sleep(Duration::from_millis(SimRng::new(seed, 72).between(1, 200)));
        cluster.kill(0);
        cluster.on(0, |fs| write(fs, ino, 3));
        rt::sleep(Duration::from_secs(20));
        cluster.on(0, |fs| {
            let bytes = fs.read(&cx(), ino, None, 0, 8192).unwrap().value.to_vec();
            assert!(bytes.iter().all(|b| *b == 3), "a write that the device held landed too late");
        });
        cluster.finish();
    })
}

/// A host that can read neither its doorbell nor anybody's requests, though its beats land: nobody would ever get
/// what it holds.
pub fn deaf(seed: u64, bug: Option<Bug>) -> Outcome {
    let volume = [volumes(), hasty()][(seed / 4 % 2) as usize];
    let simulation = Simulation::new(seed).max_time(Duration::from_secs(200)).planted(bug);
    let volume = volume[(seed % 4) as usize].clone();
    let finished = simulation.try_run(move || {
        let mut cluster = Cluster::start(&volume, 2);
        cluster.may_end(0);
        cluster.on(0, |fs| {
            make(fs, "held").unwrap();
            fs.sync(&cx()).unwrap();
        });
        let g = cluster.superblock.geometry;
        let me = cluster.hosts[0].volume.heartbeat().me().slot;
        let last = g.all_slots().last().unwrap();
        let bell = g.doorbell(me).offset_bytes();
        let requests =
            g.request(lunfs::types::Slot(0)).offset_bytes()..g.request(last).plus(1).offset_bytes();
        for bytes in [bell..bell + 4096, requests] {
            let rule = FaultRule::next_of(Fault::NeverExecuted, HostTag(0), CommandKind::Read);
            cluster.lun.inject(FaultRule { bytes: Some(bytes), count: u32::MAX, ..rule });
        }
        let other = cluster.spawn(1, "other", |fs| is_there(&*fs, "held"));
        assert!(joined(other));
        cluster.kill(0);
        cluster.lun.clear_faults();
        settled(&cluster);
        cluster.finish();
    });
    finished.map(drop)
}

/// A ring that can't be heard: the doorbell is damaged. The request is found all the same.
pub fn lost_ring(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&volumes()[(seed % 4) as usize], seed, bug, |volume| {
        let cluster = Cluster::start(volume, 2);
        cluster.on(0, |fs| make(fs, "held")).unwrap();
        let me = cluster.hosts[0].volume.heartbeat().me().slot;
        let bell = cluster.superblock.geometry.doorbell(me);
        cluster.lun.overwrite(bell.offset_bytes(), &[0x5a; 512]);
        let asked = rt::Instant::now();
        let other = cluster.spawn(1, "other", |fs| is_there(&*fs, "held"));
        while !other.is_finished() {
            assert!(asked.elapsed() < Duration::from_secs(5), "nobody heard, and nobody looked");
            rt::sleep(50 * MS);
        }
        assert!(joined(other));
        // For the audit.
        let image = lunfs::layout::demand::DoorbellRecord::new(bell);
        let mut bytes = [0; 512];
        lunfs::ats::SwapRecord::encode(&image, cluster.superblock.volume, &mut bytes);
        cluster.lun.overwrite(bell.offset_bytes(), &bytes);
        cluster.finish();
    })
}

/// The device refuses a living host whose key somebody took: nothing that it did not write counts as written.
pub fn refused(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&fencing::volume(true), seed, bug, move |volume| {
        let mut cluster = Cluster::start(volume, 2);
        cluster.may_end(0);
        let me = cluster.hosts[0].volume.heartbeat().me();
        let durable = makes_files(&cluster, 0);
        rt::sleep(Duration::from_micros(SimRng::new(seed, 75).between(5_000, 100_000)));
        cluster.lun.attach(HostTag(1)).fencing().unwrap().fence(FencingKey::of(me)).unwrap();
        rt::sleep(3000 * MS);
        cluster.kill(0);
        has_files(&cluster, 0, durable.load(SeqCst));
        settled(&cluster);
        cluster.finish();
    })
}

/// A host dies, and its recoverer is slow: the others leave it to him.
pub fn slow_recoverer(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&hasty()[(seed % 4) as usize], seed, bug, |volume| {
        let mut cluster = Cluster::start(volume, 3);
        let durable = makes_files(&cluster, 0);
        rt::sleep(300 * MS);
        let g = cluster.superblock.geometry;
        let ring = g.journal(cluster.hosts[0].volume.heartbeat().me().slot).offset_bytes();
        let rule = FaultRule { kind: Some(CommandKind::Read), ..FaultRule::next(Fault::Late(1500 * MS)) };
        let bytes = ring..ring + g.journal_blocks * 4096;
        cluster.kill(0);
        cluster.lun.inject(FaultRule { bytes: Some(bytes), count: 3, ..rule });
        settled(&cluster);
        (0..2).for_each(|host| has_files(&cluster, host, durable.load(SeqCst)));
        cluster.finish();
    })
}

/// A journal write of a dead host comes long after its device said it could. It must not meet another host's journal.
pub fn slot_of_the_dead(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&Formatted::hasty_on(2, SimLunOptions::default()), seed, bug, move |volume| {
        let mut cluster = Cluster::start(volume, 2);
        let g = cluster.superblock.geometry;
        let ring = g.journal(cluster.hosts[0].volume.heartbeat().me().slot).plus(1).offset_bytes();
        let rule = FaultRule::next_of(Fault::Late(20_000 * MS), HostTag(0), CommandKind::Write);
        cluster.lun.inject(FaultRule { bytes: Some(ring..ring + (g.journal_blocks - 1) * 4096), ..rule });
        let begun = rt::Instant::now();
        drop(cluster.spawn(0, "worker", |fs| {
            drop(make(&*fs, "late"));
            drop(fs.sync(&cx()));
        }));
        rt::sleep(100 * MS);
        cluster.kill(0);
        settled(&cluster);
        if cluster.join(HostTag(5)).is_ok() {
            while begun.elapsed() < 19_500 * MS {
                rt::sleep(100 * MS);
            }
            let durable = makes_files(&cluster, 1);
            rt::sleep(600 * MS);
            cluster.kill(1);
            settled(&cluster);
            has_files(&cluster, 0, durable.load(SeqCst));
        }
        rt::sleep(Duration::from_secs(20));
        cluster.finish();
    })
}

/// A host dies that had a file open which lost its last name: its room comes back without it.
pub fn orphan_of_the_dead(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&hasty()[(seed % 4) as usize], seed, bug, |volume| {
        let mut cluster = Cluster::start(volume, 2);
        cluster.on(0, |fs| {
            make(fs, "file").unwrap();
            let ino = fs.lookup(&cx(), fs.root(), b"file").unwrap().value.ino;
            fs.write(&cx(), ino, None, 0, &[7; 100_000], false).map(drop).unwrap();
            fs.open(&cx(), ino, libc::O_RDWR).map(drop).unwrap();
            fs.unlink(&cx(), fs.root(), b"file").map(drop).unwrap();
            fs.sync(&cx()).unwrap();
        });
        cluster.kill(0);
        settled(&cluster);
        // Longer than the pause between two sweeps.
        rt::sleep(Duration::from_secs(150));
        let report = cluster.finish();
        assert_eq!(report.orphans, 0, "nobody freed what the dead host had open");
    })
}

const FSCK: HostTag = HostTag(6);
const LATE: HostTag = HostTag(3);

/// Notes when the volume is a fsck's alone, and what another host writes plainly meanwhile.
#[derive(Default)]
struct Alone {
    ours: AtomicBool,
    crimes: Mutex<Vec<String>>,
}

impl LunObserver for Alone {
    fn executed(&self, c: &Executed<'_>) {
        let plain = c.kind.changes() && c.kind != CommandKind::CompareAndWrite;
        if c.host == LATE && plain && self.ours.load(SeqCst) {
            self.crimes.lock().unwrap().push(format!("{} of {:#x}", c.kind.name(), c.offset_bytes));
        }
    }
    fn power_cut(&self) {}
}

struct Watcher(Arc<Alone>);

impl Observer for Watcher {
    fn found(&mut self, _: &Finding) {}
    fn progress(&mut self, at: Progress) -> bool {
        let watching = matches!(at.pass, "watching for other hosts" | "keeping other hosts out");
        self.0.ours.store(!watching, SeqCst);
        true
    }
}

/// A host mounts about when fsck takes the volume: one of the two sees the other.
pub fn mount_beside_fsck(seed: u64, bug: Option<Bug>) -> Outcome {
    simulated(&hasty()[(seed % 4) as usize], seed, bug, move |volume| {
        let mut cluster = Cluster::start(volume, 1);
        cluster.on(0, |fs| make(fs, "file")).unwrap();
        cluster.leave();
        let lun = cluster.lun.clone();
        let alone = Arc::new(Alone::default());
        lun.set_observer(alone.clone());
        let (device, watcher) = (lun.attach(FSCK), Watcher(alone.clone()));
        let begin_fsck = move || {
            spawn_on(FSCK, "fsck", move || {
                let (device, mut watcher): (Arc<dyn BlockDevice>, _) = (device, watcher);
                let done = repair(device, &identity(FSCK), Allow::Safe, &mut watcher);
                watcher.0.ours.store(false, SeqCst);
                done.map(drop)
            })
        };
        let device: Arc<dyn BlockDevice> = lun.attach(LATE);
        let begin_mount = move || {
            spawn_on(LATE, "mount", move || {
                let (host, fencing) = (identity(LATE), FencingMode::Auto);
                Volume::mount(device, MountOptions { host, read_only: false, cache_mib: 4, fencing })
            })
        };
        let mut rng = SimRng::new(seed, 76);
        let late =
            |host, kind, by| FaultRule { count: 30, ..FaultRule::next_of(Fault::Late(by), host, kind) };
        let (mut begin_mount, mut mount) = (Some(begin_mount), None);
        let fsck = begin_fsck();
        if seed.is_multiple_of(2) {
            // Both at once: the mount may see no maintenance yet, and its first writes take their time.
            lun.inject(late(LATE, CommandKind::Write, 1900 * MS));
            rt::sleep(Duration::from_micros(rng.below(5_000)));
            mount = begin_mount.take().map(|begin| begin());
        }
        while !alone.ours.load(SeqCst) && !fsck.is_finished() {
            rt::sleep(MS / 4);
        }
        // A check that takes long.
        lun.inject(late(FSCK, CommandKind::Read, 300 * MS));
        rt::sleep(Duration::from_micros(rng.below(500_000)));
        let mount = mount.or_else(|| begin_mount.take().map(|begin| begin())).unwrap();
        let mounted = joined(mount);
        if let Ok(volume) = &mounted {
            on_host(LATE, || make(&*volume.operations(), "late").unwrap());
        }
        let checked = joined(fsck);
        let crimes = alone.crimes.lock().unwrap().join(", ");
        assert!(crimes.is_empty(), "under maintenance another host did: {crimes}");
        let allowed = match &checked {
            Ok(()) => true,
            Err(FsckError::InUse { .. }) => mounted.is_ok(),
            Err(_) => false,
        };
        assert!(allowed, "fsck says {checked:?}, the mount {:?}", mounted.as_ref().map(drop));
        if let Ok(volume) = mounted {
            on_host(LATE, || volume.leave()).unwrap();
        }
        lun.clear_observer();
        cluster.at_rest();
    })
}

const SCENES: [fn(u64, Option<Bug>) -> Outcome; 10] = [
    locks_are_for_ever,
    failed_flush,
    held_write,
    deaf,
    lost_ring,
    refused,
    slow_recoverer,
    slot_of_the_dead,
    orphan_of_the_dead,
    mount_beside_fsck,
];

#[test]
fn with_all_rules_the_scenes_find_nothing() {
    for seed in seeds(0..4) {
        for scene in SCENES {
            scene(seed, None).unwrap_or_else(|e| panic!("{e}"));
        }
    }
}
