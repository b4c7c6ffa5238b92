//! Does each fault of a rule do what it says: what is executed, how often, when, and what the initiator hears?

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use lunfs_test_target::initiator::{Initiator, Login};
use lunfs_test_target::{Config, Entry, Fault, Kind, Rule, Select, Target, Which};

const LBA: u64 = 40;
/// Long enough for what is to come first, on a machine with other things to do.
const LATE_MS: u64 = 900;

fn block(byte: u8) -> Vec<u8> {
    vec![byte; 512]
}

fn target() -> Target {
    Target::start(Config::memory(8 << 20)).unwrap()
}

fn one(target: &Target, name: &str) -> Initiator {
    Login::to(target, name).ready().unwrap()
}

fn swaps(target: &Target) -> Vec<Entry> {
    target.trace_since(0).into_iter().filter(|entry| entry.opcode == 0x89).collect()
}

fn rule(target: &Target, kind: Kind, fault: Fault) {
    target.add_rule(Rule::new("the-rule", Select::kind(kind).nth(1), fault));
}

/// Sends a compare-and-write from zeroes to ones and hears nothing of it.
fn unanswered(a: &mut Initiator) {
    a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.hears_nothing_for(300).unwrap(), "no answer was expected");
}

fn within_10_s(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10), "it never happened");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn ended<T: std::fmt::Debug>(result: std::io::Result<T>) {
    let kind = result.expect_err("the session was to end").kind();
    assert!(
        matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe),
        "{kind:?}"
    );
}

#[test]
fn a_lost_answer_was_executed() {
    let target = target();
    let mut a = one(&target, "a");
    rule(&target, Kind::CompareAndWrite, Fault::LoseAnswer);
    unanswered(&mut a);
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(1));
    let found = swaps(&target);
    assert_eq!(found.len(), 1);
    assert!(found[0].won() && found[0].changed && found[0].fault.as_deref() == Some("the-rule"));
    assert!(a.compare_and_write(LBA, &block(0), &block(2)).unwrap().is_miscompare(), "the session goes on");
    assert_eq!(target.fired("the-rule"), 1);
}

#[test]
fn a_dropped_command_was_not() {
    let target = target();
    let mut a = one(&target, "a");
    rule(&target, Kind::CompareAndWrite, Fault::Drop);
    unanswered(&mut a);
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    assert!(swaps(&target)[0].skipped);
    assert!(a.compare_and_write(LBA, &block(0), &block(2)).unwrap().is_good());
}

#[test]
fn a_late_command_executes_at_its_time_and_the_session_goes_on_before() {
    let target = target();
    let mut a = one(&target, "a");
    let late = Fault::Late {
        ms: LATE_MS,
        past_session: false,
        past_abort: false,
        past_reservation: false,
        answer: true,
    };
    rule(&target, Kind::CompareAndWrite, late);
    let start = Instant::now();
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(0), "it has not executed yet");
    assert!(a.wait_for(tag).unwrap().is_good());
    assert!(start.elapsed() >= Duration::from_millis(LATE_MS));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(1));
}

fn late(past_session: bool, past_abort: bool, past_reservation: bool) -> Fault {
    Fault::Late { ms: LATE_MS, past_session, past_abort, past_reservation, answer: true }
}

#[test]
fn a_late_command_outlives_its_session_only_if_it_was_to() {
    for outlives in [false, true] {
        let target = target();
        let mut a = one(&target, "a");
        rule(&target, Kind::Write, late(outlives, false, false));
        let write = lunfs_test_target::initiator::cdb_16(0x8a, 0, LBA, 1);
        a.send(&write, &block(7), 0).unwrap();
        assert!(a.test_unit_ready().unwrap().is_good(), "it was taken");
        assert_eq!(target.cut(Some(":a")), 1);
        let mut again = one(&target, "a");
        std::thread::sleep(Duration::from_millis(LATE_MS + 300));
        let expected = if outlives { block(7) } else { block(0) };
        assert_eq!(again.read(LBA, 1, 512).unwrap().data, expected, "past_session: {outlives}");
    }
}

#[test]
fn a_late_write_lands_after_a_preempt_only_if_it_was_to() {
    for (past_abort, past_reservation, lands) in
        [(false, false, false), (true, false, false), (false, true, false), (true, true, true)]
    {
        let target = target();
        let (mut a, mut b) = (one(&target, "a"), one(&target, "b"));
        assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
        assert!(b.reserve_out(0, 0, 0, 0xb).unwrap().is_good());
        assert!(a.reserve_out(1, 7, 0xa, 0).unwrap().is_good());
        rule(&target, Kind::Write, late(false, past_abort, past_reservation));
        let write = lunfs_test_target::initiator::cdb_16(0x8a, 0, LBA, 1);
        let tag = b.send(&write, &block(7), 0).unwrap();
        assert!(b.test_unit_ready().unwrap().is_good(), "it was taken");
        // PREEMPT AND ABORT by a.
        assert!(a.reserve_out(5, 7, 0xa, 0xb).unwrap().is_good());
        let done = b.wait_for(tag).unwrap();
        let expected = if lands { block(7) } else { block(0) };
        assert_eq!(target.read(1, LBA, 1).unwrap(), expected, "{past_abort} {past_reservation}");
        match (past_abort, past_reservation) {
            (false, _) => assert_eq!(done.status, 0x40, "TASK ABORTED"),
            (true, false) => assert_eq!(done.check(), Some((6, 0x2a, 5)), "registrations preempted"),
            (true, true) => assert!(done.is_good()),
        }
    }
}

#[test]
fn an_answer_comes_late_and_the_command_did_not() {
    let target = target();
    let mut a = one(&target, "a");
    rule(&target, Kind::CompareAndWrite, Fault::AnswerLate { ms: LATE_MS });
    let start = Instant::now();
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.test_unit_ready().unwrap().is_good());
    within_10_s(|| target.read(1, LBA, 1).unwrap() == block(1));
    assert!(a.wait_for(tag).unwrap().is_good());
    assert!(start.elapsed() >= Duration::from_millis(LATE_MS));
}

#[test]
fn executed_twice_answers_with_the_first_or_the_second() {
    let target = target();
    let mut a = one(&target, "a");
    rule(&target, Kind::CompareAndWrite, Fault::Twice { gap_ms: 0, answer: Which::First });
    assert!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().is_good());
    rule(&target, Kind::CompareAndWrite, Fault::Twice { gap_ms: 0, answer: Which::Second });
    assert!(a.compare_and_write(LBA, &block(1), &block(2)).unwrap().is_miscompare(), "the false miscompare");
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(2));
    let found: Vec<(bool, bool)> = swaps(&target).iter().map(|entry| (entry.won(), entry.again)).collect();
    assert_eq!(found, [(true, false), (false, true), (true, false), (false, true)]);
}

#[test]
fn a_twin_comes_after_others() {
    let target = target();
    let (mut a, mut b) = (one(&target, "a"), one(&target, "b"));
    rule(&target, Kind::Write, Fault::Twice { gap_ms: LATE_MS, answer: Which::First });
    assert!(a.write(LBA, &block(1), 512).unwrap().is_good());
    assert!(b.write(LBA, &block(2), 512).unwrap().is_good());
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(2));
    within_10_s(|| target.read(1, LBA, 1).unwrap() == block(1));
    let writes: Vec<bool> =
        target.trace_since(0).iter().filter(|one| one.opcode == 0x8a).map(|one| one.again).collect();
    assert_eq!(writes, [false, false, true], "the twin landed over the other's");
}

#[test]
fn refusals_execute_nothing() {
    let target = target();
    let mut a = one(&target, "a");
    for (fault, status, check) in [
        (Fault::Status { status: 0x08 }, 0x08, None),
        (Fault::Status { status: 0x28 }, 0x28, None),
        (Fault::Attention { asc: 0x29, ascq: 0 }, 2, Some((6, 0x29, 0))),
        (
            Fault::Check { key: 5, asc: 0x20, ascq: 0, executed: false, only_blocks: None },
            2,
            Some((5, 0x20, 0)),
        ),
        (Fault::Check { key: 0, asc: 0, ascq: 0, executed: false, only_blocks: None }, 2, Some((0, 0, 0))),
        (Fault::Miscompare { executed: false, information: Some(9) }, 2, Some((0x0e, 0x1d, 0))),
        (Fault::GoodForNothing, 0, None),
    ] {
        rule(&target, Kind::CompareAndWrite, fault.clone());
        let done = a.compare_and_write(LBA, &block(0), &block(1)).unwrap();
        assert_eq!((done.status, done.check()), (status, check), "{fault:?}");
        assert_eq!(target.read(1, LBA, 1).unwrap(), block(0), "{fault:?}");
        assert!(swaps(&target).last().unwrap().skipped);
    }
}

#[test]
fn errors_after_execution() {
    let target = target();
    let mut a = one(&target, "a");
    let mut before = 0;
    for (key, asc) in [(0, 0), (0x0b, 0x44), (3, 0x11)] {
        rule(
            &target,
            Kind::CompareAndWrite,
            Fault::Check { key, asc, ascq: 0, executed: true, only_blocks: None },
        );
        let done = a.compare_and_write(LBA, &block(before), &block(before + 1)).unwrap();
        before += 1;
        assert_eq!(done.check(), Some((key, asc, 0)));
        assert_eq!(target.read(1, LBA, 1).unwrap(), block(before));
    }
    rule(&target, Kind::CompareAndWrite, Fault::Miscompare { executed: true, information: None });
    let done = a.compare_and_write(LBA, &block(before), &block(99)).unwrap();
    assert!(done.is_miscompare() && done.sense.unwrap().information.is_none());
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(99));
    rule(
        &target,
        Kind::Write,
        Fault::Check { key: 0x0b, asc: 0, ascq: 0, executed: true, only_blocks: Some(2) },
    );
    assert_eq!(a.write(0, &[5; 4 * 512], 512).unwrap().check(), Some((0x0b, 0, 0)));
    assert_eq!(target.read(1, 0, 4).unwrap(), [[5; 1024], [0; 1024]].concat(), "the first two blocks only");
}

#[test]
fn a_cut_session_with_and_without_execution() {
    for executed in [false, true] {
        let target = target();
        let mut a = one(&target, "a");
        rule(&target, Kind::CompareAndWrite, Fault::Cut { executed });
        ended(a.compare_and_write(LBA, &block(0), &block(1)));
        let mut again = one(&target, "a");
        assert_eq!(again.read(LBA, 1, 512).unwrap().data, block(u8::from(executed)));
    }
}

#[test]
fn a_race_lets_both_win() {
    let target = target();
    let (mut a, mut b) = (one(&target, "a"), one(&target, "b"));
    rule(&target, Kind::CompareAndWrite, Fault::Race { us: 1_000_000 });
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.test_unit_ready().unwrap().is_good());
    std::thread::sleep(Duration::from_millis(300));
    assert!(b.compare_and_write(LBA, &block(0), &block(2)).unwrap().is_good());
    assert!(a.wait_for(tag).unwrap().is_good(), "both won");
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(1));
    assert_eq!(swaps(&target).iter().filter(|one| one.won() && one.changed).count(), 2);
    assert_eq!(swaps(&target).len(), 2);
}

#[test]
fn rules_meet_who_they_name() {
    let target = target();
    let (mut a, mut b) = (one(&target, "host-a"), one(&target, "host-b"));
    let select = Select::kind(Kind::Read).initiator("host-b").lba(10, 20).times(2);
    target.add_rule(Rule::new("", select, Fault::Status { status: 0x08 }));
    assert!(a.read(10, 1, 512).unwrap().is_good());
    assert!(b.read(9, 1, 512).unwrap().is_good());
    assert_eq!(b.read(9, 2, 512).unwrap().status, 0x08);
    assert_eq!(b.read(20, 1, 512).unwrap().status, 0x08);
    assert!(b.read(20, 1, 512).unwrap().is_good(), "two times only");
    let standing = target.rules();
    assert_eq!((standing[0].selected, standing[0].fired, standing[0].rule.id.as_str()), (3, 2, "rule-1"));
    // UNMAP names its blocks in its data.
    target.clear_rules();
    target.add_rule(Rule::new("u", Select::kind(Kind::Unmap).lba(100, 100), Fault::Status { status: 0x08 }));
    assert!(a.unmap(90, 10).unwrap().is_good());
    assert_eq!(a.unmap(90, 11).unwrap().status, 0x08);
}

#[test]
fn a_judge_sees_each_execution_with_its_data() {
    let target = target();
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let into = seen.clone();
    target.set_judge(Some(Box::new(move |entry, data| {
        if entry.opcode == 0x89 {
            into.lock().unwrap().push((entry.sequence, entry.won(), data[512]));
        }
    })));
    let mut a = one(&target, "a");
    for n in 0..5 {
        assert!(a.compare_and_write(LBA, &block(n), &block(n + 1)).unwrap().is_good());
    }
    let seen = seen.lock().unwrap();
    assert_eq!(
        seen.iter().map(|(_, won, byte)| (*won, *byte)).collect::<Vec<_>>(),
        [1, 2, 3, 4, 5].map(|n| (true, n))
    );
    assert!(seen.windows(2).all(|pair| pair[0].0 < pair[1].0));
}
