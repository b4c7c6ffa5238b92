//! Checking a volume that nobody uses: every structure against every other.
//!
//! * **A check only reads** ([`check`], [`examine`]); repairs are made under `maintenance` alone. A check believes nothing that it read, never panics on it, and ends on any bytes.
//! * **Bounded memory**: sixteen bytes an inode, forty-eight more a directory (`inodes`), and 128 MiB for what blocks were
//!   met (`usage`). Where that is not enough the rest is done in more rounds, each for a range of clusters.
//! * **One cause, one finding.** What follows from a damage that was named is not named again: blocks are not
//!   called lost, nor inodes nameless, while something that may own or name them can't be read.
//! * Repairs are judged by a new check, never by themselves (`repair`).
//!
//! Passes, each trusting what those before it found true: superblocks, slots, journals and the volume's locks
//! (`system`); clusters and their maps (`clusters`); inodes, their locks and the trees of files (`bodies`);
//! directories (`names`); link counts, reachability and sums (`links`).
//!
//! Not for: volumes in use (a check beside a host that writes finds nonsense), or reading superblocks of unknown
//! formats.

pub mod finding;

mod ahead;
mod bodies;
mod clusters;
mod inodes;
mod links;
mod maintenance;
mod names;
mod patch;
mod pending;
mod quiet;
pub mod repair;
mod repair_structure;
mod repair_trees;
pub mod rules;
mod system;
pub(crate) mod usage;
mod view;

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use thiserror::Error;

use self::ahead::Ahead;
use self::finding::{Finding, Kind, Place, Severity};
use self::inodes::Inodes;
use self::usage::{Claimed, MapId, Usage};
use self::view::View;
use crate::ats::AtsError;
use crate::device::{BlockDevice, DeviceError};
use crate::heartbeat::ClaimError;
use crate::inspect::{InspectError, Volume};
use crate::layout::geometry::Geometry;
use crate::layout::slot::SlotRecord;
use crate::layout::superblock::Superblock;
use crate::recovery::RecoveryError;
use crate::types::{BlockNo, InodeNo, Owner, Slot, VolumeId};

/// Why a check came to no end.
#[derive(Debug, Error)]
pub enum FsckError {
    #[error(transparent)]
    Inspect(#[from] InspectError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error(transparent)]
    Ats(#[from] AtsError),
    #[error(transparent)]
    Recovery(RecoveryError),
    #[error("no copy agrees with the superblock, so it can't be believed where things lie")]
    Lonely,
    #[error("the volume lock was taken from this maintenance: {0}")]
    Stolen(String),
    #[error("{0} inode groups are more than this program can check")]
    TooManyInodes(usize),
    #[error("host '{host}' (slot {slot}) uses the volume; unmount it there first")]
    InUse { host: String, slot: Slot },
    #[error("host '{host}' (slot {slot}) began to use the volume meanwhile; what was found may be wrong")]
    Appeared { host: String, slot: Slot },
    #[error("cancelled")]
    Cancelled,
}

/// What part of a check is going on, and how far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    pub pass: &'static str,
    pub done: u64,
    pub of: u64,
}

/// Who is told of a check while it goes on.
pub trait Observer {
    fn found(&mut self, finding: &Finding);
    /// False: stop.
    fn progress(&mut self, at: Progress) -> bool;
}

/// Findings in a list, for those who want no more.
impl Observer for Vec<Finding> {
    fn found(&mut self, finding: &Finding) {
        self.push(finding.clone());
    }
    fn progress(&mut self, _: Progress) -> bool {
        true
    }
}

/// Wrong claims that are remembered; where there are more, later rounds may name some again.
const MOST_CLAIMS_TOLD: usize = 100_000;

/// What a check may use.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Of memory for what blocks were met.
    pub usage_bytes: usize,
    /// Inode groups from which on threads read ahead.
    pub ahead_from_groups: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { usage_bytes: usage::BUDGET_BYTES, ahead_from_groups: 1000 }
    }
}

/// What a volume consists of, and how much is wrong with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    pub directories: u64,
    pub files: u64,
    /// Names, those of orphans included.
    pub links: u64,
    /// Inodes in orphan directories.
    pub orphans: u64,
    /// Blocks that maps say are used, inode groups included, clusters' own blocks not.
    pub used_blocks: u64,
    pub used_inodes: u64,
    pub notes: u64,
    /// Findings that are no notes.
    pub errors: u64,
    /// Times that all trees were gone through.
    pub rounds: u64,
}

/// One check under way.
struct Checker<'c, 'v, 'd> {
    view: &'c View<'v, 'd>,
    superblock: Superblock,
    geometry: Geometry,
    volume: VolumeId,
    out: &'c mut dyn Observer,
    at: Progress,
    cancelled: bool,
    /// Our own slot lives, and the volume lock is ours.
    me: Option<Owner>,
    report: Report,
    /// What can be read of the slots.
    slots: Vec<Option<SlotRecord>>,
    /// Net allocation of slots whose journal was looked through, by slot.
    net: Vec<Option<(i64, i64)>>,
    inodes: Inodes,
    usage: Usage,
    /// Maps, and all maps of clusters, of which nothing is known.
    unknown_maps: BTreeSet<MapId>,
    unknown_clusters: BTreeSet<u64>,
    /// Something that owns blocks could not be read: none can be called lost.
    owners_unknown: bool,
    /// Something that names inodes could not be read: none can be called nameless.
    names_unknown: bool,
    /// Claims of a cluster that was let go later come again in another round; their findings don't.
    claims_told: BTreeSet<(InodeNo, BlockNo)>,
    /// A map marks something wrongly.
    marks_wrong: bool,
    /// Later rounds only count blocks.
    first_round: bool,
}

/// Checks the volume on a device that nobody writes to meanwhile.
pub fn check(device: Arc<dyn BlockDevice>, out: &mut dyn Observer) -> Result<Report, FsckError> {
    check_within(device, Limits::default(), out)
}

/// [`check`] with other limits than usual.
pub fn check_within(
    device: Arc<dyn BlockDevice>,
    limits: Limits,
    out: &mut dyn Observer,
) -> Result<Report, FsckError> {
    let volume = open(&*device)?;
    check_opened(&device, &volume, None, limits, out)
}

/// Opens a volume by the newest superblock, and of those of one generation by that which most copies agree on. One
/// that no copy agrees with is not believed: where it says that its copies lie, other things may be.
fn open(device: &dyn BlockDevice) -> Result<Volume<'_>, FsckError> {
    let mut volume = Volume::open(device)?;
    let mut votes: Vec<(Superblock, u32)> = vec![(volume.superblock.clone(), 0)];
    for at in volume.geometry().superblock_copies() {
        let copy = volume.read_checked(at, |block| Ok(Superblock::decode(block, at, true).ok()))?;
        let Some(copy) = copy.filter(|copy| copy.volume == volume.id()) else { continue };
        match votes.iter_mut().find(|(known, _)| *known == copy) {
            Some((_, count)) => *count += 1,
            None => votes.push((copy, 1)),
        }
    }
    let best = votes.into_iter().max_by_key(|(superblock, count)| (superblock.generation, *count));
    match best.filter(|(_, count)| *count > 0) {
        Some((superblock, _)) => volume.superblock = superblock,
        None => return Err(FsckError::Lonely),
    }
    Ok(volume)
}

/// Makes sure that nobody uses the volume, checks it, and makes sure that nobody came. Writes nothing.
pub fn examine(device: Arc<dyn BlockDevice>, out: &mut dyn Observer) -> Result<Report, FsckError> {
    let volume = open(&*device)?;
    let quiet = quiet::watch(&volume, false, out)?;
    let report = check_opened(&device, &volume, None, Limits::default(), out)?;
    quiet.still(&volume)?;
    Ok(report)
}

/// `me`: who has it under maintenance meanwhile.
fn check_opened(
    device: &Arc<dyn BlockDevice>,
    volume: &Volume<'_>,
    me: Option<Owner>,
    limits: Limits,
    out: &mut dyn Observer,
) -> Result<Report, FsckError> {
    let mut view = View { volume, pending: Default::default(), ahead: OnceCell::new() };
    let journals = pending::look(device, volume, me, &mut view.pending)?;
    let superblock = volume.superblock.clone();
    let geometry = superblock.geometry;
    let mut checker = Checker {
        view: &view,
        volume: superblock.volume,
        geometry,
        out,
        at: Progress { pass: "", done: 0, of: 0 },
        cancelled: false,
        report: Report::default(),
        slots: Vec::new(),
        net: Vec::new(),
        inodes: Inodes::default(),
        usage: Usage::new(geometry, 0..geometry.clusters(), limits.usage_bytes),
        claims_told: BTreeSet::new(),
        unknown_maps: BTreeSet::new(),
        unknown_clusters: BTreeSet::new(),
        owners_unknown: false,
        names_unknown: false,
        marks_wrong: false,
        first_round: true,
        me,
        superblock,
    };
    checker.system(&journals);
    checker.clusters()?;
    if checker.inodes.groups() >= limits.ahead_from_groups {
        view.ahead.get_or_init(|| Ahead::start(device.clone()));
    }
    let mut done = checker.round()?;
    while done < geometry.clusters() {
        checker.first_round = false;
        checker.usage = Usage::new(geometry, done..geometry.clusters(), limits.usage_bytes);
        checker.expect_maps(done..geometry.clusters())?;
        done = checker.round()?;
    }
    checker.sums();
    Ok(checker.report)
}

impl Checker<'_, '_, '_> {
    /// Which cluster the next round begins with.
    fn round(&mut self) -> Result<u64, FsckError> {
        self.bodies()?;
        self.names()?;
        if self.first_round {
            self.links()?;
        }
        let clusters = self.usage.clusters();
        self.compare_blocks()?;
        self.report.rounds += 1;
        Ok(clusters.end)
    }

    fn found(&mut self, finding: Finding) {
        // Sums over maps that are not true say nothing.
        self.marks_wrong |=
            matches!(finding.kind, Kind::BlockFree | Kind::BlockLost | Kind::InodeFree | Kind::InodeUsed);
        match finding.kind.severity() {
            Severity::Note => self.report.notes += 1,
            _ => self.report.errors += 1,
        }
        self.out.found(&finding);
    }

    fn find(&mut self, kind: Kind, place: Place, text: impl Into<String>) {
        self.found(Finding::new(kind, place, text));
    }

    fn progress(&mut self, pass: &'static str, done: u64, of: u64) -> Result<(), FsckError> {
        self.at = Progress { pass, done, of };
        self.tick();
        match self.cancelled {
            true => Err(FsckError::Cancelled),
            false => Ok(()),
        }
    }

    /// Says where we are, in the middle of a tree, which may be the largest part of a pass.
    fn tick(&mut self) {
        self.cancelled |= !self.out.progress(self.at);
    }

    /// Is it known whether there is an inode at this address?
    fn can_be_judged(&self, ino: InodeNo) -> bool {
        let Some(cluster) = self.geometry.cluster_of(ino.body()) else { return true };
        let offset = ino.0 - self.geometry.cluster(cluster).0;
        let map = offset / usage::BLOCKS_PER_MAP;
        !self.unknown_clusters.contains(&cluster) && !self.unknown_maps.contains(&(cluster, map))
    }

    /// An inode has these blocks.
    fn claim(&mut self, ino: InodeNo, at: BlockNo, blocks: u64) {
        let (mut at, mut left) = (at, blocks);
        while left > 0 {
            let (count, mut claimed) = self.usage.claim(at, left);
            if matches!(claimed, Claimed::Fresh | Claimed::Twice(_)) && self.inodes.group_within(at, count) {
                claimed = Claimed::Outside;
            }
            self.claimed(ino, at, count, claimed);
            at = at.plus(count);
            left = left.saturating_sub(count);
        }
    }

    /// Notes that a claim was found wrong.
    fn told_before(&mut self, ino: InodeNo, at: BlockNo) -> bool {
        self.claims_told.len() < MOST_CLAIMS_TOLD && !self.claims_told.insert((ino, at))
    }

    fn claimed(&mut self, ino: InodeNo, at: BlockNo, blocks: u64, claimed: Claimed) {
        match claimed {
            Claimed::Fresh | Claimed::Elsewhere => {}
            Claimed::Twice(block) => {
                self.owners_unknown = true;
                if self.told_before(ino, block) {
                    return;
                }
                let text = format!("block {block} of inode {ino} belongs to another, too");
                self.found(Finding::new(Kind::BlockTwice, Place::of_inode(ino), text).should_be(block.0));
            }
            Claimed::Unmapped if !self.can_be_judged(InodeNo(at.0)) || self.told_before(ino, at) => {}
            Claimed::Unmapped => {
                let text = format!("belongs to inode {ino} and is marked free");
                self.find(Kind::BlockFree, Place::Blocks { first: at.0, blocks }, text);
            }
            Claimed::Outside if self.first_round => {
                self.owners_unknown = true;
                let text = format!("block {at} can't belong to a file or directory");
                self.find(Kind::Extent, Place::of_inode(ino), text);
            }
            Claimed::Outside => {}
        }
    }
}
