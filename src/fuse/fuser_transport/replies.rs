//! Our replies in the library's words, and times in both.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle as Fh, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, TimeOrNow,
};

use crate::fs::api::{Attributes, DirEntry, SetTime, Timestamp, VolumeUsage};
use crate::fuse::reply::{EntryReply, Listing, OpenReply, Reply, Responder, is_dot};

/// The library's reply objects. Dropped unused they answer EIO.
pub(super) enum To {
    Entry(ReplyEntry),
    Attr(ReplyAttr),
    Data(ReplyData),
    Open(ReplyOpen),
    Create(ReplyCreate),
    Write(ReplyWrite),
    Empty(ReplyEmpty),
    Statfs(ReplyStatfs),
    Lseek(ReplyLseek),
    Directory(ReplyDirectory),
    DirectoryPlus(ReplyDirectoryPlus),
}

impl Responder for To {
    fn send(self, reply: Reply) {
        match (self, reply) {
            (to, Reply::Error(errno)) => to.error(errno),
            (To::Empty(to), Reply::Done) => to.ok(),
            (To::Entry(to), Reply::Entry(entry)) => match entry_attr(&entry) {
                Some(attr) => {
                    let generation = Generation(entry.attributes.generation.into());
                    to.entry_with_ttls(&entry.valid.attributes, &entry.valid.name, &attr, generation);
                }
                None => to.error(Errno::EIO),
            },
            (To::Attr(to), Reply::Attributes { node, attributes, valid_for }) => {
                match file_attr(&attributes, node.number(attributes.ino)) {
                    Some(attr) => to.attr(&valid_for, &attr),
                    None => to.error(Errno::EIO),
                }
            }
            (To::Data(to), Reply::Target(target)) => to.data(&target),
            (To::Data(to), Reply::Data(data)) => to.data(&data),
            (To::Open(to), Reply::Opened(open)) => to.opened(Fh(open.handle.0), open_flags(&open)),
            (To::Create(to), Reply::Created(entry, open)) => match entry_attr(&entry) {
                Some(attr) => {
                    // The library has one time for both.
                    let ttl = entry.valid.name.min(entry.valid.attributes);
                    let generation = Generation(entry.attributes.generation.into());
                    to.created(&ttl, &attr, generation, Fh(open.handle.0), open_flags(&open));
                }
                None => to.error(Errno::EIO),
            },
            (To::Write(to), Reply::Written(bytes)) => to.written(bytes),
            (To::Statfs(to), Reply::Usage(usage)) => send_usage(to, &usage),
            (To::Lseek(to), Reply::Offset(offset)) => match i64::try_from(offset) {
                Ok(offset) => to.offset(offset),
                Err(_) => to.error(Errno::EOVERFLOW),
            },
            (To::Directory(to), Reply::Listing(listing)) => send_listing(to, &listing),
            (To::DirectoryPlus(to), Reply::Listing(listing)) => send_listing_plus(to, &listing),
            // Handlers answer each call with its own kind of reply.
            (to, _) => to.error(libc::EIO),
        }
    }
}

impl To {
    fn error(self, errno: i32) {
        let errno = Errno::from_i32(errno);
        match self {
            To::Entry(to) => to.error(errno),
            To::Attr(to) => to.error(errno),
            To::Data(to) => to.error(errno),
            To::Open(to) => to.error(errno),
            To::Create(to) => to.error(errno),
            To::Write(to) => to.error(errno),
            To::Empty(to) => to.error(errno),
            To::Statfs(to) => to.error(errno),
            To::Lseek(to) => to.error(errno),
            To::Directory(to) => to.error(errno),
            To::DirectoryPlus(to) => to.error(errno),
        }
    }
}

fn send_usage(to: ReplyStatfs, usage: &VolumeUsage) {
    let free = usage.free_blocks;
    to.statfs(usage.blocks, free, free, usage.inodes, usage.free_inodes, 4096, 255, 4096);
}

fn send_listing(mut to: ReplyDirectory, listing: &Listing) {
    for line in &listing.entries {
        let DirEntry { cookie, kind, name, .. } = &line.entry;
        let Some(kind) = file_type(u32::from(*kind) << 12) else { continue };
        if to.add(INodeNo(listing.number(&line.entry)), *cookie, kind, OsStr::from_bytes(name)) {
            break;
        }
    }
    to.ok();
}

fn send_listing_plus(mut to: ReplyDirectoryPlus, listing: &Listing) {
    for line in &listing.entries {
        let entry = &line.entry;
        let valid = if is_dot(&entry.name) { Duration::ZERO } else { line.valid.attributes };
        // The library has one time for both.
        let ttl = valid.min(line.valid.name);
        let attributes = entry.attributes.unwrap_or_else(|| unknown_attributes(entry));
        let node = listing.refer(entry);
        let number = node.map_or_else(|| listing.number(entry), |node| node.0);
        let Some(attr) = file_attr(&attributes, number) else { continue };
        let generation = Generation(attributes.generation.into());
        let name = OsStr::from_bytes(&entry.name);
        if to.add(INodeNo(number), entry.cookie, name, &ttl, &attr, generation) {
            node.into_iter().for_each(|node| listing.left_out(node));
            break;
        }
    }
    to.ok();
}

/// For "." and "..", whose attributes the kernel ignores, and for an inode that can't be read.
fn unknown_attributes(entry: &DirEntry) -> Attributes {
    Attributes {
        ino: entry.ino,
        generation: 0,
        mode: u32::from(entry.kind) << 12,
        uid: 0,
        gid: 0,
        nlink: 1,
        rdev: 0,
        size: 0,
        blocks_512: 0,
        atime: Timestamp::default(),
        mtime: Timestamp::default(),
        ctime: Timestamp::default(),
        btime: Timestamp::default(),
    }
}

fn open_flags(open: &OpenReply) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if open.direct_io {
        // Older kernels ignore the second flag.
        flags |= FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
    }
    // Nothing waits for a close: writes came here before they returned, and the kernel writes the pages of a
    // shared mapping back when it is unmapped. So close(2) need not ask.
    flags |= FopenFlags::FOPEN_NOFLUSH;
    if open.keep_cache {
        flags |= FopenFlags::FOPEN_KEEP_CACHE;
    }
    flags
}

fn entry_attr(entry: &EntryReply) -> Option<FileAttr> {
    file_attr(&entry.attributes, entry.node.0)
}

/// `None` for a type the kernel has no word for, which only damaged bytes can bring about.
fn file_attr(attributes: &Attributes, number: u64) -> Option<FileAttr> {
    Some(FileAttr {
        ino: INodeNo(number),
        size: attributes.size,
        blocks: attributes.blocks_512,
        atime: system_time(attributes.atime),
        mtime: system_time(attributes.mtime),
        ctime: system_time(attributes.ctime),
        crtime: system_time(attributes.btime),
        kind: file_type(attributes.mode)?,
        perm: (attributes.mode & 0o7777) as u16,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: 4096,
        flags: 0,
    })
}

fn file_type(mode: u32) -> Option<FileType> {
    match mode & libc::S_IFMT {
        libc::S_IFREG => Some(FileType::RegularFile),
        libc::S_IFDIR => Some(FileType::Directory),
        libc::S_IFLNK => Some(FileType::Symlink),
        libc::S_IFIFO => Some(FileType::NamedPipe),
        libc::S_IFSOCK => Some(FileType::Socket),
        libc::S_IFCHR => Some(FileType::CharDevice),
        libc::S_IFBLK => Some(FileType::BlockDevice),
        _ => None,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let whole = Duration::from_secs(time.secs.unsigned_abs());
    let base = if time.secs < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    let nanos = Duration::from_nanos(time.nanos.min(999_999_999).into());
    base.and_then(|t| t.checked_add(nanos)).unwrap_or(UNIX_EPOCH)
}

/// The library turns seconds -1 and nanoseconds n into "1 s + n before the epoch", which is a second and
/// twice n off; both numbers can be read back.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timestamp {
            secs: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nanos: after.subsec_nanos(),
        },
        Err(before) => {
            let before = before.duration();
            Timestamp {
                secs: i64::try_from(before.as_secs()).map_or(i64::MIN, |s| -s),
                nanos: before.subsec_nanos(),
            }
        }
    }
}

pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(timestamp(time)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_the_epoch_survive_the_library() {
        // The library's own conversion of (secs -2, nanos 300).
        let theirs = UNIX_EPOCH - Duration::new(2, 300);
        assert_eq!(timestamp(theirs), Timestamp { secs: -2, nanos: 300 });
        let at = UNIX_EPOCH + Duration::new(7, 9);
        assert_eq!(timestamp(at), Timestamp { secs: 7, nanos: 9 });
        // And ours out: a second and a half before the epoch.
        let time = system_time(Timestamp { secs: -2, nanos: 500_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(time).ok(), Some(Duration::from_millis(1500)));
        let _ = system_time(Timestamp { secs: i64::MIN, nanos: u32::MAX });
        let _ = system_time(Timestamp { secs: i64::MAX, nanos: u32::MAX });
    }
}
