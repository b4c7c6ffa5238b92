//! What hosts see of a volume, a line a name: through the library on a simulated LUN, and through the kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::Hasher;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use lunfs::device::BlockDevice;
use lunfs::device::sim::{SimLun, SimLunOptions};
use lunfs::fs::api::Operations;
use lunfs::fsck::Report;
use lunfs::heartbeat::HostIdentity;
use lunfs::rt::sim::{Simulation, on_host};
use lunfs::rt::{self, HostTag};
use lunfs::testing::audit::audit;
use lunfs::testing::cluster::cx;
use lunfs::types::InodeNo;
use lunfs::volume::{FencingMode, MountOptions, Volume};
use siphasher::sip::SipHasher24;

use super::scene::LARGE;

/// Longer files are compared up to here; nothing in the scene lies behind.
const MOST_BYTES: u64 = 1 << 20;

pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = SipHasher24::new();
    hasher.write(bytes);
    hasher.finish()
}

struct Seen {
    mode: u32,
    nlink: u64,
    owner: (u32, u32),
    size: u64,
    rdev: u64,
    mtime: (i64, i64),
    contents: Vec<u8>,
}

type Listing = BTreeMap<Vec<u8>, Seen>;

/// The names of the large directory are told by their number and a hash.
fn text(listing: &Listing) -> String {
    let large = [b"/", LARGE, b"/"].concat();
    let mut text = String::new();
    let (mut names, mut count) = (Vec::new(), 0);
    for (path, seen) in listing {
        if let Some(name) = path.strip_prefix(&large[..]) {
            names.extend_from_slice(name);
            names.push(b'/');
            count += 1;
            continue;
        }
        let kind = seen.mode & libc::S_IFMT;
        let size = if kind == libc::S_IFDIR { 0 } else { seen.size };
        text += &format!(
            "{} {:o} links {} owner {}:{} size {size} mtime {}.{:09}",
            path.escape_ascii(),
            seen.mode,
            seen.nlink,
            seen.owner.0,
            seen.owner.1,
            seen.mtime.0,
            seen.mtime.1
        );
        text += &match kind {
            libc::S_IFREG => format!(" hash {:016x}\n", hash(&seen.contents)),
            libc::S_IFLNK if seen.contents.len() < 100 => format!(" to {}\n", seen.contents.escape_ascii()),
            libc::S_IFLNK => format!(" to {:016x}\n", hash(&seen.contents)),
            libc::S_IFBLK | libc::S_IFCHR => format!(" device {:x}\n", seen.rdev),
            _ => "\n".into(),
        };
    }
    text + &format!("{}: {count} names, hash {:016x}\n", large.escape_ascii(), hash(&names))
}

/// Mounts a copy, waits until the dead are recovered and their orphans gone, and looks; and what fsck says afterwards.
pub fn of_image(bytes: &[u8], logical_block: u32) -> (String, Report) {
    let bytes = bytes.to_vec();
    Simulation::new(1).run(move || {
        let size_bytes = bytes.len() as u64;
        let options =
            SimLunOptions { logical_block_bytes: logical_block, size_bytes, ..SimLunOptions::default() };
        let lun = SimLun::new(options);
        lun.overwrite(0, &bytes);
        let tag = HostTag(1);
        let device: Arc<dyn BlockDevice> = lun.attach(tag);
        let host = HostIdentity {
            name: "reader".into(),
            uuid: [9; 16],
            boot_id: [9; 16],
            pid: 1,
            pid_namespace: 1,
            is_gone: |_| false,
        };
        let options = MountOptions { host, read_only: false, cache_mib: 4, fencing: FencingMode::Auto };
        let listing = on_host(tag, || {
            let volume = Volume::mount(device, options).expect("a mount of the image");
            rt::sleep(Duration::from_secs(300));
            let fs = volume.operations();
            let mut listing = Listing::new();
            add(&*fs, fs.root(), b"", &mut listing);
            drop(fs);
            volume.leave().expect("leaving");
            listing
        });
        let (report, findings) = audit(&lun);
        assert_eq!(findings, [], "after a mount");
        (text(&listing), report)
    })
}

fn add(fs: &dyn Operations, ino: InodeNo, path: &[u8], listing: &mut Listing) {
    let a = fs.getattr(&cx(), ino).unwrap().value;
    let kind = a.mode & libc::S_IFMT;
    let contents = match kind {
        libc::S_IFREG => fs.read(&cx(), ino, None, 0, a.size.min(MOST_BYTES) as u32).unwrap().value.to_vec(),
        libc::S_IFLNK => fs.readlink(&cx(), ino).unwrap().value,
        _ => Vec::new(),
    };
    let seen = Seen {
        mode: a.mode,
        nlink: a.nlink.into(),
        owner: (a.uid, a.gid),
        size: a.size,
        rdev: a.rdev.into(),
        mtime: (a.mtime.secs, a.mtime.nanos.into()),
        contents,
    };
    listing.insert(if path.is_empty() { b"/".to_vec() } else { path.to_vec() }, seen);
    if kind != libc::S_IFDIR {
        return;
    }
    let mut cookie = 0;
    loop {
        let entries = fs.readdir(&cx(), ino, cookie, 1 << 16, false).unwrap().value;
        let Some(last) = entries.last() else { return };
        cookie = last.cookie;
        for entry in entries.iter().filter(|e| e.name != b"." && e.name != b"..") {
            let found = fs.lookup(&cx(), ino, &entry.name).unwrap().value;
            assert_eq!((found.ino, (found.mode >> 12) as u8), (entry.ino, entry.kind));
            add(fs, entry.ino, &[path, b"/", &entry.name].concat(), listing);
        }
    }
}

/// What the kernel shows of a mount.
pub fn of_directory(mount: &Path) -> String {
    let mut listing = Listing::new();
    add_path(mount, b"", &mut listing);
    text(&listing)
}

fn add_path(at: &Path, path: &[u8], listing: &mut Listing) {
    let meta = std::fs::symlink_metadata(at).unwrap();
    let kind = meta.mode() & libc::S_IFMT;
    let contents = match kind {
        libc::S_IFREG => {
            let mut contents = vec![0; meta.size().min(MOST_BYTES) as usize];
            File::open(at).unwrap().read_exact_at(&mut contents, 0).unwrap();
            contents
        }
        libc::S_IFLNK => std::fs::read_link(at).unwrap().as_os_str().as_bytes().to_vec(),
        _ => Vec::new(),
    };
    let seen = Seen {
        mode: meta.mode(),
        nlink: meta.nlink(),
        owner: (meta.uid(), meta.gid()),
        size: meta.size(),
        rdev: meta.rdev(),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        contents,
    };
    listing.insert(if path.is_empty() { b"/".to_vec() } else { path.to_vec() }, seen);
    if kind == libc::S_IFDIR {
        for entry in std::fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            add_path(&entry.path(), &[path, b"/", entry.file_name().as_bytes()].concat(), listing);
        }
    }
}
