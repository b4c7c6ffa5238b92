//! Coming, leaving, being refused, being told to end, coming back.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::signal::Signal;

use super::harness::{Backing, Cluster, can_mount, until};

const ALL: [Backing; 4] = [Backing::File(512), Backing::File(4096), Backing::Loop(512), Backing::Loop(4096)];

/// Everything below a directory: type, size, owner and bytes by path.
fn image_of(root: &Path) -> BTreeMap<String, (u32, u64, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).expect("readdir") {
            let path = entry.expect("entry").path();
            let meta = fs::symlink_metadata(&path).expect("stat");
            let bytes = if meta.is_file() { fs::read(&path).expect("read") } else { Vec::new() };
            if meta.is_dir() {
                todo.push(path.clone());
            }
            let name = path.strip_prefix(root).expect("below").to_string_lossy().into_owned();
            found.insert(name, (meta.mode(), meta.len(), meta.uid(), bytes));
        }
    }
    found
}

/// Four hosts at once make a tree and leave one by one; whoever comes later finds the same.
#[test]
fn the_same_tree_after_coming_back() {
    if !can_mount() {
        return;
    }
    for backing in ALL {
        let mut cluster = Cluster::new(backing, 4, "1G");
        for _ in 0..4 {
            cluster.mount();
        }
        cluster.each(|host, root| {
            for n in 0..10 {
                fs::create_dir_all(root.join(format!("d{host}/e{n}"))).expect("mkdir");
                let bytes = vec![n as u8; n * n * 500];
                fs::write(root.join(format!("d{host}/e{n}/f")), bytes).expect("write");
                std::os::unix::fs::symlink("f", root.join(format!("d{host}/e{n}/s"))).expect("symlink");
            }
        });
        let before = image_of(cluster.dir(0));
        assert_eq!(before.len(), 4 * (1 + 10 * 3));
        for host in 1..4 {
            assert!(image_of(cluster.dir(host)) == before);
        }
        while !cluster.hosts.is_empty() {
            cluster.unmount(cluster.hosts.len() / 2);
        }
        assert!(cluster.states().iter().all(|(_, state)| state == "left"), "{:?}", cluster.states());
        // Others, and other names; a name that left may come again.
        for name in ["h3", "new", "h0", "other"] {
            cluster.mount_as(name, if name == "other" { "ro" } else { "rw" });
        }
        for host in 0..4 {
            assert!(image_of(cluster.dir(host)) == before, "{backing:?}: host {host} after coming back");
        }
        let refused = fs::write(cluster.dir(3).join("x"), b"x").expect_err("read-only");
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
        fs::write(cluster.dir(2).join("x"), b"x").expect("write");
        assert_eq!(fs::read(cluster.dir(3).join("x")).expect("seen by the read-only host"), b"x");
        cluster.end();
    }
}

/// One host too many, or one that is there already: one clear line, and nothing stays behind.
#[test]
fn refused_mounts() {
    if !can_mount() {
        return;
    }
    for backing in ALL {
        let mut cluster = Cluster::new(backing, 4, "1G");
        let refused = |cluster: &mut Cluster, name: &str, text: &str| {
            let (mut command, dir) = cluster.mount_command(name, "");
            let output = command.output().expect("mount runs");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
            assert_eq!(stderr.lines().count(), 1, "one clear line: {stderr}");
            assert!(stderr.contains(text), "{text:?} not in {stderr:?}");
            assert!(lunfs::fuse::mountinfo::at(&dir).expect("mountinfo").is_none());
            fs::read_dir(&dir).expect("the directory is as it was");
        };
        cluster.mount();
        refused(&mut cluster, "h0", "already mounted by host name");
        for _ in 1..4 {
            cluster.mount();
        }
        refused(&mut cluster, "fifth", "slot");
        assert_eq!(cluster.states().iter().filter(|(_, state)| state == "live").count(), 4);
        // The others never noticed; and a place that becomes free is taken.
        fs::write(cluster.dir(0).join("f"), b"still here").expect("write");
        assert_eq!(fs::read(cluster.dir(3).join("f")).expect("read"), b"still here");
        cluster.unmount(1);
        cluster.mount_as("fifth", "rw");
        assert_eq!(fs::read(cluster.dir(3).join("f")).expect("read"), b"still here");
        cluster.end();
    }
}

/// A mount in use stays, and goes on working.
#[test]
fn unmount_while_busy() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::new(Backing::File(512), 2, "1G");
    cluster.mount();
    cluster.mount();
    let open = File::create(cluster.dir(0).join("f")).expect("create");
    let output = cluster.umount_command(cluster.dir(0));
    assert!(!output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("busy"), "{output:?}");
    assert!(cluster.hosts[0].is_mounted() && cluster.hosts[0].is_alive());
    std::os::unix::fs::FileExt::write_all_at(&open, b"on", 0).expect("still works");
    assert_eq!(fs::read(cluster.dir(1).join("f")).expect("seen elsewhere"), b"on");
    drop(open);
    cluster.end();
}

/// SIGTERM is a clean end: what was written, never synced, is there for the others and after coming back.
#[test]
fn terminated() {
    if !can_mount() {
        return;
    }
    for backing in ALL {
        let mut cluster = Cluster::new(backing, 3, "1G");
        for _ in 0..2 {
            cluster.mount();
        }
        let bytes: Vec<u8> = (0..5_000_000u32).map(|n| (n % 241) as u8).collect();
        fs::write(cluster.dir(0).join("big"), &bytes).expect("write");
        for n in 0..200 {
            fs::write(cluster.dir(0).join(format!("small-{n}")), format!("small {n}")).expect("write");
        }
        let host = cluster.hosts.remove(0);
        host.signal(Signal::SIGTERM);
        until("the daemon ends", || !host.is_alive());
        until("its mount goes", || !host.is_mounted());
        for _ in 0..2 {
            assert!(fs::read(cluster.dir(0).join("big")).expect("read") == bytes, "{backing:?}");
            for n in 0..200 {
                let text = fs::read_to_string(cluster.dir(0).join(format!("small-{n}"))).expect("read");
                assert_eq!(text, format!("small {n}"));
            }
            // Again after everybody left.
            cluster.unmount(0);
            assert!(cluster.states().iter().all(|(_, state)| state == "left"), "{:?}", cluster.states());
            cluster.mount_as("again", "rw");
        }
        cluster.end();
    }
}

/// Hosts come and go while others work.
#[test]
fn coming_and_going() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::new(Backing::File(512), 4, "1G");
    cluster.mount();
    let dir = cluster.dir(0).to_owned();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let made = std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let mut n = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Acquire) {
                fs::write(dir.join(format!("f{n}")), n.to_string()).expect("write");
                n += 1;
            }
            n
        });
        for round in 0..super::harness::rounds(8) {
            cluster.mount_as(&format!("guest{}", round % 3), "rw");
            let guest = cluster.dir(1).to_owned();
            let names = super::names::names_in(&guest);
            for name in names.iter().take(10) {
                if let Some(n) = name.strip_prefix('f') {
                    let text = fs::read_to_string(guest.join(name)).expect("read");
                    assert!(text == n || text.is_empty(), "{name}: {text}");
                }
            }
            fs::write(guest.join(format!("guest-{round}")), b"was here").expect("write");
            cluster.unmount(1);
        }
        stop.store(true, std::sync::atomic::Ordering::Release);
        worker.join().expect("the worker")
    });
    assert!(made > 5, "the first host could work meanwhile: {made}");
    let names = super::names::names_in(&dir);
    assert_eq!(names.len() as u64, made + super::harness::rounds(8));
    cluster.end();
}

/// What the lease depends on does not stand in one line with all that a busy machine does.
#[test]
fn beats_come_first() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::new(Backing::File(512), 2, "256M");
    let pid = cluster.mount().pid;
    let mut urgent = Vec::new();
    for task in fs::read_dir(format!("/proc/{pid}/task")).expect("its threads").flatten() {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        // Field 19, counted behind the name (proc_pid_stat(5)).
        let nice = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(16));
        if nice == Some("-20") {
            urgent.push(name.trim().to_owned());
        }
    }
    urgent.sort();
    assert_eq!(urgent, ["beat", "demand", "fence", "watch"]);
    if let Ok(group) = fs::read_to_string(format!("/proc/{pid}/autogroup")) {
        assert!(group.contains("nice -10"), "{group}");
    }
    cluster.end();
}
