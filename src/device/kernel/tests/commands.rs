//! What becomes of a command whose answer is late, lost or says "not now".

use std::sync::Arc;
use std::time::Duration;

use super::{FLUSH, MPATHA, READ, SDA, SWAP, WRITE, block, open, open_with, said, sent, swap};
use crate::device::kernel::script::{BLOCKS, Fake, Fault};
use crate::device::kernel::{KernelOptions, timing};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, Executed};
use crate::rt::Instant;

#[test]
fn reads_writes_swaps_flushes() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    let geometry = device.geometry();
    assert_eq!((geometry.logical_block_bytes, geometry.size_bytes), (512, BLOCKS * 512));
    assert!(geometry.volatile_cache);
    // More than one command, from memory that is not aligned.
    let data: Vec<u8> = (0..600 * 1024 + 1).map(|n| (n / 512) as u8).collect();
    device.write(4096, &data[1..]).unwrap();
    let mut back = vec![0; data.len()];
    device.read(4096, &mut back[1..]).unwrap();
    assert_eq!(back[1..], data[1..]);
    fake.take_log();
    assert_eq!(swap(&device, 0, 1).unwrap(), CompareOutcome::Swapped);
    assert_eq!(swap(&device, 0, 2).unwrap(), CompareOutcome::Miscompare);
    assert_eq!(fake.bytes(0), block(1));
    device.flush().unwrap();
    device.discard(4096, 4096).unwrap();
    device.write_zeroes(8192, 4096).unwrap();
    assert_eq!((fake.bytes(4096), fake.bytes(8192)), (block(0), block(0)));
    let log: Vec<u8> = fake.take_log().iter().map(|(_, code)| *code).collect();
    assert_eq!(log, [SWAP, SWAP, FLUSH, 0x42, 0x93]);
    assert!(matches!(device.write(100, &[0; 512]), Err(DeviceError::BadRange { .. })));
    assert!(matches!(device.read(BLOCKS * 512, &mut [0; 512]), Err(DeviceError::BadRange { .. })));
    assert_eq!(device.resets(), 0);
    assert_eq!(said(&device, "name"), "naa.60010203");
    assert!(
        said(&device, "paths").contains("sda at 0:0:0:0 (mpt3sas), running, up"),
        "{}",
        said(&device, "paths")
    );
    drop(device);
    let options = KernelOptions { read_only: true, ..KernelOptions::default() };
    assert!(open_with(&fake, SDA, options).unwrap().write(0, &[0; 512]).is_err());
}

#[test]
fn busy_states_are_waited_out_and_attentions_counted() {
    let fake = Fake::plain();
    // Found when it was opened: no reset since.
    fake.attention("sda", 0x29, 0x00);
    let device = open(&fake, SDA);
    assert_eq!(device.resets(), 0);
    for fault in [Fault::Status(0x08), Fault::Status(0x28), Fault::Check(2, 4, 1), Fault::Descriptor(2, 4, 4)]
    {
        fake.fault("sda", WRITE, fault.clone());
        device.write(0, &block(7)).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
        fake.fault("sda", SWAP, fault.clone());
        assert_eq!(swap(&device, 7, 7).unwrap(), CompareOutcome::Swapped, "{fault:?}");
    }
    // A reset shows at whatever comes next: a write, a read, a flush, a swap. The swap was not executed.
    fake.attention("sda", 0x29, 0x00);
    device.write(0, &block(1)).unwrap();
    assert_eq!(device.resets(), 1);
    fake.attention("sda", 0x29, 0x02);
    device.flush().unwrap();
    assert_eq!(device.resets(), 2);
    fake.attention("sda", 0x29, 0x00);
    device.read(0, &mut [0; 512]).unwrap();
    assert_eq!(device.resets(), 3);
    fake.attention("sda", 0x29, 0x00);
    let error = swap(&device, 1, 2).unwrap_err();
    assert_eq!((error.executed(), fake.bytes(0), device.resets()), (Executed::No, block(1), 4));
    // A path that was away says nothing of the cache, and is taken for the worst.
    fake.attention("sda", 0x29, 0x07);
    device.write(0, &block(1)).unwrap();
    assert_eq!(device.resets(), 5);
    // These are no resets; the list of units changed, the capacity changed.
    for (asc, ascq) in [(0x3F, 0x0E), (0x2A, 0x09)] {
        fake.attention("sda", asc, ascq);
        device.write(0, &block(1)).unwrap();
    }
    assert_eq!(device.resets(), 5);
    // Not ready in a way that does not pass.
    fake.fault("sda", WRITE, Fault::Check(2, 0x3A, 0));
    assert_eq!(device.write(0, &block(1)).unwrap_err().executed(), Executed::No);
}

#[test]
fn behind_a_hypervisor_an_attention_leaves_a_swap_undecided() {
    let fake = Fake::new();
    fake.disk("sda", 0, "pci0/virtio1/host0/target0:0:0/0:0:0:0");
    fake.adapter("pci0/virtio1/host0", "virtio_scsi", "off");
    let fake = Arc::new(fake);
    let device = open(&fake, SDA);
    fake.attention("sda", 0x29, 0x00);
    assert_eq!(swap(&device, 0, 1).unwrap_err().executed(), Executed::Maybe);
    assert!(said(&device, "attention").contains("hypervisor"));
}

#[test]
fn a_swap_whose_answer_is_lost_is_unknown_and_not_repeated() {
    for (byte, executed) in [(7, true), (7, false), (0xE, true), (1, true), (8, false)] {
        let fake = Fake::multipath();
        let device = open(&fake, MPATHA);
        fake.fault("sda", SWAP, Fault::Host { byte, executed });
        fake.take_log();
        let error = swap(&device, 0, 1).unwrap_err();
        assert_eq!(error.executed(), Executed::Maybe, "{byte}");
        assert_eq!(sent(&fake, SWAP), ["sda"]);
        // The block is read over another path, or over this one once it was looked at.
        let mut found = block(9);
        device.read(0, &mut found).unwrap();
        assert_eq!(found, block(u8::from(executed)));
        assert_eq!(device.resets(), 0, "another path stayed up");
    }
}

#[test]
fn a_swap_that_was_certainly_not_sent_goes_over_another_path() {
    for fault in
        [Fault::Dies, Fault::Errno(libc::ENODEV), Fault::Check(2, 4, 0x0B), Fault::Descriptor(2, 4, 0x0C)]
    {
        let fake = Fake::multipath();
        let device = open(&fake, MPATHA);
        fake.take_log();
        let dies = matches!(fault, Fault::Dies);
        fake.fault("sda", SWAP, fault);
        assert_eq!(swap(&device, 0, 1).unwrap(), CompareOutcome::Swapped);
        let over = sent(&fake, SWAP);
        // One that died stays dead; the others may be ready again by then.
        assert!(over.len() == 2 && over[0] == "sda" && (!dies || over[1] == "sdb"), "{over:?}");
    }
}

#[test]
fn nobody_waits_longer_than_he_said_for_a_swap_or_a_block() {
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", SWAP, Fault::Slow(Duration::from_millis(2500)));
    let since = Instant::now();
    let error = swap(&device, 0, 1).unwrap_err();
    assert!(error.may_come_later() && since.elapsed() < Duration::from_millis(1900), "{error}");
    // The path answers, so it serves again while the old command is still in the kernel.
    let mut found = block(9);
    device.read(0, &mut found).unwrap();
    assert_eq!(found, block(1));
    assert!(since.elapsed() < Duration::from_millis(2400));
    // A read of a block is asked again.
    fake.fault("sda", READ, Fault::Slow(Duration::from_millis(2500)));
    device.read(0, &mut found).unwrap();
    assert_eq!(device.resets(), 0);
}

#[test]
fn bulk_reads_leave_a_path_that_hangs() {
    let fake = Fake::multipath();
    let device = open(&fake, MPATHA);
    device.write(0, &vec![7; 65536]).unwrap();
    for path in ["sda", "sdb"] {
        fake.fault(path, READ, Fault::Slow(Duration::from_secs(9)));
    }
    // Both are slow once, and the read is asked a third time.
    let (since, mut found) = (Instant::now(), vec![0; 65536]);
    device.read(0, &mut found).unwrap();
    assert!(found.iter().all(|b| *b == 7) && since.elapsed() >= Duration::from_secs(9));
    assert!(since.elapsed() < Duration::from_secs(14));
}

#[test]
fn a_write_whose_path_fails_is_given_back_to_who_knows_the_lease() {
    let fake = Fake::multipath();
    let device = open(&fake, MPATHA);
    for path in ["sda", "sdb"] {
        fake.fault(path, WRITE, Fault::Host { byte: 0xE, executed: false });
    }
    let since = Instant::now();
    let error = device.write(0, &block(1)).unwrap_err();
    assert!(error.is_to_be_made_again() && error.executed() == Executed::Maybe, "{error}");
    // The target had its time to execute or drop what it had taken in.
    assert!(since.elapsed() >= timing::TARGET);
    // Aborted by the kernel: nothing to wait for.
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", WRITE, Fault::Host { byte: 3, executed: false });
    let since = Instant::now();
    assert!(device.write(0, &block(1)).unwrap_err().is_to_be_made_again());
    assert!(since.elapsed() < timing::TARGET);
    device.write(0, &block(1)).unwrap();
    // Not sent: tried again, and nothing was lost.
    fake.fault("sda", WRITE, Fault::Errno(libc::ENOMEM));
    device.write(0, &block(2)).unwrap();
    assert_eq!(device.resets(), 0);
}
