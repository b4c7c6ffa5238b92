//! The kernel's attributes of disks: small files, read one by one, believed as far as they make sense.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, makedev, minor};

/// The directory of a block device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockDir(PathBuf);

impl BlockDir {
    /// By device number. The link is followed, so that `..` of a partition is its disk.
    pub fn of(sysfs: &Path, number: u64) -> Option<BlockDir> {
        let link = sysfs.join(format!("dev/block/{}:{}", major(number), minor(number)));
        fs::canonicalize(link).ok().map(BlockDir)
    }

    /// By a link to it, such as those in `slaves` and `holders`.
    pub fn at(link: &Path) -> Option<BlockDir> {
        fs::canonicalize(link).ok().map(BlockDir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The kernel's name: "sda", "dm-3".
    pub fn name(&self) -> String {
        self.0.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub fn number(&self) -> Option<u64> {
        let text = self.text("dev")?;
        let (major, minor) = text.split_once(':')?;
        Some(makedev(major.parse().ok()?, minor.parse().ok()?))
    }

    pub fn has(&self, attribute: &str) -> bool {
        self.0.join(attribute).exists()
    }

    /// An attribute without the white space around it.
    pub fn text(&self, attribute: &str) -> Option<String> {
        text(&self.0.join(attribute))
    }

    pub fn number_of(&self, attribute: &str) -> Option<u64> {
        self.text(attribute)?.parse().ok()
    }

    /// The last part of what a link leads to: the name of a driver, of a subsystem.
    pub fn link_name(&self, link: &str) -> Option<String> {
        let target = fs::canonicalize(self.0.join(link)).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// Block devices in `slaves` or `holders`, in the order of their names.
    pub fn neighbours(&self, directory: &str) -> Vec<BlockDir> {
        let Ok(entries) = fs::read_dir(self.0.join(directory)) else { return Vec::new() };
        let mut links: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        links.sort();
        links.iter().filter_map(|link| BlockDir::at(link)).collect()
    }

    /// Where the SCSI disk hangs among the devices: ".../host3/session1/target3:0:0/3:0:0:0".
    pub fn scsi_device(&self) -> Option<PathBuf> {
        fs::canonicalize(self.0.join("device")).ok()
    }

    /// "running", "blocked", "transport-offline", "offline"; empty where there is no such disk any more.
    pub fn scsi_state(&self) -> String {
        self.text("device/state").unwrap_or_default()
    }
}

/// A small file without the white space around it.
pub fn text(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The ancestor of a device whose name begins with `prefix` and goes on with a digit.
pub fn ancestor<'a>(device: &'a Path, prefix: &str) -> Option<&'a Path> {
    device.ancestors().find(|path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    })
}
