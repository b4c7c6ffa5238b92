//! Files mapped into memory on one host and changed on the other.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::harness::{Cluster, rounds, until};

on_every_device! {
    2 hosts: mapped_readers;
    2 hosts: mapped_writers;
    2 hosts: stores_are_seen_elsewhere;
    2 hosts: private_mappings;
}

const LEN: usize = 64 << 10;
/// A store into a mapping is under way to the other host for no longer, however busy the machine.
const SEEN_WITHIN: Duration = Duration::from_secs(10);

/// A mapping of a whole file.
struct Map {
    at: *mut u8,
}

impl Map {
    fn new(file: &File, writable: bool, shared: bool) -> Map {
        let protection = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
        // As programs do: the kernel judges a touched page by the size that it last heard.
        assert_eq!(file.metadata().expect("fstat").len(), LEN as u64);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), LEN, protection, flags, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Map { at: at.cast() }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!((index + 1) * 8 <= LEN);
        // SAFETY: inside the mapping, aligned, and others change it through the kernel only; atomic accesses
        // make no assumption about that.
        unsafe { &*self.at.cast::<AtomicU64>().add(index) }
    }

    fn sync(&self) {
        // SAFETY: exactly the mapping.
        let result = unsafe { libc::msync(self.at.cast(), LEN, libc::MS_SYNC) };
        assert_eq!(result, 0, "msync: {}", std::io::Error::last_os_error());
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping, and nobody refers to it any more.
        unsafe { libc::munmap(self.at.cast(), LEN) };
    }
}

fn read_write(path: &std::path::Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).expect("opens")
}

/// A shared mapping for reading shows what the other host wrote as soon as write(2) returned.
fn mapped_readers(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let writer = read_write(&paths[0]);
    writer.write_all_at(&[0; LEN], 0).expect("write");
    let reader = File::open(&paths[1]).expect("open");
    let map = Map::new(&reader, false, true);
    for n in 1..rounds(300) {
        let index = n as usize * 37 % (LEN / 8);
        writer.write_all_at(&n.to_le_bytes(), 8 * index as u64).expect("write");
        assert_eq!(map.word(index).load(Ordering::Relaxed), n, "round {n}");
    }
    drop(reader);
    writer.write_all_at(&77u64.to_le_bytes(), 0).expect("write");
    assert_eq!(map.word(0).load(Ordering::Relaxed), 77, "the mapping outlives its descriptor");
}

/// Shared mappings on both hosts, written in turn: after msync the other one sees it, in its mapping too.
fn mapped_writers(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let files = [read_write(&paths[0]), read_write(&paths[1])];
    files[0].set_len(LEN as u64).expect("size");
    let maps = [Map::new(&files[0], true, true), Map::new(&files[1], true, true)];
    for n in 1..rounds(100) {
        let (mine, theirs) = (n as usize % 2, 1 - n as usize % 2);
        let index = n as usize * 511 % (LEN / 8);
        maps[mine].word(index).store(n, Ordering::Relaxed);
        maps[mine].sync();
        let mut bytes = [0; 8];
        files[theirs].read_exact_at(&mut bytes, 8 * index as u64).expect("read");
        assert_eq!(u64::from_le_bytes(bytes), n, "read, round {n}");
        assert_eq!(maps[theirs].word(index).load(Ordering::Relaxed), n, "mapped, round {n}");
        // Also what was not synced by hand comes along when the other one asks.
        maps[mine].word(index).store(n + 1_000_000, Ordering::Relaxed);
        until("the kernel gives up what is dirty", || {
            files[theirs].read_exact_at(&mut bytes, 8 * index as u64).expect("read");
            u64::from_le_bytes(bytes) == n + 1_000_000
        });
    }
}

/// What a program stores into a mapping makes no request; the other host sees it all the same when it looks.
fn stores_are_seen_elsewhere(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let file = read_write(&paths[0]);
    file.set_len(LEN as u64).expect("size");
    let map = Map::new(&file, true, true);
    let reader = File::open(&paths[1]).expect("open");
    for n in 1..rounds(100) {
        let index = n as usize * 77 % (LEN / 8);
        map.word(index).store(n, Ordering::Relaxed);
        let (begun, mut bytes) = (Instant::now(), [0; 8]);
        while u64::from_le_bytes(bytes) != n {
            assert!(begun.elapsed() < SEEN_WITHIN, "STALE: the other host does not see store {n}");
            reader.read_exact_at(&mut bytes, 8 * index as u64).expect("read");
        }
    }
}

/// Private mappings change nothing for anybody else.
fn private_mappings(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let writer = read_write(&paths[0]);
    writer.write_all_at(&[1; LEN], 0).expect("write");
    for n in 0..rounds(40) {
        let reader = File::open(&paths[1]).expect("open");
        let map = Map::new(&reader, true, false);
        map.word(5).store(n, Ordering::Relaxed);
        writer.write_all_at(&n.to_le_bytes(), 8192).expect("write");
        assert_eq!(map.word(1024).load(Ordering::Relaxed), n, "a page that was not written is the file's");
        assert_eq!(map.word(5).load(Ordering::Relaxed), n, "one that was is our own");
        let mut bytes = [0; 8];
        writer.read_exact_at(&mut bytes, 40).expect("read");
        assert_eq!(bytes, [1; 8]);
    }
}
