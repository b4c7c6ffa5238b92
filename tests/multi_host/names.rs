//! Directories: everybody sees the same names, at once.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use super::harness::{Backing, Cluster, StopOnPanic, demand_success, errno, rounds, with_hosts};

on_every_device! {
    4 hosts: private_directories;
    4 hosts: shared_directory;
    2 hosts: absent_then_created;
    3 hosts: reused_at_once;
    3 hosts: listing_under_change;
    3 hosts: links;
}

pub fn listing(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("readdir");
    entries.map(|e| e.expect("entry").file_name().to_string_lossy().into_owned()).collect()
}

/// The names, each of which must be there once.
pub fn names_in(dir: &Path) -> BTreeSet<String> {
    let list = listing(dir);
    let set: BTreeSet<String> = list.iter().cloned().collect();
    assert_eq!(set.len(), list.len(), "a name twice in {}", dir.display());
    set
}

fn content(host: usize, n: u64) -> Vec<u8> {
    // Inline, one block, several blocks.
    let len = [20, 4096, 9000][n as usize % 3];
    format!("host {host} file {n} ").bytes().cycle().take(len).collect()
}

/// Every host in a directory of its own; all is seen from everywhere.
fn private_directories(cluster: &Cluster) {
    let files = rounds(150);
    cluster.each(|host, root| {
        let dir = root.join(format!("private-{host}"));
        fs::create_dir(&dir).expect("mkdir");
        for n in 0..files {
            let path = dir.join(format!("f{n}"));
            fs::write(&path, content(host, n)).expect("write");
            assert_eq!(fs::metadata(&path).expect("stat").len(), content(host, n).len() as u64);
            if n % 2 == 1 {
                fs::remove_file(&path).expect("unlink");
            }
        }
    });
    let wanted: BTreeSet<String> = (0..files).step_by(2).map(|n| format!("f{n}")).collect();
    cluster.each(|me, root| {
        for host in 0..cluster.hosts.len() {
            let dir = root.join(format!("private-{host}"));
            assert_eq!(names_in(&dir), wanted, "host {me} looks at {host}");
            for n in (0..files).step_by(2) {
                assert!(fs::read(dir.join(format!("f{n}"))).expect("read") == content(host, n));
            }
        }
    });
    // Somebody else removes it all.
    let next = |host: usize| (host + 1) % cluster.hosts.len();
    cluster.each(|me, root| fs::remove_dir_all(root.join(format!("private-{}", next(me)))).expect("rm -r"));
    for host in &cluster.hosts {
        assert_eq!(listing(&host.dir), Vec::<String>::new());
    }
}

/// Every host creates and removes in one directory.
fn shared_directory(cluster: &Cluster) {
    let files = rounds(60);
    fs::create_dir(cluster.dir(0).join("shared")).expect("mkdir");
    let made = cluster.each(|host, root| {
        let dir = root.join("shared");
        let mut made = 0;
        for n in 0..files {
            let path = dir.join(format!("{host}-{n}"));
            fs::write(&path, content(host, n)).expect("write");
            made += 1;
            if n % 3 == 2 {
                fs::rename(&path, dir.join(format!("{host}-{n}-moved"))).expect("rename");
            }
            if n % 3 == 1 {
                fs::remove_file(&path).expect("unlink");
            }
        }
        made
    });
    demand_success("create", &made);
    let name =
        |host, n: u64| (n % 3 != 1).then(|| format!("{host}-{n}{}", ["", "", "-moved"][n as usize % 3]));
    cluster.each(|_, root| {
        let dir = root.join("shared");
        let mut wanted = BTreeSet::new();
        for host in 0..cluster.hosts.len() {
            for (n, name) in (0..files).filter_map(|n| Some((n, name(host, n)?))) {
                assert!(fs::read(dir.join(&name)).expect("read") == content(host, n), "{name}");
                wanted.insert(name);
            }
        }
        assert_eq!(names_in(&dir), wanted);
    });
    // All remove everything at once: each name goes once.
    let removed = cluster.each(|_, root| {
        let dir = root.join("shared");
        let names = listing(&dir);
        names.iter().filter(|name| fs::remove_file(dir.join(name)).is_ok()).count() as u64
    });
    let wanted = (0..files).filter(|n| n % 3 != 1).count() * cluster.hosts.len();
    assert_eq!(removed.iter().sum::<u64>(), wanted as u64);
    for host in &cluster.hosts {
        assert_eq!(listing(&host.dir.join("shared")), Vec::<String>::new());
        assert_eq!(fs::metadata(host.dir.join("shared")).expect("stat").nlink(), 2);
    }
}

/// A name that was looked for in vain is there as soon as another host made it, and gone as soon as it is gone.
fn absent_then_created(cluster: &Cluster) {
    for n in 0..rounds(150) {
        let (a, b) = (cluster.dir(n as usize % 2), cluster.dir(1 - n as usize % 2));
        let name = format!("n{}", n % 3);
        assert_eq!(errno(fs::metadata(b.join(&name))), libc::ENOENT);
        fs::write(a.join(&name), n.to_string()).expect("create");
        assert_eq!(fs::metadata(b.join(&name)).expect("stat").len(), n.to_string().len() as u64);
        assert_eq!(fs::read_to_string(b.join(&name)).expect("read"), n.to_string());
        fs::remove_file(a.join(&name)).expect("unlink");
        assert_eq!(errno(fs::metadata(b.join(&name))), libc::ENOENT);
        assert_eq!(errno(File::open(b.join(&name))), libc::ENOENT);
    }
}

/// One name, used for one type after the other by one host after the other; inodes are used again, too.
fn reused_at_once(cluster: &Cluster) {
    let count = cluster.hosts.len() as u64;
    for n in 0..rounds(200) {
        let paths = cluster.paths("name");
        let mine = &paths[(n % count) as usize];
        let make = n / 2 % 4;
        match make {
            0 => fs::write(mine, n.to_string()).expect("create"),
            1 => fs::create_dir(mine).expect("mkdir"),
            2 => symlink(format!("to/{n}"), mine).expect("symlink"),
            _ => mkfifo(mine, Mode::from_bits_truncate(0o600)).expect("mkfifo"),
        }
        for path in &paths {
            let kind = fs::symlink_metadata(path).expect("stat").file_type();
            match make {
                0 => assert_eq!(fs::read_to_string(path).expect("a file"), n.to_string()),
                1 => assert!(kind.is_dir() && listing(path).is_empty()),
                2 => assert_eq!(fs::read_link(path).expect("a link"), Path::new(&format!("to/{n}"))),
                _ => assert!(kind.is_fifo()),
            }
        }
        let theirs = &paths[((n + 1) % count) as usize];
        if make == 1 { fs::remove_dir(theirs) } else { fs::remove_file(theirs) }.expect("removed elsewhere");
    }
}

/// What is there throughout is listed once in each listing, whatever comes and goes beside it.
fn listing_under_change(cluster: &Cluster) {
    let dir = |host: usize| cluster.dir(host).join("dir");
    fs::create_dir(dir(0)).expect("mkdir");
    let stable: BTreeSet<String> = (0..300).map(|n| format!("stable-{n}")).collect();
    for name in &stable {
        File::create(dir(0).join(name)).expect("create");
    }
    let (stop, changes, lists) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_millis(rounds(2000));
    cluster.each(|host, root| {
        let dir = root.join("dir");
        let _stop = StopOnPanic(&stop);
        if host == 2 {
            while Instant::now() < end || lists.load(Ordering::Relaxed) < 5 {
                let seen = names_in(&dir);
                assert!(stable.is_subset(&seen), "missing {:?}", stable.difference(&seen));
                assert!(seen.iter().all(|n| stable.contains(n) || n.starts_with("passing-")));
                lists.fetch_add(1, Ordering::Relaxed);
            }
            stop.store(true, Ordering::Release);
            return;
        }
        let mut n = 0u64;
        while !stop.load(Ordering::Acquire) {
            let path = dir.join(format!("passing-{host}-{}", n % 40));
            if (n / 40).is_multiple_of(2) {
                File::create(&path).expect("create");
            } else {
                fs::remove_file(&path).expect("unlink");
            }
            n += 1;
            changes.fetch_add(1, Ordering::Relaxed);
        }
    });
    let (changes, lists) = (changes.into_inner(), lists.into_inner());
    println!("{lists} listings, {changes} changes");
    assert!(changes > 20, "nothing changed meanwhile: {changes}");
}

/// Hard links and symbolic links made, counted and followed everywhere.
fn links(cluster: &Cluster) {
    let count = cluster.hosts.len();
    fs::write(cluster.dir(0).join("target"), b"linked").expect("write");
    let linked = cluster.each(|host, root| {
        let n = rounds(30);
        for i in 0..n {
            fs::hard_link(root.join("target"), root.join(format!("hard-{host}-{i}"))).expect("link");
            symlink("target", root.join(format!("soft-{host}-{i}"))).expect("symlink");
        }
        n
    });
    let total = 1 + linked.iter().sum::<u64>();
    let ino = fs::metadata(cluster.dir(0).join("target")).expect("stat").ino();
    cluster.each(|_, root| {
        for (host, links) in linked.iter().enumerate() {
            for i in 0..*links {
                let meta = fs::metadata(root.join(format!("hard-{host}-{i}"))).expect("stat");
                assert_eq!((meta.ino(), meta.nlink()), (ino, total));
                let soft = root.join(format!("soft-{host}-{i}"));
                assert_eq!(fs::read_link(&soft).expect("readlink"), Path::new("target"));
                assert_eq!(fs::read(&soft).expect("through the link"), b"linked");
            }
        }
    });
    // The first name goes; each host takes away the links of another.
    fs::remove_file(cluster.dir(count - 1).join("target")).expect("unlink");
    cluster.each(|host, root| {
        let other = (host + 1) % count;
        assert_eq!(errno(fs::read(root.join(format!("soft-{other}-0")))), libc::ENOENT);
        for i in 0..linked[other] {
            let path = root.join(format!("hard-{other}-{i}"));
            if (other, i) != (0, 0) {
                fs::remove_file(path).expect("unlink");
            }
            fs::remove_file(root.join(format!("soft-{other}-{i}"))).expect("unlink");
        }
    });
    for path in cluster.paths("hard-0-0") {
        assert_eq!(fs::metadata(&path).expect("stat").nlink(), 1);
        assert_eq!(fs::read(&path).expect("read"), b"linked");
    }
}

/// A hundred thousand files in one directory, made by two hosts and listed by both; as many as can be made in
/// a minute.
#[test]
fn hundred_thousand_files() {
    with_hosts(Backing::File(512), 2, |cluster| {
        let end = Instant::now() + Duration::from_secs(40);
        fs::create_dir(cluster.dir(0).join("big")).expect("mkdir");
        let made = cluster.each(|host, root| {
            let dir = root.join("big");
            let mut n = 0;
            while n < rounds(50_000) && Instant::now() < end {
                File::create(dir.join(format!("file-{host}-{n:06}"))).expect("create");
                n += 1;
            }
            n
        });
        println!("made {made:?}");
        demand_success("create", &made);
        let wanted: BTreeSet<String> = made
            .iter()
            .enumerate()
            .flat_map(|(h, n)| (0..*n).map(move |i| format!("file-{h}-{i:06}")))
            .collect();
        cluster.each(|host, root| {
            let start = Instant::now();
            assert!(names_in(&root.join("big")) == wanted, "the listing differs");
            println!("host {host} listed {} in {:?}", wanted.len(), start.elapsed());
            // Names of the other one, found by looking them up.
            let other = 1 - host;
            for i in (0..made[other]).step_by(997) {
                fs::metadata(root.join(format!("big/file-{other}-{i:06}"))).expect("stat");
            }
        });
    });
}
