//! Is the device in use on this machine: mounted, used for swapping, under a loop device or another
//! block device?
//!
//! Everything is compared by device and inode numbers, because one device has many names. A table that
//! can't be read counts as empty: these checks protect from mistakes, and the exclusive open of the device
//! and the watch of its heartbeats stand behind them.
//!
//! Not for: hosts on other machines ([`super::preflight`]).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// How the device is used. `--force` does not help: these uses can be ended.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum InUse {
    #[error("{} is mounted on {}", .name.display(), .mount_point.display())]
    Mounted { name: PathBuf, mount_point: PathBuf },
    #[error("{} is used for swapping", .name.display())]
    Swap { name: PathBuf },
    #[error("{} is the backing file of {}", .name.display(), .device.display())]
    LoopBacking { name: PathBuf, device: PathBuf },
    #[error("{} is used by {}", .name.display(), .holder)]
    Held { name: PathBuf, holder: String },
}

/// What a path names: a block device by number, or a file by filesystem and inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Thing {
    Device(u64),
    File(u64, u64),
}

/// The first use of `path` on this machine that was found.
pub fn in_use(path: &Path) -> Option<InUse> {
    let whole = thing_at(path)?;
    let mut names = vec![(path.to_path_buf(), whole)];
    if let Thing::Device(number) = whole {
        if let Some(holder) = holders(number).into_iter().next() {
            return Some(InUse::Held { name: path.to_path_buf(), holder });
        }
        for (name, partition) in partitions(number) {
            if let Some(holder) = holders(partition).into_iter().next() {
                return Some(InUse::Held { name, holder });
            }
            names.push((name, Thing::Device(partition)));
        }
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for (name, thing) in names {
        if let Some(mount_point) = mounts.lines().find_map(|line| mounted_by(line, thing)) {
            return Some(InUse::Mounted { name, mount_point });
        }
        let swapped = |line: &str| line.split_whitespace().next().and_then(|p| thing_at(&unescape(p)));
        if swaps.lines().skip(1).any(|line| swapped(line) == Some(thing)) {
            return Some(InUse::Swap { name });
        }
        if let Some(device) = loop_over(thing) {
            return Some(InUse::LoopBacking { name, device });
        }
    }
    None
}

fn thing_at(path: &Path) -> Option<Thing> {
    let meta = fs::metadata(path).ok()?;
    Some(match meta.file_type().is_block_device() {
        true => Thing::Device(meta.rdev()),
        false => Thing::File(meta.dev(), meta.ino()),
    })
}

/// The mount point, if this line of mountinfo is a mount of `thing`: by the number of the mounted
/// filesystem, or by its source (filesystems with numbers of their own, FUSE over a file).
fn mounted_by(line: &str, thing: Thing) -> Option<PathBuf> {
    let mut fields = line.split(' ');
    let number = fields.nth(2)?;
    let mount_point = unescape(fields.nth(1)?);
    let by_number = match thing {
        Thing::Device(device) => device_number(number) == Some(device),
        Thing::File(..) => false,
    };
    let source = || {
        let path = unescape(fields.skip_while(|f| *f != "-").nth(2)?);
        path.is_absolute().then(|| thing_at(&path)).flatten()
    };
    (by_number || source() == Some(thing)).then_some(mount_point)
}

/// "8:17" as a device number.
fn device_number(text: &str) -> Option<u64> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(libc::makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// A path in which the kernel wrote blanks and backslashes as three octal digits.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        let octal = bytes
            .get(at + 1..at + 4)
            .filter(|_| *byte == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(octal.unwrap_or(*byte));
        at += if octal.is_some() { 4 } else { 1 };
    }
    PathBuf::from(OsString::from_vec(out))
}

fn sysfs(number: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(number), libc::minor(number)))
}

/// Block devices that are built on this one: device mapper, md.
fn holders(number: u64) -> Vec<String> {
    entries(&sysfs(number).join("holders")).iter().filter_map(|p| file_name(p)).collect()
}

/// Names and numbers of the partitions of a disk.
fn partitions(number: u64) -> Vec<(PathBuf, u64)> {
    let of = |dir: PathBuf| {
        dir.join("partition").exists().then_some(())?;
        let number = device_number(&fs::read_to_string(dir.join("dev")).ok()?)?;
        Some((Path::new("/dev").join(file_name(&dir)?), number))
    };
    entries(&sysfs(number)).into_iter().filter_map(of).collect()
}

/// The loop device whose backing file this is.
fn loop_over(thing: Thing) -> Option<PathBuf> {
    entries(Path::new("/sys/block")).into_iter().find_map(|dir| {
        let backing = fs::read_to_string(dir.join("loop/backing_file")).ok()?;
        (thing_at(Path::new(backing.trim_end_matches('\n'))) == Some(thing))
            .then(|| Some(Path::new("/dev").join(file_name(&dir)?)))
            .flatten()
    })
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map(|all| all.flatten().map(|e| e.path()).collect()).unwrap_or_default()
}

fn file_name(path: &Path) -> Option<String> {
    path.file_name().map(|name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_and_by_source() {
        let line = r"36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let device = Thing::Device(libc::makedev(98, 0));
        assert_eq!(mounted_by(line, device), Some("/mnt 2".into()));
        assert_eq!(mounted_by(line, Thing::Device(libc::makedev(98, 1))), None);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a volume");
        fs::write(&file, "x").unwrap();
        let source = file.to_str().unwrap().replace(' ', r"\040");
        let line = format!("40 1 0:51 / /vol rw - fuse.lunfs {source} rw");
        assert_eq!(mounted_by(&line, thing_at(&file).unwrap()), Some("/vol".into()));
        assert_eq!(in_use(&file), None);
    }

    #[test]
    fn nonsense_lines_are_no_mounts() {
        for line in ["", "1 2 3", "1 2 a:b / /x - -", r"1 2 8:1 / \04"] {
            assert_eq!(mounted_by(line, Thing::Device(libc::makedev(9, 9))), None);
        }
    }
}
