//! Devices that really fail, for all hosts or one: a loop device that an administrator write protects, and a memory
//! filesystem that is too small for its image.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::devices::DEAD;
use super::harness::{Backing, Cluster, can_mount, status_of};
use super::workers::{BUSY, Bystander, Writer, demand_acknowledged};

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
