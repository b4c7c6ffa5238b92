//! Repairs of inodes, trees and names.
//!
//! A tree that is damaged is built anew from what can be reached of it, in new nodes; what its old nodes took is
//! found lost by a later check. So one function repairs nodes, extents, entries and blocks that two claim.

use std::collections::BTreeSet;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::finding::Kind;
use super::finding::Place;
use super::patch::{Patch, PatchError};
use super::repair::One;
use crate::fs::dirtree::{DirTarget, DirTree, Inserted};
use crate::fs::extents::{Extent, ExtentTree};
use crate::layout::Block;
use crate::layout::geometry::lock_of_inode;
use crate::layout::inode::{Form, InodeDisk, TimestampDisk};
use crate::layout::seal;
use crate::rt::wall_clock;
use crate::tree::TreeVisitor;
use crate::types::{BlockNo, InodeNo, Slot};

/// Where inodes go that have lost their names; what its directory kept from others, it keeps, too.
const LOST_AND_FOUND: &[u8] = b"lost+found";

/// Whatever can be reached of a tree.
#[derive(Default)]
struct Reached(Vec<(u64, Vec<u8>)>);

impl TreeVisitor<PatchError> for Reached {
    fn node(&mut self, _: BlockNo, _: u8) {}
    fn entry(&mut self, key: u64, value: &[u8]) {
        self.0.push((key, value.to_vec()));
    }
    fn damaged(&mut self, _: BlockNo, _: u64, _: u64, _: PatchError) {}
}

impl<'d> One<'_, 'd> {
    fn dir_tree(&self, ino: InodeNo) -> DirTree {
        DirTree::new(self.volume.id(), ino, self.volume.superblock.hash_seed)
    }

    /// A body that can't be used. If all that is wrong is the checksum it is believed, and checked like any other;
    /// else the inode is free, and what it was is lost.
    pub(super) fn clear(&mut self, ino: InodeNo) -> Result<(), PatchError> {
        let (id, geometry) = (self.volume.id(), *self.volume.geometry());
        let mut patch = self.patch();
        let mut block = patch.block(ino.body())?;
        let unreadable = InodeDisk::parse(&block, id, ino).is_err();
        if unreadable {
            seal(&mut block[..]);
            if InodeDisk::parse(&block, id, ino).is_ok() {
                patch.put_block(ino.body(), block);
                return patch.write_out();
            }
        }
        // A generation that no handle can know.
        let generation = InodeDisk::of(&block).generation.get().wrapping_add(1).max(2);
        let mut body = InodeDisk::new_free(id, ino);
        body.generation = U32::new(generation);
        if ino == geometry.root() || (0..geometry.slots).any(|s| geometry.orphan_directory(Slot(s)) == ino) {
            body.generation = U32::new(1);
            let mode = if ino == geometry.root() { 0o755 } else { 0o700 };
            self.make_directory(&mut body, ino, mode)?;
        }
        block.copy_from_slice(body.as_bytes());
        patch.put_block(ino.body(), block);
        patch.write_out()
    }

    fn make_directory(&self, body: &mut InodeDisk, ino: InodeNo, mode: u32) -> Result<(), PatchError> {
        let (secs, nanos) = wall_clock();
        let now: TimestampDisk = crate::layout::inode::Timestamp { secs, nanos }.into();
        body.mode = U32::new(libc::S_IFDIR | mode);
        body.nlink = U32::new(2);
        body.form = Form::Tree.code();
        (body.atime, body.mtime, body.ctime, body.btime) = (now, now, now, now);
        Ok(self.dir_tree(ino).init(&mut body.content)?)
    }

    /// Builds a tree anew. Once a round for each inode, whatever is wrong with it.
    pub(super) fn rebuild(&mut self, ino: InodeNo) -> Result<(), PatchError> {
        if !self.rebuilt.insert(ino) {
            return Ok(());
        }
        let mut patch = self.patch();
        patch.near(ino.body());
        let mut block = patch.inode(ino)?;
        let directory = InodeDisk::of(&block).mode.get() & libc::S_IFMT == libc::S_IFDIR;
        match directory {
            true => self.rebuild_directory(&mut patch, ino, &mut block)?,
            false => self.rebuild_file(&mut patch, ino, &mut block)?,
        }
        patch.put_block(ino.body(), block);
        patch.write_out()
    }

    fn rebuild_directory(
        &self,
        patch: &mut Patch<'_, 'd>,
        ino: InodeNo,
        block: &mut Block,
    ) -> Result<(), PatchError> {
        let tree = self.dir_tree(ino);
        let body = InodeDisk::of_mut(block);
        let mut reached = Reached::default();
        tree.tree().walk(patch, &body.content, &mut reached);
        tree.init(&mut body.content)?;
        let mut entries = 0;
        for (key, value) in &reached.0 {
            let Ok(item) = tree.parse(*key, value) else { continue };
            let mut name = item.name.to_vec();
            // A name that is there twice: the second one gets the number of its inode, and of its key if need be.
            for suffix in [format!(".{:x}", item.target.ino.0), format!(".{key:x}")] {
                match tree.insert(patch, &mut body.content, &name, item.target)? {
                    Inserted::Done(_) => {
                        entries += 1;
                        break;
                    }
                    Inserted::Exists(_) | Inserted::Full => {
                        name.truncate(200);
                        name.extend_from_slice(suffix.as_bytes());
                    }
                }
            }
        }
        body.entries = U64::new(entries);
        body.blocks = U64::new(patch.taken.max(0) as u64);
        Ok(())
    }

    fn rebuild_file(
        &self,
        patch: &mut Patch<'_, 'd>,
        ino: InodeNo,
        block: &mut Block,
    ) -> Result<(), PatchError> {
        // Blocks that another owns, too: this file gets copies of the extents that have them.
        let shared: BTreeSet<u64> = self
            .findings
            .iter()
            .filter(|f| f.kind == Kind::BlockTwice && f.place == Place::of_inode(ino))
            .map(|f| f.should_be)
            .collect();
        let geometry = *self.volume.geometry();
        let tree = ExtentTree::new(self.volume.id(), ino, geometry.size_blocks);
        let body = InodeDisk::of_mut(block);
        let mut reached = Reached::default();
        tree.tree().walk(patch, &body.content, &mut reached);
        tree.init(&mut body.content)?;
        let (mut end, mut blocks) = (0, 0);
        for (key, value) in &reached.0 {
            let Ok(extent) = tree.parse(*key, value) else { continue };
            if extent.logical < end || !self.may_be_data(patch, &extent) {
                continue;
            }
            end = extent.end();
            blocks += extent.blocks;
            let (first, last) = (extent.physical.0, extent.physical.0 + extent.blocks);
            if shared.range(first..last).next().is_none() {
                tree.insert(patch, &mut body.content, extent)?;
                continue;
            }
            let mut done = 0;
            while done < extent.blocks {
                let (to, count) = patch.take_blocks(extent.blocks - done)?;
                patch.copy_data(extent.physical.plus(done), to, count)?;
                let logical = extent.logical + done;
                let piece = Extent { logical, physical: to, blocks: count, unwritten: extent.unwritten };
                tree.insert(patch, &mut body.content, piece)?;
                done += count;
            }
        }
        body.blocks = U64::new(blocks + patch.taken.max(0) as u64);
        Ok(())
    }

    /// Does the extent lie where files' blocks are: inside of clusters, and not among inodes?
    fn may_be_data(&self, patch: &Patch<'_, 'd>, extent: &Extent) -> bool {
        let geometry = self.volume.geometry();
        let mut at = extent.physical;
        let end = at.0 + extent.blocks;
        while at.0 < end {
            let Some(cluster) = geometry.cluster_of(at) else { return false };
            let offset = at.0 - geometry.cluster(cluster).0;
            if offset < geometry.cluster_overhead(cluster) {
                return false;
            }
            let chunk = offset / 16;
            let per_map = crate::layout::geometry::CHUNKS_PER_MAP;
            let group = patch
                .map(cluster, chunk / per_map)
                .ok()
                .and_then(|map| map.chunks.get((chunk % per_map) as usize).map(|chunk| chunk.group == 1));
            if group != Some(false) {
                return false;
            }
            at = BlockNo((at.0 / 16 + 1) * 16);
        }
        true
    }

    pub(super) fn remove_entry(&mut self, directory: InodeNo, key: u64) -> Result<(), PatchError> {
        let mut patch = self.patch();
        let mut block = patch.inode(directory)?;
        let tree = self.dir_tree(directory);
        let body = InodeDisk::of_mut(&mut block);
        let removed = tree.tree().remove(&mut patch, &mut body.content, key)?;
        let Some(value) = removed else { return Ok(()) };
        body.entries = U64::new(body.entries.get().saturating_sub(1));
        body.blocks = U64::new(body.blocks.get().saturating_add_signed(patch.taken));
        let was_directory =
            tree.parse(key, &value).is_ok_and(|item| u32::from(item.target.kind) == libc::S_IFDIR >> 12);
        if was_directory && body.nlink.get() > 2 && directory_counts(self, directory) {
            body.nlink = U32::new(body.nlink.get() - 1);
        }
        patch.put_block(directory.body(), block);
        patch.write_out()
    }

    /// Lets an entry say of its inode what the inode says.
    pub(super) fn correct_entry(
        &mut self,
        directory: InodeNo,
        key: u64,
        ino: InodeNo,
    ) -> Result<(), PatchError> {
        let mut patch = self.patch();
        let target = target_of(&patch, ino)?;
        let mut block = patch.inode(directory)?;
        let tree = self.dir_tree(directory);
        let body = InodeDisk::of_mut(&mut block);
        let Some((_, name)) = tree.by_key(&mut patch, &body.content, key)? else { return Ok(()) };
        if tree.lookup(&mut patch, &body.content, &name)?.is_some_and(|found| found.key == key) {
            tree.set_target(&mut patch, &mut body.content, &name, target)?;
        }
        patch.put_block(directory.body(), block);
        patch.write_out()
    }

    /// Gives an inode that has no name one in lost+found.
    pub(super) fn reconnect(&mut self, ino: InodeNo) -> Result<(), PatchError> {
        let directory = self.lost_and_found()?;
        let name = format!("{:016x}", ino.0);
        self.enter(directory, name.as_bytes(), ino)
    }

    pub(super) fn list_orphan(&mut self, ino: InodeNo) -> Result<(), PatchError> {
        let directory = self.volume.geometry().orphan_directory(Slot(0));
        let name = format!("{:016x}", ino.0);
        self.enter(directory, name.as_bytes(), ino)
    }

    /// Enters a name, and lets the inode know it.
    fn enter(&self, directory: InodeNo, name: &[u8], ino: InodeNo) -> Result<(), PatchError> {
        let mut patch = self.patch();
        patch.near(directory.body());
        let target = target_of(&patch, ino)?;
        let mut parent = patch.inode(directory)?;
        let tree = self.dir_tree(directory);
        let body = InodeDisk::of_mut(&mut parent);
        let key = match tree.insert(&mut patch, &mut body.content, name, target)? {
            Inserted::Done(key) => key,
            _ => return Err(PatchError::Other("its place in the directory is taken")),
        };
        body.entries = U64::new(body.entries.get() + 1);
        body.blocks = U64::new(body.blocks.get().saturating_add_signed(patch.taken));
        if u32::from(target.kind) == libc::S_IFDIR >> 12 && directory_counts(self, directory) {
            body.nlink = U32::new(body.nlink.get() + 1);
        }
        patch.put_block(directory.body(), parent);
        let mut block = patch.inode(ino)?;
        let body = InodeDisk::of_mut(&mut block);
        body.parent = U64::new(directory.0);
        body.parent_key = U64::new(key);
        patch.put_block(ino.body(), block);
        patch.write_out()
    }

    fn lost_and_found(&self) -> Result<InodeNo, PatchError> {
        let root = self.volume.geometry().root();
        let mut patch = self.patch();
        let block = patch.inode(root)?;
        let tree = self.dir_tree(root);
        if let Some(found) = tree.lookup(&mut patch, &InodeDisk::of(&block).content, LOST_AND_FOUND)? {
            return match u32::from(found.target.kind) == libc::S_IFDIR >> 12 {
                true => Ok(found.target.ino),
                false => Err(PatchError::Other("/lost+found is not a directory; rename it")),
            };
        }
        let ino = patch.take_inode()?;
        let mut block = patch.inode(ino)?;
        let body = InodeDisk::of_mut(&mut block);
        if body.form() != Form::Free || body.header.lock.get() != lock_of_inode(ino).0 {
            return Err(PatchError::Other("an inode marked free is in use"));
        }
        body.generation = U32::new(body.generation.get().wrapping_add(1));
        self.make_directory(body, ino, 0o700)?;
        patch.put_block(ino.body(), block);
        patch.write_out()?;
        self.enter(root, LOST_AND_FOUND, ino)?;
        Ok(ino)
    }
}

/// Orphan directories don't count their directories as links.
fn directory_counts(one: &One<'_, '_>, directory: InodeNo) -> bool {
    let geometry = one.volume.geometry();
    directory == geometry.root() || !geometry.is_system_inode(directory)
}

fn target_of(patch: &Patch<'_, '_>, ino: InodeNo) -> Result<DirTarget, PatchError> {
    let block = patch.inode(ino)?;
    let body = InodeDisk::of(&block);
    Ok(DirTarget { ino, generation: body.generation.get(), kind: (body.mode.get() >> 12) as u8 })
}
