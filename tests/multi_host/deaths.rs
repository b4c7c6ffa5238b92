//! Daemons that are killed: what they had made durable is there, and the others go on.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::harness::{Backing, Cluster, can_mount, two_hosts, until};

#[test]
fn killed_and_taken_over_on_a_file() {
    two_hosts(Backing::File(4096)).into_iter().for_each(killed_and_taken_over);
}

#[test]
fn killed_and_taken_over_on_loop_devices() {
    two_hosts(Backing::Loop(512)).into_iter().for_each(killed_and_taken_over);
}

#[test]
fn killed_and_back_on_a_file() {
    two_hosts(Backing::File(512)).into_iter().for_each(killed_and_back);
}

#[test]
fn killed_and_back_on_loop_devices() {
    two_hosts(Backing::Loop(4096)).into_iter().for_each(killed_and_back);
}

const FILES: u64 = 60;

fn content(n: u64) -> Vec<u8> {
    let len = [30, 5000, 200_000][n as usize % 3];
    format!("file {n} ").bytes().cycle().take(len).collect()
}

/// Files in a directory of its own; all but the last ones are durable.
fn work(dir: &Path) {
    fs::create_dir(dir).expect("mkdir");
    for n in 0..FILES {
        let mut file = File::create(dir.join(format!("f{n}"))).expect("create");
        file.write_all(&content(n)).expect("write");
        if n == FILES - 10 {
            file.sync_all().expect("fsync");
        }
    }
}

fn check(dir: &Path) {
    for n in 0..FILES {
        match fs::read(dir.join(format!("f{n}"))) {
            Ok(bytes) => assert!(bytes == content(n) || n > FILES - 10, "file {n} has other bytes"),
            Err(e) => assert!(n > FILES - 10 && e.raw_os_error() == Some(libc::ENOENT), "file {n}: {e}"),
        }
    }
}

/// The other host waits for the dead one's dead time, and not much longer; in its own directory it never stops.
pub fn killed_and_taken_over(mut cluster: Cluster) {
    let other = cluster.dir(1).to_owned();
    fs::create_dir(other.join("own")).expect("mkdir");
    fs::write(other.join("own/first"), b"x").expect("write");
    work(&cluster.dir(0).join("dir"));
    // The way to its own directory is shared by both; else the survivor would need what the dead one held.
    fs::read(other.join("own/first")).expect("read");
    let name = cluster.kill(0);
    let died = Instant::now();
    let (mut slowest, mut n) = (Duration::ZERO, 0);
    let theirs = other.join("dir");
    let waiting = std::thread::spawn(move || {
        check(&theirs);
        died.elapsed()
    });
    while !waiting.is_finished() {
        let begun = Instant::now();
        n += 1;
        fs::write(other.join(format!("own/{n}")), b"still at work").expect("write");
        slowest = slowest.max(begun.elapsed());
        std::thread::sleep(Duration::from_millis(20));
    }
    let took = waiting.join().expect("what the dead host held");
    println!("taken over {took:?} after the death; meanwhile the slowest of {n} writes took {slowest:?}");
    let most = Duration::from_secs(30) + cluster.hold_time();
    assert!(took < most, "{took:?} until what the dead host held could be used");
    assert!(
        slowest < Duration::from_secs(5),
        "a host that needed nothing of the dead one waited {slowest:?}"
    );
    until("the dead host's slot is recovered", || cluster.states().iter().any(|(_, s)| s == "recovered"));
    cluster.mount_as(&name, "rw");
    check(&cluster.dir(1).join("dir"));
    cluster.end();
}

/// The same host comes back at once and needs to wait for nobody.
fn killed_and_back(mut cluster: Cluster) {
    for round in 0..3 {
        let victim = cluster.hosts.iter().position(|h| h.name == "h0").expect("it is there");
        work(&cluster.dir(victim).join(format!("dir{round}")));
        let name = cluster.kill(victim);
        let died = Instant::now();
        cluster.mount_as(&name, "rw");
        check(&cluster.hosts.last().expect("just mounted").dir.join(format!("dir{round}")));
        let took = died.elapsed();
        println!("back {took:?} after the death");
        assert!(took < Duration::from_secs(8), "{took:?} from the death to the first answers");
        check(&cluster.dir(0).join(format!("dir{round}")));
    }
    cluster.end();
}

#[test]
fn stopped_and_fenced_on_a_file() {
    two_hosts(Backing::File(512)).into_iter().for_each(stopped_and_fenced);
}

#[test]
fn stopped_and_fenced_on_loop_devices() {
    two_hosts(Backing::Loop(4096)).into_iter().for_each(stopped_and_fenced);
}

/// With the reservations of a target in the place of the emulated fence.
#[cfg(feature = "iscsi")]
#[test]
fn stopped_and_fenced_on_iscsi() {
    stopped_on_iscsi("fencing=required");
}

/// Without any fence: the backend itself must not send what is out of date.
#[cfg(feature = "iscsi")]
#[test]
fn stopped_and_dead_on_iscsi() {
    stopped_on_iscsi("fencing=lease");
}

#[cfg(feature = "iscsi")]
fn stopped_on_iscsi(fencing: &'static str) {
    if !can_mount() || !lunfs::device::iscsi::AVAILABLE {
        return;
    }
    let temp = tempfile::Builder::new().prefix("lunfs-hosts-").tempdir().expect("a directory");
    let more: &[&str] = if fencing == "fencing=lease" { &["--reservations", "off"] } else { &[] };
    let mut cluster = Cluster::made_with(temp, "fast", Backing::Iscsi(512), 3, "1G", more);
    cluster.options = fencing;
    cluster.mount();
    cluster.mount();
    stopped_and_fenced(cluster);
}

/// A daemon is stopped while it writes, for longer than its dead time. Whatever it does when it wakes up changes
/// nothing. Nearly always its lease sees to that; the moments in which only the fence does are made in `devices`
/// (`a_late_write_of_a_fenced_host_is_refused`, `a_write_inside_the_gate_ends_with_its_process`).
fn stopped_and_fenced(mut cluster: Cluster) {
    let paths = cluster.paths("file");
    fs::write(&paths[0], vec![1; 64 << 10]).expect("write");
    File::open(&paths[0]).and_then(|f| f.sync_all()).expect("fsync");
    let target = paths[0].clone();
    let writing = std::thread::spawn(move || {
        let file = File::options().write(true).open(target).expect("open");
        while file.write_all_at(&[2; 64 << 10], 0).is_ok() {}
    });
    std::thread::sleep(Duration::from_millis(300));
    cluster.hosts[0].signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let file = File::options().read(true).write(true).open(&paths[1]).expect("open");
    file.write_all_at(&[3; 64 << 10], 0).expect("write");
    file.sync_all().expect("fsync");
    println!("taken over {:?} after the stop", stopped.elapsed());
    // It may have been killed, if it was stopped in the middle of a write.
    if cluster.hosts[0].is_alive() {
        cluster.hosts[0].signal(Signal::SIGCONT);
    }
    until("the daemon ends", || !cluster.hosts[0].is_alive());
    writing.join().expect("the writer");
    let mut bytes = vec![0; 64 << 10];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes.iter().all(|b| *b == 3), "a write of the stopped host landed after it was fenced");
    drop(file);
    let name = cluster.hosts[0].name.clone();
    cluster.take_off(0);
    // Its next life registers anew.
    cluster.mount_as(&name, "rw");
    fs::write(cluster.dir(1).join("file"), b"back").expect("write");
    assert_eq!(fs::read(cluster.dir(0).join("file")).expect("read"), b"back");
    cluster.end();
}
