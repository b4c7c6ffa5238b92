//! Does a device already carry something? Known signatures of filesystems, partition tables, volume
//! managers and RAID members, for `mkfs` to refuse to overwrite by accident.
//!
//! Reads only, through the ordinary device interface, and few kilobytes of it. Errs on the side of a
//! warning: a match is a magic number at its place, not a verified superblock. LunFS's own superblock
//! is not in the table; the layout room knows it.
//!
//! Not for: finding out what a filesystem is called or how large it is.

mod table;

use std::collections::HashMap;

use self::table::{Check, MAGICS, Place};
use super::{AlignedBuf, BlockDevice, DeviceError};

/// Bytes read at once and kept while probing.
const CHUNK_BYTES: u64 = 64 * 1024;

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// What it belongs to, such as `ext4` or `LVM2 physical volume`.
    pub name: &'static str,
    /// Where its magic number stands, in bytes from the start of the device.
    pub offset_bytes: u64,
}

/// Everything known that the device carries, by offset; each name once.
pub fn probe(device: &dyn BlockDevice) -> Result<Vec<Signature>, DeviceError> {
    let mut reader = Reader { device, size_bytes: device.geometry().size_bytes, chunks: HashMap::new() };
    let mut found: Vec<Signature> = Vec::new();
    for entry in MAGICS {
        for place in entry.places {
            let Some(offset_bytes) = place.on(reader.size_bytes) else { continue };
            if found.iter().any(|s| s.name == entry.name) {
                break;
            }
            if reader.matches(offset_bytes, entry.magic)? && checked(entry.check, &mut reader, offset_bytes)?
            {
                found.push(Signature { name: entry.name, offset_bytes });
            }
        }
    }
    if let Some(offset_bytes) = zfs_uberblock(&mut reader)? {
        found.push(Signature { name: "zfs member", offset_bytes });
    }
    // A boot sector of FAT, NTFS or exFAT ends like a partition table.
    if !found.iter().any(|s| matches!(s.name, "vfat" | "ntfs" | "exfat")) && has_partitions(&mut reader)? {
        found.push(Signature { name: "MBR partition table", offset_bytes: 510 });
    }
    found.sort_by_key(|s| s.offset_bytes);
    Ok(found)
}

impl Place {
    /// The offset on a device of this size, if it has one there.
    fn on(self, size_bytes: u64) -> Option<u64> {
        match self {
            Place::Start(offset) => Some(offset),
            Place::BeforeEnd(distance) => size_bytes.checked_sub(distance),
            // md 1.0: 8 KiB before the end, rounded down to 4 KiB, both in sectors.
            Place::Md10 => Some(((size_bytes / 512).checked_sub(16)? & !7) * 512),
            // md 0.90: the last 64 KiB that begin on a 64 KiB boundary.
            Place::Md090 => (size_bytes & !0xFFFF).checked_sub(0x1_0000),
        }
    }
}

/// Looks twice where a magic number alone is too weak, or names several things.
fn checked(check: Check, reader: &mut Reader<'_>, magic_at: u64) -> Result<bool, DeviceError> {
    Ok(match check {
        Check::None => true,
        Check::Follows { distance, bytes } => reader.matches(magic_at + distance, bytes)?,
        Check::Ext(generation) => {
            // Feature words: 0x5C and 0x60 of a superblock whose magic is at 0x38.
            let compat = reader.u32_le(magic_at + 0x5C - 0x38)?.unwrap_or(0);
            let incompat = reader.u32_le(magic_at + 0x60 - 0x38)?.unwrap_or(0);
            let of = match (incompat & !0x1F != 0, compat & 4 != 0 || incompat & 8 != 0) {
                (true, _) => 4,
                (false, true) => 3,
                (false, false) => 2,
            };
            of == generation
        }
    })
}

/// Any of the 128 places for an uberblock in each of the four labels of a ZFS member.
fn zfs_uberblock(reader: &mut Reader<'_>) -> Result<Option<u64>, DeviceError> {
    const LABEL_BYTES: u64 = 256 * 1024;
    const MAGIC: u64 = 0x00BA_B10C;
    let end = reader.size_bytes - reader.size_bytes % LABEL_BYTES;
    if end < 4 * LABEL_BYTES {
        return Ok(None);
    }
    for label in [0, LABEL_BYTES, end - 2 * LABEL_BYTES, end - LABEL_BYTES] {
        for slot in 0..128 {
            let at = label + 128 * 1024 + slot * 1024;
            if reader.matches(at, &MAGIC.to_le_bytes())? || reader.matches(at, &MAGIC.to_be_bytes())? {
                return Ok(Some(at));
            }
        }
    }
    Ok(None)
}

/// A boot signature and at least one entry that could be a partition.
fn has_partitions(reader: &mut Reader<'_>) -> Result<bool, DeviceError> {
    let mut sector = [0; 512];
    if !reader.copy(0, &mut sector)? || sector[510..] != [0x55, 0xAA] {
        return Ok(false);
    }
    let entries = sector[446..510].chunks_exact(16);
    let sane = |e: &[u8]| e[0] == 0 || e[0] == 0x80;
    Ok(entries.clone().all(sane) && entries.clone().any(|e| e[4] != 0 && e[12..16] != [0; 4]))
}

/// Reads the device in chunks and keeps them.
struct Reader<'a> {
    device: &'a dyn BlockDevice,
    size_bytes: u64,
    chunks: HashMap<u64, AlignedBuf>,
}

impl Reader<'_> {
    /// Copies bytes out of the device; false if they lie beyond its end.
    fn copy(&mut self, offset_bytes: u64, out: &mut [u8]) -> Result<bool, DeviceError> {
        let Some(end) = offset_bytes.checked_add(out.len() as u64).filter(|end| *end <= self.size_bytes)
        else {
            return Ok(false);
        };
        let mut at = offset_bytes;
        while at < end {
            let start = at - at % CHUNK_BYTES;
            let chunk = self.chunk(start)?;
            let from = (at - start) as usize;
            let n = (chunk.len() - from).min((end - at) as usize);
            let to = (at - offset_bytes) as usize;
            out[to..to + n].copy_from_slice(&chunk[from..from + n]);
            at += n as u64;
        }
        Ok(true)
    }

    fn chunk(&mut self, start: u64) -> Result<&AlignedBuf, DeviceError> {
        use std::collections::hash_map::Entry;
        match self.chunks.entry(start) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let mut buf = AlignedBuf::zeroed(CHUNK_BYTES.min(self.size_bytes - start) as usize);
                self.device.read(start, &mut buf)?;
                Ok(entry.insert(buf))
            }
        }
    }

    fn matches(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<bool, DeviceError> {
        let mut found = [0; 32];
        let Some(found) = found.get_mut(..bytes.len()) else { return Ok(false) };
        Ok(self.copy(offset_bytes, found)? && found == bytes)
    }

    fn u32_le(&mut self, offset_bytes: u64) -> Result<Option<u32>, DeviceError> {
        let mut bytes = [0; 4];
        Ok(self.copy(offset_bytes, &mut bytes)?.then(|| u32::from_le_bytes(bytes)))
    }
}

#[cfg(test)]
mod tests;
