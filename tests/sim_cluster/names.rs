//! Names under change: cycles, listings, reuse; and operations of all kinds at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use lunfs::fs::api::{FsError, Operations, SetAttributes};
use lunfs::rt;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, cx, joined};
use lunfs::testing::model::compare::list_all;
use lunfs::types::InodeNo;

use super::model::{run, run_without, variant};

/// Paths of all directories below `dir`; fails on a circle.
fn directories(fs: &dyn Operations, dir: InodeNo) -> BTreeMap<InodeNo, String> {
    let mut found = BTreeMap::new();
    let mut todo = vec![(dir, String::new())];
    while let Some((dir, path)) = todo.pop() {
        for entry in list_all(fs, dir, 500).unwrap() {
            if entry.kind != 4 || entry.name == b"." || entry.name == b".." {
                continue;
            }
            let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
            let old = found.insert(entry.ino, path.clone());
            assert!(old.is_none(), "{path} is also {old:?}");
            todo.push((entry.ino, path));
        }
    }
    found
}

/// All hosts move the same few directories into each other.
pub fn moves_into_each_other(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let (formatted, faults) = variant(seed);
    run_without(bug, seed, formatted, faults, 3, move |cluster| {
        let root = cluster.root();
        let dirs: Vec<InodeNo> = (0..4)
            .map(|i| {
                let name = format!("d{i}");
                cluster.on(0, |fs| fs.mkdir(&cx(), root, name.as_bytes(), 0o755).unwrap().value.ino)
            })
            .collect();
        let dirs = Arc::new(dirs);
        let movers: Vec<_> = (0..3)
            .map(|host| {
                let dirs = dirs.clone();
                cluster.spawn(host, "mover", move |fs| {
                    let mut rng = SimRng::new(seed, host as u64 + 80);
                    for _ in 0..25 {
                        // Wherever the directory is now, it is to go into another one.
                        let (what, into) = (rng.index(4), rng.index(5));
                        let name = format!("d{what}");
                        let to = dirs.get(into).copied().unwrap_or(root);
                        for from in dirs.iter().copied().chain([root]) {
                            match fs.rename(&cx(), from, name.as_bytes(), to, name.as_bytes(), 0) {
                                Ok(_) | Err(FsError::NotFound | FsError::Invalid | FsError::NotEmpty) => {}
                                Err(e) => panic!("{e}"),
                            }
                        }
                    }
                })
            })
            .collect();
        movers.into_iter().for_each(joined);
        for host in 0..3 {
            let found = cluster.on(host, |fs| directories(fs, root));
            let reached: BTreeSet<InodeNo> = found.keys().copied().collect();
            assert_eq!(reached, dirs.iter().copied().collect(), "reached from the root: {found:?}");
        }
    })
}

#[test]
fn directories_moved_into_each_other_never_make_a_circle() {
    for seed in seeds(0..4) {
        moves_into_each_other(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn a_listing_under_change_shows_what_stays_exactly_once() {
    const STAYING: usize = 120;
    for seed in seeds(0..3) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let dir = cluster.on(0, |fs| fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino);
            cluster.on(0, |fs| {
                for i in 0..STAYING {
                    let name = format!("staying-{i:0>30}");
                    fs.mknod(&cx(), dir, name.as_bytes(), 0o644, 0).map(drop).unwrap();
                }
            });
            let over = Arc::new(AtomicBool::new(false));
            let changers: Vec<_> = (0..2)
                .map(|host| {
                    let over = over.clone();
                    cluster.spawn(host, "changer", move |fs| {
                        let mut rng = SimRng::new(seed, host as u64 + 90);
                        let mut there = BTreeSet::new();
                        while !over.load(Relaxed) {
                            rt::sleep(Duration::from_micros(100));
                            let name = format!("passing-{host}-{}", rng.below(60));
                            if there.remove(&name) {
                                fs.unlink(&cx(), dir, name.as_bytes()).map(drop).unwrap();
                            } else {
                                fs.mknod(&cx(), dir, name.as_bytes(), 0o644, 0).map(drop).unwrap();
                                there.insert(name);
                            }
                        }
                    })
                })
                .collect();
            let lister = cluster.spawn(2, "lister", move |fs| {
                let mut rng = SimRng::new(seed, 99);
                for _ in 0..8 {
                    let listed = list_all(&*fs, dir, rng.between(160, 4000) as usize).unwrap();
                    let names: BTreeSet<_> = listed.iter().map(|e| e.name.clone()).collect();
                    assert_eq!(names.len(), listed.len(), "a name was listed twice");
                    let staying = names.iter().filter(|n| n.starts_with(b"staying")).count();
                    assert_eq!(staying, STAYING, "a name that stays was not listed");
                }
                over.store(true, Relaxed);
            });
            joined(lister);
            changers.into_iter().for_each(joined);
        });
    }
}

#[test]
fn a_name_can_become_something_else_at_once() {
    for seed in seeds(0..4) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let over = Arc::new(AtomicBool::new(false));
            let lookers: Vec<_> = (1..3)
                .map(|host| {
                    let over = over.clone();
                    cluster.spawn(host, "looker", move |fs| {
                        while !over.load(Relaxed) {
                            // Time stands still while anybody can run.
                            rt::sleep(Duration::from_micros(100));
                            let Ok(found) = fs.lookup(&cx(), root, b"name").map(|a| a.value) else {
                                continue;
                            };
                            // Between two calls it may be gone or be something else, but never half of each.
                            let now = match found.mode & libc::S_IFMT {
                                libc::S_IFDIR => fs.readdir(&cx(), found.ino, 0, 500, false).map(|l| {
                                    assert_eq!(l.value.len(), 2);
                                }),
                                libc::S_IFLNK => fs.readlink(&cx(), found.ino).map(|l| {
                                    assert_eq!(l.value, b"target");
                                }),
                                _ => fs.read(&cx(), found.ino, None, 0, 100).map(|r| {
                                    assert!(r.value.is_empty() || r.value[..] == *b"content");
                                }),
                            };
                            let passing = [libc::ESTALE, libc::ENOTDIR, libc::EINVAL, libc::EISDIR];
                            assert!(
                                now.as_ref().err().is_none_or(|e| passing.contains(&e.errno())),
                                "{now:?}"
                            );
                        }
                    })
                })
                .collect();
            let changer = cluster.spawn(0, "changer", move |fs| {
                for _ in 0..20 {
                    let file = fs.mknod(&cx(), root, b"name", 0o644, 0).unwrap().value.ino;
                    fs.write(&cx(), file, None, 0, b"content", false).map(drop).unwrap();
                    fs.unlink(&cx(), root, b"name").map(drop).unwrap();
                    fs.mkdir(&cx(), root, b"name", 0o755).map(drop).unwrap();
                    fs.rmdir(&cx(), root, b"name").map(drop).unwrap();
                    fs.symlink(&cx(), root, b"name", b"target").map(drop).unwrap();
                    fs.unlink(&cx(), root, b"name").map(drop).unwrap();
                }
                over.store(true, Relaxed);
            });
            joined(changer);
            lookers.into_iter().for_each(joined);
        });
    }
}

#[test]
fn an_open_file_without_a_name_stays_until_it_is_closed() {
    for seed in seeds(0..4) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let ino = cluster.on(0, |fs| fs.mknod(&cx(), root, b"file", 0o644, 0).unwrap().value.ino);
            let data = vec![7u8; 30_000];
            cluster.on(0, |fs| fs.write(&cx(), ino, None, 0, &data, false).map(drop)).unwrap();
            let opened = cluster.on(1, |fs| fs.open(&cx(), ino, libc::O_RDONLY).unwrap().value.handle);
            cluster.on(2, |fs| fs.unlink(&cx(), root, b"file").map(drop)).unwrap();
            for i in 0..20 {
                let name = format!("other{i}");
                cluster.on(0, |fs| fs.mknod(&cx(), root, name.as_bytes(), 0o644, 0).map(drop)).unwrap();
            }
            rt::sleep(Duration::from_secs(90));
            let read = cluster.on(1, |fs| fs.read(&cx(), ino, None, 0, 40_000).unwrap().value.to_vec());
            assert!(read == data);
            cluster.on(1, |fs| fs.release(ino, opened));
            rt::sleep(Duration::from_secs(90));
            let gone = cluster.on(1, |fs| fs.getattr(&cx(), ino).map(|a| a.value.nlink));
            assert!(matches!(gone, Err(FsError::Stale)), "a closed file without a name: {gone:?}");
        });
    }
}

/// One thread of a busy host: whatever comes; errors are those that races explain.
fn busy(fs: &dyn Operations, mut rng: SimRng, root: InodeNo, steps: usize) {
    let mut known = vec![root];
    let mut open = Vec::new();
    for _ in 0..steps {
        let dir = known[rng.index(known.len())];
        let name = format!("{:0>1$}", rng.below(12), if rng.chance(0.3) { 150 } else { 3 });
        let name = name.as_bytes();
        let file = known[rng.index(known.len())];
        let outcome = match rng.below(16) {
            0..=2 => fs.create(&cx(), dir, name, 0o644, libc::O_RDWR).map(|a| {
                known.push(a.value.0.ino);
                open.push((a.value.0.ino, a.value.1.handle));
            }),
            3 => fs.mkdir(&cx(), dir, name, 0o755).map(|a| known.push(a.value.ino)),
            4 => fs.unlink(&cx(), dir, name).map(drop),
            5 => fs.rmdir(&cx(), dir, name).map(drop),
            6 | 7 => {
                let to = known[rng.index(known.len())];
                let new = format!("{:03}", rng.below(12));
                let flags = [0, libc::RENAME_EXCHANGE, libc::RENAME_NOREPLACE][rng.index(3)];
                fs.rename(&cx(), dir, name, to, new.as_bytes(), flags).map(drop)
            }
            8 => fs.link(&cx(), file, dir, name).map(drop),
            9 | 10 => {
                let len = rng.between(1, 30_000) as usize;
                fs.write(&cx(), file, None, rng.below(60_000), &vec![5; len], rng.chance(0.3)).map(drop)
            }
            11 => {
                let set = SetAttributes { size: Some(rng.below(50_000)), ..SetAttributes::default() };
                fs.setattr(&cx(), file, &set).map(drop)
            }
            12 => fs.lookup(&cx(), dir, name).map(|a| known.push(a.value.ino)),
            13 => fs.readdir(&cx(), dir, 0, 4000, true).map(drop),
            14 => fs.fallocate(&cx(), file, None, rng.below(50_000), 9000, 3 * rng.below(2) as i32).map(drop),
            _ => fs.read(&cx(), file, None, 0, 30_000).map(drop),
        };
        if let Err(e) = outcome {
            assert!(!matches!(e, FsError::Io(_) | FsError::Fenced), "{e}");
        }
        if open.len() > 3 {
            let (ino, handle) = open.swap_remove(rng.index(open.len()));
            fs.release(ino, handle);
        }
        if known.len() > 12 {
            known.swap_remove(1 + rng.index(known.len() - 1));
        }
    }
    for (ino, handle) in open {
        fs.release(ino, handle);
    }
}

/// Names, kinds, sizes and link counts of everything, with file contents.
fn tree(fs: &dyn Operations, root: InodeNo) -> BTreeMap<String, (InodeNo, u32, u64, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut todo = vec![(root, String::new())];
    while let Some((dir, path)) = todo.pop() {
        for entry in list_all(fs, dir, 3000).unwrap() {
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
            let a = fs.lookup(&cx(), dir, &entry.name).unwrap().value;
            assert_eq!((a.ino, (a.mode >> 12) as u8), (entry.ino, entry.kind), "{path}");
            let content = match a.mode & libc::S_IFMT {
                libc::S_IFREG => fs.read(&cx(), a.ino, None, 0, 200_000).unwrap().value.to_vec(),
                _ => Vec::new(),
            };
            if entry.kind == 4 {
                todo.push((entry.ino, path.clone()));
            }
            found.insert(path, (a.ino, a.mode, a.size, a.nlink, content));
        }
    }
    found
}

#[test]
fn everything_at_once_leaves_one_whole_tree() {
    for seed in seeds(0..8) {
        let (formatted, faults) = variant(seed);
        let hosts = 2 + (seed % 3) as u16;
        run(seed, formatted, faults, hosts, move |cluster: &Cluster| {
            let root = cluster.root();
            let workers: Vec<_> = (0..2 * usize::from(hosts))
                .map(|number| {
                    let rng = SimRng::new(seed, number as u64 + 20);
                    cluster.spawn(number % usize::from(hosts), "busy", move |fs| busy(&*fs, rng, root, 60))
                })
                .collect();
            workers.into_iter().for_each(joined);
            let first = cluster.on(0, |fs| tree(fs, root));
            for host in 1..usize::from(hosts) {
                assert!(cluster.on(host, |fs| tree(fs, root)) == first, "host {host} sees another tree");
            }
        });
    }
}

#[test]
fn the_same_seed_takes_the_same_way() {
    for seed in seeds(0..4) {
        let (formatted, _) = variant(seed);
        let once = || {
            let run = Simulation::new(seed).try_run(move || {
                let cluster = Cluster::start(formatted, 3);
                cluster.unknown_swaps(seed, 30);
                let root = cluster.root();
                let workers: Vec<_> = (0..6)
                    .map(|number| {
                        let rng = SimRng::new(seed, number as u64 + 20);
                        cluster.spawn(number % 3, "busy", move |fs| busy(&*fs, rng, root, 40))
                    })
                    .collect();
                workers.into_iter().for_each(joined);
                cluster.finish();
            });
            run.unwrap_or_else(|failure| panic!("{failure}")).trace_hash
        };
        assert_eq!(once(), once(), "a run of seed {seed} can't be seen again");
    }
}
