//! Names: does what an entry names exist, and is it what the entry says?

use std::num::NonZeroUsize;
use std::sync::Arc;

use super::cases::Case;
use super::ground::{Eyes, NoLock, Nodes};
use super::{Scrub, ScrubError};
use crate::fs::dirtree::{DirTarget, DirTree};
use crate::fsck::finding::{Finding, Kind, Place};
use crate::fsck::rules;
use crate::inspect::names::printable;
use crate::layout::Block;
use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use crate::layout::inode::{Form, InodeDisk};
use crate::lock::Guard;
use crate::types::{BlockNo, InodeNo};

/// Inode groups of which glimpses are remembered: 131,072 inodes in some 6 MiB.
pub(super) const GROUPS_IN_MEMORY: NonZeroUsize = NonZeroUsize::new(16_384).unwrap();

/// What an inode was like once.
#[derive(Clone, Copy, Default)]
pub(super) struct Glimpse {
    parent: u64,
    parent_key: u64,
    nlink: u32,
    generation: u32,
    /// File type bits of the mode, shifted right by 12; 0: free, or unreadable.
    kind: u8,
}

impl Glimpse {
    fn of(body: &InodeDisk) -> Self {
        Glimpse {
            parent: body.parent.get(),
            parent_key: body.parent_key.get(),
            nlink: body.nlink.get(),
            generation: body.generation.get(),
            kind: if body.form() == Form::Free { 0 } else { (body.mode.get() >> 12) as u8 },
        }
    }

    fn is_directory(&self) -> bool {
        u32::from(self.kind) == libc::S_IFDIR >> 12
    }
}

/// What is wrong with a name, by what its inode says.
fn misfit(directory: InodeNo, orphans: bool, key: u64, target: DirTarget, is: &Glimpse) -> Option<Kind> {
    if is.kind == 0 {
        return Some(Kind::EntryDangling);
    }
    if (is.generation, is.kind) != (target.generation, target.kind) {
        return Some(Kind::EntryTarget);
    }
    match (orphans, is.nlink) {
        (true, 1..) => return Some(Kind::OrphanLinked),
        (false, 0) => return Some(Kind::Links),
        _ => {}
    }
    let elsewhere = is.is_directory() && (is.parent, is.parent_key) != (directory.0, key);
    elsewhere.then_some(Kind::DirectoryParent)
}

impl Scrub<'_> {
    /// Remembers a group as it was read. What could not be read is not remembered as anything.
    pub(super) fn glimpsed(&mut self, first: BlockNo, bodies: &[Option<Box<Block>>]) {
        let mut glimpses = [Glimpse::default(); GROUP_INODES as usize];
        for (glimpse, body) in glimpses.iter_mut().zip(bodies) {
            if let Some(block) = body {
                *glimpse = Glimpse::of(InodeDisk::of(block));
            }
        }
        self.glimpses.put(first.0, Arc::new(glimpses));
    }

    /// An inode as it was once; `fresh`: as it lies on the device now.
    fn glimpse(&mut self, ino: InodeNo, fresh: bool) -> Glimpse {
        let first = BlockNo(ino.0 - ino.0 % GROUP_BLOCKS);
        let index = (ino.0 % GROUP_BLOCKS).saturating_sub(GROUP_INODES) as usize;
        if fresh || !self.glimpses.contains(&first.0) {
            let Ok(bytes) = self.ground.raw(first.plus(GROUP_INODES), GROUP_INODES) else {
                return Glimpse::default();
            };
            let (blocks, _) = bytes.as_chunks::<{ crate::types::BLOCK_BYTES }>();
            let bodies: Vec<Option<Box<Block>>> = (0..)
                .zip(blocks)
                .map(|(i, block)| {
                    let ino = InodeNo(first.0 + GROUP_INODES + i);
                    InodeDisk::parse(block, self.ground.id, ino).is_ok().then(|| Box::new(*block))
                })
                .collect();
            self.glimpsed(first, &bodies);
        }
        let group = self.glimpses.get(&first.0);
        group.and_then(|group| group.get(index)).copied().unwrap_or_default()
    }

    /// A glance at one name.
    pub(super) fn entry_fits(&mut self, directory: InodeNo, key: u64, target: DirTarget) -> bool {
        let geometry = self.ground.geometry;
        let ino = target.ino;
        if !geometry.can_be_inode(ino) || geometry.is_system_inode(ino) || !self.is_group(ino) {
            return false;
        }
        let orphans = self.ground.is_orphan_directory(directory);
        [false, true].into_iter().any(|fresh| {
            let glimpse = self.glimpse(ino, fresh);
            misfit(directory, orphans, key, target, &glimpse).is_none()
        })
    }

    /// The entry with this key.
    pub(super) fn entry_at(
        &self,
        eyes: Eyes<'_>,
        directory: InodeNo,
        key: u64,
    ) -> Option<(DirTarget, String)> {
        let block = self.ground.body(eyes, directory).ok()?;
        let body = InodeDisk::of(&block);
        if body.form() != Form::Tree || body.mode.get() & libc::S_IFMT != libc::S_IFDIR {
            return None;
        }
        let tree = DirTree::new(self.ground.id, directory, self.ground.superblock.hash_seed);
        let mut nodes = Nodes::of(&self.ground, eyes, directory);
        let value = tree.tree().get(&mut nodes, &body.content, key).ok()??;
        let item = tree.parse(key, &value).ok()?;
        Some((item.target, printable(&String::from_utf8_lossy(item.name))))
    }

    /// A glance at an inode without links: does the list that it names have it?
    pub(super) fn orphan_fits(&mut self, ino: InodeNo, body: &InodeDisk) -> bool {
        let list = InodeNo(body.parent.get());
        self.ground.geometry.is_system_inode(ino)
            || self.ground.is_orphan_directory(list)
                && self
                    .entry_at(Eyes::Glance, list, body.parent_key.get())
                    .is_some_and(|(target, _)| target.ino == ino)
    }

    /// These inodes' locks, together. Sorted and without doubles.
    pub(super) fn hold_inodes(&self, inodes: &[InodeNo]) -> Result<Vec<Guard>, NoLock> {
        let mut ids: Vec<_> = inodes.iter().map(|ino| self.ground.inode_lock(*ino)).collect();
        ids.sort_unstable();
        ids.dedup();
        self.ground.hold(&ids)
    }

    /// Looks at one name, under the locks of its directory and its inode.
    pub(super) fn look_at_entry(&mut self, directory: InodeNo, key: u64) -> Result<(), NoLock> {
        let geometry = self.ground.geometry;
        let orphans = self.ground.is_orphan_directory(directory);
        let place = |ino: InodeNo| Place::Entry { directory: directory.0, key, inode: ino.0 };
        let mut also: Vec<InodeNo> = Vec::new();
        // Which inodes are needed is known only under the directory's lock: two rounds, or three.
        for _ in 0..6 {
            let mut inodes = vec![directory];
            inodes.extend(&also);
            let guards = self.hold_inodes(&inodes)?;
            let eyes = Eyes::Look(&guards);
            let Some((target, shown)) = self.entry_at(eyes, directory, key) else { return Ok(()) };
            let ino = target.ino;
            let dangling = format!("\"{shown}\" names inode {ino}, which is not in use");
            if !geometry.can_be_inode(ino) || geometry.is_system_inode(ino) {
                drop(guards);
                self.found(Finding::new(Kind::EntryDangling, place(ino), dangling))?;
                return Ok(());
            }
            if !also.contains(&ino) {
                drop(guards);
                match self.look_for_group(directory, key, ino)? {
                    Some(true) => {}
                    Some(false) => {
                        self.found(Finding::new(Kind::EntryDangling, place(ino), dangling))?;
                        return Ok(());
                    }
                    // It can't be told, or the entry is gone.
                    None => return Ok(()),
                }
                also = vec![ino];
                continue;
            }
            let is = match self.ground.body(eyes, ino) {
                Ok(block) if rules::inode_contradiction(InodeDisk::of(&block)).is_none() => {
                    Glimpse::of(InodeDisk::of(&block))
                }
                Ok(block) if InodeDisk::of(&block).form() == Form::Free => Glimpse::default(),
                // That is a finding of its own.
                _ => {
                    drop(guards);
                    self.suspect(Case::Inode(ino));
                    return Ok(());
                }
            };
            let Some(mut kind) = misfit(directory, orphans, key, target, &is) else { return Ok(()) };
            let text = match kind {
                Kind::EntryDangling => dangling,
                Kind::EntryTarget => format!(
                    "\"{shown}\" names generation {} and type {:o} of inode {ino}, which has {} and {:o}",
                    target.generation, target.kind, is.generation, is.kind
                ),
                Kind::OrphanLinked => format!("inode {ino} has {} links", is.nlink),
                Kind::Links => format!("inode {ino} has the name \"{shown}\" and link count 0"),
                _ => {
                    // Two names, or a parent that is not true: what it says is looked at as well.
                    let parent = InodeNo(is.parent);
                    let is_known = parent == directory || also.contains(&parent);
                    if !is_known && geometry.can_be_inode(parent) && self.is_group(parent) {
                        also = vec![ino, parent];
                        continue;
                    }
                    let other = is_known.then(|| self.entry_at(eyes, parent, is.parent_key)).flatten();
                    if other.is_some_and(|(target, _)| target.ino == ino) {
                        kind = Kind::DirectoryTwice;
                        format!("\"{shown}\" is a second name of directory {ino}")
                    } else {
                        format!(
                            "\"{shown}\" is directory {ino}, which says that it has key {:#x} in {:#x}",
                            is.parent_key, is.parent
                        )
                    }
                }
            };
            drop(guards);
            let place = if kind == Kind::Links { Place::of_inode(ino) } else { place(ino) };
            self.found(Finding::new(kind, place, text))?;
            return Ok(());
        }
        Err(NoLock::Leave("it changed all the time".into()))
    }

    /// With the entry held in place: does its cluster know a group there? None: that can't be told.
    fn look_for_group(&mut self, directory: InodeNo, key: u64, ino: InodeNo) -> Result<Option<bool>, NoLock> {
        if self.is_group(ino) {
            return Ok(Some(true));
        }
        let Some(cluster) = self.ground.geometry.cluster_of(ino.body()) else { return Ok(Some(false)) };
        let guards =
            self.ground.hold(&[self.ground.inode_lock(directory), self.ground.cluster_lock(cluster)])?;
        let eyes = Eyes::Look(&guards);
        let same = self.entry_at(eyes, directory, key).is_some_and(|(target, _)| target.ino == ino);
        let mark = self.ground.inode_mark(eyes, ino);
        Ok(if same { mark.map(|(is_group, _)| is_group) } else { None })
    }

    /// Looks for an inode without links in all lists of orphans.
    pub(super) fn look_at_orphan(&mut self, ino: InodeNo) -> Result<(), NoLock> {
        let geometry = self.ground.geometry;
        let name = format!("{:016x}", ino.0).into_bytes();
        let mut change = None;
        for slot in geometry.all_slots() {
            let list = geometry.orphan_directory(slot);
            let guards = self.hold_inodes(&[list, ino])?;
            let eyes = Eyes::Look(&guards);
            let (Ok(block), Ok(list_block)) = (self.ground.body(eyes, ino), self.ground.body(eyes, list))
            else {
                return Ok(());
            };
            let body = InodeDisk::of(&block);
            let same = change.is_none_or(|change| change == body.change.get());
            if body.form() == Form::Free || body.nlink.get() > 0 || !same {
                return Ok(());
            }
            change = Some(body.change.get());
            let tree = DirTree::new(self.ground.id, list, self.ground.superblock.hash_seed);
            let mut nodes = Nodes::of(&self.ground, eyes, list);
            match tree.lookup(&mut nodes, &InodeDisk::of(&list_block).content, &name) {
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => return Ok(()),
            }
        }
        let text = "has no links and is in no list of orphans";
        Ok(self.found(Finding::new(Kind::OrphanUnlisted, Place::of_inode(ino), text))?)
    }

    /// A glance at one name by its key.
    pub(super) fn entry_case_fits(&mut self, directory: InodeNo, key: u64) -> bool {
        match self.entry_at(Eyes::Glance, directory, key) {
            Some((target, _)) => self.entry_fits(directory, key, target),
            // Gone; or the directory can't be read, which is a case of its own.
            None => true,
        }
    }

    pub(super) fn orphan_case_fits(&mut self, ino: InodeNo) -> Result<bool, ScrubError> {
        let Ok(block) = self.ground.body(Eyes::Glance, ino) else { return Ok(false) };
        let body = InodeDisk::of(&block);
        Ok(body.form() == Form::Free || body.nlink.get() > 0 || self.orphan_fits(ino, body))
    }
}
