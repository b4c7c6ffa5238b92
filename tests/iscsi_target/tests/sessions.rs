//! The iSCSI side: who may log in, what a session outlives, aborting, resets, several LUNs and block sizes.

use std::time::Duration;

use lunfs_test_target::initiator::{Login, cdb_16};
use lunfs_test_target::{Chap, Config, Fault, Kind, LunConfig, Rule, Select, Target};

const LBA: u64 = 40;

fn block(byte: u8) -> Vec<u8> {
    vec![byte; 512]
}

fn target() -> Target {
    Target::start(Config::memory(16 << 20)).unwrap()
}

fn held(ms: u64) -> Fault {
    Fault::Late { ms, past_session: false, past_abort: false, past_reservation: false, answer: true }
}

fn chap(secret: &str, target_secret: &str) -> Chap {
    let text = str::to_owned;
    Chap {
        user: text("me"),
        secret: text(secret),
        target_user: text("it"),
        target_secret: text(target_secret),
    }
}

#[test]
fn chap_one_way_and_mutual() {
    let mut config = Config::memory(1 << 20);
    config.chap = Some(chap("a secret of mine", "and one of its own"));
    let target = Target::start(config).unwrap();
    let mut login = Login::to(&target, "a");
    assert!(login.connect().is_err(), "without CHAP");
    login.chap = Some(chap("a secret of mine", ""));
    login.ready().unwrap();
    login.chap = Some(chap("a secret of mine", "and one of its own"));
    login.ready().unwrap();
    login.chap = Some(chap("another", ""));
    let refused = login.connect().err().unwrap().to_string();
    assert_eq!(refused, "login refused: 0x0201");
    login.chap = Some(chap("a secret of mine", "not what the target has"));
    assert!(login.connect().err().unwrap().to_string().contains("did not prove itself"));
}

#[test]
fn discovery_names_the_target_and_nothing_else_is_served() {
    let target = target();
    let mut session = Login::at(target.portal(), "", "a").connect().unwrap();
    let found = session.send_targets().unwrap();
    let text = |key: &str, value: String| (key.to_owned(), value);
    assert_eq!(
        found,
        [
            text("TargetName", target.name().to_owned()),
            text("TargetAddress", format!("{},1", target.portal()))
        ]
    );
    session.log_out().unwrap();
    let refused = Login::at(target.portal(), "iqn.2026-01.org.lunfs.test:other", "a").connect();
    assert_eq!(refused.err().unwrap().to_string(), "login refused: 0x0203");
}

#[test]
fn digests_are_refused_by_negotiation() {
    let target = target();
    let mut login = Login::to(&target, "a");
    login.digests = "CRC32C,None".to_owned();
    let session = login.connect().unwrap();
    assert!(session.answers.contains(&("HeaderDigest".to_owned(), "None".to_owned())));
    login.digests = "CRC32C".to_owned();
    let session = login.connect().unwrap();
    assert!(session.answers.contains(&("DataDigest".to_owned(), "Reject".to_owned())));
}

#[test]
fn the_same_nexus_takes_the_place_of_its_session() {
    let target = target();
    let mut a = Login::to(&target, "a").ready().unwrap();
    assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
    target.add_rule(Rule::new("held", Select::kind(Kind::CompareAndWrite), held(900)));
    a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.test_unit_ready().unwrap().is_good());
    let mut again = Login::to(&target, "a").connect().unwrap();
    assert!(a.test_unit_ready().is_err(), "the old session is gone");
    assert_eq!(again.test_unit_ready().unwrap().check(), Some((6, 0x29, 7)), "nexus loss");
    std::thread::sleep(Duration::from_millis(1200));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0), "what the old one had outstanding is gone");
    assert_eq!(again.keys().unwrap().1, [0xa], "the registration is not");
    assert_eq!(target.sessions().len(), 1);
}

#[test]
fn an_aborted_command_never_executes() {
    let target = target();
    let mut a = Login::to(&target, "a").ready().unwrap();
    target.add_rule(Rule::new("held", Select::kind(Kind::Write), held(900)));
    let tag = a.send(&cdb_16(0x8a, 0, LBA, 1), &block(1), 0).unwrap();
    assert_eq!(a.manage(1, tag).unwrap(), 0, "function complete");
    assert_eq!(a.manage(1, tag).unwrap(), 1, "no such task any more");
    assert!(a.hears_nothing_for(1200).unwrap(), "and no answer");
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    // One that may execute past an abort does.
    let fault =
        Fault::Late { ms: 300, past_session: false, past_abort: true, past_reservation: false, answer: true };
    target.add_rule(Rule::new("held", Select::kind(Kind::Write), fault));
    let tag = a.send(&cdb_16(0x8a, 0, LBA, 1), &block(1), 0).unwrap();
    assert_eq!(a.manage(1, tag).unwrap(), 0);
    std::thread::sleep(Duration::from_millis(900));
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(1));
}

#[test]
fn a_reset_of_the_lun_ends_the_commands_of_all_and_tells_them() {
    let target = target();
    let mut a = Login::to(&target, "a").ready().unwrap();
    let mut b = Login::to(&target, "b").ready().unwrap();
    assert!(b.reserve_out(0, 0, 0, 0xb).unwrap().is_good());
    target.add_rule(Rule::new("held", Select::kind(Kind::Write), held(900)));
    let tag = b.send(&cdb_16(0x8a, 0, LBA, 1), &block(1), 0).unwrap();
    assert!(b.test_unit_ready().unwrap().is_good());
    assert_eq!(a.manage(5, 0).unwrap(), 0);
    assert_eq!(b.wait_for(tag).unwrap().status, 0x40, "TASK ABORTED");
    assert_eq!(target.read(1, LBA, 1).unwrap(), block(0));
    assert_eq!(b.test_unit_ready().unwrap().check(), Some((6, 0x29, 3)));
    assert_eq!(b.keys().unwrap().1, [0xb], "reservations stay");
}

#[test]
fn a_cold_reset_ends_all_sessions() {
    let target = target();
    let mut a = Login::to(&target, "a").ready().unwrap();
    let mut b = Login::to(&target, "b").ready().unwrap();
    assert!(a.manage(7, 0).is_err());
    assert!(b.test_unit_ready().is_err());
    let mut again = Login::to(&target, "b").connect().unwrap();
    assert_eq!(again.test_unit_ready().unwrap().check(), Some((6, 0x29, 0)));
}

#[test]
fn several_luns_of_both_block_sizes_and_a_file_that_keeps_its_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lun");
    {
        let mut config = Config::memory(1 << 20);
        config.luns.push(LunConfig::new(7, 8 << 20).block_bytes(4096).file(&path));
        let target = Target::start(config).unwrap();
        let mut a = Login::to(&target, "a").lun(7).ready().unwrap();
        let capacity = a.command(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 8).unwrap().data;
        assert_eq!(capacity, [0, 0, 7, 0xff, 0, 0, 0x10, 0]);
        let list = a.command(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0], &[], 256).unwrap().data;
        assert_eq!((list[3], list[9], list[17]), (16, 1, 7));
        assert!(a.compare_and_write(3, &[0; 4096], &[8; 4096]).unwrap().is_good());
        // More than a burst, with R2T.
        let big: Vec<u8> = (0..3 << 20).map(|n: u32| (n / 4096) as u8 ^ n as u8).collect();
        assert!(a.write(100, &big, 4096).unwrap().is_good());
        assert!(a.read(100, 768, 4096).unwrap().data == big);
    }
    let target = Target::start(Config::of(LunConfig::new(1, 8 << 20).block_bytes(4096).file(&path))).unwrap();
    let mut a = Login::to(&target, "a").ready().unwrap();
    assert_eq!(a.read(3, 1, 4096).unwrap().data, [8; 4096]);
}

#[test]
fn residuals_and_short_data() {
    let target = target();
    let mut a = Login::to(&target, "a").ready().unwrap();
    let read = a.command(&cdb_16(0x88, 0, 0, 1), &[], 10_000).unwrap();
    assert_eq!((read.data.len(), read.underflow), (512, 10_000 - 512));
    let read = a.command(&cdb_16(0x88, 0, 0, 2), &[], 512).unwrap();
    assert_eq!((read.data.len(), read.overflow), (512, 512));
    // A compare-and-write with the expected block only.
    let cdb = lunfs_test_target::initiator::cdb_compare_and_write(LBA);
    let short = a.command(&cdb, &block(0), 0).unwrap();
    assert_eq!(short.check(), Some((5, 0x0e, 3)));
}

#[test]
fn pings_in_both_directions() {
    let mut config = Config::memory(1 << 20);
    config.ping_ms = Some(30);
    let target = Target::start(config).unwrap();
    let mut a = Login::to(&target, "a").ready().unwrap();
    a.ping().unwrap();
    let began = std::time::Instant::now();
    while a.pings < 2 {
        a.ping().unwrap();
        assert!(began.elapsed() < Duration::from_secs(10), "{} pings", a.pings);
    }
    a.log_out().unwrap();
}

#[test]
fn attentions_of_a_login_can_be_switched_off() {
    let mut config = Config::memory(1 << 20);
    config.luns[0].personality.attention_at_login = false;
    let target = Target::start(config).unwrap();
    assert!(Login::to(&target, "a").connect().unwrap().test_unit_ready().unwrap().is_good());
    let target = self::target();
    let first = Login::to(&target, "a").connect().unwrap().test_unit_ready().unwrap();
    assert_eq!(first.check(), Some((6, 0x29, 0)));
}
