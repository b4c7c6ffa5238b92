//! What did not fit at a glance, until it is decided.
//!
//! A case whose locks nobody else holds exclusively is looked at soon: that disturbs nobody. Any other one waits
//! until its holder has put in place what it had committed, is glanced at again, and only then is its lock asked for.

use std::time::Duration;

use super::ground::{Eyes, NoLock};
use super::twice::Claim;
use super::{Scrub, ScrubError};
use crate::lock::LockId;
use crate::rt::Instant;
use crate::types::InodeNo;

/// Cases that wait at most, in memory; beyond it the oldest is decided at once.
pub(super) const MOST_CASES: usize = 8192;
/// Longer than a host waits with a commit and with putting it in place.
const IN_PLACE: Duration = Duration::from_secs(16);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Case {
    Cluster(u64),
    Inode(InodeNo),
    Entry {
        directory: InodeNo,
        key: u64,
    },
    /// It has no links, and the list that it names does not have it.
    Orphan(InodeNo),
    /// Two claim one block.
    Twice(Claim, Claim),
}

/// A case whose holder is given time.
pub(super) struct Waiting {
    case: Case,
    due: Instant,
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Case::Cluster(cluster) => write!(f, "cluster {cluster}"),
            Case::Inode(ino) => write!(f, "inode {:#x}", ino.0),
            Case::Entry { directory, key } => write!(f, "directory {:#x}, key {key:#x}", directory.0),
            Case::Orphan(ino) => write!(f, "inode {:#x}, which has no links", ino.0),
            Case::Twice(a, b) => write!(f, "blocks that inodes {:#x} and {:#x} share", a.ino.0, b.ino.0),
        }
    }
}

impl Scrub<'_> {
    pub(super) fn suspect(&mut self, case: Case) {
        if self.known.len() > 8 * MOST_CASES {
            // What was decided long ago may be decided once more.
            let waiting = self.later.iter().map(|w| w.case).chain(self.soon.iter().copied());
            self.known = waiting.collect();
        }
        if !self.known.insert(case) {
            return;
        }
        self.report.cases += 1;
        let busy = self.locks_of(case).into_iter().any(|id| self.ground.held_by(id).is_some());
        match busy {
            true => self.later.push_back(Waiting { case, due: Instant::now() + IN_PLACE }),
            false => self.soon.push_back(case),
        }
    }

    /// The locks that a look at it will take, as far as is known before.
    fn locks_of(&self, case: Case) -> Vec<LockId> {
        let ground = &self.ground;
        match case {
            Case::Cluster(cluster) => vec![ground.cluster_lock(cluster)],
            Case::Inode(ino) => {
                let cluster = ground.geometry.cluster_of(ino.body());
                let cluster = cluster.map(|cluster| ground.cluster_lock(cluster));
                std::iter::once(ground.inode_lock(ino)).chain(cluster).collect()
            }
            Case::Orphan(ino) => vec![ground.inode_lock(ino)],
            Case::Twice(a, b) => vec![ground.inode_lock(a.ino), ground.inode_lock(b.ino)],
            Case::Entry { directory, key } => {
                let target = self.entry_at(Eyes::Glance, directory, key).map(|(target, _)| target.ino);
                let target = target.filter(|ino| ground.geometry.can_be_inode(*ino));
                let target = target.map(|ino| ground.inode_lock(ino));
                std::iter::once(ground.inode_lock(directory)).chain(target).collect()
            }
        }
    }

    /// Decides what can be decided now.
    pub(super) fn decide_due(&mut self) -> Result<(), ScrubError> {
        loop {
            let now = Instant::now();
            let late = |w: &Waiting| w.due <= now;
            let case = match self.soon.pop_front() {
                Some(case) => case,
                None if self.later.front().is_some_and(late) || self.later.len() > MOST_CASES => {
                    match self.later.pop_front() {
                        Some(waiting) => waiting.case,
                        None => return Ok(()),
                    }
                }
                None => return Ok(()),
            };
            self.decide(case)?;
        }
    }

    /// Decides all that is left.
    pub(super) fn decide_all(&mut self) -> Result<(), ScrubError> {
        let mut most = self.later.len() as u64;
        loop {
            self.decide_due()?;
            let left = self.later.len() as u64;
            most = most.max(left);
            self.progress("what changed meanwhile", most - left, most)?;
            match self.later.front() {
                Some(waiting) => {
                    let soon = Instant::now() + Duration::from_millis(500);
                    self.ground.sleep_until(waiting.due.min(soon))?;
                }
                None if self.soon.is_empty() => break,
                None => {}
            }
        }
        self.report.not_compared = self.claims.left_out();
        Ok(())
    }

    fn decide(&mut self, case: Case) -> Result<(), ScrubError> {
        self.ground.pay()?;
        if self.case_fits(case)? {
            return Ok(());
        }
        let looked = match case {
            Case::Cluster(cluster) => self.look_at_cluster(cluster),
            Case::Inode(ino) => self.look_at_inode(ino),
            Case::Entry { directory, key } => self.look_at_entry(directory, key),
            Case::Orphan(ino) => self.look_at_orphan(ino),
            Case::Twice(a, b) => self.look_at_twice(&a, &b),
        };
        self.report.asked = self.ground.asked();
        match looked {
            Ok(()) => Ok(()),
            Err(NoLock::End(end)) => Err(end),
            Err(NoLock::Leave(why)) => {
                self.ground.go_on()?;
                self.not_looked(case.to_string(), why);
                Ok(())
            }
        }
    }

    /// Does it fit by now, at a glance?
    fn case_fits(&mut self, case: Case) -> Result<bool, ScrubError> {
        match case {
            Case::Cluster(cluster) => Ok(self.cluster(Eyes::Glance, cluster).0.is_empty()),
            Case::Inode(ino) => {
                // One that is gone fits, if its map says so.
                let system = self.ground.geometry.is_system_inode(ino);
                let mark = if system { None } else { self.ground.inode_mark(Eyes::Glance, ino) };
                self.inode_fits(ino, mark.filter(|(group, _)| *group).map(|(_, used)| used), None, false)
            }
            Case::Entry { directory, key } => Ok(self.entry_case_fits(directory, key)),
            Case::Orphan(ino) => self.orphan_case_fits(ino),
            Case::Twice(a, b) => Ok(!self.are_twice(Eyes::Glance, &a, &b)),
        }
    }

    fn look_at_cluster(&mut self, cluster: u64) -> Result<(), NoLock> {
        let guards = self.ground.hold(&[self.ground.cluster_lock(cluster)])?;
        let (found, _) = self.cluster(Eyes::Look(&guards), cluster);
        drop(guards);
        for finding in found {
            self.found(finding)?;
        }
        Ok(())
    }
}
