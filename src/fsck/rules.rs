//! What makes a structure wrong by itself: pure, and one for [`super`] and for a check of a volume in use
//! ([`crate::scrub`]), so that a finding means the same in both.
//!
//! Not for: what two structures say of each other.

use super::finding::{Finding, Kind, Place};
use crate::layout::cluster::{ClusterHeader, ClusterMap};
use crate::layout::geometry::Geometry;
use crate::layout::inode::{Form, InodeDisk, KNOWN_FLAGS};
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::layout::slot::{SlotRecord, SlotState};
use crate::types::{Incarnation, MAX_SLOTS, Slot, SlotSet};

/// What contradicts itself in a slot of a volume with so many slots.
pub fn slot_contradiction(record: &SlotRecord, slots: u16) -> Option<&'static str> {
    match record.state {
        _ if record.settled_up_to > record.incarnation => Some("a life is settled that has not begun"),
        SlotState::Free if record.incarnation.0 != 0 => Some("free, though it was claimed"),
        SlotState::Left | SlotState::Recovered if !record.settled(record.incarnation) => {
            Some("its life ended and is not settled")
        }
        SlotState::Live | SlotState::Withdrawn | SlotState::Recovering
            if record.settled(record.incarnation) =>
        {
            Some("its life goes on and is settled")
        }
        _ if record.recoverer.is_some_and(|by| by.slot.0 >= slots) => {
            Some("its recoverer has a slot that the volume does not have")
        }
        _ => None,
    }
}

/// What is wrong with a lock that should be of this kind. `lives`: the last life of a slot, read after the lock was.
pub fn lock_fault(
    record: &LockRecord,
    kind: LockKind,
    slots: u16,
    lives: impl Fn(Slot) -> Option<Incarnation>,
) -> Option<Finding> {
    let place = Place::of_block(record.address);
    if record.kind != kind {
        let text = format!("says {}, covers {}", record.kind.name(), kind.name());
        return Some(Finding::new(Kind::LockKind, place, text).should_be(kind as u64));
    }
    if let LockMode::Exclusive { owner, tenure } = record.mode {
        let never = if owner.slot.0 >= slots {
            Some(format!("owned by {owner}; the volume has {slots} slots"))
        } else if lives(owner.slot).is_some_and(|last| owner.incarnation > last) {
            Some(format!("owned by {owner}, which never was"))
        } else if tenure.0 > record.swap_counter {
            Some(format!("tenure {} began after swap {}", tenure.0, record.swap_counter))
        } else {
            None
        };
        if let Some(text) = never {
            return Some(Finding::new(Kind::LockOwner, place, text));
        }
    }
    let next = record.next.map_or(SlotSet::EMPTY, |next| SlotSet::of(next.slot));
    let all = record.sharers.union(record.openers).union(record.waiters).union(next);
    let strange = (slots..MAX_SLOTS).map(Slot).find(|s| all.contains(*s))?;
    let text = format!("names slot {strange}; the volume has {slots} slots");
    Some(Finding::new(Kind::LockSlots, place, text))
}

/// What contradicts itself in a body that is in use.
pub fn inode_contradiction(body: &InodeDisk) -> Option<String> {
    let mode = body.mode.get();
    let form = body.form();
    let fits = match mode & libc::S_IFMT {
        libc::S_IFDIR => form == Form::Tree,
        libc::S_IFREG | libc::S_IFLNK => form != Form::Empty,
        libc::S_IFCHR | libc::S_IFBLK | libc::S_IFIFO | libc::S_IFSOCK => form == Form::Empty,
        _ => return Some(format!("mode {mode:o} is of no known type")),
    };
    if !fits {
        return Some(format!("mode {mode:o} with contents of form {form:?}"));
    }
    let unknown = body.flags.get() & !KNOWN_FLAGS;
    (unknown != 0).then(|| format!("unknown flags {unknown:#x}"))
}

/// Does a map mark the cluster's own blocks as free, or as inodes? `empty`: the map of an empty cluster.
pub fn marks_own_free(map: &ClusterMap, empty: &ClusterMap) -> bool {
    map.chunks.iter().zip(&empty.chunks).any(|(chunk, empty)| {
        let (used, overhead) = (chunk.used.get(), empty.used.get());
        used & overhead != overhead || (chunk.group != 0 && overhead != 0)
    })
}

/// Sums over the maps of a cluster, against what its header says.
#[derive(Default)]
pub struct Counts {
    free_blocks: u32,
    free_inodes: u32,
    groups: u32,
    wrong: Vec<String>,
}

impl Counts {
    /// One map that could be read, and the groups in it.
    pub fn add(&mut self, number: u64, map: &ClusterMap, groups: u32, header: &ClusterHeader) {
        let (blocks, inodes) = (map.free_blocks(), map.free_inodes());
        self.free_blocks += blocks;
        self.free_inodes += inodes;
        self.groups += groups;
        let Some(summary) = header.summaries.get(number as usize) else { return };
        let says = (u32::from(summary.free_blocks.get()), u32::from(summary.free_inodes.get()));
        if says != (blocks, inodes) {
            self.wrong.push(format!(
                "map {number} has {blocks} free blocks and {inodes} free inodes, the header says {} and {}",
                says.0, says.1
            ));
        }
    }

    /// What the header counts wrongly. `whole`: all maps could be read.
    pub fn faults(mut self, header: &ClusterHeader, geometry: &Geometry, whole: bool) -> Option<Finding> {
        let cluster = header.index.get();
        for (what, says, is) in [
            ("free blocks", header.free_blocks.get(), self.free_blocks),
            ("free inodes", header.free_inodes.get(), self.free_inodes),
            ("inode groups", header.groups.get(), self.groups),
        ] {
            if says != is && whole {
                self.wrong.push(format!("its header counts {says} {what}, its maps {is}"));
            }
        }
        let blocks = u64::from(header.blocks.get());
        if blocks != geometry.cluster_len(cluster) {
            self.wrong.push(format!("its header says {blocks} blocks"));
        }
        let text = self.wrong.join("; ");
        (!text.is_empty()).then(|| Finding::new(Kind::ClusterCounts, Place::Cluster(cluster), text))
    }
}
