//! Does the proxy do to chosen commands what it says, and leave the session alone where it says so?

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use lunfs_test_target::initiator::{Initiator, Login};
use lunfs_test_target::proxy::{Mischief, Proxy};
use lunfs_test_target::{Config, Kind, Rule, Select, Target, Which};

const LBA: u64 = 40;

fn block(byte: u8) -> Vec<u8> {
    vec![byte; 512]
}

fn between() -> (Target, Proxy) {
    let target = Target::start(Config::memory(16 << 20)).unwrap();
    let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], 0)), target.portal()).unwrap();
    (target, proxy)
}

fn one(target: &Target, proxy: &Proxy, name: &str) -> Initiator {
    Login::at(proxy.portal(), target.name(), name).ready().unwrap()
}

fn rule(proxy: &Proxy, mischief: Mischief) {
    proxy.add_rule(Rule::new("the-rule", Select::kind(Kind::CompareAndWrite).nth(1), mischief));
}

#[test]
fn without_rules_it_changes_nothing() {
    let (target, proxy) = between();
    let mut a = one(&target, &proxy, "a");
    let big: Vec<u8> = (0..3 << 20).map(|n: u32| n as u8 ^ (n >> 9) as u8).collect();
    assert!(a.write(100, &big, 512).unwrap().is_good());
    assert!(a.read(100, 6144, 512).unwrap().data == big);
    a.ping().unwrap();
    assert!(a.reserve_out(0, 0, 0, 7).unwrap().is_good());
    assert!(target.sessions()[0].to_string().contains(":a,i,0x"));
    a.log_out().unwrap();
}

#[test]
fn cut_before_and_after() {
    for (mischief, executed) in [(Mischief::CutBefore, false), (Mischief::CutAfter, true)] {
        let (target, proxy) = between();
        let mut a = one(&target, &proxy, "a");
        rule(&proxy, mischief);
        assert!(a.compare_and_write(LBA, &block(0), &block(1)).is_err());
        let mut again = one(&target, &proxy, "a");
        assert_eq!(again.read(LBA, 1, 512).unwrap().data, block(u8::from(executed)), "{mischief:?}");
        assert_eq!(proxy.rules()[0].fired, 1);
    }
}

#[test]
fn dropped_and_unanswered_commands_leave_the_session_alive() {
    for (mischief, executed) in [(Mischief::Drop, false), (Mischief::LoseAnswer, true)] {
        let (target, proxy) = between();
        let mut a = one(&target, &proxy, "a");
        rule(&proxy, mischief);
        a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
        assert!(a.hears_nothing_for(300).unwrap());
        let current = block(u8::from(executed));
        for n in 0..200 {
            assert_eq!(a.read(LBA, 1, 512).unwrap().data, current, "{mischief:?} {n}");
        }
        assert!(a.compare_and_write(LBA, &current, &block(9)).unwrap().is_good());
        a.ping().unwrap();
        assert!(a.all_taken(), "the window moves on");
    }
}

#[test]
fn delayed_commands_are_overtaken() {
    let (target, proxy) = between();
    let mut a = one(&target, &proxy, "a");
    rule(&proxy, Mischief::Delay { ms: 900 });
    let start = Instant::now();
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(0));
    assert!(a.wait_for(tag).unwrap().is_good());
    assert!(start.elapsed() >= Duration::from_millis(900));
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(1));
}

#[test]
fn delayed_answers_are_overtaken() {
    let (target, proxy) = between();
    let mut a = one(&target, &proxy, "a");
    rule(&proxy, Mischief::AnswerLate { ms: 150 });
    proxy.add_rule(Rule::new("read", Select::kind(Kind::Read).nth(1), Mischief::AnswerLate { ms: 100 }));
    let start = Instant::now();
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    let late_read = a.read(LBA, 1, 512).unwrap();
    assert_eq!(late_read.data, block(1), "executed at once");
    assert!(start.elapsed() >= Duration::from_millis(100));
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(1));
    assert!(a.wait_for(tag).unwrap().is_good());
    assert!(start.elapsed() >= Duration::from_millis(150));
}

#[test]
fn a_doubled_command_executes_twice_and_is_answered_once() {
    for answer in [Which::First, Which::Second] {
        let (target, proxy) = between();
        let mut a = one(&target, &proxy, "a");
        rule(&proxy, Mischief::Double { gap_ms: 0, answer });
        let done = a.compare_and_write(LBA, &block(0), &block(1)).unwrap();
        match answer {
            Which::First => assert!(done.is_good()),
            Which::Second => assert!(done.is_miscompare(), "the false miscompare"),
        }
        for _ in 0..200 {
            assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(1));
        }
        assert!(a.all_taken(), "the window moves on");
        let swaps: Vec<bool> =
            target.trace_since(0).iter().filter(|one| one.opcode == 0x89).map(|one| one.won()).collect();
        assert_eq!(swaps, [true, false]);
    }
}

#[test]
fn a_partition_and_its_end() {
    let (target, proxy) = between();
    let (mut a, mut b) = (one(&target, &proxy, "host-a"), one(&target, &proxy, "host-b"));
    proxy.partition(Some("host-a"));
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.hears_nothing_for(300).unwrap());
    assert_eq!(b.read(LBA, 1, 512).unwrap().data, block(0));
    proxy.heal(Some("host-a"));
    assert!(a.wait_for(tag).unwrap().is_good());
    assert_eq!(proxy.cut(), 2);
    assert!(b.test_unit_ready().is_err());
}

#[test]
fn in_front_of_tgtd_as_well() {
    use lunfs_test_target::others::{Tgtd, TgtdOptions, had};
    let small = TgtdOptions { bytes: 64 << 20, ..TgtdOptions::default() };
    let Some(tgtd) = had(Tgtd::start(small)) else { return };
    let proxy = Proxy::start(SocketAddr::from(([127, 0, 0, 1], 0)), tgtd.portal()).unwrap();
    let login = Login::at(proxy.portal(), tgtd.name(), "a");
    for (mischief, executed) in [
        (Mischief::CutBefore, false),
        (Mischief::CutAfter, true),
        (Mischief::Drop, false),
        (Mischief::LoseAnswer, true),
    ] {
        let mut a = login.ready().unwrap();
        let before = a.read(LBA, 1, 512).unwrap().data;
        let new = block(before[0] + 1);
        rule(&proxy, mischief);
        a.send_compare_and_write(LBA, &before, &new).unwrap();
        // Cut, or nothing.
        assert!(a.hears_nothing_for(500).unwrap_or(true), "{mischief:?}");
        drop(a);
        let mut a = login.ready().unwrap_or_else(|e| panic!("{mischief:?}: {e}"));
        assert_eq!(a.read(LBA, 1, 512).unwrap().data == new, executed, "{mischief:?}");
    }
    let mut a = login.ready().unwrap();
    let before = a.read(LBA, 1, 512).unwrap().data;
    rule(&proxy, Mischief::Double { gap_ms: 0, answer: Which::Second });
    assert!(a.compare_and_write(LBA, &before, &block(99)).unwrap().is_miscompare());
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(99));
}
