//! Repairs, in rounds: check, repair what is of the earliest phase, check again. A repair is never believed, only
//! the check after it; so what follows from a damage is repaired in later rounds by the same few functions.
//!
//! Each finding is repaired by a patch of its own that is written out before the next one begins. The volume is
//! under maintenance (`maintenance`), all journals are replayed, and no host has anything in memory.
//!
//! Not for: structures of slots, locks and clusters (`repair_structure`), trees (`repair_trees`).

use std::collections::BTreeSet;
use std::sync::Arc;

use zerocopy::little_endian::{U32, U64};

use super::finding::{Finding, Kind, Phase, Place, Repair, Severity};
use super::maintenance::{self, Maintenance};
use super::patch::{Patch, PatchError};
use super::{FsckError, Limits, Observer, Progress, Report, check_opened, open, quiet, repair_structure};
use crate::device::BlockDevice;
use crate::heartbeat::HostIdentity;
use crate::inspect::{InspectError, Volume};
use crate::layout::inode::InodeDisk;
use crate::layout::superblock::{KNOWN_FEATURES, SuperblockError};
use crate::types::{BlockNo, InodeNo};

/// Rounds of checking and repairing; a volume that needs more has something that undoes repairs.
const MOST_ROUNDS: u32 = 24;
/// Findings repaired in one round; the next check finds the others.
const MOST_FINDINGS: usize = 100_000;

/// What may be changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Allow {
    /// What loses nothing and has one outcome.
    Safe,
    Everything,
}

/// What came of repairs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize)]
pub struct Repaired {
    /// The last check.
    pub report: Report,
    /// Findings that were repaired.
    pub repaired: u64,
    pub rounds: u32,
}

/// Keeps the findings of the earliest phase that may be repaired, and hands all on the first time.
struct Collect<'a> {
    out: &'a mut dyn Observer,
    allow: Allow,
    told: &'a mut BTreeSet<String>,
    phase: Phase,
    findings: Vec<Finding>,
}

impl Observer for Collect<'_> {
    fn found(&mut self, finding: &Finding) {
        if self.told.len() < MOST_FINDINGS && self.told.insert(finding.to_string()) {
            self.out.found(finding);
        }
        let kind = finding.kind;
        let permitted = self.allow == Allow::Everything || kind.repair() == Repair::Safe;
        if !permitted || kind.phase() > self.phase {
            return;
        }
        if kind.phase() < self.phase {
            self.phase = kind.phase();
            self.findings.clear();
        }
        if self.findings.len() < MOST_FINDINGS {
            self.findings.push(finding.clone());
        }
    }

    fn progress(&mut self, at: Progress) -> bool {
        self.out.progress(at)
    }
}

/// Takes the volume for maintenance, replays journals, checks and repairs until nothing is left that may be repaired.
pub fn repair(
    device: Arc<dyn BlockDevice>,
    host: &HostIdentity,
    allow: Allow,
    out: &mut dyn Observer,
) -> Result<Repaired, FsckError> {
    let volume = open(&*device)?;
    // What a newer program keeps there, this one would break.
    let bits = volume.superblock.features[1] & !KNOWN_FEATURES[1];
    if bits != 0 {
        let at = volume.superblock_at;
        return Err(InspectError::from(SuperblockError::Feature { at, bits, what: "repairs" }).into());
    }
    let _quiet = quiet::watch(&volume, repair_structure::footing_needed(&volume), out)?;
    let mut footing = repair_structure::footing(&device, &volume)?;
    let maintenance = maintenance::enter(&device, &volume, host, out)?;
    let result = rounds(&device, &volume, &maintenance, allow, out);
    maintenance.leave()?;
    let mut result = result?;
    result.repaired += std::mem::take(&mut footing);
    Ok(result)
}

fn rounds(
    device: &Arc<dyn BlockDevice>,
    volume: &Volume<'_>,
    maintenance: &Maintenance,
    allow: Allow,
    out: &mut dyn Observer,
) -> Result<Repaired, FsckError> {
    let mut told = BTreeSet::new();
    let mut result = Repaired::default();
    loop {
        maintenance.recover_the_dead(volume)?;
        let phase = Phase::Leftovers;
        let mut collect = Collect { out, allow, told: &mut told, phase, findings: Vec::new() };
        result.report =
            check_opened(device, volume, Some(maintenance.me()), Limits::default(), &mut collect)?;
        let findings = collect.findings;
        if findings.is_empty() || result.rounds == MOST_ROUNDS {
            return Ok(result);
        }
        result.rounds += 1;
        let mut repaired = 0;
        // One rebuild of a tree repairs all that is wrong with it.
        let mut rebuilt = BTreeSet::new();
        for (done, finding) in (0..).zip(&findings) {
            let (pass, of) = ("repairing", findings.len() as u64);
            if !out.progress(Progress { pass, done, of }) {
                return Err(FsckError::Cancelled);
            }
            let mut one = One { volume, maintenance, findings: &findings, rebuilt: &mut rebuilt };
            match one.repair(finding, &result.report) {
                Ok(()) => repaired += u64::from(finding.kind.severity() != Severity::Note),
                Err(PatchError::Device(e)) => return Err(e.into()),
                Err(e) => log::error!("{finding}: not repaired: {e}"),
            }
        }
        if repaired == 0 {
            return Ok(result);
        }
        result.repaired += repaired;
    }
}

/// One repair.
pub(super) struct One<'r, 'd> {
    pub volume: &'r Volume<'d>,
    pub maintenance: &'r Maintenance,
    /// All findings of this round.
    pub findings: &'r [Finding],
    pub rebuilt: &'r mut BTreeSet<InodeNo>,
}

impl<'d> One<'_, 'd> {
    pub fn patch(&self) -> Patch<'_, 'd> {
        Patch::new(self.volume, self.maintenance.ats.door())
    }

    fn repair(&mut self, finding: &Finding, report: &Report) -> Result<(), PatchError> {
        match finding.kind.phase() {
            Phase::Structure => self.structure(finding),
            Phase::Marks | Phase::Leftovers => self.marks(finding, report),
            Phase::Files => self.files(finding),
        }
    }

    fn marks(&mut self, finding: &Finding, report: &Report) -> Result<(), PatchError> {
        let used = matches!(finding.kind, Kind::BlockFree | Kind::InodeFree);
        let mut patch = self.patch();
        match finding.place {
            Place::Blocks { first, blocks } => patch.mark_blocks(BlockNo(first), blocks, used)?,
            Place::Inode(ino) => patch.mark_inode(InodeNo(ino), used)?,
            // Our own slot takes the difference.
            _ => return self.settle_sums(report),
        }
        patch.write_out()
    }

    fn files(&mut self, finding: &Finding) -> Result<(), PatchError> {
        match (finding.kind, finding.place) {
            (Kind::InodeUnreadable | Kind::InodeFields, Place::Inode(ino)) => self.clear(InodeNo(ino)),
            (Kind::InodeBlocks, Place::Inode(ino)) => {
                self.change(InodeNo(ino), |body| body.blocks = U64::new(finding.should_be))
            }
            (Kind::InodeSize, Place::Inode(ino)) => {
                self.change(InodeNo(ino), |body| body.size = U64::new(finding.should_be))
            }
            // The next host that writes to it frees them, as it does after a truncation that was cut short.
            (Kind::BehindEnd, Place::Inode(ino)) => self.change(InodeNo(ino), |body| {
                body.flags = U32::new(body.flags.get() | crate::layout::inode::TRUNCATING);
            }),
            (Kind::DirectoryEntries, Place::Inode(ino)) => {
                self.change(InodeNo(ino), |body| body.entries = U64::new(finding.should_be))
            }
            (Kind::Links, Place::Inode(ino)) => {
                self.change(InodeNo(ino), |body| body.nlink = U32::new(finding.should_be as u32))
            }
            (Kind::DirectoryParent, Place::Entry { directory, key, inode }) => {
                self.change(InodeNo(inode), |body| {
                    body.parent = U64::new(directory);
                    body.parent_key = U64::new(key);
                })
            }
            (Kind::TreeNode | Kind::Extent | Kind::BlockTwice, Place::Inode(ino)) => {
                self.rebuild(InodeNo(ino))
            }
            (Kind::Entry | Kind::EntryPlace | Kind::EntryTwice, Place::Entry { directory, .. }) => {
                self.rebuild(InodeNo(directory))
            }
            (
                Kind::EntryDangling | Kind::OrphanLinked | Kind::DirectoryTwice | Kind::DirectoryLoop,
                Place::Entry { directory, key, .. },
            ) => self.remove_entry(InodeNo(directory), key),
            (Kind::EntryTarget, Place::Entry { directory, key, inode }) => {
                self.correct_entry(InodeNo(directory), key, InodeNo(inode))
            }
            (Kind::Nameless, Place::Inode(ino)) => self.reconnect(InodeNo(ino)),
            (Kind::OrphanUnlisted, Place::Inode(ino)) => self.list_orphan(InodeNo(ino)),
            _ => Err(PatchError::Other("there is no repair for this")),
        }
    }

    pub fn change(&self, ino: InodeNo, change: impl FnOnce(&mut InodeDisk)) -> Result<(), PatchError> {
        let mut patch = self.patch();
        let mut block = patch.inode(ino)?;
        change(InodeDisk::of_mut(&mut block));
        patch.put_block(ino.body(), block);
        patch.write_out()
    }
}
