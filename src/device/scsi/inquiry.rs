//! What a target says of itself: capacity, identity, limits, write cache. Bytes to structures, no I/O.
//!
//! Nothing here is a promise. Lengths are taken from what arrived, never from what a header says beyond it; a page
//! that is missing or senseless is an absence, except where the device can't be used without it.

use thiserror::Error;

/// An answer from which nothing can be learned.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("the answer to {what} makes no sense: {why}")]
pub struct Senseless {
    pub what: &'static str,
    pub why: String,
}

fn senseless(what: &'static str, why: impl Into<String>) -> Senseless {
    Senseless { what, why: why.into() }
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Text of a fixed field: printable ASCII without the padding.
fn text(bytes: &[u8]) -> String {
    let shown = |b: &u8| if (0x20..0x7F).contains(b) { char::from(*b) } else { '?' };
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    bytes[..end].iter().map(shown).collect::<String>().trim().to_owned()
}

/// READ CAPACITY(16).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    pub blocks: u64,
    pub block_bytes: u32,
    /// Logical blocks of one physical block.
    pub per_physical: u32,
    /// Logical blocks can be unmapped; unmapped ones read as zeroes.
    pub unmaps: bool,
    pub unmapped_is_zero: bool,
}

impl Capacity {
    pub fn decode(bytes: &[u8]) -> Result<Capacity, Senseless> {
        let fail = |why: &str| senseless("read capacity", why);
        let (Some(last), Some(block_bytes)) = (be64(bytes, 0), be32(bytes, 8)) else {
            return Err(fail("too short"));
        };
        let blocks = last.checked_add(1).ok_or_else(|| fail("no capacity"))?;
        if block_bytes == 0 || blocks.checked_mul(block_bytes.into()).is_none() {
            return Err(fail("sizes that can't be"));
        }
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        Ok(Capacity {
            blocks,
            block_bytes,
            per_physical: 1 << (byte(13) & 0x0F),
            unmaps: byte(14) & 0x80 != 0,
            unmapped_is_zero: byte(14) & 0x40 != 0,
        })
    }

    pub fn size_bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_bytes.into())
    }
}

/// Standard INQUIRY data.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Standard {
    pub vendor: String,
    pub product: String,
    pub revision: String,
}

impl Standard {
    /// Fails unless it is a disk that is there.
    pub fn decode(bytes: &[u8]) -> Result<Standard, Senseless> {
        let fail = |why: &str| senseless("inquiry", why);
        let first = *bytes.first().ok_or_else(|| fail("empty"))?;
        if first >> 5 != 0 {
            return Err(fail("there is no such logical unit"));
        }
        if first & 0x1F != 0 {
            return Err(fail("it is no disk"));
        }
        let field =
            |from: usize, to: usize| bytes.get(from..to.min(bytes.len())).map(text).unwrap_or_default();
        Ok(Standard { vendor: field(8, 16), product: field(16, 32), revision: field(32, 36) })
    }
}

/// The body of a vital product data page, if it is the page that was asked for.
fn page(bytes: &[u8], code: u8) -> Option<&[u8]> {
    if *bytes.get(1)? != code {
        return None;
    }
    let len = usize::from(be16(bytes, 2)?);
    let body = bytes.get(4..)?;
    Some(&body[..len.min(body.len())])
}

/// Page 80h: the unit serial number.
pub fn serial(bytes: &[u8]) -> Option<String> {
    page(bytes, 0x80).map(text).filter(|serial| !serial.is_empty())
}

/// Page 83h: the designators that name the logical unit itself, as bytes with their kind, in order. Two paths lead
/// to one unit only if these agree.
pub fn designators(bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    let mut rest = page(bytes, 0x83).unwrap_or_default();
    while let [_, kind, _, len, ..] = rest {
        let end = 4 + usize::from(*len);
        let body = &rest[4..end.min(rest.len())];
        // Association 0: the logical unit; others name ports and targets.
        if kind >> 4 & 3 == 0 && !body.is_empty() {
            found.push((kind & 0x0F, body.to_vec()));
        }
        match rest.get(end..) {
            Some(next) => rest = next,
            None => break,
        }
    }
    found.sort();
    found
}

/// Page B0h: limits; absent or zero means that none is reported.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BlockLimits {
    /// Not to be believed: see the module header of `scsi`.
    pub compare_and_write_blocks: u8,
    pub transfer_blocks: Option<u32>,
    pub unmap_blocks: Option<u32>,
    pub write_same_blocks: Option<u64>,
}

impl BlockLimits {
    pub fn decode(bytes: &[u8]) -> BlockLimits {
        let Some(body) = page(bytes, 0xB0) else { return BlockLimits::default() };
        BlockLimits {
            compare_and_write_blocks: body.get(1).copied().unwrap_or(0),
            transfer_blocks: be32(body, 4).filter(|n| *n > 0),
            unmap_blocks: be32(body, 16).filter(|n| *n > 0),
            write_same_blocks: be64(body, 32).filter(|n| *n > 0),
        }
    }
}

/// MODE SENSE(6) of the caching page: is there a volatile write cache, and is the unit write protected?
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Caching {
    pub write_cache: bool,
    pub write_protected: bool,
}

impl Caching {
    /// `None`: the target doesn't say.
    pub fn decode(bytes: &[u8]) -> Option<Caching> {
        let write_protected = bytes.get(2)? & 0x80 != 0;
        let at = 4 + usize::from(*bytes.get(3)?);
        let page = bytes.get(at..)?;
        if page.first()? & 0x3F != 0x08 {
            return None;
        }
        Some(Caching { write_cache: page.get(2)? & 0x04 != 0, write_protected })
    }
}

/// Everything about a unit that doesn't change while it is the same unit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    pub standard: Standard,
    pub serial: Option<String>,
    pub designators: Vec<(u8, Vec<u8>)>,
    pub capacity: Capacity,
    pub limits: BlockLimits,
    /// Assumed where the target doesn't say.
    pub write_cache: bool,
    pub write_protected: bool,
}

impl Description {
    /// Why what is found on a path now can't be the unit it was, if so. A unit may grow, not shrink.
    pub fn differs_from(&self, earlier: &Description) -> Option<String> {
        if self.designators != earlier.designators || self.serial != earlier.serial {
            return Some("another logical unit answers there now".into());
        }
        if self.capacity.block_bytes != earlier.capacity.block_bytes {
            return Some("its logical block has another size now".into());
        }
        if self.capacity.blocks < earlier.capacity.blocks {
            let (now, then) = (self.capacity.blocks, earlier.capacity.blocks);
            return Some(format!("it has shrunk from {then} blocks to {now}"));
        }
        None
    }

    /// The name of the unit for people: its best designator, else its serial number.
    pub fn name(&self) -> String {
        let naa = self.designators.iter().find(|(kind, _)| *kind == 3);
        match naa.or(self.designators.first()) {
            Some((kind @ (2 | 3), bytes)) => {
                let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
                format!("{}{hex}", if *kind == 3 { "naa." } else { "eui." })
            }
            Some((_, bytes)) => text(bytes),
            None => self.serial.clone().unwrap_or_default(),
        }
    }

    /// All of it for people, as `BlockDevice::about` has it.
    pub fn about(&self) -> Vec<(&'static str, String)> {
        let or_none = |n: Option<u32>| n.map_or("not said".to_owned(), |n| format!("{n} blocks"));
        let (standard, capacity) = (&self.standard, &self.capacity);
        let unmap = match (capacity.unmaps, capacity.unmapped_is_zero) {
            (false, _) => "no",
            (true, false) => "yes",
            (true, true) => "yes, reads as zeroes",
        };
        vec![
            ("vendor", standard.vendor.clone()),
            ("model", standard.product.clone()),
            ("firmware", standard.revision.clone()),
            ("serial", self.serial.clone().unwrap_or_default()),
            ("name", self.name()),
            ("logical block", format!("{} bytes", capacity.block_bytes)),
            ("physical block", format!("{} bytes", capacity.block_bytes * capacity.per_physical)),
            ("size", format!("{} bytes", capacity.size_bytes())),
            ("write cache", if self.write_cache { "on" } else { "off" }.into()),
            ("unmap", unmap.into()),
            ("largest transfer", or_none(self.limits.transfer_blocks)),
            ("says of compare-and-write", format!("{} blocks", self.limits.compare_and_write_blocks)),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn capacity() {
        let mut bytes = vec![0; 32];
        bytes[..8].copy_from_slice(&0x3F_FFFFu64.to_be_bytes());
        bytes[8..12].copy_from_slice(&512u32.to_be_bytes());
        (bytes[13], bytes[14]) = (3, 0xC0);
        let capacity = Capacity::decode(&bytes).unwrap();
        assert_eq!((capacity.size_bytes(), capacity.per_physical), (2 << 30, 8));
        assert!(capacity.unmaps && capacity.unmapped_is_zero);
        assert!(Capacity::decode(&bytes[..11]).is_err());
        bytes[..8].fill(0xFF);
        assert!(Capacity::decode(&bytes).is_err());
        bytes[7] = 0xFE;
        assert!(Capacity::decode(&bytes).is_err(), "the size in bytes overflows");
    }

    #[test]
    fn identity() {
        let mut bytes = vec![0; 36];
        bytes[8..36].copy_from_slice(b"ACME    LUN of tests    0007");
        let standard = Standard::decode(&bytes).unwrap();
        assert_eq!(
            (&*standard.vendor, &*standard.product, &*standard.revision),
            ("ACME", "LUN of tests", "0007")
        );
        bytes[0] = 0x7F;
        assert!(Standard::decode(&bytes).unwrap_err().to_string().contains("no such logical unit"));
        bytes[0] = 0x05;
        assert!(Standard::decode(&bytes).unwrap_err().to_string().contains("no disk"));
        assert_eq!(serial(b"\0\x80\0\x04 42 "), Some("42".into()));
        assert_eq!(serial(b"\0\x83\0\x04 42 "), None);
        assert_eq!(serial(b"\0\x80\xFF\xFFab"), Some("ab".into()));
    }

    #[test]
    fn designators_of_the_unit_only() {
        let mut bytes = vec![0, 0x83, 0, 0];
        bytes.extend([1, 0x03, 0, 2, 0x60, 0x01]);
        bytes.extend([1, 0x14, 0, 4, 0, 0, 0, 1]);
        bytes.extend([2, 0x01, 0, 3, b'a', b'b', b'c']);
        bytes[3] = (bytes.len() - 4) as u8;
        assert_eq!(designators(&bytes), [(1, b"abc".to_vec()), (3, vec![0x60, 0x01])]);
        // A length beyond the end: what is there, and no more.
        let at = bytes.len() - 4;
        bytes[at] = 200;
        assert_eq!(designators(&bytes)[0], (1, b"abc".to_vec()));
    }

    #[test]
    fn caching_page() {
        let bytes = [23, 0, 0x90, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0x88, 0x12, 0x04, 0];
        assert_eq!(Caching::decode(&bytes), Some(Caching { write_cache: true, write_protected: true }));
        assert_eq!(Caching::decode(&bytes[..12]), None);
        let bytes = [23, 0, 0, 0, 0x08, 0x12, 0x00];
        assert_eq!(Caching::decode(&bytes), Some(Caching { write_cache: false, write_protected: false }));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn any_bytes(code in prop::sample::select(vec![0x80u8, 0x83, 0xB0, 0]), mut bytes in
            proptest::collection::vec(any::<u8>(), 0..128)) {
            if let Some(second) = bytes.get_mut(1) {
                *second = code;
            }
            let _ = (Capacity::decode(&bytes), Standard::decode(&bytes), serial(&bytes), Caching::decode(&bytes));
            let _ = BlockLimits::decode(&bytes);
            let total: usize = designators(&bytes).iter().map(|(_, body)| body.len()).sum();
            prop_assert!(total <= bytes.len());
        }
    }
}
