//! Checking a volume that hosts use meanwhile: by the daemon of one of its mounts, reading only.
//!
//! **Glance, then look.** On a volume in use there is no moment at which all of it is true on the device: what a
//! host holds exclusively lies partly in its journal and memory. Yet nearly everything that is whole on the device looks
//! whole, and damage on the device looks damaged at every moment. So:
//!
//! * A *glance* reads what lies on the device, takes no lock, asks nobody and disturbs nobody. It may only acquit. Whatever
//!   does not fit becomes a *case*.
//! * A *look* decides a case. It takes all locks that cover what is compared, shared, at the same time and in the
//!   global order (inodes by address, then one cluster): three inodes and a cluster at most. Then what the locks
//!   cover is in place, or waits in our own journal, where [`crate::store::Store::look`] finds it. Only a look finds.
//! * A case whose locks another host holds exclusively waits until that host had time to put in place what it
//!   committed, and is glanced at once more; then, and at a limited rate, the lock is asked for. So on a whole
//!   volume hardly any lock moves, however large it is, and a virtual machine's disk loses its lock to a scrub
//!   only if it doesn't look whole twice.
//!
//! What follows from that:
//!
//! * No false findings: a finding was true at one moment, under the locks that make that moment the same for all
//!   that was compared. Sums over a tree that takes several steps count only if the body's change counter was the
//!   same in all of them.
//! * Damage is found where it lies: on the device. Clean blocks in our cache are passed by.
//! * Nothing waits for ever. A lock that does not come in time makes its case *not looked at*, with the reason.
//! * Each step holds a fixed number of locks for a bounded number of reads; waits for a second lock while one is held
//!   are short.
//! * Bounded memory, whatever the volume's size: [`clusters::MAPS_IN_MEMORY`] maps (8 MiB), [`entries::GROUPS_IN_MEMORY`] glimpses of
//!   inode groups (6 MiB), [`twice::MOST_CLAIMS`] runs of blocks (48 MiB), [`cases::MOST_CASES`] open cases,
//!   the entries of [`inodes::LEAVES_PER_STEP`] leaves.
//! * Nothing is ever written but, when a case is looked at, the locks themselves.
//!
//! Not for: what needs the whole volume at one moment, which is `fsck`'s: blocks and inodes that nobody refers to,
//! link counts of files, loops of directories, sums over all slots. `docs/scrub.md` has the list.

mod cases;
mod clusters;
mod entries;
mod ground;
mod inodes;
mod system;
mod trees;
mod twice;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use lru::LruCache;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::cases::{Case, Waiting};
use self::clusters::Maps;
use self::entries::Glimpse;
use self::ground::Ground;
use self::twice::Claims;
use crate::fsck::finding::{Finding, Severity};
use crate::fsck::{Observer, Progress};
use crate::rt::Instant;
use crate::types::Incarnation;
use crate::volume::Volume;

/// How a volume is to be checked.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most bytes read in a second; a command counts as 16 KiB at least. 0: no limit.
    pub bytes_per_s: u64,
    /// The most locks asked of other hosts in a second.
    pub asks_per_s: u32,
    /// Rather not look at what other hosts hold exclusively.
    pub leave_busy: bool,
    /// Set by whoever wants the check to end.
    pub cancelled: Arc<AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Options { bytes_per_s: 32 << 20, asks_per_s: 10, leave_busy: false, cancelled: Arc::default() }
    }
}

/// Something that was not looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotLooked {
    pub what: String,
    pub why: String,
}

/// What was looked at, and what came of it. Counts are of what was met, which others changed meanwhile.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub clusters: u64,
    /// Inodes in use.
    pub inodes: u64,
    pub directories: u64,
    pub files: u64,
    /// Names in directories, those of orphans included.
    pub names: u64,
    pub bytes_read: u64,
    pub elapsed_ms: u64,
    /// What did not fit at a glance and was looked at again.
    pub cases: u64,
    /// Locks that other hosts held exclusively and were asked for.
    pub asked: u64,
    /// Runs of blocks that were not compared with those of all other files: there was no room to remember them.
    pub not_compared: u64,
    /// Findings that are notes, and those that are not.
    pub notes: u64,
    pub errors: u64,
    /// How much was not looked at, and the first of it.
    pub not_looked: u64,
    pub not_looked_at: Vec<NotLooked>,
}

/// Why a check came to no end.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ScrubError {
    #[error("cancelled")]
    Cancelled,
    #[error("this host may not use the volume any more: {0}")]
    LeaseEnded(String),
    /// Nothing can be read, so nothing is said of what could not be read.
    #[error("the device fails: {0}")]
    Device(String),
}

/// Of what was not looked at so much is listed.
const MOST_LISTED: usize = 100;

/// One check under way.
struct Scrub<'s> {
    ground: Ground<'s>,
    out: &'s mut dyn Observer,
    report: Report,
    maps: Maps,
    glimpses: LruCache<u64, Arc<[Glimpse; 8]>>,
    claims: Claims,
    /// Cases to be decided at once, and those that wait for their hosts.
    soon: VecDeque<Case>,
    later: VecDeque<Waiting>,
    /// Cases that wait, and those that were decided lately.
    known: BTreeSet<Case>,
    /// The last life of each slot, as far as was seen.
    lives: Vec<Option<Incarnation>>,
    begun: Instant,
}

/// Checks a volume that this host has mounted. Findings and progress go to `out` as they come; `out` ends the check by
/// saying false.
pub fn scrub(volume: &Volume, options: &Options, out: &mut dyn Observer) -> Result<Report, ScrubError> {
    let ground = Ground::new(volume, options);
    let slots = usize::from(ground.geometry.slots);
    let mut scrub = Scrub {
        out,
        report: Report::default(),
        maps: Maps::default(),
        glimpses: LruCache::new(entries::GROUPS_IN_MEMORY),
        claims: Claims::default(),
        soon: VecDeque::new(),
        later: VecDeque::new(),
        known: BTreeSet::new(),
        lives: vec![None; slots],
        begun: Instant::now(),
        ground,
    };
    let checked = scrub.all();
    scrub.report.bytes_read = scrub.ground.bytes_read();
    scrub.report.elapsed_ms = scrub.begun.elapsed().as_millis() as u64;
    checked.map(|()| scrub.report)
}

impl Scrub<'_> {
    fn all(&mut self) -> Result<(), ScrubError> {
        self.progress("superblock, slots", 0, 1)?;
        self.system()?;
        let clusters = self.ground.geometry.clusters();
        self.progress("clusters", 0, clusters)?;
        self.system_groups()?;
        for cluster in 0..clusters {
            self.cluster_pass(cluster)?;
            self.report.clusters += 1;
            self.progress("clusters", cluster + 1, clusters)?;
        }
        self.decide_all()
    }

    fn progress(&mut self, pass: &'static str, done: u64, of: u64) -> Result<(), ScrubError> {
        self.ground.go_on()?;
        match self.out.progress(Progress { pass, done, of }) {
            true => Ok(()),
            false => self.ground.go_on().and(Err(ScrubError::Cancelled)),
        }
    }

    /// Only what was true at one moment, under its locks, comes here.
    fn found(&mut self, finding: Finding) -> Result<(), ScrubError> {
        // What memory said past the lease is worth nothing.
        self.ground.go_on()?;
        match finding.kind.severity() {
            Severity::Note => self.report.notes += 1,
            _ => self.report.errors += 1,
        }
        self.out.found(&finding);
        Ok(())
    }

    fn not_looked(&mut self, what: String, why: String) {
        self.report.not_looked += 1;
        if self.report.not_looked_at.len() < MOST_LISTED {
            self.report.not_looked_at.push(NotLooked { what, why });
        }
    }
}

/// How long a lock may take to come: longer than a dead host's recovery does.
fn long_wait(dead_after: Duration) -> Duration {
    dead_after * 2 + Duration::from_secs(10)
}
