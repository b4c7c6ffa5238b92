//! The targets that other people wrote: do they start and end here, and behave as the product's tests expect of them?

use lunfs_test_target::initiator::{Initiator, Login};
use lunfs_test_target::others::{Istgt, Tgtd, TgtdOptions, had};

const LBA: u64 = 40;

fn block(byte: u8) -> Vec<u8> {
    vec![byte; 512]
}

fn small() -> TgtdOptions {
    TgtdOptions { bytes: 64 << 20, ..TgtdOptions::default() }
}

fn login(tgtd: &Tgtd, name: &str) -> Login {
    Login::at(tgtd.portal(), tgtd.name(), name)
}

fn swaps_rightly(a: &mut Initiator) {
    assert!(a.write(LBA, &block(0), 512).unwrap().is_good());
    assert!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().is_good());
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(1));
    assert!(a.compare_and_write(LBA, &block(0), &block(2)).unwrap().is_miscompare());
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(1));
}

#[test]
fn tgtd_with_its_compare_and_write() {
    let Some(mut tgtd) = had(Tgtd::start(small())) else { return };
    let mut a = login(&tgtd, "a").ready().unwrap();
    swaps_rightly(&mut a);
    let mut differs = block(1);
    differs[300] = 7;
    let done = a.compare_and_write(LBA, &differs, &block(2)).unwrap();
    assert_eq!(done.sense.unwrap().information, Some(300));
    // A crash loses registrations and keeps what was written.
    assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
    tgtd.crash();
    assert!(a.test_unit_ready().is_err());
    tgtd.restart().unwrap();
    let mut a = login(&tgtd, "a").ready().unwrap();
    assert!(a.keys().unwrap().1.is_empty());
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(1));
}

#[test]
fn tgtd_forgets_whose_a_registration_is_when_its_host_logs_in_again() {
    let Some(tgtd) = had(Tgtd::start(small())) else { return };
    for first_still_there in [false, true] {
        let mut a = login(&tgtd, "a").ready().unwrap();
        assert!(a.reserve_out(6, 0, 0, 0xa).unwrap().is_good());
        let kept = if first_still_there { Some(a) } else { None };
        let mut again = login(&tgtd, "a").ready().unwrap();
        assert_eq!(again.keys().unwrap().1, [0xa], "the key is listed");
        assert_eq!(again.reserve_out(0, 0, 0xa, 0xb).unwrap().status, 0x18, "and is nobody's");
        drop(kept);
        assert!(again.reserve_out(6, 0, 0, 0xc).unwrap().is_good());
        assert!(again.reserve_out(3, 0, 0xc, 0).unwrap().is_good());
    }
}

#[test]
fn tgtd_frozen_executes_on_waking() {
    let Some(tgtd) = had(Tgtd::start(small())) else { return };
    let mut a = login(&tgtd, "a").ready().unwrap();
    tgtd.freeze().unwrap();
    a.send_compare_and_write(LBA, &block(0), &block(1)).unwrap();
    assert!(a.hears_nothing_for(300).unwrap());
    tgtd.resume().unwrap();
    let mut b = login(&tgtd, "b").ready().unwrap();
    assert_eq!(b.read(LBA, 1, 512).unwrap().data, block(1));
}

#[test]
fn tgtd_as_it_comes_refuses_what_it_promises() {
    let Some(tgtd) = had(Tgtd::start(TgtdOptions { compare_and_write: false, ..small() })) else { return };
    let mut a = login(&tgtd, "a").ready().unwrap();
    assert_eq!(a.inquiry(Some(0xb0)).unwrap().data[5], 128);
    assert_eq!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().check(), Some((5, 0x20, 0)));
}

#[test]
fn tgtd_with_aio_answers_good_and_does_nothing() {
    let Some(tgtd) = had(Tgtd::start(TgtdOptions { backing: "aio", ..small() })) else { return };
    let mut a = login(&tgtd, "a").ready().unwrap();
    assert!(a.compare_and_write(LBA, &block(0), &block(1)).unwrap().is_good());
    assert_eq!(a.read(LBA, 1, 512).unwrap().data, block(0));
}

#[test]
fn tgtd_lets_a_fenced_host_unmap_unless_told_not_to() {
    for cover_unmap in [false, true] {
        let Some(tgtd) = had(Tgtd::start(TgtdOptions { cover_unmap, ..small() })) else { return };
        let (mut a, mut b) = (login(&tgtd, "a").ready().unwrap(), login(&tgtd, "b").ready().unwrap());
        assert!(a.reserve_out(0, 0, 0, 0xa).unwrap().is_good());
        assert!(a.reserve_out(1, 7, 0xa, 0).unwrap().is_good());
        assert_eq!(b.write(LBA, &block(1), 512).unwrap().status, 0x18);
        assert_eq!(b.compare_and_write(LBA, &block(0), &block(1)).unwrap().status, 0x18);
        let status = if cover_unmap { 0x18 } else { 0 };
        assert_eq!(b.unmap(LBA, 8).unwrap().status, status, "cover_unmap: {cover_unmap}");
        assert_eq!(b.write_same(LBA, 8, &block(3)).unwrap().status, status, "cover_unmap: {cover_unmap}");
    }
}

#[test]
fn istgt_is_strange_and_exclusive() {
    let Some(istgt) = had(Istgt::start(64 << 20)) else { return };
    let login = Login::at(istgt.portal(), &istgt.name(), "a").lun(0);
    let mut a = login.ready().unwrap();
    swaps_rightly(&mut a);
    let mut differs = block(1);
    differs[300] = 7;
    let done = a.compare_and_write(LBA, &differs, &block(2)).unwrap();
    assert_eq!(done.sense.and_then(|sense| sense.information).unwrap_or(0), 0, "never where it is");
    assert_eq!(a.unmap(LBA, 1).unwrap().check().map(|check| check.0), Some(5), "no UNMAP");
}
