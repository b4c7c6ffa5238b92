//! A check of a volume in use: finds nothing on a whole volume whatever others do meanwhile, finds what `fsck` would
//! find on a damaged one, and comes to an end whatever happens.

#[allow(dead_code)]
#[path = "../fsck/broken.rs"]
mod broken;
#[allow(dead_code)]
#[path = "../fsck/cases.rs"]
mod cases;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lunfs::device::BlockDevice;
use lunfs::device::sim::Partition;
use lunfs::fs::api::{FsError, Operations, SetAttributes};
use lunfs::fsck::finding::{Finding, Kind, Place};
use lunfs::fsck::{Observer, Progress};
use lunfs::layout::Nonce;
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::lock::{LockMode, LockRecord};
use lunfs::layout::slot::SlotState;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, on_host, seeds, spawn_on};
use lunfs::rt::{self, HostTag};
use lunfs::scrub::{Options, Report, ScrubError, scrub};
use lunfs::testing::cluster::{Cluster, cx, joined};
use lunfs::types::{Incarnation, InodeNo};
use lunfs::volume::{FencingMode, MountOptions, Volume};

use self::broken::{Broken, host, populated};
use self::cases::CASES;
use super::model::{LONG, variant, volumes};

const MS: Duration = Duration::from_millis(1);

fn quick() -> Options {
    Options { bytes_per_s: 0, asks_per_s: 1000, ..Options::default() }
}

/// One check on a host; what it found.
fn check_on(cluster: &Cluster, host: usize, options: Options) -> (Result<Report, ScrubError>, Vec<Finding>) {
    let host = &cluster.hosts[host];
    let volume = host.volume.clone();
    let thread = spawn_on(host.tag, "scrub", move || {
        let mut found = Vec::new();
        let report = scrub(&volume, &options, &mut found);
        (report, found)
    });
    joined(thread)
}

fn said(found: &[Finding]) -> Vec<String> {
    found.iter().map(ToString::to_string).collect()
}

/// One random change, in directories that all hosts share and in one of the host's own.
fn change(fs: &dyn Operations, dirs: &[InodeNo], rng: &mut SimRng) -> Result<(), FsError> {
    let name = format!("{:0>1$}", rng.below(30), [2, 2, 180][rng.index(3)]).into_bytes();
    let other = format!("{:0>1$}", rng.below(30), [2, 2, 180][rng.index(3)]).into_bytes();
    let (from, to) = (dirs[rng.index(dirs.len())], dirs[rng.index(dirs.len())]);
    let len = [30, 4000, 9000, 60_000][rng.index(4)];
    match rng.below(16) {
        0..4 => fs.mknod(&cx(), from, &name, libc::S_IFREG | 0o644, 0).map(drop),
        4 => fs.mkdir(&cx(), from, &name, 0o755).map(drop),
        5 => fs.unlink(&cx(), from, &name).map(drop),
        6 => fs.rmdir(&cx(), from, &name).map(drop),
        7..9 => fs.rename(&cx(), from, &name, to, &other, 0).map(drop),
        9 => fs.rename(&cx(), from, &name, to, &other, libc::RENAME_EXCHANGE).map(drop),
        10 => {
            let ino = fs.lookup(&cx(), from, &name)?.value.ino;
            fs.link(&cx(), ino, to, &other).map(drop)
        }
        11 => {
            let ino = fs.lookup(&cx(), from, &name)?.value.ino;
            let set = SetAttributes { size: Some(rng.below(2) * 5000), ..SetAttributes::default() };
            fs.setattr(&cx(), ino, &set).map(drop)
        }
        12 => {
            // Scattered blocks: a tree of extents.
            let ino = fs.lookup(&cx(), from, &name)?.value.ino;
            for _ in 0..24 {
                fs.write(&cx(), ino, None, rng.below(300) * 8192, &[3; 4096], false)?;
            }
            Ok(())
        }
        13 => {
            // An orphan for a while.
            let (at, opened) = fs.create(&cx(), from, &name, 0o644, libc::O_RDWR)?.value;
            let gone = fs.unlink(&cx(), from, &name);
            rt::sleep(rng.below(300) as u32 * MS);
            fs.release(at.ino, opened.handle);
            gone.map(drop)
        }
        _ => {
            let ino = fs.lookup(&cx(), from, &name)?.value.ino;
            fs.write(&cx(), ino, None, 0, &vec![7; len], true).map(drop)
        }
    }
}

fn is_answer(error: &FsError) -> bool {
    use FsError::*;
    matches!(
        error,
        NotFound | Exists | Stale | NotEmpty | NoSpace | IsDirectory | NotDirectory | Loop | TooLarge
    ) || [libc::EPERM, libc::EINVAL].contains(&error.errno())
}

/// Lets hosts change things until the end; `may_fail`: a host whose lease ends stops.
fn load(
    cluster: &Cluster,
    hosts: &[usize],
    seed: u64,
    stop: &Arc<AtomicBool>,
    may_fail: bool,
) -> Vec<rt::JoinHandle<()>> {
    let root = cluster.root();
    let shared = ["s0", "s1"].map(|name| {
        cluster.on(hosts[0], |fs| fs.mkdir(&cx(), root, name.as_bytes(), 0o755).unwrap().value.ino)
    });
    let threads = hosts.iter().map(|host| {
        let (stop, mut rng) = (stop.clone(), SimRng::new(seed, 300 + *host as u64));
        let name = format!("own-{host}");
        cluster.spawn(*host, "load", move |fs| {
            let own = fs.mkdir(&cx(), root, name.as_bytes(), 0o755).unwrap().value.ino;
            let dirs = [shared[0], shared[1], own, own];
            while !stop.load(Ordering::Relaxed) {
                match change(&*fs, &dirs, &mut rng) {
                    Ok(()) => {}
                    Err(e) if is_answer(&e) => {}
                    Err(e) if may_fail => return drop(e),
                    Err(e) => panic!("{e}"),
                }
                if rng.chance(0.05) {
                    rt::sleep(rng.below(400) as u32 * MS);
                }
            }
        })
    });
    threads.collect()
}

/// Three checks on one of three hosts while they change things. Nothing may be found.
pub fn beside_changes(seed: u64, bug: Option<Bug>) -> Result<Vec<Report>, Failure> {
    let (formatted, faults) = variant(seed);
    let simulation = Simulation::new(seed).max_time(LONG).max_steps(u64::MAX).planted(bug);
    let finished = simulation.try_run(move || {
        let cluster = Cluster::start(formatted, 3);
        if faults {
            cluster.unknown_swaps(seed, 30);
        }
        let stop: Arc<AtomicBool> = Arc::default();
        // The host that checks works, too, in every other run.
        let hosts: &[usize] = if seed.is_multiple_of(2) { &[0, 1] } else { &[0, 1, 2] };
        let threads = load(&cluster, hosts, seed, &stop, false);
        let mut reports = Vec::new();
        for round in 0..3 {
            rt::sleep(500 * MS);
            let options = Options { bytes_per_s: [0, 4 << 20][round % 2], ..quick() };
            let (report, found) = check_on(&cluster, 2, options);
            assert_eq!(said(&found), [""; 0], "LUNFS_SIM_SEED={seed}");
            reports.push(report.unwrap());
        }
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().for_each(joined);
        cluster.finish();
        reports
    })?;
    Ok(finished.value)
}

#[test]
fn beside_changes_of_all_hosts_nothing_is_found() {
    let mut all = Report::default();
    for seed in seeds(0..60) {
        // A lock is asked for in about every second seed.
        if seed >= 10 && all.asked > 0 && std::env::var_os("LUNFS_SIM_SEEDS").is_none() {
            break;
        }
        for report in beside_changes(seed, None).unwrap_or_else(|failure| panic!("{failure}")) {
            assert!(report.inodes > 4 && report.directories > 2, "{report:?}");
            all.cases += report.cases;
            all.asked += report.asked;
            all.inodes += report.inodes;
            all.not_looked += report.not_looked;
        }
    }
    eprintln!("{all:?}");
    // Else nothing was tried: what moves must look wrong now and then, and be looked at.
    assert!(all.cases > 20 && all.asked > 0, "{all:?}");
    assert!(all.not_looked < all.cases / 10, "too much was left: {all:?}");
}

/// Mounts a copy of the small volume on one host, breaks it, and checks it there.
fn check_broken(
    number: usize,
    harm: fn(&Broken),
    options: Options,
) -> (Result<Report, ScrubError>, Vec<Finding>) {
    let populated = populated();
    Simulation::new(number as u64).run(move || {
        let v = Broken::new(populated);
        let tag = HostTag(5);
        let device: Arc<dyn BlockDevice> = v.lun.attach(tag);
        let mounted = spawn_on(tag, "mount", move || {
            let options =
                MountOptions { host: host(5), read_only: false, cache_mib: 4, fencing: FencingMode::Auto };
            Volume::mount(device, options).unwrap()
        });
        let volume = joined(mounted);
        // Its look for orphans is over.
        rt::sleep(1000 * MS);
        harm(&v);
        let checking = volume.clone();
        let checked = spawn_on(tag, "scrub", move || {
            let mut found = Vec::new();
            let report = scrub(&checking, &options, &mut found);
            (report, found)
        });
        let checked = joined(checked);
        on_host(tag, || drop(volume.leave()));
        checked
    })
}

/// What takes the whole volume at one moment to tell.
const NOT_TOLD: &[Kind] =
    &[Kind::BlockLost, Kind::Nameless, Kind::NetAllocation, Kind::DirectoryLoop, Kind::Maintenance];

#[test]
fn what_fsck_finds_is_found_online_by_the_same_name() {
    let only = std::env::var("LUNFS_FSCK_CASE").ok();
    let mut failed = Vec::new();
    let mut told = 0;
    for (number, (kind, harm, ..)) in CASES.iter().enumerate() {
        if only.as_ref().is_some_and(|only| only != kind.name()) {
            continue;
        }
        let expected = Simulation::new(0).run(move || {
            let v = Broken::new(populated());
            harm(&v);
            v.check().1
        });
        // The link count of a file is known when all names are known.
        let of_a_file =
            *kind == Kind::Links && expected[0].place == Place::of_inode(populated().inodes.small);
        let silent = NOT_TOLD.contains(kind) || of_a_file;
        let (report, found) = check_broken(number, *harm, quick());
        let places = |list: &[Finding]| list.iter().map(|f| (f.kind, f.place)).collect::<Vec<_>>();
        let right = if silent { found.is_empty() } else { places(&found) == places(&expected) };
        told += usize::from(!silent);
        if !right
            || report.as_ref().is_ok_and(|r| r.errors + r.notes != found.len() as u64)
            || report.is_err()
        {
            failed.push(format!(
                "case {number}, {}: expected {:#?}\nfound {:#?}\n{report:?}",
                kind.name(),
                said(&expected),
                said(&found)
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert!(told > 35 || only.is_some(), "only {told} told");
}

#[test]
fn a_damaged_block_is_found_although_the_cache_has_it() {
    // The host has the inode in its cache and its lock; what lies on the device is broken all the same.
    let populated = populated();
    Simulation::new(3).run(move || {
        let v = Broken::new(populated);
        let tag = HostTag(5);
        let device: Arc<dyn BlockDevice> = v.lun.attach(tag);
        let (small, root) = (v.inodes.small, v.geometry.root());
        on_host(tag, || {
            let options =
                MountOptions { host: host(5), read_only: false, cache_mib: 4, fencing: FencingMode::Auto };
            let volume = Volume::mount(device, options).unwrap();
            volume.operations().lookup(&cx(), root, b"small").map(drop).unwrap();
            v.garbage(small.body());
            volume.operations().getattr(&cx(), small).map(drop).expect("it is cached");
            let mut found = Vec::new();
            scrub(&volume, &quick(), &mut found).unwrap();
            assert_eq!(found.iter().map(|f| f.kind).collect::<Vec<_>>(), [Kind::InodeUnreadable]);
            volume.leave().unwrap();
        });
    });
}

#[test]
fn the_death_of_a_host_is_no_damage() {
    for seed in seeds(0..8) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).max_steps(u64::MAX).run(move || {
            let mut cluster = Cluster::start(volume, 3);
            let stop: Arc<AtomicBool> = Arc::default();
            let threads = load(&cluster, &[0, 1], seed, &stop, true);
            let (tag, checking) = (cluster.hosts[2].tag, cluster.hosts[2].volume.clone());
            rt::sleep(SimRng::new(seed, 8).below(3000) as u32 * MS);
            let slow = Options { bytes_per_s: 2 << 20, ..quick() };
            let thread = spawn_on(tag, "scrub", move || {
                let mut found = Vec::new();
                (scrub(&checking, &slow, &mut found), found)
            });
            rt::sleep(SimRng::new(seed, 9).below(2000) as u32 * MS);
            cluster.kill(0);
            let (report, found) = joined(thread);
            assert_eq!(said(&found), [""; 0], "LUNFS_SIM_SEED={seed}");
            let report = report.unwrap();
            assert_eq!(report.not_looked, 0, "LUNFS_SIM_SEED={seed}: {report:?}");
            stop.store(true, Ordering::Relaxed);
            joined(threads.into_iter().nth(1).unwrap());
            rt::sleep(Duration::from_secs(60));
            cluster.finish();
        });
    }
}

#[test]
fn a_host_without_a_lease_says_so_and_finds_nothing() {
    for seed in seeds(0..8) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).max_steps(u64::MAX).run(move || {
            let mut cluster = Cluster::start(volume, 3);
            cluster.may_end(2);
            let stop: Arc<AtomicBool> = Arc::default();
            let threads = load(&cluster, &[0, 1], seed, &stop, false);
            let (tag, checking) = (cluster.hosts[2].tag, cluster.hosts[2].volume.clone());
            let thread = spawn_on(tag, "scrub", move || {
                let mut found = Vec::new();
                // Longer than the lease lasts.
                let slow = Options { bytes_per_s: 64 << 10, ..quick() };
                (scrub(&checking, &slow, &mut found), found)
            });
            rt::sleep(SimRng::new(seed, 9).below(2000) as u32 * MS);
            let how = [Partition::Hang, Partition::Fail][(seed % 2) as usize];
            cluster.lun.partition(tag, how);
            rt::sleep(Duration::from_secs(40));
            cluster.lun.heal(tag);
            let (report, found) = joined(thread);
            // Without its device it is the first to know; else it hears from the lease.
            let ended = matches!(report, Err(ScrubError::LeaseEnded(_) | ScrubError::Device(_)));
            assert!(ended, "{report:?}");
            assert_eq!(said(&found), [""; 0], "LUNFS_SIM_SEED={seed}");
            stop.store(true, Ordering::Relaxed);
            threads.into_iter().for_each(joined);
            drop(cluster.hosts.remove(2));
            rt::sleep(Duration::from_secs(60));
            cluster.finish();
        });
    }
}

/// Cancels at the first sign of progress after so many.
struct Impatient(u32);

impl Observer for Impatient {
    fn found(&mut self, finding: &Finding) {
        panic!("found {finding}");
    }
    fn progress(&mut self, _: Progress) -> bool {
        self.0 = self.0.saturating_sub(1);
        self.0 > 0
    }
}

#[test]
fn it_ends_when_it_is_told_to() {
    Simulation::new(1).max_time(LONG).run(move || {
        let cluster = Cluster::start(&volumes()[0], 1);
        let (tag, volume) = (cluster.hosts[0].tag, cluster.hosts[0].volume.clone());
        let checking = volume.clone();
        let ended = spawn_on(tag, "scrub", move || scrub(&checking, &quick(), &mut Impatient(3)));
        assert_eq!(joined(ended), Err(ScrubError::Cancelled));
        let options = Options { bytes_per_s: 1 << 10, ..quick() };
        let cancelled = options.cancelled.clone();
        let ended = spawn_on(tag, "scrub", move || scrub(&volume, &options, &mut Vec::new()));
        rt::sleep(700 * MS);
        cancelled.store(true, Ordering::Relaxed);
        let before = rt::sim::now().unwrap();
        assert_eq!(joined(ended), Err(ScrubError::Cancelled));
        assert!(rt::sim::now().unwrap() - before < 200 * MS);
        cluster.finish();
    });
}

/// What a host holds exclusively and nothing is wrong with stays with it.
#[test]
fn locks_of_others_stay_where_they_are() {
    Simulation::new(2).max_time(LONG).run(move || {
        let cluster = Cluster::start(&volumes()[0], 2);
        let root = cluster.root();
        let (dir, files) = cluster.on(0, |fs| {
            let dir = fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino;
            let files: Vec<InodeNo> = (0..100)
                .map(|i| {
                    let name = format!("file-{i}").into_bytes();
                    let (at, opened) = fs.create(&cx(), dir, &name, 0o644, libc::O_RDWR).unwrap().value;
                    fs.write(&cx(), at.ino, None, 0, &[1; 9000], false).unwrap();
                    if i > 10 {
                        fs.release(at.ino, opened.handle);
                    }
                    at.ino
                })
                .collect();
            fs.sync(&cx()).unwrap();
            (dir, files)
        });
        // Put in place by the host in its own time.
        rt::sleep(Duration::from_secs(20));
        let holder = |ino: InodeNo| {
            let at = lock_of_inode(ino);
            let record = LockRecord::decode(&cluster.block(at)[..], cluster.superblock.volume, at).unwrap();
            (record.swap_counter, record.mode)
        };
        let mut before: Vec<_> = files.iter().map(|ino| holder(*ino)).collect();
        before.push(holder(dir));
        assert!(before.iter().all(|(_, mode)| matches!(mode, LockMode::Exclusive { .. })));
        let (report, found) = check_on(&cluster, 1, quick());
        let report = report.unwrap();
        assert_eq!(said(&found), [""; 0]);
        assert_eq!((report.asked, report.cases, report.not_looked), (0, 0, 0), "{report:?}");
        assert!(report.files >= 100 && report.names >= 101, "{report:?}");
        let mut after: Vec<_> = files.iter().map(|ino| holder(*ino)).collect();
        after.push(holder(dir));
        assert_eq!(before, after);
        cluster.finish();
    });
}

/// Damage under another host's exclusive lock: asked for and found, or left, as wished.
#[test]
fn what_is_busy_is_asked_for_or_left() {
    for leave_busy in [false, true] {
        Simulation::new(4).max_time(LONG).run(move || {
            let cluster = Cluster::start(&volumes()[0], 2);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| {
                let (at, _) = fs.create(&cx(), root, b"disk", 0o644, libc::O_RDWR).unwrap().value;
                fs.write(&cx(), at.ino, None, 0, &[1; 9000], false).unwrap();
                fs.sync(&cx()).unwrap();
                at.ino
            });
            rt::sleep(Duration::from_secs(20));
            let good = cluster.block(ino.body());
            cluster.lun.overwrite(ino.body().offset_bytes(), &[0x5a; 4096]);
            let (report, found) = check_on(&cluster, 1, Options { leave_busy, ..quick() });
            let report = report.unwrap();
            if leave_busy {
                assert_eq!(said(&found), [""; 0]);
                assert!(report.asked == 0 && report.not_looked > 0, "{report:?}");
                let why = &report.not_looked_at[0].why;
                assert!(why.contains("host 'host0' holds it exclusively"), "{why}");
            } else {
                assert_eq!(found.iter().map(|f| f.kind).collect::<Vec<_>>(), [Kind::InodeUnreadable]);
                assert!(report.asked > 0 && report.not_looked == 0, "{report:?}");
            }
            cluster.lun.overwrite(ino.body().offset_bytes(), &good[..]);
            cluster.finish();
        });
    }
}

#[test]
fn what_nobody_can_give_is_left_with_the_reason() {
    let harm: fn(&Broken) = |v| {
        v.slot(0, |r| {
            (r.state, r.settled_up_to, r.nonce) = (SlotState::Unrecoverable, Incarnation(0), Nonce([9; 16]));
        });
        v.garbage(v.inodes.small.body());
        // Until the host sees that the other one's life is lost.
        rt::sleep(Duration::from_secs(4));
    };
    let (report, found) = check_broken(0, harm, quick());
    let report = report.unwrap();
    assert_eq!(
        found.iter().map(|f| f.kind).collect::<Vec<_>>(),
        [Kind::JournalDamaged],
        "{:?}",
        said(&found)
    );
    assert!(report.not_looked > 0, "{report:?}");
    assert!(report.not_looked_at[0].why.contains("journal can't be replayed"), "{report:?}");
}
