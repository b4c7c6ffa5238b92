//! Devices that fail one host: programs get a truthful error, nothing acknowledged is lost, the other host goes on, and
//! the volume is consistent afterwards.
//!
//! Host `h0` works behind a device that fails on command (`faults`); host `h1` has the same image and a device that is
//! well.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use lunfs::device::file::{FileDevice, FileOptions};
use lunfs::layout::superblock::Superblock;
use lunfs::types::{BLOCK_BYTES_U64, Slot};

use super::harness::{Backing, Cluster, can_mount, errno, status_of};
use super::workers::{BUSY, Bystander, Writer, content, demand_acknowledged};
use crate::faults::{Action, FLUSH, FOR_EVER, Faults, READ, WRITE};

/// The profile `fast`.
const LEASE: Duration = Duration::from_secs(2);
pub const DEAD: Duration = Duration::from_millis(4500);
pub const ALL: Range<u64> = 0..u64::MAX;

pub fn superblock(cluster: &Cluster) -> (FileDevice, Superblock) {
    let options = FileOptions { logical_block_bytes: Some(512), ..FileOptions::default() };
    let device = FileDevice::open(&cluster.image(), &options).expect("the image");
    let superblock = lunfs::volume::read_superblock(&device, true).expect("a superblock");
    (device, superblock)
}

/// The journals of all slots; only one host meets the faults.
fn journals(of: &Superblock) -> Range<u64> {
    of.geometry.journal(Slot(0)).offset_bytes()..of.geometry.first_cluster() * BLOCK_BYTES_U64
}

pub fn clusters(of: &Superblock) -> Range<u64> {
    of.geometry.first_cluster() * BLOCK_BYTES_U64..u64::MAX
}

/// Everything before the journals: superblock, slots, doorbells and wishes.
fn slots(of: &Superblock) -> Range<u64> {
    BLOCK_BYTES_U64..of.geometry.journal(Slot(0)).offset_bytes()
}

/// The mount of a host that lost the volume answers one thing only.
fn demand_silence(dir: &Path) {
    assert_eq!(errno(fs::metadata(dir)), libc::ENOTCONN);
    assert_eq!(errno(fs::read_dir(dir).map(drop)), libc::ENOTCONN);
    assert_eq!(errno(File::create(dir.join("new"))), libc::ENOTCONN);
}

/// `h0` in the foreground behind a device that can fail, `h1` beside it.
pub struct Scene {
    pub cluster: Cluster,
    pub child: Child,
    pub faults: Faults,
    pub superblock: Superblock,
}

pub fn scene() -> Option<Scene> {
    if !can_mount() {
        return None;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::File(512), 4, "1G");
    let faults = Faults::new(cluster.directory(), &cluster.image());
    cluster.environment = faults.environment();
    let (_, child) = cluster.mount_in_foreground("h0");
    cluster.environment.clear();
    cluster.mount();
    let (_, superblock) = superblock(&cluster);
    Some(Scene { cluster, child, faults, superblock })
}

impl Scene {
    /// `h0` ended by itself with this status and these words; it comes back, and all that was acknowledged is there.
    fn ended(mut self, status: i32, words: &[&str], dir: &Path, acknowledged: usize) {
        assert_eq!(status_of(self.child.id() as i32), Some(status), "{}", self.cluster.log("h0"));
        let log = self.cluster.log("h0");
        for words in words.iter().copied().chain([&*format!("ends with status {status}: ")]) {
            assert!(log.contains(words), "no {words:?} in the log of h0: {log}");
        }
        let own = dir.file_name().expect("a name").to_owned();
        demand_acknowledged(&self.cluster.dir(1).join(&own), acknowledged);
        self.faults.clear();
        self.cluster.take_off(0);
        self.cluster.mount_as("h0", "rw");
        demand_acknowledged(&self.cluster.dir(1).join(&own), acknowledged);
        self.cluster.end_clean();
    }
}

/// `h0` writes, the fault comes, a program gets `EIO`; the other host has what `h0` held at most `until_taken` after
/// the fault.
fn withdraws(inject: impl FnOnce(&Faults, &Superblock), until_taken: Duration) {
    let Some(scene) = scene() else { return };
    let bystander = Bystander::start(scene.cluster.dir(1).join("own"));
    let writer = Writer::start(scene.cluster.dir(0).join("dir"));
    let dir = writer.dir.clone();
    while writer.acknowledged() < 10 {
        std::thread::sleep(Duration::from_millis(10));
    }
    inject(&scene.faults, &scene.superblock);
    let since = Instant::now();
    let (errno, at, acknowledged) = writer.failed();
    // The end of the connection may be faster than the answer of the call that met the fault.
    assert!([libc::EIO, libc::ECONNABORTED].contains(&errno), "errno {errno}");
    println!("errno {errno} after {:?}", at.saturating_duration_since(since));
    demand_acknowledged(&scene.cluster.dir(1).join("dir"), acknowledged);
    let taken = since.elapsed();
    println!("{acknowledged} acknowledged files were there for the other host after {taken:?}");
    assert!(taken < until_taken, "the other host waited {taken:?}");
    demand_silence(&dir);
    bystander.end();
    assert!(scene.faults.hits(0) > 0);
    let words = [" failed: ", "this host's slot says that it withdrew"];
    scene.ended(74, &words, &dir, acknowledged);
}

#[test]
fn a_journal_that_can_not_be_written() {
    withdraws(|f, s| f.inject(0, Action::Eio, WRITE, journals(s), FOR_EVER), DEAD);
}

#[test]
fn a_journal_that_is_written_in_part() {
    withdraws(|f, s| f.inject(0, Action::TornThenEio, WRITE, journals(s), FOR_EVER), DEAD);
}

/// One error is enough: what a commit was to make durable is in doubt.
#[test]
fn one_commit_that_fails_although_it_was_written() {
    withdraws(|f, s| f.inject(0, Action::DoneThenEio, WRITE, journals(s), 1), DEAD);
}

#[test]
fn a_flush_that_fails_once() {
    withdraws(|f, _| f.inject(0, Action::Eio, FLUSH, ALL, 1), DEAD);
}

/// A write of data that fails is the program's to know; the host goes on.
#[test]
fn a_write_of_data_that_fails() {
    for action in [Action::Eio, Action::DoneThenEio, Action::TornThenEio] {
        let Some(scene) = scene() else { return };
        let path = scene.cluster.dir(0).join("file");
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(&path).expect("open");
        file.write_all_at(&[1; 64 << 10], 0).expect("write");
        file.sync_all().expect("fsync");
        // Nothing else is to be put in its place meanwhile.
        std::thread::sleep(Duration::from_millis(300));
        scene.faults.inject(0, action, WRITE, clusters(&scene.superblock), 1);
        assert_eq!(errno(file.write_all_at(&[2; 64 << 10], 0)), libc::EIO, "{action:?}");
        assert_eq!(scene.faults.hits(0), 1);
        let mut bytes = vec![0; 64 << 10];
        file.read_exact_at(&mut bytes, 0).expect("read");
        match action {
            Action::Eio => assert!(bytes.iter().all(|b| *b == 1), "it was not executed"),
            _ => assert!(bytes.iter().all(|b| *b == 1 || *b == 2)),
        }
        file.write_all_at(&[3; 64 << 10], 0).expect("the device is well");
        file.sync_all().expect("fsync");
        assert_eq!(fs::read(scene.cluster.dir(1).join("file")).expect("read"), [3; 64 << 10]);
        drop(file);
        scene.cluster.end_clean();
    }
}

/// Transfers that the device does in part only are done to the end; nobody sees them.
#[test]
fn short_transfers() {
    let Some(scene) = scene() else { return };
    scene.faults.inject(0, Action::Short, READ | WRITE, ALL, FOR_EVER);
    let writer = Writer::start(scene.cluster.dir(0).join("dir"));
    std::thread::sleep(Duration::from_secs(2));
    let acknowledged = writer.stopped();
    assert!(acknowledged > 5 && scene.faults.hits(0) > 100);
    demand_acknowledged(&scene.cluster.dir(1).join("dir"), acknowledged);
    demand_acknowledged(&scene.cluster.dir(0).join("dir"), acknowledged);
    scene.faults.clear();
    scene.cluster.end_clean();
}

/// Beats that were executed although the device said that they failed are no reason to give up.
#[test]
fn beats_whose_answers_lie() {
    let Some(scene) = scene() else { return };
    let writer = Writer::start(scene.cluster.dir(0).join("dir"));
    scene.faults.inject(0, Action::DoneThenEio, WRITE, slots(&scene.superblock), FOR_EVER);
    std::thread::sleep(LEASE * 2);
    let acknowledged = writer.stopped();
    assert!(scene.faults.hits(0) > 10);
    scene.faults.clear();
    demand_acknowledged(&scene.cluster.dir(1).join("dir"), acknowledged);
    scene.cluster.end_clean();
}

/// A device that is gone for less than a lease costs those who needed it meanwhile an error, and nobody the mount.
#[test]
fn a_device_that_comes_back_within_the_lease() {
    let Some(scene) = scene() else { return };
    let dir = scene.cluster.dir(0).to_owned();
    fs::write(dir.join("file"), content(1)).expect("write");
    File::open(dir.join("file")).and_then(|f| f.sync_all()).expect("fsync");
    scene.faults.inject(0, Action::Eio, READ | WRITE | FLUSH, ALL, FOR_EVER);
    std::thread::sleep(LEASE / 2);
    scene.faults.clear();
    assert!(scene.faults.hits(0) > 0);
    std::thread::sleep(LEASE);
    assert!(scene.cluster.hosts[0].is_alive(), "{}", scene.cluster.log("h0"));
    let writer = Writer::start(dir.join("dir"));
    std::thread::sleep(Duration::from_millis(500));
    let acknowledged = writer.stopped();
    demand_acknowledged(&scene.cluster.dir(1).join("dir"), acknowledged);
    assert_eq!(fs::read(scene.cluster.dir(1).join("file")).expect("read"), content(1));
    scene.cluster.end_clean();
}

/// A device that is gone for longer ends the mount of a host that had nothing to commit, by its lease.
#[test]
fn a_device_that_is_gone_for_good() {
    let Some(scene) = scene() else { return };
    let dir = scene.cluster.dir(0).join("dir");
    let writer = Writer::start(dir.clone());
    std::thread::sleep(Duration::from_millis(500));
    let acknowledged = writer.stopped();
    let open = File::open(dir.join("f0")).expect("open");
    // Nothing waits for a commit or for its place any more.
    std::thread::sleep(Duration::from_secs(12));
    let bystander = Bystander::start(scene.cluster.dir(1).join("own"));
    scene.faults.inject(0, Action::Eio, READ | WRITE | FLUSH, ALL, FOR_EVER);
    let since = Instant::now();
    demand_acknowledged(&scene.cluster.dir(1).join("dir"), acknowledged);
    let taken = since.elapsed();
    println!("taken over {taken:?} after the device was gone");
    assert!(taken < DEAD + BUSY);
    demand_silence(&dir);
    assert!(open.read_at(&mut [0; 10], 0).is_err(), "an open file shows what was cached");
    bystander.end();
    let words = ["no beat landed within the lease; the device's last answer: "];
    scene.ended(69, &words, &dir, acknowledged);
}

/// A device that answers nothing for less than a lease: everything waits, nothing fails.
#[test]
fn a_device_that_hangs_within_the_lease() {
    let Some(scene) = scene() else { return };
    let writer = Writer::start(scene.cluster.dir(0).join("dir"));
    std::thread::sleep(Duration::from_millis(300));
    let before = writer.acknowledged();
    scene.faults.inject(0, Action::Hang, READ | WRITE | FLUSH, ALL, FOR_EVER);
    std::thread::sleep(LEASE / 2);
    scene.faults.clear();
    std::thread::sleep(LEASE);
    let acknowledged = writer.stopped();
    assert!(acknowledged > before + 2, "{acknowledged} after {before}");
    demand_acknowledged(&scene.cluster.dir(1).join("dir"), acknowledged);
    scene.cluster.end_clean();
}

/// One that hangs for longer: the mount answers errors when its lease is over, though its daemon still waits for the
/// device, and what the device executes late is no harm.
#[test]
fn a_device_that_hangs_past_the_lease() {
    let Some(scene) = scene() else { return };
    let writer = Writer::start(scene.cluster.dir(0).join("dir"));
    let dir = writer.dir.clone();
    std::thread::sleep(Duration::from_millis(500));
    scene.faults.inject(0, Action::Hang, READ | WRITE | FLUSH, ALL, FOR_EVER);
    let since = Instant::now();
    let (_, at, acknowledged) = writer.failed();
    let waited = at.saturating_duration_since(since);
    println!("an error after {waited:?}");
    assert!(waited < LEASE + BUSY, "a program waited {waited:?}");
    demand_silence(&dir);
    assert!(scene.cluster.hosts[0].is_alive(), "it can't end before the device lets it");
    // Within the dead time: nobody has fenced it, which kills a process in the middle of a write.
    std::thread::sleep((since + LEASE + Duration::from_secs(1)).saturating_duration_since(Instant::now()));
    scene.faults.clear();
    scene.ended(75, &["no beat landed within the lease"], &dir, acknowledged);
}
