//! A kernel in miniature above a host: it keeps a page of a file and shows it without asking anybody, as the page
//! cache and mappings do. Nobody may see an old state once a new one was acknowledged anywhere.
//!
//! The page comes with the answer to a read, a little after it; a store into a writable mapping makes it dirty without
//! any request, and is written back when the kernel is told to forget. Linux itself is asked by the `multi_host` tests.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lunfs::fs::api::{KernelCaches, Operations};
use lunfs::rt;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, seeds};
use lunfs::testing::cluster::{cx, joined};
use lunfs::types::InodeNo;

use super::model::{run_without, variant};

#[derive(Default)]
struct Page {
    value: Option<u64>,
    dirty: bool,
}

/// What the kernel of one host has of one file.
struct Kernel {
    fs: Arc<dyn Operations>,
    ino: InodeNo,
    page: Mutex<Page>,
}

fn read(fs: &dyn Operations, ino: InodeNo, then: impl FnOnce(u64)) {
    let answer = fs.read(&cx(), ino, None, 0, 8).unwrap();
    then(u64::from_le_bytes(answer.value.to_vec().try_into().unwrap()));
    // Only now may the lock leave.
    drop(answer.hold);
}

fn write(fs: &dyn Operations, ino: InodeNo, value: u64) {
    fs.write(&cx(), ino, None, 0, &value.to_le_bytes(), false).map(drop).unwrap();
}

fn pause(rng: &mut SimRng, most_us: u64) {
    rt::sleep(Duration::from_micros(rng.below(most_us)));
}

impl Kernel {
    /// Held for an instant only.
    fn page(&self) -> MutexGuard<'_, Page> {
        self.page.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The page as a program sees it through its mapping, with a fault if it is not there.
    fn look<T>(&self, rng: &mut SimRng, mut at: impl FnMut(&mut Page, u64) -> T) -> T {
        loop {
            {
                let mut page = self.page();
                if let Some(value) = page.value {
                    return at(&mut page, value);
                }
            }
            read(&*self.fs, self.ino, |value| {
                pause(rng, 1000);
                self.page().value.get_or_insert(value);
            });
        }
    }
}

impl KernelCaches for Kernel {
    fn forget_inode(&self, ino: InodeNo) {
        if ino != self.ino {
            return;
        }
        loop {
            let dirty = {
                let mut page = self.page();
                if !page.dirty {
                    page.value = None;
                    break;
                }
                page.dirty = false;
                page.value
            };
            if let Some(value) = dirty {
                write(&*self.fs, self.ino, value);
            }
        }
        // Who told the kernel learns that it is done a little later; programs have gone on meanwhile.
        rt::sleep(Duration::from_micros(rt::random_u64() % 1500));
    }

    fn forget_names(&self, _: InodeNo) {}
    fn silence(&self) {}
    fn lease_until(&self, _: rt::Instant) {}
}

/// One host maps a file, two others read and write it. `mapped_writable`: the mapping stores and the others read;
/// else the mapping looks and one of the others writes.
fn mapping(seed: u64, mapped_writable: bool, bug: Option<Bug>) -> Result<(), Failure> {
    const ROUNDS: u64 = 60;
    let (formatted, faults) = variant(seed);
    run_without(bug, seed, formatted, faults, 3, move |cluster| {
        let ino = cluster.on(0, |fs| {
            let ino = fs.mknod(&cx(), fs.root(), b"mapped", 0o644, 0).unwrap().value.ino;
            write(fs, ino, 0);
            ino
        });
        let kernel = Arc::new(Kernel { fs: cluster.hosts[0].fs.clone(), ino, page: Mutex::default() });
        cluster.hosts[0].volume.attach_kernel(kernel.clone());
        let flags = if mapped_writable { libc::O_RDWR } else { libc::O_RDONLY };
        let handle = cluster.on(0, |fs| fs.open(&cx(), ino, flags).unwrap().value.handle);
        // What was acknowledged, told to everybody by other means than the disk.
        let told = Arc::new(AtomicU64::new(0));
        let (tell, mapped) = (told.clone(), kernel.clone());
        let program = cluster.spawn(0, "program", move |_| {
            let mut rng = SimRng::new(seed, 90);
            loop {
                let heard = tell.load(SeqCst);
                let next = mapped.look(&mut rng, |page, seen| {
                    assert!(seen >= heard, "a mapping shows {seen}, {heard} was acknowledged");
                    if mapped_writable {
                        (page.value, page.dirty) = (Some(seen + 1), true);
                        tell.store(seen + 1, SeqCst);
                    }
                    seen
                });
                if next >= ROUNDS {
                    return;
                }
                pause(&mut rng, 3000);
            }
        });
        let others: Vec<_> = (1..3)
            .map(|host| {
                let told = told.clone();
                cluster.spawn(host, "other", move |fs| {
                    let mut rng = SimRng::new(seed, 90 + host as u64);
                    loop {
                        let heard = told.load(SeqCst);
                        let mut seen = 0;
                        read(&*fs, ino, |value| seen = value);
                        assert!(seen >= heard, "a read shows {seen}, {heard} was acknowledged");
                        if host == 1 && !mapped_writable {
                            write(&*fs, ino, seen + 1);
                            told.store(seen + 1, SeqCst);
                        }
                        if seen > ROUNDS {
                            return;
                        }
                        pause(&mut rng, 5000);
                    }
                })
            })
            .collect();
        joined(program);
        if mapped_writable {
            // Its last stores.
            cluster.on(0, |fs| {
                kernel.forget_inode(ino);
                write(fs, ino, ROUNDS + 1);
            });
        }
        others.into_iter().for_each(joined);
        cluster.on(0, |fs| fs.release(ino, handle));
    })
}

pub fn mappings(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    mapping(seed, true, bug)?;
    mapping(seed, false, bug)
}

#[test]
fn what_a_mapping_shows_is_never_old() {
    for seed in seeds(0..6) {
        mappings(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}
