//! Mounts that find no slot: they wait and say so, can be given up, and are refused where everybody lives.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{Backing, Cluster, can_mount, until};

/// One host that made a file and was killed, on a volume with one slot.
fn one_dead_host() -> Option<Cluster> {
    if !can_mount() {
        return None;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::File(512), 1, "256M");
    cluster.mount();
    let file = cluster.dir(0).join("file");
    fs::write(&file, b"durable").expect("write");
    fs::File::open(&file).and_then(|f| f.sync_all()).expect("fsync");
    Some(cluster)
}

#[test]
fn a_stranger_waits_for_the_slot_of_a_host_that_never_comes_back() {
    let Some(mut cluster) = one_dead_host() else { return };
    cluster.kill(0);
    // Four times 4.5 s of silence, and then it has what the dead one made durable.
    let begun = Instant::now();
    let (mut command, dir) = cluster.mount_command("stranger", "rw");
    let output = command.output().expect("mount runs");
    let took = begun.elapsed();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    assert!(said.starts_with("lunfs: no slot is free; one last used by host \"h0\" will be taken"), "{said}");
    assert!(took > Duration::from_secs(17) && took < Duration::from_secs(30), "{took:?}");
    assert_eq!(fs::read(dir.join("file")).expect("read"), b"durable");
    let output = cluster.umount_command(&dir);
    assert!(output.status.success(), "{output:?}");
    cluster.end();
}

#[test]
fn a_mount_that_waits_can_be_given_up() {
    let Some(mut cluster) = one_dead_host() else { return };
    cluster.kill(0);
    for (foreground, signal) in [(true, Signal::SIGINT), (false, Signal::SIGKILL)] {
        let (mut command, dir) = cluster.mount_command("stranger", "rw");
        if foreground {
            command.arg("--foreground");
        }
        let mut child = command.stderr(Stdio::null()).spawn().expect("mount starts");
        let log = if foreground { "it waits in the foreground" } else { "the daemon waits" };
        until(log, || cluster.log("stranger").contains("no slot is free"));
        let pid = i32::try_from(child.id()).expect("a process id");
        kill(Pid::from_raw(pid), signal).expect("a child can be signalled");
        assert!(!child.wait().expect("it ends").success());
        until("the wait ends", || cluster.log("stranger").contains("waiting for one was cancelled"));
        assert_eq!(cluster.states(), [("h0".into(), "live".into())], "it has not been claimed");
        fs::remove_file(cluster.log_path("stranger")).expect("a log");
        fs::remove_dir(dir).expect("nothing is mounted there");
    }
    // Its own host has no reason to wait.
    cluster.mount_as("h0", "rw");
    assert_eq!(fs::read(cluster.dir(0).join("file")).expect("read"), b"durable");
    cluster.end();
}

#[test]
fn where_all_hosts_live_a_mount_is_refused_at_once() {
    let Some(mut cluster) = one_dead_host() else { return };
    let begun = Instant::now();
    let (mut command, _) = cluster.mount_command("stranger", "rw");
    let output = command.output().expect("mount runs");
    let (took, said) = (begun.elapsed(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(!output.status.success() && said.contains("all 1 slots are taken by hosts that live"), "{said}");
    assert!(took < Duration::from_secs(4), "{took:?}");
    cluster.end();
}
