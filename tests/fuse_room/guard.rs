//! A daemon that can't silence its kernel any more: killed, stopped, or cut off. Its guard does, and what guards do
//! when they themselves are killed.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use lunfs::durations::KERNEL_SILENCE;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{PATIENCE, Place, can_mount, mount, mount_in_foreground, until};
use crate::processes;

const BYTES: usize = 8192;
const LEASE: Duration = Duration::from_millis(1500);

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).expect("it lives");
}

/// One file that the kernel has cached in every way it can.
struct Cached {
    path: PathBuf,
    file: File,
    map: *mut libc::c_void,
}

impl Cached {
    fn new(place: &Place) -> Cached {
        let path = place.dir().join("file");
        fs::write(&path, vec![5; BYTES]).expect("write");
        let file = File::open(&path).expect("open");
        // SAFETY: a new read-only mapping of a file of this length, at an address of the kernel's choice.
        let map = unsafe {
            libc::mmap(std::ptr::null_mut(), BYTES, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(map, libc::MAP_FAILED);
        let cached = Cached { path, file, map };
        let calls = || ["getattr", "lookup", "read"].map(|call| place.calls(call));
        until("the kernel keeps all of it", || {
            let before = calls();
            assert_eq!(cached.shown(), ["descriptor", "mapping", "fstat", "stat"]);
            calls() == before
        });
        cached
    }

    /// What still shows the old state.
    fn shown(&self) -> Vec<&'static str> {
        let mut bytes = [0; BYTES];
        let read = self.file.read_at(&mut bytes, 0);
        // A mapping read by way of this file gives an error where a program would get SIGBUS.
        let memory = File::open("/proc/self/mem").expect("own memory");
        let mapped = memory.read_at(&mut bytes, self.map as u64);
        let shown = [
            ("descriptor", read.is_ok()),
            ("mapping", mapped.is_ok()),
            ("fstat", self.file.metadata().is_ok()),
            ("stat", fs::metadata(&self.path).is_ok()),
        ];
        shown.into_iter().filter(|(_, shown)| *shown).map(|(what, _)| what).collect()
    }
}

impl Drop for Cached {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped; nothing refers to it any more.
        let _ = unsafe { libc::munmap(self.map, BYTES) };
    }
}

/// Waits for the silence, and for its guard to end.
fn until_silent(cached: &Cached, guard: i32, since: Instant) {
    until("the guard ends", || !processes::lives(guard));
    let took = since.elapsed();
    println!("silent after {took:?}");
    assert!(took < KERNEL_SILENCE, "{took:?}");
    assert!(cached.shown().is_empty(), "still shown: {:?}", cached.shown());
}

#[test]
fn a_killed_daemon_leaves_a_silent_kernel() {
    if !can_mount() {
        return;
    }
    let place = mount("guard-kill", "rw");
    let cached = Cached::new(&place);
    let guard = place.guard().expect("a guard");
    signal(place.pid.expect("running"), Signal::SIGKILL);
    until_silent(&cached, guard, Instant::now());
    assert!(place.is_mounted(), "taken away, programs would write beneath it");
    drop(cached);
    place.unmount();
}

/// The kernel must not keep a page because it can't be written back.
#[test]
fn what_a_program_dirtied_in_a_mapping_goes_too() {
    if !can_mount() {
        return;
    }
    let place = mount("guard-dirty", "rw");
    let path = place.dir().join("file");
    fs::write(&path, vec![5; BYTES]).expect("write");
    let file = File::options().read(true).write(true).open(&path).expect("open");
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of a file of this length, at an address of the kernel's choice.
    let map =
        unsafe { libc::mmap(std::ptr::null_mut(), BYTES, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    assert_ne!(map, libc::MAP_FAILED);
    // SAFETY: the mapping is BYTES long and writable; the daemon serves it.
    unsafe { map.cast::<u8>().write_volatile(6) };
    let cached = Cached { path, file, map };
    assert!(cached.shown().contains(&"mapping"));
    let guard = place.guard().expect("a guard");
    signal(place.pid.expect("running"), Signal::SIGKILL);
    until_silent(&cached, guard, Instant::now());
}

/// A stopped daemon's lease runs out like any other; when it goes on it says so and ends.
#[test]
fn a_stopped_daemon_leaves_a_silent_kernel() {
    if !can_mount() {
        return;
    }
    let (place, mut child) = mount_in_foreground("guard-stop");
    let cached = Cached::new(&place);
    let (pid, guard) = (place.pid.expect("running"), place.guard().expect("a guard"));
    place.pull(&format!("lease {}", LEASE.as_millis()));
    let lease_ends = Instant::now() + LEASE;
    signal(pid, Signal::SIGSTOP);
    assert_eq!(cached.shown().len(), 4, "the lease is not over");
    std::thread::sleep(lease_ends.saturating_duration_since(Instant::now()));
    until_silent(&cached, guard, lease_ends);
    signal(pid, Signal::SIGCONT);
    assert_eq!(child.wait().expect("it ends").code(), Some(75));
    assert!(place.is_mounted());
    drop(cached);
    place.unmount();
}

#[test]
fn a_renewed_lease_keeps_the_guard_waiting() {
    if !can_mount() {
        return;
    }
    let place = mount("guard-renew", "rw");
    let cached = Cached::new(&place);
    let guard = place.guard().expect("a guard");
    for _ in 0..6 {
        place.pull(&format!("lease {}", LEASE.as_millis()));
        std::thread::sleep(LEASE / 2);
        assert_eq!(cached.shown().len(), 4);
    }
    assert_eq!(place.guard(), Some(guard));
    drop(cached);
    place.unmount();
}

/// The connection ended, the mount is there: nobody may see old state in it.
#[test]
fn a_connection_that_others_end_is_silenced() {
    if !can_mount() {
        return;
    }
    let (place, mut child) = mount_in_foreground("guard-abort");
    let cached = Cached::new(&place);
    assert!(umount2(&place.dir(), MntFlags::MNT_FORCE).is_err(), "busy, but the connection ends");
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(cached.shown().is_empty(), "still shown: {:?}", cached.shown());
}

#[test]
fn a_guard_that_dies_is_replaced() {
    if !can_mount() {
        return;
    }
    let place = mount("guard-dies", "rw");
    let cached = Cached::new(&place);
    let first = place.guard().expect("a guard");
    // Of those who end a whole group or session politely it hears nothing.
    for polite in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signal(first, polite);
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(place.guard(), Some(first));
    signal(first, Signal::SIGKILL);
    until("another guard", || place.guard().is_some_and(|guard| guard != first));
    assert_eq!(cached.shown().len(), 4, "the mount goes on");
    let second = place.guard().expect("just seen");
    signal(place.pid.expect("running"), Signal::SIGKILL);
    until_silent(&cached, second, Instant::now());
}

fn limit_descriptors(pid: i32, limit: u64) {
    let limit = libc::rlimit { rlim_cur: limit, rlim_max: 4096 };
    // SAFETY: prlimit reads the new limit and is given no place for the old one.
    assert_eq!(unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, std::ptr::null_mut()) }, 0);
}

/// Where no guard can be started the mount goes on, says so once, and has one again when it can.
#[test]
fn a_mount_without_a_guard_goes_on() {
    if !can_mount() {
        return;
    }
    let log = std::env::temp_dir().join(format!("lunfs-test-guard-log-{}", std::process::id()));
    let place = mount("guard-none", &format!("rw,log={}", log.display()));
    let said = |what: &str| fs::read_to_string(&log).expect("the log").matches(what).count();
    let pid = place.pid.expect("running");
    let guard = place.guard().expect("a guard");
    limit_descriptors(pid, 3);
    signal(guard, Signal::SIGKILL);
    until("it says so", || said("no guard can be started") > 0);
    std::thread::sleep(Duration::from_secs(5));
    assert_eq!(said("no guard can be started"), 1);
    fs::write(place.dir().join("file"), b"still served").expect("write");
    limit_descriptors(pid, 4096);
    until("a guard again", || place.guard().is_some());
    until("it says so", || said("has a guard again") == 1);
    place.unmount();
    fs::remove_file(&log).expect("the log");
}

#[test]
fn the_guard_ends_before_the_end_of_the_mount_is_told() {
    if !can_mount() {
        return;
    }
    let place = mount("guard-umount", "rw");
    fs::write(place.dir().join("file"), b"x").expect("write");
    let guard = place.guard().expect("a guard");
    place.unmount();
    assert!(!processes::lives(guard) && !place.is_alive());

    let (place, mut child) = mount_in_foreground("guard-term");
    fs::write(place.dir().join("file"), b"served, so guarded").expect("write");
    let guard = place.guard().expect("a guard");
    signal(place.pid.expect("running"), Signal::SIGTERM);
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
    assert!(!processes::lives(guard));
}

/// How long the silence takes where the kernel knows much.
#[test]
fn a_hundred_thousand_nodes() {
    const NODES: usize = 100_000;
    if !can_mount() {
        return;
    }
    let log = std::env::temp_dir().join(format!("lunfs-test-guard-many-{}", std::process::id()));
    let place = mount("guard-many", &format!("rw,log={}", log.display()));
    let cached = Cached::new(&place);
    for directory in 0..NODES / 1000 {
        let directory = place.dir().join(format!("d{directory}"));
        fs::create_dir(&directory).expect("mkdir");
        for file in 0..1000 {
            let path = directory.join(format!("f{file}"));
            fs::write(&path, b"page").expect("write");
            if file % 10 == 0 {
                fs::read(&path).expect("into the page cache");
            }
        }
    }
    let guard = place.guard().expect("a guard");
    signal(place.pid.expect("running"), Signal::SIGKILL);
    let killed = Instant::now();
    while processes::lives(guard) {
        assert!(killed.elapsed() < PATIENCE);
        std::thread::sleep(Duration::from_millis(1));
    }
    let took = killed.elapsed();
    let said = fs::read_to_string(&log).expect("the log");
    let line = said.lines().find(|line| line.contains("nodes invalidated")).expect("the guard's word");
    println!("gone after {took:?}: {line}");
    let nodes = line.split_once("silenced: ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
    assert!(nodes.is_some_and(|nodes: usize| nodes > NODES), "{line}");
    assert!(took < KERNEL_SILENCE, "{took:?}");
    assert!(cached.shown().is_empty(), "still shown: {:?}", cached.shown());
    fs::remove_file(&log).expect("the log");
}
