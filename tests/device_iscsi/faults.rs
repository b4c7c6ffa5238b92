//! Faults of the target at each kind of command.

use std::time::{Duration, Instant};

use lunfs::device::{BlockDevice, CompareOutcome, DeviceError, Executed};
use lunfs_test_target::{Config, Fault, Kind, Rule, Select, Target};

use super::devices::{counter, handles_count_exactly, increment, read_block};
use super::open;

fn target() -> Target {
    Target::start(Config::memory(64 << 20)).expect("the test target starts")
}

fn rule(target: &Target, kind: Kind, fault: Fault) {
    target.add_rule(Rule::new("it", Select::kind(kind).nth(1), fault));
}

/// A compare-and-write whose answer is lost, held or cut: unknown, in time, and the block says what became of it.
#[test]
fn swaps_without_an_answer_are_unknown_and_the_block_decides() {
    let faults = [
        (Fault::LoseAnswer, true),
        (Fault::Drop, false),
        (Fault::AnswerLate { ms: 2500 }, true),
        (Fault::Cut { executed: true }, true),
        (Fault::Cut { executed: false }, false),
    ];
    for (fault, executed) in faults {
        let target = target();
        let device = open(&target.url(1), false);
        rule(&target, Kind::CompareAndWrite, fault.clone());
        let since = Instant::now();
        let error = device.compare_and_write(512, &[0; 512], &[1; 512]).expect_err("no answer");
        assert_eq!(error.executed(), Executed::Maybe, "{fault:?}: {error}");
        assert!(since.elapsed() < Duration::from_millis(1900), "{fault:?}: {:?}", since.elapsed());
        let block = read_block(&*device, 512);
        assert!(since.elapsed() < Duration::from_millis(3500), "{fault:?}: {:?}", since.elapsed());
        assert_eq!(block[..], [u8::from(executed); 512], "{fault:?}");
        let (old, new) = ([u8::from(executed); 512], [9; 512]);
        assert_eq!(device.compare_and_write(512, &old, &new).unwrap(), CompareOutcome::Swapped, "{fault:?}");
    }
}

/// One that executes after it was given up must be met by the content, not by hope.
#[test]
fn a_late_swap_misses_once_another_has_landed() {
    let target = target();
    let device = open(&target.url(1), false);
    let late =
        Fault::Late { ms: 2000, past_session: true, past_abort: true, past_reservation: true, answer: true };
    rule(&target, Kind::CompareAndWrite, late);
    let error = device.compare_and_write(512, &[0; 512], &[1; 512]).expect_err("no answer");
    assert!(error.may_come_later(), "{error}");
    assert_eq!(read_block(&*device, 512)[..], [0; 512], "not decided");
    assert_eq!(device.compare_and_write(512, &[0; 512], &[2; 512]).unwrap(), CompareOutcome::Swapped);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(read_block(&*device, 512)[..], [2; 512]);
}

#[test]
fn a_unit_attention_or_a_busy_target_is_no_unknown_outcome() {
    let target = target();
    let device = open(&target.url(1), false);
    rule(&target, Kind::CompareAndWrite, Fault::Status { status: 0x08 });
    assert_eq!(device.compare_and_write(512, &[0; 512], &[1; 512]).unwrap(), CompareOutcome::Swapped);
    rule(&target, Kind::CompareAndWrite, Fault::Status { status: 0x28 });
    assert_eq!(device.compare_and_write(512, &[1; 512], &[2; 512]).unwrap(), CompareOutcome::Swapped);
    let resets = device.resets();
    target.raise_attention(1, None, 0x29, 0x00).unwrap();
    let error = device.compare_and_write(512, &[2; 512], &[3; 512]).expect_err("a unit attention");
    assert_eq!(error.executed(), Executed::No, "{error}");
    assert!(device.resets() > resets);
    assert_eq!(device.compare_and_write(512, &[2; 512], &[3; 512]).unwrap(), CompareOutcome::Swapped);
    // Other commands go on by themselves.
    target.raise_attention(1, None, 0x3F, 0x0E).unwrap();
    device.write(1024, &[5; 512]).unwrap();
    assert_eq!(read_block(&*device, 1024)[..], [5; 512]);
}

/// Reads and plain writes survive what passes: the caller sees a delay, or that the outcome is not known.
#[test]
fn reads_and_writes_go_on_after_a_cut() {
    for fault in [Fault::Cut { executed: true }, Fault::Cut { executed: false }] {
        let target = target();
        let device = open(&target.url(1), false);
        let resets = device.resets();
        rule(&target, Kind::Write, fault.clone());
        device.write(4096, &[3; 65536]).unwrap();
        rule(&target, Kind::Read, fault.clone());
        let mut buf = vec![0; 65536];
        device.read(4096, &mut buf).unwrap();
        assert!(buf.iter().all(|b| *b == 3), "{fault:?}");
        assert!(device.resets() > resets, "a new session counts");
        rule(&target, Kind::Flush, fault);
        device.flush().unwrap();
    }
}

/// A write without an answer is given up in time, and can't come later once the next one was answered.
#[test]
fn a_write_without_an_answer_times_out_and_is_dead_after_the_next_login() {
    let target = target();
    let device = open(&target.url(1), false);
    let late = Fault::Late {
        ms: 20_000,
        past_session: false,
        past_abort: false,
        past_reservation: false,
        answer: true,
    };
    rule(&target, Kind::Write, late);
    let since = Instant::now();
    let error = device.write(4096, &[1; 4096]).expect_err("no answer");
    assert!(matches!(error, DeviceError::TimedOut { .. }), "{error}");
    assert!(since.elapsed() < Duration::from_secs(8), "{:?}", since.elapsed());
    device.write(4096, &[2; 4096]).unwrap();
    std::thread::sleep(Duration::from_secs(16));
    assert_eq!(read_block(&*device, 4096)[..], [2; 512]);
}

/// 4 handles count one block up while answers are lost, held, cut, told twice and told wrong.
#[test]
fn nothing_is_lost_under_random_faults() {
    let target = target();
    let faults = [
        Fault::LoseAnswer,
        Fault::Drop,
        Fault::AnswerLate { ms: 30 },
        Fault::Late { ms: 1500, past_session: true, past_abort: true, past_reservation: true, answer: true },
        Fault::Twice { gap_ms: 3, answer: lunfs_test_target::Which::Second },
        Fault::Miscompare { executed: true, information: None },
        Fault::Miscompare { executed: false, information: None },
        Fault::Attention { asc: 0x29, ascq: 0 },
        Fault::Status { status: 0x28 },
        Fault::Check { key: 0xB, asc: 0, ascq: 0, executed: true, only_blocks: None },
        Fault::Check { key: 0, asc: 0, ascq: 0, executed: false, only_blocks: None },
        Fault::Cut { executed: true },
        Fault::Cut { executed: false },
    ];
    for (n, fault) in faults.into_iter().enumerate() {
        let select = Select::kind(Kind::CompareAndWrite).probability(0.001, n as u64 + 1);
        target.add_rule(Rule::new(&format!("fault {n}"), select, fault));
    }
    let tally = handles_count_exactly(&|| open(&target.url(1), false), 4, 1, 2500);
    eprintln!("{tally:?}");
    assert!(tally.unknown > 10 && tally.refused > 0, "{tally:?}");
}

/// A target whose LUN is a file, so that it can end and come back, at the same place.
fn on_file(path: &std::path::Path, portal: Option<std::net::SocketAddr>) -> Target {
    let mut config = Config::of(lunfs_test_target::LunConfig::new(1, 64 << 20).file(path));
    if let Some(portal) = portal {
        config.listen = portal;
    }
    Target::start(config).expect("the test target starts")
}

/// The target ends and comes back, with what it had.
#[test]
fn a_target_that_comes_back_is_used_again() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let start = |portal| on_file(file.path(), portal);
    let first = start(None);
    let (portal, url) = (first.portal(), first.url(1));
    let device = open(&url, false);
    increment(&*device, 512, 10, 1);
    device.write(8192, &[7; 4096]).unwrap();
    drop(first);
    let error = device.compare_and_write(0, &[0; 512], &[1; 512]).expect_err("nobody there");
    assert!(matches!(error, DeviceError::Io { .. }), "{error}");
    let reading = {
        let device = device.clone();
        std::thread::spawn(move || read_block(&*device, 8192))
    };
    std::thread::sleep(Duration::from_millis(700));
    let _second = start(Some(portal));
    assert_eq!(reading.join().unwrap()[..], [7; 512]);
    increment(&*device, 512, 10, 1);
    assert_eq!(counter(&read_block(&*device, 512)), 20);
    assert!(device.resets() > 0);
}

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let since = Instant::now();
    while !there() {
        assert!(since.elapsed() < Duration::from_secs(10), "{what}: not within 10 s");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The error of a change, and that it was not waited for longer than for its moment to be sent.
fn refused(change: impl FnOnce() -> Result<(), DeviceError>) -> DeviceError {
    let since = Instant::now();
    let error = change().expect_err("nobody answers");
    assert!(since.elapsed() < Duration::from_millis(4500), "{error}: {:?}", since.elapsed());
    error
}

/// While there is no session at all nothing of a change leaves: nobody has to wait until it can't come any more.
#[test]
fn a_change_that_never_left_can_be_made_again_at_once() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let first = on_file(file.path(), None);
    let (portal, device) = (first.portal(), open(&first.url(1), false));
    device.write(4096, &[1; 8192]).unwrap();
    drop(first);
    // Each of the two sessions counts its end.
    wait_until("the end of the sessions", || device.resets() >= 2);
    let device: &dyn BlockDevice = &*device;
    let changes: [&(dyn Fn() -> Result<(), DeviceError> + Sync); 3] =
        [&|| device.write(4096, &[2; 4096]), &|| device.discard(8192, 4096), &|| {
            device.write_zeroes(8192, 4096)
        }];
    std::thread::scope(|scope| {
        for (n, change) in changes.into_iter().enumerate() {
            scope.spawn(move || {
                let error = refused(change);
                assert!(error.is_to_be_made_again() && !error.may_come_later(), "{n}: {error}");
            });
        }
    });
    let _second = on_file(file.path(), Some(portal));
    device.write(4096, &[3; 4096]).unwrap();
    assert_eq!(read_block(device, 4096)[..], [3; 512]);
    assert_eq!(read_block(device, 8192)[..], [1; 512], "none of them came");
}

/// What a connection took can come for as long as no other followed it.
#[test]
fn a_change_that_left_may_come_until_the_next_login() {
    let target = target();
    let device = open(&target.url(1), false);
    rule(&target, Kind::Write, Fault::Drop);
    let error = std::thread::scope(|scope| {
        let write = scope.spawn(|| refused(|| device.write(4096, &[1; 4096])));
        wait_until("the write", || target.fired("it") == 1);
        drop(target);
        write.join().expect("it ends")
    });
    assert!(error.may_come_later(), "{error}");
}

/// The next login ended it, and there it was refused without being executed: it can't come any more.
#[test]
fn a_change_that_left_before_the_last_login_can_be_made_again_at_once() {
    let target = target();
    let device = open(&target.url(1), false);
    rule(&target, Kind::Write, Fault::Drop);
    target.add_rule(Rule::new("then", Select::kind(Kind::Write), Fault::Status { status: 0x08 }));
    let error = std::thread::scope(|scope| {
        let write = scope.spawn(|| refused(|| device.write(4096, &[1; 4096])));
        wait_until("the write", || target.fired("it") == 1);
        target.cut(None);
        write.join().expect("it ends")
    });
    assert!(target.fired("then") > 0);
    assert!(error.is_to_be_made_again() && !error.may_come_later(), "{error}");
}
