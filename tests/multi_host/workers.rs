//! Programs that work on a mount while something happens to its device: one notes what was acknowledged as durable, and
//! the error that ended it; the other must never notice anything.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::harness::errno;

/// A machine that is busy with other tests.
pub const BUSY: Duration = Duration::from_secs(3);

/// What the file with this number holds.
pub fn content(n: usize) -> Vec<u8> {
    format!("file {n} ").bytes().cycle().take([40, 5000, 70_000][n % 3]).collect()
}

/// Writes one file after the other, each with an fsync, until one fails. What was acknowledged is noted.
pub struct Writer {
    pub dir: PathBuf,
    acknowledged: Arc<Mutex<usize>>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Option<(i32, Instant)>>,
}

impl Writer {
    pub fn start(dir: PathBuf) -> Writer {
        fs::create_dir(&dir).expect("mkdir");
        let (acknowledged, stop) = (Arc::new(Mutex::new(0)), Arc::new(AtomicBool::new(false)));
        let (path, count, stopped) = (dir.clone(), acknowledged.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                if stopped.load(SeqCst) {
                    break;
                }
                let write = || {
                    let mut file = File::create(path.join(format!("f{n}")))?;
                    file.write_all(&content(n))?;
                    file.sync_all()
                };
                let written = write();
                if written.is_err() {
                    return Some((errno(written), Instant::now()));
                }
                *count.lock().expect("no panic") = n + 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            None
        });
        Writer { dir, acknowledged, stop, thread }
    }

    /// Files so far.
    pub fn acknowledged(&self) -> usize {
        *self.acknowledged.lock().expect("no panic")
    }

    /// The errno that ended it, and when.
    pub fn failed(self) -> (i32, Instant, usize) {
        let acknowledged = self.acknowledged.clone();
        let (errno, at) = self.thread.join().expect("the writer").expect("an error");
        let acknowledged = *acknowledged.lock().expect("no panic");
        (errno, at, acknowledged)
    }

    /// It never met an error; how many files there are.
    pub fn stopped(self) -> usize {
        self.stop.store(true, SeqCst);
        assert_eq!(self.thread.join().expect("the writer"), None, "an error reached a program");
        *self.acknowledged.lock().expect("no panic")
    }
}

/// So many files are there, each with its content.
pub fn demand_acknowledged(dir: &Path, count: usize) {
    for n in 0..count {
        let bytes =
            fs::read(dir.join(format!("f{n}"))).unwrap_or_else(|e| panic!("acknowledged file {n}: {e}"));
        assert!(bytes == content(n), "acknowledged file {n} has other bytes");
    }
}

/// Works in a directory of its own and must never notice anything.
pub struct Bystander {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl Bystander {
    pub fn start(dir: PathBuf) -> Bystander {
        fs::create_dir(&dir).expect("mkdir");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut slowest, mut n) = (Duration::ZERO, 0u64);
            while !stopped.load(SeqCst) {
                let begun = Instant::now();
                fs::write(dir.join(format!("{}", n % 100)), n.to_string()).expect("the other host works");
                slowest = slowest.max(begun.elapsed());
                n += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            slowest
        });
        Bystander { stop, thread }
    }

    pub fn end(self) {
        self.stop.store(true, SeqCst);
        let slowest = self.thread.join().expect("the other host");
        println!("the other host's slowest operation in its own directory took {slowest:?}");
        assert!(slowest < BUSY, "the other host waited {slowest:?}");
    }
}
