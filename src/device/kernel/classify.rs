//! What a block device is: a SCSI disk, a multipath device over SCSI disks, or something that this backend refuses.
//!
//! The rule: SCSI commands address blocks of the *disk*. So whatever maps blocks elsewhere is refused (partitions, logical
//! volumes, encryption, RAID), because a compare-and-write sent below it would hit other blocks, or blocks that are
//! moved meanwhile. A multipath device maps nothing. Whatever has no SCSI commands is refused, because there is no
//! compare-and-write that every host would meet.

use std::path::Path;

use nix::sys::stat::major;

use super::door::Kernel;
use super::sysfs::BlockDir;

/// Major number of loop devices, which are the `file` backend's.
const LOOP_MAJOR: u64 = 7;

/// A disk: one path to a unit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    pub dir: BlockDir,
    pub name: String,
    pub number: u64,
}

/// What this backend can use.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// The named device: the disk itself, or the multipath device.
    pub top: BlockDir,
    /// Name of the multipath device, if it is one.
    pub multipath: Option<String>,
    pub disks: Vec<Disk>,
}

/// See `super::is_meant`.
pub fn is_meant(kernel: &dyn Kernel, path: &Path) -> bool {
    let Ok(Some(number)) = kernel.block_device(path) else { return false };
    if major(number) == LOOP_MAJOR {
        return false;
    }
    // Partitions of loop devices are refused there, in words of their own.
    let of_loop = BlockDir::of(kernel.sysfs(), number)
        .and_then(|dir| Some(dir.has("partition") && BlockDir::at(dir.path().parent()?)?.has("loop")));
    of_loop != Some(true)
}

/// What the node with this number is, or why it is refused.
pub fn classify(kernel: &dyn Kernel, number: u64) -> Result<Found, String> {
    let Some(dir) = BlockDir::of(kernel.sysfs(), number) else {
        return Err("the kernel shows no such block device (is sysfs mounted?)".into());
    };
    if dir.has("partition") {
        return Err(
            "it is a partition, and SCSI commands address the whole disk; give LunFS the whole disk".into()
        );
    }
    if dir.has("dm") {
        return device_mapper(dir);
    }
    if dir.has("md") {
        return Err(
            "it is a RAID of this kernel, which other hosts don't take part in; give LunFS a LUN whose \
                    redundancy is the array's"
                .into(),
        );
    }
    let name = dir.name();
    if name.starts_with("nvme") {
        return Err(
            "it is an NVMe namespace, and there is no way to send its compare-and-write (a fused command) \
                    from user space; LunFS needs a SCSI LUN"
                .into(),
        );
    }
    if dir.link_name("device/driver").as_deref() == Some("virtio_blk") {
        return Err("it is a virtio-blk disk, which passes no SCSI commands on; give the virtual machine virtio-scsi \
                    with the whole LUN passed through (scsi-block), or use iscsi:// inside it"
            .into());
    }
    let disk = scsi_disk(&dir)?;
    if let Some(holder) = dir.neighbours("holders").first() {
        let of = holder.text("dm/name").unwrap_or_else(|| holder.name());
        return Err(match is_multipath(holder) {
            true => format!("it is one path of a multipath device; give LunFS /dev/mapper/{of}"),
            false => format!("it is in use by '{of}', which maps it"),
        });
    }
    Ok(Found { top: dir, multipath: None, disks: vec![disk] })
}

fn is_multipath(dir: &BlockDir) -> bool {
    dir.text("dm/uuid").is_some_and(|uuid| uuid.starts_with("mpath-"))
}

fn device_mapper(dir: BlockDir) -> Result<Found, String> {
    let uuid = dir.text("dm/uuid").unwrap_or_default();
    let name = dir.text("dm/name").unwrap_or_else(|| dir.name());
    if !is_multipath(&dir) {
        let what = match uuid.split('-').next().unwrap_or_default() {
            "LVM" => "a logical volume",
            "CRYPT" => "an encrypted mapping",
            part if part.starts_with("part") => "a partition",
            _ => "a device-mapper device",
        };
        return Err(format!(
            "it is {what}, which maps blocks to others, and SCSI commands would meet the wrong ones; give LunFS the \
             whole LUN"
        ));
    }
    if let Some(holder) = dir.neighbours("holders").first() {
        let of = holder.text("dm/name").unwrap_or_else(|| holder.name());
        return Err(format!("it is in use by '{of}', which maps it"));
    }
    let slaves = dir.neighbours("slaves");
    if slaves.is_empty() {
        return Err("it is a multipath device without a path".into());
    }
    let disks = slaves
        .iter()
        .map(|slave| scsi_disk(slave).map_err(|why| format!("its path {}: {why}", slave.name())))
        .collect::<Result<Vec<_>, String>>()?;
    Ok(Found { top: dir, multipath: Some(name), disks })
}

/// The paths that a multipath device has now; those that are no SCSI disks, or vanish, are left out.
pub fn paths_now(top: &BlockDir) -> Vec<Disk> {
    top.neighbours("slaves").iter().filter_map(|slave| scsi_disk(slave).ok()).collect()
}

fn scsi_disk(dir: &BlockDir) -> Result<Disk, String> {
    if dir.link_name("device/driver").as_deref() != Some("sd") {
        return Err(
            "it is no SCSI disk, so it has no compare-and-write that other hosts would meet; use a LUN, a \
                    regular file on a local filesystem, or a loop device over one"
                .into(),
        );
    }
    let number = dir.number().ok_or("the kernel does not say its device number")?;
    Ok(Disk { name: dir.name(), number, dir: dir.clone() })
}
