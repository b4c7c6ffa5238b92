//! What the kernel caches, how long, and what makes it forget.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Instant;

use super::harness::{Place, can_mount, mount, until};

/// How often a size changes while it is looked at.
const CHANGES: u64 = 4_000;

fn size(path: &Path) -> u64 {
    fs::metadata(path).expect("stat").len()
}

/// Looks until the kernel keeps what it sees.
fn until_kept(place: &Place, look: impl Fn()) {
    let calls = || (place.calls("getattr"), place.calls("lookup"), place.calls("read"));
    until("the kernel keeps it", || {
        let before = calls();
        look();
        calls() == before
    });
}

#[test]
fn attributes_and_pages_stay_until_the_inode_is_forgotten() {
    if !can_mount() {
        return;
    }
    let place = mount("pages", "rw");
    let path = place.dir().join("file");
    fs::write(&path, b"one").expect("write");
    let reader = File::open(&path).expect("open");
    let read = || {
        let mut bytes = vec![0; 100];
        let len = reader.read_at(&mut bytes, 0).expect("read");
        bytes.truncate(len);
        String::from_utf8(bytes).expect("text")
    };
    assert_eq!(read(), "one");
    assert_eq!(size(&path), 3);
    until_kept(&place, || assert_eq!((read().len(), size(&path)), (3, 3)));
    let calls = || (place.calls("getattr"), place.calls("lookup"), place.calls("read"));
    let before = calls();
    for _ in 0..100 {
        assert_eq!(size(&path), 3);
        assert_eq!(read(), "one");
    }
    assert_eq!(calls(), before, "a cached answer asks nobody");
    // Another host changes it. Nobody told the kernel: it must still show the old state, or this test
    // proves nothing.
    place.pull("write file another");
    assert_eq!((size(&path), read().as_str()), (3, "one"));
    place.pull("forget-inode file");
    assert_eq!((size(&path), read().as_str()), (7, "another"));
    // The same with the size unchanged, where only the pages tell.
    place.pull("write file ANOTHER");
    assert_eq!(read(), "another");
    place.pull("forget-inode file");
    assert_eq!(read(), "ANOTHER");
    // An open for reading keeps the pages.
    drop(File::open(&path).expect("open"));
    let reads = place.calls("read");
    assert_eq!(read(), "ANOTHER");
    assert_eq!(place.calls("read"), reads);
    drop(reader);
    place.unmount();
}

/// Linux calls attributes valid before it has them all, so a stat at that moment shows a size that was
/// invalidated long ago, unless the daemon lets attributes be kept only where nothing changes any more.
#[test]
fn a_size_that_was_forgotten_never_comes_back() {
    if !can_mount() {
        return;
    }
    let place = mount("sizes", "rw");
    let path = place.dir().join("file");
    fs::write(&path, b"").expect("write");
    let floor_path = place.scratch().join("floor");
    fs::write(&floor_path, [0; 8]).expect("write");
    let (file, floor) = (File::open(&path).expect("open"), File::open(&floor_path).expect("open"));
    let stop = AtomicBool::new(false);
    let getattrs = place.calls("getattr");
    let looks: u64 = std::thread::scope(|scope| {
        let looker = || {
            let (mut looks, mut bytes) = (0, [0; 8]);
            while !stop.load(SeqCst) {
                floor.read_exact_at(&mut bytes, 0).expect("read");
                let floor = u64::from_le_bytes(bytes);
                let size = file.metadata().expect("fstat").len();
                assert!(size >= floor, "STALE: {size} bytes where {floor} are known to be");
                looks += 1;
            }
            looks
        };
        let lookers: Vec<_> = (0..4).map(|_| scope.spawn(looker)).collect();
        place.pull(&format!("grow file {CHANGES} {}", floor_path.display()));
        stop.store(true, SeqCst);
        lookers.into_iter().map(|looker| looker.join().expect("nothing stale")).sum()
    });
    let asked = place.calls("getattr") - getattrs;
    println!("{looks} looks, {asked} of them asked");
    assert!(asked > CHANGES && asked < looks / 2, "{looks} looks, {asked} asked: nothing was proved");
    drop(file);
    place.unmount();
}

#[test]
fn names_stay_until_names_are_forgotten() {
    if !can_mount() {
        return;
    }
    let place = mount("names", "rw");
    let dir = place.dir();
    fs::create_dir(dir.join("sub")).expect("mkdir");
    fs::write(dir.join("sub/a"), b"a").expect("write");
    assert_eq!(size(&dir.join("sub/a")), 1);
    until_kept(&place, || assert_eq!(size(&dir.join("sub/a")), 1));
    let lookups = place.calls("lookup");
    for _ in 0..50 {
        assert_eq!(size(&dir.join("sub/a")), 1);
    }
    assert_eq!(place.calls("lookup"), lookups);
    place.pull("remove sub/a");
    assert_eq!(size(&dir.join("sub/a")), 1, "the kernel wasn't told yet");
    place.pull("forget-names sub");
    assert_eq!(fs::metadata(dir.join("sub/a")).expect_err("gone").kind(), ErrorKind::NotFound);
    // Absence isn't cached.
    place.pull("create sub/b");
    assert_eq!(size(&dir.join("sub/b")), 0);
    assert_eq!(fs::metadata(dir.join("sub/c")).expect_err("none").kind(), ErrorKind::NotFound);
    place.pull("create sub/c");
    assert_eq!(size(&dir.join("sub/c")), 0);
    // A listing always asks.
    let count = || fs::read_dir(dir.join("sub")).expect("readdir").count();
    assert_eq!(count(), 2);
    place.pull("create sub/d");
    assert_eq!(count(), 3);
    place.unmount();
}

#[test]
fn without_a_lock_nothing_is_cached() {
    if !can_mount() {
        return;
    }
    let place = mount("uncached", "rw");
    let path = place.dir().join("file");
    place.pull("cacheable off");
    fs::write(&path, b"one").expect("write");
    assert_eq!(size(&path), 3);
    place.pull("write file another");
    assert_eq!(size(&path), 7);
    place.pull("remove file");
    assert_eq!(fs::metadata(&path).expect_err("gone").kind(), ErrorKind::NotFound);
    place.unmount();
}

#[test]
fn an_old_kernel_caches_no_names() {
    if !can_mount() {
        return;
    }
    let place = mount("old", "kernel=old");
    let path = place.dir().join("file");
    fs::write(&path, b"one").expect("write");
    assert_eq!(size(&path), 3);
    let lookups = place.calls("lookup");
    for _ in 0..10 {
        assert_eq!(size(&path), 3);
    }
    assert_eq!(place.calls("lookup"), lookups + 10);
    place.pull("remove file");
    assert_eq!(fs::metadata(&path).expect_err("gone at once").kind(), ErrorKind::NotFound);
    // A read-write descriptor is cached there.
    let path = place.dir().join("second");
    fs::write(&path, b"two").expect("write");
    let file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, 0).expect("read");
    let reads = place.calls("read");
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(place.calls("read"), reads);
    file.write_all_at(b"TWO", 0).expect("write");
    assert!(place.calls("write") >= 2, "written through");
    drop(file);
    place.unmount();
}

#[test]
fn a_writer_bypasses_the_page_cache() {
    if !can_mount() {
        return;
    }
    let place = mount("writer", "rw");
    let path = place.dir().join("file");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).expect("open");
    file.write_all_at(b"one", 0).expect("write");
    place.pull("write file 123");
    let mut bytes = [0; 3];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"123", "a writable descriptor asks us each time");
    // And a reader on the same host sees the writer's bytes without being told.
    let reader = File::open(&path).expect("open");
    reader.read_exact_at(&mut bytes, 0).expect("read");
    file.write_all_at(b"789", 0).expect("write");
    reader.read_exact_at(&mut bytes, 0).expect("read");
    assert_eq!(&bytes, b"789");
    drop((file, reader));
    place.unmount();
}

#[test]
fn an_append_goes_to_the_true_end() {
    if !can_mount() {
        return;
    }
    let place = mount("append", "rw");
    let path = place.dir().join("file");
    fs::write(&path, b"one").expect("write");
    let file = OpenOptions::new().append(true).open(&path).expect("open");
    assert_eq!(size(&path), 3);
    // The kernel still believes in three bytes and would write over the rest.
    place.pull("write file another");
    (&file).write_all(b"+X").expect("append");
    place.pull("forget-inode file");
    assert_eq!(fs::read(&path).expect("read"), b"another+X");
    drop(file);
    place.unmount();
}

/// Not a test of correctness: prints how long a stat takes. `cargo test --release -- --ignored latency`.
#[test]
#[ignore = "measures how long a stat takes and asserts nothing; run it by hand"]
fn latency() {
    if !can_mount() {
        return;
    }
    let place = mount("latency", "rw");
    let path = place.dir().join("file");
    fs::write(&path, b"one").expect("write");
    let measure = |what: &str| {
        let mut times: Vec<_> = (0..20_000)
            .map(|_| {
                let start = Instant::now();
                assert_eq!(size(&path), 3);
                start.elapsed()
            })
            .collect();
        times.sort();
        println!("{what}: p50 {:?}, p99 {:?}", times[10_000], times[19_800]);
    };
    measure("stat, cached");
    place.pull("cacheable off");
    place.pull("forget-names /");
    place.pull("forget-inode file");
    measure("stat, LOOKUP and GETATTR each time");
    let file = File::open(&path).expect("open");
    let mut times: Vec<_> = (0..20_000)
        .map(|_| {
            let start = Instant::now();
            assert_eq!(file.metadata().expect("fstat").len(), 3);
            start.elapsed()
        })
        .collect();
    times.sort();
    println!("fstat, GETATTR each time: p50 {:?}, p99 {:?}", times[10_000], times[19_800]);
    drop(file);
    place.unmount();
}
