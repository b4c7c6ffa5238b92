//! Many at once want the same: exactly one gets it, and nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use lunfs::fs::api::{FsError, Operations};
use lunfs::rt;
use lunfs::rt::sim::{SimRng, seeds};
use lunfs::testing::cluster::{Cluster, cx, joined};
use lunfs::types::InodeNo;

use super::model::{run, variant};

/// Starts `threads` threads on every host; each gets its number over all.
fn everywhere<T: Send + 'static>(
    cluster: &Cluster,
    threads: usize,
    work: impl Fn(&dyn Operations, usize) -> T + Send + Sync + 'static,
) -> Vec<T> {
    let work = Arc::new(work);
    let started: Vec<_> = (0..cluster.hosts.len() * threads)
        .map(|number| {
            let work = work.clone();
            cluster.spawn(number % cluster.hosts.len(), "worker", move |fs| work(&*fs, number))
        })
        .collect();
    started.into_iter().map(joined).collect()
}

fn pause(rng: &mut SimRng) {
    if rng.chance(0.5) {
        rt::sleep(Duration::from_micros(rng.below(3000)));
    }
}

#[test]
fn each_name_is_made_removed_and_moved_by_exactly_one() {
    const NAMES: usize = 12;
    for seed in seeds(0..4) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let won: Arc<[[AtomicU64; 4]; NAMES]> = Arc::new(Default::default());
            for name in 0..NAMES {
                for prefix in ["gone", "moved"] {
                    let name = format!("{prefix}{name}");
                    cluster.on(0, |fs| fs.mknod(&cx(), root, name.as_bytes(), 0o644, 0).map(drop)).unwrap();
                }
            }
            let counts = won.clone();
            everywhere(cluster, 2, move |fs, thread| {
                let mut rng = SimRng::new(seed, thread as u64 + 50);
                for name in 0..NAMES {
                    pause(&mut rng);
                    let excl = libc::O_RDWR | libc::O_EXCL;
                    let outcomes = [
                        fs.create(&cx(), root, format!("new{name}").as_bytes(), 0o644, excl).map(|a| {
                            let (attributes, opened) = a.value;
                            fs.release(attributes.ino, opened.handle);
                        }),
                        fs.unlink(&cx(), root, format!("gone{name}").as_bytes()).map(drop),
                        fs.rename(
                            &cx(),
                            root,
                            format!("moved{name}").as_bytes(),
                            root,
                            format!("there{name}-{thread}").as_bytes(),
                            libc::RENAME_NOREPLACE,
                        )
                        .map(drop),
                        fs.mkdir(&cx(), root, format!("dir{name}").as_bytes(), 0o755).map(drop),
                    ];
                    for (kind, outcome) in outcomes.into_iter().enumerate() {
                        match (kind, outcome) {
                            (_, Ok(())) => drop(counts[name][kind].fetch_add(1, Relaxed)),
                            (0 | 3, Err(FsError::Exists)) | (1 | 2, Err(FsError::NotFound)) => {}
                            (kind, Err(e)) => panic!("kind {kind}: {e}"),
                        }
                    }
                }
            });
            for (name, won) in won.iter().enumerate() {
                let won: Vec<u64> = won.iter().map(|w| w.load(Relaxed)).collect();
                assert_eq!(won, [1; 4], "winners of create, unlink, rename and mkdir of name {name}");
            }
        });
    }
}

#[test]
fn a_counter_under_lock_files_loses_no_update() {
    const EACH: u64 = 6;
    for seed in seeds(0..4) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 4, move |cluster| {
            let root = cluster.root();
            let ino = cluster.on(1, |fs| fs.mknod(&cx(), root, b"counter", 0o644, 0).unwrap().value.ino);
            everywhere(cluster, 1, move |fs, thread| {
                let mut rng = SimRng::new(seed, thread as u64 + 60);
                for _ in 0..EACH {
                    let flags = libc::O_RDWR | libc::O_EXCL;
                    let (attributes, opened) = loop {
                        match fs.create(&cx(), root, b"lock", 0o644, flags) {
                            Ok(answer) => break answer.value,
                            Err(FsError::Exists) => rt::sleep(Duration::from_micros(rng.between(200, 9000))),
                            Err(e) => panic!("{e}"),
                        }
                    };
                    let before = fs.read(&cx(), ino, None, 0, 8).unwrap().value.to_vec();
                    let count = before.try_into().map_or(0, u64::from_le_bytes);
                    fs.write(&cx(), ino, None, 0, &(count + 1).to_le_bytes(), false).unwrap();
                    fs.release(attributes.ino, opened.handle);
                    fs.unlink(&cx(), root, b"lock").map(drop).unwrap();
                }
            });
            let bytes = cluster.on(0, |fs| fs.read(&cx(), ino, None, 0, 8).unwrap().value.to_vec());
            assert_eq!(u64::from_le_bytes(bytes.try_into().unwrap()), 4 * EACH);
        });
    }
}

const RECORD: usize = 61;

fn record(thread: usize, number: usize) -> Vec<u8> {
    let mut bytes = format!("{thread:03}:{number:05}:").into_bytes();
    bytes.resize(RECORD - 1, b'a' + (thread + number) as u8 % 26);
    bytes.push(b'\n');
    bytes
}

fn whole_file(cluster: &Cluster, host: usize, ino: InodeNo) -> Vec<u8> {
    cluster.on(host, |fs| fs.read(&cx(), ino, None, 0, 1 << 20).unwrap().value.to_vec())
}

#[test]
fn appends_of_all_hosts_are_all_there_and_whole() {
    const EACH: usize = 25;
    for seed in seeds(0..4) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let ino = cluster.on(0, |fs| fs.mknod(&cx(), root, b"log", 0o644, 0).unwrap().value.ino);
            everywhere(cluster, 2, move |fs, thread| {
                let opened = fs.open(&cx(), ino, libc::O_WRONLY | libc::O_APPEND).unwrap().value;
                for number in 0..EACH {
                    let written =
                        fs.write(&cx(), ino, Some(opened.handle), 0, &record(thread, number), false);
                    assert_eq!(written.unwrap().value as usize, RECORD);
                }
                fs.release(ino, opened.handle);
            });
            for host in 0..cluster.hosts.len() {
                let bytes = whole_file(cluster, host, ino);
                assert_eq!(bytes.len(), 6 * EACH * RECORD);
                let mut next = [0; 6];
                for found in bytes.chunks(RECORD) {
                    let thread: usize = String::from_utf8_lossy(&found[..3]).parse().unwrap();
                    assert_eq!(found, record(thread, next[thread]), "torn, or out of its thread's order");
                    next[thread] += 1;
                }
            }
        });
    }
}

#[test]
fn appends_in_turn_lie_in_turn() {
    const ROUNDS: usize = 60;
    for seed in seeds(0..3) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 2, move |cluster| {
            let root = cluster.root();
            let ino = cluster.on(0, |fs| fs.mknod(&cx(), root, b"log", 0o644, 0).unwrap().value.ino);
            everywhere(cluster, 1, move |fs, host| {
                loop {
                    // Whose turn it is follows from the size that stat shows.
                    let size = fs.getattr(&cx(), ino).unwrap().value.size as usize;
                    assert_eq!(size % RECORD, 0);
                    let number = size / RECORD;
                    if number >= ROUNDS {
                        return;
                    }
                    if number % 2 == host {
                        fs.write(&cx(), ino, None, 0, &record(host, number), true).map(drop).unwrap();
                    } else {
                        rt::sleep(Duration::from_micros(300));
                    }
                }
            });
            let bytes = whole_file(cluster, 1, ino);
            for (number, found) in bytes.chunks(RECORD).enumerate() {
                assert_eq!(found, record(number % 2, number));
            }
        });
    }
}

#[test]
fn what_a_peer_was_told_is_seen_at_once() {
    const ROUNDS: u64 = 40;
    for seed in seeds(0..4) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let ino = cluster.on(0, |fs| fs.mknod(&cx(), root, b"value", 0o644, 0).unwrap().value.ino);
            cluster.on(0, |fs| fs.write(&cx(), ino, None, 0, &[0; 8], false).map(drop)).unwrap();
            // Told by other means than the disk: what was acknowledged is seen by whoever heard of it.
            let told = Arc::new(AtomicU64::new(0));
            let heard = told.clone();
            let readers: Vec<_> = (1..3)
                .map(|host| {
                    let heard = heard.clone();
                    cluster.spawn(host, "reader", move |fs| {
                        let mut last = 0;
                        while last < ROUNDS {
                            // Time stands still while anybody can run.
                            rt::sleep(Duration::from_micros(100));
                            let told = heard.load(Relaxed);
                            let bytes = fs.read(&cx(), ino, None, 0, 8).unwrap().value.to_vec();
                            let seen = u64::from_le_bytes(bytes.try_into().unwrap());
                            assert!(seen >= told && seen >= last, "told {told}, saw {last}, now {seen}");
                            let name = format!("file{told}");
                            let found = fs.lookup(&cx(), root, name.as_bytes()).map(|a| a.value.size);
                            assert!(
                                told == 0 || matches!(found, Ok(size) if size == told),
                                "{name}: {found:?}"
                            );
                            let gone = fs.lookup(&cx(), root, format!("gone{told}").as_bytes()).map(drop);
                            assert!(
                                told == 0 || matches!(gone, Err(FsError::NotFound)),
                                "gone{told}: {gone:?}"
                            );
                            last = seen;
                        }
                    })
                })
                .collect();
            let writer = cluster.spawn(0, "writer", move |fs| {
                let mut rng = SimRng::new(seed, 70);
                for value in 1..=ROUNDS {
                    let name = format!("file{value}");
                    let gone = format!("gone{value}");
                    let made = fs.mknod(&cx(), root, name.as_bytes(), 0o644, 0).unwrap().value.ino;
                    fs.mkdir(&cx(), root, gone.as_bytes(), 0o755).map(drop).unwrap();
                    fs.write(&cx(), made, None, 0, &vec![1; value as usize], false).map(drop).unwrap();
                    fs.rmdir(&cx(), root, gone.as_bytes()).map(drop).unwrap();
                    fs.write(&cx(), ino, None, 0, &value.to_le_bytes(), false).map(drop).unwrap();
                    told.store(value, Relaxed);
                    pause(&mut rng);
                }
            });
            joined(writer);
            readers.into_iter().for_each(joined);
        });
    }
}
