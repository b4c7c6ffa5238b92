//! Contents of files under several hands.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::harness::{Cluster, demand_success, errno, rounds, until};

on_every_device! {
    2 hosts: appended_in_turn;
    4 hosts: appended_at_once;
    2 hosts: size_after_a_remote_append;
    2 hosts: cut_and_lengthened;
    2 hosts: direct_and_buffered;
    2 hosts: whole_writes;
    2 hosts: open_and_unlinked;
}

const RECORD: usize = 128;

/// A record that shows its host, its number, and that it is whole.
fn record(host: usize, n: u64) -> Vec<u8> {
    let mut text = format!("[{host}:{n:08}").into_bytes();
    text.resize(RECORD - 1, b'a' + host as u8);
    text.push(b']');
    text
}

fn parse(bytes: &[u8]) -> (usize, u64) {
    let text = String::from_utf8_lossy(bytes);
    let inner = text.strip_prefix('[').unwrap_or_else(|| panic!("no record: {text:?}"));
    let (host, rest) = inner.split_once(':').unwrap_or_else(|| panic!("no record: {text:?}"));
    let (host, n) = (host.parse().expect("a host"), rest[..8].parse().expect("a number"));
    assert!(bytes == record(host, n), "torn: {text:?}");
    (host, n)
}

/// Two hosts append strictly in turn, with a descriptor kept open and with a new one each time.
fn appended_in_turn(cluster: &Cluster) {
    for keep in [true, false] {
        let paths = cluster.paths(&format!("log-{keep}"));
        File::create(&paths[0]).expect("create");
        let open = |host: usize| OpenOptions::new().append(true).open(&paths[host]).expect("open");
        let mut kept = [open(0), open(1)];
        let count = rounds(200);
        for n in 0..count {
            let host = n as usize % 2;
            if keep {
                kept[host].write_all(&record(host, n)).expect("append");
            } else {
                open(host).write_all(&record(host, n)).expect("append");
            }
            let size = fs::metadata(&paths[1 - host]).expect("stat").len();
            assert_eq!(size, (n + 1) * RECORD as u64, "the other's size after record {n}");
        }
        for path in &paths {
            let bytes = fs::read(path).expect("read");
            assert_eq!(bytes.len() as u64, count * RECORD as u64);
            for (n, bytes) in bytes.chunks(RECORD).enumerate() {
                assert_eq!(parse(bytes), (n % 2, n as u64), "every record in its place");
            }
        }
    }
}

/// All hosts append at once: none lost, none torn, each host's in its order.
fn appended_at_once(cluster: &Cluster) {
    let paths = cluster.paths("log");
    File::create(&paths[0]).expect("create");
    let count = rounds(150);
    let written = cluster.each(|host, root| {
        let mut file = OpenOptions::new().append(true).open(root.join("log")).expect("open");
        for n in 0..count {
            file.write_all(&record(host, n)).expect("append");
        }
        count
    });
    demand_success("append", &written);
    for path in &paths {
        let bytes = fs::read(path).expect("read");
        assert_eq!(bytes.len() as u64, count * (paths.len() * RECORD) as u64);
        let mut next = vec![0; paths.len()];
        for bytes in bytes.chunks(RECORD) {
            let (host, n) = parse(bytes);
            assert_eq!(n, next[host], "host {host} lost or swapped a record");
            next[host] += 1;
        }
        assert!(next.iter().all(|n| *n == count));
    }
}

fn size_after_a_remote_append(cluster: &Cluster) {
    let paths = cluster.paths("f");
    File::create(&paths[0]).expect("create");
    let open = File::open(&paths[1]).expect("open for reading");
    let mut size = 0;
    for n in 0..rounds(150) {
        let bytes = vec![n as u8; 1 + (n as usize * 37) % 5000];
        let mut file = OpenOptions::new().append(true).open(&paths[0]).expect("open");
        file.write_all(&bytes).expect("append");
        size += bytes.len() as u64;
        assert_eq!(fs::metadata(&paths[1]).expect("stat").len(), size);
        assert_eq!(open.metadata().expect("fstat").len(), size);
        let mut last = vec![0; bytes.len()];
        open.read_exact_at(&mut last, size - bytes.len() as u64).expect("the new bytes");
        assert!(last == bytes);
        assert_eq!(open.read_at(&mut [0], size).expect("at the end"), 0);
    }
}

/// Sizes go both ways; what was cut off never comes back.
fn cut_and_lengthened(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let writer = OpenOptions::new().write(true).create(true).truncate(true).open(&paths[0]).expect("open");
    let reader = File::open(&paths[1]).expect("open");
    for n in 0..rounds(60) {
        let long = 10 + (n * 7919) % 300_000;
        let short = long * (n % 5) / 5;
        let byte = 1 + (n % 250) as u8;
        writer.set_len(0).expect("empty");
        assert_eq!(reader.metadata().expect("fstat").len(), 0);
        writer.write_all_at(&vec![byte; long as usize], 0).expect("write");
        let mut bytes = fs::read(&paths[1]).expect("read");
        assert!(bytes.len() as u64 == long && bytes.iter().all(|b| *b == byte));
        writer.set_len(short).expect("shorten");
        assert_eq!(fs::metadata(&paths[1]).expect("stat").len(), short);
        assert_eq!(reader.read_at(&mut [0], short).expect("read"), 0);
        writer.set_len(long).expect("lengthen");
        bytes.clear();
        File::open(&paths[1]).expect("open").read_to_end(&mut bytes).expect("read");
        assert_eq!(bytes.len() as u64, long);
        let (kept, new) = bytes.split_at(short as usize);
        assert!(kept.iter().all(|b| *b == byte) && new.iter().all(|b| *b == 0), "round {n}");
    }
    // Truncated by the other one, with O_TRUNC as well.
    fs::write(&paths[0], b"again").expect("write");
    File::create(&paths[1]).expect("O_TRUNC");
    assert_eq!(fs::read(&paths[0]).expect("read"), b"");
}

/// O_DIRECT and buffered descriptors on both hosts show the same.
fn direct_and_buffered(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let direct = |host: usize| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).custom_flags(libc::O_DIRECT);
        options.open(&paths[host]).expect("O_DIRECT")
    };
    let mut block = lunfs::device::AlignedBuf::zeroed(8192);
    let buffered = {
        drop(direct(0));
        File::open(&paths[1]).expect("open")
    };
    for n in 0..rounds(100) {
        let host = n as usize % 2;
        let byte = 1 + (n % 250) as u8;
        block.fill(byte);
        let writer = direct(host);
        writer.write_all_at(&block, 8192 * (n % 3)).expect("direct write");
        let mut seen = vec![0; 8192];
        buffered.read_exact_at(&mut seen, 8192 * (n % 3)).expect("buffered read");
        assert!(seen.iter().all(|b| *b == byte), "buffered, round {n}");
        block.fill(0);
        direct(1 - host).read_exact_at(&mut block, 8192 * (n % 3)).expect("direct read");
        assert!(block.iter().all(|b| *b == byte), "direct, round {n}");
        // And small buffered writes in its middle.
        let small = OpenOptions::new().write(true).open(&paths[1 - host]).expect("open");
        small.write_all_at(b"small", 8192 * (n % 3) + 100).expect("buffered write");
        block.fill(0);
        writer.read_exact_at(&mut block, 8192 * (n % 3)).expect("direct read");
        assert_eq!(&block[99..106], [&[byte][..], b"small", &[byte]].concat());
    }
}

/// A write of up to a MiB is seen wholly or not at all: reader and writer exclude each other.
fn whole_writes(cluster: &Cluster) {
    let paths = cluster.paths("f");
    const LEN: usize = 128 << 10;
    fs::write(&paths[0], vec![0; LEN]).expect("write");
    let (done, reads) = (AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_millis(rounds(1500));
    cluster.each(|host, root| {
        let path = root.join("f");
        if host == 0 {
            let file = OpenOptions::new().write(true).open(&path).expect("open");
            let mut n = 0u8;
            while Instant::now() < end {
                n = n.wrapping_add(1);
                file.write_all_at(&vec![n; LEN], 0).expect("write");
                done.fetch_add(1, Ordering::Relaxed);
            }
            return;
        }
        // Direct reads: a page cache reads page by page.
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open(&path).expect("open");
        let mut bytes = vec![0; LEN];
        while Instant::now() < end {
            file.read_exact_at(&mut bytes, 0).expect("read");
            let first = bytes[0];
            let other = bytes.iter().position(|b| *b != first);
            assert_eq!(other, None, "{first} and {:?}", other.map(|at| bytes[at]));
            reads.fetch_add(1, Ordering::Relaxed);
        }
    });
    println!("{done:?} writes, {reads:?} reads");
    assert!(done.into_inner() > 3 && reads.into_inner() > 3, "both got their turn");
}

/// Open on one host, unlinked by the other: reading and writing go on; its room comes back after the close.
fn open_and_unlinked(cluster: &Cluster) {
    const LEN: usize = 24 << 20;
    let free = |host: usize| {
        let usage = nix::sys::statvfs::statvfs(cluster.dir(host)).expect("statfs");
        usage.blocks_free() * usage.fragment_size()
    };
    let paths = cluster.paths("f");
    let byte = |at: usize| (at / 4096 % 251) as u8;
    let content: Vec<u8> = (0..LEN).map(byte).collect();
    fs::write(&paths[0], &content).expect("write");
    until("both know what is used", || free(0) == free(1));
    let before = free(0);
    let reader = File::open(&paths[0]).expect("open");
    let writer = OpenOptions::new().read(true).write(true).open(&paths[0]).expect("open");
    fs::remove_file(&paths[1]).expect("unlink elsewhere");
    assert_eq!(errno(File::open(&paths[0])), libc::ENOENT);
    assert_eq!(reader.metadata().expect("fstat").nlink(), 0);
    // New files want room meanwhile: they must not get this one's.
    for n in 0..rounds(20) {
        fs::write(cluster.dir(1).join(format!("other-{n}")), vec![0xee; 1 << 20]).expect("write");
    }
    std::thread::sleep(Duration::from_millis(1500));
    let mut bytes = vec![0; LEN];
    reader.read_exact_at(&mut bytes, 0).expect("read of an unlinked file");
    assert!(bytes == content, "an open file stays what it was");
    writer.write_all_at(b"still mine", 5 << 20).expect("write to an unlinked file");
    reader.read_exact_at(&mut bytes[..10], 5 << 20).expect("read");
    assert_eq!(&bytes[..10], b"still mine");
    for n in 0..rounds(20) {
        fs::remove_file(cluster.dir(0).join(format!("other-{n}"))).expect("unlink");
    }
    drop((reader, writer));
    // The directory took up to some blocks, and inodes come in groups.
    let wanted = before + LEN as u64 - (4 << 20);
    until("the room of the unlinked file comes back", || free(0) >= wanted && free(1) >= wanted);
}
