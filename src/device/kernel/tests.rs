//! The backend on a kernel of its own (`script`): what is refused, what is sent where, and what becomes of it when a path
//! fails at the worst moment.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::makedev;

use super::script::{BLOCKS, Fake, Fault};
use super::{KernelDevice, KernelOptions};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, Executed, FencingKey, OpenError};
use crate::rt::{Instant, sleep};
use crate::types::{Incarnation, Owner, Slot};

const TUR: u8 = 0x00;
const SWAP: u8 = 0x89;
const WRITE: u8 = 0x8A;
const READ: u8 = 0x88;
const FLUSH: u8 = 0x91;
const PR_OUT: u8 = 0x5F;
const SDA: &str = "/dev/sda";
const MPATHA: &str = "/dev/mapper/mpatha";

fn open_with(fake: &Arc<Fake>, spec: &str, options: KernelOptions) -> Result<KernelDevice, OpenError> {
    KernelDevice::open(fake.clone(), spec, &options)
}

fn open(fake: &Arc<Fake>, spec: &str) -> KernelDevice {
    open_with(fake, spec, KernelOptions::default()).unwrap()
}

fn reserving(fake: &Arc<Fake>, spec: &str) -> KernelDevice {
    open_with(fake, spec, KernelOptions { reservations: true, ..KernelOptions::default() }).unwrap()
}

fn refusal(fake: &Arc<Fake>, spec: &str) -> String {
    match open_with(fake, spec, KernelOptions { mount: true, ..KernelOptions::default() }) {
        Ok(_) => panic!("{spec} was opened"),
        Err(e) => e.to_string(),
    }
}

fn block(n: u8) -> Vec<u8> {
    vec![n; 512]
}

fn swap(device: &KernelDevice, from: u8, to: u8) -> Result<CompareOutcome, DeviceError> {
    device.compare_and_write(0, &block(from), &block(to))
}

fn key(life: u64) -> FencingKey {
    FencingKey::of(Owner { slot: Slot(3), incarnation: Incarnation(life) })
}

/// The paths over which this command went.
fn sent(fake: &Fake, opcode: u8) -> Vec<String> {
    fake.take_log().into_iter().filter(|(_, code)| *code == opcode).map(|(path, _)| path).collect()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(20), "never: {what}");
        sleep(Duration::from_millis(5));
    }
}

fn said(device: &KernelDevice, what: &str) -> String {
    device.about().into_iter().find(|(name, _)| *name == what).unwrap().1
}

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
fn whatever_maps_blocks_or_has_no_scsi_commands_is_refused() {
    let fake = Fake::new();
    let sda = fake.disk("sda", 0, "pci0/host0/target0:0:0/0:0:0:0");
    fake.adapter("pci0/host0", "mpt3sas", "5");
    let part = fake.block("pci0/host0/target0:0:0/0:0:0:0/block/sda/sda1", makedev(8, 1));
    fake.attribute(&part.join("partition"), "1");
    fake.node("/dev/sda1", makedev(8, 1));
    let lv = fake.mapping("dm-1", 1, "LVM-abc", "vg-lv");
    fake.slave(&lv, &sda);
    fake.mapping("dm-2", 2, "CRYPT-LUKS2-abc", "secret");
    fake.mapping("dm-3", 3, "part1-mpath-3600", "mpatha-part1");
    fake.mapping("dm-4", 4, "mpath-3601", "mpathb");
    let virtio = fake.block("virtio0/block/vda", makedev(252, 0));
    let driver = fake.devices().join("virtio_blk");
    std::fs::create_dir_all(&driver).unwrap();
    std::os::unix::fs::symlink(&driver, fake.devices().join("virtio0/driver")).unwrap();
    std::os::unix::fs::symlink(fake.devices().join("virtio0"), virtio.join("device")).unwrap();
    fake.node("/dev/vda", makedev(252, 0));
    fake.block("nvme0/nvme0n1", makedev(259, 0));
    fake.node("/dev/nvme0n1", makedev(259, 0));
    let raid = fake.block("virtual/block/md0", makedev(9, 0));
    std::fs::create_dir_all(raid.join("md")).unwrap();
    fake.node("/dev/md0", makedev(9, 0));
    fake.block("virtual/block/nbd0", makedev(43, 0));
    fake.node("/dev/nbd0", makedev(43, 0));
    let fake = Arc::new(fake);
    for (spec, words) in [
        ("/dev/sda1", "it is a partition"),
        (SDA, "in use by 'vg-lv'"),
        ("/dev/mapper/vg-lv", "a logical volume"),
        ("/dev/mapper/secret", "an encrypted mapping"),
        ("/dev/mapper/mpatha-part1", "it is a partition"),
        ("/dev/mapper/mpathb", "without a path"),
        ("/dev/vda", "virtio-scsi"),
        ("/dev/nvme0n1", "NVMe"),
        ("/dev/md0", "RAID"),
        ("/dev/nbd0", "no SCSI disk"),
    ] {
        let text = refusal(&fake, spec);
        assert!(text.contains(words), "{spec}: {text}");
    }
    assert!(fake.take_log().is_empty(), "a command was sent to what was refused");
    let text = refusal(&Fake::multipath(), SDA);
    assert!(text.contains("one path of a multipath device; give LunFS /dev/mapper/mpatha"), "{text}");
    let loops = Fake::new();
    loops.block("virtual/block/loop0", makedev(7, 0));
    loops.node("/dev/loop0", makedev(7, 0));
    assert!(!super::is_meant(&loops, "/dev/loop0".as_ref()));
    assert!(super::is_meant(&*fake, SDA.as_ref()) && super::is_meant(&*fake, "/dev/nvme0n1".as_ref()));
}

#[test]
fn exclusive_and_write_protected() {
    let fake = Fake::plain();
    let alone = KernelOptions { exclusive: true, ..KernelOptions::default() };
    let held = open_with(&fake, SDA, alone.clone()).unwrap();
    assert!(matches!(open_with(&fake, SDA, alone), Err(OpenError::InUse { .. })));
    drop(held);
    fake.attribute(&fake.devices().join("pci0/host0/target0:0:0/0:0:0:0/block/sda/ro"), "1");
    assert!(matches!(open_with(&fake, SDA, KernelOptions::default()), Err(OpenError::ReadOnly { .. })));
    let asked =
        KernelOptions { logical_block_bytes: Some(4096), read_only: true, ..KernelOptions::default() };
    assert!(matches!(open_with(&fake, SDA, asked), Err(OpenError::LogicalBlockUnmet { needed: 512, .. })));
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
    assert!(since.elapsed() >= super::timing::TARGET);
    // Aborted by the kernel: nothing to wait for.
    let fake = Fake::plain();
    let device = open(&fake, SDA);
    fake.fault("sda", WRITE, Fault::Host { byte: 3, executed: false });
    let since = Instant::now();
    assert!(device.write(0, &block(1)).unwrap_err().is_to_be_made_again());
    assert!(since.elapsed() < super::timing::TARGET);
    device.write(0, &block(1)).unwrap();
    // Not sent: tried again, and nothing was lost.
    fake.fault("sda", WRITE, Fault::Errno(libc::ENOMEM));
    device.write(0, &block(2)).unwrap();
    assert_eq!(device.resets(), 0);
}

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

#[test]
fn the_hold_time_follows_from_the_settings() {
    let seconds = |device: &KernelDevice| device.geometry().hold_time.as_secs();
    let fake = Fake::plain();
    // 19 of its own, twice 30 for others' time-outs, 5 of eh_deadline and 10 for the last question.
    assert_eq!(seconds(&open(&fake, SDA)), 19 + 2 * (30 + 5 + 10));
    let device = fake.devices().join("pci0/host0/target0:0:0/0:0:0:0");
    fake.attribute(&device.join("timeout"), "7");
    fake.attribute(&device.join("eh_timeout"), "2");
    assert_eq!(seconds(&open(&fake, SDA)), 19 + 2 * (7 + 5 + 2));
    fake.adapter("pci0/host0", "mpt3sas", "off");
    assert_eq!(seconds(&open(&fake, SDA)), 19 + 2 * (7 + 16));
    let known = KernelOptions { hold_time: Some(Duration::from_secs(9)), ..KernelOptions::default() };
    assert_eq!(seconds(&open_with(&fake, SDA, known).unwrap()), 9);
    // What keeps writes while the path is away.
    let iscsi = Fake::new();
    iscsi.disk("sda", 0, "platform/host3/session1/target3:0:0/3:0:0:1");
    iscsi.adapter("platform/host3", "iscsi_tcp", "5");
    let tmo = iscsi.devices().join("platform/host3/session1/iscsi_session/session1/recovery_tmo");
    iscsi.attribute(&tmo, "120");
    let iscsi = Arc::new(iscsi);
    let device = open(&iscsi, SDA);
    assert_eq!(seconds(&device), 19 + 120 + 90);
    assert!(said(&device, "attention").contains("229 s"), "{}", said(&device, "attention"));
    assert!(said(&device, "kernel settings").contains("recovery_tmo 120 s"));
    iscsi.attribute(&tmo, "-1");
    assert!(refusal(&iscsi, SDA).contains("recovery_tmo for ever"));
    // A tool may look at it all the same.
    open(&iscsi, SDA);
    let fc = Fake::new();
    fc.disk("sda", 0, "pci0/host4/rport-4:0-1/target4:0:0/4:0:0:1");
    fc.adapter("pci0/host4", "lpfc", "5");
    let rport = fc.devices().join("pci0/host4/rport-4:0-1/fc_remote_ports/rport-4:0-1");
    fc.attribute(&rport.join("fast_io_fail_tmo"), "5");
    fc.attribute(&rport.join("dev_loss_tmo"), "2147483647");
    let fc = Arc::new(fc);
    assert_eq!(seconds(&open(&fc, SDA)), 19 + 5 + 90);
    fc.attribute(&rport.join("fast_io_fail_tmo"), "off");
    assert!(refusal(&fc, SDA).contains("dev_loss_tmo for ever"));
}
