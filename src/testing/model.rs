//! The same random operations on the real filesystem and on the one in memory, answer by answer.
//!
//! One operation at a time, each through whatever host the caller chose: what one host acknowledged every
//! other sees. Inode numbers differ, so a table maps them.
//!
//! Invariants: an operation that the real filesystem refused for want of space is not done in memory; an
//! inode without a name and without an open handle is not used any more (when it is freed is nobody's
//! promise).
//!
//! Not for: operations that run at once, times, or where blocks lie.

pub mod compare;
mod steps;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::cluster::cx;
use super::memfs::MemFs;
use crate::fs::api::{Attributes, FileHandle, FsError, FsResult, Operations};
use crate::rt::sim::{SimRng, on_failure};
use crate::types::InodeNo;

/// An inode in both worlds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Node {
    real: InodeNo,
    mem: InodeNo,
}

/// A file that a host has open.
#[derive(Clone, Copy)]
struct Open {
    host: usize,
    node: Node,
    real: FileHandle,
    mem: FileHandle,
    directory: bool,
}

/// Both filesystems and what is known of them.
pub struct Model {
    mem: MemFs,
    rng: SimRng,
    root: Node,
    /// By their number in memory.
    nodes: BTreeMap<InodeNo, Node>,
    opens: Vec<Open>,
    log: Arc<Mutex<Vec<String>>>,
    /// Operations done, and those that the real filesystem had no space for.
    pub done: u64,
    pub no_space: u64,
}

/// The longest write; a volume of some ten MiB stands a few of them.
const LONGEST: u64 = 200_000;
/// Directories and files beyond this are removed rather than made.
const MOST_NODES: usize = 60;
/// Operations printed by a failure.
const LOG: usize = 40;

fn lock(log: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Model {
    pub fn new(seed: u64, root: InodeNo) -> Self {
        let mem = MemFs::new();
        let root = Node { real: root, mem: mem.root() };
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let shown = log.clone();
        on_failure(
            "last operations of the model",
            Box::new(move || format!("  {}\n", lock(&shown).join("\n  "))),
        );
        Model {
            rng: SimRng::new(seed, 5),
            nodes: BTreeMap::from([(root.mem, root)]),
            root,
            mem,
            opens: Vec::new(),
            log,
            done: 0,
            no_space: 0,
        }
    }

    fn note(&mut self, text: String) {
        let mut log = lock(&self.log);
        if log.len() == LOG {
            log.remove(0);
        }
        log.push(text);
    }

    fn fail(&self, what: &str) -> ! {
        panic!("after {} operations: {what}", self.done);
    }

    /// Both worlds must agree: the same success or the same error. `None`: both failed, or there was no space.
    fn agree<A, B>(&mut self, real: FsResult<A>, mem: impl FnOnce(&MemFs) -> FsResult<B>) -> Option<(A, B)> {
        if let Err(FsError::NoSpace) = real {
            self.no_space += 1;
            return None;
        }
        match (real, mem(&self.mem)) {
            (Ok(a), Ok(b)) => Some((a, b)),
            (Err(a), Err(b)) if a.errno() == b.errno() => None,
            (Ok(_), Err(b)) => self.fail(&format!("the volume did what should fail with: {b}")),
            (Err(a), Ok(_)) => self.fail(&format!("the volume failed with: {a}")),
            (Err(a), Err(b)) => self.fail(&format!("the volume failed with \"{a}\", expected \"{b}\"")),
        }
    }

    /// A new inode; its number may have belonged to another one before.
    fn learn(&mut self, real: &Attributes, mem: &Attributes) -> Node {
        self.nodes.retain(|_, n| n.real != real.ino);
        let node = Node { real: real.ino, mem: mem.ino };
        self.nodes.insert(mem.ino, node);
        node
    }

    /// Inodes that still have a name or are open, of the wanted kind.
    fn living(&mut self, wanted: impl Fn(u32) -> bool) -> Vec<Node> {
        let mem = &self.mem;
        self.nodes.retain(|_, n| mem.getattr(&cx(), n.mem).is_ok());
        self.nodes
            .values()
            .filter(|n| mem.getattr(&cx(), n.mem).is_ok_and(|a| wanted(a.value.mode & libc::S_IFMT)))
            .copied()
            .collect()
    }

    fn pick(&mut self, wanted: impl Fn(u32) -> bool) -> Option<Node> {
        let all = self.living(wanted);
        (!all.is_empty()).then(|| all[self.rng.index(all.len())])
    }

    fn directory(&mut self) -> Node {
        let root = self.root;
        self.pick(|kind| kind == libc::S_IFDIR).unwrap_or(root)
    }

    fn file(&mut self) -> Option<Node> {
        self.pick(|kind| kind == libc::S_IFREG)
    }

    /// A name out of few, so that operations meet; some so long that a directory soon needs blocks.
    fn name(&mut self) -> Vec<u8> {
        let number = self.rng.below(24);
        match number % 3 {
            0 => format!("n{number}").into_bytes(),
            1 => format!("name-of-some-length-{number:04}").into_bytes(),
            _ => format!("{number:0>200}").into_bytes(),
        }
    }

    /// A name that is there, mostly.
    fn name_in(&mut self, dir: Node) -> Vec<u8> {
        if self.rng.chance(0.2) {
            return self.name();
        }
        let listed =
            self.mem.readdir(&cx(), dir.mem, 2, usize::MAX, false).map(|a| a.value).unwrap_or_default();
        if listed.is_empty() {
            return self.name();
        }
        listed[self.rng.index(listed.len())].name.clone()
    }

    /// A length: often around the edges where the form of a file changes.
    fn length(&mut self) -> u64 {
        let edges = [1, 100, 3839, 3840, 3841, 4095, 4096, 4097, 8192, 12_288, 40_000];
        match self.rng.below(4) {
            0 => self.rng.below(LONGEST),
            1 => self.rng.below(5000),
            _ => edges[self.rng.index(edges.len())],
        }
    }

    fn offset(&mut self) -> u64 {
        match self.rng.below(5) {
            0 => 0,
            1 => self.rng.below(40) * 4096,
            _ => self.length(),
        }
    }

    fn data(&mut self, len: u64) -> Vec<u8> {
        let first = self.rng.below(256) as u8;
        (0..len).map(|i| first.wrapping_add((i / 7) as u8) | 1).collect()
    }

    /// Closes everything that is open, through the hosts that opened it.
    pub fn close_all(&mut self, mut on: impl FnMut(usize, &dyn Fn(&dyn Operations))) {
        for open in std::mem::take(&mut self.opens) {
            on(open.host, &|fs| self.close(fs, &open));
        }
    }

    fn close(&self, fs: &dyn Operations, open: &Open) {
        if open.directory {
            fs.releasedir(open.node.real, open.real);
            self.mem.releasedir(open.node.mem, open.mem);
        } else {
            fs.release(open.node.real, open.real);
            self.mem.release(open.node.mem, open.mem);
        }
    }
}
