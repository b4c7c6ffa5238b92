//! What is done to the whole target at a moment: loss of power, freezing, cutting, another size, another LUN. And
//! what a logical unit does by its personality.

use std::time::{Duration, Instant};

use lunfs_test_target::initiator::{Initiator, Login, cdb_16};
use lunfs_test_target::personality::{CompareAndWrite, Information, Latency, LoginAgain, Slow, Unmapped};
use lunfs_test_target::{Config, Fault, Kind, LunConfig, Personality, Rule, Select, Target};

const LBA: u64 = 40;
const POWER_ON: Option<(u8, u8, u8)> = Some((6, 0x29, 0));

fn block(byte: u8) -> Vec<u8> {
    vec![byte; 512]
}

fn with(change: impl FnOnce(&mut Personality)) -> Target {
    let mut personality = Personality::default();
    change(&mut personality);
    Target::start(Config::of(LunConfig::new(1, 8 << 20).personality(personality))).unwrap()
}

fn one(target: &Target, name: &str) -> Initiator {
    Login::to(target, name).ready().unwrap()
}

#[test]
fn power_takes_what_was_not_flushed_and_all_registrations_but_those_to_persist() {
    let mut went_back_in_all = 0;
    for (seed, aptpl) in [(1, 0), (2, 1), (3, 0)] {
        let target = with(|p| p.volatile_cache = true);
        let mut a = one(&target, "a");
        assert!(a.reserve_out_with(0, 0, 0, 0xa, aptpl).unwrap().is_good());
        assert!(a.write(0, &[1; 64 * 512], 512).unwrap().is_good());
        assert_eq!(target.not_durable(1).unwrap(), 64);
        assert!(a.flush().unwrap().is_good());
        assert_eq!(target.not_durable(1).unwrap(), 0);
        assert!(a.write(0, &[2; 64 * 512], 512).unwrap().is_good());
        assert!(a.command(&cdb_16(0x8a, 0x08, 0, 1), &block(3), 0).unwrap().is_good(), "with FUA");
        let loss = target.lose_power(seed).unwrap();
        assert_eq!(loss.at_risk, 63);
        assert!(a.test_unit_ready().is_err(), "the session is gone");
        let mut again = Login::to(&target, "a").connect().unwrap();
        assert_eq!(again.test_unit_ready().unwrap().check(), POWER_ON);
        while !again.test_unit_ready().unwrap().is_good() {}
        let data = again.read(0, 64, 512).unwrap().data;
        let counted = |byte| data.chunks(512).filter(|block| block.iter().all(|b| *b == byte)).count();
        assert_eq!((counted(1), counted(2), counted(3)), (loss.went_back, 63 - loss.went_back, 1));
        went_back_in_all += loss.went_back;
        let (generation, keys) = again.keys().unwrap();
        assert_eq!((generation, keys), (0, if aptpl == 1 { vec![0xa] } else { vec![] }));
    }
    assert!((40..150).contains(&went_back_in_all), "{went_back_in_all} of 189");
}

#[test]
fn a_flush_that_lies_makes_nothing_durable() {
    let target = with(|p| (p.volatile_cache, p.flush_does_nothing, p.ignores_fua) = (true, true, true));
    let mut a = one(&target, "a");
    assert!(a.command(&cdb_16(0x8a, 0x08, 0, 1), &block(3), 0).unwrap().is_good());
    assert!(a.flush().unwrap().is_good());
    assert_eq!(target.not_durable(1).unwrap(), 1);
}

#[test]
fn one_initiator_is_frozen_and_the_other_is_not() {
    let target = with(|_| {});
    let (mut a, mut b) = (one(&target, "host-a"), one(&target, "host-b"));
    target.freeze(Some("host-a"));
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.hears_nothing_for(300).unwrap());
    assert_eq!(b.read(LBA, 1, 512).unwrap().data, block(0));
    assert!(Login::to(&target, "host-a").isid(9).timeout_ms(200).connect().is_err(), "no new session either");
    target.thaw(Some("host-a"));
    assert!(a.wait_for(tag).unwrap().is_good(), "executed when it was thawed");
    assert_eq!(b.read(LBA, 1, 512).unwrap().data, block(1));
}

#[test]
fn a_command_on_its_way_inside_is_frozen_with_its_initiator() {
    let target = with(|p| p.slow = vec![Slow { first: LBA, last: LBA, us: 900_000 }]);
    let mut a = one(&target, "host-a");
    let tag = a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.test_unit_ready().unwrap().is_good(), "it was taken");
    target.freeze(Some("host-a"));
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    target.thaw(None);
    assert!(a.wait_for(tag).unwrap().is_good());
}

/// A write that the target takes, and would execute later than anything ends it.
fn send_late(target: &Target, a: &mut Initiator) {
    let late =
        Fault::Late { ms: 900, past_session: true, past_abort: true, past_reservation: true, answer: true };
    target.add_rule(Rule::new("late", Select::kind(Kind::Write), late));
    a.send(&cdb_16(0x8a, 0, LBA, 1), &block(1), 0).unwrap();
    assert!(a.test_unit_ready().unwrap().is_good(), "it was taken");
}

#[test]
fn nothing_outlives_a_loss_of_power() {
    let target = with(|_| {});
    let mut a = one(&target, "a");
    send_late(&target, &mut a);
    target.lose_power(0).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
}

#[test]
fn a_target_that_has_ended_executes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let lun = || LunConfig::new(1, 1 << 20).file(directory.path().join("lun"));
    let target = Target::start(Config::of(lun())).unwrap();
    let mut a = one(&target, "a");
    send_late(&target, &mut a);
    drop(target);
    let again = Target::start(Config::of(lun())).unwrap();
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(again.read(1, LBA, 1).unwrap(), block(0));
}

#[test]
fn a_frozen_target_executes_on_waking_what_it_was_sent() {
    let target = with(|_| {});
    let mut a = one(&target, "a");
    target.freeze(None);
    a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    drop(a);
    target.thaw(None);
    let start = Instant::now();
    while target.read(1, LBA, 1).unwrap() != block(1) {
        assert!(start.elapsed() < Duration::from_secs(5), "it was never executed");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn what_was_held_when_a_session_is_cut_never_executes() {
    let target = with(|p| p.slow = vec![Slow { first: LBA, last: LBA, us: 900_000 }]);
    let mut a = one(&target, "a");
    a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.test_unit_ready().unwrap().is_good());
    assert_eq!(target.cut(None), 1);
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    assert_eq!(target.sessions(), []);
}

#[test]
fn another_size_is_told() {
    let target = with(|_| {});
    let mut a = one(&target, "a");
    target.resize(1, 100).unwrap();
    assert_eq!(a.test_unit_ready().unwrap().check(), Some((6, 0x2a, 9)));
    let capacity = a.command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8).unwrap().data;
    assert_eq!(capacity, [0, 0, 0, 99, 0, 0, 2, 0]);
    assert_eq!(a.read(99, 2, 512).unwrap().check(), Some((5, 0x21, 0)));
    assert!(a.read(99, 1, 512).unwrap().is_good());
}

#[test]
fn a_lun_that_is_unmapped_and_comes_back() {
    let mut config = Config::memory(1 << 20);
    config.luns.push(LunConfig::new(2, 1 << 20));
    let target = Target::start(config).unwrap();
    let mut a = one(&target, "a");
    let mut second = Login::to(&target, "a2").lun(2).ready().unwrap();
    assert!(a.write(LBA, &block(9), 512).unwrap().is_good());
    let lun = target.unmap_lun(1).unwrap();
    assert_eq!(a.read(LBA, 1, 512).unwrap().check(), Some((5, 0x25, 0)));
    assert_eq!(a.inquiry(None).unwrap().data[0], 0x7f);
    assert_eq!(second.test_unit_ready().unwrap().check(), Some((6, 0x3f, 0x0e)), "the other LUN tells");
    target.map_lun(lun);
    while !a.test_unit_ready().unwrap().is_good() {}
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(9));
}

#[test]
fn attentions_at_will() {
    let target = with(|_| {});
    let (mut a, mut b) = (one(&target, "host-a"), one(&target, "host-b"));
    assert_eq!(target.raise_attention(1, Some("host-a"), 0x29, 0x00).unwrap(), 1);
    assert_eq!(target.raise_attention(1, None, 0x3f, 0x0e).unwrap(), 2);
    assert_eq!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().check(), POWER_ON);
    assert!(a.inquiry(None).unwrap().is_good(), "INQUIRY passes by");
    assert_eq!(a.test_unit_ready().unwrap().check(), Some((6, 0x3f, 0x0e)));
    assert!(a.test_unit_ready().unwrap().is_good());
    assert_eq!(b.test_unit_ready().unwrap().check(), Some((6, 0x3f, 0x0e)));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0), "an attention executes nothing");
}

#[test]
fn latencies_and_slow_blocks() {
    let target = with(|p| {
        p.latency = Latency { min_us: 20_000, max_us: 30_000, ..Latency::default() };
        p.slow = vec![Slow { first: 100, last: 200, us: 100_000 }];
    });
    let mut a = one(&target, "a");
    let mut timed = |lba| {
        let start = Instant::now();
        assert!(a.read(lba, 1, 512).unwrap().is_good());
        start.elapsed()
    };
    assert!(timed(99) >= Duration::from_millis(20));
    assert!(timed(200) >= Duration::from_millis(120));
}

#[test]
fn compare_and_writes_of_all_kinds() {
    let target = with(|_| {});
    let mut a = one(&target, "a");
    let kind = |kind| target.change_personality(1, |p| p.compare_and_write = kind).unwrap();
    kind(CompareAndWrite::Unsupported);
    assert_eq!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().check(), Some((5, 0x20, 0)));
    kind(CompareAndWrite::DoesNothing);
    assert!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().is_good());
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    kind(CompareAndWrite::WritesBlindly);
    assert!(a.compare_and_write(LBA, &block(77), &block(1)).unwrap().is_good());
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(1));
}

#[test]
fn where_a_miscompare_says_the_difference_is() {
    let target = with(|_| {});
    let mut a = one(&target, "a");
    let mut differs = block(0);
    differs[300] = 1;
    for (how, expected) in [
        (Information::FirstDifference, Some(300)),
        (Information::Absent, None),
        (Information::Zero, Some(0)),
        (Information::Wrong, Some(300 ^ 0x155)),
    ] {
        for descriptor_sense in [false, true] {
            target
                .change_personality(1, |p| (p.information, p.descriptor_sense) = (how, descriptor_sense))
                .unwrap();
            let done = a.compare_and_write(LBA, &differs, &block(1)).unwrap();
            assert!(done.is_miscompare());
            assert_eq!(done.sense.unwrap().information, expected, "{how:?}");
        }
    }
}

/// Increments of one number by several sessions at once; how many were lost.
fn lost(target: &Target, sessions: u64, each: u64) -> u64 {
    let before = number(&target.read(1, LBA, 1).unwrap());
    std::thread::scope(|scope| {
        for n in 0..sessions {
            let login = Login::to(target, &format!("racer-{n}"));
            scope.spawn(move || {
                let mut session = login.ready().unwrap();
                for _ in 0..each {
                    loop {
                        let old = session.read(LBA, 1, 512).unwrap().data;
                        let mut new = old.clone();
                        new[..8].copy_from_slice(&(number(&old) + 1).to_be_bytes());
                        if session.compare_and_write(LBA, &old, &new).unwrap().is_good() {
                            break;
                        }
                    }
                }
            });
        }
    });
    before + sessions * each - number(&target.read(1, LBA, 1).unwrap())
}

fn number(block: &[u8]) -> u64 {
    u64::from_be_bytes(block[..8].try_into().unwrap())
}

#[test]
fn a_racy_unit_loses_updates_and_an_atomic_one_does_not() {
    let target = with(|p| p.race_us = 500);
    assert_eq!(lost(&target, 4, 200), 0);
    target.change_personality(1, |p| p.compare_and_write = CompareAndWrite::Racy).unwrap();
    assert!(lost(&target, 4, 100) > 0, "the test has no teeth");
}

#[test]
fn atomicity_is_lost_after_an_attention_or_a_conflict_until_power_is_lost() {
    for by_conflict in [false, true] {
        let target = with(|p| {
            p.compare_and_write = CompareAndWrite::AtomicUntilEndedEarly;
            p.race_us = 500;
        });
        assert_eq!(lost(&target, 4, 100), 0, "nothing ended early yet");
        let (mut a, mut b) = (one(&target, "a"), one(&target, "b"));
        if by_conflict {
            assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
            assert!(a.reserve_out(1, 5, 0xa, 0).unwrap().is_good());
            assert_eq!(b.compare_and_write(LBA, &block(1), &block(1)).unwrap().status, 0x18);
            assert!(a.reserve_out(3, 0, 0xa, 0).unwrap().is_good());
        } else {
            target.raise_attention(1, Some(":b"), 0x29, 0).unwrap();
            assert_eq!(b.compare_and_write(LBA, &block(1), &block(1)).unwrap().check(), POWER_ON);
        }
        assert!(lost(&target, 4, 100) > 0, "by conflict: {by_conflict}");
        target.lose_power(0).unwrap();
        assert_eq!(lost(&target, 4, 100), 0, "whole again");
    }
}

#[test]
fn pages_that_lie() {
    let target = with(|_| {});
    let mut a = one(&target, "a");
    let opcode = |a: &mut Initiator| {
        let mut cdb = [0u8; 12];
        (cdb[0], cdb[1], cdb[2], cdb[3], cdb[9]) = (0xa3, 0x0c, 1, 0x89, 64);
        a.command(&cdb, &[], 64).unwrap().data[1] & 7
    };
    assert_eq!((a.inquiry(Some(0xb0)).unwrap().data[5], opcode(&mut a)), (1, 3));
    for said in [0, 128, 255] {
        target
            .change_personality(1, |p| {
                p.claims_compare_and_write_blocks = Some(said);
                p.claims_compare_and_write = Some(false);
            })
            .unwrap();
        assert_eq!((a.inquiry(Some(0xb0)).unwrap().data[5], opcode(&mut a)), (said, 1));
        assert!(a.compare_and_write(LBA, &block(0), &block(0)).unwrap().is_good(), "and yet it works");
    }
    let caching = |a: &mut Initiator| a.command(&[0x1a, 8, 8, 0, 64, 0], &[], 64).unwrap().data[6] & 4;
    assert_eq!(caching(&mut a), 0);
    target.change_personality(1, |p| p.claims_write_cache = Some(true)).unwrap();
    assert_eq!(caching(&mut a), 4);
}

#[test]
fn a_fenced_host_and_unmap() {
    for covers in [true, false] {
        let target = with(|p| p.reservations_cover_unmap = covers);
        let (mut a, mut b) = (one(&target, "a"), one(&target, "b"));
        assert!(a.write(LBA, &block(5), 512).unwrap().is_good());
        assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
        assert!(a.reserve_out(1, 7, 0xa, 0).unwrap().is_good());
        assert_eq!(b.write(LBA, &block(6), 512).unwrap().status, 0x18);
        assert_eq!(b.compare_and_write(LBA, &block(5), &block(6)).unwrap().status, 0x18);
        assert!(b.read(LBA, 1, 512).unwrap().is_good());
        let status = if covers { 0x18 } else { 0 };
        assert_eq!(b.unmap(LBA, 1).unwrap().status, status);
        assert_eq!(b.write_same(LBA, 1, &block(7)).unwrap().status, status);
        assert_eq!(target.read(1, LBA, 1).unwrap(), block(if covers { 5 } else { 7 }));
    }
}

#[test]
fn registrations_and_a_new_login() {
    for (what, listed, ours) in [
        (LoginAgain::Kept, true, true),
        (LoginAgain::Lost, false, false),
        (LoginAgain::Orphaned, true, false),
    ] {
        let target = with(|p| p.registration_at_login = what);
        let (mut a, mut b) = (one(&target, "a"), one(&target, "b"));
        assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
        assert!(a.reserve_out(1, 5, 0xa, 0).unwrap().is_good());
        drop(a);
        let mut again = one(&target, "a");
        assert_eq!(b.keys().unwrap().1, if listed { vec![0xa] } else { vec![] }, "{what:?}");
        assert_eq!(again.write(LBA, &block(1), 512).unwrap().is_good(), !listed || ours, "{what:?}");
        let mut other = Login::to(&target, "a").isid(2).ready().unwrap();
        assert_eq!(other.reserve_out(0, 0, 0xa, 0xb).unwrap().status, 0x18, "another ISID is another nexus");
        assert_eq!(again.reserve_out(0, 0, 0xa, 0xb).unwrap().is_good(), ours, "{what:?}");
    }
}

#[test]
fn what_unmapped_blocks_read_as() {
    for (how, byte) in [(Unmapped::Zeroes, 0), (Unmapped::Unchanged, 5), (Unmapped::Garbage, 0xaf)] {
        let target = with(|p| p.unmapped = how);
        let mut a = one(&target, "a");
        assert!(a.write(LBA, &block(5), 512).unwrap().is_good());
        assert!(a.unmap(LBA, 1).unwrap().is_good());
        assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(byte));
        let capacity = a.command(
            &{
                let mut c = [0u8; 16];
                (c[0], c[1], c[13]) = (0x9e, 0x10, 32);
                c
            },
            &[],
            32,
        );
        assert_eq!(capacity.unwrap().data[14] & 0x40 != 0, how == Unmapped::Zeroes);
    }
}
