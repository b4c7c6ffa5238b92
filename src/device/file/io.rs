//! Plain transfers of the `file` backend: whole or an error that says whether it may have happened.
//!
//! Takes ranges that were checked already. Memory that O_DIRECT can use goes to the kernel as it
//! is; other memory goes through a bounce buffer. Knows nothing of locks.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::sys;
use crate::device::{AlignedBuf, DeviceError, Executed};
use crate::types::BLOCK_BYTES_U64;

/// The largest piece that goes through a bounce buffer, and the largest write of zeroes, in bytes.
const PIECE_BYTES: usize = 1 << 20;

pub(super) struct Io {
    file: File,
    is_block_device: bool,
    unit_bytes: usize,
    /// Where the device begins in the file below; holes are cut on that file's block boundaries.
    base_bytes: u64,
}

impl Io {
    pub(super) fn new(file: File, is_block_device: bool, unit_bytes: u32, base_bytes: u64) -> Self {
        Io { file, is_block_device, unit_bytes: unit_bytes as usize, base_bytes }
    }

    pub(super) fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        if AlignedBuf::is_aligned(buf, self.unit_bytes) {
            return self.read_aligned(offset_bytes, buf);
        }
        let mut bounce = AlignedBuf::zeroed(buf.len().min(PIECE_BYTES));
        let mut at = offset_bytes;
        for piece in buf.chunks_mut(PIECE_BYTES) {
            bounce.truncate(piece.len());
            self.read_aligned(at, &mut bounce)?;
            piece.copy_from_slice(&bounce);
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn read_aligned(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset_bytes + done as u64;
            // A read changes nothing: whatever becomes of it, nothing was executed.
            let fail = |err| DeviceError::io("read", at, Executed::No, err);
            match self.file.read_at(&mut buf[done..], at) {
                Ok(0) => return Err(fail(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => done = self.advance(done, n, buf.len()).ok_or_else(|| fail(short()))?,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(fail(err)),
            }
        }
        Ok(())
    }

    pub(super) fn write(&self, op: &'static str, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        if AlignedBuf::is_aligned(data, self.unit_bytes) {
            return self.write_aligned(op, offset_bytes, data, Executed::No);
        }
        let mut bounce = AlignedBuf::zeroed(data.len().min(PIECE_BYTES));
        let mut at = offset_bytes;
        let mut before = Executed::No;
        for piece in data.chunks(PIECE_BYTES) {
            bounce.truncate(piece.len());
            bounce.copy_from_slice(piece);
            self.write_aligned(op, at, &bounce, before)?;
            before = Executed::Maybe;
            at += piece.len() as u64;
        }
        Ok(())
    }

    /// `before`: may earlier pieces of the same command have been executed?
    fn write_aligned(
        &self,
        op: &'static str,
        offset_bytes: u64,
        data: &[u8],
        before: Executed,
    ) -> Result<(), DeviceError> {
        let mut done = 0;
        while done < data.len() {
            let at = offset_bytes + done as u64;
            let untouched = before == Executed::No && done == 0;
            match self.file.write_at(&data[done..], at) {
                Ok(n) => {
                    done = self
                        .advance(done, n, data.len())
                        .ok_or_else(|| DeviceError::io(op, at, Executed::Maybe, short()))?;
                }
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => {
                    let executed = if untouched { executed_after(&err) } else { Executed::Maybe };
                    return Err(DeviceError::io(op, at, executed, err));
                }
            }
        }
        Ok(())
    }

    /// Where to go on after `n` bytes were transferred: on a logical block, or O_DIRECT refuses. None
    /// when there was no progress.
    fn advance(&self, done: usize, n: usize, len: usize) -> Option<usize> {
        if done + n >= len {
            return Some(len);
        }
        let whole = n - n % self.unit_bytes;
        (whole > 0).then_some(done + whole)
    }

    pub(super) fn flush(&self) -> Result<(), DeviceError> {
        self.file.sync_data().map_err(|e| DeviceError::io("flush", 0, Executed::Maybe, e))
    }

    /// Gives up the whole 4 KiB blocks inside the range; edges stay as they are, which is allowed.
    /// Freeing part of a block would be a write through the page cache of the file below.
    pub(super) fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        let (start, end) = self.whole_blocks(offset_bytes, len_bytes);
        if start >= end {
            return Ok(());
        }
        let result = if self.is_block_device {
            sys::block_device_discard(&self.file, start, end - start)
        } else {
            sys::punch_hole(&self.file, start, end - start)
        };
        result.map_err(|err| match err.raw_os_error() {
            Some(libc::EOPNOTSUPP) => DeviceError::Unsupported { op: "discard" },
            _ => DeviceError::io("discard", start, executed_after(&err), err),
        })
    }

    /// Whole 4 KiB blocks by the cheap way, edges (and all, where there is none) by plain writes.
    pub(super) fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        let end_bytes = offset_bytes + len_bytes;
        let (start, end) = self.whole_blocks(offset_bytes, len_bytes);
        if start >= end {
            return self.zeroes_by_writes(offset_bytes, end_bytes);
        }
        self.zeroes_by_writes(offset_bytes, start)?;
        let result = if self.is_block_device {
            sys::block_device_zero(&self.file, start, end - start)
        } else {
            sys::zero_range(&self.file, start, end - start)
        };
        match result {
            Ok(()) => {}
            Err(err) if err.raw_os_error() == Some(libc::EOPNOTSUPP) => self.zeroes_by_writes(start, end)?,
            Err(err) => return Err(DeviceError::io("write-zeroes", start, Executed::Maybe, err)),
        }
        self.zeroes_by_writes(end, end_bytes)
    }

    fn zeroes_by_writes(&self, start: u64, end: u64) -> Result<(), DeviceError> {
        if start >= end {
            return Ok(());
        }
        let mut zeroes = AlignedBuf::zeroed((end - start).min(PIECE_BYTES as u64) as usize);
        let mut at = start;
        while at < end {
            zeroes.truncate((end - at).min(PIECE_BYTES as u64) as usize);
            self.write_aligned("write-zeroes", at, &zeroes, Executed::Maybe)?;
            at += zeroes.len() as u64;
        }
        Ok(())
    }

    /// The part of a range that consists of whole 4 KiB blocks of the file below.
    fn whole_blocks(&self, offset_bytes: u64, len_bytes: u64) -> (u64, u64) {
        let start = (self.base_bytes + offset_bytes).next_multiple_of(BLOCK_BYTES_U64) - self.base_bytes;
        let end = self.base_bytes + offset_bytes + len_bytes;
        let end = end - end % BLOCK_BYTES_U64;
        (start, end.saturating_sub(self.base_bytes))
    }
}

/// Could a change that failed like this have reached the device? Only a rejected argument could not.
fn executed_after(err: &io::Error) -> Executed {
    match err.raw_os_error() {
        Some(libc::EINVAL | libc::EBADF | libc::EFAULT | libc::EPERM | libc::EROFS | libc::EOPNOTSUPP) => {
            Executed::No
        }
        _ => Executed::Maybe,
    }
}

fn short() -> io::Error {
    io::Error::new(io::ErrorKind::WriteZero, "the transfer stopped inside a logical block")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn io_over(file: &tempfile::NamedTempFile, base_bytes: u64) -> Io {
        Io::new(file.reopen().unwrap(), false, 512, base_bytes)
    }

    #[test]
    fn whole_blocks_are_those_of_the_file_below() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let io = io_over(&file, 0);
        assert_eq!(io.whole_blocks(512, 8192), (4096, 8192));
        assert_eq!(io.whole_blocks(4096, 4096), (4096, 8192));
        let (start, end) = io.whole_blocks(512, 1024);
        assert!(start >= end);
        // A loop device that begins 512 bytes into its file.
        assert_eq!(io_over(&file, 512).whole_blocks(0, 8192), (3584, 7680));
        let (start, end) = io_over(&file, 512).whole_blocks(0, 512);
        assert!(start >= end);
    }

    #[test]
    fn short_transfers_go_on_at_a_logical_block() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let io = io_over(&file, 0);
        assert_eq!(io.advance(0, 700, 4096), Some(512));
        assert_eq!(io.advance(512, 3584, 4096), Some(4096));
        assert_eq!(io.advance(0, 100, 4096), None);
    }

    #[test]
    fn zeroing_leaves_the_neighbours_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let io = io_over(&file, 0);
        io.write("write", 0, &[7; 16384]).unwrap();
        io.write_zeroes(512, 9216).unwrap();
        let mut all = vec![1; 16384];
        io.read(0, &mut all).unwrap();
        assert!(all[..512].iter().chain(&all[9728..]).all(|b| *b == 7));
        assert!(all[512..9728].iter().all(|b| *b == 0));
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let err = io_over(&file, 0).read(0, &mut [0; 512]).unwrap_err();
        assert_eq!(err.executed(), Executed::No);
    }
}
