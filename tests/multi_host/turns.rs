//! Programs that take turns: what one wrote before, the next one finds.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use super::harness::{Cluster, PATIENCE, demand_success, errno, rounds};

on_every_device! {
    4 hosts: counter_under_lock_files;
    3 hosts: counter_in_turns;
    4 hosts: mailbox;
}

/// A counter is read, raised and written under a lock file made with O_EXCL; no update is lost.
pub fn counter_under_lock_files(cluster: &Cluster) {
    fs::write(cluster.dir(0).join("counter"), b"0").expect("write");
    let count = rounds(25);
    let tries = cluster.each(|host, root| {
        let (lock, counter) = (root.join("lock"), root.join("counter"));
        let mut raised = 0;
        let start = std::time::Instant::now();
        while raised < count {
            assert!(start.elapsed() < 2 * PATIENCE, "host {host} never gets the lock file: {raised}");
            match OpenOptions::new().write(true).create_new(true).open(&lock) {
                Ok(_) => {
                    let value: u64 = fs::read_to_string(&counter).expect("read").parse().expect("a number");
                    // In place and anew, by turns.
                    if value.is_multiple_of(2) {
                        let new = root.join(format!("counter-{host}"));
                        fs::write(&new, (value + 1).to_string()).expect("write");
                        fs::rename(&new, &counter).expect("rename");
                    } else {
                        fs::write(&counter, (value + 1).to_string()).expect("write");
                    }
                    fs::remove_file(&lock).expect("unlock");
                    raised += 1;
                }
                other => {
                    assert_eq!(errno(other), libc::EEXIST);
                    std::thread::sleep(std::time::Duration::from_micros(200 + 100 * host as u64));
                }
            }
        }
        raised
    });
    demand_success("lock files", &tries);
    for path in cluster.paths("counter") {
        let value: u64 = fs::read_to_string(path).expect("read").parse().expect("a number");
        assert_eq!(value, count * cluster.hosts.len() as u64, "lost updates");
    }
}

/// A counter rewritten strictly in turn, and every value seen by all.
fn counter_in_turns(cluster: &Cluster) {
    let hosts = cluster.hosts.len() as u64;
    fs::write(cluster.dir(0).join("counter"), b"0").expect("write");
    let turn = AtomicU64::new(0);
    let count = rounds(150);
    cluster.each(|host, root| {
        let path = root.join("counter");
        while turn.load(Ordering::Acquire) < count {
            let n = turn.load(Ordering::Acquire);
            if n >= count || n % hosts != host as u64 {
                std::thread::yield_now();
                continue;
            }
            assert_eq!(fs::read_to_string(&path).expect("read"), n.to_string(), "host {host}");
            match n % 3 {
                0 => fs::write(&path, (n + 1).to_string()).expect("write"),
                1 => {
                    let mut file = OpenOptions::new().write(true).open(&path).expect("open");
                    file.write_all((n + 1).to_string().as_bytes()).expect("write");
                }
                _ => {
                    fs::remove_file(&path).expect("unlink");
                    File::create_new(&path)
                        .expect("create")
                        .write_all((n + 1).to_string().as_bytes())
                        .expect("write");
                }
            }
            turn.store(n + 1, Ordering::Release);
        }
    });
    for path in cluster.paths("counter") {
        assert_eq!(fs::read_to_string(path).expect("read"), count.to_string());
    }
}

/// Messages from everybody to everybody, as mail is delivered: written aside, renamed into a directory, read
/// and removed there. Each arrives once and whole.
fn mailbox(cluster: &Cluster) {
    let hosts = cluster.hosts.len();
    for n in 0..hosts {
        fs::create_dir_all(cluster.dir(0).join(format!("box-{n}"))).expect("mkdir");
    }
    let each = rounds(12);
    let received = cluster.each(|me, root| {
        let mut received = vec![0u64; hosts];
        let (mut sent, start) = (0, std::time::Instant::now());
        while received.iter().sum::<u64>() < each * hosts as u64 || sent < each {
            assert!(start.elapsed() < 2 * PATIENCE, "host {me} waits for mail: {received:?}");
            if sent < each {
                for to in 0..hosts {
                    let new = root.join(format!("new-{me}-{to}"));
                    fs::write(&new, format!("{me} {sent} end").repeat(300)).expect("write");
                    fs::rename(&new, root.join(format!("box-{to}/{me}-{sent}"))).expect("deliver");
                }
                sent += 1;
            }
            let mine = root.join(format!("box-{me}"));
            for name in super::names::names_in(&mine) {
                let text = fs::read_to_string(mine.join(&name)).expect("mail");
                assert_eq!(text, format!("{} end", name.replace('-', " ")).repeat(300));
                fs::remove_file(mine.join(&name)).expect("unlink");
                received[name[..1].parse::<usize>().expect("a host")] += 1;
            }
        }
        received
    });
    assert!(received.iter().flatten().all(|n| *n == each), "{received:?}");
}
