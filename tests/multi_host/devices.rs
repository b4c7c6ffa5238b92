//! Devices that fail one host: programs get a truthful error, nothing acknowledged is lost, the other host goes on, and
//! the volume is consistent afterwards.
//!
//! Host `h0` works behind a device that fails on command (`faults`); host `h1` has the same image and a device that is
//! well. A device that is full is a real one: a memory filesystem that is too small for its image.

use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lunfs::device::file::{FileDevice, FileOptions};
use lunfs::layout::superblock::Superblock;
use lunfs::types::{BLOCK_BYTES_U64, Slot};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;

use super::harness::{Backing, Cluster, can_mount, errno, status_of};
use crate::faults::{Action, FLUSH, FOR_EVER, Faults, READ, SHARED_LOCK, WRITE};

/// The profile `fast`.
const LEASE: Duration = Duration::from_secs(2);
const DEAD: Duration = Duration::from_millis(4500);
/// A machine that is busy with other tests.
const BUSY: Duration = Duration::from_secs(3);
const ALL: Range<u64> = 0..u64::MAX;
/// The bytes that a change locks, beyond all data, before it looks whether its host is fenced (`device::file`).
const GATES: Range<u64> = (1 << 62) + 4096..(1 << 62) + 4096 + 256;

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

fn clusters(of: &Superblock) -> Range<u64> {
    of.geometry.first_cluster() * BLOCK_BYTES_U64..u64::MAX
}

/// Everything before the journals: superblock, slots, doorbells and wishes.
fn slots(of: &Superblock) -> Range<u64> {
    BLOCK_BYTES_U64..of.geometry.journal(Slot(0)).offset_bytes()
}

fn content(n: usize) -> Vec<u8> {
    format!("file {n} ").bytes().cycle().take([40, 5000, 70_000][n % 3]).collect()
}

/// Writes one file after the other, each with an fsync, until one fails. What was acknowledged is noted.
struct Writer {
    dir: PathBuf,
    acknowledged: Arc<Mutex<usize>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<(i32, Instant)>>,
}

impl Writer {
    fn start(dir: PathBuf) -> Writer {
        fs::create_dir(&dir).expect("mkdir");
        let (acknowledged, stop) = (Arc::new(Mutex::new(0)), Arc::new(AtomicBool::new(false)));
        let (path, count, stopped) = (dir.clone(), acknowledged.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                if stopped.load(SeqCst) {
                    break;
                }
                let write = || {
                    let mut file = File::create(path.join(format!("f{n}")))?;
                    file.write_all(&content(n))?;
                    file.sync_all()
                };
                let written = write();
                if written.is_err() {
                    return Some((errno(written), Instant::now()));
                }
                *count.lock().expect("no panic") = n + 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            None
        });
        Writer { dir, acknowledged, stop, thread }
    }

    fn acknowledged(&self) -> usize {
        *self.acknowledged.lock().expect("no panic")
    }

    /// The errno that ended it, and when.
    fn failed(self) -> (i32, Instant, usize) {
        let acknowledged = self.acknowledged.clone();
        let (errno, at) = self.thread.join().expect("the writer").expect("an error");
        let acknowledged = *acknowledged.lock().expect("no panic");
        (errno, at, acknowledged)
    }

    /// It never met an error; how many files there are.
    fn stopped(self) -> usize {
        self.stop.store(true, SeqCst);
        assert_eq!(self.thread.join().expect("the writer"), None, "an error reached a program");
        *self.acknowledged.lock().expect("no panic")
    }
}

fn demand_acknowledged(dir: &Path, count: usize) {
    for n in 0..count {
        let bytes =
            fs::read(dir.join(format!("f{n}"))).unwrap_or_else(|e| panic!("acknowledged file {n}: {e}"));
        assert!(bytes == content(n), "acknowledged file {n} has other bytes");
    }
}

/// The mount of a host that lost the volume answers one thing only.
fn demand_silence(dir: &Path) {
    assert_eq!(errno(fs::metadata(dir)), libc::ENOTCONN);
    assert_eq!(errno(fs::read_dir(dir).map(drop)), libc::ENOTCONN);
    assert_eq!(errno(File::create(dir.join("new"))), libc::ENOTCONN);
}

/// Works in a directory of its own and must never notice anything.
struct Bystander {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Bystander {
    fn start(dir: PathBuf) -> Bystander {
        fs::create_dir(&dir).expect("mkdir");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut slowest, mut n) = (Duration::ZERO, 0u64);
            while !stopped.load(SeqCst) {
                let begun = Instant::now();
                fs::write(dir.join(format!("{}", n % 100)), n.to_string()).expect("the other host works");
                slowest = slowest.max(begun.elapsed());
                n += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            slowest
        });
        Bystander { stop, thread }
    }

    fn end(self) {
        self.stop.store(true, SeqCst);
        let slowest = self.thread.join().expect("the other host");
        println!("the other host's slowest operation in its own directory took {slowest:?}");
        assert!(slowest < BUSY, "the other host waited {slowest:?}");
    }
}

/// `h0` in the foreground behind a device that can fail, `h1` beside it.
struct Scene {
    cluster: Cluster,
    child: Child,
    faults: Faults,
    superblock: Superblock,
}

fn scene() -> Option<Scene> {
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

/// A file that `h0` holds, and a write of it that a rule of `faults` holds up on its way.
fn late_write(scene: &mut Scene, inject: impl FnOnce(&Faults)) -> JoinHandle<std::io::Result<()>> {
    let path = scene.cluster.dir(0).join("file");
    let file = File::options().write(true).create(true).truncate(true).open(path).expect("open");
    file.write_all_at(&[1; 64 << 10], 0).expect("write");
    file.sync_all().expect("fsync");
    std::thread::sleep(Duration::from_millis(300));
    inject(&scene.faults);
    let late = std::thread::spawn(move || file.write_all_at(&[2; 64 << 10], 0));
    // Long enough for the write to come there, beside others that are held up, too.
    std::thread::sleep(Duration::from_millis(500));
    assert!(scene.faults.hits(0) > 0);
    late
}

/// The other host takes over and writes the same bytes.
fn taken_over(scene: &Scene) {
    let since = Instant::now();
    let other = File::options().write(true).open(scene.cluster.dir(1).join("file")).expect("open");
    other.write_all_at(&[3; 64 << 10], 0).expect("write");
    other.sync_all().expect("fsync");
    println!("taken over {:?} after the write was issued", since.elapsed());
}

/// What the write of the fenced host did: nothing.
fn demand_refused(mut scene: Scene, late: JoinHandle<std::io::Result<()>>, status: Option<i32>) {
    late.join().expect("the writer").expect_err("its host has lost the volume");
    assert_eq!(status_of(scene.child.id() as i32), status, "{}", scene.cluster.log("h0"));
    scene.cluster.take_off(0);
    scene.cluster.mount_as("h0", "rw");
    for host in 0..2 {
        let bytes = fs::read(scene.cluster.dir(host).join("file")).expect("read");
        assert!(bytes == [3; 64 << 10], "host {host}: a write of the fenced host landed");
    }
    scene.cluster.end_clean();
}

/// A write is held up after its host's lease was found good, before it looks whether its host is fenced, while another
/// host takes over and writes; then it goes on. Only the fence stands between it and the other host's bytes.
#[test]
fn a_late_write_of_a_fenced_host_is_refused() {
    let Some(mut scene) = scene() else { return };
    let late = late_write(&mut scene, |faults| faults.inject(0, Action::Hang, SHARED_LOCK, GATES, FOR_EVER));
    taken_over(&scene);
    assert!(scene.cluster.hosts[0].is_alive());
    scene.faults.clear();
    demand_refused(scene, late, Some(75));
}

/// One that is held up behind that look ends with its process: who fences kills it.
#[test]
fn a_write_inside_the_gate_ends_with_its_process() {
    let Some(mut scene) = scene() else { return };
    let range = clusters(&scene.superblock);
    let late = late_write(&mut scene, |faults| faults.inject(0, Action::Hang, WRITE, range, FOR_EVER));
    scene.cluster.hosts[0].signal(Signal::SIGSTOP);
    taken_over(&scene);
    assert!(!scene.cluster.hosts[0].is_alive(), "it could still write");
    scene.faults.clear();
    demand_refused(scene, late, None);
}

/// A host that is held up in the middle of a beat holds the range lock of its slot's block, by which this backend makes
/// swaps atomic. The mark of its recoverer is a swap of the same block and can't be made: so it is fenced first.
#[test]
fn a_host_that_hangs_inside_its_beat() {
    let Some(mut scene) = scene() else { return };
    let late = late_write(&mut scene, |faults| faults.inject(0, Action::Hang, WRITE, ALL, FOR_EVER));
    taken_over(&scene);
    scene.faults.clear();
    demand_refused(scene, late, None);
}

/// A block device that is write protected. The kernel keeps that when the device is detached, for whoever gets the same
/// number next: so it goes whatever becomes of the test.
struct Protected(PathBuf);

impl Protected {
    fn new(device: &Path) -> Protected {
        let protected = Protected(device.to_owned());
        assert!(protected.set("--setro"));
        protected
    }

    fn set(&self, flag: &str) -> bool {
        let set = std::process::Command::new("blockdev").arg(flag).arg(&self.0).status();
        set.is_ok_and(|status| status.success())
    }
}

impl Drop for Protected {
    fn drop(&mut self) {
        if !self.set("--setrw") {
            eprintln!("left write protected: {}", self.0.display());
        }
    }
}

/// A device write protected under one host: a loop device that an administrator sets read-only.
#[test]
fn a_device_that_is_write_protected() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::Loop(512), 4, "1G");
    let (_, child) = cluster.mount_in_foreground("h0");
    cluster.mount();
    let writer = Writer::start(cluster.dir(0).join("dir"));
    let bystander = Bystander::start(cluster.dir(1).join("own"));
    std::thread::sleep(Duration::from_millis(500));
    let protected = Protected::new(cluster.loop_path(0));
    let since = Instant::now();
    let (errno, at, acknowledged) = writer.failed();
    assert!([libc::EIO, libc::ECONNABORTED].contains(&errno), "errno {errno}");
    println!("errno {errno} after {:?}", at.saturating_duration_since(since));
    // Where it was data that could not be written, the file's name is still to be committed.
    drop(File::open(cluster.dir(0).join("dir")).and_then(|dir| dir.sync_all()));
    demand_acknowledged(&cluster.dir(1).join("dir"), acknowledged);
    let taken = since.elapsed();
    println!("taken over {taken:?} after the device was write protected");
    assert!(taken < DEAD + BUSY);
    bystander.end();
    assert_eq!(status_of(child.id() as i32), Some(74), "{}", cluster.log("h0"));
    drop(protected);
    cluster.take_off(0);
    // Takes the loop device of the host that is still there; that is one image.
    cluster.mount_as("h0", "rw");
    demand_acknowledged(&cluster.dir(1).join("dir"), acknowledged);
    cluster.end_clean();
}

/// A memory filesystem, unmounted in the end.
struct Small(PathBuf);

impl Small {
    fn size(&self, mib: u32, remount: bool) {
        let flags = if remount { MsFlags::MS_REMOUNT } else { MsFlags::empty() };
        let size = format!("size={mib}m");
        mount(Some("lunfs-test"), &self.0, Some("tmpfs"), flags, Some(&*size)).expect("tmpfs");
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        if let Err(errno) = umount2(&self.0, MntFlags::MNT_DETACH) {
            eprintln!("left mounted: {}: {errno}", self.0.display());
        }
    }
}

/// A sparse image on a filesystem that fills up: writes of data say `ENOSPC`, beats go on, who can't commit withdraws;
/// when there is room again all that was acknowledged is there.
#[test]
fn a_device_without_room() {
    if !can_mount() {
        return;
    }
    let place = tempfile::Builder::new().prefix("lunfs-small-").tempdir().expect("a directory");
    let small = Small(place.path().to_owned());
    small.size(40, false);
    let temp = tempfile::Builder::new().prefix("lunfs-hosts-").tempdir_in(place.path()).expect("a directory");
    let mut cluster = Cluster::inside(temp, "fast", Backing::File(512), 4, "1G");
    let (_, child) = cluster.mount_in_foreground("h0");
    cluster.mount();
    let writers: Vec<_> =
        (0..2).map(|host| Writer::start(cluster.dir(host).join(format!("dir{host}")))).collect();
    std::thread::sleep(Duration::from_millis(500));
    let hog = File::create(cluster.dir(0).join("hog")).expect("create");
    let mut written = 0;
    let failed = loop {
        if let Err(error) = hog.write_all_at(&[7; 1 << 20], written) {
            break error;
        }
        written += 1 << 20;
        assert!(written < 64 << 20, "there can't be so much room");
    };
    println!("{written} bytes fitted, then: {failed}");
    assert_eq!(failed.raw_os_error(), Some(libc::ENOSPC));
    let acknowledged: Vec<_> = writers
        .into_iter()
        .map(|writer| {
            let (errno, _, acknowledged) = writer.failed();
            assert!([libc::ENOSPC, libc::EIO, libc::ECONNABORTED].contains(&errno), "errno {errno}");
            acknowledged
        })
        .collect();
    drop(hog);
    small.size(400, true);
    for host in (0..2).rev() {
        // A host that could commit all it had is still there.
        let name = cluster.hosts[host].name.clone();
        println!("{name} lives: {}", cluster.hosts[host].is_alive());
        if cluster.hosts[host].is_alive() {
            cluster.unmount(host);
        } else {
            cluster.take_off(host);
        }
        // Its log lies where there was no room.
        if host == 0 {
            let status = status_of(child.id() as i32);
            assert!([Some(0), Some(74)].contains(&status), "{status:?}");
        }
    }
    cluster.mount_as("h1", "rw");
    for (host, count) in acknowledged.into_iter().enumerate() {
        demand_acknowledged(&cluster.dir(0).join(format!("dir{host}")), count);
    }
    cluster.mount_as("h0", "rw");
    fs::write(cluster.dir(1).join("again"), [1; 1 << 20]).expect("there is room");
    cluster.end_clean();
}
