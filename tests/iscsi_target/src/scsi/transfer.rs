//! Commands that touch blocks.

use std::io;

use crate::personality::{CompareAndWrite, Information, Unmapped};
use crate::scsi::cdb::{Cdb, Kind, op};
use crate::scsi::pages::{UNMAP_LIST_MAX, UNMAP_MAX, WRITE_SAME_BLOCKS_MAX};
use crate::scsi::unit::{Command, How, Unit};
use crate::sense::{Answer, Sense};

/// One transfer, whatever the CDB says: no initiator can make the target take more memory than this.
pub const TRANSFER_BYTES_MAX: u64 = 256 << 20;

fn invalid_field(at: u16) -> Answer {
    Sense { field: Some(at), ..Sense::INVALID_FIELD_IN_CDB }.into()
}

fn done(result: io::Result<()>) -> Answer {
    match result {
        Ok(()) => Answer::good().changing(),
        Err(_) => Sense::TARGET_FAILURE.into(),
    }
}

impl Unit {
    pub(super) fn transfer(&mut self, command: &Command, how: How) -> Answer {
        let cdb = &command.cdb;
        let bytes_per_block = self.store.block_bytes() as u64;
        if cdb.opcode() == op::UNMAP {
            return self.unmap(command);
        }
        let Some((lba, blocks)) = cdb.blocks() else {
            return Sense::INVALID_OPCODE.into();
        };
        let kind = cdb.kind();
        let per_block = match kind {
            Kind::CompareAndWrite => 2,
            Kind::Write => 1,
            Kind::Verify if cdb.bytes[1] & 0x06 == 0x02 => 1,
            _ => 0,
        };
        let mut takes = u64::from(blocks) * bytes_per_block * per_block;
        if kind == Kind::WriteSame || (kind == Kind::Verify && cdb.bytes[1] & 0x06 == 0x06) {
            takes = bytes_per_block;
        }
        self.checked_transfer(command, how, lba, blocks).taking(takes as usize)
    }

    fn checked_transfer(&mut self, command: &Command, how: How, lba: u64, blocks: u32) -> Answer {
        let cdb = &command.cdb;
        let kind = cdb.kind();
        let bytes = u64::from(blocks) * self.store.block_bytes() as u64;
        let has_protect =
            !matches!(cdb.opcode(), op::READ_6 | op::WRITE_6 | op::PREFETCH_10 | op::PREFETCH_16)
                && kind != Kind::Flush;
        if kind == Kind::CompareAndWrite
            && matches!(self.personality.compare_and_write, CompareAndWrite::Unsupported)
        {
            return Sense::INVALID_OPCODE.into();
        }
        if kind == Kind::WriteSame && !self.personality.write_same {
            return Sense::INVALID_OPCODE.into();
        }
        if has_protect && cdb.protect() != 0 {
            return invalid_field(1);
        }
        let writes = matches!(kind, Kind::Write | Kind::CompareAndWrite | Kind::WriteSame);
        if writes && self.personality.write_protected {
            return Sense::WRITE_PROTECTED.into();
        }
        if lba.checked_add(u64::from(blocks)).is_none_or(|end| end > self.store.blocks())
            || (blocks == 0 && lba > self.store.blocks())
        {
            return Sense::LBA_OUT_OF_RANGE.into();
        }
        let limit = u64::from(self.personality.max_transfer_blocks);
        let too_long = matches!(kind, Kind::Read | Kind::Write)
            && (bytes > TRANSFER_BYTES_MAX || (limit != 0 && u64::from(blocks) > limit));
        if too_long {
            return invalid_field(10);
        }
        let through = cdb.force_unit_access() && !self.personality.ignores_fua;
        match kind {
            Kind::Read => match self.store.read_blocks(lba, u64::from(blocks)) {
                Ok(data) => Answer::data(data),
                Err(_) => Sense::TARGET_FAILURE.into(),
            },
            Kind::Write if cdb.opcode() == op::ORWRITE => self.or_write(command, lba, blocks, through),
            Kind::Write => self.write(command, how, lba, blocks, through),
            Kind::CompareAndWrite => self.compare_and_write(command, how, lba, blocks, through),
            Kind::WriteSame => self.write_same(command, lba, blocks),
            Kind::Verify => self.verify(command, lba, blocks),
            Kind::Flush => {
                if self.personality.flush_does_nothing {
                    return Answer::good();
                }
                done(match blocks {
                    0 => self.store.flush(),
                    _ => self.store.flush_blocks(lba, u64::from(blocks)),
                })
            }
            // PRE-FETCH.
            _ => Answer::good(),
        }
    }

    /// Of too little data the whole blocks are written; the residual tells the initiator.
    fn write(&mut self, command: &Command, how: How, lba: u64, blocks: u32, through: bool) -> Answer {
        let block_bytes = self.store.block_bytes();
        let mut whole = (command.data.len() / block_bytes).min(blocks as usize);
        if let Some(only) = how.only_blocks {
            whole = whole.min(only as usize);
        }
        if whole == 0 {
            return Answer::good();
        }
        let through = through
            || matches!(
                command.cdb.opcode(),
                op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16
            );
        done(self.store.write(lba, &command.data[..whole * block_bytes], through))
    }

    fn or_write(&mut self, command: &Command, lba: u64, blocks: u32, through: bool) -> Answer {
        let block_bytes = self.store.block_bytes();
        let whole = (command.data.len() / block_bytes).min(blocks as usize);
        let Ok(mut data) = self.store.read_blocks(lba, whole as u64) else {
            return Sense::TARGET_FAILURE.into();
        };
        data.iter_mut().zip(command.data).for_each(|(old, new)| *old |= new);
        done(self.store.write(lba, &data, through))
    }

    fn compare_and_write(
        &mut self,
        command: &Command,
        how: How,
        lba: u64,
        blocks: u32,
        through: bool,
    ) -> Answer {
        let half = blocks as usize * self.store.block_bytes();
        // No blocks are none to compare; but with data the initiator meant some, more than the byte holds.
        let too_many = blocks > u32::from(self.personality.compare_and_write_blocks);
        if too_many || (blocks == 0 && !command.data.is_empty()) {
            return invalid_field(13);
        }
        match self.personality.compare_and_write {
            CompareAndWrite::DoesNothing => return Answer::good(),
            CompareAndWrite::WritesBlindly => {}
            _ if command.data.len() != 2 * half => return Sense::INVALID_FIELD_IN_COMMAND_IU.into(),
            _ => {
                let Ok(current) = self.store.read_blocks(lba, u64::from(blocks)) else {
                    return Sense::TARGET_FAILURE.into();
                };
                if let Some(at) = current.iter().zip(command.data).position(|(a, b)| a != b) {
                    return self.miscompare(at as u32).into();
                }
            }
        }
        if how.compare_only {
            return Answer::good();
        }
        match command.data.get(half..2 * half) {
            Some(new) => done(self.store.write(lba, new, through)),
            None => Sense::INVALID_FIELD_IN_COMMAND_IU.into(),
        }
    }

    /// The second half of a compare-and-write that was compared some time ago.
    pub fn store_swapped(&mut self, command: &Command) -> Answer {
        let Some((lba, blocks)) = command.cdb.blocks() else {
            return Sense::INVALID_OPCODE.into();
        };
        let half = blocks as usize * self.store.block_bytes();
        let through = command.cdb.force_unit_access() && !self.personality.ignores_fua;
        let Some(new) = command.data.get(half..2 * half) else {
            return Sense::INVALID_FIELD_IN_COMMAND_IU.into();
        };
        if lba + u64::from(blocks) > self.store.blocks() {
            return Sense::LBA_OUT_OF_RANGE.into();
        }
        done(self.store.write(lba, new, through)).taking(2 * half)
    }

    pub fn miscompare(&self, at: u32) -> Sense {
        let information = match self.personality.information {
            Information::FirstDifference => Some(at),
            Information::Absent => None,
            Information::Zero => Some(0),
            Information::Wrong => Some(at ^ 0x0155),
        };
        Sense { information, ..Sense::MISCOMPARE }
    }

    fn write_same(&mut self, command: &Command, lba: u64, blocks: u32) -> Answer {
        let flags = command.cdb.bytes[1];
        let (anchor, unmap) = (flags & 0x10 != 0, flags & 0x08 != 0);
        let no_data = command.cdb.opcode() == op::WRITE_SAME_16 && flags & 0x01 != 0;
        if anchor || (unmap && !self.personality.unmap) {
            return invalid_field(1);
        }
        if blocks == 0 || blocks > WRITE_SAME_BLOCKS_MAX {
            return invalid_field(if command.cdb.opcode() == op::WRITE_SAME_10 { 7 } else { 10 });
        }
        let block_bytes = self.store.block_bytes();
        let block = match command.data.get(..block_bytes) {
            _ if no_data => vec![0; block_bytes],
            Some(block) if command.data.len() == block_bytes => block.to_vec(),
            _ => return Sense::INVALID_FIELD_IN_COMMAND_IU.into(),
        };
        done(self.store.fill(lba, u64::from(blocks), &block))
    }

    fn verify(&mut self, command: &Command, lba: u64, blocks: u32) -> Answer {
        let Ok(current) = self.store.read_blocks(lba, u64::from(blocks)) else {
            return Sense::TARGET_FAILURE.into();
        };
        let block_bytes = self.store.block_bytes();
        let difference = match command.cdb.bytes[1] & 0x06 {
            0x00 => None,
            0x02 => current.iter().zip(command.data).position(|(a, b)| a != b),
            0x06 if command.data.len() >= block_bytes => {
                let block = &command.data[..block_bytes];
                current.iter().zip(block.iter().cycle()).position(|(a, b)| a != b)
            }
            _ => return invalid_field(1),
        };
        match difference {
            Some(at) => self.miscompare(at as u32).into(),
            None => Answer::good(),
        }
    }

    fn unmap(&mut self, command: &Command) -> Answer {
        let length = usize::from(command.cdb.u16_at(7));
        self.unmap_list(&command.cdb, command.data.get(..length)).taking(length)
    }

    fn unmap_list(&mut self, cdb: &Cdb, list: Option<&[u8]>) -> Answer {
        if !self.personality.unmap {
            return Sense::INVALID_OPCODE.into();
        }
        if self.personality.write_protected {
            return Sense::WRITE_PROTECTED.into();
        }
        if cdb.bytes[1] & 0x01 != 0 {
            return invalid_field(1);
        }
        let list = match list {
            Some([]) => return Answer::good(),
            Some(list) if list.len() >= 8 => list,
            _ => return Sense::PARAMETER_LIST_LENGTH.into(),
        };
        let said = usize::from(u16::from_be_bytes([list[2], list[3]]));
        let descriptors: Vec<(u64, u32)> = list[8..]
            .chunks_exact(16)
            .take(said / 16)
            .map(|one| {
                let number = |range: &[u8]| range.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
                (number(&one[..8]), number(&one[8..12]) as u32)
            })
            .collect();
        let in_all: u64 = descriptors.iter().map(|(_, blocks)| u64::from(*blocks)).sum();
        if descriptors.len() > UNMAP_LIST_MAX || in_all > u64::from(UNMAP_MAX) {
            return Sense::INVALID_FIELD_IN_PARAMETER_LIST.into();
        }
        let end = self.store.blocks();
        if descriptors.iter().any(|(lba, n)| lba.checked_add(u64::from(*n)).is_none_or(|last| last > end)) {
            return Sense::LBA_OUT_OF_RANGE.into();
        }
        let garbage = vec![0xaf; self.store.block_bytes()];
        for (lba, blocks) in descriptors {
            let result = match self.personality.unmapped {
                Unmapped::Zeroes => self.store.zero(lba, u64::from(blocks)),
                Unmapped::Unchanged => Ok(()),
                Unmapped::Garbage => self.store.fill(lba, u64::from(blocks), &garbage),
            };
            if result.is_err() {
                return Sense::TARGET_FAILURE.into();
            }
        }
        Answer::good().changing()
    }
}
