//! Holes, reservations and what statfs(2) says.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use nix::unistd::{Whence, lseek};

use super::harness::{Cluster, rounds, until};

on_every_device! {
    2 hosts: sparse;
    2 hosts: reserved_and_punched;
    3 hosts: usage_is_true_everywhere;
    2 hosts: full;
}

fn sparse(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(&paths[0]).expect("open");
    let places: Vec<u64> = (0..30).map(|n| n * n * 1_000_003 + n * 4096).collect();
    for at in &places {
        file.write_all_at(format!("at {at:020}").as_bytes(), *at).expect("write");
        let seen = fs::metadata(&paths[1]).expect("stat");
        assert_eq!(seen.len(), at + 23);
        assert!(seen.blocks() * 512 < 4 << 20, "holes take no space: {}", seen.blocks());
    }
    let reader = File::open(&paths[1]).expect("open");
    let mut bytes = [0; 23];
    for at in &places {
        reader.read_exact_at(&mut bytes, *at).expect("read");
        assert_eq!(bytes, format!("at {at:020}").as_bytes());
        if *at > 0 {
            reader.read_exact_at(&mut bytes, at - 23).expect("read");
            assert_eq!(bytes, [0; 23], "before {at} there is a hole");
        }
    }
    let last = places[29] as i64;
    let data = lseek(&reader, last - (8 << 20), Whence::SeekData).expect("data");
    assert!(data > last - (8 << 20) && data <= last, "{data}");
    assert_eq!(lseek(&reader, last, Whence::SeekHole), Ok(last + 23));
}

fn reserved_and_punched(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let open = |host: usize| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&paths[host])
            .expect("open")
    };
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    const LEN: usize = 1 << 20;
    for round in 0..rounds(12) {
        let (mine, theirs) = (round as usize % 2, 1 - round as usize % 2);
        let file = open(mine);
        file.set_len(0).expect("empty");
        fallocate(&file, FallocateFlags::empty(), 0, LEN as i64).expect("reserve");
        drop(file);
        let seen = fs::metadata(&paths[theirs]).expect("stat");
        assert_eq!(seen.len(), LEN as u64);
        assert!(seen.blocks() * 512 >= LEN as u64, "reserved: {}", seen.blocks());
        assert!(fs::read(&paths[theirs]).expect("read").iter().all(|b| *b == 0), "no old bytes");
        let byte = 1 + round as u8 % 200;
        open(theirs).write_all_at(&vec![byte; LEN], 0).expect("write");
        let (from, len) = (100_000 + round * 1111, 300_000);
        fallocate(open(mine), punch, from as i64, len as i64).expect("punch");
        for path in &paths {
            let bytes = fs::read(path).expect("read");
            assert_eq!(bytes.len(), LEN);
            for (at, b) in bytes.iter().enumerate() {
                let hole = (from..from + len).contains(&(at as u64));
                assert_eq!(*b, if hole { 0 } else { byte }, "byte {at} on {}", path.display());
            }
            let blocks = fs::metadata(path).expect("stat").blocks() * 512;
            assert!(blocks <= (LEN - 280_000) as u64, "the hole's room is free again: {blocks}");
        }
    }
}

/// Within a commit and a beat statfs shows everywhere what was taken and given back anywhere.
fn usage_is_true_everywhere(cluster: &Cluster) {
    let usage = |host: usize| {
        let s = statvfs(cluster.dir(host)).expect("statfs");
        (s.blocks_free(), s.blocks(), s.files() - s.files_free())
    };
    let all = || (0..cluster.hosts.len()).map(usage).collect::<Vec<_>>();
    let agree = |what: &str| {
        until(what, || {
            let all = all();
            all.iter().all(|u| *u == all[0])
        })
    };
    agree("at the start");
    let before = usage(0);
    for host in 0..cluster.hosts.len() {
        fs::write(cluster.dir(host).join(format!("f{host}")), vec![7; 10 << 20]).expect("write");
    }
    until("everybody sees what all took", || {
        all().iter().all(|(free, _, inodes)| {
            let taken = before.0 - free.min(&before.0);
            (3 * 2560..3 * 2560 + 200).contains(&taken) && *inodes == before.2 + 3
        })
    });
    let start = std::time::Instant::now();
    for host in 0..cluster.hosts.len() {
        fs::remove_file(cluster.dir(0).join(format!("f{host}"))).expect("unlink");
    }
    until("everybody sees what one gave back", || {
        all().iter().all(|u| u.0 + 100 >= before.0 && u.2 == before.2)
    });
    println!("seen after {:?}", start.elapsed());
    agree("in the end");
}

/// Two hosts fill the volume: both can use all of it, both are told, and all comes back.
fn full(cluster: &Cluster) {
    let start = statvfs(cluster.dir(0)).expect("statfs").blocks_free();
    // A file that leaves little.
    let big = File::create(cluster.dir(0).join("big")).expect("create");
    let left = 8000;
    fallocate(&big, FallocateFlags::empty(), 0, (start.saturating_sub(left) * 4096) as i64).expect("reserve");
    let written = cluster.each(|host, root| {
        let mut n = 0u64;
        loop {
            match fs::write(root.join(format!("f-{host}-{n}")), vec![host as u8; 256 << 10]) {
                Ok(()) => n += 1,
                Err(e) => {
                    assert_eq!(e.raw_os_error(), Some(libc::ENOSPC), "{e}");
                    return n;
                }
            }
        }
    });
    println!("files {written:?}");
    let blocks = written.iter().sum::<u64>() * 64;
    assert!(blocks + 1000 >= left, "{blocks} of {left} blocks could be used");
    for (host, n) in written.iter().enumerate() {
        for i in 0..*n {
            let bytes = fs::read(cluster.dir(1 - host).join(format!("f-{host}-{i}"))).expect("read");
            assert!(bytes.len() == 256 << 10 && bytes.iter().all(|b| *b == host as u8));
        }
    }
    drop(big);
    cluster.each(|host, root| {
        for name in super::names::listing(root) {
            // Half of them each; the other one may be faster.
            if name.len() % 2 == host {
                let _ = fs::remove_file(root.join(name));
            }
        }
    });
    for name in super::names::listing(cluster.dir(1)) {
        fs::remove_file(cluster.dir(1).join(name)).expect("unlink");
    }
    let free = || statvfs(cluster.dir(1)).expect("statfs").blocks_free();
    let begun = std::time::Instant::now();
    while free() + 2000 < start && begun.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    // Inode groups stay what they are.
    assert!(free() + 2000 >= start, "{} of {start} blocks are free", free());
    fs::write(cluster.dir(1).join("again"), vec![1; 30 << 20]).expect("room again");
}
