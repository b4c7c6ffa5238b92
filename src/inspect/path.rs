//! Paths of inodes, for people: from an inode up to the root by the parent pointers.
//!
//! Read without locks from places that may be older than what hosts see, so a path is a hint: it can be
//! out of date, and a part that can't be read is written as the inode number in angle brackets.
//! Bounded: no more than [`DEPTH_MAX`] steps, and never through one inode twice.

use std::collections::HashMap;
use std::sync::Arc;

use super::names::printable;
use super::{InspectError, Volume};
use crate::fs::dirtree::DirTree;
use crate::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use crate::layout::inode::{Form, InodeDisk};
use crate::layout::{Block, Magic, verify};
use crate::tree::NodeRead;
use crate::types::{BlockNo, InodeNo};

/// Deeper trees are shown by their lower end only.
const DEPTH_MAX: usize = 128;
/// Directories whose paths are remembered during a scan.
const REMEMBERED_MAX: usize = 65_536;

/// Finds paths, and remembers those of directories.
pub struct Paths<'v, 'd> {
    volume: &'v Volume<'d>,
    known: HashMap<InodeNo, String>,
}

impl<'v, 'd> Paths<'v, 'd> {
    pub fn new(volume: &'v Volume<'d>) -> Self {
        Paths { volume, known: HashMap::new() }
    }

    /// The path of an inode; None if its body can't be read or is free.
    pub fn of(&mut self, ino: InodeNo) -> Option<String> {
        let mut below: Vec<String> = Vec::new();
        let mut seen: Vec<InodeNo> = Vec::new();
        let mut at = ino;
        let top = loop {
            if let Some(top) = self.fixed(at).or_else(|| self.known.get(&at).cloned()) {
                break top;
            }
            if seen.contains(&at) || seen.len() == DEPTH_MAX || !possible_inode(self.volume, at) {
                break format!("<{at}>");
            }
            seen.push(at);
            let Ok(block) = self.volume.inode(at) else {
                if at == ino {
                    return None;
                }
                break format!("<{at}>");
            };
            let body = InodeDisk::of(&block);
            if body.form() == Form::Free {
                if at == ino {
                    return None;
                }
                break format!("<{at}>");
            }
            let parent = InodeNo(body.parent.get());
            let name = name_in_parent(self.volume, parent, body.parent_key.get(), at).unwrap_or(None);
            below.push(name.unwrap_or_else(|| format!("<{at}>")));
            at = parent;
        };
        let mut path = if top == "/" { String::new() } else { top };
        for name in below.iter().rev() {
            path.push('/');
            path.push_str(name);
        }
        if path.is_empty() {
            path.push('/');
        }
        if let [_, parent, ..] = seen[..]
            && let Some((directory, _)) = path.rsplit_once('/')
            && !directory.is_empty()
        {
            if self.known.len() >= REMEMBERED_MAX {
                self.known.clear();
            }
            self.known.insert(parent, directory.to_owned());
        }
        Some(path)
    }

    /// Inodes whose place follows from the geometry.
    fn fixed(&self, ino: InodeNo) -> Option<String> {
        let geometry = self.volume.geometry();
        if ino == geometry.root() {
            return Some("/".into());
        }
        let slot = geometry.all_slots().find(|slot| geometry.orphan_directory(*slot) == ino)?;
        Some(format!("<orphans of slot {slot}>"))
    }
}

/// Can an inode body stand at this address? Arithmetic only; what stands there is checked when read.
pub fn possible_inode(volume: &Volume<'_>, ino: InodeNo) -> bool {
    let geometry = volume.geometry();
    if geometry.is_system_inode(ino) {
        return true;
    }
    let Some(index) = geometry.cluster_of(ino.body()) else { return false };
    let offset = ino.0 - geometry.cluster(index).0;
    offset >= geometry.cluster_overhead(index) && offset % GROUP_BLOCKS >= GROUP_INODES
}

/// Can a lock of an inode stand at this address?
pub fn possible_inode_lock(volume: &Volume<'_>, lock: BlockNo) -> bool {
    lock.0.checked_add(GROUP_INODES).is_some_and(|body| possible_inode(volume, InodeNo(body)))
}

/// The name of `child` under `key` in the directory `parent`; None if there is none or another's.
fn name_in_parent(
    volume: &Volume<'_>,
    parent: InodeNo,
    key: u64,
    child: InodeNo,
) -> Result<Option<String>, InspectError> {
    if parent.0 == 0 || !possible_inode(volume, parent) {
        return Ok(None);
    }
    let block = volume.inode(parent)?;
    let body = InodeDisk::of(&block);
    if body.form() != Form::Tree || body.mode.get() & libc::S_IFMT != libc::S_IFDIR {
        return Ok(None);
    }
    let tree = DirTree::new(volume.id(), parent, volume.superblock.hash_seed);
    let found = tree.by_key(&mut Nodes(volume), &body.content, key)?;
    Ok(found
        .filter(|(target, _)| target.ino == child)
        .map(|(_, name)| printable(&String::from_utf8_lossy(&name))))
}

/// Nodes of a directory's tree straight from the disk.
struct Nodes<'v, 'd>(&'v Volume<'d>);

impl NodeRead for Nodes<'_, '_> {
    type Error = InspectError;

    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, InspectError> {
        self.0.read_checked(at, |block| {
            verify(&block[..], Magic::TreeNode, self.0.id(), at)?;
            Ok(Arc::new(*block))
        })
    }
}
