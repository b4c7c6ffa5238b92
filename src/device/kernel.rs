//! The `scsi` backend: a LUN as a disk of this kernel (`/dev/sdX`, `/dev/disk/by-id/...`) or a multipath device over such
//! disks (`/dev/mapper/mpathX`), whatever carries it: FC, SAS, iSCSI, a virtual machine's passthrough.
//!
//! **Every command is a SCSI command of ours, sent by SG_IO to the disk of one path**, data included. Data by pread and
//! pwrite, through `sd` and device-mapper, would be as fast and would break three rules that bind:
//!
//! * *Resets are counted.* `sd` repeats what met a unit attention and tells nobody, so a write cache that a restarted
//!   array forgot would stay unnoticed, and the next flush would prove what is not there.
//! * *What may come later is known.* `sd` repeats a write five times, and device-mapper repeats it on another path while
//!   the first one may still be on its way: it would land on what was written since. SG_IO is sent once
//!   (`scmd->allowed = 0`; a target's BUSY is the exception, and that was not executed).
//! * *The hold time is known.* Nothing of ours waits in a multipath queue, so `queue_if_no_path` holds back no write of
//!   a host that the others take for dead. What is left is `hold`'s sum.
//!
//! Invariants
//!
//! 1. **Nobody waits for the kernel longer than he said**, where it matters: SG_IO's own time-out is at least 7 s and
//!    means nothing to some drivers. Locks, beats and reads of a block are given to threads that may stay behind
//!    (`crew`); their buffers stay with them.
//! 2. **A command whose ioctl has returned won't leave this machine any more.** One that the target took in is executed
//!    or dropped within [`timing::TARGET`]. One that did not return may come as long as `hold` says.
//! 3. **Compare-and-write goes to one path and is never repeated** unless it was certainly not executed.
//! 4. **A path is looked at before it is used**, first or again: is it this unit, is it ready, is this host registered
//!    there. It is registered only after another path has shown that this host is not fenced, and used only
//!    after that path has shown it once more (`paths`).
//! 5. **Page cache is not used.** Others' is dropped when the device is opened; ours does not exist.
//!
//! What can't be seen from here: a unit attention that another program drew on the same path, such as the path checker
//! of multipathd. Each path gets its own, the beat asks every second on one of them, and a host whose slot shows an
//! older beat than it wrote knows as well; the rest is a risk that docs/arrays.md names.
//!
//! Not for: NVMe, partitions, anything that maps blocks (see `classify`), page caches of other programs.

mod answer;
mod classify;
mod crew;
mod device;
pub mod door;
mod fencing;
mod hold;
mod path;
mod paths;
#[cfg(test)]
mod script;
mod sysfs;
#[cfg(test)]
mod tests;
pub mod timing;

pub use device::{KernelDevice, KernelOptions};
pub use door::Linux;
pub use hold::OVERRIDE as HOLD_OVERRIDE;

/// Is the node with this device number for this backend, to be used or refused, rather than for the `file` backend?
pub fn is_meant(kernel: &dyn door::Kernel, path: &std::path::Path) -> bool {
    classify::is_meant(kernel, path)
}
