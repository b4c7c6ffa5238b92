//! Reservations over several paths: registering, being fenced, and no way around it.

use super::{
    MPATHA, PR_OUT, SDA, SWAP, TUR, WRITE, block, key, open_with, reserving, said, sent, swap, until,
};
use crate::device::kernel::KernelOptions;
use crate::device::kernel::script::{Fake, Fault};
use crate::device::{BlockDevice, CompareOutcome, DeviceError};

#[test]
fn a_conflict_ends_all_changes_on_all_paths() {
    for spec in [SDA, MPATHA] {
        let fake = if spec == SDA { Fake::plain() } else { Fake::multipath() };
        let device = reserving(&fake, spec);
        device.fencing().unwrap().register(key(1)).unwrap();
        device.write(0, &block(1)).unwrap();
        let paths = if spec == SDA { 1 } else { 2 };
        assert_eq!(fake.keys().iter().filter(|(_, k)| *k == key(1).value()).count(), paths);
        fake.preempt(key(1).value());
        fake.take_log();
        assert!(matches!(device.write(0, &vec![2; 8192]), Err(DeviceError::Fenced { .. })));
        assert!(matches!(swap(&device, 1, 2), Err(DeviceError::Fenced { .. })));
        assert!(matches!(device.discard(0, 4096), Err(DeviceError::Fenced { .. })));
        assert_eq!(fake.bytes(0), block(1));
        assert!(sent(&fake, SWAP).is_empty());
        device.read(0, &mut block(0)).unwrap();
    }
}

#[test]
fn registering_fencing_leaving() {
    let fake = Fake::multipath();
    let device = reserving(&fake, MPATHA);
    // A visitor on each path first, who leaves when he never becomes anybody.
    assert_eq!(fake.keys().len(), 2);
    assert!(
        open_with(&fake, MPATHA, KernelOptions { reservations: true, ..KernelOptions::default() })
            .is_err_and(|e| e.to_string().contains("another process of this machine"))
    );
    drop(device);
    until("the visitor left", || fake.keys().is_empty());
    let device = reserving(&fake, MPATHA);
    let fencing = device.fencing().unwrap();
    fencing.register(key(1)).unwrap();
    // Another host, by a nexus that is no path of ours.
    fencing.fence(key(2)).unwrap();
    fencing.register(key(3)).unwrap();
    assert_eq!(fake.keys(), [("sda".into(), key(3).value()), ("sdb".into(), key(3).value())]);
    fencing.unregister().unwrap();
    assert!(fake.keys().is_empty());
}

#[test]
fn a_returning_path_is_registered_before_it_is_used() {
    let fake = Fake::multipath();
    let device = reserving(&fake, MPATHA);
    device.fencing().unwrap().register(key(1)).unwrap();
    fake.fault("sda", SWAP, Fault::Dies);
    assert_eq!(swap(&device, 0, 1).unwrap(), CompareOutcome::Swapped);
    fake.take_log();
    // As arrays greet a new nexus; that is no reset, for the other path would have seen one.
    fake.attention("sda", 0x29, 0x00);
    fake.come_back("sda", false);
    until("it is registered", || fake.keys().len() == 2);
    until("it is used", || said(&device, "paths").matches("running, up").count() == 2);
    let log: Vec<u8> = fake.take_log().into_iter().filter(|(p, _)| p == "sda").map(|(_, o)| o).collect();
    let used = log.iter().position(|o| matches!(*o, SWAP | WRITE)).unwrap_or(log.len());
    assert!(log[..used].contains(&PR_OUT) && log[..used].contains(&TUR), "{log:x?}");
    assert_eq!(device.resets(), 0);
    for _ in 0..4 {
        device.write(0, &block(1)).unwrap();
    }
}

#[test]
fn a_returning_path_is_no_way_around_a_fence() {
    let fake = Fake::multipath();
    let device = reserving(&fake, MPATHA);
    device.fencing().unwrap().register(key(1)).unwrap();
    // Another host is registered, so the reservation stays.
    fake.disk("sdz", 9, "pci0/host9/target9:0:0/9:0:0:0");
    let other = reserving(&fake, "/dev/sdz");
    other.fencing().unwrap().register(key(2)).unwrap();
    fake.fault("sda", SWAP, Fault::Dies);
    swap(&device, 0, 1).unwrap();
    other.fencing().unwrap().fence(key(1)).unwrap();
    // Nothing else is sent meanwhile, so it is the look at the path that has to find out.
    fake.come_back("sda", false);
    until("it was looked at", || said(&device, "paths").matches("running, up").count() == 2);
    assert_eq!(fake.keys(), [("sdz".into(), key(2).value())]);
    assert!(matches!(device.write(0, &block(3)), Err(DeviceError::Fenced { .. })));
    assert!(matches!(swap(&device, 1, 2), Err(DeviceError::Fenced { .. })));
    assert_eq!(fake.bytes(0), block(1));
    // With one path only: a registration that is gone is a fence.
    let fake = Fake::plain();
    let device = reserving(&fake, SDA);
    device.fencing().unwrap().register(key(1)).unwrap();
    fake.fault("sda", WRITE, Fault::Dies);
    assert!(device.write(0, &block(1)).is_err());
    fake.come_back("sda", false);
    device.read(0, &mut block(0)).unwrap();
    assert!(matches!(device.write(0, &block(1)), Err(DeviceError::Fenced { .. })));
    // And one that the target has kept is none.
    let fake = Fake::plain();
    let device = reserving(&fake, SDA);
    device.fencing().unwrap().register(key(1)).unwrap();
    fake.fault("sda", WRITE, Fault::Dies);
    assert!(device.write(0, &block(1)).is_err());
    fake.come_back("sda", true);
    until("it serves", || device.write(0, &block(1)).is_ok());
}
