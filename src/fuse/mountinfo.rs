//! What is mounted where, from /proc/self/mountinfo.
//!
//! The daemon may not stat its own mount (it would wait for itself), and `stat` of a dead mount hangs or
//! fails; this file tells the device number, source and type of a mount without asking the filesystem.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    /// major, minor of the superblock.
    pub device: (u32, u32),
    pub mountpoint: PathBuf,
    pub fstype: String,
    pub source: OsString,
}

impl MountEntry {
    /// Is it one of ours, whoever mounted it?
    pub fn is_lunfs(&self) -> bool {
        self.fstype == "fuse.lunfs" || self.fstype == "fuseblk.lunfs"
    }
}

/// All mounts of this process's namespace, in the order they were made.
pub fn read() -> io::Result<Vec<MountEntry>> {
    Ok(parse(&std::fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount at exactly this path.
pub fn at(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(read()?.into_iter().rev().find(|m| m.mountpoint == path))
}

/// How many mounts there are of this superblock.
pub fn count(device: (u32, u32)) -> io::Result<usize> {
    Ok(read()?.iter().filter(|m| m.device == device).count())
}

/// Is any mount of this superblock left?
pub fn is_mounted(device: (u32, u32)) -> io::Result<bool> {
    Ok(count(device)? > 0)
}

fn parse(text: &[u8]) -> Vec<MountEntry> {
    text.split(|b| *b == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    // 36 35 98:0 /root /mnt rw,noatime shared:1 - ext4 /dev/sda1 rw; the optional fields end with "-".
    let mut fields = line.split(|b| *b == b' ');
    let device = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = (major.parse().ok()?, minor.parse().ok()?);
    let mountpoint = unescape(fields.nth(1)?);
    let mut rest = fields.skip_while(|f| *f != b"-").skip(1);
    let fstype = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = OsString::from_vec(unescape(rest.next()?));
    Some(MountEntry { device, mountpoint: PathBuf::from(OsString::from_vec(mountpoint)), fstype, source })
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut i = 0;
    while let Some(&byte) = field.get(i) {
        let octal = (byte == b'\\').then(|| field.get(i + 1..i + 4)).flatten().and_then(|digits| {
            digits
                .iter()
                .try_fold(0u32, |value, d| (b'0'..=b'7').contains(d).then(|| value * 8 + u32::from(d - b'0')))
        });
        match octal.and_then(|value| u8::try_from(value).ok()) {
            Some(value) => {
                out.push(value);
                i += 4;
            }
            None => {
                out.push(byte);
                i += 1;
            }
        }
    }
    out
}

/// The path without symbolic links and dots, found by its parent, so that a mount on the path itself is
/// not asked anything.
pub fn resolve_without_touching(path: &Path) -> io::Result<PathBuf> {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => {
            let parent = if parent.as_os_str().as_bytes().is_empty() { Path::new(".") } else { parent };
            let resolved = parent.canonicalize()?.join(name);
            // A link as the last step is followed unless it is a mount itself, which it can't be.
            match std::fs::read_link(&resolved) {
                Ok(_) => resolved.canonicalize(),
                Err(_) => Ok(resolved),
            }
        }
        _ => path.canonicalize(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_understood() {
        let text = b"36 35 98:0 / /mnt/a\\040b rw,noatime shared:1 master:2 - fuse.lunfs /dev/mapper/x\\134y rw,user_id=0\n\
                     37 35 0:44 /sub / ro - tmpfs tmpfs rw\nrubbish\n38 1\n";
        let mounts = parse(text);
        assert_eq!(mounts.len(), 2);
        assert_eq!(mounts[0].device, (98, 0));
        assert_eq!(mounts[0].mountpoint, Path::new("/mnt/a b"));
        assert_eq!(mounts[0].source, "/dev/mapper/x\\y");
        assert!(mounts[0].is_lunfs());
        assert_eq!(mounts[1].fstype, "tmpfs");
    }

    #[test]
    fn broken_escapes_stay_as_they_are() {
        assert_eq!(unescape(b"a\\04"), b"a\\04");
        assert_eq!(unescape(b"\\999"), b"\\999");
        assert_eq!(unescape(b"\\777"), b"\\777");
        assert_eq!(unescape(b"\\011"), b"\t");
    }
}
