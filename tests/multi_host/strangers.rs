//! Mounts on iSCSI targets that other people wrote: two hosts that share files, count the same number up, and one that dies
//! and is taken over. With a lease: their reservations are not good, and nobody may rely on them.
//!
//! `cargo test --test multi_host strangers:: -- --ignored --nocapture` makes the contended runs long: over 100,000
//! compare-and-writes of two mounts on each target.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::backing::can_serve;
use super::harness::{Backing, Cluster, StopOnPanic, can_mount, lunfs};
use super::{caches, deaths, turns};

fn two_hosts(backing: Backing) -> Option<Cluster> {
    if !can_mount() || !lunfs::device::iscsi::AVAILABLE || !can_serve(backing) {
        return None;
    }
    let temp = tempfile::Builder::new().prefix("lunfs-hosts-").tempdir().expect("a directory");
    // istgt would have to be restarted after they were tried. The lease of the fast profile, 2 s, is less than these targets
    // can keep on a busy machine.
    let more = ["--reservations", "off"];
    let mut cluster = Cluster::made_with(temp, "normal", backing, 4, "1G", &more);
    cluster.options = "fencing=lease";
    cluster.mount();
    cluster.mount();
    Some(cluster)
}

/// Compare-and-writes of all mounts until now, as their daemons tell.
fn swaps(cluster: &Cluster) -> u64 {
    let mut all = 0;
    for host in &cluster.hosts {
        let end = format!("@{}.stats", host.name);
        let entries = std::fs::read_dir(cluster.run_dir()).expect("the runtime directory").flatten();
        let socket = entries.map(|entry| entry.path()).find(|path| path.to_string_lossy().ends_with(&end));
        let mut text = String::new();
        let mut stream = UnixStream::connect(socket.expect("a socket of its counters")).expect("connects");
        stream.read_to_string(&mut text).expect("its counters");
        let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let commands = stats["commands"].as_object().expect("commands");
        all += commands.values().map(|one| one["swaps"].as_u64().expect("a number")).sum::<u64>();
    }
    all
}

/// Both hosts append to one file until they have made so many compare-and-writes; not a line is lost, doubled or cut.
fn contended(cluster: &Cluster, name: &str, wanted: u64) {
    let before = swaps(cluster);
    let (since, enough) = (Instant::now(), AtomicBool::new(false));
    let lines = std::thread::scope(|scope| {
        scope.spawn(|| {
            let _stop = StopOnPanic(&enough);
            while swaps(cluster) - before < wanted && !enough.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(50));
            }
            enough.store(true, Ordering::SeqCst);
        });
        cluster.each(|host, root| {
            let _stop = StopOnPanic(&enough);
            let mut file =
                std::fs::File::options().append(true).create(true).open(root.join(name)).expect("opens");
            let mut n = 0u64;
            while !enough.load(Ordering::SeqCst) {
                file.write_all(format!("{host} {n}\n").as_bytes()).expect("appends");
                n += 1;
            }
            n
        })
    });
    let made = swaps(cluster) - before;
    println!("{made} compare-and-writes for {lines:?} lines in {:?}", since.elapsed());
    assert!(made >= wanted);
    for path in cluster.paths(name) {
        let text = std::fs::read_to_string(&path).expect("the log");
        let mut next = vec![0u64; lines.len()];
        for line in text.lines() {
            let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().expect("a number")).collect();
            let [host, n] = numbers[..] else { panic!("half a line: {line:?}") };
            assert_eq!(n, next[host as usize], "of host {host}");
            next[host as usize] += 1;
        }
        assert_eq!(next, lines, "lines are missing");
    }
}

fn share_and_die(backing: Backing) {
    let Some(cluster) = two_hosts(backing) else { return };
    turns::counter_under_lock_files(&cluster);
    caches::no_stale_pages(&cluster);
    contended(&cluster, "log", 2000);
    deaths::killed_and_taken_over(cluster);
}

#[test]
fn tgtd_by_lease() {
    share_and_die(Backing::Tgtd);
}

#[test]
fn istgt_by_lease() {
    share_and_die(Backing::Istgt);
}

/// Their reservations are not good, each in its own way: mkfs finds out, and nobody relies on them.
fn reservations_are_refused(backing: Backing) {
    let Some(mut cluster) = two_hosts(backing) else { return };
    cluster.options = "fencing=required";
    let (mut mount, _) = cluster.mount_command("relies", "rw");
    cluster.unmount(0);
    cluster.unmount(0);
    let refused = mount.output().expect("mount runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("without reservations"), "{said}");
    let mut mkfs = lunfs();
    mkfs.args(["mkfs", "--force", "--reservations", "required"]).arg(cluster.url());
    let refused = mkfs.output().expect("mkfs runs");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    let why =
        ["no reservations that can be trusted", "can't carry a volume: compare-and-writes after a conflict"];
    assert!(!refused.status.success() && why.iter().any(|why| said.contains(why)), "{said}");
}

#[test]
fn tgtd_with_reservations() {
    reservations_are_refused(Backing::Tgtd);
}

#[test]
#[ignore = "over a minute, in which istgt is locked up"]
fn istgt_with_reservations() {
    reservations_are_refused(Backing::Istgt);
}

/// In parts, each with mounts of its own: the harness ends mounts that take too long.
fn long(backing: Backing) {
    let Some(mut cluster) = two_hosts(backing) else { return };
    for part in 0..10 {
        contended(&cluster, &format!("log-{part}"), 10_000);
        cluster.unmount(0);
        cluster.unmount(0);
        cluster.mount();
        cluster.mount();
    }
    cluster.end();
}

#[test]
#[ignore = "minutes; see the header"]
fn a_hundred_thousand_on_tgtd() {
    long(Backing::Tgtd);
}

#[test]
#[ignore = "minutes; see the header"]
fn a_hundred_thousand_on_istgt() {
    long(Backing::Istgt);
}
