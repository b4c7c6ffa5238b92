//! What the kernel of a dead or stopped host shows while another host takes over and changes a file: never what was
//! before the change.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{Backing, Cluster, StopOnPanic, can_mount};
use crate::processes;

const OLD: (u8, usize) = (b'a', 8192);
const NEW: (u8, usize) = (b'b', 12288);
/// The lease of the profile used.
const LEASE: Duration = Duration::from_secs(2);
const GUARD_STOPPED: Duration = Duration::from_millis(1500);
/// How long is looked on after the change.
const AFTERWARDS: Duration = Duration::from_millis(1500);

/// The ways to see a file without its host's daemon.
const WAYS: [&str; 3] = ["descriptor", "mapping", "name"];

struct Viewer {
    path: PathBuf,
    file: File,
    memory: File,
    map: u64,
}

impl Viewer {
    /// Everything is cached when this returns.
    fn new(path: PathBuf) -> Viewer {
        let file = File::open(&path).expect("open");
        // SAFETY: a new read-only mapping of a file of this length, at an address of the kernel's choice. It stays
        // until the process ends and is read through /proc only, where a bad page is an error.
        let map = unsafe {
            let (protection, fd) = (libc::PROT_READ, file.as_raw_fd());
            libc::mmap(std::ptr::null_mut(), OLD.1, protection, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(map, libc::MAP_FAILED);
        let memory = File::open("/proc/self/mem").expect("own memory");
        let viewer = Viewer { path, file, memory, map: map as u64 };
        let begun = Instant::now();
        // The kernel keeps attributes when it was told the same a few times.
        while begun.elapsed() < Duration::from_millis(300) {
            assert_eq!(viewer.shows_old(), [true; 3]);
        }
        viewer
    }

    /// Which ways show the old state.
    fn shows_old(&self) -> [bool; 3] {
        let is_old = |source: &File, offset| {
            let mut bytes = [0; OLD.1];
            source.read_exact_at(&mut bytes, offset).is_ok() && bytes == [OLD.0; OLD.1]
        };
        let name = fs::metadata(&self.path).is_ok_and(|meta| meta.len() == OLD.1 as u64);
        [is_old(&self.file, 0), is_old(&self.memory, self.map), name]
    }
}

/// Looks at the file on one host all the time while `change` changes it on another.
fn watch_while(viewer: &Viewer, change: impl FnOnce()) {
    let (changed, enough) = (AtomicBool::new(false), AtomicBool::new(false));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let looking = scope.spawn(|| {
            let (mut looks, mut stale, mut last_old) = (0u64, [0u64; 3], Duration::ZERO);
            while !enough.load(Ordering::SeqCst) {
                let after = changed.load(Ordering::SeqCst);
                let old = viewer.shows_old();
                looks += u64::from(after);
                for (way, count) in stale.iter_mut().enumerate() {
                    *count += u64::from(after && old[way]);
                }
                if old.contains(&true) {
                    last_old = begun.elapsed();
                }
            }
            (looks, stale, last_old)
        });
        let _stop = StopOnPanic(&enough);
        change();
        let changed_after = begun.elapsed();
        changed.store(true, Ordering::SeqCst);
        std::thread::sleep(AFTERWARDS);
        enough.store(true, Ordering::SeqCst);
        let (looks, stale, last_old) = looking.join().expect("the viewer");
        println!("changed after {changed_after:?}; the old state was last seen after {last_old:?}");
        assert!(looks > 10, "nobody looked");
        assert_eq!(stale, [0; 3], "old after the change, of {looks} looks: {WAYS:?}");
        assert!(last_old < changed_after);
    });
}

fn fill(path: &Path, (byte, len): (u8, usize)) {
    fs::write(path, vec![byte; len]).expect("write");
}

/// Host 1, and host 0 in the foreground, which holds a file that a viewer has cached.
fn prepared() -> Option<(Cluster, std::process::Child, Viewer)> {
    if !can_mount() {
        return None;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::File(512), 4, "1G");
    let (host, child) = cluster.mount_in_foreground("h0");
    let path = host.dir.join("file");
    cluster.mount();
    fill(&path, OLD);
    File::open(&path).expect("open").sync_all().expect("fsync");
    // The way to it is shared, so that the survivor needs only the file; that is host 0's alone again.
    assert_eq!(fs::metadata(cluster.dir(1).join("file")).expect("stat").len(), OLD.1 as u64);
    drop(File::options().append(true).open(&path).expect("open"));
    let viewer = Viewer::new(path);
    Some((cluster, child, viewer))
}

fn send(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("it lives");
}

/// Takes off the dead mount of host 0, which stays in the cluster until then, so that a test that fails leaves no
/// daemon.
fn take_off(cluster: &mut Cluster) {
    let host = cluster.hosts.remove(0);
    assert!(host.is_mounted(), "taken away, programs would write beneath it");
    umount2(&host.dir, MntFlags::MNT_DETACH).expect("a dead mount can be taken off");
}

#[test]
fn a_killed_host_shows_nothing_old_while_another_takes_over() {
    let Some((mut cluster, mut child, viewer)) = prepared() else { return };
    let other = cluster.dir(1).join("file");
    send(cluster.hosts[0].pid, Signal::SIGKILL);
    watch_while(&viewer, || fill(&other, NEW));
    child.wait().expect("it died");
    take_off(&mut cluster);
    cluster.mount_as("h0", "rw");
    cluster.end();
}

/// The lease of a stopped host runs out. When it goes on it knows, says so, and ends.
#[test]
fn a_stopped_host_shows_nothing_old_while_another_takes_over() {
    let Some((mut cluster, mut child, viewer)) = prepared() else { return };
    let other = cluster.dir(1).join("file");
    let pid = cluster.hosts[0].pid;
    send(pid, Signal::SIGSTOP);
    let stopped = Instant::now();
    watch_while(&viewer, || fill(&other, NEW));
    assert!(stopped.elapsed() > LEASE);
    send(pid, Signal::SIGCONT);
    assert_eq!(child.wait().expect("it ends").code(), Some(75));
    let log = cluster.log("h0");
    assert!(log.contains("this host stops using the volume: "), "{log}");
    assert!(log.contains("the lease is over"), "{log}");
    assert!(fs::metadata(cluster.dir(0).join("file")).is_err());
    take_off(&mut cluster);
    // It comes back as any other.
    cluster.mount_as("h0", "rw");
    for host in 0..2 {
        assert_eq!(fs::read(cluster.dir(host).join("file")).expect("read"), [NEW.0; NEW.1]);
    }
    cluster.end();
}

/// A host that comes back recovers itself long before its old lease would have run out; what its dead mount
/// cached must be gone by then. A stopped guard stands for a slow one.
#[test]
fn a_host_that_comes_back_waits_for_the_guard_of_its_dead_mount() {
    let Some((mut cluster, mut child, viewer)) = prepared() else { return };
    let other = cluster.dir(1).join("file");
    let pid = cluster.hosts[0].pid;
    let guard = processes::guard_of(pid).expect("a guard");
    send(guard, Signal::SIGSTOP);
    send(pid, Signal::SIGKILL);
    child.wait().expect("it dies");
    let died = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(GUARD_STOPPED);
            send(guard, Signal::SIGCONT);
        });
        watch_while(&viewer, || {
            cluster.mount_as("h0", "rw");
            println!("back after {:?}", died.elapsed());
            assert!(died.elapsed() > GUARD_STOPPED, "before the kernel was silent");
            fill(&other, NEW);
        });
    });
    take_off(&mut cluster);
    cluster.end();
}
