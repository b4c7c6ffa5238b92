//! Inodes: glances at whole groups, looks at one inode in steps.

use super::cases::Case;
use super::clusters::ClustersLooked;
use super::ground::{Eyes, Ground, NoLock};
use super::trees::Sums;
use super::{Scrub, ScrubError};
use crate::fsck::finding::{Finding, Kind, Place};
use crate::fsck::rules;
use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES, lock_of_inode};
use crate::layout::inode::{Form, InodeDisk};
use crate::layout::lock::LockKind;
use crate::layout::{Block, zero_block};
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo};

/// Leaves of a tree that are read in one step.
pub(super) const LEAVES_PER_STEP: u32 = 64;
/// How often the sums of a tree that changes all the time are tried.
const TRIES: u32 = 4;

impl Ground<'_> {
    pub fn body(&self, eyes: Eyes<'_>, ino: InodeNo) -> Result<Box<Block>, String> {
        self.checked(eyes, lock_of_inode(ino), ino.body(), |block| {
            InodeDisk::parse(block, self.id, ino)?;
            Ok(Box::new(*block))
        })
    }

    pub fn is_orphan_directory(&self, ino: InodeNo) -> bool {
        self.geometry.is_system_inode(ino) && ino != self.geometry.root()
    }
}

impl Scrub<'_> {
    pub(super) fn system_groups(&mut self) -> Result<(), ScrubError> {
        let geometry = self.ground.geometry;
        for group in 0..geometry.system_groups() {
            let used = (1 + u64::from(geometry.slots)).saturating_sub(group * 8).min(8);
            self.group(geometry.system_group(group), Some(((1u16 << used) - 1) as u8))?;
        }
        self.decide_due()
    }

    /// A glance at a group of inodes and at all they have. `used`: what their map said.
    pub(super) fn group(&mut self, first: BlockNo, used: Option<u8>) -> Result<(), ScrubError> {
        self.ground.go_on()?;
        self.ground.pay()?;
        let bytes = self.ground.raw(first, GROUP_BLOCKS).ok();
        let piece = |index: u64| {
            let start = index as usize * BLOCK_BYTES;
            bytes.as_ref().and_then(|bytes| bytes.get(start..start + BLOCK_BYTES))
        };
        for index in 0..GROUP_INODES {
            self.lock(first.plus(index), LockKind::Inode, piece(index))?;
        }
        let mut bodies = Vec::new();
        for index in 0..GROUP_INODES {
            let ino = InodeNo(first.0 + GROUP_INODES + index);
            let mut block = zero_block();
            let body = match piece(GROUP_INODES + index) {
                Some(piece) => {
                    block.copy_from_slice(piece);
                    InodeDisk::parse(&block, self.ground.id, ino).is_ok().then_some(block)
                }
                None => None,
            };
            bodies.push(body.or_else(|| self.ground.body(Eyes::Glance, ino).ok()));
        }
        self.glimpsed(first, &bodies);
        for (index, body) in (0..GROUP_INODES).zip(bodies) {
            let ino = InodeNo(first.0 + GROUP_INODES + index);
            let used = used.map(|used| used & 1 << index != 0);
            if !self.inode_fits(ino, used, body, true)? {
                self.suspect(Case::Inode(ino));
            }
        }
        self.decide_due()
    }

    /// A glance at an inode. `body`: as it was read with others. `counts`: the report is to count it.
    pub(super) fn inode_fits(
        &mut self,
        ino: InodeNo,
        used: Option<bool>,
        mut body: Option<Box<Block>>,
        counts: bool,
    ) -> Result<bool, ScrubError> {
        let (mut sums, mut from, mut change) = (Sums::default(), 0, None);
        loop {
            let block = match body.take() {
                Some(block) => block,
                None => match self.ground.body(Eyes::Glance, ino) {
                    Ok(block) => block,
                    Err(_) => return Ok(false),
                },
            };
            let body = InodeDisk::of(&block);
            let in_use = body.form() != Form::Free;
            if from == 0 {
                if used.is_some_and(|used| used != in_use) {
                    return Ok(false);
                }
                if !in_use {
                    return Ok(true);
                }
                if counts {
                    self.count(body);
                }
                if rules::inode_contradiction(body).is_some() {
                    return Ok(false);
                }
                if body.nlink.get() == 0 && !self.orphan_fits(ino, body) {
                    self.suspect(Case::Orphan(ino));
                }
            } else if change != Some(body.change.get()) {
                // It changed while it was read: what was read before may not fit to this.
                return Ok(false);
            }
            change = Some(body.change.get());
            let mut found = Vec::new();
            let part = self.part(Eyes::Glance, ino, body, from, &mut sums, &mut found);
            self.marks_of(Eyes::Glance, ino, &part, &mut ClustersLooked::default(), &mut found);
            if counts {
                self.report.names += part.names.len() as u64;
            }
            if !found.is_empty() {
                return Ok(false);
            }
            self.refer(ino, &part)?;
            match part.next {
                Some(next) => from = next,
                None => {
                    return Ok(sums.faults(ino, body, self.ground.is_orphan_directory(ino)).is_empty());
                }
            }
            self.ground.pay()?;
        }
    }

    fn count(&mut self, body: &InodeDisk) {
        self.report.inodes += 1;
        match body.mode.get() & libc::S_IFMT {
            libc::S_IFDIR => self.report.directories += 1,
            _ => self.report.files += 1,
        }
    }

    /// Looks at an inode under its lock, and reports.
    pub(super) fn look_at_inode(&mut self, ino: InodeNo) -> Result<(), NoLock> {
        if !self.look_at_mark(ino)? {
            return Ok(());
        }
        for _ in 0..TRIES {
            if self.look_at_tree(ino)? {
                return Ok(());
            }
        }
        Err(NoLock::Leave("it changed all the time, so what it counts could not be compared".into()))
    }

    /// The body, and whether its map knows it. False: there is nothing more to see.
    fn look_at_mark(&mut self, ino: InodeNo) -> Result<bool, NoLock> {
        if self.ground.geometry.is_system_inode(ino) {
            return Ok(true);
        }
        let Some(cluster) = self.ground.geometry.cluster_of(ino.body()) else { return Ok(false) };
        let guards = self.ground.hold(&[self.ground.inode_lock(ino), self.ground.cluster_lock(cluster)])?;
        let eyes = Eyes::Look(&guards);
        let in_use = self.ground.body(eyes, ino).map(|b| InodeDisk::of(&b).form() != Form::Free);
        let mark = self.ground.inode_mark(eyes, ino);
        drop(guards);
        let place = Place::of_inode(ino);
        match (in_use, mark) {
            (Err(e), _) => {
                self.found(Finding::new(Kind::InodeUnreadable, place, e))?;
                Ok(false)
            }
            (Ok(false), Some((true, true))) => {
                let text = "free, and marked used in its map";
                self.found(Finding::new(Kind::InodeUsed, place, text))?;
                Ok(false)
            }
            (Ok(true), Some((true, false))) => {
                let text = "in use, and marked free in its map";
                self.found(Finding::new(Kind::InodeFree, place, text))?;
                Ok(true)
            }
            (Ok(in_use), _) => Ok(in_use),
        }
    }

    /// Goes through the tree in steps. False: it changed meanwhile, and takes more than one step.
    fn look_at_tree(&mut self, ino: InodeNo) -> Result<bool, NoLock> {
        let place = Place::of_inode(ino);
        let orphans = self.ground.is_orphan_directory(ino);
        let (mut from, mut sums, mut change, mut steady) = (0, Sums::default(), None, true);
        let mut told: Vec<Finding> = Vec::new();
        loop {
            let mut looked = ClustersLooked::default();
            let next = loop {
                let mut ids = vec![self.ground.inode_lock(ino)];
                ids.extend(looked.held.map(|cluster| self.ground.cluster_lock(cluster)));
                let guards = self.ground.hold(&ids)?;
                let eyes = Eyes::Look(&guards);
                let block = match self.ground.body(eyes, ino) {
                    Ok(block) => block,
                    Err(e) => {
                        drop(guards);
                        self.found(Finding::new(Kind::InodeUnreadable, place, e))?;
                        return Ok(true);
                    }
                };
                let body = InodeDisk::of(&block);
                if body.form() == Form::Free {
                    return Ok(true);
                }
                if let Some(text) = rules::inode_contradiction(body) {
                    drop(guards);
                    self.found(Finding::new(Kind::InodeFields, place, text))?;
                    return Ok(true);
                }
                if change.is_some_and(|change| change != body.change.get()) {
                    steady = false;
                    sums.begin_anew_with_names();
                }
                change = Some(body.change.get());
                let (mut found, mut trial) = (Vec::new(), sums.clone());
                let again = looked.held.is_some();
                let part = self.part(eyes, ino, body, from, &mut trial, &mut found);
                if again {
                    // Said when the step was made for the first time.
                    found.clear();
                }
                let wanted = self.marks_of(eyes, ino, &part, &mut looked, &mut found);
                drop(guards);
                if wanted.is_none() && part.next.is_none() && steady {
                    found.extend(trial.faults(ino, body, orphans));
                }
                for finding in found {
                    // A tree that has to be gone through once more is not to say the same again.
                    if !told.contains(&finding) {
                        told.push(finding.clone());
                        self.found(finding)?;
                    }
                }
                self.ground.pay()?;
                if wanted.is_none() {
                    self.refer(ino, &part)?;
                    sums = trial;
                    break part.next;
                }
                looked.held = wanted;
            };
            match next {
                Some(next) => from = next,
                None => return Ok(steady),
            }
        }
    }
}
