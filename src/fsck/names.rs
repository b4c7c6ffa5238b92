//! The fourth pass: directories, their entries, and what the entries name.

use super::finding::{Finding, Kind, Place};
use super::inodes::{Directory, Index, Known};
use super::view::{BadNode, Nodes};
use super::{Checker, FsckError};
use crate::fs::dirtree::{DirTarget, DirTree};
use crate::inspect::names::printable;
use crate::layout::inode::InodeDisk;
use crate::tree::TreeVisitor;
use crate::types::{BlockNo, InodeNo};

const PASS: &str = "directories";
/// Bodies of directories under way, where it is read ahead.
const DIRECTORIES_AHEAD: usize = 256;

/// A directory as a walk meets its entries.
struct Entries<'a, 'c, 'v, 'd> {
    checker: &'a mut Checker<'c, 'v, 'd>,
    directory: Directory,
    ino: InodeNo,
    tree: DirTree,
    /// Names of orphans are numbers and give no link.
    orphans: bool,
    nodes: u64,
    entries: u64,
    subdirectories: u32,
    /// Names of this hash.
    hash: u64,
    names: Vec<Vec<u8>>,
    damaged: bool,
}

impl TreeVisitor<BadNode> for Entries<'_, '_, '_, '_> {
    fn node(&mut self, at: BlockNo, _: u8) {
        self.nodes += 1;
        self.checker.claim(self.ino, at, 1);
        if self.checker.first_round {
            self.checker.at.done = self.checker.report.links.min(self.checker.at.of);
        }
        self.checker.tick();
    }

    fn entry(&mut self, key: u64, value: &[u8]) {
        if self.checker.first_round && !self.checker.cancelled {
            self.entries += 1;
            self.look_at(key, value);
        }
    }

    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, error: BadNode) {
        self.damaged = true;
        self.checker.names_unknown = true;
        self.checker.damaged_node(self.ino, at, lo, hi, &error);
    }
}

impl Entries<'_, '_, '_, '_> {
    fn find(&mut self, kind: Kind, key: u64, target: InodeNo, text: String) {
        let place = Place::Entry { directory: self.ino.0, key, inode: target.0 };
        self.checker.find(kind, place, text);
    }

    fn look_at(&mut self, key: u64, value: &[u8]) {
        let item = match self.tree.parse(key, value) {
            Ok(item) => item,
            Err(e) => {
                self.checker.names_unknown = true;
                return self.find(Kind::Entry, key, InodeNo(0), e.to_string());
            }
        };
        let shown = printable(&String::from_utf8_lossy(item.name));
        if !self.tree.key_fits(&item) {
            let text = format!("\"{shown}\" can't be found by its name");
            self.find(Kind::EntryPlace, key, item.target.ino, text);
        } else {
            if self.hash != self.tree.first_key(item.name) {
                self.hash = self.tree.first_key(item.name);
                self.names.clear();
            }
            if self.names.iter().any(|name| name == item.name) {
                let text = format!("the name \"{shown}\" is there twice");
                return self.find(Kind::EntryTwice, key, item.target.ino, text);
            } else {
                self.names.push(item.name.to_vec());
            }
        }
        self.target(key, &shown, item.target);
    }

    /// Does what the entry names exist, and is it what the entry says?
    fn target(&mut self, key: u64, shown: &str, target: DirTarget) {
        let ino = target.ino;
        let directory_entry = u32::from(target.kind) == libc::S_IFDIR >> 12;
        let known = self.checker.inodes.find(ino).map(|index| (index, self.checker.inodes.get(index)));
        let (index, known) = match known {
            Some((index, known)) if known.in_use() && !self.checker.geometry.is_system_inode(ino) => {
                (index, known)
            }
            _ if !self.checker.can_be_judged(ino) => return,
            _ => {
                // It counts as what it was, so that this is one finding.
                self.subdirectories += u32::from(directory_entry);
                let text = format!("\"{shown}\" names inode {ino}, which is not in use");
                return self.find(Kind::EntryDangling, key, ino, text);
            }
        };
        self.checker.report.links += 1;
        if !known.readable {
            self.subdirectories += u32::from(directory_entry);
            return self.named(index, known);
        }
        self.subdirectories += u32::from(known.is_directory());
        if known.generation != target.generation || known.kind != target.kind {
            let text = format!(
                "\"{shown}\" names generation {} and type {:o} of inode {ino}, which has {} and {:o}",
                target.generation, target.kind, known.generation, known.kind
            );
            self.find(Kind::EntryTarget, key, ino, text);
        }
        if self.orphans {
            self.checker.report.orphans += 1;
            if known.nlink > 0 {
                let text = format!("inode {ino} has {} links", known.nlink);
                self.find(Kind::OrphanLinked, key, ino, text);
            }
        }
        self.named(index, known);
        if known.is_directory() {
            self.subdirectory(index, key, shown);
        }
    }

    fn named(&mut self, index: Index, mut known: Known) {
        match self.orphans {
            true => known.orphan |= known.nlink == 0,
            false => known.names = known.names.saturating_add(1),
        }
        self.checker.inodes.set(index, known);
    }

    /// A directory's one name, and what the directory says of it.
    fn subdirectory(&mut self, index: Index, key: u64, shown: &str) {
        let Some(number) = self.checker.inodes.find_directory(index) else { return };
        let Some(child) = self.checker.inodes.directory(number) else { return };
        let ino = self.checker.inodes.number(index);
        if child.found.is_some() {
            let text = format!("\"{shown}\" is a second name of directory {ino}");
            return self.find(Kind::DirectoryTwice, key, ino, text);
        }
        self.checker.inodes.found_in(number, self.directory.index, key);
        if child.parent != self.ino.0 || child.parent_key != key {
            let text = format!(
                "\"{shown}\" is directory {ino}, which says that it has key {:#x} in {:#x}",
                child.parent_key, child.parent
            );
            self.find(Kind::DirectoryParent, key, ino, text);
        }
    }
}

impl Checker<'_, '_, '_> {
    /// How far it is is measured in names, of which there are about as many as inodes: directories differ too much.
    pub(super) fn names(&mut self) -> Result<(), FsckError> {
        let directories = self.inodes.directories();
        let mut wanted_to = 0;
        for number in 0..directories {
            let (done, of) = match self.first_round {
                true => (self.report.links.min(self.report.used_inodes), self.report.used_inodes),
                false => (number as u64, directories as u64),
            };
            self.progress(PASS, done, of)?;
            wanted_to = wanted_to.max(number + 1);
            while wanted_to < number + DIRECTORIES_AHEAD
                && let Some(directory) = self.inodes.directory(wanted_to)
                && (!self.looks_at(&directory)
                    || self.view.will_read(self.inodes.number(directory.index).body(), 1))
            {
                wanted_to += 1;
            }
            if let Some(directory) = self.inodes.directory(number)
                && self.looks_at(&directory)
            {
                self.directory(directory);
            }
        }
        self.view.forget_ahead();
        self.progress(PASS, 1, 1)
    }

    /// Later rounds only want blocks.
    fn looks_at(&self, directory: &Directory) -> bool {
        self.first_round || self.inodes.get(directory.index).has_blocks
    }

    fn directory(&mut self, directory: Directory) {
        let ino = self.inodes.number(directory.index);
        // It was good a moment ago; a device that changed its mind is a device error.
        let Ok(block) = self.view.block(ino.body()) else { return };
        let Ok(body) = InodeDisk::parse(&block, self.volume, ino) else { return };
        let tree = DirTree::new(self.volume, ino, self.superblock.hash_seed);
        let view = self.view;
        let orphans = self.geometry.is_system_inode(ino) && ino != self.geometry.root();
        let mut found = Entries {
            checker: self,
            directory,
            ino,
            tree,
            orphans,
            nodes: 0,
            entries: 0,
            subdirectories: 0,
            hash: 0,
            names: Vec::new(),
            damaged: false,
        };
        tree.tree().walk(&mut Nodes(view), &body.content, &mut found);
        let Entries { nodes, entries, subdirectories, damaged, .. } = found;
        if !self.first_round {
            return;
        }
        self.report.directories += 1;
        let place = Place::of_inode(ino);
        if damaged {
            return;
        }
        if body.entries.get() != entries {
            let text = format!("counts {} entries, has {entries}", body.entries.get());
            self.found(Finding::new(Kind::DirectoryEntries, place, text).should_be(entries));
        }
        if body.blocks.get() != nodes {
            let text = format!("counts {} blocks, has {nodes}", body.blocks.get());
            self.found(Finding::new(Kind::InodeBlocks, place, text).should_be(nodes));
        }
        let removed = body.nlink.get() == 0 && subdirectories == 0;
        if body.nlink.get() != 2 + subdirectories && !orphans && !removed {
            let text = format!("link count {}, {subdirectories} subdirectories", body.nlink.get());
            let right = u64::from(2 + subdirectories);
            self.found(Finding::new(Kind::Links, place, text).should_be(right));
        }
    }
}
