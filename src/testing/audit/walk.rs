//! The names' side of the audit: directories, inodes, extents.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::Auditor;
use crate::fs::dirtree::{DirTarget, DirTree};
use crate::fs::extents::{Extent, ExtentTree};
use crate::layout::inode::{Form, InodeDisk};
use crate::layout::{Block, Magic, verify};
use crate::tree::{NodeRead, Tree, TreeError, TreeVisitor};
use crate::types::{BlockNo, InodeNo, VolumeId};

/// Nodes from raw reads.
struct RawNodes<'a> {
    read: super::ReadBlock<'a>,
    volume: VolumeId,
}

/// Why a node can't be read.
struct Bad(String);

impl From<TreeError> for Bad {
    fn from(e: TreeError) -> Self {
        Bad(e.to_string())
    }
}

impl NodeRead for RawNodes<'_> {
    type Error = Bad;
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, Bad> {
        let block = (self.read)(at).map_err(Bad)?;
        verify(&block[..], Magic::TreeNode, self.volume, at).map_err(|e| Bad(e.to_string()))?;
        Ok(Arc::from(block))
    }
}

#[derive(Default)]
struct Collected {
    nodes: Vec<BlockNo>,
    entries: Vec<(u64, Vec<u8>)>,
    damage: Vec<String>,
}

impl TreeVisitor<Bad> for Collected {
    fn node(&mut self, at: BlockNo, _: u8) {
        self.nodes.push(at);
    }
    fn entry(&mut self, key: u64, value: &[u8]) {
        self.entries.push((key, value.to_vec()));
    }
    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, error: Bad) {
        self.damage.push(format!("tree node {at}, keys {lo:#x} to {hi:#x}: {}", error.0));
    }
}

/// A directory to look at, and where it must say that it is.
struct Todo {
    ino: InodeNo,
    parent: InodeNo,
    orphans: bool,
}

impl Auditor<'_> {
    pub(super) fn walk_all(&mut self) {
        let geometry = self.superblock.geometry;
        let root = geometry.root();
        let mut todo = vec![Todo { ino: root, parent: root, orphans: false }];
        for slot in geometry.all_slots() {
            let ino = geometry.orphan_directory(slot);
            todo.push(Todo { ino, parent: ino, orphans: true });
        }
        let mut seen = BTreeSet::new();
        while let Some(next) = todo.pop() {
            if !seen.insert(next.ino) {
                self.problem(format!("directory {} has two names", next.ino));
                continue;
            }
            self.walk_directory(&next, &mut todo);
        }
        self.check_links();
    }

    fn body(&mut self, ino: InodeNo) -> Option<Box<InodeDisk>> {
        let block = self.block(ino.body())?;
        match InodeDisk::parse(&block, self.superblock.volume, ino) {
            Ok(body) => Some(Box::new(*body)),
            Err(e) => {
                self.problem(e.to_string());
                None
            }
        }
    }

    fn tree(&mut self, tree: &Tree, body: &InodeDisk) -> Collected {
        let mut nodes = RawNodes { read: self.read, volume: self.superblock.volume };
        let mut found = Collected::default();
        tree.walk(&mut nodes, &body.content, &mut found);
        for damage in std::mem::take(&mut found.damage) {
            self.problem(format!("inode {}: {damage}", tree.owner));
        }
        for at in &found.nodes {
            self.claim(*at, &format!("the tree of inode {}", tree.owner));
        }
        found
    }

    fn walk_directory(&mut self, this: &Todo, todo: &mut Vec<Todo>) {
        let ino = this.ino;
        let Some(body) = self.body(ino) else { return };
        self.audit.directories += 1;
        let dir = DirTree::new(self.superblock.volume, ino, self.superblock.hash_seed);
        let found = self.tree(dir.tree(), &body);
        let mut names = BTreeSet::new();
        let mut subdirectories = 0;
        for (key, value) in &found.entries {
            let item = match dir.parse(*key, value) {
                Ok(item) => item,
                Err(e) => {
                    self.problem(e.to_string());
                    continue;
                }
            };
            let shown = String::from_utf8_lossy(item.name).into_owned();
            if !names.insert(item.name.to_vec()) {
                self.problem(format!("directory {ino} has the name \"{shown}\" twice"));
            }
            if !dir.key_fits(&item) {
                self.problem(format!("directory {ino}: \"{shown}\" is in the wrong place"));
            }
            subdirectories += self.walk_entry(this, &shown, item.target, *key, todo);
        }
        for (what, says, is) in [
            ("entries", body.entries.get(), found.entries.len() as u64),
            ("blocks", body.blocks.get(), found.nodes.len() as u64),
        ] {
            if says != is {
                self.problem(format!("directory {ino}: its inode counts {says} {what}, there are {is}"));
            }
        }
        if body.nlink.get() != 2 + subdirectories && !this.orphans {
            self.problem(format!(
                "directory {ino} has link count {} and {subdirectories} subdirectories",
                body.nlink.get()
            ));
        }
        if BlockNo(body.parent.get()) != this.parent.body()
            && ino != self.superblock.geometry.root()
            && !this.orphans
        {
            self.problem(format!("directory {ino} lies in {}, says {:#x}", this.parent, body.parent.get()));
        }
    }

    /// One name. 1 if it is a directory's.
    fn walk_entry(
        &mut self,
        this: &Todo,
        name: &str,
        target: DirTarget,
        key: u64,
        todo: &mut Vec<Todo>,
    ) -> u32 {
        let (dir, ino) = (this.ino, target.ino);
        if !self.used.contains(&ino) {
            self.problem(format!("\"{name}\" in {dir} names inode {ino}, which is not in use"));
            return 0;
        }
        let Some(body) = self.body(ino) else { return 0 };
        if body.generation.get() != target.generation {
            self.problem(format!("\"{name}\" in {dir} names another generation of inode {ino}"));
        }
        if (body.mode.get() >> 12) as u8 != target.kind {
            self.problem(format!(
                "\"{name}\" in {dir} is of kind {}, mode {:o}",
                target.kind,
                body.mode.get()
            ));
        }
        self.audit.orphans += u64::from(this.orphans);
        if this.orphans != (body.nlink.get() == 0) {
            self.problem(format!("inode {ino} (\"{name}\" in {dir}) has {} links", body.nlink.get()));
        }
        let is_directory = body.mode.get() & libc::S_IFMT == libc::S_IFDIR;
        let names = self.met.entry(ino).or_default();
        *names += 1;
        if *names == 1 && !is_directory {
            self.walk_file(ino, &body);
        }
        if is_directory {
            if body.parent_key.get() != key {
                self.problem(format!("directory {ino} (\"{name}\" in {dir}) does not know its name's key"));
            }
            todo.push(Todo { ino, parent: dir, orphans: this.orphans });
        }
        u32::from(is_directory)
    }

    fn walk_file(&mut self, ino: InodeNo, body: &InodeDisk) {
        self.audit.files += 1;
        if body.form() != Form::Tree {
            if body.blocks.get() != 0 {
                self.problem(format!("inode {ino} has no tree and counts {} blocks", body.blocks.get()));
            }
            return;
        }
        let geometry = self.superblock.geometry;
        let extents = ExtentTree::new(self.superblock.volume, ino, geometry.size_blocks);
        let found = self.tree(extents.tree(), body);
        let mut blocks = found.nodes.len() as u64;
        let mut end = 0;
        for (key, value) in &found.entries {
            let extent: Extent = match extents.parse(*key, value) {
                Ok(extent) => extent,
                Err(e) => {
                    self.problem(e.to_string());
                    continue;
                }
            };
            if extent.logical < end {
                self.problem(format!("inode {ino}: extents overlap at logical block {}", extent.logical));
            }
            end = extent.end();
            blocks += extent.blocks;
            for i in 0..extent.blocks {
                self.claim(extent.physical.plus(i), &format!("inode {ino}"));
            }
        }
        if blocks != body.blocks.get() {
            self.problem(format!("inode {ino} counts {} blocks, it has {blocks}", body.blocks.get()));
        }
    }

    fn check_links(&mut self) {
        for (ino, names) in self.met.clone() {
            self.audit.links += u64::from(names);
            let Some(body) = self.body(ino) else { continue };
            let is_directory = body.mode.get() & libc::S_IFMT == libc::S_IFDIR;
            if !is_directory && body.nlink.get() != names && body.nlink.get() != 0 {
                self.problem(format!("inode {ino} has {names} names and link count {}", body.nlink.get()));
            }
        }
    }
}
