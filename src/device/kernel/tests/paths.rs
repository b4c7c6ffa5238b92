//! Which path is used, and how one comes back.

use std::time::Duration;

use nix::sys::stat::makedev;

use super::{MPATHA, READ, SDA, SWAP, TUR, WRITE, block, open, said, sent, swap, until};
use crate::device::kernel::script::{Fake, Fault};
use crate::device::{BlockDevice, CompareOutcome, Executed};
use crate::rt::Instant;

#[test]
fn bulk_takes_turns_and_locks_stay_on_one_path() {
    let fake = Fake::multipath();
    let device = open(&fake, MPATHA);
    fake.take_log();
    for _ in 0..4 {
        device.write(0, &vec![0; 8192]).unwrap();
        swap(&device, 0, 0).unwrap();
    }
    let log = fake.take_log();
    let over = |opcode, path: &str| log.iter().filter(|(p, o)| *o == opcode && p == path).count();
    assert_eq!((over(WRITE, "sda"), over(WRITE, "sdb")), (2, 2));
    assert_eq!(over(SWAP, "sda"), 4);
    // A port that serves less well gets nothing while a better one is there, a standby port nothing at all.
    let state = |disk: &str, text: &str| {
        let host = if disk == "sda" { 0 } else { 1 };
        let at = format!("pci0/host{host}/target{host}:0:0/{host}:0:0:0/access_state");
        fake.attribute(&fake.devices().join(at), text);
    };
    state("sda", "active/non-optimized");
    device.write(0, &vec![0; 8192]).unwrap();
    swap(&device, 0, 0).unwrap();
    assert!(fake.take_log().iter().all(|(path, _)| path == "sdb"));
    state("sdb", "standby");
    swap(&device, 0, 0).unwrap();
    assert_eq!(sent(&fake, SWAP), ["sda"]);
    state("sda", "unavailable");
    assert_eq!(swap(&device, 0, 0).unwrap_err().executed(), Executed::No);
    assert!(sent(&fake, SWAP).is_empty());
}

#[test]
fn the_only_path_comes_back_and_counts_as_a_reset() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", WRITE, Fault::Dies);
    let error = device.write(0, &block(1)).unwrap_err();
    assert!(error.is_to_be_made_again(), "{error}");
    let since = Instant::now();
    assert_eq!(swap(&device, 0, 1).unwrap_err().executed(), Executed::No);
    assert!(since.elapsed() < Duration::from_secs(3));
    fake.come_back("sda", false);
    let mut found = block(9);
    device.read(0, &mut found).unwrap();
    assert_eq!((&found, device.resets()), (&block(0), 1));
    // As another disk of the kernel, to which the name leads now.
    fake.fault("sda", WRITE, Fault::Dies);
    assert!(device.write(0, &block(1)).is_err());
    fake.disk("sdc", 2, "pci0/host0/target0:0:0/0:0:0:9");
    fake.node(SDA, makedev(8, 32));
    until("the new disk is used", || said(&device, "paths").contains("sdc at 0:0:0:9"));
    device.read(0, &mut found).unwrap();
    assert_eq!(device.resets(), 2);
    until("the old one is forgotten", || !said(&device, "paths").contains("sda"));
}

#[test]
fn another_unit_under_the_same_name_is_never_used() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", WRITE, Fault::Dies);
    assert!(device.write(0, &block(1)).is_err());
    fake.change_serial();
    fake.come_back("sda", false);
    assert_eq!(swap(&device, 0, 1).unwrap_err().executed(), Executed::No);
    assert!(!said(&device, "paths").contains("running, up"));
}

#[test]
fn a_path_that_the_kernel_blocks_is_not_used() {
    let fake = Fake::multipath();
    let device = open(&fake, MPATHA);
    let state = fake.devices().join("pci0/host0/target0:0:0/0:0:0:0/state");
    fake.attribute(&state, "blocked");
    until("the keeper sees it", || said(&device, "paths").contains("the kernel says 'blocked'"));
    fake.take_log();
    swap(&device, 0, 1).unwrap();
    device.write(512, &block(1)).unwrap();
    assert!(fake.take_log().iter().all(|(path, _)| path == "sdb"));
    fake.attribute(&state, "running");
    until("it is back", || said(&device, "paths").matches("running, up").count() == 2);
    assert_eq!(device.resets(), 0);
}

/// An answer that comes too late shows as well as any question that the path answers: with slow answers to the questions the
/// only path would be out for as long as a lease.
#[test]
fn a_late_answer_ends_the_doubt() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", SWAP, Fault::Slow(Duration::from_millis(1500)));
    // Each look at the path takes longer than it may.
    (0..3).for_each(|_| fake.fault("sda", TUR, Fault::Slow(Duration::from_millis(2500))));
    let since = Instant::now();
    assert!(swap(&device, 0, 1).unwrap_err().may_come_later());
    let mut found = block(9);
    device.read(0, &mut found).unwrap();
    assert_eq!(found, block(1));
    assert!(since.elapsed() < Duration::from_millis(2200), "{:?}", since.elapsed());
    assert_eq!(device.resets(), 0);
}

/// Its target may be in another life by then.
#[test]
fn a_late_answer_does_not_end_the_doubt_about_a_lost_path() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", SWAP, Fault::Slow(Duration::from_millis(1000)));
    fake.fault("sda", READ, Fault::Host { byte: 0xE, executed: false });
    fake.fault("sda", TUR, Fault::Slow(Duration::from_millis(2500)));
    std::thread::scope(|scope| {
        let swapping = scope.spawn(|| swap(&device, 0, 1));
        until("the swap is on its way", || fake.take_log().iter().any(|(_, opcode)| *opcode == SWAP));
        let since = Instant::now();
        device.read(0, &mut block(9)).unwrap();
        assert_eq!(swapping.join().unwrap().unwrap(), CompareOutcome::Swapped);
        assert!(since.elapsed() > Duration::from_millis(1900), "{:?}", since.elapsed());
    });
    assert_eq!(device.resets(), 1);
}

/// A path is looked at because it was silent, and is lost before the look has ended.
#[test]
fn a_look_shows_no_more_than_was_asked() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", SWAP, Fault::Fails { byte: 0xE, after: Duration::from_millis(1500) });
    fake.fault("sda", TUR, Fault::Slow(Duration::from_millis(800)));
    assert!(swap(&device, 0, 1).unwrap_err().may_come_later());
    device.read(0, &mut block(9)).unwrap();
    assert_eq!(device.resets(), 1);
}
