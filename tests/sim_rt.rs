//! The simulated LUN on the simulated scheduler: each fault does what its header says, and the same
//! seed does it again.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lunfs::device::sim::*;
use lunfs::device::{BlockDevice, CompareOutcome, DeviceError, Executed as MayBe};
use lunfs::rt::sim::{Simulation, freeze_host, kill_host, seeds, spawn_on, thaw_host};
use lunfs::rt::{HostTag, Instant, sleep, spawn};

const A: HostTag = HostTag(1);
const B: HostTag = HostTag(2);
const MS: Duration = Duration::from_millis(1);
const SEC: Duration = Duration::from_secs(1);

fn lun() -> SimLun {
    SimLun::new(SimLunOptions::default())
}

fn block(number: u64) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[..8].try_into().unwrap())
}

fn read(device: &SimDevice, offset: u64) -> u64 {
    let mut bytes = vec![0; 512];
    device.read(offset, &mut bytes).unwrap();
    number(&bytes)
}

/// Adds one to a counter by compare-and-write, through miscompares; false if the outcome is unknown.
fn increment(device: &SimDevice) -> bool {
    loop {
        let seen = read(device, 0);
        match device.compare_and_write(0, &block(seen), &block(seen + 1)) {
            Ok(CompareOutcome::Swapped) => return true,
            Ok(CompareOutcome::Miscompare) => {}
            Err(error) => {
                assert_eq!(error.executed(), MayBe::Maybe, "{error}");
                return false;
            }
        }
    }
}

fn count_from_four_hosts() -> (u64, CommandCounts) {
    let lun = lun();
    let threads: Vec<_> = (1..=4)
        .map(|host| {
            let device = lun.attach(HostTag(host));
            spawn_on(HostTag(host), "adder", move || {
                for _ in 0..25 {
                    assert!(increment(&device));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    let counts = lun.counts(A);
    (number(&lun.contents(0, 512)), counts)
}

#[test]
fn four_hosts_count_exactly() {
    for seed in seeds(0..20) {
        let (total, counts) = Simulation::new(seed).run(count_from_four_hosts);
        assert_eq!(total, 100, "LUNFS_SIM_SEED={seed}");
        assert_eq!(counts.swapped, 25);
        assert_eq!(counts.reads, counts.swaps());
        assert_eq!(counts.bytes_written, 25 * 512);
    }
}

#[test]
fn the_same_seed_takes_the_same_way() {
    let hash = |seed| Simulation::new(seed).try_run(count_from_four_hosts).unwrap().trace_hash;
    for seed in seeds(0..5) {
        assert_eq!(hash(seed), hash(seed), "LUNFS_SIM_SEED={seed}");
    }
    assert_ne!(hash(0), hash(1));
}

/// Runs one compare-and-write from 0 to 1 that meets `fault`; its result and how long it took.
fn swap_with(lun: &SimLun, fault: Fault) -> (Result<CompareOutcome, DeviceError>, Duration) {
    lun.inject(FaultRule::next_of(fault, A, CommandKind::CompareAndWrite));
    let device = lun.attach(A);
    let start = Instant::now();
    let result = device.compare_and_write(0, &block(0), &block(1));
    (result, start.elapsed())
}

#[test]
fn a_lost_answer_is_executed_and_times_out() {
    Simulation::new(1).run(|| {
        let lun = lun();
        let (result, took) = swap_with(&lun, Fault::LostAnswer);
        assert!(matches!(result, Err(DeviceError::TimedOut { .. })));
        assert!(took >= 2 * SEC && took < 3 * SEC);
        assert_eq!(number(&lun.contents(0, 512)), 1);
        assert_eq!(lun.fault_hits(), (1, 0));
    });
}

#[test]
fn a_late_command_executes_after_its_host_gave_up() {
    Simulation::new(1).run(|| {
        let lun = lun();
        let (result, _) = swap_with(&lun, Fault::Late(10 * SEC));
        assert!(matches!(result, Err(DeviceError::TimedOut { .. })));
        assert_eq!((number(&lun.contents(0, 512)), lun.in_flight()), (0, 1));
        sleep(9 * SEC);
        assert_eq!((number(&lun.contents(0, 512)), lun.in_flight()), (1, 0));
    });
}

#[test]
fn a_command_lost_on_its_way_never_executes() {
    Simulation::new(1).run(|| {
        let lun = lun();
        let (result, _) = swap_with(&lun, Fault::NeverExecuted);
        assert_eq!(result.unwrap_err().executed(), MayBe::Maybe);
        sleep(60 * SEC);
        assert_eq!(number(&lun.contents(0, 512)), 0);
        let (result, _) = swap_with(&lun, Fault::Refused);
        assert_eq!(result.unwrap_err().executed(), MayBe::No);
        assert_eq!(lun.counts(A).failed, 1);
    });
}

#[test]
fn a_command_executed_twice_can_undo_a_later_one() {
    Simulation::new(1).run(|| {
        let lun = lun();
        let device = lun.attach(A);
        lun.inject(FaultRule::next_of(Fault::Twice(SEC), A, CommandKind::Write));
        device.write(0, &block(7)).unwrap();
        device.write(0, &block(8)).unwrap();
        assert_eq!(read(&device, 0), 8);
        sleep(2 * SEC);
        assert_eq!(read(&device, 0), 7);
    });
}

#[test]
fn a_swap_retried_below_the_host_miscompares_with_its_own_image() {
    Simulation::new(1).run(|| {
        let lun = lun();
        let (result, _) = swap_with(&lun, Fault::RetriedBelow(100 * MS));
        assert_eq!(result.unwrap(), CompareOutcome::Miscompare);
        assert_eq!(number(&lun.contents(0, 512)), 1);
        assert_eq!(lun.counts(A).swaps(), 1);
    });
}

#[test]
fn an_io_error_leaves_a_write_out_in_or_torn() {
    let mut seen = [false; 3];
    for seed in 0..60 {
        let changed = Simulation::new(seed).run(|| {
            let lun = lun();
            let device = lun.attach(A);
            lun.inject(FaultRule::next(Fault::IoError));
            let error = device.write(4096, &[9; 4096]).unwrap_err();
            assert_eq!(error.executed(), MayBe::Maybe);
            let bytes = lun.contents(4096, 4096);
            for sector in bytes.chunks(512) {
                assert!(sector.iter().all(|b| *b == sector[0]));
            }
            bytes.iter().filter(|b| **b == 9).count()
        });
        seen[match changed {
            0 => 0,
            4096 => 1,
            _ => 2,
        }] = true;
    }
    assert_eq!(seen, [true; 3]);
}

#[test]
fn flushed_writes_survive_a_power_cut_and_others_may_not() {
    let mut kept = [0; 3];
    for seed in 0..100 {
        let value = Simulation::new(seed).run(|| {
            let lun = lun();
            let device = lun.attach(A);
            device.write(0, &block(1)).unwrap();
            let lock = device.compare_and_write(512, &block(0), &block(1)).unwrap();
            assert_eq!(lock, CompareOutcome::Swapped);
            device.flush().unwrap();
            assert_eq!(lun.unflushed_blocks(), 0);
            device.write(0, &block(2)).unwrap();
            device.write(0, &block(3)).unwrap();
            device.compare_and_write(512, &block(1), &block(2)).unwrap();
            assert_eq!(lun.unflushed_blocks(), 2);
            assert_eq!(device.resets(), 0);
            lun.power_cut(Keep::Random);
            let plain = read(&device, 0);
            assert_eq!(device.resets(), 1);
            assert!((1..=3).contains(&plain));
            (plain, read(&device, 512))
        });
        kept[value.0 as usize - 1] += 1;
        assert!(value.1 == 1 || value.1 == 2);
    }
    assert!(kept.iter().all(|times| *times > 5), "{kept:?}");
    let unflushed = |keep| {
        Simulation::new(1).run(move || {
            let lun = lun();
            let device = lun.attach(A);
            device.compare_and_write(0, &block(0), &block(1)).unwrap();
            lun.power_cut(keep);
            // The unit attention: refused, and certainly not executed.
            let error = device.compare_and_write(512, &block(0), &block(1)).unwrap_err();
            assert_eq!(error.executed(), MayBe::No);
            read(&device, 0)
        })
    };
    assert_eq!(unflushed(Keep::Nothing), 0, "a swapped lock goes back in time");
    assert_eq!(unflushed(Keep::Everything), 1);
}

#[test]
fn a_flush_covers_only_what_executed_before_it_was_issued() {
    Simulation::new(1).run(|| {
        let mut options = SimLunOptions::default();
        options.latency.flush = (SEC, SEC);
        let lun = SimLun::new(options);
        let device = lun.attach(A);
        device.write(0, &block(1)).unwrap();
        let theirs = device.clone();
        let flush = spawn("flusher", move || theirs.flush());
        sleep(100 * MS);
        device.write(0, &block(2)).unwrap();
        flush.join().unwrap().unwrap();
        lun.power_cut(Keep::Nothing);
        assert_eq!(read(&device, 0), 1);
    });
}

#[test]
fn without_a_volatile_cache_nothing_answered_is_lost() {
    for seed in seeds(0..20) {
        Simulation::new(seed).run(|| {
            let lun = SimLun::new(SimLunOptions { volatile_cache: false, ..SimLunOptions::default() });
            let device = lun.attach(A);
            device.write(0, &block(1)).unwrap();
            let theirs = device.clone();
            let writer = spawn("writer", move || theirs.write(8192, &[5; 8192]));
            sleep(Duration::from_micros(60));
            lun.power_cut(Keep::Nothing);
            assert_eq!(read(&device, 0), 1);
            match writer.join().unwrap() {
                Ok(()) => assert_eq!(lun.contents(8192, 8192), [5; 8192]),
                Err(error) => assert_eq!(error.executed(), MayBe::Maybe),
            }
        });
    }
}

#[test]
fn a_fenced_host_changes_nothing_more() {
    Simulation::new(1).run(|| {
        let lun = lun();
        let (a, b) = (lun.attach(A), lun.attach(B));
        lun.inject(FaultRule::next_of(Fault::Late(SEC), A, CommandKind::Write));
        let theirs = a.clone();
        let late = spawn_on(A, "late writer", move || theirs.write(0, &block(1)));
        sleep(100 * MS);
        lun.fence(A);
        let error = late.join().unwrap().unwrap_err();
        assert!(matches!(error, DeviceError::Fenced { .. }), "{error}");
        assert!(matches!(a.read(0, &mut [0; 512]), Err(DeviceError::Fenced { .. })));
        b.write(0, &block(2)).unwrap();
        lun.unfence(A);
        assert_eq!(read(&a, 0), 2);
    });
}

#[test]
fn a_killed_hosts_commands_land_or_not_and_only_long_ones_tear() {
    let mut long = [0; 3];
    let mut short = [0; 2];
    for seed in 0..120 {
        let (first, second) = Simulation::new(seed).run(|| {
            let lun = lun();
            let (a, again) = (lun.attach(A), lun.attach(A));
            spawn_on(A, "writer", move || a.write(4096, &[9; 8192]));
            spawn_on(A, "swapper", move || again.compare_and_write(0, &block(0), &block(1)));
            sleep(Duration::from_micros(10));
            kill_host(A);
            sleep(SEC);
            let landed = lun.contents(4096, 8192).iter().filter(|b| **b == 9).count();
            (landed, number(&lun.contents(0, 512)))
        });
        assert_eq!(first % 512, 0);
        long[match first {
            0 => 0,
            8192 => 1,
            _ => 2,
        }] += 1;
        short[second as usize] += 1;
    }
    assert!(
        long.iter().all(|times| *times > 10) && short.iter().all(|times| *times > 10),
        "{long:?} {short:?}"
    );
}

#[test]
fn a_frozen_hosts_write_lands_while_it_sleeps() {
    Simulation::new(4).run(|| {
        let lun = lun();
        let device = lun.attach(A);
        lun.inject(FaultRule::next_of(Fault::Late(SEC), A, CommandKind::Write));
        let writer = spawn_on(A, "writer", move || {
            let start = Instant::now();
            device.write(0, &block(1)).unwrap();
            start.elapsed()
        });
        sleep(100 * MS);
        freeze_host(A);
        sleep(20 * SEC);
        assert_eq!(number(&lun.contents(0, 512)), 1);
        thaw_host(A);
        assert!(writer.join().unwrap() > 20 * SEC);
    });
}

#[test]
fn a_partition_hangs_or_fails_and_may_let_go_late() {
    let mut landed_late = 0;
    for seed in 0..40 {
        landed_late += Simulation::new(seed).run(|| {
            let lun = lun();
            let (a, b) = (lun.attach(A), lun.attach(B));
            lun.partition(A, Partition::Fail);
            assert_eq!(a.write(0, &block(1)).unwrap_err().executed(), MayBe::No);
            lun.partition(A, Partition::Hang);
            let error = a.write(0, &block(1)).unwrap_err();
            assert!(matches!(error, DeviceError::TimedOut { .. }));
            b.write(0, &block(2)).unwrap();
            assert_eq!(a.resets(), 0);
            lun.heal(A);
            assert_eq!(a.flush().ok().map(|()| a.resets()), Some(1), "the session is a new one");
            assert_eq!(a.compare_and_write(512, &block(0), &block(1)).unwrap_err().executed(), MayBe::No);
            a.compare_and_write(512, &block(0), &block(1)).unwrap();
            sleep(SEC);
            2 - number(&lun.contents(0, 512))
        });
    }
    assert!((1..40).contains(&landed_late), "{landed_late}");
}

#[test]
fn ranges_are_checked_and_space_reads_as_promised() {
    Simulation::new(1).run(|| {
        let lun = SimLun::new(SimLunOptions { size_bytes: 64 << 40, ..SimLunOptions::default() });
        let device = lun.attach(A);
        for (offset, len) in [(1, 512), (0, 511), (64 << 40, 512), (u64::MAX - 511, 512)] {
            let result = device.read(offset, &mut vec![0; len]);
            assert!(matches!(result, Err(DeviceError::BadRange { .. })));
        }
        assert!(device.compare_and_write(0, &[0; 1024], &[0; 1024]).is_err());
        let far = (64 << 40) - 4096;
        device.write(far, &[1; 4096]).unwrap();
        assert_eq!(lun.contents(far - 512, 1024)[510..514], [0, 0, 1, 1]);
        device.discard(0, 64 << 40).unwrap();
        assert_eq!(lun.contents(far, 2), [DISCARDED; 2]);
        device.write_zeroes(0, 64 << 40).unwrap();
        assert_eq!(lun.contents(far, 2), [0; 2]);
        let before = lun.snapshot();
        device.write(0, &block(5)).unwrap();
        lun.restore(&before);
        assert_eq!(read(&device, 0), 0);
        lun.overwrite(3, &[7]);
        lun.power_cut(Keep::Nothing);
        assert_eq!(lun.contents(2, 3), [0, 7, 0]);
    });
}

struct Judge {
    seen: Mutex<Vec<(HostTag, CommandKind, u64, u64)>>,
    forbidden: u64,
}

impl LunObserver for Judge {
    fn executed(&self, command: &Executed<'_>) {
        assert!(command.executed >= command.issued);
        if command.kind == CommandKind::Write {
            let after = number(command.after);
            assert_ne!(after, self.forbidden, "{} writes what it must not", command.host);
            self.seen.lock().unwrap().push((command.host, command.kind, number(command.before), after));
        }
    }
}

#[test]
fn an_observer_sees_every_execution_and_can_fail_the_run() {
    let judge = Arc::new(Judge { seen: Mutex::new(Vec::new()), forbidden: 13 });
    let theirs = judge.clone();
    let failure = Simulation::new(6)
        .try_run(move || {
            let lun = lun();
            lun.set_observer(theirs);
            let (a, b) = (lun.attach(A), lun.attach(B));
            a.write(0, &block(1)).unwrap();
            b.write(0, &block(2)).unwrap();
            b.write(0, &block(13)).unwrap();
        })
        .unwrap_err();
    let expected = [(A, CommandKind::Write, 0, 1), (B, CommandKind::Write, 1, 2)];
    assert_eq!(*judge.seen.lock().unwrap(), expected);
    let text = failure.to_string();
    for part in
        ["host 2 writes what it must not", "LUNFS_SIM_SEED=6", "last commands", "host 1 write 0x0+0x200"]
    {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
}

#[test]
fn random_faults_never_break_the_counters_bounds() {
    for seed in seeds(0..30) {
        Simulation::new(seed).run(|| {
            let lun = lun();
            lun.set_faults(FaultPlan::unknown_outcomes(0.02, 3 * SEC));
            let sure = Arc::new(AtomicU64::new(0));
            let unknown = Arc::new(AtomicU64::new(0));
            let threads: Vec<_> = (1..=4)
                .map(|host| {
                    let (lun, sure, unknown) = (lun.clone(), sure.clone(), unknown.clone());
                    spawn_on(HostTag(host), "adder", move || {
                        let device = lun.attach(HostTag(host));
                        for _ in 0..30 {
                            let seen = loop {
                                let mut bytes = vec![0; 512];
                                if device.read(0, &mut bytes).is_ok() {
                                    break number(&bytes);
                                }
                            };
                            match device.compare_and_write(0, &block(seen), &block(seen + 1)) {
                                Ok(CompareOutcome::Swapped) => sure.fetch_add(1, SeqCst),
                                _ => unknown.fetch_add(1, SeqCst),
                            };
                        }
                    })
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            sleep(10 * SEC);
            let total = number(&lun.contents(0, 512));
            let (sure, unknown) = (sure.load(SeqCst), unknown.load(SeqCst));
            assert!(total >= sure && total <= sure + unknown, "{sure} {total} {unknown}");
        });
    }
}

#[test]
fn a_queue_depth_holds_commands_back() {
    Simulation::new(1).run(|| {
        let mut options = SimLunOptions { queue_depth: Some(1), ..SimLunOptions::default() };
        options.latency.read = (10 * MS, 10 * MS);
        let lun = SimLun::new(options);
        let device = lun.attach(A);
        let start = Instant::now();
        let threads: Vec<_> = (0..5)
            .map(|_| {
                let device = device.clone();
                spawn("reader", move || read(&device, 0))
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert!(start.elapsed() >= 50 * MS);
    });
}

#[test]
fn plain_threads_can_use_the_lun_too() {
    let lun = lun();
    let threads: Vec<_> = (1..=4)
        .map(|host| {
            let device = lun.attach(HostTag(host));
            std::thread::spawn(move || (0..100).for_each(|_| assert!(increment(&device))))
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(number(&lun.contents(0, 512)), 400);
    let (a, b) = (HostTag(1), HostTag(2));
    lun.inject(FaultRule::next_of(Fault::LostAnswer, a, CommandKind::Write));
    assert!(matches!(lun.attach(a).write(512, &block(1)), Err(DeviceError::TimedOut { .. })));
    assert_eq!(read(&lun.attach(b), 512), 1);
    lun.partition(a, Partition::Hang);
    assert!(lun.attach(a).write(512, &block(2)).is_err());
    lun.heal(a);
}

/// Prints how many commands a real second simulates:
/// `cargo test --release --test sim_rt command_rate -- --ignored --nocapture`.
#[test]
#[ignore = "measures the simulated LUN's speed and asserts nothing; run it by hand"]
fn command_rate() {
    let start = std::time::Instant::now();
    let total = Simulation::new(1).run(|| {
        let lun = lun();
        let threads: Vec<_> = (1..=8)
            .map(|host| {
                let device = lun.attach(HostTag(host));
                spawn_on(HostTag(host), "writer", move || {
                    for i in 0..20_000u64 {
                        device.write((i % 1000) * 4096, &[1; 4096]).unwrap();
                        if i % 50 == 0 {
                            device.flush().unwrap();
                        }
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        lun.total_counts().total()
    });
    let rate = total as f64 / start.elapsed().as_secs_f64();
    println!("{total} commands, {rate:.0} a second");
}
