//! A request's bytes as one of our [`Call`]s.
//!
//! The kernel is believed to say what it means, not to be free of errors: a message that is too short for what it
//! claims to be is refused, whatever is in it.
//!
//! Not for: deciding anything.

use std::borrow::Cow;

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::abi::{self, InHeader, SetAttrFlags, opcode};
use crate::fs::api::{FileHandle, SetAttributes, SetTime, Timestamp, Whence};
use crate::fuse::request::{Call, Caller, Name, NodeId, Payload};

/// One message, with its header.
pub struct Message<'a> {
    pub unique: u64,
    pub opcode: u32,
    pub node: NodeId,
    pub caller: Caller,
    body: &'a [u8],
}

/// What a message wants.
pub enum Asked<'a> {
    Call(Call<'a>),
    /// References that the kernel gives back; not answered.
    Forget(Vec<(NodeId, u64)>),
    /// Whoever waits for that request was sent a signal; not answered unless it is to be said again.
    Interrupt(u64),
    /// The last message.
    Destroy,
    /// The kernel is told that we don't know it, and does without.
    Unknown,
}

/// A message that is not what it claims to be.
#[derive(Debug, PartialEq, Eq)]
pub struct Malformed;

/// Bytes taken from the front of a message, one structure after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take<T: FromBytes + Immutable + KnownLayout + Unaligned>(&mut self) -> Result<&'a T, Malformed> {
        let (taken, rest) = T::ref_from_prefix(self.0).map_err(|_| Malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    /// Bytes up to a zero, which is taken as well.
    fn name(&mut self) -> Result<Name<'a>, Malformed> {
        let end = self.0.iter().position(|byte| *byte == 0).ok_or(Malformed)?;
        let name = &self.0[..end];
        self.0 = &self.0[end + 1..];
        Ok(Cow::Borrowed(name))
    }

    fn bytes(&mut self, len: u32) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(len as usize).ok_or(Malformed)?;
        self.0 = rest;
        Ok(taken)
    }
}

impl<'a> Message<'a> {
    /// The header of a message that was read whole.
    pub fn read(bytes: &'a [u8]) -> Result<Message<'a>, Malformed> {
        let (header, body) = InHeader::ref_from_prefix(bytes).map_err(|_| Malformed)?;
        if header.len.get() as usize != bytes.len() {
            return Err(Malformed);
        }
        // What follows the call, if anything: we asked for none of it.
        let extension_bytes = usize::from(header.extension_len.get()) * 8;
        let body_bytes = body.len().checked_sub(extension_bytes).ok_or(Malformed)?;
        Ok(Message {
            unique: header.unique.get(),
            opcode: header.opcode.get(),
            node: NodeId(header.node.get()),
            caller: Caller { uid: header.uid.get(), gid: header.gid.get(), pid: header.pid.get() },
            body: &body[..body_bytes],
        })
    }

    /// The bytes after the header.
    pub fn body(&self) -> &'a [u8] {
        self.body
    }

    /// What it wants.
    pub fn asked(&self) -> Result<Asked<'a>, Malformed> {
        let mut body = Reader(self.body);
        let node = self.node;
        let call = match self.opcode {
            opcode::FORGET => {
                let forget: &abi::ForgetIn = body.take()?;
                return Ok(Asked::Forget(vec![(node, forget.count.get())]));
            }
            opcode::BATCH_FORGET => {
                let count = body.take::<abi::BatchForgetIn>()?.count.get();
                let one =
                    |_| body.take::<abi::ForgetOne>().map(|one| (NodeId(one.node.get()), one.count.get()));
                return Ok(Asked::Forget((0..count).map(one).collect::<Result<_, _>>()?));
            }
            opcode::INTERRUPT => return Ok(Asked::Interrupt(body.take::<abi::InterruptIn>()?.unique.get())),
            opcode::DESTROY => return Ok(Asked::Destroy),
            opcode::LOOKUP => Call::Lookup { parent: node, name: body.name()? },
            opcode::GETATTR => Call::GetAttributes { node },
            opcode::STATX => Call::GetAllAttributes { node },
            opcode::SETATTR => Call::SetAttributes { node, set: set_attributes(body.take()?) },
            opcode::READLINK => Call::ReadLink { node },
            opcode::SYMLINK => Call::MakeSymlink { parent: node, name: body.name()?, target: body.name()? },
            opcode::MKNOD => {
                let asked: &abi::MknodIn = body.take()?;
                let (mode, rdev) = (asked.mode.get(), asked.rdev.get());
                Call::MakeNode { parent: node, name: body.name()?, mode, rdev }
            }
            opcode::MKDIR => {
                let mode = body.take::<abi::MkdirIn>()?.mode.get();
                Call::MakeDirectory { parent: node, name: body.name()?, mode }
            }
            opcode::UNLINK => Call::Unlink { parent: node, name: body.name()? },
            opcode::RMDIR => Call::RemoveDirectory { parent: node, name: body.name()? },
            opcode::RENAME => {
                let new_parent = body.take::<abi::RenameIn>()?.new_parent.get();
                self.rename(body, new_parent, 0)?
            }
            opcode::RENAME2 => {
                let asked: &abi::Rename2In = body.take()?;
                self.rename(body, asked.new_parent.get(), asked.flags.get())?
            }
            opcode::LINK => {
                let linked = NodeId(body.take::<abi::LinkIn>()?.node.get());
                Call::Link { node: linked, new_parent: node, new_name: body.name()? }
            }
            opcode::OPEN => Call::Open { node, flags: body.take::<abi::OpenIn>()?.flags.get() as i32 },
            opcode::OPENDIR => Call::OpenDirectory { node },
            opcode::CREATE => {
                let asked: &abi::CreateIn = body.take()?;
                let (flags, mode) = (asked.flags.get() as i32, asked.mode.get());
                Call::Create { parent: node, name: body.name()?, mode, flags }
            }
            opcode::TMPFILE => {
                let asked: &abi::CreateIn = body.take()?;
                Call::CreateUnnamed { parent: node, mode: asked.mode.get(), flags: asked.flags.get() as i32 }
            }
            opcode::READ => {
                let asked: &abi::ReadIn = body.take()?;
                let (offset, len) = (asked.offset.get(), asked.size.get());
                Call::Read { node, handle: FileHandle(asked.fh.get()), offset, len }
            }
            opcode::READDIR | opcode::READDIRPLUS => {
                let asked: &abi::ReadIn = body.take()?;
                let plus = self.opcode == opcode::READDIRPLUS;
                Call::ReadDirectory { node, cookie: asked.offset.get(), max_bytes: asked.size.get(), plus }
            }
            opcode::WRITE => {
                let asked: &abi::WriteIn = body.take()?;
                let (write_flags, flags) = (asked.write_flags.get(), asked.flags.get() as i32);
                // Write-back of a page goes where the page is, whatever descriptor the kernel picked for it.
                let write_back = write_flags & abi::WRITE_CACHE != 0;
                Call::Write {
                    node,
                    handle: (!write_back).then_some(FileHandle(asked.fh.get())),
                    offset: asked.offset.get(),
                    data: Payload::Borrowed(body.bytes(asked.size.get())?),
                    append: !write_back && flags & libc::O_APPEND != 0,
                    drop_privileges: write_flags & abi::WRITE_KILL_SUIDGID != 0,
                    durable: flags & libc::O_DSYNC != 0,
                }
            }
            opcode::STATFS => Call::Statistics,
            opcode::SYNCFS => Call::SyncVolume,
            opcode::FLUSH => Call::Flush { node, handle: FileHandle(body.take::<abi::FlushIn>()?.fh.get()) },
            opcode::RELEASE => {
                Call::Release { node, handle: FileHandle(body.take::<abi::ReleaseIn>()?.fh.get()) }
            }
            opcode::RELEASEDIR => {
                Call::ReleaseDirectory { node, handle: FileHandle(body.take::<abi::ReleaseIn>()?.fh.get()) }
            }
            opcode::FSYNC | opcode::FSYNCDIR => {
                let flags = body.take::<abi::FsyncIn>()?.fsync_flags.get();
                Call::Sync { node, data_only: flags & abi::FSYNC_DATA_ONLY != 0 }
            }
            opcode::FALLOCATE => {
                let asked: &abi::FallocateIn = body.take()?;
                Call::Allocate {
                    node,
                    handle: FileHandle(asked.fh.get()),
                    offset: asked.offset.get(),
                    len: asked.length.get(),
                    mode: asked.mode.get() as i32,
                }
            }
            opcode::LSEEK => {
                let asked: &abi::LseekIn = body.take()?;
                let whence = match asked.whence.get() as i32 {
                    libc::SEEK_DATA => Whence::Data,
                    libc::SEEK_HOLE => Whence::Hole,
                    // The kernel answers the others itself. "Unknown" would end all seeking.
                    _ => return Err(Malformed),
                };
                Call::Seek { node, offset: asked.offset.get(), whence }
            }
            _ => return Ok(Asked::Unknown),
        };
        Ok(Asked::Call(call))
    }

    fn rename(&self, mut body: Reader<'a>, new_parent: u64, flags: u32) -> Result<Call<'a>, Malformed> {
        let (name, new_name) = (body.name()?, body.name()?);
        Ok(Call::Rename { parent: self.node, name, new_parent: NodeId(new_parent), new_name, flags })
    }
}

fn set_attributes(asked: &abi::SetAttrIn) -> SetAttributes {
    let valid = SetAttrFlags::from_bits_retain(asked.valid.get());
    let given = |flag, value: u32| valid.contains(flag).then_some(value);
    let time = |at: u64, nanos: u32| Timestamp { secs: at as i64, nanos };
    let set_time = |given, now, at: u64, nsec: u32| {
        valid.contains(given).then(|| match valid.contains(now) {
            true => SetTime::Now,
            false => SetTime::At(time(at, nsec)),
        })
    };
    let (atime, atime_nsec) = (asked.atime.get(), asked.atime_nsec.get());
    let (mtime, mtime_nsec) = (asked.mtime.get(), asked.mtime_nsec.get());
    let ctime = time(asked.ctime.get(), asked.ctime_nsec.get());
    SetAttributes {
        mode: given(SetAttrFlags::MODE, asked.mode.get() & 0o7777),
        uid: given(SetAttrFlags::UID, asked.uid.get()),
        gid: given(SetAttrFlags::GID, asked.gid.get()),
        size: valid.contains(SetAttrFlags::SIZE).then(|| asked.size.get()),
        atime: set_time(SetAttrFlags::ATIME, SetAttrFlags::ATIME_NOW, atime, atime_nsec),
        mtime: set_time(SetAttrFlags::MTIME, SetAttrFlags::MTIME_NOW, mtime, mtime_nsec),
        ctime: valid.contains(SetAttrFlags::CTIME).then_some(ctime),
    }
}
