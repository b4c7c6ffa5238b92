//! Is every block and inode of a volume owned exactly once? For a volume that nobody has mounted.
//!
//! The walk begins at the root and the orphan directories and ends at the clusters' maps: whatever a map says
//! is used must have been met once, and nothing else. Counts of headers, summaries, inodes and slots must
//! be the sums of what they count. Works on raw reads, without locks and caches, so that it can't share a
//! mistake with them.
//!
//! Not for: repair, or journals that hold something (left cleanly they hold nothing).

mod maps;
mod walk;

use std::collections::{BTreeMap, BTreeSet};

use crate::layout::Block;
use crate::layout::slot::SlotRecord;
use crate::layout::superblock::Superblock;
use crate::types::{BlockNo, InodeNo};

/// Where blocks come from; an error is a problem of the volume.
pub type ReadBlock<'a> = &'a dyn Fn(BlockNo) -> Result<Box<Block>, String>;

/// What a volume consists of, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    pub problems: Vec<String>,
    pub directories: u64,
    pub files: u64,
    pub links: u64,
    /// Inodes in orphan directories.
    pub orphans: u64,
    /// Blocks that maps say are used, inode groups included, clusters' own blocks not.
    pub used_blocks: u64,
    pub used_inodes: u64,
}

/// One audit under way.
struct Auditor<'a> {
    superblock: &'a Superblock,
    read: ReadBlock<'a>,
    audit: Audit,
    /// Who was met to own a block.
    owners: BTreeMap<BlockNo, String>,
    /// Inodes that the maps say are used, and free ones of groups.
    used: BTreeSet<InodeNo>,
    free: BTreeSet<InodeNo>,
    /// Inodes met under a name: how many names.
    met: BTreeMap<InodeNo, u32>,
}

/// Looks at everything.
pub fn audit(superblock: &Superblock, read: ReadBlock<'_>) -> Audit {
    let mut auditor = Auditor {
        superblock,
        read,
        audit: Audit::default(),
        owners: BTreeMap::new(),
        used: BTreeSet::new(),
        free: BTreeSet::new(),
        met: BTreeMap::new(),
    };
    let maps = auditor.read_maps();
    auditor.walk_all();
    auditor.compare(&maps);
    auditor.sums();
    auditor.audit
}

impl Auditor<'_> {
    fn problem(&mut self, text: String) {
        // A shifted map would give thousands.
        if self.audit.problems.len() < 40 {
            self.audit.problems.push(text);
        }
    }

    fn block(&mut self, at: BlockNo) -> Option<Box<Block>> {
        match (self.read)(at) {
            Ok(block) => Some(block),
            Err(e) => {
                self.problem(format!("block {at}: {e}"));
                None
            }
        }
    }

    fn claim(&mut self, at: BlockNo, owner: &str) {
        if let Some(other) = self.owners.insert(at, owner.to_owned()) {
            self.problem(format!("block {at} belongs to {other} and to {owner}"));
        }
    }

    /// What the slots say was allocated since mkfs is what is allocated.
    fn sums(&mut self) {
        let geometry = self.superblock.geometry;
        let (mut blocks, mut inodes) = (0, 0);
        for slot in geometry.all_slots() {
            let at = geometry.slot(slot);
            let Some(block) = self.block(at) else { continue };
            match SlotRecord::decode(&block[..], self.superblock.volume, at) {
                Ok(record) => {
                    blocks += record.net_blocks;
                    inodes += record.net_inodes;
                }
                Err(e) => self.problem(e.to_string()),
            }
        }
        let (used_blocks, used_inodes) = (self.audit.used_blocks as i64, self.audit.used_inodes as i64);
        if blocks != used_blocks {
            self.problem(format!("the slots count {blocks} blocks, the maps {used_blocks}"));
        }
        if inodes != used_inodes {
            self.problem(format!("the slots count {inodes} inodes, the maps {used_inodes}"));
        }
    }
}
