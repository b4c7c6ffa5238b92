//! The filesystem: lookup, create, read, write, rename. Knows no FUSE and no SCSI.
//!
//! * Every operation names the locks it needs, plans all its changes under them and joins the running
//!   transaction with the whole plan ([`op`]): it is wholly there or wholly absent after a crash.
//! * File data is on the LUN before the change that exposes it joins, so new blocks never show old bytes.
//! * While a file is open for writing on this host, its lock is held exclusively or not at all.
//! * Times of an inode never go back, whatever the hosts' clocks say.
//!
//! Not for: waiting for other hosts (`lock`), or the kernel's caches (`fuse`).

pub mod api;
mod attr;
mod data;
pub mod dirtree;
pub mod extents;
mod namespace;
mod op;
mod operations;
mod orphans;
mod rename;
mod space;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::alloc::Allocator;
use crate::heartbeat::Peers;
use crate::layout::geometry::{Geometry, inode_of_lock};
use crate::layout::inode::Timestamp;
use crate::layout::superblock::Superblock;
use crate::lock::{Demand, LockId, LockManager, Mode, Usage};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Mutex};
use crate::store::Store;
use crate::types::{InodeNo, VolumeId};
use api::{FileHandle, FsError, FsResult};
use dirtree::DirTree;
use extents::ExtentTree;
pub use orphans::ReapReport;

/// How long the kernel may cache an answer that a lock covers: until we tell it otherwise.
const LONG: Duration = Duration::from_secs(3600);

/// How a file is open on this host.
#[derive(Clone, Copy, Default)]
struct Opens {
    all: u32,
    writers: u32,
}

#[derive(Clone, Copy)]
struct OpenFile {
    ino: InodeNo,
    writes: bool,
    appends: bool,
}

/// The filesystem of a mounted volume.
pub struct Fs {
    geometry: Geometry,
    volume: VolumeId,
    hash_seed: [u8; 16],
    locks: Arc<LockManager>,
    demand: Arc<Demand>,
    peers: Arc<Peers>,
    store: Arc<Store>,
    alloc: Allocator,
    read_only: bool,
    opens: Mutex<BTreeMap<InodeNo, Opens>>,
    handles: Mutex<HashMap<u64, OpenFile>>,
    next_handle: AtomicU64,
    /// Inodes that operations used as directories: their names have to be forgotten, too.
    directories: Mutex<BTreeSet<InodeNo>>,
    orphans: Mutex<orphans::Orphans>,
    /// Held while the times of a file are set next to other writers of the file.
    times: Mutex<()>,
    /// Ends the waits of background work: the host leaves.
    stopping: Arc<AtomicBool>,
}

/// What a mounted volume is made of, handed to the filesystem.
pub struct Parts {
    pub superblock: Superblock,
    pub locks: Arc<LockManager>,
    pub demand: Arc<Demand>,
    pub peers: Arc<Peers>,
    pub store: Arc<Store>,
    pub read_only: bool,
}

impl Fs {
    pub fn new(parts: Parts) -> Self {
        let Parts { superblock, locks, demand, peers, store, read_only } = parts;
        Fs {
            geometry: superblock.geometry,
            volume: superblock.volume,
            hash_seed: superblock.hash_seed,
            alloc: Allocator::new(superblock.geometry, locks.clone(), store.clone()),
            locks,
            demand,
            peers,
            store,
            read_only,
            opens: Mutex::new(BTreeMap::new()),
            handles: Mutex::new(HashMap::new()),
            next_handle: AtomicU64::new(1),
            directories: Mutex::new(BTreeSet::new()),
            orphans: Mutex::new(orphans::Orphans::default()),
            times: Mutex::new(()),
            stopping: Arc::new(AtomicBool::new(false)),
        }
    }

    /// Background work stops waiting for other hosts.
    pub fn stop_waiting(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    pub fn alloc(&self) -> &Allocator {
        &self.alloc
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    fn dir_tree(&self, ino: InodeNo) -> DirTree {
        DirTree::new(self.volume, ino, self.hash_seed)
    }

    fn extent_tree(&self, ino: InodeNo) -> ExtentTree {
        ExtentTree::new(self.volume, ino, self.geometry.size_blocks)
    }

    /// The mode in which a lock is needed: a host with a writable open holds it exclusively or not at all,
    /// since a page of a shared mapping is dirtied without any request.
    fn mode_for(&self, ino: InodeNo, mode: Mode) -> Mode {
        let writable = self.opens.lock().get(&ino).is_some_and(|o| o.writers > 0);
        if writable && !is_planted(Bug::WritableOpensShared) { Mode::Exclusive } else { mode }
    }

    /// How an inode is used here, by its lock.
    pub fn usage(&self, lock: LockId) -> Usage {
        let opens = self.opens.lock();
        let o = opens.get(&inode_of_lock(lock.at)).copied().unwrap_or_default();
        Usage { open: o.all > 0, writable: o.writers > 0 && !is_planted(Bug::WritableOpensShared) }
    }

    /// Was the inode used as a directory on this host?
    pub fn was_directory(&self, ino: InodeNo) -> bool {
        self.directories.lock().contains(&ino)
    }

    /// The kernel has forgotten its names, and nothing was served of it since.
    pub fn forget_directory(&self, ino: InodeNo) {
        self.directories.lock().remove(&ino);
    }

    /// How many inodes are remembered as directories.
    pub fn directories_known(&self) -> usize {
        self.directories.lock().len()
    }

    fn note_directory(&self, ino: InodeNo) {
        self.directories.lock().insert(ino);
    }

    fn may_change(&self) -> FsResult<()> {
        if self.read_only { Err(FsError::ReadOnly) } else { Ok(()) }
    }

    fn open_handle(&self, ino: InodeNo, flags: i32) -> FileHandle {
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let appends = flags & libc::O_APPEND != 0;
        let handle = self.next_handle.fetch_add(1, Ordering::Relaxed);
        self.handles.lock().insert(handle, OpenFile { ino, writes, appends });
        let mut opens = self.opens.lock();
        let o = opens.entry(ino).or_default();
        o.all += 1;
        o.writers += u32::from(writes);
        FileHandle(handle)
    }

    /// Takes the handle out. The inode's last use on this host ended: `true`.
    fn close_handle(&self, handle: FileHandle) -> Option<(OpenFile, bool)> {
        let file = self.handles.lock().remove(&handle.0)?;
        let mut opens = self.opens.lock();
        let mut last = false;
        if let Some(o) = opens.get_mut(&file.ino) {
            o.all = o.all.saturating_sub(1);
            o.writers = o.writers.saturating_sub(u32::from(file.writes));
            last = o.all == 0;
            if last {
                opens.remove(&file.ino);
            }
        }
        Some((file, last))
    }
}

/// Now, but never before `floor`.
fn now_after(floor: Timestamp) -> Timestamp {
    let (secs, nanos) = rt::wall_clock();
    Timestamp { secs, nanos }.max(floor)
}
