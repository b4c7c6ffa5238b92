//! Directories that move, come and go while others use them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::harness::{Cluster, Gate, StopOnPanic, demand_success, errno, rounds};
use super::names::{listing, names_in};

on_every_device! {
    2 hosts: no_circles;
    3 hosts: into_vanishing_directories;
    2 hosts: moved_trees_are_found;
    3 hosts: inodes_of_removed_directories;
    2 hosts: directories_seen_earlier;
}

fn tree(dir: &Path, depth: usize, into: &mut BTreeSet<String>) {
    assert!(depth < 20, "the directories go round in a circle at {}", dir.display());
    for name in names_in(dir) {
        let path = dir.join(&name);
        into.insert(name);
        if fs::symlink_metadata(&path).expect("stat").is_dir() {
            tree(&path, depth + 1, into);
        }
    }
}

/// Two hosts move two directories into each other: never both, and nothing leaves the tree.
fn no_circles(cluster: &Cluster) {
    let all: BTreeSet<String> = ["a", "b", "c", "d"].map(str::to_owned).into();
    for path in ["a", "a/b", "c", "c/d"] {
        fs::create_dir(cluster.dir(0).join(path)).expect("mkdir");
    }
    let gate = Gate::new(2);
    let wins = cluster.each(|host, root| {
        let mut wins = 0;
        for round in 0..rounds(100) {
            // Directly below each other, or one further down.
            let [(from, to), back] = match (host, round % 2) {
                (0, 0) => [("a", "c/a"), ("c/a", "a")],
                (_, 0) => [("c", "a/c"), ("a/c", "c")],
                (0, _) => [("a", "c/d/a"), ("c/d/a", "a")],
                (_, _) => [("c", "a/b/c"), ("a/b/c", "c")],
            };
            gate.meet();
            let done = fs::rename(root.join(from), root.join(to));
            if let Err(error) = &done {
                let errno = error.raw_os_error().unwrap_or(0);
                assert!([libc::ENOENT, libc::EINVAL, libc::ELOOP].contains(&errno), "{error}");
            }
            gate.meet();
            let mut seen = BTreeSet::new();
            tree(root, 0, &mut seen);
            assert_eq!(seen, all, "host {host} round {round}");
            gate.meet();
            if done.is_ok() {
                wins += 1;
                fs::rename(root.join(back.0), root.join(back.1)).expect("back again");
            }
            gate.meet();
            assert_eq!(names_in(root).len(), 2);
            gate.meet();
        }
        wins
    });
    println!("wins {wins:?}");
    demand_success("move", &wins);
    assert!(wins.iter().sum::<u64>() == rounds(100), "one each round: {wins:?}");
    for host in &cluster.hosts {
        let links = |path: &str| fs::metadata(host.dir.join(path)).expect("stat").nlink();
        assert_eq!((links("."), links("a"), links("c"), links("a/b")), (4, 3, 3, 2));
    }
}

/// One host makes and removes a directory, the others move and create files into it: a file is in one place
/// or the other, and a directory that is gone takes nothing with it.
fn into_vanishing_directories(cluster: &Cluster) {
    let stop = AtomicBool::new(false);
    let (moved, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let counts = cluster.each(|host, root| {
        let dir = root.join("dir");
        let mut count = 0;
        let _stop = StopOnPanic(&stop);
        if host == 0 {
            // A directory may be removed by its maker just then.
            let take_out = |name: &str| match fs::rename(dir.join(name), root.join(name)) {
                Ok(()) => {}
                error => {
                    assert!([libc::ENOENT, libc::ESTALE].contains(&errno(error)) && name.starts_with("sub"));
                }
            };
            for _ in 0..rounds(100) {
                fs::create_dir(&dir).expect("mkdir");
                // Long enough for the others to notice, now and then.
                std::thread::sleep(std::time::Duration::from_millis(2 * (count % 8)));
                for name in listing(&dir) {
                    take_out(&name);
                }
                loop {
                    match fs::remove_dir(&dir) {
                        Ok(()) => break,
                        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTEMPTY)),
                    }
                    for name in listing(&dir) {
                        take_out(&name);
                    }
                }
                count += 1;
            }
            stop.store(true, Ordering::Release);
            return count;
        }
        let name = format!("file-{host}");
        File::create(root.join(&name)).expect("create");
        while !stop.load(Ordering::Acquire) {
            match fs::rename(root.join(&name), dir.join(&name)) {
                Ok(()) => {
                    count += 1;
                    moved.fetch_add(1, Ordering::Relaxed);
                }
                error => {
                    // The kernel looks again once when a directory went away between lookup and rename; twice
                    // in a row it says ESTALE.
                    assert!([libc::ENOENT, libc::ESTALE].contains(&errno(error)));
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            }
            match fs::create_dir(dir.join(format!("sub-{host}"))) {
                Ok(()) => match fs::remove_dir(dir.join(format!("sub-{host}"))) {
                    Ok(()) => {}
                    // It was moved out as everything is.
                    Err(e) => {
                        assert!([libc::ENOENT, libc::ESTALE].map(Some).contains(&e.raw_os_error()), "{e}");
                        let _ = fs::remove_dir(root.join(format!("sub-{host}")));
                    }
                },
                Err(e) => assert!(
                    [libc::ENOENT, libc::EEXIST, libc::ESTALE].map(Some).contains(&e.raw_os_error()),
                    "mkdir in a vanishing directory: {e}"
                ),
            }
        }
        count
    });
    println!("rounds and moves {counts:?}, refused {refused:?}");
    demand_success("vanishing directories", &counts);
    let wanted: BTreeSet<String> = ["file-1", "file-2"].map(str::to_owned).into();
    for host in &cluster.hosts {
        for sub in ["sub-1", "sub-2"] {
            let _ = fs::remove_dir(host.dir.join(sub));
        }
        assert_eq!(names_in(&host.dir), wanted);
        assert_eq!(fs::metadata(&host.dir).expect("stat").nlink(), 2, "links of the root");
    }
}

/// A tree moved by one host is used under its new path by the other at once, through open directories, too.
fn moved_trees_are_found(cluster: &Cluster) {
    let (a, b) = (cluster.dir(0), cluster.dir(1));
    fs::create_dir_all(a.join("p0/x/y")).expect("mkdir");
    for n in 1..4 {
        fs::create_dir(a.join(format!("p{n}"))).expect("mkdir");
    }
    for round in 0..rounds(60) {
        let (mover, user) = if round % 2 == 0 { (a, b) } else { (b, a) };
        let (old, new) = (format!("p{}/x", round % 4), format!("p{}/x", (round + 1) % 4));
        fs::write(user.join(format!("{old}/y/f")), round.to_string()).expect("under the old path");
        fs::rename(mover.join(&old), mover.join(&new)).expect("rename");
        assert_eq!(errno(fs::metadata(user.join(format!("{old}/y/f")))), libc::ENOENT);
        assert_eq!(fs::read_to_string(user.join(format!("{new}/y/f"))).expect("new path"), round.to_string());
        let parent = |path: String| fs::metadata(user.join(path)).expect("stat").ino();
        assert_eq!(parent(format!("{new}/..")), parent(format!("p{}", (round + 1) % 4)));
    }
}

/// A directory goes and its inode is used again for another one, while a third party is on its way into it:
/// what it creates must be where it was asked for, or nowhere.
fn inodes_of_removed_directories(cluster: &Cluster) {
    let stop = AtomicBool::new(false);
    let (right, refused) = (AtomicU64::new(0), AtomicU64::new(0));
    let end = std::time::Instant::now() + std::time::Duration::from_millis(rounds(2500));
    cluster.each(|host, root| {
        let _stop = StopOnPanic(&stop);
        if host == 0 {
            while std::time::Instant::now() < end && !stop.load(Ordering::Acquire) {
                // The target is there for a moment, then its inode becomes one that nobody may enter.
                fs::create_dir(root.join("target")).expect("mkdir");
                std::thread::sleep(std::time::Duration::from_micros(1500));
                let gone = fs::rename(root.join("target"), root.join("old"));
                gone.expect("rename");
                loop {
                    for name in listing(&root.join("old")) {
                        fs::remove_file(root.join("old").join(name)).expect("unlink");
                    }
                    match fs::remove_dir(root.join("old")) {
                        Ok(()) => break,
                        Err(e) => assert_eq!(e.raw_os_error(), Some(libc::ENOTEMPTY)),
                    }
                }
                for n in 0..3 {
                    let other = root.join(format!("other-{n}"));
                    fs::create_dir(&other).expect("mkdir");
                }
                std::thread::sleep(std::time::Duration::from_micros(500));
                for n in 0..3 {
                    let other = root.join(format!("other-{n}"));
                    assert_eq!(
                        listing(&other),
                        Vec::<String>::new(),
                        "something landed in another directory"
                    );
                    fs::remove_dir(&other).expect("rmdir");
                }
            }
            stop.store(true, Ordering::Release);
            return;
        }
        let mut n = 0u64;
        while !stop.load(Ordering::Acquire) {
            n += 1;
            match File::create(root.join(format!("target/{host}-{n}"))) {
                Ok(_) => right.fetch_add(1, Ordering::Relaxed),
                Err(e) => {
                    assert!([libc::ENOENT, libc::ESTALE].map(Some).contains(&e.raw_os_error()), "{e}");
                    refused.fetch_add(1, Ordering::Relaxed)
                }
            };
        }
    });
    println!("{right:?} created, {refused:?} refused");
    assert!(right.into_inner() > 5 && refused.into_inner() > 5);
}

/// A directory that a host's kernel refers to is removed by the other host, and its inode becomes another
/// directory: what the first host makes in the old one must not land in the new one.
fn directories_seen_earlier(cluster: &Cluster) {
    use std::os::fd::AsRawFd;
    let [a, b] = [cluster.dir(0), cluster.dir(1)];
    for round in 0..3 {
        fs::create_dir(a.join("old")).expect("mkdir");
        // No open file as LunFS sees it; only the kernel keeps the directory in mind.
        let kept = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(b.join("old"))
            .expect("open for the path only");
        let inode = |path: &Path| fs::metadata(path).expect("stat").ino() & ((1 << 48) - 1);
        let old = inode(&a.join("old"));
        fs::remove_dir(a.join("old")).expect("rmdir");
        let again = (0..2000).map(|n| a.join(format!("new-{round}-{n}"))).find(|path| {
            fs::create_dir(path).expect("mkdir");
            inode(path) == old
        });
        let again = again.expect("the inode is used anew");
        let through = Path::new("/proc/self/fd").join(kept.as_raw_fd().to_string());
        let errno =
            |result: std::io::Result<()>| result.expect_err("made in a removed directory").raw_os_error();
        let gone = [Some(libc::ENOENT), Some(libc::ESTALE)];
        assert!(gone.contains(&errno(File::create(through.join("file")).map(drop))));
        assert!(gone.contains(&errno(fs::create_dir(through.join("dir")))));
        assert!(
            gone.contains(&errno(fs::rename(b.join(again.file_name().expect("a name")), through.join("x"))))
        );
        assert!(gone.contains(&errno(fs::set_permissions(&through, fs::Permissions::from_mode(0o700)))));
        // And the new one works on both hosts.
        assert_eq!(listing(&again), Vec::<String>::new());
        let seen = b.join(again.file_name().expect("a name"));
        assert_eq!(inode(&seen), old);
        File::create(seen.join("here")).expect("create");
        assert_eq!(listing(&again), ["here"]);
    }
}
