//! Nothing old is ever shown: a look that began after a change had returned sees that change.
//!
//! One host changes, the other looks in a tight loop, from its kernel's caches most of the time. Both note
//! what they did in memory that they share: `begun` before each change, `done` after it, `seen` when a look met
//! a change before it had returned. A look remembers the latest of `done` and `seen` before it starts; what it
//! sees must not be older.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::harness::{Cluster, StopOnPanic, rounds};

on_every_device! {
    2 hosts: no_stale_pages;
    2 hosts: no_stale_pages_both_ways;
    2 hosts: no_stale_attributes;
    2 hosts: no_stale_kept_attributes;
    2 hosts: no_stale_names;
    2 hosts: no_stale_moved_names;
}

/// What changed so far.
#[derive(Default)]
struct Clock {
    begun: AtomicU64,
    done: AtomicU64,
    seen: AtomicU64,
    stop: AtomicBool,
    looks: AtomicU64,
}

impl Clock {
    /// Makes changes until the time is over.
    fn change(&self, pace: Duration, mut change: impl FnMut(u64)) {
        let end = Instant::now() + Duration::from_millis(rounds(2500));
        let mut n = 0;
        let _stop = StopOnPanic(&self.stop);
        while Instant::now() < end && !self.stop.load(SeqCst) {
            n += 1;
            self.begun.store(n, SeqCst);
            change(n);
            self.done.store(n, SeqCst);
            // Readers fill their caches meanwhile; without a pause there is never anything to revoke.
            std::thread::sleep(pace);
        }
        self.stop.store(true, SeqCst);
    }

    /// Looks until the changes are over. `look` gets what must be visible at least, and says what is.
    fn look(&self, mut look: impl FnMut(u64) -> u64) {
        let mut looks = 0u64;
        let _stop = StopOnPanic(&self.stop);
        while !self.stop.load(SeqCst) {
            let floor = self.done.load(SeqCst).max(self.seen.load(SeqCst));
            let seen = look(floor);
            let begun = self.begun.load(SeqCst);
            assert!(seen >= floor, "STALE: saw {seen} after {floor} had returned or was seen (look {looks})");
            assert!(seen <= begun, "saw {seen} before it was begun ({begun})");
            self.seen.fetch_max(seen, SeqCst);
            looks += 1;
        }
        self.looks.fetch_add(looks, SeqCst);
    }

    fn report(&self, what: &str) {
        let (looks, changes) = (self.looks.load(SeqCst), self.done.load(SeqCst));
        println!("{what}: {looks} looks, {changes} changes, none stale");
        assert!(looks > 300 && changes > 10, "{what}: too little happened");
    }
}

fn number(file: &File) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 4000).expect("read");
    u64::from_le_bytes(bytes)
}

pub fn no_stale_pages(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let writer =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&paths[0]).expect("open");
    writer.write_all_at(&[0; 8192], 0).expect("write");
    let readers = [File::open(&paths[1]).expect("open"), File::open(&paths[1]).expect("open")];
    let clock = Clock::default();
    std::thread::scope(|scope| {
        for reader in &readers {
            scope.spawn(|| clock.look(|_| number(reader)));
        }
        // A new descriptor each time, too.
        scope.spawn(|| clock.look(|_| number(&File::open(&paths[1]).expect("open"))));
        clock.change(Duration::from_micros(700), |n| {
            writer.write_all_at(&n.to_le_bytes(), 4000).expect("write")
        });
    });
    clock.report("pages");
}

/// Two files, each written by one host and read by the other.
fn no_stale_pages_both_ways(cluster: &Cluster) {
    let names = ["a", "b"];
    for (host, name) in names.iter().enumerate() {
        fs::write(cluster.dir(host).join(name), [0; 8192]).expect("write");
    }
    let clocks = [Clock::default(), Clock::default()];
    std::thread::scope(|scope| {
        for host in 0..2 {
            let (mine, theirs) =
                (cluster.dir(host).join(names[host]), cluster.dir(host).join(names[1 - host]));
            let clocks = &clocks;
            scope.spawn(move || {
                clocks[host].change(Duration::from_micros(1500), |n| {
                    // Opened anew: the host holds the lock for writing only now and then.
                    let file = OpenOptions::new().write(true).open(&mine).expect("open");
                    file.write_all_at(&n.to_le_bytes(), 4000).expect("write");
                })
            });
            scope.spawn(move || {
                let file = File::open(&theirs).expect("open");
                clocks[1 - host].look(|_| number(&file));
            });
        }
    });
    clocks.iter().for_each(|clock| clock.report("pages both ways"));
}

fn no_stale_attributes(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let writer = OpenOptions::new().append(true).create(true).open(&paths[0]).expect("open");
    let open = File::open(&paths[1]).expect("open");
    let clock = Clock::default();
    std::thread::scope(|scope| {
        scope.spawn(|| clock.look(|_| fs::metadata(&paths[1]).expect("stat").size()));
        scope.spawn(|| clock.look(|_| open.metadata().expect("fstat").size()));
        clock.change(Duration::from_micros(700), |_| {
            use std::io::Write;
            (&writer).write_all(b"x").expect("append");
        });
    });
    clock.report("sizes");
}

/// The same with rests between the changes that are long enough for the kernel to keep what it was told.
fn no_stale_kept_attributes(cluster: &Cluster) {
    let paths = cluster.paths("f");
    let clock = Clock::default();
    File::create(&paths[0]).expect("create");
    std::thread::scope(|scope| {
        scope.spawn(|| clock.look(|_| fs::metadata(&paths[1]).expect("stat").size()));
        clock.change(Duration::from_millis(80), |n| {
            // By its name and size alone: an open file would stay with its writer.
            let file = OpenOptions::new().write(true).open(&paths[0]).expect("open");
            file.set_len(n).expect("a size");
        });
    });
    clock.report("kept sizes");
}

/// Is the name there? `None`: it came and went too fast to say (the kernel begins a path anew once when what it
/// found is gone, and not again). Any other answer is wrong.
fn is_there<T>(looked: std::io::Result<T>) -> Option<bool> {
    match looked.map_err(|error| error.raw_os_error()) {
        Ok(_) => Some(true),
        Err(Some(libc::ENOENT)) => Some(false),
        Err(Some(libc::ESTALE)) => None,
        Err(errno) => panic!("neither there nor not: errno {errno:?}"),
    }
}

/// Odd numbers create a name, even ones unlink it; in between lookups tell which it is.
fn no_stale_names(cluster: &Cluster) {
    let paths = cluster.paths("dir");
    fs::create_dir(&paths[0]).expect("mkdir");
    let clock = Clock::default();
    let decided = AtomicU64::new(0);
    let look = |find: &dyn Fn() -> Option<bool>| {
        clock.look(|floor| {
            let found = find();
            let begun = clock.begun.load(SeqCst);
            let Some(there) = found.map(u64::from) else {
                assert!(begun >= floor + 2, "no answer although nothing came and went after change {floor}");
                return floor;
            };
            // Only what cannot have changed twice meanwhile says something.
            if begun == floor {
                assert_eq!(there, floor % 2, "STALE: after change {floor}");
                decided.fetch_add(1, SeqCst);
            } else if begun == floor + 1 && there == begun % 2 {
                return begun;
            }
            floor
        })
    };
    std::thread::scope(|scope| {
        scope.spawn(|| look(&|| is_there(fs::metadata(paths[1].join("name")))));
        scope.spawn(|| look(&|| is_there(File::open(paths[1].join("name")))));
        scope.spawn(|| look(&|| Some(super::names::listing(&paths[1]).len() == 1)));
        clock.change(Duration::from_millis(8), |n| {
            let path = paths[0].join("name");
            match n % 2 {
                1 => drop(File::create_new(path).expect("create")),
                _ => fs::remove_file(path).expect("unlink"),
            }
        });
    });
    println!("{decided:?} looks had one right answer");
    clock.report("names");
    assert!(decided.into_inner() > 100, "too few looks had one right answer");
}

/// A file is moved elsewhere while this kernel knows it by its old name. The inode lives on, so nothing makes the kernel ask anew
/// but that it forgot the name.
fn no_stale_moved_names(cluster: &Cluster) {
    let paths = cluster.paths("dir");
    fs::create_dir(&paths[0]).expect("mkdir");
    for n in 0..rounds(40) {
        let (old, new) = (format!("old-{n}"), format!("new-{n}"));
        fs::write(paths[0].join(&old), b"x").expect("write");
        // Twice: from now on the kernel has it, under the shared lock of the directory.
        for _ in 0..2 {
            fs::metadata(paths[1].join(&old)).expect("it is there");
        }
        fs::rename(paths[0].join(&old), paths[0].join(&new)).expect("rename");
        assert_eq!(is_there(fs::metadata(paths[1].join(&old))), Some(false), "STALE: {old} is {new} by now");
        fs::metadata(paths[1].join(&new)).expect("where it went");
    }
}
