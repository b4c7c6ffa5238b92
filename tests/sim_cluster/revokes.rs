//! Metadata blocks that become file data while the journal still holds their old images: replay must not bring
//! those back.

use lunfs::fs::api::{FsError, Operations, SetAttributes};
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, cx};
use lunfs::types::InodeNo;

use super::crash::hasty;
use super::model::LONG;
use super::recovery::settled;

/// What gave the blocks back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Freed {
    DirectoryBlocks,
    ExtentNodes,
}

/// Bytes of block `n` of the file that takes the blocks over.
pub fn filling(n: u64) -> Vec<u8> {
    format!("data of block {n}; ").into_bytes().into_iter().cycle().take(4096).collect()
}

/// A directory of so many long names that it needs blocks.
fn make_directory(fs: &dyn Operations) {
    let dir = fs.mkdir(&cx(), fs.root(), b"crowded", 0o755).unwrap().value.ino;
    let file = fs.mknod(&cx(), dir, b"one", 0o644, 0).unwrap().value.ino;
    for n in 0..60 {
        fs.link(&cx(), file, dir, format!("{n:0>200}").as_bytes()).map(drop).unwrap();
    }
}

fn remove_directory(fs: &dyn Operations) {
    let dir = fs.lookup(&cx(), fs.root(), b"crowded").unwrap().value.ino;
    for n in 0..60 {
        fs.unlink(&cx(), dir, format!("{n:0>200}").as_bytes()).map(drop).unwrap();
    }
    fs.unlink(&cx(), dir, b"one").map(drop).unwrap();
    fs.rmdir(&cx(), fs.root(), b"crowded").map(drop).unwrap();
}

/// A file of so many extents that they need blocks.
fn make_holes(fs: &dyn Operations) {
    let ino = fs.mknod(&cx(), fs.root(), b"holes", 0o644, 0).unwrap().value.ino;
    for n in 0..400 {
        fs.write(&cx(), ino, None, n * 8192, &[7; 4096], false).map(drop).unwrap();
    }
}

fn remove_holes(fs: &dyn Operations) {
    let ino = fs.lookup(&cx(), fs.root(), b"holes").unwrap().value.ino;
    let set = SetAttributes { size: Some(0), ..SetAttributes::default() };
    fs.setattr(&cx(), ino, &set).map(drop).unwrap();
}

/// Fills the volume with one file; returns its blocks.
pub fn fill(fs: &dyn Operations, name: &[u8]) -> (InodeNo, u64) {
    let ino = fs.mknod(&cx(), fs.root(), name, 0o644, 0).unwrap().value.ino;
    let mut blocks = 0;
    // Large pieces first: few records in the journal.
    for piece in [128, 16, 1] {
        loop {
            let data: Vec<u8> = (blocks..blocks + piece).flat_map(filling).collect();
            match fs.write(&cx(), ino, None, blocks * 4096, &data, false) {
                Ok(written) => blocks += u64::from(written.value) / 4096,
                Err(FsError::NoSpace) => break,
                Err(e) => panic!("{e}"),
            }
        }
    }
    (ino, blocks)
}

/// The file holds what [`fill`] wrote.
pub fn check(fs: &dyn Operations, ino: InodeNo, blocks: u64) {
    for n in 0..blocks {
        let found = fs.read(&cx(), ino, None, n * 4096, 4096).unwrap().value;
        assert!(found[..] == filling(n)[..], "block {n} of {blocks} has other bytes: {:?}", &found[..24]);
    }
}

/// One host makes metadata blocks and frees them, `filler` makes them data; the first host dies.
fn run(seed: u64, freed: Freed, filler: usize, bug: Option<Bug>) -> Result<u64, Failure> {
    let volume = &hasty()[(seed % 4) as usize];
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let mut cluster = Cluster::start(volume, 2);
        let mut rng = SimRng::new(seed, 60);
        cluster.on(0, |fs| match freed {
            Freed::DirectoryBlocks => make_directory(fs),
            Freed::ExtentNodes => make_holes(fs),
        });
        cluster.on(0, |fs| fs.sync(&cx())).unwrap();
        cluster.on(0, |fs| match freed {
            Freed::DirectoryBlocks => remove_directory(fs),
            Freed::ExtentNodes => remove_holes(fs),
        });
        if rng.chance(0.5) {
            cluster.on(0, |fs| fs.sync(&cx())).unwrap();
        }
        let (ino, blocks) = cluster.on(filler, |fs| {
            let filled = fill(fs, b"data");
            fs.fsync(&cx(), filled.0, false).map(drop).unwrap();
            filled
        });
        cluster.kill(0);
        settled(&cluster);
        cluster.on(0, |fs| check(fs, ino, blocks));
        cluster.finish();
        blocks
    });
    finished.map(|f| f.value)
}

const WAYS: [(Freed, usize); 4] = [
    (Freed::DirectoryBlocks, 0),
    (Freed::ExtentNodes, 0),
    (Freed::DirectoryBlocks, 1),
    (Freed::ExtentNodes, 1),
];

/// Fails unless every way does.
#[cfg(debug_assertions)]
pub fn all_ways(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let found = WAYS.into_iter().filter_map(|(freed, filler)| run(seed, freed, filler, bug).err());
    let mut found: Vec<Failure> = found.collect();
    match found.pop() {
        Some(failure) if found.len() + 1 == WAYS.len() => Err(failure),
        _ => Ok(()),
    }
}

#[test]
fn metadata_that_became_data_stays_data() {
    for seed in seeds(0..4) {
        for (freed, filler) in WAYS {
            let blocks =
                run(seed, freed, filler, None).unwrap_or_else(|e| panic!("{freed:?}, {filler}: {e}"));
            assert!(blocks > 1000, "seed {seed}: the file took only {blocks} blocks of the volume");
        }
    }
}
