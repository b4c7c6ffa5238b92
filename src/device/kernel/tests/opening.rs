//! What is refused when a disk is opened, and what is known of it then.

use std::sync::Arc;
use std::time::Duration;

use nix::sys::stat::makedev;

use super::{SDA, open, open_with, refusal, said};
use crate::device::kernel::script::Fake;
use crate::device::kernel::{KernelDevice, KernelOptions, is_meant};
use crate::device::{BlockDevice, OpenError};

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
    assert!(!is_meant(&loops, "/dev/loop0".as_ref()));
    assert!(is_meant(&*fake, SDA.as_ref()) && is_meant(&*fake, "/dev/nvme0n1".as_ref()));
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
