//! A host dies after every single one of its commands: what it did is wholly there or wholly absent, and there
//! if it was acknowledged as durable.
//!
//! Each case is one operation in a small scene. It runs, is made durable and put in place; then again from the
//! same seed, and the host dies as its first command executes; and again, and it dies at the second; until it
//! gets to the end. Another host recovers it, lists everything, and must see what the filesystem in memory shows
//! before the operation or after it. In the end the volume is audited.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use lunfs::device::sim::Keep;
use lunfs::fs::api::{Operations, SetAttributes};
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, seeds};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, Formatted, cx};
use lunfs::testing::memfs::MemFs;
use lunfs::testing::model::compare::list_all;
use lunfs::types::{BLOCK_BYTES_U64, InodeNo};

use super::model::of_all_kinds;
use super::points::{cut_of, explained};
use super::recovery::{all_settled, settled};

/// Volumes of all kinds whose hosts are soon found dead, formatted once.
pub fn hasty() -> &'static [Formatted; 4] {
    static VOLUMES: std::sync::OnceLock<[Formatted; 4]> = std::sync::OnceLock::new();
    VOLUMES.get_or_init(|| of_all_kinds(|lun| Formatted::hasty_on(8, lun)))
}

/// What can be seen of one inode under one name: mode, links, size, owner, contents.
type Seen = (u32, u32, u64, u32, Vec<u8>);
/// Everything, by path.
pub type Tree = BTreeMap<String, Seen>;

/// The tree as `fs` shows it.
fn tree(fs: &dyn Operations) -> Tree {
    tree_of(fs, fs.root())
}

/// What lies below a directory.
pub fn tree_of(fs: &dyn Operations, top: InodeNo) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![(String::new(), top)];
    while let Some((path, dir)) = todo.pop() {
        for entry in list_all(fs, dir, 700).unwrap_or_else(|e| panic!("listing \"{path}\": {e}")) {
            if entry.name == b"." || entry.name == b".." {
                continue;
            }
            let path = format!("{path}/{}", String::from_utf8_lossy(&entry.name));
            let a = fs.lookup(&cx(), dir, &entry.name).unwrap_or_else(|e| panic!("\"{path}\": {e}")).value;
            let contents = match a.mode & libc::S_IFMT {
                libc::S_IFREG => fs.read(&cx(), a.ino, None, 0, a.size as u32 + 100).unwrap().value.to_vec(),
                libc::S_IFLNK => fs.readlink(&cx(), a.ino).unwrap().value,
                _ => Vec::new(),
            };
            if a.mode & libc::S_IFMT == libc::S_IFDIR {
                todo.push((path.clone(), a.ino));
            }
            tree.insert(path, (a.mode, a.nlink, a.size, a.uid, contents));
        }
    }
    tree
}

fn at(fs: &dyn Operations, path: &str) -> InodeNo {
    path.split('/').filter(|name| !name.is_empty()).fold(fs.root(), |dir, name| {
        fs.lookup(&cx(), dir, name.as_bytes()).unwrap_or_else(|e| panic!("{path}: {e}")).value.ino
    })
}

fn bytes(first: u8, len: usize) -> Vec<u8> {
    (0..len).map(|i| first.wrapping_add((i / 5) as u8) | 1).collect()
}

fn file(fs: &dyn Operations, dir: InodeNo, name: &[u8], len: usize) -> InodeNo {
    let ino = fs.mknod(&cx(), dir, name, libc::S_IFREG | 0o644, 0).unwrap().value.ino;
    if len > 0 {
        fs.write(&cx(), ino, None, 0, &bytes(len as u8, len), false).map(drop).unwrap();
    }
    ino
}

/// What is there before each operation.
fn scene(fs: &dyn Operations) {
    let root = fs.root();
    let d = fs.mkdir(&cx(), root, b"d", 0o755).unwrap().value.ino;
    let e = fs.mkdir(&cx(), root, b"e", 0o755).unwrap().value.ino;
    let sub = fs.mkdir(&cx(), e, b"sub", 0o755).unwrap().value.ino;
    fs.mkdir(&cx(), e, b"empty", 0o755).map(drop).unwrap();
    file(fs, d, b"small", 40);
    file(fs, d, b"large", 9000);
    file(fs, d, b"over", 5000);
    file(fs, sub, b"deep", 100);
    let sparse = file(fs, d, b"sparse", 4096);
    fs.write(&cx(), sparse, None, 5 * 4096, &bytes(9, 4096), false).map(drop).unwrap();
}

fn size(fs: &dyn Operations, path: &str, size: u64) {
    let set = SetAttributes { size: Some(size), ..SetAttributes::default() };
    fs.setattr(&cx(), at(fs, path), &set).map(drop).unwrap();
}

fn write(fs: &dyn Operations, path: &str, offset: u64, len: usize) {
    let ino = at(fs, path);
    fs.write(&cx(), ino, None, offset, &bytes(77, len), false).map(drop).unwrap();
}

fn allocate(fs: &dyn Operations, path: &str, offset: u64, len: u64, mode: i32) {
    fs.fallocate(&cx(), at(fs, path), None, offset, len, mode).map(drop).unwrap();
}

fn rename(fs: &dyn Operations, from: (&str, &[u8]), to: (&str, &[u8]), flags: u32) {
    fs.rename(&cx(), at(fs, from.0), from.1, at(fs, to.0), to.1, flags).map(drop).unwrap();
}

fn create(fs: &dyn Operations) {
    file(fs, at(fs, "d"), b"new", 0);
}

fn link(fs: &dyn Operations) {
    fs.link(&cx(), at(fs, "d/small"), at(fs, "e"), &[b'n'; 200]).map(drop).unwrap();
}

fn unlink(fs: &dyn Operations) {
    fs.unlink(&cx(), at(fs, "d"), b"small").map(drop).unwrap();
}

fn unnamed_file(fs: &dyn Operations) -> InodeNo {
    let ino = fs.tmpfile(&cx(), at(fs, "d"), 0o640, libc::O_RDWR).unwrap().value.0.ino;
    fs.write(&cx(), ino, None, 0, &bytes(3, 6000), false).map(drop).unwrap();
    ino
}

fn unnamed(fs: &dyn Operations) {
    unnamed_file(fs);
}

/// One operation. What `before` does is durable and in place when it begins.
#[derive(Clone, Copy)]
pub struct Case {
    pub name: &'static str,
    before: fn(&dyn Operations),
    operation: fn(&dyn Operations),
}

const fn case(name: &'static str, operation: fn(&dyn Operations)) -> Case {
    Case { name, before: |_| {}, operation }
}

/// Takes the inodes that the scene left in the groups that are there.
fn use_up_inodes(fs: &dyn Operations) {
    for n in 0..15 {
        file(fs, at(fs, "e"), format!("filler{n}").as_bytes(), 0);
    }
}

/// A directory just before it needs one more block.
fn crowd(fs: &dyn Operations) {
    let (dir, file) = (at(fs, "e"), at(fs, "d/small"));
    for n in 0..17 {
        fs.link(&cx(), file, dir, format!("{n:0>200}").as_bytes()).map(drop).unwrap();
    }
}

pub const CASES: [Case; 31] = [
    case("create", create),
    Case { name: "create with a birth of inodes", before: use_up_inodes, operation: create },
    Case { name: "link that splits a directory", before: crowd, operation: link },
    Case { name: "unlink from a crowded directory", before: crowd, operation: unlink },
    case("mkdir", |fs| fs.mkdir(&cx(), at(fs, "d"), b"new", 0o700).map(drop).unwrap()),
    case("symlink", |fs| fs.symlink(&cx(), at(fs, "d"), b"new", b"somewhere").map(drop).unwrap()),
    case("long symlink", |fs| fs.symlink(&cx(), at(fs, "d"), b"new", &[b'x'; 3000]).map(drop).unwrap()),
    case("link", link),
    case("unlink", unlink),
    case("unlink of a large file", |fs| fs.unlink(&cx(), at(fs, "d"), b"large").map(drop).unwrap()),
    case("unlink of an open file", |fs| {
        fs.open(&cx(), at(fs, "d/large"), libc::O_RDWR).map(drop).unwrap();
        fs.unlink(&cx(), at(fs, "d"), b"large").map(drop).unwrap();
    }),
    case("a file without a name", unnamed),
    case("a name for a file without one", |fs| {
        let ino = unnamed_file(fs);
        fs.link(&cx(), ino, at(fs, "e"), b"named").map(drop).unwrap();
    }),
    case("rmdir", |fs| fs.rmdir(&cx(), at(fs, "e"), b"empty").map(drop).unwrap()),
    case("rename", |fs| rename(fs, ("d", b"small"), ("d", b"renamed"), 0)),
    case("rename to another directory", |fs| rename(fs, ("d", b"large"), ("e", b"moved"), 0)),
    case("rename over a file", |fs| rename(fs, ("d", b"small"), ("d", b"over"), 0)),
    case("rename of a directory over one", |fs| rename(fs, ("e", b"sub"), ("e", b"empty"), 0)),
    case("move of a directory", |fs| rename(fs, ("e", b"sub"), ("d", b"sub"), 0)),
    case("exchange", |fs| rename(fs, ("e", b"sub"), ("d", b"large"), libc::RENAME_EXCHANGE)),
    case("truncate", |fs| size(fs, "d/large", 100)),
    case("truncate to nothing", |fs| size(fs, "d/large", 0)),
    case("grow", |fs| size(fs, "d/large", 30_000)),
    case("grow out of the inode", |fs| size(fs, "d/small", 30_000)),
    case("write to a small file", |fs| write(fs, "d/small", 40, 200)),
    case("write out of the inode", |fs| write(fs, "d/small", 10, 6000)),
    case("append", |fs| write(fs, "d/large", 9000, 9000)),
    case("write into a hole", |fs| write(fs, "d/sparse", 2 * 4096, 8192)),
    case("fallocate", |fs| allocate(fs, "d/large", 8192, 40_000, 0)),
    case("punch", |fs| {
        allocate(fs, "d/large", 4096, 4096, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
    }),
    case("setattr", |fs| {
        let set = SetAttributes { mode: Some(0o600), uid: Some(7), ..SetAttributes::default() };
        fs.setattr(&cx(), at(fs, "d/large"), &set).map(drop).unwrap();
    }),
];

/// What is to be there: before the operation and after it.
fn expected(case: Case) -> [Tree; 2] {
    let mem = MemFs::new();
    scene(&mem);
    (case.before)(&mem);
    let old = tree(&mem);
    (case.operation)(&mem);
    [old, tree(&mem)]
}

/// How far the host came.
#[derive(Default)]
struct Progress {
    durable: AtomicBool,
    ended: AtomicBool,
}

pub fn beats(cluster: &Cluster, host: usize) -> Range<u64> {
    let slot = cluster.hosts[host].volume.heartbeat().record().address.offset_bytes();
    slot..slot + BLOCK_BYTES_U64
}

/// The scene, durable and in place.
fn set_up(cluster: &Cluster, case: Case) {
    cluster.on(0, |fs| {
        scene(fs);
        (case.before)(fs);
        cluster.hosts[0].volume.store().drain().unwrap();
    });
}

/// Does it all on host 0, which may die on the way.
fn work(cluster: &Cluster, case: Case, in_place: bool) -> Arc<Progress> {
    let progress = Arc::new(Progress::default());
    let (noted, volume) = (progress.clone(), cluster.hosts[0].volume.clone());
    let worker = cluster.spawn(0, "worker", move |fs| {
        (case.operation)(&*fs);
        fs.sync(&cx()).unwrap();
        noted.durable.store(true, SeqCst);
        if in_place {
            volume.store().drain().unwrap();
        }
        noted.ended.store(true, SeqCst);
        // A thread that was killed never drops anything.
        volume
    });
    drop(worker.join());
    progress
}

/// Whatever happened: it is the old tree or the new one, and the new one if that was promised.
fn judge(cluster: &Cluster, host: usize, expected: &[Tree; 2], durable: bool) {
    let [old, new] = expected;
    let seen = cluster.on(host, tree);
    if seen == *new || (seen == *old && !durable) {
        return;
    }
    let differs = |than: &Tree| {
        let paths = seen.keys().chain(than.keys()).filter(|path| seen.get(*path) != than.get(*path));
        paths.cloned().collect::<std::collections::BTreeSet<_>>()
    };
    let (old, new) = (differs(old), differs(new));
    panic!("durable: {durable}; not as before the operation: {old:?}, not as after it: {new:?}");
}

/// Which logical blocks of those that were not flushed survive the power cut number `n` of a point.
fn keeps(n: usize) -> Keep {
    match n {
        0 => Keep::Nothing,
        1 => Keep::Everything,
        2 => Keep::Random,
        n if n % 2 == 1 => Keep::AllBut((n - 3) / 2),
        n => Keep::Only((n - 3) / 2),
    }
}

/// Kinds of cuts at a point where so many logical blocks are at risk.
fn cuts(at_risk: usize) -> usize {
    match at_risk {
        0 => 1,
        1 => 2,
        many => 3 + 2 * many,
    }
}

/// Kills host 0 at its command number `k`; cuts the power if asked. Then another host looks. Did the host get to
/// the end, and how many logical blocks were at risk?
fn crash(
    seed: u64,
    case: Case,
    k: u64,
    cut: Option<Keep>,
    volume: &'static Formatted,
    bug: Option<Bug>,
) -> Result<(bool, usize), Failure> {
    let run = move || {
        let expected = expected(case);
        // A host that was up would rightly stop when the LUN goes back in time.
        let mut cluster = Cluster::start(volume, if cut.is_some() { 1 } else { 2 });
        set_up(&cluster, case);
        cluster.wire.arm(HostTag(0), beats(&cluster, 0), k);
        let progress = work(&cluster, case, true);
        cluster.wire.disarm();
        let at_risk = cluster.lun.unflushed_blocks();
        cluster.kill(0);
        if let Some(keep) = cut {
            cluster.lun.power_cut(keep);
            cluster.join(HostTag(1)).unwrap();
        }
        judge(&cluster, 0, &expected, progress.durable.load(SeqCst));
        settled(&cluster);
        cluster.finish();
        (progress.ended.load(SeqCst), at_risk)
    };
    let cut = cut.map_or(String::new(), |keep| format!(", {keep:?}"));
    explained(format!("{}, command {k}{cut}", case.name), seed, bug, run)
}

/// Host 0 dies when its operation is durable and not in place, or at its command number `k`; host 1 recovers it
/// and dies at its command number `j`; host 2 recovers both. Did host 1 get to the end?
fn crash_twice(
    seed: u64,
    case: Case,
    (k, j): (Option<u64>, u64),
    cut: Option<Keep>,
    volume: &'static Formatted,
    bug: Option<Bug>,
) -> Result<bool, Failure> {
    let run = move || {
        let expected = expected(case);
        let mut cluster = Cluster::start(volume, 2);
        set_up(&cluster, case);
        if let Some(k) = k {
            cluster.wire.arm(HostTag(0), beats(&cluster, 0), k);
        }
        let progress = work(&cluster, case, false);
        cluster.wire.arm(HostTag(1), beats(&cluster, 1), j);
        cluster.kill(0);
        while !cluster.wire.tripped() && !all_settled(&cluster) {
            rt::sleep(Duration::from_millis(20));
        }
        let tripped = cluster.wire.disarm();
        cluster.kill(0);
        if let Some(keep) = cut {
            cluster.lun.power_cut(keep);
        }
        cluster.join(HostTag(2)).unwrap();
        judge(&cluster, 0, &expected, progress.durable.load(SeqCst));
        settled(&cluster);
        cluster.finish();
        !tripped
    };
    let cut = cut.map_or(String::new(), |keep| format!(", {keep:?}"));
    explained(format!("{}, command {k:?}, recoverer's command {j}{cut}", case.name), seed, bug, run)
}

/// All points of the recoverer for one case; the number of runs.
pub fn every_point_of_the_recoverer(seed: u64, case: Case, bug: Option<Bug>) -> Result<usize, Failure> {
    let volume = &hasty()[(seed % 4) as usize];
    let mut rng = SimRng::new(seed, 62);
    let k = rng.chance(0.3).then(|| rng.between(1, 3));
    for j in 1.. {
        let cut = cut_of(volume.lun.volatile_cache, &mut rng);
        if crash_twice(seed, case, (k, j), cut, volume, bug)? {
            return Ok(j as usize);
        }
    }
    Ok(0)
}

/// All points of one case; the number of runs. `most`: so many kinds of power cut at each point.
pub fn every_point(seed: u64, case: Case, most: usize, bug: Option<Bug>) -> Result<usize, Failure> {
    let volume = &hasty()[(seed % 4) as usize];
    let (mut runs, mut rng) = (0, SimRng::new(seed, 61));
    for k in 1.. {
        let (ended, _) = crash(seed, case, k, None, volume, bug)?;
        runs += 1;
        if volume.lun.volatile_cache && most > 0 {
            let (_, at_risk) = crash(seed, case, k, Some(Keep::Nothing), volume, bug)?;
            let kinds = cuts(at_risk);
            let chosen: Vec<usize> = match kinds <= most {
                true => (1..kinds).collect(),
                false => (1..most).map(|_| 1 + rng.index(kinds - 1)).collect(),
            };
            for n in &chosen {
                crash(seed, case, k, Some(keeps(*n)), volume, bug)?;
            }
            runs += 1 + chosen.len();
        }
        if ended {
            break;
        }
    }
    Ok(runs)
}

/// Every single block by itself takes long; the seeds beyond the fast set do it where blocks are large.
fn most_cuts(seed: u64) -> usize {
    if seed >= 4 && seed % 4 == 1 { usize::MAX } else { 2 }
}

#[test]
fn every_operation_is_whole_after_a_crash_at_any_command() {
    for seed in seeds(0..4) {
        let runs = CASES
            .map(|case| every_point(seed, case, most_cuts(seed), None).unwrap_or_else(|e| panic!("{e}")));
        println!("seed {seed}: {} runs", runs.iter().sum::<usize>());
    }
}

#[test]
fn every_operation_is_whole_after_a_crash_of_the_recoverer_at_any_command() {
    for seed in seeds(0..4) {
        let runs = CASES
            .map(|case| every_point_of_the_recoverer(seed, case, None).unwrap_or_else(|e| panic!("{e}")));
        println!("seed {seed}: {} runs", runs.iter().sum::<usize>());
    }
}
