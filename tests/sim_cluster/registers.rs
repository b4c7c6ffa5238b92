//! A small file of registers, and a directory of two names, used by all hosts: is there one order that explains every
//! answer?

use std::sync::Arc;
use std::time::Duration;

use lunfs::fs::api::{FsError, Operations};
use lunfs::rt;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, seeds};
use lunfs::testing::cluster::{cx, joined};
use lunfs::types::InodeNo;

use super::history::{Call, History, is_linearizable};
use super::model::{run, run_without, variant};

#[derive(Clone, Copy, Debug)]
enum Register {
    Wrote(u64),
    Read(u64),
}

/// What a call makes of a register's value.
fn register(value: &u64, call: &Register) -> Option<u64> {
    match *call {
        Register::Wrote(new) => Some(new),
        Register::Read(seen) => (seen == *value).then_some(seen),
    }
}

#[test]
fn the_checker_knows_a_stale_read() {
    let call = |begun, ended, op| Call {
        begun: Duration::from_millis(begun),
        ended: Duration::from_millis(ended),
        op,
    };
    use Register::*;
    let overlapping = [call(0, 10, Wrote(1)), call(1, 9, Read(0)), call(2, 8, Read(1))];
    assert!(is_linearizable(0, &overlapping, register));
    let stale = [call(0, 1, Wrote(1)), call(2, 3, Read(0))];
    assert!(!is_linearizable(0, &stale, register));
    let back = [call(0, 10, Wrote(1)), call(1, 2, Read(1)), call(3, 4, Read(0))];
    assert!(!is_linearizable(0, &back, register));
}

#[test]
fn reads_and_writes_have_one_order() {
    const REGISTERS: usize = 2;
    for seed in seeds(0..6) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let ino = cluster.on(0, |fs| fs.mknod(&cx(), root, b"registers", 0o644, 0).unwrap().value.ino);
            // In the inode's body, or each in a block of its own.
            let apart = if seed % 2 == 0 { 8 } else { 4096 };
            let size = (REGISTERS as u64 * apart) as usize;
            cluster.on(0, |fs| fs.write(&cx(), ino, None, 0, &vec![0; size], false).map(drop)).unwrap();
            let history: Arc<[History<Register>; REGISTERS]> = Arc::new([History::new(), History::new()]);
            let workers: Vec<_> = (0..6)
                .map(|number: usize| {
                    let history = history.clone();
                    cluster.spawn(number % 3, "user", move |fs| {
                        let mut rng = SimRng::new(seed, number as u64 + 30);
                        for turn in 0..18 {
                            let register = rng.index(REGISTERS);
                            let offset = register as u64 * apart;
                            let wrote = rng.chance(0.4);
                            history[register].call(|| {
                                if wrote {
                                    let value = (number * 100 + turn + 1) as u64;
                                    fs.write(&cx(), ino, None, offset, &value.to_le_bytes(), false).unwrap();
                                    return Register::Wrote(value);
                                }
                                let bytes = fs.read(&cx(), ino, None, offset, 8).unwrap().value.to_vec();
                                Register::Read(u64::from_le_bytes(bytes.try_into().unwrap()))
                            });
                            if rng.chance(0.3) {
                                rt::sleep(Duration::from_micros(rng.below(5000)));
                            }
                        }
                    })
                })
                .collect();
            workers.into_iter().for_each(joined);
            for history in history.iter() {
                let calls = history.calls();
                assert!(is_linearizable(0, &calls, register), "no order explains {calls:#?}");
            }
        });
    }
}

/// A file: its inode and which life of it.
type File = (InodeNo, u32);
/// What is called `a` and what `b`.
type Names = [Option<File>; 2];

#[derive(Clone, Copy, Debug)]
enum Name {
    Created(usize, File),
    /// By a create that wanted it new, or a rename that wanted to replace nothing.
    Exists(usize),
    Found(usize, File),
    Missing(usize),
    Removed(usize),
    /// From the one to the other, over what was there.
    Moved(usize),
    /// A listing of both.
    Listed([Option<InodeNo>; 2]),
}

/// What a call makes of the names.
fn names(state: &Names, call: &Name) -> Option<Names> {
    let mut after = *state;
    let possible = match *call {
        Name::Created(at, file) => after[at].replace(file).is_none(),
        Name::Exists(at) => state[at].is_some(),
        Name::Found(at, file) => state[at] == Some(file),
        Name::Missing(at) => state[at].is_none(),
        Name::Removed(at) => after[at].take().is_some(),
        Name::Moved(from) => {
            after[1 - from] = after[from].take();
            state[from].is_some()
        }
        Name::Listed(seen) => state.map(|file| file.map(|f| f.0)) == seen,
    };
    possible.then_some(after)
}

#[test]
fn the_checker_knows_stale_names() {
    let call = |begun, ended, op| Call {
        begun: Duration::from_millis(begun),
        ended: Duration::from_millis(ended),
        op,
    };
    let file = (InodeNo(7), 1);
    let made = call(0, 1, Name::Created(0, file));
    assert!(is_linearizable([None; 2], &[made, call(0, 5, Name::Missing(0))], names));
    assert!(!is_linearizable([None; 2], &[made, call(2, 3, Name::Missing(0))], names));
    let twice = [made, call(0, 9, Name::Created(0, (InodeNo(8), 1)))];
    assert!(!is_linearizable([None; 2], &twice, names));
    let both = call(3, 4, Name::Listed([Some(InodeNo(7)); 2]));
    assert!(!is_linearizable([None; 2], &[made, call(2, 3, Name::Moved(0)), both], names));
}

fn use_names(fs: &dyn Operations, dir: InodeNo, rng: &mut SimRng) -> Name {
    const CALLED: [&[u8]; 2] = [b"a", b"b"];
    let at = rng.index(2);
    let failed = |at, e| match e {
        FsError::NotFound => Name::Missing(at),
        FsError::Exists => Name::Exists(at),
        e => panic!("{e}"),
    };
    match rng.below(10) {
        0..3 => {
            let made = fs.create(&cx(), dir, CALLED[at], 0o644, libc::O_RDWR | libc::O_EXCL);
            made.map_or_else(
                |e| failed(at, e),
                |a| {
                    let (file, opened) = a.value;
                    fs.release(file.ino, opened.handle);
                    Name::Created(at, (file.ino, file.generation))
                },
            )
        }
        3..6 => {
            let found = fs.lookup(&cx(), dir, CALLED[at]);
            found.map_or_else(|e| failed(at, e), |a| Name::Found(at, (a.value.ino, a.value.generation)))
        }
        6 => fs.unlink(&cx(), dir, CALLED[at]).map_or_else(|e| failed(at, e), |_| Name::Removed(at)),
        7 | 8 => {
            let flags = if rng.chance(0.3) { libc::RENAME_NOREPLACE } else { 0 };
            let moved = fs.rename(&cx(), dir, CALLED[at], dir, CALLED[1 - at], flags);
            match moved.map(drop) {
                Ok(()) => Name::Moved(at),
                Err(FsError::Exists) => Name::Exists(1 - at),
                Err(e) => failed(at, e),
            }
        }
        _ => {
            let listed = fs.readdir(&cx(), dir, 0, 4096, false).unwrap().value;
            let of = |name: &[u8]| listed.iter().find(|e| e.name == name).map(|e| e.ino);
            Name::Listed(CALLED.map(of))
        }
    }
}

/// Creates, lookups, removals, moves and listings of two names.
pub fn names_in_order(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let (formatted, faults) = variant(seed);
    run_without(bug, seed, formatted, faults, 3, move |cluster| {
        let dir = cluster.on(0, |fs| fs.mkdir(&cx(), fs.root(), b"dir", 0o755).unwrap().value.ino);
        let history = History::new();
        let workers: Vec<_> = (0..6)
            .map(|number: usize| {
                let history = history.clone();
                cluster.spawn(number % 3, "user", move |fs| {
                    let mut rng = SimRng::new(seed, number as u64 + 110);
                    for _ in 0..18 {
                        history.call(|| use_names(&*fs, dir, &mut rng));
                        if rng.chance(0.4) {
                            rt::sleep(Duration::from_micros(rng.below(5000)));
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().for_each(joined);
        let calls = history.calls();
        assert!(is_linearizable([None; 2], &calls, names), "no order explains {calls:#?}");
    })
}

#[test]
fn creates_lookups_and_moves_have_one_order() {
    for seed in seeds(0..8) {
        names_in_order(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}
