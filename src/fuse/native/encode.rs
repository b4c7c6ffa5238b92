//! Our replies as the bytes that the kernel takes.
//!
//! Not for: deciding anything.

use std::sync::Arc;
use std::time::Duration;

use zerocopy::IntoBytes;
use zerocopy::native_endian::U32;

use super::abi::{self, open_flag};
use super::channel::Channel;
use crate::fs::api::{Attributes, DirEntry, Timestamp, VolumeUsage};
use crate::fuse::reply::{EntryReply, Listing, OpenReply, Reply, Responder, is_dot};
use crate::types::BLOCK_BYTES;

/// The longest name, for statfs.
const NAME_BYTES: u32 = 255;

/// One request's right to an answer. Dropped unused it answers EIO, so that nobody waits for ever.
pub struct Ticket {
    channel: Arc<Channel>,
    /// Zero once it was used.
    unique: u64,
    /// What the asker of a listing has room for.
    listing_bytes: usize,
}

impl Ticket {
    pub fn new(channel: Arc<Channel>, unique: u64, listing_bytes: usize) -> Ticket {
        Ticket { channel, unique, listing_bytes }
    }

    /// An answer without content; 0 is "done".
    pub fn refuse(mut self, errno: i32) {
        self.answer(errno, &[]);
    }

    fn answer(&mut self, errno: i32, body: &[&[u8]]) {
        let unique = std::mem::take(&mut self.unique);
        if let Err(error) = self.channel.answer(unique, -errno, body) {
            log::error!("the kernel refused an answer: {error}");
            // Refused for its form; the asker still waits.
            if errno == 0 && error.raw_os_error() == Some(libc::EINVAL) {
                let _ = self.channel.answer(unique, -libc::EIO, &[]);
            }
        }
    }

    fn encode(&mut self, reply: Reply) {
        match reply {
            Reply::Error(errno) => self.answer(errno, &[]),
            Reply::Done => self.answer(0, &[]),
            Reply::Entry(entry) => match entry_out(&entry) {
                Some(out) => self.answer(0, &[out.as_bytes()]),
                None => self.answer(libc::EIO, &[]),
            },
            Reply::Attributes { node, attributes, valid_for } => {
                match attr(&attributes, node.number(attributes.ino)) {
                    Some(attr) => {
                        let out = abi::AttrOut {
                            attr_valid: valid_for.as_secs().into(),
                            attr_valid_nsec: valid_for.subsec_nanos().into(),
                            attr,
                            ..Default::default()
                        };
                        self.answer(0, &[out.as_bytes()]);
                    }
                    None => self.answer(libc::EIO, &[]),
                }
            }
            Reply::AllAttributes { node, attributes, valid_for } => {
                match attr(&attributes, node.number(attributes.ino)) {
                    Some(attr) => self.answer(0, &[statx_out(&attr, attributes.btime, valid_for).as_bytes()]),
                    None => self.answer(libc::EIO, &[]),
                }
            }
            Reply::Target(target) => self.answer(0, &[&target]),
            Reply::Data(data) => self.answer(0, &[&data]),
            Reply::Opened(open) => self.answer(0, &[open_out(&open).as_bytes()]),
            Reply::Created(entry, open) => match entry_out(&entry) {
                Some(out) => self.answer(0, &[out.as_bytes(), open_out(&open).as_bytes()]),
                None => self.answer(libc::EIO, &[]),
            },
            Reply::Written(bytes) => {
                let out = abi::WriteOut { size: bytes.into(), ..Default::default() };
                self.answer(0, &[out.as_bytes()]);
            }
            Reply::Usage(usage) => self.answer(0, &[statfs_out(&usage).as_bytes()]),
            Reply::Offset(offset) => match i64::try_from(offset) {
                Ok(_) => self.answer(0, &[abi::LseekOut { offset: offset.into() }.as_bytes()]),
                Err(_) => self.answer(libc::EOVERFLOW, &[]),
            },
            Reply::Listing(listing) => {
                let bytes = listing_bytes(&listing, self.listing_bytes);
                self.answer(0, &[&bytes]);
            }
        }
    }
}

impl Responder for Ticket {
    fn send(mut self, reply: Reply) {
        self.encode(reply);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.unique != 0 {
            self.answer(libc::EIO, &[]);
        }
    }
}

/// `None` for a type the kernel has no word for, which only damaged bytes can bring about.
fn attr(attributes: &Attributes, number: u64) -> Option<abi::Attr> {
    let known = matches!(
        attributes.mode & libc::S_IFMT,
        libc::S_IFREG
            | libc::S_IFDIR
            | libc::S_IFLNK
            | libc::S_IFIFO
            | libc::S_IFSOCK
            | libc::S_IFCHR
            | libc::S_IFBLK
    );
    known.then(|| abi::Attr {
        ino: number.into(),
        size: attributes.size.into(),
        blocks: attributes.blocks_512.into(),
        atime: (attributes.atime.secs as u64).into(),
        mtime: (attributes.mtime.secs as u64).into(),
        ctime: (attributes.ctime.secs as u64).into(),
        atime_nsec: nanos(attributes.atime.nanos),
        mtime_nsec: nanos(attributes.mtime.nanos),
        ctime_nsec: nanos(attributes.ctime.nanos),
        mode: attributes.mode.into(),
        nlink: attributes.nlink.into(),
        uid: attributes.uid.into(),
        gid: attributes.gid.into(),
        rdev: attributes.rdev.into(),
        blksize: (BLOCK_BYTES as u32).into(),
        flags: 0.into(),
    })
}

fn statx_out(attr: &abi::Attr, btime: Timestamp, valid_for: Duration) -> abi::StatxOut {
    let time = |secs: u64, nsec| abi::StatxTime { sec: (secs as i64).into(), nsec, ..Default::default() };
    let rdev = attr.rdev.get().into();
    abi::StatxOut {
        attr_valid: valid_for.as_secs().into(),
        attr_valid_nsec: valid_for.subsec_nanos().into(),
        mask: (libc::STATX_BASIC_STATS | libc::STATX_BTIME).into(),
        blksize: attr.blksize,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        // Type and permissions are the low sixteen bits.
        mode: (attr.mode.get() as u16).into(),
        ino: attr.ino,
        size: attr.size,
        blocks: attr.blocks,
        atime: time(attr.atime.get(), attr.atime_nsec),
        mtime: time(attr.mtime.get(), attr.mtime_nsec),
        ctime: time(attr.ctime.get(), attr.ctime_nsec),
        btime: time(btime.secs as u64, nanos(btime.nanos)),
        rdev_major: libc::major(rdev).into(),
        rdev_minor: libc::minor(rdev).into(),
        ..Default::default()
    }
}

/// The kernel takes more nanoseconds than a second has for a broken server.
fn nanos(nanos: u32) -> U32 {
    nanos.min(999_999_999).into()
}

fn entry_out(entry: &EntryReply) -> Option<abi::EntryOut> {
    let of = |time: Duration| (time.as_secs().into(), time.subsec_nanos().into());
    let (entry_valid, entry_valid_nsec) = of(entry.valid.name);
    let (attr_valid, attr_valid_nsec) = of(entry.valid.attributes);
    Some(abi::EntryOut {
        node: entry.node.0.into(),
        generation: u64::from(entry.attributes.generation).into(),
        entry_valid,
        attr_valid,
        entry_valid_nsec,
        attr_valid_nsec,
        attr: attr(&entry.attributes, entry.node.number(entry.attributes.ino))?,
    })
}

fn open_out(open: &OpenReply) -> abi::OpenOut {
    // Nothing waits for a close: writes came here before they returned, and the kernel writes the pages of a
    // shared mapping back when it is unmapped. So close(2) need not ask.
    let mut flags = open_flag::NOFLUSH;
    if open.direct_io {
        // Older kernels ignore the second flag.
        flags |= open_flag::DIRECT_IO | open_flag::PARALLEL_DIRECT_WRITES;
    }
    if open.keep_cache {
        flags |= open_flag::KEEP_CACHE;
    }
    abi::OpenOut { fh: open.handle.0.into(), open_flags: flags.into(), backing_id: 0.into() }
}

fn statfs_out(usage: &VolumeUsage) -> abi::StatfsOut {
    abi::StatfsOut {
        blocks: usage.blocks.into(),
        bfree: usage.free_blocks.into(),
        bavail: usage.free_blocks.into(),
        files: usage.inodes.into(),
        ffree: usage.free_inodes.into(),
        bsize: (BLOCK_BYTES as u32).into(),
        namelen: NAME_BYTES.into(),
        frsize: (BLOCK_BYTES as u32).into(),
        ..Default::default()
    }
}

/// As many whole entries as fit. References are counted for those that go out, before they do.
fn listing_bytes(listing: &Listing, room: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(room);
    for line in &listing.entries {
        let entry = &line.entry;
        let before = if listing.plus { size_of::<abi::EntryOut>() } else { 0 };
        let len = (before + size_of::<abi::Dirent>() + entry.name.len()).next_multiple_of(8);
        if bytes.len() + len > room {
            break;
        }
        let end = bytes.len() + len;
        let node = listing.refer(entry);
        if listing.plus {
            // Without a node the kernel takes the line as one of a plain listing.
            let out = node.and_then(|node| {
                let attributes = entry.attributes?;
                entry_out(&EntryReply { node, attributes, valid: line.valid })
            });
            if out.is_none()
                && let Some(node) = node
            {
                listing.left_out(node);
            }
            bytes.extend_from_slice(out.unwrap_or_default().as_bytes());
        }
        debug_assert!(node.is_none() || !is_dot(&entry.name));
        let DirEntry { cookie, kind, name, .. } = entry;
        let dirent = abi::Dirent {
            ino: node.map_or_else(|| listing.number(entry), |node| node.number(entry.ino)).into(),
            cookie: (*cookie).into(),
            name_len: (name.len() as u32).into(),
            kind: u32::from(*kind).into(),
        };
        bytes.extend_from_slice(dirent.as_bytes());
        bytes.extend_from_slice(name);
        bytes.resize(end, 0);
    }
    bytes
}
