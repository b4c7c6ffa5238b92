//! /dev/fuse: whole messages in, whole messages out.
//!
//! A request is read so that the data of a WRITE begins at a page: O_DIRECT takes it from there, without a copy.
//!
//! Not for: what messages mean.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::sys::uio::writev;
use zerocopy::IntoBytes;

use super::abi::{InHeader, OutHeader, WriteIn};
use crate::device::AlignedBuf;
use crate::types::BLOCK_BYTES;

/// What precedes the data of a WRITE.
const BEFORE_DATA: usize = size_of::<InHeader>() + size_of::<WriteIn>();

/// Room for the largest request.
pub struct Inbox(AlignedBuf);

impl Inbox {
    /// For WRITEs of at most so many bytes.
    pub fn new(max_write_bytes: usize) -> Inbox {
        Inbox(AlignedBuf::zeroed(BLOCK_BYTES + max_write_bytes.next_multiple_of(BLOCK_BYTES)))
    }

    fn room(&mut self) -> &mut [u8] {
        &mut self.0[BLOCK_BYTES - BEFORE_DATA..]
    }
}

/// One end of the connection; the kernel has the other.
pub struct Channel {
    device: OwnedFd,
}

impl Channel {
    pub fn new(device: OwnedFd) -> Channel {
        Channel { device }
    }

    /// The next request, whole. `None`: the connection has ended.
    pub fn receive<'a>(&self, inbox: &'a mut Inbox) -> io::Result<Option<&'a [u8]>> {
        let room = inbox.room();
        let len = loop {
            match nix::unistd::read(&self.device, room) {
                Ok(len) => break len,
                // ENOENT: its process went away while it was being read. There are others.
                Err(Errno::EINTR | Errno::EAGAIN | Errno::ENOENT) => {}
                // Unmounted, or aborted.
                Err(Errno::ENODEV | Errno::ECONNABORTED) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        Ok(Some(&room[..len]))
    }

    /// Answers a request. That nobody waits for the answer any more is no error.
    pub fn answer(&self, unique: u64, error: i32, body: &[&[u8]]) -> io::Result<()> {
        let header_bytes = size_of::<OutHeader>();
        let len = header_bytes + body.iter().map(|part| part.len()).sum::<usize>();
        let len = u32::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        let header = OutHeader { len: len.into(), error: error.into(), unique: unique.into() };
        let mut parts = vec![IoSlice::new(header.as_bytes())];
        parts.extend(body.iter().map(|part| IoSlice::new(part)));
        loop {
            match writev(&self.device, &parts) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::ENOENT | Errno::ENODEV | Errno::ECONNABORTED) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
