//! Attaches a /dev/fuse descriptor to a directory and takes it off again.
//!
//! Root mounts by mount(2) itself, so that the source is exactly the string the administrator gave
//! (`umount SOURCE` and `findmnt -S SOURCE` look it up) and no foreign helper has a say. Other users go
//! through fusermount3, which the transport's library calls. The type is always `fuse`, subtype `lunfs`:
//! with `fuseblk` two hosts on one machine would share one superblock if they used the same device node.

use std::ffi::{CString, OsStr};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::mountinfo;

/// What every mount can be told, whatever its filesystem.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountFlags {
    pub read_only: bool,
    pub no_dev: bool,
    pub no_suid: bool,
    pub no_exec: bool,
    pub no_atime: bool,
    pub no_dir_atime: bool,
    pub sync: bool,
    pub dir_sync: bool,
}

/// How the mount shows to the system.
#[derive(Clone, Debug, Default)]
pub struct MountSettings {
    /// The source string as the administrator gave it.
    pub source: std::ffi::OsString,
    /// Absolute, without symbolic links.
    pub mountpoint: PathBuf,
    pub flags: MountFlags,
}

impl MountFlags {
    fn bits(&self) -> MsFlags {
        let mut flags = MsFlags::empty();
        flags.set(MsFlags::MS_RDONLY, self.read_only);
        flags.set(MsFlags::MS_NODEV, self.no_dev);
        flags.set(MsFlags::MS_NOSUID, self.no_suid);
        flags.set(MsFlags::MS_NOEXEC, self.no_exec);
        flags.set(MsFlags::MS_NOATIME, self.no_atime);
        flags.set(MsFlags::MS_NODIRATIME, self.no_dir_atime);
        flags.set(MsFlags::MS_SYNCHRONOUS, self.sync);
        flags.set(MsFlags::MS_DIRSYNC, self.dir_sync);
        flags
    }
}

/// Opens /dev/fuse and mounts it; the kernel's INIT request waits in the returned descriptor.
pub(crate) fn mount_as_root(settings: &MountSettings) -> io::Result<OwnedFd> {
    let device: OwnedFd = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(|e| io::Error::new(e.kind(), format!("cannot open /dev/fuse: {e}")))?
        .into();
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        device.as_raw_fd()
    );
    mount(
        Some(c_string(&settings.source)?.as_c_str()),
        &settings.mountpoint,
        Some("fuse.lunfs"),
        settings.flags.bits(),
        Some(data.as_str()),
    )?;
    Ok(device)
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// One try to take the mount off. `Ok(false)`: it is busy.
pub fn unmount(mountpoint: &Path, device: (u32, u32), lazily: bool) -> io::Result<bool> {
    match mountinfo::at(mountpoint)? {
        Some(top) if top.device == device => {}
        Some(_) => return Ok(false), // something else was mounted over it
        None => return Ok(true),
    }
    let flags = if lazily { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    match umount2(mountpoint, flags) {
        Ok(()) => Ok(true),
        Err(Errno::EBUSY) => Ok(false),
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(true),
        Err(Errno::EPERM) => unmount_by_helper(mountpoint, lazily),
        Err(errno) => Err(errno.into()),
    }
}

fn unmount_by_helper(mountpoint: &Path, lazily: bool) -> io::Result<bool> {
    let mut command = std::process::Command::new("fusermount3");
    command.arg(if lazily { "-uz" } else { "-u" }).arg("-q").arg("--").arg(mountpoint);
    Ok(command.status()?.success())
}

/// Aborts the connection by unmounting with force; the fallback where fusectl can't be reached.
pub(crate) fn unmount_by_force(mountpoint: &Path, device: (u32, u32)) {
    let ours = mountinfo::at(mountpoint).ok().flatten().is_some_and(|top| top.device == device);
    if ours && let Err(errno) = umount2(mountpoint, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH) {
        log::error!("{} could not be unmounted by force: {errno}", mountpoint.display());
    }
}

/// Lets the kernel read ahead in pieces of this size; its default for FUSE is 128 KiB. Best effort.
pub(crate) fn raise_read_ahead(device: (u32, u32), kib: u32) {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.0, device.1);
    if let Err(error) = std::fs::write(&path, kib.to_string()) {
        log::debug!("read-ahead stays as it is: {path}: {error}");
    }
}
