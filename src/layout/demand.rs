//! Doorbells and request blocks: how a host asks for a lock without a network.
//!
//! The request block is the truth (what its host wants); the doorbell is a hint that says whose request
//! block to read. A doorbell changes by swap, a request block by plain writes of its slot's host only.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Block, Header, LayoutError, Magic, Nonce, RECORD_BYTES, seal, verify};
use crate::types::{BLOCK_BYTES, BlockNo, Incarnation, SlotSet, VolumeId};

/// Who rang at a slot since its host last looked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DoorbellRecord {
    pub address: BlockNo,
    pub ringers: SlotSet,
    pub swap_counter: u64,
    pub nonce: Nonce,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct DoorbellDisk {
    /*00*/ header: Header,
    /*40*/ ringers: [u8; 32],
    /*60*/ swap_counter: U64,
    /*68*/ reserved: [u8; 408],
}
const _: () = assert!(size_of::<DoorbellDisk>() == RECORD_BYTES);

impl DoorbellRecord {
    /// A doorbell nobody ever rang, as mkfs writes it.
    pub fn new(address: BlockNo) -> Self {
        DoorbellRecord { address, ringers: SlotSet::EMPTY, swap_counter: 0, nonce: Nonce::default() }
    }

    /// Writes the record into the first [`RECORD_BYTES`] of `block`, sealed; the rest is kept.
    pub fn encode(&self, volume: VolumeId, block: &mut [u8]) {
        let mut header = Header::new(Magic::Doorbell, volume, self.address, BlockNo(0));
        header.nonce = self.nonce.0;
        let disk = DoorbellDisk {
            header,
            ringers: self.ringers.to_bytes(),
            swap_counter: U64::new(self.swap_counter),
            reserved: [0; 408],
        };
        block[..RECORD_BYTES].copy_from_slice(disk.as_bytes());
        seal(&mut block[..RECORD_BYTES]);
    }

    /// Reads and checks the record at the start of `block`.
    pub fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
        let what = Magic::Doorbell.name();
        let bytes = block.get(..RECORD_BYTES).ok_or(LayoutError::Short { what, at })?;
        verify(bytes, Magic::Doorbell, volume, at)?;
        let disk = DoorbellDisk::read_from_bytes(bytes).map_err(|_| LayoutError::Short { what, at })?;
        Ok(DoorbellRecord {
            address: at,
            ringers: SlotSet::from_bytes(disk.ringers),
            swap_counter: disk.swap_counter.get(),
            nonce: Nonce(disk.header.nonce),
        })
    }
}

/// What a host wants of a lock's holders.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Want {
    Shared,
    Exclusive,
    /// "Tell me whether you still have this inode open": who has not clears its opener bit.
    Openers,
}

/// One wait of one host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    pub lock: BlockNo,
    pub want: Want,
    /// The lock's swap counter when the wait began: its age, without a clock.
    pub since: u64,
}

/// All waits of one host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RequestBlock {
    pub address: BlockNo,
    /// Which life of the slot asks; requests of an earlier life are void.
    pub incarnation: Incarnation,
    /// Raised by every write of the block.
    pub sequence: u64,
    pub requests: Vec<Request>,
}

/// The most waits that fit into a request block; further ones wait for a place.
pub const MAX_REQUESTS: usize = 128;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RequestDisk {
    /*00*/ lock: U64,
    /*08*/ since: U64,
    /*10*/ want: u8,
    /*11*/ reserved: [u8; 7],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RequestBlockDisk {
    /*000*/ header: Header,
    /*040*/ incarnation: U64,
    /*048*/ sequence: U64,
    /*050*/ count: U16,
    /*052*/ reserved0: [u8; 14],
    /*060*/ requests: [RequestDisk; MAX_REQUESTS],
    /*c60*/ reserved: [u8; BLOCK_BYTES - 0xc60],
}
const _: () = assert!(size_of::<RequestBlockDisk>() == BLOCK_BYTES);

impl Want {
    fn code(self) -> u8 {
        match self {
            Want::Shared => 1,
            Want::Exclusive => 2,
            Want::Openers => 3,
        }
    }
}

impl RequestBlock {
    /// A request block without requests, as mkfs writes it.
    pub fn new(address: BlockNo) -> Self {
        RequestBlock { address, incarnation: Incarnation(0), sequence: 0, requests: Vec::new() }
    }

    /// The block, sealed. Requests beyond [`MAX_REQUESTS`] are left out.
    pub fn encode(&self, volume: VolumeId, block: &mut Block) {
        let mut disk = RequestBlockDisk::new_zeroed();
        disk.header = Header::new(Magic::Request, volume, self.address, BlockNo(0));
        disk.incarnation = U64::new(self.incarnation.0);
        disk.sequence = U64::new(self.sequence);
        let count = self.requests.len().min(MAX_REQUESTS);
        disk.count = U16::new(count as u16);
        for (to, from) in disk.requests.iter_mut().zip(&self.requests) {
            *to = RequestDisk {
                lock: U64::new(from.lock.0),
                since: U64::new(from.since),
                want: from.want.code(),
                reserved: [0; 7],
            };
        }
        block.copy_from_slice(disk.as_bytes());
        seal(&mut block[..]);
    }

    /// Reads and checks a request block.
    pub fn decode(block: &Block, volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
        let what = Magic::Request.name();
        verify(&block[..], Magic::Request, volume, at)?;
        let disk =
            RequestBlockDisk::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        let count = usize::from(disk.count.get());
        let bad = |field, value| LayoutError::Field { what, at, field, value };
        let used = disk.requests.get(..count).ok_or_else(|| bad("count", count as u64))?;
        let requests = used
            .iter()
            .map(|r| {
                let want = match r.want {
                    1 => Want::Shared,
                    2 => Want::Exclusive,
                    3 => Want::Openers,
                    other => return Err(bad("want", other.into())),
                };
                Ok(Request { lock: BlockNo(r.lock.get()), want, since: r.since.get() })
            })
            .collect::<Result<_, _>>()?;
        Ok(RequestBlock {
            address: at,
            incarnation: Incarnation(disk.incarnation.get()),
            sequence: disk.sequence.get(),
            requests,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::zero_block;
    use crate::types::Slot;

    #[test]
    fn round_trips() {
        let volume = VolumeId([1; 16]);
        let bell = DoorbellRecord {
            address: BlockNo(5),
            ringers: SlotSet::of(Slot(9)),
            swap_counter: 3,
            nonce: Nonce([1; 16]),
        };
        let mut block = zero_block();
        bell.encode(volume, &mut block[..]);
        assert_eq!(DoorbellRecord::decode(&block[..], volume, BlockNo(5)), Ok(bell));
        let requests = vec![Request { lock: BlockNo(8), want: Want::Openers, since: 2 }; MAX_REQUESTS];
        let all = RequestBlock { address: BlockNo(6), incarnation: Incarnation(1), sequence: 7, requests };
        all.encode(volume, &mut block);
        assert_eq!(RequestBlock::decode(&block, volume, BlockNo(6)), Ok(all));
    }
}
