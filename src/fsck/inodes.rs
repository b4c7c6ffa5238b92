//! What a check remembers of inodes and directories: sixteen bytes an inode, forty-eight more a directory.

use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use crate::types::{BlockNo, InodeNo};

/// One inode.
#[derive(Clone, Copy, Default, Debug)]
pub struct Known {
    pub nlink: u32,
    /// Names found so far; the names of orphan directories don't count.
    pub names: u32,
    pub generation: u32,
    /// File type bits of the mode, shifted right by 12; 0: free.
    pub kind: u8,
    /// The body could be read.
    pub readable: bool,
    /// Has blocks, or may have: later rounds look at those alone.
    pub has_blocks: bool,
    /// An orphan directory lists it.
    pub orphan: bool,
}

const _: () = assert!(size_of::<Known>() == 16 && size_of::<Directory>() == 48);

impl Known {
    pub fn in_use(&self) -> bool {
        self.kind != 0
    }
    pub fn is_directory(&self) -> bool {
        u32::from(self.kind) == libc::S_IFDIR >> 12
    }
}

/// Number of an inode in the table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Index(u32);

/// One directory.
#[derive(Clone, Copy, Debug)]
pub struct Directory {
    pub index: Index,
    /// What its body says.
    pub parent: u64,
    pub parent_key: u64,
    /// The directory in which its name was found, and the name's key.
    pub found: Option<(Index, u64)>,
}

/// A list that grows by pieces: what it holds never moves, and no more is allocated than one piece beyond it.
struct Table<T> {
    pieces: Vec<Vec<T>>,
    len: usize,
}

const PIECE: usize = 4096;

impl<T> Default for Table<T> {
    fn default() -> Self {
        Table { pieces: Vec::new(), len: 0 }
    }
}

impl<T: Copy> Table<T> {
    fn push(&mut self, value: T) {
        if self.len.is_multiple_of(PIECE) {
            self.pieces.push(Vec::with_capacity(PIECE));
        }
        if let Some(piece) = self.pieces.last_mut() {
            piece.push(value);
            self.len += 1;
        }
    }

    fn get(&self, index: usize) -> Option<&T> {
        self.pieces.get(index / PIECE)?.get(index % PIECE)
    }

    fn get_mut(&mut self, index: usize) -> Option<&mut T> {
        self.pieces.get_mut(index / PIECE)?.get_mut(index % PIECE)
    }

    /// How many come before the first one that is not `below`.
    fn partition_point(&self, below: impl Fn(&T) -> bool) -> usize {
        let whole = self.pieces.partition_point(|piece| piece.last().is_some_and(&below));
        let rest = self.pieces.get(whole).map_or(0, |piece| piece.partition_point(below));
        whole * PIECE + rest
    }
}

/// All inodes of the volume, in the order of their addresses.
#[derive(Default)]
pub struct Inodes {
    /// First blocks of the groups, and which of their inodes the maps mark as used.
    groups: Table<(u64, u8)>,
    known: Table<Known>,
    directories: Table<Directory>,
}

impl Inodes {
    /// Groups come in ascending order.
    pub fn add_group(&mut self, first: BlockNo, used: u8) {
        self.groups.push((first.0, used));
        (0..GROUP_INODES).for_each(|_| self.known.push(Known::default()));
    }

    pub fn groups(&self) -> usize {
        self.groups.len
    }

    pub fn group(&self, number: usize) -> Option<(BlockNo, u8)> {
        self.groups.get(number).map(|(first, used)| (BlockNo(*first), *used))
    }

    /// Does a group share blocks with this run?
    pub fn group_within(&self, at: BlockNo, blocks: u64) -> bool {
        let next = self.groups.partition_point(|(first, _)| first + GROUP_BLOCKS <= at.0);
        self.groups.get(next).is_some_and(|(first, _)| *first < at.0 + blocks)
    }

    pub fn index_in(&self, group: usize, inode: u64) -> Index {
        Index((group as u64 * GROUP_INODES + inode) as u32)
    }

    /// Where the table has an inode, if one can be at this address.
    pub fn find(&self, ino: InodeNo) -> Option<Index> {
        let inode = (ino.0 % GROUP_BLOCKS).checked_sub(GROUP_INODES)?;
        let first = ino.0 - ino.0 % GROUP_BLOCKS;
        let group = self.groups.partition_point(|(at, _)| *at < first);
        self.groups.get(group).filter(|(at, _)| *at == first).map(|_| self.index_in(group, inode))
    }

    pub fn number(&self, index: Index) -> InodeNo {
        let group = self.groups.get((u64::from(index.0) / GROUP_INODES) as usize);
        InodeNo(group.map_or(0, |(first, _)| first + GROUP_INODES + u64::from(index.0) % GROUP_INODES))
    }

    pub fn get(&self, index: Index) -> Known {
        self.known.get(index.0 as usize).copied().unwrap_or_default()
    }

    pub fn set(&mut self, index: Index, known: Known) {
        if let Some(entry) = self.known.get_mut(index.0 as usize) {
            *entry = known;
        }
    }

    /// Is anything in this group whose blocks a later round must claim?
    pub fn group_has_blocks(&self, group: usize) -> bool {
        (0..GROUP_INODES).any(|inode| self.get(self.index_in(group, inode)).has_blocks)
    }

    pub fn all(&self) -> impl Iterator<Item = Index> + use<> {
        (0..self.known.len as u32).map(Index)
    }

    /// Directories come in ascending order, too.
    pub fn add_directory(&mut self, directory: Directory) {
        self.directories.push(directory);
    }

    pub fn directories(&self) -> usize {
        self.directories.len
    }

    pub fn directory(&self, number: usize) -> Option<Directory> {
        self.directories.get(number).copied()
    }

    pub fn find_directory(&self, index: Index) -> Option<usize> {
        let number = self.directories.partition_point(|d| d.index < index);
        self.directories.get(number).filter(|d| d.index == index).map(|_| number)
    }

    pub fn found_in(&mut self, number: usize, parent: Index, key: u64) {
        if let Some(directory) = self.directories.get_mut(number) {
            directory.found = Some((parent, key));
        }
    }

    /// The directory in which this one's name was found.
    fn parent_of(&self, number: usize) -> Option<usize> {
        let (parent, _) = self.directories.get(number)?.found?;
        self.find_directory(parent)
    }

    /// Directories that lie in each other: one of each loop, that with the lowest number.
    pub fn loops(&self) -> Vec<usize> {
        const UNKNOWN: u32 = 0;
        const ENDS: u32 = 1;
        let mut state = vec![UNKNOWN; self.directories.len];
        let mut found = Vec::new();
        for start in 0..self.directories.len {
            // Marks of this walk; greater than those of all before it.
            let mark = start as u32 + 2;
            let mut at = start;
            let ends = loop {
                match state[at] {
                    UNKNOWN => state[at] = mark,
                    seen if seen == mark => break false,
                    _ => break true,
                }
                let parent = self.parent_of(at);
                match parent {
                    Some(parent) if parent != at => at = parent,
                    Some(_) => break false,
                    None => break true,
                }
            };
            if !ends {
                let mut lowest = at;
                let mut next = at;
                while let Some(parent) = self.parent_of(next) {
                    lowest = lowest.min(parent);
                    next = parent;
                    if next == at {
                        break;
                    }
                }
                found.push(lowest);
            }
            let mut next = start;
            while state[next] == mark {
                state[next] = ENDS;
                match self.parent_of(next) {
                    Some(parent) => next = parent,
                    None => break,
                }
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_are_found_once_each() {
        let mut inodes = Inodes::default();
        for group in 0..2 {
            inodes.add_group(BlockNo(group * GROUP_BLOCKS), 0xff);
        }
        // 0 is the root; 1 in 0, 2 in 3, 3 in 4, 4 in 2, 5 in 4, 6 in itself, 7 nameless, 8 in 7.
        let parents = [None, Some(0), Some(3), Some(4), Some(2), Some(4), Some(6), None, Some(7)];
        for (i, parent) in parents.into_iter().enumerate() {
            inodes.add_directory(Directory {
                index: Index(i as u32),
                parent: 0,
                parent_key: 0,
                found: parent.map(|p| (Index(p), 0)),
            });
        }
        assert_eq!(inodes.loops(), [2, 6]);
        assert_eq!(inodes.find(InodeNo(16 + 8 + 3)), Some(Index(11)));
        assert_eq!(inodes.number(Index(11)), InodeNo(16 + 8 + 3));
        assert_eq!(inodes.find(InodeNo(16 + 7)), None);
    }
}
