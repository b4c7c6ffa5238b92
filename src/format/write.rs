//! The blocks of a new volume, region by region, in few large writes.
//!
//! Invariant: every lock, slot, doorbell, request block, system inode, journal header and cluster header
//! is written whole, so that no byte of an earlier volume is left in any of them.

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::FormatError;
use crate::device::{AlignedBuf, BlockDevice, DeviceError};
use crate::fs::dirtree::DirTree;
use crate::layout::cluster::ClusterHeader;
use crate::layout::demand::{DoorbellRecord, RequestBlock};
use crate::layout::geometry::{CLUSTER_HEAD_BLOCKS, GROUP_BLOCKS, GROUP_INODES, Geometry, lock_of_inode};
use crate::layout::inode::{Form, InodeDisk, Timestamp};
use crate::layout::journal::JournalHeader;
use crate::layout::lock::{LockKind, LockRecord};
use crate::layout::slot::SlotRecord;
use crate::layout::superblock::Superblock;
use crate::layout::{Block, seal, zero_block};
use crate::rt::wall_clock;
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, Incarnation, InodeNo, VolumeId};

/// The longest single write.
const WRITE_BYTES: usize = 1 << 20;
/// What is cleared at both ends of the volume, so that no signature of an earlier content survives: the
/// widest known one (ZFS) has labels in the first and last 512 KiB.
const END_BYTES: u64 = 1 << 20;
/// Reader and searcher for all, writer for root, as mkfs of other filesystems makes a root directory.
const ROOT_MODE: u32 = libc::S_IFDIR | 0o755;
const ORPHAN_MODE: u32 = libc::S_IFDIR | 0o700;

/// Writes to the device and counts.
pub struct Writer<'d> {
    dev: &'d dyn BlockDevice,
    volume: VolumeId,
    geometry: Geometry,
    now: Timestamp,
    pub bytes_written: u64,
    pub write_commands: u64,
    pub flushes: u64,
}

impl<'d> Writer<'d> {
    pub fn new(dev: &'d dyn BlockDevice, volume: VolumeId, geometry: Geometry) -> Self {
        let (secs, nanos) = wall_clock();
        let now = Timestamp { secs, nanos };
        Writer { dev, volume, geometry, now, bytes_written: 0, write_commands: 0, flushes: 0 }
    }

    pub fn flush(&mut self) -> Result<(), FormatError> {
        self.flushes += 1;
        self.dev.flush().map_err(|source| FormatError::Device { step: "flushing", source })
    }

    pub fn block(&mut self, at: BlockNo, block: &Block, step: &'static str) -> Result<(), FormatError> {
        self.run(at, &AlignedBuf::copy_of(&block[..]), step)
    }

    pub fn superblock(&mut self, superblock: &Superblock, at: BlockNo) -> Result<(), FormatError> {
        let mut block = zero_block();
        superblock.encode(at, &mut block);
        self.block(at, &block, "writing the superblock")
    }

    /// Clears both ends of the volume; what belongs there is written afterwards.
    pub fn wipe_ends(&mut self) -> Result<(), FormatError> {
        let size_bytes = self.geometry.size_bytes();
        for offset_bytes in [0, size_bytes - END_BYTES] {
            match self.dev.write_zeroes(offset_bytes, END_BYTES) {
                Ok(()) => self.write_commands += 1,
                Err(DeviceError::Unsupported { .. }) => {
                    let zeroes = AlignedBuf::zeroed(END_BYTES as usize);
                    self.run(BlockNo(offset_bytes / BLOCK_BYTES_U64), &zeroes, "clearing the ends")?;
                }
                Err(source) => return Err(FormatError::Device { step: "clearing the ends", source }),
            }
        }
        Ok(())
    }

    /// From the volume lock to the last system inode group: one run of blocks.
    pub fn system_region(&mut self, root_owner: (u32, u32)) -> Result<(), FormatError> {
        let (g, volume) = (self.geometry, self.volume);
        let first = g.volume_lock();
        let end = g.system_group(g.system_groups() - 1).plus(GROUP_BLOCKS);
        let mut run = Run { first, bytes: AlignedBuf::zeroed((end.0 - first.0) as usize * BLOCK_BYTES) };
        for (at, kind) in [(g.volume_lock(), LockKind::Volume), (g.rename_lock(), LockKind::Rename)] {
            LockRecord::new_free(kind, at).encode(volume, run.at(at));
        }
        let mut block = zero_block();
        for slot in g.all_slots() {
            SlotRecord::new_free(g.slot(slot)).encode(volume, run.at(g.slot(slot)));
            DoorbellRecord::new(g.doorbell(slot)).encode(volume, run.at(g.doorbell(slot)));
            RequestBlock::new(g.request(slot)).encode(volume, &mut block);
            run.at(g.request(slot)).copy_from_slice(&block[..]);
        }
        for group in 0..g.system_groups() {
            for i in 0..GROUP_INODES {
                let ino = InodeNo(g.system_group(group).0 + GROUP_INODES + i);
                let lock = lock_of_inode(ino);
                LockRecord::new_free(LockKind::Inode, lock).encode(volume, run.at(lock));
                run.at(ino.body()).copy_from_slice(&self.free_inode(ino)[..]);
            }
        }
        run.at(g.root().body()).copy_from_slice(&self.directory(g.root(), ROOT_MODE, root_owner)?[..]);
        for slot in g.all_slots() {
            let ino = g.orphan_directory(slot);
            run.at(ino.body()).copy_from_slice(&self.directory(ino, ORPHAN_MODE, (0, 0))?[..]);
        }
        self.run(first, &run.bytes, "writing the system region")
    }

    /// One header a journal. The rings are reserved and not written: what an earlier volume left in them
    /// carries another volume id.
    pub fn journal_headers(&mut self) -> Result<(), FormatError> {
        let empty = JournalHeader {
            incarnation: Incarnation(0),
            tail_sequence: 1,
            tail_position: 0,
            chain: 0,
            net_blocks: 0,
            net_inodes: 0,
        };
        let mut block = zero_block();
        for slot in self.geometry.all_slots() {
            let at = self.geometry.journal(slot);
            empty.encode(self.volume, at, &mut block);
            self.block(at, &block, "writing the journal headers")?;
        }
        Ok(())
    }

    /// Lock, header and a cleared place for a superblock copy of every cluster. The maps are not written:
    /// the header says so.
    pub fn cluster_heads(&mut self) -> Result<(), FormatError> {
        let g = self.geometry;
        let mut bytes = AlignedBuf::zeroed(CLUSTER_HEAD_BLOCKS as usize * BLOCK_BYTES);
        // All clusters but the last are alike: their counts are computed once.
        let mut header = ClusterHeader::new_empty(&g, self.volume, 0);
        for index in 0..g.clusters() {
            if index + 1 == g.clusters() {
                header = ClusterHeader::new_empty(&g, self.volume, index);
            }
            header.index = U64::new(index);
            header.header.address = U64::new(g.cluster_header(index).0);
            header.header.lock = U64::new(g.cluster(index).0);
            let (lock, rest) = bytes.split_at_mut(BLOCK_BYTES);
            LockRecord::new_free(LockKind::Cluster, g.cluster(index)).encode(self.volume, lock);
            rest[..BLOCK_BYTES].copy_from_slice(header.as_bytes());
            seal(&mut rest[..BLOCK_BYTES]);
            self.run(g.cluster(index), &bytes, "writing the clusters")?;
        }
        Ok(())
    }

    fn free_inode(&self, ino: InodeNo) -> Box<Block> {
        let mut block = zero_block();
        block.copy_from_slice(InodeDisk::new_free(self.volume, ino).as_bytes());
        seal(&mut block[..]);
        block
    }

    fn directory(&self, ino: InodeNo, mode: u32, owner: (u32, u32)) -> Result<Box<Block>, FormatError> {
        let mut block = self.free_inode(ino);
        let body = InodeDisk::of_mut(&mut block);
        body.generation = U32::new(1);
        body.mode = U32::new(mode);
        body.uid = U32::new(owner.0);
        body.gid = U32::new(owner.1);
        body.nlink = U32::new(2);
        body.form = Form::Tree.code();
        for time in [&mut body.atime, &mut body.mtime, &mut body.ctime, &mut body.btime] {
            *time = self.now.into();
        }
        body.change = U64::new(1);
        // The seed is for names; an empty directory has none.
        DirTree::new(self.volume, ino, [0; 16]).init(&mut body.content).map_err(FormatError::Tree)?;
        seal(&mut block[..]);
        Ok(block)
    }

    fn run(&mut self, first: BlockNo, bytes: &[u8], step: &'static str) -> Result<(), FormatError> {
        let mut offset_bytes = first.offset_bytes();
        for piece in bytes.chunks(WRITE_BYTES) {
            self.dev.write(offset_bytes, piece).map_err(|source| FormatError::Device { step, source })?;
            offset_bytes += piece.len() as u64;
            self.bytes_written += piece.len() as u64;
            self.write_commands += 1;
        }
        Ok(())
    }
}

/// Consecutive blocks in memory, addressed as on the volume.
struct Run {
    first: BlockNo,
    bytes: AlignedBuf,
}

impl Run {
    fn at(&mut self, at: BlockNo) -> &mut [u8] {
        let start = (at.0 - self.first.0) as usize * BLOCK_BYTES;
        &mut self.bytes[start..start + BLOCK_BYTES]
    }
}
