//! Attributes: stat and what changes them.

use zerocopy::little_endian::{U32, U64};

use super::api::{Answer, Attributes, FsError, FsResult, OpContext, SetAttributes, SetTime};
use super::op::{Needs, OpResult};
use super::{Fs, now_after};
use crate::layout::inode::{InodeDisk, Timestamp};
use crate::types::InodeNo;

pub(super) const TYPE_MASK: u32 = libc::S_IFMT;

pub(super) fn is_directory(body: &InodeDisk) -> bool {
    body.mode.get() & TYPE_MASK == libc::S_IFDIR
}

pub(super) fn is_regular(body: &InodeDisk) -> bool {
    body.mode.get() & TYPE_MASK == libc::S_IFREG
}

/// What stat(2) shows of a body.
pub(super) fn attributes(ino: InodeNo, body: &InodeDisk) -> Attributes {
    Attributes {
        ino,
        generation: body.generation.get(),
        mode: body.mode.get(),
        uid: body.uid.get(),
        gid: body.gid.get(),
        nlink: body.nlink.get(),
        rdev: body.rdev.get(),
        size: body.size.get(),
        blocks_512: body.blocks.get().saturating_mul(8),
        atime: body.atime.into(),
        mtime: body.mtime.into(),
        ctime: body.ctime.into(),
        btime: body.btime.into(),
    }
}

/// Contents changed.
pub(super) fn touch_contents(body: &mut InodeDisk) {
    let now = now_after(Timestamp::from(body.mtime).max(body.ctime.into()));
    body.mtime = now.into();
    body.ctime = now.into();
}

/// Attributes changed.
pub(super) fn touch(body: &mut InodeDisk) {
    body.ctime = now_after(body.ctime.into()).into();
}

/// A write by someone without privilege takes set-user-id and set-group-id away.
pub(super) fn drop_privileges(body: &mut InodeDisk, cx: &OpContext) {
    if cx.uid == 0 {
        return;
    }
    let mut mode = body.mode.get() & !libc::S_ISUID;
    if mode & libc::S_IXGRP != 0 {
        mode &= !libc::S_ISGID;
    }
    body.mode = U32::new(mode);
}

impl Fs {
    pub(super) fn do_getattr(&self, cx: &OpContext, ino: InodeNo) -> FsResult<Answer<Attributes>> {
        self.run(cx, Needs::look_at(self, ino), |op| {
            let guard = op.read_inode(ino)?;
            let block = op.body(&guard, ino)?;
            Ok(attributes(ino, InodeDisk::of(&block)))
        })
    }

    pub(super) fn do_setattr(
        &self,
        cx: &OpContext,
        ino: InodeNo,
        set: &SetAttributes,
    ) -> FsResult<Answer<Attributes>> {
        self.may_change()?;
        if let Some(size) = set.size {
            self.resize(cx, ino, size)?;
        }
        self.run(cx, Needs::write(&[ino]), |op| -> OpResult<Attributes> {
            let guard = op.write_inode(ino)?;
            let block = op.body(&guard, ino)?;
            let rest = SetAttributes { size: None, ..*set };
            if rest == SetAttributes::default() {
                return Ok(attributes(ino, InodeDisk::of(&block)));
            }
            let body = op.change(&guard, ino)?;
            if let Some(mode) = set.mode {
                body.mode = U32::new(body.mode.get() & TYPE_MASK | mode & 0o7777);
            }
            if let Some(uid) = set.uid {
                body.uid = U32::new(uid);
            }
            if let Some(gid) = set.gid {
                body.gid = U32::new(gid);
            }
            let time = |set: SetTime, old: Timestamp| match set {
                SetTime::Now => now_after(old),
                // An explicit time is the user's word, also when it goes back.
                SetTime::At(at) => at,
            };
            if let Some(set) = set.atime {
                body.atime = time(set, body.atime.into()).into();
            }
            if let Some(set) = set.mtime {
                body.mtime = time(set, body.mtime.into()).into();
            }
            touch(body);
            Ok(attributes(ino, body))
        })
    }

    /// Brings a file to a size. Several transactions for a large one; the size changes in one of them.
    fn resize(&self, cx: &OpContext, ino: InodeNo, size: u64) -> FsResult<()> {
        {
            let answer = self.do_getattr(cx, ino)?;
            match answer.value.mode & TYPE_MASK {
                libc::S_IFREG => {}
                libc::S_IFDIR => return Err(FsError::IsDirectory),
                _ => return Err(FsError::Invalid),
            }
        }
        self.set_size(cx, ino, size)
    }
}

/// Adds to a counter of blocks that a damaged body could hold at its limit.
pub(super) fn add_blocks(body: &mut InodeDisk, delta: i64) {
    body.blocks = U64::new(body.blocks.get().saturating_add_signed(delta));
}
