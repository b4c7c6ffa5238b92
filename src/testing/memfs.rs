//! A filesystem in memory behind the same trait as the real one: a reference model.
//!
//! One mutex, ordinary maps, no cleverness: what it answers is what the real filesystem is to answer.
//! Beyond that it has strings to pull (`Knobs`): make operations on an inode wait as if another host held
//! its lock, change files behind the kernel's back as another host would, count calls, and answer with or
//! without validity.
//!
//! Not modelled: permissions (the kernel checks them, `default_permissions`), durability, space limits.

mod node;
mod operations;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::fs::api::{Answer, FsError, FsResult, Hold, OpContext, Timestamp};
use crate::types::InodeNo;
use node::{Body, Node};

/// The root's number; on purpose not the kernel's 1.
const ROOT: u64 = 0x1000;
/// How long answers may be cached while validity is on.
const LONG: Duration = Duration::from_secs(3600);

pub struct MemFs {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    nodes: BTreeMap<u64, Node>,
    next_ino: u64,
    next_handle: u64,
    handles: BTreeMap<u64, u64>,
    knobs: Knobs,
    calls: BTreeMap<&'static str, u64>,
}

/// The strings.
struct Knobs {
    /// Operations on these inodes wait.
    blocked: BTreeSet<u64>,
    /// How many wait right now.
    waiting: u64,
    /// How often an operation refused to wait on the thread that asked.
    refusals: u64,
    valid_for: Duration,
    /// Answers whose hold was not dropped yet.
    held: Arc<AtomicU64>,
}

/// Stands for a lock in use.
struct CountedHold(Arc<AtomicU64>);

impl Hold for CountedHold {}

impl Drop for CountedHold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Default for MemFs {
    fn default() -> Self {
        Self::new()
    }
}

impl MemFs {
    pub fn new() -> MemFs {
        let root = Node::new(ROOT, libc::S_IFDIR | 0o755, 0, 0, 0, ROOT);
        MemFs {
            state: Mutex::new(State {
                nodes: BTreeMap::from([(ROOT, root)]),
                next_ino: ROOT + 1,
                next_handle: 1,
                handles: BTreeMap::new(),
                knobs: Knobs {
                    blocked: BTreeSet::new(),
                    waiting: 0,
                    refusals: 0,
                    valid_for: LONG,
                    held: Arc::default(),
                },
                calls: BTreeMap::new(),
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters an operation on these inodes: waits while one is blocked, if the context allows.
    fn enter(
        &self,
        cx: &OpContext,
        call: &'static str,
        inodes: &[InodeNo],
    ) -> FsResult<MutexGuard<'_, State>> {
        let mut state = self.lock();
        let is_blocked = |state: &State| inodes.iter().any(|i| state.knobs.blocked.contains(&i.0));
        if is_blocked(&state) && !cx.may_wait {
            state.knobs.refusals += 1;
            return Err(FsError::WouldWait);
        }
        while is_blocked(&state) {
            let interrupted = cx.interrupt.as_ref();
            if interrupted.is_some_and(|flag| flag.load(Ordering::Acquire)) {
                return Err(FsError::Interrupted);
            }
            state.knobs.waiting += 1;
            let waited = self.changed.wait_timeout(state, Duration::from_millis(20));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.knobs.waiting -= 1;
        }
        *state.calls.entry(call).or_insert(0) += 1;
        Ok(state)
    }

    /// Operations on the inode wait from now on, or no longer.
    pub fn set_blocked(&self, ino: InodeNo, blocked: bool) {
        let mut state = self.lock();
        if blocked {
            state.knobs.blocked.insert(ino.0);
        } else {
            state.knobs.blocked.remove(&ino.0);
        }
        self.changed.notify_all();
    }

    /// Answers are cacheable, or not.
    pub fn set_cacheable(&self, cacheable: bool) {
        self.lock().knobs.valid_for = if cacheable { LONG } else { Duration::ZERO };
    }

    /// (waiting now, refusals to wait so far)
    pub fn waits(&self) -> (u64, u64) {
        let state = self.lock();
        (state.knobs.waiting, state.knobs.refusals)
    }

    /// Answers whose hold still lives.
    pub fn held(&self) -> u64 {
        self.lock().knobs.held.load(Ordering::Acquire)
    }

    /// How often each operation was called.
    pub fn calls(&self) -> BTreeMap<&'static str, u64> {
        self.lock().calls.clone()
    }

    /// The inode at a path, names separated by slashes.
    pub fn find(&self, path: &str) -> FsResult<InodeNo> {
        let state = self.lock();
        let mut ino = ROOT;
        for name in path.split('/').filter(|n| !n.is_empty()) {
            ino = state.node(InodeNo(ino))?.directory()?.find(name.as_bytes()).ok_or(FsError::NotFound)?;
        }
        Ok(InodeNo(ino))
    }

    /// Replaces a file's content as another host would: the kernel isn't told.
    pub fn write_behind(&self, ino: InodeNo, content: &[u8]) -> FsResult<()> {
        let mut state = self.lock();
        let node = state.node_mut(ino)?;
        let file = node.file_mut()?;
        file.truncate(0);
        file.write(0, content);
        node.touch_content();
        Ok(())
    }
}

impl State {
    fn node(&self, ino: InodeNo) -> FsResult<&Node> {
        self.nodes.get(&ino.0).ok_or(FsError::Stale)
    }

    fn node_mut(&mut self, ino: InodeNo) -> FsResult<&mut Node> {
        self.nodes.get_mut(&ino.0).ok_or(FsError::Stale)
    }

    fn answer<T>(&self, value: T) -> Answer<T> {
        self.knobs.held.fetch_add(1, Ordering::AcqRel);
        let hold: Box<dyn Hold> = Box::new(CountedHold(self.knobs.held.clone()));
        Answer { value, valid_for: self.knobs.valid_for, hold: vec![hold] }
    }

    /// Adds a node under a name. Group and set-group-id bit come from the directory where that says so.
    fn add(
        &mut self,
        cx: &OpContext,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> FsResult<InodeNo> {
        check_new_name(name)?;
        let directory = self.node(parent)?;
        if directory.directory()?.find(name).is_some() {
            return Err(FsError::Exists);
        }
        if directory.nlink == 0 {
            return Err(FsError::NotFound);
        }
        let inherits = directory.mode & libc::S_ISGID != 0;
        let gid = if inherits { directory.gid } else { cx.gid };
        let is_directory = mode & libc::S_IFMT == libc::S_IFDIR;
        let mode = if inherits && is_directory { mode | libc::S_ISGID } else { mode };
        let ino = self.next_ino;
        self.next_ino += 1;
        self.nodes.insert(ino, Node::new(ino, mode, cx.uid, gid, rdev, parent.0));
        let directory = self.node_mut(parent)?;
        directory.directory_mut()?.insert(name, ino);
        directory.nlink += u32::from(is_directory);
        directory.touch_content();
        Ok(InodeNo(ino))
    }

    /// A regular file that no directory lists.
    fn add_unnamed(
        &mut self,
        cx: &OpContext,
        parent: InodeNo,
        mode: u32,
        linkable: bool,
    ) -> FsResult<InodeNo> {
        let directory = self.node(parent)?;
        directory.directory()?;
        if directory.nlink == 0 {
            return Err(FsError::NotFound);
        }
        let gid = if directory.mode & libc::S_ISGID != 0 { directory.gid } else { cx.gid };
        let ino = self.next_ino;
        self.next_ino += 1;
        let mut node = Node::new(ino, libc::S_IFREG | mode & 0o7777, cx.uid, gid, 0, parent.0);
        node.nlink = 0;
        node.linkable = linkable;
        self.nodes.insert(ino, node);
        Ok(InodeNo(ino))
    }

    /// One name less; the node goes when nothing refers to it.
    fn drop_link(&mut self, ino: u64) -> FsResult<()> {
        let node = self.node_mut(InodeNo(ino))?;
        node.nlink = if node.is_directory() { 0 } else { node.nlink.saturating_sub(1) };
        node.touch_change();
        self.drop_if_unused(ino);
        Ok(())
    }

    fn drop_if_unused(&mut self, ino: u64) {
        if self.nodes.get(&ino).is_some_and(|n| n.nlink == 0 && n.opens == 0) {
            self.nodes.remove(&ino);
        }
    }

    fn open_handle(&mut self, ino: InodeNo) -> FsResult<u64> {
        self.node_mut(ino)?.opens += 1;
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, ino.0);
        Ok(handle)
    }

    fn close_handle(&mut self, handle: u64) {
        if let Some(ino) = self.handles.remove(&handle)
            && let Ok(node) = self.node_mut(InodeNo(ino))
        {
            node.opens = node.opens.saturating_sub(1);
            self.drop_if_unused(ino);
        }
    }

    /// Is `ino` the directory `below` or above it?
    fn is_above(&self, ino: u64, below: u64) -> bool {
        let mut at = below;
        loop {
            if at == ino {
                return true;
            }
            match self.nodes.get(&at).map(|n| &n.body) {
                Some(Body::Directory(d)) if at != ROOT => at = d.parent,
                _ => return false,
            }
        }
    }
}

fn check_new_name(name: &[u8]) -> FsResult<()> {
    match name.len() {
        0 => Err(FsError::Invalid),
        1..=255 => Ok(()),
        _ => Err(FsError::NameTooLong),
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { secs: since.as_secs() as i64, nanos: since.subsec_nanos() }
}
