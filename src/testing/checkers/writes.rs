//! Checks 1 and 2, plain writes: what may lie there, and who may write it.

use std::ops::Range;

use super::{Judge, Notes, Place};
use crate::device::sim::Executed;
use crate::layout::cluster::ClusterMap;
use crate::layout::geometry::{CHUNKS_PER_MAP, GROUP_BLOCKS, GROUP_INODES};
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::{Magic, Nonce, header_of};
use crate::types::{BLOCK_BYTES, BLOCK_BYTES_U64, BlockNo, Owner, Slot};

const METADATA: [Magic; 4] = [Magic::ClusterHeader, Magic::ClusterMap, Magic::Inode, Magic::TreeNode];

impl Judge {
    pub(super) fn judge_write(&self, notes: &mut Notes, c: &Executed<'_>, blocks: Range<u64>) {
        let who = c.host;
        let Some(me) = notes.hosts.get(&who).map(|h| h.me) else { return };
        let magic = |block: &[u8]| header_of(block).map(|h| h.magic.get());
        let birth = c.after.chunks(BLOCK_BYTES).any(|b| magic(b) == Some(Magic::Lock.value()));
        if c.issuer_killed && birth {
            // Perhaps torn; in any case of a host that can't commit it any more: it stays free space.
            return;
        }
        if c.failed && birth {
            // Perhaps torn; it will be made once more, and until then nobody can know of it.
            for ((number, after), before) in
                blocks.zip(c.after.chunks(BLOCK_BYTES)).zip(c.before.chunks(BLOCK_BYTES))
            {
                let at = BlockNo(number);
                if self.was_abandoned(notes, at, Some(before)) {
                    notes.born.remove(&at);
                }
                let is_lock = LockRecord::decode(after, self.volume, at).is_ok();
                if is_lock && !notes.born.contains_key(&at) {
                    self.judge_birth(notes, c, me, at, after);
                }
            }
            return;
        }
        for number in blocks {
            let at = BlockNo(number);
            let place = self.place(notes, at);
            let of_slot = |slot| {
                assert!(slot == me.slot, "check 1: {who} ({me}) writes at {at}, which is {place:?}'s");
            };
            let from = (number * BLOCK_BYTES_U64).saturating_sub(c.offset_bytes) as usize;
            let after = c.after.get(from..from + BLOCK_BYTES);
            if place == Place::Lock
                && self.is_birth_again(notes, at, c.before.get(from..from + BLOCK_BYTES), after)
            {
                continue;
            }
            if place == Place::Lock && self.was_abandoned(notes, at, c.before.get(from..from + BLOCK_BYTES)) {
                notes.born.remove(&at);
            }
            let place = self.place(notes, at);
            match place {
                Place::Superblock | Place::Lock | Place::Slot(_) | Place::Doorbell(_) | Place::Nothing => {
                    panic!("check 1: {who} ({me}) changes {at} by a plain {}; it is {place:?}", c.kind.name())
                }
                Place::Request(slot) | Place::Journal(slot) => of_slot(slot),
                Place::Cluster(_) | Place::SystemInode => {
                    self.judge_block(notes, c, me, at, place, after);
                }
            }
        }
    }

    /// One block of a cluster or a system group.
    fn judge_block(
        &self,
        notes: &mut Notes,
        c: &Executed<'_>,
        me: Owner,
        at: BlockNo,
        place: Place,
        after: Option<&[u8]>,
    ) {
        let who = c.host;
        let header = after.and_then(header_of).filter(|h| h.volume == self.volume.0);
        let is = |magic: Magic| header.is_some_and(|h| h.magic.get() == magic.value());
        if let (true, Some(after)) = (is(Magic::Lock), after) {
            return self.judge_birth(notes, c, me, at, after);
        }
        let Some(header) = header.filter(|h| METADATA.iter().any(|m| h.magic.get() == m.value())) else {
            if c.issuer_killed {
                // The part of a metadata block that got there; its journal has the whole.
                return;
            }
            let Place::Cluster(cluster) = place else {
                panic!("check 2: {who} ({me}) writes data over {at}, {place:?}");
            };
            let own = self.geometry.cluster(cluster).plus(self.geometry.cluster_overhead(cluster));
            assert!(at >= own, "check 2: {who} ({me}) writes data over {at}, which is the cluster's own");
            let before = self.group_body(notes, at);
            assert!(!before, "check 2: {who} ({me}) writes data over {at}, the place of an inode body");
            return;
        };
        let address = header.address.get();
        assert!(address == at.0, "check 2: {who} ({me}) writes a block of {address:#x} at {at}");
        let lock = BlockNo(header.lock.get());
        let names_me = matches!(
            self.lock_on_lun(lock),
            Some(LockRecord { mode: LockMode::Exclusive { owner, .. }, .. })
                if owner == me || self.recovers(me, owner)
        );
        assert!(
            names_me,
            "check 2: {who} ({me}) writes metadata at {at}, covered by lock {lock}, which says {:?}",
            self.lock_on_lun(lock)
        );
        self.judge_rest(notes, c, me, at, lock);
    }

    /// What a metadata block that is put in its place rests on: a grant that no power cut can take back, and
    /// for a recoverer a swap of the lock and its mark in the slot.
    fn judge_rest(&self, notes: &Notes, c: &Executed<'_>, me: Owner, at: BlockNo, lock: BlockNo) {
        let who = c.host;
        let Some(LockRecord { mode: LockMode::Exclusive { owner, .. }, nonce, .. }) = self.lock_on_lun(lock)
        else {
            return;
        };
        let at_risk = |block: BlockNo| self.lun.is_at_risk(block.offset_bytes());
        // A birth brings its locks along.
        let born = (c.offset_bytes..c.offset_bytes + c.len_bytes).contains(&lock.offset_bytes());
        assert!(
            born || !at_risk(lock),
            "check 2: {who} ({me}) writes metadata at {at}, and the image of lock {lock} is not durable"
        );
        if owner == me {
            return;
        }
        assert!(
            notes.pinned.get(&lock).is_some_and(|pin| *pin == (me, nonce)),
            "check 2: {who} ({me}) replays a block at {at}, covered by lock {lock}, which it did not swap first"
        );
        assert!(
            owner.slot == me.slot || !at_risk(self.geometry.slot(owner.slot)),
            "check 2: {who} ({me}) replays a block at {at}, and its mark in the slot of {owner} is not durable"
        );
    }

    /// A life ended: groups that it gave birth to and did not live to commit lie in free space again.
    pub(super) fn forget_births(&self, notes: &mut Notes, dead: Slot) {
        // As it was born, or forgotten by the LUN before a flush.
        let untouched =
            |lock: &BlockNo, birth: &Nonce| self.lock_on_lun(*lock).is_none_or(|r| r.nonce == *birth);
        notes.born.retain(|lock, (owner, birth)| {
            !(owner.slot == dead && untouched(lock, birth) && !self.is_group(*lock))
        });
    }

    /// A birth whose answer was lost, or which the LUN forgot before a flush, made once more: the same image, and nobody has
    /// changed the lock.
    fn is_birth_again(
        &self,
        notes: &Notes,
        at: BlockNo,
        before: Option<&[u8]>,
        after: Option<&[u8]>,
    ) -> bool {
        let Some((_, birth)) = notes.born.get(&at) else { return false };
        let nonce = |block: Option<&[u8]>| {
            block.and_then(|block| LockRecord::decode(block, self.volume, at).ok()).map(|record| record.nonce)
        };
        nonce(after) == Some(*birth) && nonce(before).is_none_or(|found| found == *birth)
    }

    /// A birth that came to nothing lies in free space: the map never said that there is a group, so nobody can know the
    /// lock, and nobody has changed it.
    fn was_abandoned(&self, notes: &Notes, at: BlockNo, before: Option<&[u8]>) -> bool {
        let Some((_, birth)) = notes.born.get(&at) else { return false };
        let found = before.and_then(|block| LockRecord::decode(block, self.volume, at).ok());
        found.is_none_or(|record| record.nonce == *birth) && !self.is_group(at)
    }

    /// Does the map on the LUN say that the lock's group exists?
    fn is_group(&self, lock: BlockNo) -> bool {
        let Some(cluster) = self.geometry.cluster_of(lock) else { return true };
        let chunk = (lock.0 - self.geometry.cluster(cluster).0) / GROUP_BLOCKS;
        let at = self.geometry.cluster_map(cluster, chunk / CHUNKS_PER_MAP);
        let bytes = self.lun.contents(at.offset_bytes(), BLOCK_BYTES);
        let Some(block) = bytes.first_chunk::<BLOCK_BYTES>() else { return false };
        let map = ClusterMap::parse(block, self.volume, at);
        map.is_ok_and(|map| map.chunks[(chunk % CHUNKS_PER_MAP) as usize].group == 1)
    }

    fn group_body(&self, notes: &Notes, at: BlockNo) -> bool {
        at.0.checked_sub(GROUP_INODES).is_some_and(|lock| notes.born.contains_key(&BlockNo(lock)))
    }

    /// A lock written plainly: it must be born there, of a group under the cluster's exclusive lock.
    fn judge_birth(&self, notes: &mut Notes, c: &Executed<'_>, me: Owner, at: BlockNo, after: &[u8]) {
        let who = c.host;
        let record = LockRecord::decode(after, self.volume, at)
            .unwrap_or_else(|e| panic!("check 1: {who} writes a damaged lock plainly: {e}"));
        let Some(cluster) = self.geometry.cluster_of(at) else {
            panic!("check 1: {who} ({me}) writes the lock at {at} plainly");
        };
        let offset = at.0 - self.geometry.cluster(cluster).0;
        let place = offset % GROUP_BLOCKS < GROUP_INODES && offset >= self.geometry.cluster_overhead(cluster);
        let owned = matches!(record.mode, LockMode::Exclusive { owner, .. } if owner == me);
        assert!(
            place && owned && record.swap_counter == 1,
            "check 1: {who} ({me}) writes the lock at {at} plainly, and it is not its birth: {record:?}"
        );
        let under = self.lock_on_lun(self.geometry.cluster(cluster)).map(|r| r.mode);
        assert!(
            matches!(under, Some(LockMode::Exclusive { owner, .. }) if owner == me),
            "check 1: {who} ({me}) gives birth at {at}, but the lock of cluster {cluster} says {under:?}"
        );
        self.fresh_nonce(notes, at, record.nonce);
        notes.born.insert(at, (me, record.nonce));
    }
}
