//! Work that is cut into steps, and a crash at every command of it, with each step durable by itself: truncating,
//! freeing and punching a file in many pieces, filling holes, growing and emptying a directory, and freeing what a dead
//! host had open.
//!
//! Whatever was reached is a state that the filesystem in memory went through, or, where one operation has many
//! steps, every byte is as before it or as after it; nothing is lost, and nothing that was freed is seen again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use lunfs::device::sim::Keep;
use lunfs::fs::api::{Operations, SetAttributes};
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, seeds};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, cx};
use lunfs::testing::memfs::MemFs;
use lunfs::types::InodeNo;

use super::crash::{Tree, beats, hasty, tree_of};
use super::points::{cut_of, explained};
use super::recovery::settled;

const PIECES: u64 = 40;
const BLOCK: u64 = 4096;
const NAMES: usize = 40;

/// Operations one after the other, the last state being that after all of them.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    before: fn(&dyn Operations),
    steps: usize,
    step: fn(&dyn Operations, usize),
    /// One step may be seen half done, byte by byte.
    blends: bool,
    /// What another host does with what it found.
    after: fn(&dyn Operations),
}

fn at(fs: &dyn Operations, name: &[u8]) -> InodeNo {
    fs.lookup(&cx(), fs.root(), name).unwrap().value.ino
}

fn make(fs: &dyn Operations, dir: InodeNo, name: &[u8]) -> InodeNo {
    fs.mknod(&cx(), dir, name, libc::S_IFREG | 0o644, 0).unwrap().value.ino
}

/// A file in many pieces with holes between them.
fn pieces(fs: &dyn Operations) {
    let ino = make(fs, fs.root(), b"pieces");
    for n in 0..PIECES {
        let data = [n as u8 + 1; BLOCK as usize];
        fs.write(&cx(), ino, None, n * 2 * BLOCK, &data, false).map(drop).unwrap();
    }
}

fn set_size(fs: &dyn Operations, ino: InodeNo, size: u64) {
    let set = SetAttributes { size: Some(size), ..SetAttributes::default() };
    fs.setattr(&cx(), ino, &set).map(drop).unwrap();
}

fn allocate(fs: &dyn Operations, offset: u64, len: u64, mode: i32) {
    fs.fallocate(&cx(), at(fs, b"pieces"), None, offset, len, mode).map(drop).unwrap();
}

fn long_name(n: usize) -> Vec<u8> {
    format!("{n:0>200}").into_bytes()
}

fn directory(fs: &dyn Operations) {
    let dir = fs.mkdir(&cx(), fs.root(), b"dir", 0o755).unwrap().value.ino;
    make(fs, dir, b"one");
}

fn enter(fs: &dyn Operations, n: usize) {
    let dir = at(fs, b"dir");
    let one = fs.lookup(&cx(), dir, b"one").unwrap().value.ino;
    fs.link(&cx(), one, dir, &long_name(n)).map(drop).unwrap();
}

fn full_directory(fs: &dyn Operations) {
    directory(fs);
    (0..NAMES).for_each(|n| enter(fs, n));
}

/// Removes the names, then the directory.
fn empty(fs: &dyn Operations, step: usize) {
    match step {
        n if n < NAMES => fs.unlink(&cx(), at(fs, b"dir"), &long_name(n)).map(drop).unwrap(),
        n if n == NAMES => fs.unlink(&cx(), at(fs, b"dir"), b"one").map(drop).unwrap(),
        _ => fs.rmdir(&cx(), fs.root(), b"dir").map(drop).unwrap(),
    }
}

/// A file that was made shorter and becomes longer again: nothing of what was cut off may be seen.
fn lengthen(fs: &dyn Operations) {
    let ino = at(fs, b"pieces");
    let size = fs.getattr(&cx(), ino).unwrap().value.size;
    if size > 5000 {
        return;
    }
    set_size(fs, ino, PIECES * 2 * BLOCK);
    let bytes = fs.read(&cx(), ino, None, size, (PIECES * 2 * BLOCK) as u32).unwrap().value.to_vec();
    let shown = bytes.iter().position(|b| *b != 0);
    assert_eq!(shown, None, "what was cut off is seen again, {} bytes behind the end", shown.unwrap_or(0));
}

const fn work(name: &'static str, step: fn(&dyn Operations, usize)) -> Work {
    Work { name, before: pieces, steps: 1, step, blends: false, after: |_| {} }
}

const TRUNCATION: Work =
    Work { after: lengthen, ..work("truncate", |fs, _| set_size(fs, at(fs, b"pieces"), 5000)) };

const WORKS: [Work; 7] = [
    TRUNCATION,
    work("unlink", |fs, _| fs.unlink(&cx(), fs.root(), b"pieces").map(drop).unwrap()),
    Work {
        before: |fs| {
            pieces(fs);
            make(fs, fs.root(), b"new");
        },
        ..work("rename over it", |fs, _| {
            fs.rename(&cx(), fs.root(), b"new", fs.root(), b"pieces", 0).map(drop).unwrap();
        })
    },
    Work {
        blends: true,
        ..work("punch", |fs, _| {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            allocate(fs, 100, (PIECES - 1) * 2 * BLOCK, mode);
        })
    },
    work("fallocate", |fs, _| allocate(fs, 0, 20 * BLOCK, libc::FALLOC_FL_KEEP_SIZE)),
    Work { before: directory, steps: NAMES, ..work("a directory that grows", enter) },
    Work { before: full_directory, steps: NAMES + 2, ..work("a directory that is emptied", empty) },
];

fn tree(fs: &dyn Operations) -> Tree {
    tree_of(fs, fs.root())
}

/// What is there before, and after each step.
fn states(work: Work) -> Vec<Tree> {
    let mem = MemFs::new();
    (work.before)(&mem);
    let mut states = vec![tree(&mem)];
    for step in 0..work.steps {
        (work.step)(&mem, step);
        states.push(tree(&mem));
    }
    states
}

/// Is every byte of every file that of one of the two, and all else alike?
fn is_blend(seen: &Tree, a: &Tree, b: &Tree) -> bool {
    seen.len() == a.len()
        && seen.iter().all(|(path, s)| match (a.get(path), b.get(path)) {
            (Some(a), Some(b)) => {
                let pairs = || a.4.iter().zip(&b.4);
                let bytes = s.4.iter().zip(pairs()).all(|(s, (a, b))| s == a || s == b);
                (s.0, s.1, s.2, s.3) == (a.0, a.1, a.2, a.3) && s.4.len() == a.4.len() && bytes
            }
            _ => false,
        })
}

/// What was freed step by step until a host died is freed by others. A thread of a host that goes on.
fn free_orphans(cluster: &Cluster, host: usize) {
    let volume = cluster.hosts[host].volume.clone();
    cluster.on(host, |_| {
        volume.fs().sweep().unwrap();
        for _ in 0..20 {
            if volume.fs().reap().waiting == 0 {
                break;
            }
            rt::sleep(Duration::from_millis(500));
        }
    });
}

/// Host 0 dies at its command number `k`. Did it get to the end?
fn crash(seed: u64, work: Work, k: u64, cut: Option<Keep>, bug: Option<Bug>) -> Result<bool, Failure> {
    let volume = &hasty()[(seed % 4) as usize];
    explained(format!("{}, command {k}, {cut:?}", work.name), seed, bug, move || {
        let states = states(work);
        // A host that was up would rightly stop when the LUN goes back in time.
        let mut cluster = Cluster::start(volume, if cut.is_some() { 1 } else { 2 });
        cluster.on(0, |fs| {
            (work.before)(fs);
            cluster.hosts[0].volume.store().drain().unwrap();
        });
        cluster.hosts[0].volume.store().commit_each_step();
        cluster.wire.arm(HostTag(0), beats(&cluster, 0), k);
        let durable = Arc::new(AtomicUsize::new(0));
        let (noted, store) = (durable.clone(), cluster.hosts[0].volume.store().clone());
        let worker = cluster.spawn(0, "worker", move |fs| {
            for step in 0..work.steps {
                (work.step)(&*fs, step);
                noted.store(step + 1, SeqCst);
            }
            store.drain().unwrap();
            noted.store(usize::MAX, SeqCst);
            // A thread that was killed never drops anything.
            store
        });
        drop(worker.join());
        cluster.wire.disarm();
        cluster.kill(0);
        if let Some(keep) = cut {
            cluster.lun.power_cut(keep);
            cluster.join(HostTag(1)).unwrap();
        }
        let reached = durable.load(SeqCst);
        let (ended, reached) = (reached == usize::MAX, reached.min(work.steps));
        let seen = cluster.on(0, tree);
        let may_be = &states[reached..states.len().min(reached + 2)];
        let blend = work.blends && may_be.len() == 2 && is_blend(&seen, &may_be[0], &may_be[1]);
        if !may_be.contains(&seen) && !blend {
            let was = states.iter().position(|state| *state == seen);
            panic!("of {} steps {reached} were durable; what is there is state {was:?}", work.steps);
        }
        cluster.on(0, |fs| (work.after)(fs));
        settled(&cluster);
        free_orphans(&cluster, 0);
        let report = cluster.finish();
        assert_eq!(report.orphans, 0, "what had no name was not freed");
        ended
    })
}

/// All points of one work; the number of runs.
fn every_point(seed: u64, work: Work, bug: Option<Bug>) -> Result<u64, Failure> {
    let volatile = hasty()[(seed % 4) as usize].lun.volatile_cache;
    let mut rng = SimRng::new(seed, 66);
    for k in 1.. {
        if crash(seed, work, k, cut_of(volatile, &mut rng), bug)? {
            return Ok(k);
        }
    }
    Ok(0)
}

/// For the rules: the truncations alone.
#[cfg(debug_assertions)]
pub fn truncations(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    every_point(seed, TRUNCATION, bug).map(drop)
}

#[test]
fn long_work_is_never_half_done_for_anybody() {
    for seed in seeds(0..2) {
        let runs = WORKS.map(|work| every_point(seed, work, None).unwrap_or_else(|e| panic!("{e}")));
        println!("seed {seed}: {runs:?} runs");
    }
}

/// Host 0 dies with a large file open that has no name; host 1 frees it and dies at its command number `j`; host 2
/// goes on. Did host 1 get to the end?
fn sweeper(seed: u64, j: u64, cut: Option<Keep>) -> Result<bool, Failure> {
    let volume = &hasty()[(seed % 4) as usize];
    explained(format!("command {j} of the sweeper, {cut:?}"), seed, None, move || {
        let mut cluster = Cluster::start(volume, 2);
        cluster.on(0, |fs| {
            pieces(fs);
            fs.open(&cx(), at(fs, b"pieces"), libc::O_RDWR).map(drop).unwrap();
            fs.unlink(&cx(), fs.root(), b"pieces").map(drop).unwrap();
            fs.sync(&cx()).unwrap();
        });
        cluster.kill(0);
        settled(&cluster);
        let volume = cluster.hosts[0].volume.clone();
        volume.store().commit_each_step();
        cluster.wire.arm(HostTag(1), beats(&cluster, 0), j);
        let worker = cluster.spawn(0, "sweeper", move |_| {
            volume.fs().sweep().unwrap();
            while volume.fs().reap().waiting > 0 {
                rt::sleep(Duration::from_millis(500));
            }
            volume.store().drain().unwrap();
            volume
        });
        drop(worker.join());
        let tripped = cluster.wire.disarm();
        cluster.kill(0);
        if let Some(keep) = cut {
            cluster.lun.power_cut(keep);
        }
        cluster.join(HostTag(2)).unwrap();
        settled(&cluster);
        free_orphans(&cluster, 0);
        let report = cluster.finish();
        assert_eq!(report.orphans, 0, "what the dead one had open was not freed");
        !tripped
    })
}

#[test]
fn what_a_dead_host_had_open_is_freed_though_who_frees_it_dies() {
    for seed in seeds(0..2) {
        let volatile = hasty()[(seed % 4) as usize].lun.volatile_cache;
        let mut rng = SimRng::new(seed, 67);
        let ends = |j: &u64| sweeper(seed, *j, cut_of(volatile, &mut rng)).unwrap_or_else(|e| panic!("{e}"));
        let runs = (1..).find(ends);
        println!("seed {seed}: {runs:?} runs");
    }
}
