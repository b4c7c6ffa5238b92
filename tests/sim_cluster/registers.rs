//! A small file of registers, read and written by all hosts: is there one order that explains every answer?

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lunfs::rt;
use lunfs::rt::sim::{self, SimRng, seeds};
use lunfs::testing::cluster::{cx, joined};

use super::model::{run, variant};

/// One call: when it was made and answered, and what it wrote or read.
#[derive(Clone, Copy, Debug)]
struct Call {
    begun: Duration,
    ended: Duration,
    wrote: bool,
    value: u64,
}

/// Is there an order of the calls, each between its begin and its end, in which every read returns the value
/// of the last write before it? (After Wing and Gong, with the states that were tried remembered.)
fn is_linearizable(calls: &[Call]) -> bool {
    assert!(calls.len() <= 128);
    let all = u128::MAX >> (128 - calls.len());
    let mut tried = HashSet::new();
    let mut todo = vec![(0u128, 0u64)];
    while let Some((done, value)) = todo.pop() {
        if done == all {
            return true;
        }
        if !tried.insert((done, value)) {
            continue;
        }
        let open = || calls.iter().enumerate().filter(|(i, _)| done & (1 << i) == 0);
        let first_end = open().map(|(_, c)| c.ended).min().unwrap_or_default();
        for (i, call) in open().filter(|(_, c)| c.begun <= first_end) {
            match call.wrote {
                true => todo.push((done | 1 << i, call.value)),
                false if call.value == value => todo.push((done | 1 << i, value)),
                false => {}
            }
        }
    }
    false
}

#[test]
fn the_checker_knows_a_stale_read() {
    let call = |begun, ended, wrote, value| Call {
        begun: Duration::from_millis(begun),
        ended: Duration::from_millis(ended),
        wrote,
        value,
    };
    let overlapping = [call(0, 10, true, 1), call(1, 9, false, 0), call(2, 8, false, 1)];
    assert!(is_linearizable(&overlapping));
    let stale = [call(0, 1, true, 1), call(2, 3, false, 0)];
    assert!(!is_linearizable(&stale));
    let back = [call(0, 10, true, 1), call(1, 2, false, 1), call(3, 4, false, 0)];
    assert!(!is_linearizable(&back));
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
            let history: Arc<[Mutex<Vec<Call>>; REGISTERS]> = Arc::default();
            let workers: Vec<_> = (0..6)
                .map(|number: usize| {
                    let history = history.clone();
                    cluster.spawn(number % 3, "user", move |fs| {
                        let mut rng = SimRng::new(seed, number as u64 + 30);
                        for turn in 0..18 {
                            let register = rng.index(REGISTERS);
                            let offset = register as u64 * apart;
                            let wrote = rng.chance(0.4);
                            let begun = sim::now().unwrap();
                            let value = if wrote {
                                let value = (number * 100 + turn + 1) as u64;
                                fs.write(&cx(), ino, None, offset, &value.to_le_bytes(), false).unwrap();
                                value
                            } else {
                                let bytes = fs.read(&cx(), ino, None, offset, 8).unwrap().value.to_vec();
                                u64::from_le_bytes(bytes.try_into().unwrap())
                            };
                            let ended = sim::now().unwrap();
                            history[register].lock().unwrap().push(Call { begun, ended, wrote, value });
                            if rng.chance(0.3) {
                                rt::sleep(Duration::from_micros(rng.below(5000)));
                            }
                        }
                    })
                })
                .collect();
            workers.into_iter().for_each(joined);
            for calls in history.iter() {
                let calls = calls.lock().unwrap();
                assert!(is_linearizable(&calls), "no order explains {calls:#?}");
            }
        });
    }
}
