//! Requests that wait for another host.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::os::unix::thread::JoinHandleExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{PATIENCE, can_mount, mount, until};

#[test]
fn waiting_requests_hold_up_nobody_else() {
    if !can_mount() {
        return;
    }
    let place = mount("waiting", "threads=2");
    let dir = place.dir();
    fs::write(dir.join("theirs"), b"theirs").expect("write");
    fs::write(dir.join("mine"), b"mine").expect("write");
    let open = File::open(dir.join("theirs")).expect("open");
    place.pull("cacheable off");
    place.pull("forget-names /");
    place.pull("forget-inode theirs");
    place.pull("block theirs");
    let waiting = || -> (u64, u64) {
        let both = place.pull("waits");
        let (now, refused) = both.split_once(' ').expect("two numbers");
        (now.parse().expect("a number"), refused.parse().expect("a number"))
    };
    // More than threads serve the kernel, of every kind, writes among them.
    let (done, finished) = mpsc::channel();
    let mut threads = Vec::new();
    for i in 0..24u64 {
        let path = dir.join("theirs");
        let done = done.clone();
        let file = open.try_clone().expect("dup");
        threads.push(thread::spawn(move || {
            let result = match i % 4 {
                0 => file.metadata().map(|m| m.len()),
                1 => fs::read(&path).map(|b| b.len() as u64),
                2 => fs::metadata(&path).map(|m| m.len()),
                _ => OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .and_then(|f| f.write_all_at(b"T", 0).and_then(|()| f.sync_all()))
                    .map(|()| 6),
            };
            done.send(result).expect("the test listens");
        }));
    }
    until("all wait", || waiting().0 == 24);
    assert!(waiting().1 >= 24, "each was refused on the serving thread first");
    for _ in 0..200 {
        assert_eq!(fs::read(dir.join("mine")).expect("others go on"), b"mine");
    }
    fs::write(dir.join("new"), b"new").expect("create and write go on");
    fs::rename(dir.join("new"), dir.join("newer")).expect("rename goes on");
    assert_eq!(waiting().0, 24);
    assert!(finished.try_recv().is_err(), "the blocked still wait");
    place.pull("unblock theirs");
    for _ in 0..24 {
        assert_eq!(finished.recv_timeout(PATIENCE).expect("answered").expect("succeeds"), 6);
    }
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert_eq!(fs::read(dir.join("theirs")).expect("read"), b"Theirs");
    drop(open);
    place.unmount();
}

/// The kernel's caches can be told to forget while requests wait for that very inode or directory.
#[test]
fn forgetting_does_not_wait_for_waiting_requests() {
    if !can_mount() {
        return;
    }
    let place = mount("forgetting", "threads=1");
    let dir = place.dir();
    fs::create_dir(dir.join("d")).expect("mkdir");
    fs::write(dir.join("d/f"), b"f").expect("write");
    let file = File::open(dir.join("d/f")).expect("open");
    place.pull("forget-names d");
    place.pull("block d");
    let lookup = thread::spawn({
        let path = dir.join("d/f");
        move || fs::metadata(path).map(|m| m.len())
    });
    let create = thread::spawn({
        let path = dir.join("d/g");
        move || fs::write(path, b"g")
    });
    // The kernel may let the create wait behind the lookup in the directory.
    until("one waits", || !place.pull("waits").starts_with('0'));
    place.pull("forget-names d");
    place.pull("forget-inode d");
    place.pull("forget-inode d/f");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).expect("an open file is still served");
    assert!(!lookup.is_finished() && !create.is_finished());
    place.pull("unblock d");
    assert_eq!(lookup.join().expect("no panic").expect("stat"), 1);
    create.join().expect("no panic").expect("create");
    drop(file);
    place.unmount();
}

/// A process is rid of at once, whomever it waits for.
#[test]
fn who_waits_can_be_killed() {
    if !can_mount() {
        return;
    }
    let place = mount("killed", "transport=native");
    fs::write(place.dir().join("f"), b"f").expect("write");
    place.pull("cacheable off");
    place.pull("forget-names /");
    place.pull("forget-inode f");
    place.pull("block f");
    // By a signal that nobody can catch, and by one that nobody does.
    for signal in [Signal::SIGKILL, Signal::SIGINT] {
        let mut child = std::process::Command::new("cat")
            .arg(place.dir().join("f"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("cat starts");
        until("it waits", || place.pull("waits").starts_with('1'));
        let asked = Instant::now();
        kill(Pid::from_raw(child.id() as i32), signal).expect("signal");
        let status = child.wait().expect("it ends");
        assert_eq!(status.signal(), Some(signal as i32));
        assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
        until("nobody waits", || place.pull("waits").starts_with('0'));
    }
    place.pull("unblock f");
    assert_eq!(fs::read(place.dir().join("f")).expect("read"), b"f");
    place.unmount();
}

/// A signal that a program catches doesn't end its call, as on a local filesystem.
#[test]
fn a_caught_signal_ends_no_wait() {
    if !can_mount() {
        return;
    }
    let place = mount("caught", "rw");
    let path = place.dir().join("f");
    fs::write(&path, b"f").expect("write");
    place.pull("cacheable off");
    place.pull("forget-names /");
    place.pull("forget-inode f");
    place.pull("block f");
    let caught = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(libc::SIGUSR1, caught.clone()).expect("a handler");
    let waiting = thread::spawn(move || fs::metadata(path).map(|m| m.len()));
    until("it waits", || place.pull("waits").starts_with('1'));
    // SAFETY: the thread was not joined, so its handle is good.
    let sent = unsafe { libc::pthread_kill(waiting.as_pthread_t(), libc::SIGUSR1) };
    assert_eq!(sent, 0);
    thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished() && place.pull("waits").starts_with('1'), "it goes on waiting");
    place.pull("unblock f");
    assert_eq!(waiting.join().expect("no panic").expect("no EINTR"), 1);
    assert!(caught.load(Ordering::Acquire), "the signal came in the end");
    place.unmount();
}

/// Ending the mount ends waits.
#[test]
fn a_mount_ends_although_requests_wait() {
    if !can_mount() {
        return;
    }
    let (place, mut child) = super::harness::mount_in_foreground("ending");
    let dir = place.dir();
    fs::write(dir.join("f"), b"f").expect("write");
    place.pull("cacheable off");
    place.pull("forget-inode f");
    place.pull("block f");
    let stuck = thread::spawn({
        let path = dir.join("f");
        move || fs::read(path)
    });
    until("it waits", || place.pull("waits").starts_with('1'));
    let pid = nix::unistd::Pid::from_raw(place.pid.expect("running"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("signal");
    until("detached", || !place.is_mounted());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("asked again");
    assert!(stuck.join().expect("no panic").is_err());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}
