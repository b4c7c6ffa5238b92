//! Beside other hosts: those that died, those that live, those that come while a repair goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lunfs::device::BlockDevice;
use lunfs::device::sim::SimLunOptions;
use lunfs::fsck::finding::{Finding, Kind};
use lunfs::fsck::repair::{Allow, repair};
use lunfs::fsck::{FsckError, Observer, Progress};
use lunfs::journal::Ring;
use lunfs::layout::journal::JournalHeader;
use lunfs::layout::lock::{LockMode, LockRecord};
use lunfs::layout::slot::SlotState;
use lunfs::rt::sim::{SimRng, Simulation, on_host, seeds, spawn_on};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::Slot;
use lunfs::volume::{FencingMode, MountError, MountOptions, Volume};

use super::broken::{Broken, host, populated};

const FSCK: HostTag = HostTag(7);
const HOST: HostTag = HostTag(3);

fn volume_lock(v: &Broken) -> LockRecord {
    let at = v.geometry.volume_lock();
    LockRecord::decode(&v.get(at)[..], v.superblock.volume, at).unwrap()
}

fn mount(v: &Broken) -> Result<Arc<Volume>, MountError> {
    let device: Arc<dyn BlockDevice> = v.lun.attach(HOST);
    on_host(HOST, || {
        Volume::mount(
            device,
            MountOptions { host: host(3), read_only: false, cache_mib: 4, fencing: FencingMode::Auto },
        )
    })
}

/// Says when the volume is ours, and stops where it is told to.
struct Watcher {
    ours: Arc<AtomicBool>,
    stop_in: Option<&'static str>,
}

impl Watcher {
    fn new(stop_in: Option<&'static str>) -> Self {
        Watcher { ours: Arc::default(), stop_in }
    }
}

impl Observer for Watcher {
    fn found(&mut self, _: &Finding) {}
    fn progress(&mut self, at: Progress) -> bool {
        let watching = matches!(at.pass, "watching for other hosts" | "keeping other hosts out");
        self.ours.store(!watching, Ordering::Relaxed);
        self.stop_in != Some(at.pass)
    }
}

fn repair_on(v: &Broken, watcher: &mut Watcher) -> Result<u64, FsckError> {
    let device: Arc<dyn BlockDevice> = v.lun.attach(FSCK);
    let result = on_host(FSCK, || repair(device, &host(7), Allow::Everything, watcher));
    watcher.ours.store(false, Ordering::Relaxed);
    result.map(|done| done.repaired)
}

#[test]
fn what_a_dead_host_committed_is_judged_as_if_in_place_and_replayed_before_repairs() {
    for seed in seeds(0..6) {
        let (formatted, inodes) = (Formatted::tiny(4), populated().inodes);
        Simulation::new(seed).run(move || {
            let mut cluster = Cluster::start(&formatted, 2);
            let root = cluster.root();
            cluster.on(0, |fs| {
                let dir = fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino;
                for i in 0..40 {
                    let name = format!("file{i}");
                    let mode = libc::S_IFREG | 0o644;
                    let ino = fs.mknod(&cx(), dir, name.as_bytes(), mode, 0).unwrap().value.ino;
                    fs.write(&cx(), ino, None, 0, &[7; 9000], false).unwrap();
                }
                fs.sync(&cx()).unwrap();
                fs.unlink(&cx(), dir, b"file3").unwrap();
            });
            cluster.kill(0);
            cluster.leave();
            let lun = cluster.lun.clone();
            lun.clear_observer();
            let superblock = cluster.superblock.clone();
            let v = Broken { lun, geometry: superblock.geometry, superblock, inodes };
            let (report, found) = v.check();
            assert_eq!((report.errors, found.len()), (0, 1), "{found:#?}");
            assert_eq!(found[0].kind, Kind::JournalPending);
            assert!(report.files >= 39, "{report:?}");
            let (repaired, told) = v.repair(Allow::Safe);
            assert_eq!((repaired.report.errors, repaired.report.notes), (0, 0), "{told:#?}");
            assert_eq!(v.check().1, []);
            assert!(v.listing().contains_key("/dir/file39"));
        });
    }
}

#[test]
fn where_every_slot_belongs_to_a_dead_host_a_repair_takes_one_over_and_replays_it() {
    for seed in seeds(0..6) {
        let (damaged, inodes) = (seed % 2 == 1, populated().inodes);
        let formatted = Formatted::hasty_on(1, SimLunOptions::default());
        Simulation::new(seed).run(move || {
            let mut cluster = Cluster::start(&formatted, 1);
            let root = cluster.root();
            cluster.on(0, |fs| {
                let dir = fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino;
                for i in 0..10 {
                    let name = format!("file{i}");
                    fs.mknod(&cx(), dir, name.as_bytes(), libc::S_IFREG | 0o644, 0).map(drop).unwrap();
                    fs.sync(&cx()).unwrap();
                }
            });
            cluster.kill(0);
            let (lun, superblock) = (cluster.lun.clone(), cluster.superblock.clone());
            lun.clear_observer();
            let v = Broken { lun, geometry: superblock.geometry, superblock, inodes };
            let ring = Ring::of(&v.geometry, Slot(0));
            if damaged {
                let header =
                    JournalHeader::decode(&v.get(ring.header), v.superblock.volume, ring.header, ring.blocks);
                let first = ring.at(header.unwrap().tail_position);
                v.lun.overwrite(first.offset_bytes(), &[0x5a; 4096]);
            }
            let (repaired, told) = v.repair(if damaged { Allow::Everything } else { Allow::Safe });
            let named = told.iter().any(|f| f.kind == Kind::JournalDamaged);
            assert_eq!(named, damaged, "{told:#?}");
            assert_eq!((repaired.report.errors, repaired.report.notes), (0, 0), "{told:#?}");
            assert_eq!(v.check().1, []);
            assert_eq!(v.listing().contains_key("/dir/file9"), !damaged);
            assert_eq!(v.slot_state(Slot(0)), SlotState::Left);
            let host = mount(&v).unwrap();
            on_host(HOST, || host.leave()).unwrap();
        });
    }
}

#[test]
fn a_host_at_work_is_never_repaired_beneath() {
    let populated = populated();
    Simulation::new(3).run(|| {
        let v = Broken::new(populated);
        let host = mount(&v).unwrap();
        let before = volume_lock(&v);
        assert!(matches!(v.examine(), Err(FsckError::InUse { .. })));
        let error = repair_on(&v, &mut Watcher::new(None)).unwrap_err();
        assert!(matches!(&error, FsckError::InUse { host, .. } if host == "host3"), "{error}");
        assert_eq!(volume_lock(&v), before);
        assert!(host.door().lease().allows());
        on_host(HOST, || host.leave()).unwrap();
    });
}

#[test]
fn a_repair_that_is_stopped_gives_the_volume_back() {
    for pass in ["watching for other hosts", "keeping other hosts out", "clusters", "inodes", "links"] {
        let populated = populated();
        Simulation::new(3).run(move || {
            let v = Broken::new(populated);
            let error = repair_on(&v, &mut Watcher::new(Some(pass))).unwrap_err();
            assert!(matches!(error, FsckError::Cancelled), "{pass}: {error}");
            assert!(!matches!(volume_lock(&v).mode, LockMode::Exclusive { .. }), "{pass}");
            let slots = v.geometry.all_slots().map(|s| v.slot_state(s)).collect::<Vec<_>>();
            assert!(!slots.contains(&SlotState::Live), "{pass}: {slots:?}");
            let host = mount(&v).unwrap();
            on_host(HOST, || host.leave()).unwrap();
        });
    }
}

#[test]
fn a_mount_beside_a_repair_says_so_and_leaves() {
    let populated = populated();
    Simulation::new(5).run(|| {
        let v = Broken::new(populated);
        let ours = Arc::new(AtomicBool::new(false));
        let device: Arc<dyn BlockDevice> = v.lun.attach(FSCK);
        let seen = ours.clone();
        let fsck = spawn_on(FSCK, "fsck", move || {
            let mut watcher = Slow { watcher: Watcher { ours: seen, stop_in: None } };
            repair(device, &host(7), Allow::Everything, &mut watcher)
        });
        while !ours.load(Ordering::Relaxed) {
            rt::sleep(Duration::from_millis(50));
        }
        let error = mount(&v).err().expect("a mount under maintenance");
        assert!(matches!(error, MountError::Maintenance(_)), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
        joined(fsck).unwrap();
        let host = mount(&v).unwrap();
        on_host(HOST, || host.leave()).unwrap();
    });
}

/// Takes its time in every step, so that others come in between.
struct Slow {
    watcher: Watcher,
}

impl Observer for Slow {
    fn found(&mut self, finding: &Finding) {
        self.watcher.found(finding);
    }
    fn progress(&mut self, at: Progress) -> bool {
        rt::sleep(Duration::from_millis(20));
        self.watcher.progress(at)
    }
}

#[test]
fn a_repair_that_died_keeps_hosts_out_until_another_ends() {
    let populated = populated();
    Simulation::new(6).run(|| {
        let v = Broken::new(populated);
        let ours = Arc::new(AtomicBool::new(false));
        let device: Arc<dyn BlockDevice> = v.lun.attach(FSCK);
        let seen = ours.clone();
        let fsck = spawn_on(FSCK, "fsck", move || {
            let mut watcher = Slow { watcher: Watcher { ours: seen, stop_in: None } };
            repair(device, &host(7), Allow::Everything, &mut watcher).map(drop)
        });
        while !ours.load(Ordering::Relaxed) {
            rt::sleep(Duration::from_millis(50));
        }
        rt::sim::kill_host(FSCK);
        std::mem::forget(fsck);
        assert!(matches!(mount(&v), Err(MountError::Maintenance(_))));
        rt::sleep(Duration::from_secs(100));
        assert!(matches!(mount(&v), Err(MountError::Maintenance(_))));
        let device: Arc<dyn BlockDevice> = v.lun.attach(HostTag(8));
        let done = on_host(HostTag(8), || repair(device, &host(8), Allow::Safe, &mut Watcher::new(None)));
        assert_eq!(done.unwrap().report.errors, 0);
        let host = mount(&v).unwrap();
        on_host(HOST, || host.leave()).unwrap();
        assert_eq!(v.check().1, []);
    });
}

#[test]
fn a_mount_and_a_repair_that_begin_together_never_both_have_the_volume() {
    let (mut mounted, mut repaired) = (0, 0);
    for seed in seeds(0..40) {
        let populated = populated();
        let outcome = Simulation::new(seed).run(move || {
            let v = Broken::new(populated);
            let mut rng = SimRng::new(seed, 5);
            let ours = Arc::new(AtomicBool::new(false));
            let device: Arc<dyn BlockDevice> = v.lun.attach(FSCK);
            let seen = ours.clone();
            let pause = Duration::from_micros(rng.between(0, 30_000));
            let fsck = spawn_on(FSCK, "fsck", move || {
                rt::sleep(pause);
                // So slow that a host which should not be there is seen.
                let mut watcher = Slow { watcher: Watcher { ours: seen.clone(), stop_in: None } };
                let result = repair(device, &host(7), Allow::Everything, &mut watcher);
                seen.store(false, Ordering::Relaxed);
                result.is_ok()
            });
            let far = if rng.below(4) == 0 { 20_000_000 } else { 30_000 };
            rt::sleep(Duration::from_micros(rng.between(0, far)));
            let result = mount(&v);
            let mounted = result.is_ok();
            if let Ok(host) = result {
                for _ in 0..200 {
                    assert!(!ours.load(Ordering::Relaxed), "both have the volume");
                    rt::sleep(Duration::from_millis(200));
                }
                on_host(HOST, || host.leave()).unwrap();
            }
            (mounted, joined(fsck))
        });
        mounted += u32::from(outcome.0);
        repaired += u32::from(outcome.1);
    }
    assert!(mounted > 3 && repaired > 3, "{mounted} mounts and {repaired} repairs came through");
}

impl Broken {
    fn slot_state(&self, slot: Slot) -> SlotState {
        let mut state = SlotState::Free;
        self.slot(slot.0, |record| state = record.state);
        state
    }
}

/// Mounts while a check goes on.
struct Joins<'a>(&'a Broken, Option<Arc<Volume>>);

impl Observer for Joins<'_> {
    fn found(&mut self, _: &Finding) {}
    fn progress(&mut self, at: Progress) -> bool {
        if at.pass == "inodes" && self.1.is_none() {
            self.1 = Some(mount(self.0).unwrap());
        }
        true
    }
}

#[test]
fn a_check_says_that_a_host_came() {
    let populated = populated();
    Simulation::new(8).run(|| {
        let v = Broken::new(populated);
        let device: Arc<dyn BlockDevice> = v.lun.attach(FSCK);
        let mut joins = Joins(&v, None);
        let result = on_host(FSCK, || lunfs::fsck::examine(device, &mut joins));
        assert!(matches!(result, Err(FsckError::Appeared { .. })), "{result:?}");
        let host = joins.1.unwrap();
        on_host(HOST, || host.leave()).unwrap();
    });
}
