//! Repairs of superblocks, slots, journals, locks and clusters.

use std::sync::Arc;

use zerocopy::IntoBytes;
use zerocopy::little_endian::U16;

use super::finding::{Finding, Kind, Place};
use super::patch::PatchError;
use super::repair::One;
use super::{FsckError, Report};
use crate::ats::{AtsError, Image, Swapped};
use crate::device::{AlignedBuf, BlockDevice};
use crate::inspect::Volume;
use crate::layout::cluster::{ClusterHeader, ClusterMap};
use crate::layout::demand::{DoorbellRecord, RequestBlock};
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES};
use crate::layout::inode::{Form, InodeDisk};
use crate::layout::journal::JournalHeader;
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::layout::slot::{SlotRecord, SlotState};
use crate::layout::{Magic, header_of, zero_block};
use crate::lease::IoClass;
use crate::types::{BLOCK_BYTES, BlockNo, Incarnation, InodeNo, MAX_SLOTS, Slot, SlotSet};

/// What must be readable before a slot can be claimed and the volume lock be taken. While it is not, no host can
/// mount.
pub fn footing_needed(volume: &Volume<'_>) -> bool {
    volume.geometry().all_slots().any(|slot| volume.slot(slot).is_err())
        || volume.lock(volume.geometry().volume_lock()).is_err()
}

/// Writes what can't be read of slots and volume lock anew. The slots were watched as bytes for a full dead time.
/// How many it were.
pub fn footing(device: &Arc<dyn BlockDevice>, volume: &Volume<'_>) -> Result<u64, FsckError> {
    let mut written = 0;
    let mut put = |at: BlockNo, block: &[u8]| {
        written += 1;
        device.write(at.offset_bytes(), &AlignedBuf::copy_of(block))
    };
    for slot in volume.geometry().all_slots().filter(|slot| volume.slot(*slot).is_err()) {
        let record = ended(volume, slot, device.geometry().logical_block_bytes, None);
        let mut block = zero_block();
        record.encode(volume.id(), &mut block[..]);
        put(record.address, &block[..])?;
    }
    let at = volume.geometry().volume_lock();
    if volume.lock(at).is_err() {
        let mut block = zero_block();
        LockRecord::new_free(LockKind::Volume, at).encode(volume.id(), &mut block[..]);
        put(at, &block[..])?;
    }
    device.flush()?;
    Ok(written)
}

/// A slot whose life ended without leaving: its journal is replayed before anything else.
fn ended(volume: &Volume<'_>, slot: Slot, logical_block_bytes: u32, old: Option<SlotRecord>) -> SlotRecord {
    let geometry = volume.geometry();
    let at = geometry.journal(slot);
    let journal = volume
        .read_checked(at, |block| JournalHeader::decode(block, volume.id(), at, geometry.journal_blocks - 1))
        .ok();
    let old = old.unwrap_or_else(|| SlotRecord {
        net_blocks: journal.map_or(0, |j| j.net_blocks),
        net_inodes: journal.map_or(0, |j| j.net_inodes),
        ..SlotRecord::new_free(geometry.slot(slot))
    });
    let lived = journal.map_or(0, |j| j.incarnation.0).max(old.incarnation.0).max(1);
    SlotRecord {
        state: SlotState::Withdrawn,
        incarnation: Incarnation(lived),
        settled_up_to: Incarnation(lived - 1),
        durations: volume.superblock.durations,
        logical_block_bytes,
        recoverer: None,
        ..old
    }
}

impl One<'_, '_> {
    pub(super) fn structure(&mut self, finding: &Finding) -> Result<(), PatchError> {
        match (finding.kind, finding.place) {
            (Kind::Superblock | Kind::SuperblockCopy, _) => self.superblocks(),
            (Kind::Slot, Place::Slot(slot)) => self.slot(Slot(slot)),
            (Kind::Doorbell, Place::Slot(slot)) => {
                let at = self.volume.geometry().doorbell(Slot(slot));
                self.put(at, |id, block| DoorbellRecord::new(at).encode(id, block))
            }
            (Kind::Request, Place::Slot(slot)) => {
                let at = self.volume.geometry().request(Slot(slot));
                let mut whole = zero_block();
                RequestBlock::new(at).encode(self.volume.id(), &mut whole);
                self.put(at, |_, block| block.copy_from_slice(&whole[..]))
            }
            (Kind::JournalHeader, Place::Slot(slot)) => self.empty_journal(Slot(slot)),
            (Kind::JournalDamaged, Place::Slot(slot)) => self.give_up_journal(Slot(slot)),
            (Kind::LockUnreadable | Kind::LockKind | Kind::LockOwner | Kind::LockSlots, Place::Block(at)) => {
                self.lock(BlockNo(at))
            }
            (Kind::ClusterHeader, Place::Cluster(cluster)) => self.cluster_header(cluster),
            (Kind::ClusterCounts, Place::Cluster(cluster)) => {
                let mut patch = self.patch();
                patch.recount(cluster);
                patch.write_out()
            }
            (Kind::ClusterMap, Place::Map { cluster, map }) => self.cluster_map(cluster, map),
            (Kind::ClusterOwn, Place::Map { cluster, map }) => {
                let mut patch = self.patch();
                let mut this = patch.map(cluster, map)?;
                let empty = ClusterMap::new_empty(self.volume.geometry(), self.volume.id(), cluster, map);
                for (chunk, own) in this.chunks.iter_mut().zip(&empty.chunks) {
                    if own.used.get() != 0 {
                        (chunk.group, chunk.inodes) = (0, 0);
                        chunk.used = U16::new(chunk.used.get() | own.used.get());
                    }
                }
                patch.put_map(cluster, map, &this);
                patch.write_out()
            }
            // Replayed, or taken over, before the check that follows.
            _ => Ok(()),
        }
    }

    /// Writes a block of records whole.
    fn put(
        &self,
        at: BlockNo,
        encode: impl FnOnce(crate::types::VolumeId, &mut [u8]),
    ) -> Result<(), PatchError> {
        let mut patch = self.patch();
        let mut block = zero_block();
        encode(self.volume.id(), &mut block[..]);
        patch.put_record(at, block);
        patch.write_out()
    }

    /// The one that is believed, to all places.
    fn superblocks(&self) -> Result<(), PatchError> {
        let geometry = self.volume.geometry();
        let mut patch = self.patch();
        for at in geometry.superblock_copies().into_iter().chain([geometry.superblock()]) {
            let mut block = zero_block();
            self.volume.superblock.encode(at, &mut block);
            patch.put_record(at, block);
        }
        patch.write_out()
    }

    fn slot(&self, slot: Slot) -> Result<(), PatchError> {
        let at = self.volume.geometry().slot(slot);
        let ats = &self.maintenance.ats;
        let image: Image<SlotRecord> = ats.read(IoClass::Lock, at).map_err(of_ats)?;
        let logical = ats.door().geometry().logical_block_bytes;
        let to = ended(self.volume, slot, logical, Some(image.record.clone()));
        self.swap_slot(&image, &to)
    }

    fn swap_slot(&self, image: &Image<SlotRecord>, to: &SlotRecord) -> Result<(), PatchError> {
        let ats = &self.maintenance.ats;
        match ats.swap(IoClass::Lock, image, to).map_err(of_ats)? {
            Swapped::Done(done) => ats.settle(IoClass::Lock, &done).map_err(of_ats),
            Swapped::Miscompare(_) => Err(PatchError::Other("the slot was changed meanwhile")),
        }
    }

    fn empty_journal(&self, slot: Slot) -> Result<(), PatchError> {
        let at = self.volume.geometry().journal(slot);
        let record = self.volume.slot(slot)?;
        let header = JournalHeader {
            incarnation: record.incarnation,
            tail_sequence: 1,
            tail_position: 0,
            chain: 0,
            net_blocks: record.net_blocks,
            net_inodes: record.net_inodes,
        };
        let mut whole = zero_block();
        header.encode(self.volume.id(), at, &mut whole);
        self.put(at, |_, block| block.copy_from_slice(&whole[..]))?;
        // What the ring holds may be of the same life: its first block must not go on from an empty journal.
        self.put(at.plus(1), |_, _| {})
    }

    /// What was committed and is not in place is lost; what the host held is free.
    fn give_up_journal(&self, slot: Slot) -> Result<(), PatchError> {
        self.empty_journal(slot)?;
        if slot == self.maintenance.me().slot {
            return self.maintenance.heartbeat.earlier_settled(None).map_err(of_ats);
        }
        let at = self.volume.geometry().slot(slot);
        let image: Image<SlotRecord> = self.maintenance.ats.read(IoClass::Lock, at).map_err(of_ats)?;
        let mut to = image.record.clone();
        to.state = SlotState::Recovered;
        to.settled_up_to = to.incarnation;
        to.beat += 1;
        self.swap_slot(&image, &to)
    }

    fn lock(&self, at: BlockNo) -> Result<(), PatchError> {
        let geometry = *self.volume.geometry();
        let kind = match geometry.cluster_of(at) {
            _ if at == geometry.volume_lock() => LockKind::Volume,
            _ if at == geometry.rename_lock() => LockKind::Rename,
            Some(cluster) if geometry.cluster(cluster) == at => LockKind::Cluster,
            _ => LockKind::Inode,
        };
        let old = self.volume.lock(at).ok();
        let mut record = old.unwrap_or_else(|| LockRecord::new_free(kind, at));
        let impossible = match record.mode {
            LockMode::Exclusive { owner, tenure } => {
                let lived =
                    (owner.slot.0 < geometry.slots).then(|| self.volume.slot(owner.slot).ok()).flatten();
                lived.is_none_or(|slot| owner.incarnation > slot.incarnation)
                    || tenure.0 > record.swap_counter
                    || record.kind != kind
            }
            _ => false,
        };
        if impossible {
            record.mode = LockMode::Free;
        }
        record.kind = kind;
        record.swap_counter += 1;
        record.change_counter += 1;
        record.nonce = self.maintenance.ats.fresh_nonce();
        let beyond = (geometry.slots..MAX_SLOTS).map(Slot).fold(SlotSet::EMPTY, |set, slot| set.with(slot));
        for set in [&mut record.sharers, &mut record.openers, &mut record.waiters] {
            for slot in beyond.iter() {
                set.remove(slot);
            }
        }
        record.next = record.next.filter(|next| next.slot.0 < geometry.slots);
        self.put(at, |id, block| record.encode(id, block))
    }

    /// A header from nothing: which maps were written, their first bytes say.
    fn cluster_header(&self, cluster: u64) -> Result<(), PatchError> {
        let (geometry, id) = (*self.volume.geometry(), self.volume.id());
        let mut patch = self.patch();
        let mut header = ClusterHeader::new_empty(&geometry, id, cluster);
        for (map, summary) in (0..geometry.cluster_maps(cluster)).zip(&mut header.summaries) {
            let block = patch.block(geometry.cluster_map(cluster, map))?;
            let ours = header_of(&block[..])
                .is_some_and(|h| h.magic.get() == Magic::ClusterMap.value() && h.volume == id.0);
            summary.written = u8::from(ours);
        }
        let mut block = zero_block();
        block.copy_from_slice(header.as_bytes());
        patch.put_block(geometry.cluster_header(cluster), block);
        patch.recount(cluster);
        patch.write_out()
    }

    /// A map from what it describes: groups are where locks and bodies lie that say so; all else is called used, and
    /// what of it belongs to nobody is found lost.
    fn cluster_map(&self, cluster: u64, map: u64) -> Result<(), PatchError> {
        let (geometry, id) = (*self.volume.geometry(), self.volume.id());
        let mut this = ClusterMap::new_empty(&geometry, id, cluster, map);
        for (i, chunk) in (0..CHUNKS_PER_MAP).zip(&mut this.chunks) {
            let offset = (map * CHUNKS_PER_MAP + i) * GROUP_BLOCKS;
            if offset >= geometry.cluster_len(cluster) {
                break;
            }
            let own = chunk.used.get() != 0;
            chunk.used = U16::new(u16::MAX);
            let first = geometry.cluster(cluster).plus(offset);
            let Ok(bytes) = self.volume.read_run(first, GROUP_BLOCKS) else { continue };
            let blocks: Vec<_> = bytes.chunks_exact(BLOCK_BYTES).collect();
            let is_lock = |(n, block): (u64, &&[u8])| {
                LockRecord::decode(block, id, first.plus(n)).is_ok_and(|lock| lock.kind == LockKind::Inode)
            };
            let locks = (0..GROUP_INODES).zip(&blocks).filter(|lock| is_lock((lock.0, lock.1))).count();
            // One or two may be damaged on their own.
            if own || locks + 2 < GROUP_INODES as usize {
                continue;
            }
            chunk.group = 1;
            for (n, block) in (0..GROUP_INODES).zip(blocks.iter().skip(GROUP_INODES as usize)) {
                let ino = InodeNo(first.0 + GROUP_INODES + n);
                let free = block.first_chunk::<BLOCK_BYTES>().is_some_and(|b| {
                    InodeDisk::parse(b, id, ino).is_ok_and(|body| body.form() == Form::Free)
                });
                chunk.inodes |= u8::from(!free) << n;
            }
        }
        let mut patch = self.patch();
        patch.put_map(cluster, map, &this);
        patch.write_out()
    }

    /// Our own slot takes the difference between what is allocated and what the slots say.
    pub(super) fn settle_sums(&self, report: &Report) -> Result<(), PatchError> {
        let me = self.maintenance.me().slot;
        let (mut blocks, mut inodes) = (report.used_blocks as i64, report.used_inodes as i64);
        for slot in self.volume.geometry().all_slots().filter(|slot| *slot != me) {
            let record = self.volume.slot(slot)?;
            blocks = blocks.wrapping_sub(record.net_blocks);
            inodes = inodes.wrapping_sub(record.net_inodes);
        }
        self.maintenance.heartbeat.earlier_settled(Some((blocks, inodes))).map_err(of_ats)
    }
}

fn of_ats(error: AtsError) -> PatchError {
    match error {
        AtsError::Device(e) => e.into(),
        other => PatchError::Ats(other),
    }
}
