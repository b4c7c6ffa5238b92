//! Changes of whole ranges as commands of a unit: which command, in pieces of what size, and what instead where the
//! target does not know it. How a command is sent, over which path, and what is said when nobody knows what became
//! of it is the backend's: it brings that as a closure, which sees one command to its end.
//!
//! Invariants
//!
//! 1. **A piece is small enough to end within the deadline of a command**, whatever the target would take in one.
//! 2. **The first piece that fails ends the whole**: nothing behind it is sent, and its error says where it was.
//! 3. **Zeroes are always written, discards are advice**: a target that can't do the one gets blocks of zeroes, one that
//!    can't do the other is left alone.
//!
//! Not for: ranges that don't lie on the unit, and hosts that may only read. Both are refused before.

use super::cdb::{Cdb, unmap_parameters};
use super::inquiry::Description;
use super::transport::Data;
use super::unit::At;
use crate::device::DeviceError;

/// Bytes of one command without data, or with one block for all.
const UNMAP_BYTES: u64 = 256 << 20;
const ZERO_BYTES: u64 = 16 << 20;

/// Tells the target that a range is unused.
pub fn discard(
    unit: &Description,
    offset_bytes: u64,
    len_bytes: u64,
    mut change: impl FnMut(At, &Cdb, Data<'_>) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    if !unit.capacity.unmaps {
        return Ok(());
    }
    let block_bytes = u64::from(unit.capacity.block_bytes);
    let limit = unit.limits.unmap_blocks.map_or(UNMAP_BYTES, |blocks| u64::from(blocks) * block_bytes);
    pieces(offset_bytes, len_bytes, limit.min(UNMAP_BYTES), |offset, len| {
        let list = unmap_parameters(offset / block_bytes, (len / block_bytes) as u32);
        let at = At { op: "discard", offset, len };
        match change(at, &Cdb::unmap(list.len() as u16), Data::Out(&[&list])) {
            // Advice that isn't taken.
            Err(DeviceError::Unsupported { .. }) => Ok(()),
            other => other,
        }
    })
}

/// Fills a range with zeroes; `transfer_bytes` is what one command may carry.
pub fn write_zeroes(
    unit: &Description,
    transfer_bytes: u64,
    offset_bytes: u64,
    len_bytes: u64,
    mut change: impl FnMut(At, &Cdb, Data<'_>) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let block_bytes = u64::from(unit.capacity.block_bytes);
    let limit = unit.limits.write_same_blocks.map_or(ZERO_BYTES, |blocks| blocks.saturating_mul(block_bytes));
    let block = vec![0; block_bytes as usize];
    let mut by_hand = false;
    pieces(offset_bytes, len_bytes, limit.min(ZERO_BYTES), |offset, len| {
        if !by_hand {
            let cdb = Cdb::write_same_16(offset / block_bytes, (len / block_bytes) as u32);
            match change(At { op: "write-zeroes", offset, len }, &cdb, Data::Out(&[&block])) {
                Err(DeviceError::Unsupported { .. }) => by_hand = true,
                other => return other,
            }
        }
        let zeroes = vec![0; transfer_bytes.min(len) as usize];
        pieces(offset, len, zeroes.len() as u64, |offset, len| {
            let cdb = Cdb::write_16(offset / block_bytes, (len / block_bytes) as u32);
            change(At { op: "write", offset, len }, &cdb, Data::Out(&[&zeroes[..len as usize]]))
        })
    })
}

/// Splits a range into pieces of at most `most` bytes.
fn pieces(
    offset_bytes: u64,
    len_bytes: u64,
    most: u64,
    mut each: impl FnMut(u64, u64) -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let mut at = offset_bytes;
    while at < offset_bytes + len_bytes {
        let len = most.min(offset_bytes + len_bytes - at);
        each(at, len)?;
        at += len;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::cdb::opcode;
    use super::super::inquiry::{BlockLimits, Capacity, Standard};
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A unit with blocks of 4096 bytes.
    fn unit(unmaps: bool, limits: BlockLimits) -> Description {
        Description {
            standard: Standard::default(),
            serial: None,
            designators: Vec::new(),
            capacity: Capacity {
                blocks: 1 << 20,
                block_bytes: 4096,
                per_physical: 1,
                unmaps,
                unmapped_is_zero: false,
            },
            limits,
            write_cache: true,
            write_protected: false,
        }
    }

    /// A command as it was sent: code, first block, blocks, bytes of data.
    type Sent = (u8, u64, u32, usize);

    fn noted(cdb: &Cdb, data: &Data<'_>) -> Sent {
        let (bytes, len) = (cdb.bytes(), data.len_bytes());
        let (lba, blocks) = match data {
            Data::Out([list]) if cdb.opcode() == opcode::UNMAP => (&list[8..16], &list[16..20]),
            _ => (&bytes[2..10], &bytes[10..14]),
        };
        let (lba, blocks) = (lba.try_into().unwrap(), blocks.try_into().unwrap());
        (cdb.opcode(), u64::from_be_bytes(lba), u32::from_be_bytes(blocks), len)
    }

    #[test]
    fn discards_in_pieces_or_not_at_all() {
        let mut sent = Vec::new();
        let mut note = |_: At, cdb: &Cdb, data: Data<'_>| {
            sent.push(noted(cdb, &data));
            Ok(())
        };
        discard(&unit(false, BlockLimits::default()), 0, MIB, &mut note).unwrap();
        discard(&unit(true, BlockLimits::default()), MIB, 257 * MIB, &mut note).unwrap();
        let limits = BlockLimits { unmap_blocks: Some(3), ..BlockLimits::default() };
        discard(&unit(true, limits), 0, 4 * 4096, &mut note).unwrap();
        let expected = [(0x42, 256, 65536, 24), (0x42, 65792, 256, 24), (0x42, 0, 3, 24), (0x42, 3, 1, 24)];
        assert_eq!(sent, expected);
        let refuses = |at: At, _: &Cdb, _: Data<'_>| Err(DeviceError::Unsupported { op: at.op });
        discard(&unit(true, BlockLimits::default()), 0, MIB, refuses).unwrap();
    }

    #[test]
    fn zeroes_are_repeated_by_the_target_or_sent() {
        let mut sent = Vec::new();
        let limits = BlockLimits { write_same_blocks: Some(512), ..BlockLimits::default() };
        let mut zero = |limits, same: bool, len| {
            write_zeroes(&unit(true, limits), MIB, 4096, len, |at, cdb, data| {
                sent.push(noted(cdb, &data));
                match same || cdb.opcode() == opcode::WRITE_16 {
                    true => Ok(()),
                    false => Err(DeviceError::Unsupported { op: at.op }),
                }
            })
            .unwrap();
            std::mem::take(&mut sent)
        };
        assert_eq!(
            zero(BlockLimits::default(), true, 17 * MIB),
            [(0x93, 1, 4096, 4096), (0x93, 4097, 256, 4096)]
        );
        assert_eq!(zero(limits, true, 3 * MIB), [(0x93, 1, 512, 4096), (0x93, 513, 256, 4096)]);
        // Asked once; from then on by hand, in what one command may carry.
        let whole = MIB as usize;
        let expected =
            [(0x93, 1, 512, 4096), (0x8A, 1, 256, whole), (0x8A, 257, 256, whole), (0x8A, 513, 1, 4096)];
        assert_eq!(zero(limits, false, 2 * MIB + 4096), expected);
    }

    #[test]
    fn the_first_piece_that_fails_ends_it() {
        for zeroes in [false, true] {
            let mut tried = Vec::new();
            let lost = |at: At, _: &Cdb, _: Data<'_>| {
                tried.push(at.offset);
                let (op, offset_bytes) = (at.op, at.offset);
                match tried.len() {
                    1 => Ok(()),
                    _ => Err(DeviceError::TimedOut { op, offset_bytes, waited_ms: 0 }),
                }
            };
            let unit = unit(true, BlockLimits::default());
            let failed = match zeroes {
                true => write_zeroes(&unit, MIB, 0, 64 * MIB, lost),
                false => discard(&unit, 0, 1024 * MIB, lost),
            };
            let piece = if zeroes { ZERO_BYTES } else { UNMAP_BYTES };
            assert!(
                matches!(failed, Err(DeviceError::TimedOut { offset_bytes, .. }) if offset_bytes == piece)
            );
            assert_eq!(tried, [0, piece]);
        }
    }
}
