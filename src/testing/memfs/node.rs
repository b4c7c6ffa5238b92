//! Inodes of the in-memory filesystem.

use std::collections::BTreeMap;

use super::now;
use crate::fs::api::{Attributes, FsError, FsResult, Timestamp};
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, InodeNo};

pub(super) struct Node {
    pub ino: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub nlink: u32,
    pub rdev: u32,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub btime: Timestamp,
    pub opens: u64,
    /// Made without a name, which it may get.
    pub linkable: bool,
    pub body: Body,
}

pub(super) enum Body {
    File(File),
    Directory(Directory),
    Symlink(Vec<u8>),
    Special,
}

/// Blocks that were written; the rest are holes.
#[derive(Default)]
pub(super) struct File {
    pub size: u64,
    pub blocks: BTreeMap<u64, Box<[u8; BLOCK_BYTES]>>,
}

/// Names, and the same by their cookie, which never changes while the name lives.
pub(super) struct Directory {
    pub parent: u64,
    names: BTreeMap<Vec<u8>, (u64, u64)>,
    cookies: BTreeMap<u64, Vec<u8>>,
    next_cookie: u64,
}

/// Cookies of "." and "..".
pub(super) const COOKIE_DOT: u64 = 1;
pub(super) const COOKIE_DOT_DOT: u64 = 2;

impl Node {
    pub fn new(ino: u64, mode: u32, uid: u32, gid: u32, rdev: u32, parent: u64) -> Node {
        let body = match mode & libc::S_IFMT {
            libc::S_IFDIR => Body::Directory(Directory {
                parent,
                names: BTreeMap::new(),
                cookies: BTreeMap::new(),
                next_cookie: COOKIE_DOT_DOT + 1,
            }),
            libc::S_IFREG => Body::File(File::default()),
            _ => Body::Special,
        };
        let nlink = if matches!(body, Body::Directory(_)) { 2 } else { 1 };
        let time = now();
        Node {
            ino,
            mode,
            uid,
            gid,
            nlink,
            rdev,
            atime: time,
            mtime: time,
            ctime: time,
            btime: time,
            opens: 0,
            linkable: false,
            body,
        }
    }

    pub fn attributes(&self) -> Attributes {
        let (size, blocks_512) = match &self.body {
            Body::File(f) => (f.size, f.blocks.len() as u64 * (BLOCK_BYTES_U64 / 512)),
            Body::Directory(d) => (d.names.len() as u64 * 32, 8),
            Body::Symlink(target) => (target.len() as u64, 0),
            Body::Special => (0, 0),
        };
        Attributes {
            ino: InodeNo(self.ino),
            generation: 1,
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            rdev: self.rdev,
            size,
            blocks_512,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            btime: self.btime,
        }
    }

    pub fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }

    pub fn directory(&self) -> FsResult<&Directory> {
        match &self.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(FsError::NotDirectory),
        }
    }

    pub fn directory_mut(&mut self) -> FsResult<&mut Directory> {
        match &mut self.body {
            Body::Directory(directory) => Ok(directory),
            _ => Err(FsError::NotDirectory),
        }
    }

    pub fn file(&self) -> FsResult<&File> {
        match &self.body {
            Body::File(file) => Ok(file),
            Body::Directory(_) => Err(FsError::IsDirectory),
            _ => Err(FsError::Invalid),
        }
    }

    pub fn file_mut(&mut self) -> FsResult<&mut File> {
        match &mut self.body {
            Body::File(file) => Ok(file),
            Body::Directory(_) => Err(FsError::IsDirectory),
            _ => Err(FsError::Invalid),
        }
    }

    pub fn touch_content(&mut self) {
        self.mtime = now();
        self.ctime = self.mtime;
    }

    pub fn touch_change(&mut self) {
        self.ctime = now();
    }
}

impl Directory {
    pub fn find(&self, name: &[u8]) -> Option<u64> {
        self.names.get(name).map(|(ino, _)| *ino)
    }

    pub fn insert(&mut self, name: &[u8], ino: u64) {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        self.names.insert(name.to_vec(), (ino, cookie));
        self.cookies.insert(cookie, name.to_vec());
    }

    /// Another inode under the name; the cookie stays.
    pub fn replace(&mut self, name: &[u8], ino: u64) {
        if let Some(entry) = self.names.get_mut(name) {
            entry.0 = ino;
        }
    }

    pub fn remove(&mut self, name: &[u8]) {
        if let Some((_, cookie)) = self.names.remove(name) {
            self.cookies.remove(&cookie);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Entries after a cookie: cookie, name, inode.
    pub fn after(&self, cookie: u64) -> impl Iterator<Item = (u64, &[u8], u64)> {
        self.cookies.range(cookie + 1..).filter_map(|(cookie, name)| {
            self.names.get(name).map(|(ino, _)| (*cookie, name.as_slice(), *ino))
        })
    }
}

impl File {
    pub fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let len = (self.size.saturating_sub(offset)).min(out.len() as u64) as usize;
        for_pieces(offset, len, |block, within, at| {
            let piece = &mut out[at];
            match self.blocks.get(&block) {
                Some(bytes) => piece.copy_from_slice(&bytes[within]),
                None => piece.fill(0),
            }
        });
        len
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        for_pieces(offset, data.len(), |block, within, at| {
            self.block(block)[within].copy_from_slice(&data[at]);
        });
        self.size = self.size.max(offset + data.len() as u64);
    }

    pub fn truncate(&mut self, size: u64) {
        if size < self.size {
            self.blocks.split_off(&size.div_ceil(BLOCK_BYTES_U64));
            let within = (size % BLOCK_BYTES_U64) as usize;
            if let Some(bytes) = self.blocks.get_mut(&(size / BLOCK_BYTES_U64)) {
                bytes[within..].fill(0);
            }
        }
        self.size = size;
    }

    pub fn allocate(&mut self, offset: u64, len: u64) {
        for block in offset / BLOCK_BYTES_U64..(offset + len).div_ceil(BLOCK_BYTES_U64) {
            self.block(block);
        }
    }

    pub fn punch(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.size.next_multiple_of(BLOCK_BYTES_U64));
        let whole = offset.div_ceil(BLOCK_BYTES_U64)..end / BLOCK_BYTES_U64;
        if !whole.is_empty() {
            let tail = self.blocks.split_off(&whole.end);
            self.blocks.split_off(&whole.start);
            self.blocks.extend(tail);
        }
        for_pieces(offset, end.saturating_sub(offset) as usize, |block, within, _| {
            if let Some(bytes) = self.blocks.get_mut(&block) {
                bytes[within].fill(0);
            }
        });
    }

    /// The first byte at or after `offset` in a written block, or in a hole (the end counts as one).
    pub fn seek(&self, offset: u64, data: bool) -> FsResult<u64> {
        if offset >= self.size {
            return Err(FsError::NoData);
        }
        let mut block = offset / BLOCK_BYTES_U64;
        if data {
            let (first, _) = self.blocks.range(block..).next().ok_or(FsError::NoData)?;
            let found = (first * BLOCK_BYTES_U64).max(offset);
            return if found < self.size { Ok(found) } else { Err(FsError::NoData) };
        }
        while self.blocks.contains_key(&block) {
            block += 1;
        }
        Ok((block * BLOCK_BYTES_U64).max(offset).min(self.size))
    }

    fn block(&mut self, block: u64) -> &mut [u8; BLOCK_BYTES] {
        self.blocks.entry(block).or_insert_with(|| Box::new([0; BLOCK_BYTES]))
    }
}

/// Cuts a byte range at block borders: block, range within it, range within the buffer.
fn for_pieces(
    offset: u64,
    len: usize,
    mut piece: impl FnMut(u64, std::ops::Range<usize>, std::ops::Range<usize>),
) {
    let mut at = 0;
    while at < len {
        let position = offset + at as u64;
        let within = (position % BLOCK_BYTES_U64) as usize;
        let bytes = (BLOCK_BYTES - within).min(len - at);
        piece(position / BLOCK_BYTES_U64, within..within + bytes, at..at + bytes);
        at += bytes;
    }
}
