//! Typed atomic test-and-set: the only caller of compare-and-write.
//!
//! A swap has three outcomes: done, miscompare, unknown (invariant 6). Unknown is resolved here as far as
//! the content of the block can: one of our images for this swap is there: done (the classic false
//! miscompare). The old image is still there: nothing is decided, since the command may execute later; we go
//! on only after another swap of ours from that same image, with a new nonce, has landed: then the late one
//! can only miscompare. Anything else is returned as found, and its content decides.
//!
//! The compare image is the whole logical block as just read, and the new image keeps what lies behind the
//! record: a record formatted at 512 bytes stays right on a device of 4096.
//!
//! Not for: deciding what to write, or what a found image means (`lock`, `heartbeat`, `demand`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;

use crate::device::{AlignedBuf, CompareOutcome, DeviceError, Executed};
use crate::layout::demand::DoorbellRecord;
use crate::layout::lock::LockRecord;
use crate::layout::slot::SlotRecord;
use crate::layout::{LayoutError, Nonce};
use crate::lease::{Door, IoClass, LeaseState};
use crate::rt;
use crate::types::{BlockNo, VolumeId};

/// A record that changes by swap.
pub trait SwapRecord: Clone + PartialEq + std::fmt::Debug {
    fn address(&self) -> BlockNo;
    fn nonce(&self) -> Nonce;
    fn set_nonce(&mut self, nonce: Nonce);
    fn encode(&self, volume: VolumeId, block: &mut [u8]);
    fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError>;
}

macro_rules! swap_record {
    ($type:ty) => {
        impl SwapRecord for $type {
            fn address(&self) -> BlockNo {
                self.address
            }
            fn nonce(&self) -> Nonce {
                self.nonce
            }
            fn set_nonce(&mut self, nonce: Nonce) {
                self.nonce = nonce;
            }
            fn encode(&self, volume: VolumeId, block: &mut [u8]) {
                <$type>::encode(self, volume, block);
            }
            fn decode(block: &[u8], volume: VolumeId, at: BlockNo) -> Result<Self, LayoutError> {
                <$type>::decode(block, volume, at)
            }
        }
    };
}
swap_record!(LockRecord);
swap_record!(SlotRecord);
swap_record!(DoorbellRecord);

/// A logical block as it was read, and the record in it.
#[derive(Clone, Debug)]
pub struct Image<R> {
    pub record: R,
    /// The block without the zeroes at its end: a host remembers an image for each lock it knows.
    bytes: Box<[u8]>,
}

impl<R> Image<R> {
    fn new(record: R, block: &[u8]) -> Self {
        let len = block.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        Image { record, bytes: block[..len].into() }
    }

    /// The whole logical block, fit for I/O.
    fn block(&self, logical_bytes: usize) -> AlignedBuf {
        let mut block = AlignedBuf::zeroed(logical_bytes.max(self.bytes.len()));
        block[..self.bytes.len()].copy_from_slice(&self.bytes);
        block
    }
}

/// What became of a swap.
#[derive(Debug)]
pub enum Swapped<R> {
    /// Our image is on the disk, this one.
    Done(Image<R>),
    /// The block holds something else; nothing of ours from this call is in it or can get there any more.
    Miscompare(Image<R>),
}

/// A swap or read that came to no result.
#[derive(Clone, Debug, Error)]
pub enum AtsError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Damaged(#[from] LayoutError),
}

/// Swaps by how they ended.
#[derive(Default, Debug)]
pub struct AtsStats {
    pub done: AtomicU64,
    /// Another host was faster, or we compared with an image that was no longer true.
    pub miscompared: AtomicU64,
    /// No usable answer came; the content of the block decided.
    pub unknown: AtomicU64,
    /// "Miscompare" against our own image: the command had been executed before (a retry below us).
    pub own_had_landed: AtomicU64,
}

/// Reads and swaps records through the door.
pub struct Ats {
    door: Arc<Door>,
    volume: VolumeId,
    logical_bytes: usize,
    nonce_seed: u64,
    nonce_counter: AtomicU64,
    pub stats: AtsStats,
}

/// A record whose checksum is wrong is read again this often before it is called damaged.
const TORN_TRIES: u32 = 3;
/// Pause before a block is looked at again after an unknown outcome.
const RESOLVE_PAUSE: Duration = Duration::from_millis(5);

impl Ats {
    pub fn new(door: Arc<Door>, volume: VolumeId) -> Self {
        let logical_bytes = door.geometry().logical_block_bytes as usize;
        Ats {
            door,
            volume,
            logical_bytes,
            nonce_seed: rt::random_u64(),
            nonce_counter: AtomicU64::new(1),
            stats: AtsStats::default(),
        }
    }

    pub fn door(&self) -> &Arc<Door> {
        &self.door
    }

    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// A nonce that no image on this volume ever carried.
    pub fn fresh_nonce(&self) -> Nonce {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.nonce_seed.to_le_bytes());
        let count = self.nonce_counter.fetch_add(1, Ordering::Relaxed);
        bytes[8..].copy_from_slice(&count.to_le_bytes());
        Nonce(bytes)
    }

    /// The block as it is on the disk now.
    pub fn read<R: SwapRecord>(&self, class: IoClass, at: BlockNo) -> Result<Image<R>, AtsError> {
        let mut bytes = AlignedBuf::zeroed(self.logical_bytes);
        let mut tries = 0;
        loop {
            self.door.read(class, at, &mut bytes)?;
            match R::decode(&bytes, self.volume, at) {
                Ok(record) => return Ok(Image::new(record, &bytes)),
                // A read beside a swap may see half of each on some paths.
                Err(LayoutError::Checksum { .. }) if tries < TORN_TRIES => tries += 1,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// An image from bytes read in a larger read; `bytes` starts at the record's block.
    pub fn image_from<R: SwapRecord>(&self, at: BlockNo, bytes: &[u8]) -> Result<Image<R>, AtsError> {
        let record = R::decode(bytes, self.volume, at)?;
        let logical = bytes.get(..self.logical_bytes).unwrap_or(bytes);
        Ok(Image::new(record, logical))
    }

    /// The image of a record that this host itself wrote by a plain write (the birth of a lock): the
    /// rest of the block is zero.
    pub fn image_of_born<R: SwapRecord>(&self, record: &R) -> Image<R> {
        let mut bytes = vec![0; self.logical_bytes];
        record.encode(self.volume, &mut bytes);
        Image::new(record.clone(), &bytes)
    }

    /// Replaces `from` by `to`, under a fresh nonce, if the block still equals `from`.
    pub fn swap<R: SwapRecord>(
        &self,
        class: IoClass,
        from: &Image<R>,
        to: &R,
    ) -> Result<Swapped<R>, AtsError> {
        let at = to.address();
        let mut record = to.clone();
        let expected = from.block(self.logical_bytes);
        // All images this call tried; any of them found on the disk is ours.
        let mut tried: Vec<Image<R>> = Vec::new();
        loop {
            record.set_nonce(self.fresh_nonce());
            let mut new = expected.clone();
            record.encode(self.volume, &mut new);
            let outcome = self.door.compare_and_write(class, at, &expected, &new);
            tried.push(Image::new(record.clone(), &new));
            match outcome {
                Ok(CompareOutcome::Swapped) => {
                    self.stats.done.fetch_add(1, Ordering::Relaxed);
                    return Ok(Swapped::Done(tried.swap_remove(tried.len() - 1)));
                }
                Ok(CompareOutcome::Miscompare) => {
                    let found = self.read_until_answered::<R>(class, at)?;
                    if let Some(i) = tried.iter().position(|t| t.bytes[..] == found.bytes[..]) {
                        self.stats.own_had_landed.fetch_add(1, Ordering::Relaxed);
                        log::debug!("swap of block {at}: miscompare, but our own write had landed");
                        return Ok(Swapped::Done(tried.swap_remove(i)));
                    }
                    self.stats.miscompared.fetch_add(1, Ordering::Relaxed);
                    return Ok(Swapped::Miscompare(found));
                }
                Err(e) if self.may_repeat(&e) && e.executed() == Executed::No => {
                    // Not executed and never will be (busy, unit attention): the same again.
                    log::debug!("swap of block {at}: {e}; again");
                    tried.pop();
                    rt::sleep(RESOLVE_PAUSE);
                }
                Err(e) if !self.may_repeat(&e) => return Err(e.into()),
                Err(e) => {
                    self.stats.unknown.fetch_add(1, Ordering::Relaxed);
                    log::warn!("swap of block {at}: outcome unknown ({e}); reading the block");
                    let found = self.read_until_answered::<R>(class, at)?;
                    if let Some(i) = tried.iter().position(|t| t.bytes[..] == found.bytes[..]) {
                        return Ok(Swapped::Done(tried.swap_remove(i)));
                    }
                    if found.bytes[..] != from.bytes[..] {
                        self.stats.miscompared.fetch_add(1, Ordering::Relaxed);
                        return Ok(Swapped::Miscompare(found));
                    }
                    // The old image: not decided. Go round with a new nonce.
                    rt::sleep(RESOLVE_PAUSE);
                }
            }
        }
    }

    /// Is a command worth repeating after this error? Within the lease a device may come back; without a
    /// lease yet, the caller decides.
    fn may_repeat(&self, e: &DeviceError) -> bool {
        let passing = matches!(e, DeviceError::Io { .. } | DeviceError::TimedOut { .. });
        passing
            && (e.executed() == Executed::Maybe
                || matches!(self.door.lease().state(), LeaseState::Running { .. }))
    }

    /// Reads until an answer comes or the lease ends: without one nothing can be decided.
    fn read_until_answered<R: SwapRecord>(&self, class: IoClass, at: BlockNo) -> Result<Image<R>, AtsError> {
        loop {
            match self.read(class, at) {
                Err(AtsError::Device(e)) if self.may_repeat(&e) => {
                    log::warn!("block {at}: {e}; trying again");
                    rt::sleep(RESOLVE_PAUSE);
                }
                other => return other,
            }
        }
    }

    /// Makes what was seen so far durable where the device could forget it: no host acts on a swapped
    /// image, its own or another's, before this.
    pub fn settle(&self, class: IoClass) -> Result<(), AtsError> {
        Ok(self.door.flush(class)?)
    }
}
