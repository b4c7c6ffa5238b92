//! From what a person typed to an open device: picks the backend, and refuses with a clear sentence
//! rather than falling back to something weaker.
//!
//! The rule: an *emulated* compare-and-write is used only where everybody who can reach the bytes is
//! on this machine and meets our locks, that is for regular files on local filesystems and for loop
//! devices over such files. Everything else needs a real one.

use std::fs::File;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::file::{FileDevice, FileOptions, identify, is_loop_device};
use super::kernel::{self, KernelDevice, KernelOptions, Linux};
use super::{BlockDevice, OpenError, iscsi};

/// How to open a device.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    pub read_only: bool,
    /// The logical block of a regular file, 512 or 4096 bytes. `None`: what the device has.
    pub logical_block_bytes: Option<u32>,
    /// Creates a missing regular file with, or grows an existing one to, this many bytes.
    pub create_size: Option<u64>,
    /// Refuses if the device is mounted or open elsewhere on this machine, and keeps others out
    /// while it is open: for mkfs and for an exclusive fsck. It says nothing about other machines.
    pub exclusive: bool,
    /// The longest an emulated compare-and-write waits for its block. `None`: five seconds.
    pub swap_deadline: Option<Duration>,
    /// Identity of the host that mounts; `None` for a tool. The names of its sessions with a target follow from it.
    pub host: Option<[u8; 16]>,
    /// Offer a LUN's reservations. Regular files have an emulated fence without being asked.
    pub reservations: bool,
}

/// Opens the device that `spec` names: a path, or `iscsi://portal/target/lun`.
pub fn open_device(spec: &str, options: OpenOptions) -> Result<Arc<dyn BlockDevice>, OpenError> {
    if iscsi::Target::is_meant(spec) {
        return open_iscsi(spec, &options);
    }
    if kernel::is_meant(&Linux::default(), Path::new(spec)) {
        return open_kernel(spec, &options);
    }
    let defaults = FileOptions::default();
    let options = FileOptions {
        read_only: options.read_only,
        logical_block_bytes: options.logical_block_bytes,
        create_size: options.create_size,
        exclusive: options.exclusive,
        swap_deadline: options.swap_deadline.unwrap_or(defaults.swap_deadline),
    };
    Ok(Arc::new(FileDevice::open(Path::new(spec), &options)?))
}

fn open_kernel(spec: &str, options: &OpenOptions) -> Result<Arc<dyn BlockDevice>, OpenError> {
    if options.create_size.is_some() {
        return Err(OpenError::FixedSize { spec: spec.into() });
    }
    let known = std::env::var(kernel::HOLD_OVERRIDE).ok();
    let hold_time = match known.as_deref().map(str::parse) {
        None => None,
        Some(Ok(seconds)) => Some(Duration::from_secs(seconds)),
        Some(Err(_)) => {
            let why = format!("{} is a number of seconds", kernel::HOLD_OVERRIDE);
            return Err(OpenError::Kernel { spec: spec.into(), why });
        }
    };
    let options = KernelOptions {
        read_only: options.read_only,
        logical_block_bytes: options.logical_block_bytes,
        mount: options.host.is_some(),
        exclusive: options.exclusive,
        reservations: options.reservations,
        hold_time,
    };
    Ok(Arc::new(KernelDevice::open(Arc::new(Linux::default()), spec, &options)?))
}

#[cfg(all(feature = "iscsi", libiscsi))]
fn open_iscsi(spec: &str, options: &OpenOptions) -> Result<Arc<dyn BlockDevice>, OpenError> {
    if options.create_size.is_some() {
        return Err(OpenError::FixedSize { spec: iscsi::without_password(spec) });
    }
    let options = iscsi::IscsiOptions {
        read_only: options.read_only,
        logical_block_bytes: options.logical_block_bytes,
        host: options.host,
        reservations: options.reservations,
    };
    Ok(Arc::new(iscsi::IscsiDevice::open(spec, &options)?))
}

#[cfg(not(all(feature = "iscsi", libiscsi)))]
fn open_iscsi(spec: &str, _: &OpenOptions) -> Result<Arc<dyn BlockDevice>, OpenError> {
    Err(OpenError::NoIscsiBackend { spec: iscsi::without_password(spec) })
}

/// A device's name as it may be shown, logged and kept: without a password.
pub fn shown(spec: &str) -> String {
    iscsi::without_password(spec)
}

/// Which bytes a spec names, so that two specs can be told to be the same device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceIdentity {
    /// Device number of the filesystem that holds the file, or of the block device itself.
    pub device: u64,
    /// Inode number of the file; zero for a block device that stands for itself.
    pub inode: u64,
    /// Byte of the file at which the device begins (a loop device can have an offset).
    pub base_bytes: u64,
    /// Device number of the node that was named, if it was one.
    pub node: Option<u64>,
}

impl DeviceIdentity {
    /// Do both name the same bytes, perhaps by different nodes (two loop devices over one file)?
    pub fn same_bytes(&self, other: &DeviceIdentity) -> bool {
        (self.device, self.inode, self.base_bytes) == (other.device, other.inode, other.base_bytes)
    }

    /// Do both name the same node or the same file? The kernel keeps one fuseblk mount per node.
    pub fn same_node(&self, other: &DeviceIdentity) -> bool {
        self.same_bytes(other) && self.node == other.node
    }
}

/// Finds out what `spec` names without using it. Works for block devices that
/// [`open_device`] refuses, too: those stand for themselves and are not even opened.
pub fn device_identity(spec: &str) -> Result<DeviceIdentity, OpenError> {
    if iscsi::Target::is_meant(spec) {
        let why = "it is no file".into();
        return Err(OpenError::Iscsi { spec: iscsi::without_password(spec), why });
    }
    let fail = |what| move |source| OpenError::Io { spec: spec.into(), what, source };
    let meta = std::fs::metadata(spec).map_err(fail("stat"))?;
    if meta.file_type().is_block_device() && !is_loop_device(meta.rdev()) {
        let node = meta.rdev();
        return Ok(DeviceIdentity { device: node, inode: 0, base_bytes: 0, node: Some(node) });
    }
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(spec).map_err(fail("open"))?;
    let (device, inode, base_bytes, node) = identify(spec, &file)?;
    Ok(DeviceIdentity { device, inode, base_bytes, node })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(spec: &str) -> String {
        match open_device(spec, OpenOptions::default()) {
            Ok(_) => panic!("{spec} was opened"),
            Err(err) => err.to_string(),
        }
    }

    #[test]
    fn refusals_are_one_clear_sentence() {
        let text = refusal("iscsi://anna%secret@10.0.0.1/iqn.2026-01.org.example:lun");
        let wanted = if iscsi::AVAILABLE { "the form is" } else { "built without iSCSI" };
        assert!(text.contains(wanted) && !text.contains("secret"), "{text}");
        assert!(refusal("/dev/null").contains("neither a regular file nor a block device"));
        assert!(refusal("/").contains("neither a regular file nor a block device"));
        assert!(refusal("/nonexistent/volume").contains("No such file"));
    }

    #[test]
    fn a_hard_link_is_the_same_device() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        std::fs::write(&a, [0; 4096]).unwrap();
        std::fs::hard_link(&a, &b).unwrap();
        std::fs::write(&c, [0; 4096]).unwrap();
        let identity = |p: &Path| device_identity(p.to_str().unwrap()).unwrap();
        assert!(identity(&a).same_bytes(&identity(&b)));
        assert!(identity(&a).same_node(&identity(&b)));
        assert!(!identity(&a).same_bytes(&identity(&c)));
    }

    #[test]
    fn creates_grows_and_never_shrinks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        let spec = path.to_str().unwrap();
        let sized = |size| OpenOptions { create_size: Some(size), ..OpenOptions::default() };
        assert!(refusal(spec).contains("No such file"));
        assert_eq!(open_device(spec, sized(1 << 20)).unwrap().geometry().size_bytes, 1 << 20);
        assert_eq!(open_device(spec, sized(1 << 19)).unwrap().geometry().size_bytes, 1 << 20);
        assert_eq!(open_device(spec, sized(1 << 21)).unwrap().geometry().size_bytes, 1 << 21);
    }

    #[test]
    fn exclusive_means_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volume");
        std::fs::write(&path, [0; 8192]).unwrap();
        let spec = path.to_str().unwrap();
        let alone = OpenOptions { exclusive: true, ..OpenOptions::default() };
        let shared = open_device(spec, OpenOptions::default()).unwrap();
        assert!(matches!(open_device(spec, alone.clone()), Err(OpenError::InUse { .. })));
        drop(shared);
        let held = open_device(spec, alone).unwrap();
        assert!(matches!(open_device(spec, OpenOptions::default()), Err(OpenError::InUse { .. })));
        drop(held);
    }
}
