//! One operation: the locks it needs, its plan, and how it starts over when it finds that it needs more.
//!
//! Locks are taken in one global order (rename lock, inodes by address, clusters by address), so that hosts
//! never wait in a circle. An operation that learns on its way that it needs another lock asks for it with
//! [`Op::inode`] or [`Op::cluster`]; if that lock can't be had out of order, everything is dropped and taken
//! again in order, and the operation begins anew: whatever it saw before may have changed.
//!
//! Not for: knowing what operations do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use zerocopy::little_endian::U64;

use super::api::{Answer, FsError, FsResult, Hold, Meant, OpContext};
use super::{Fs, LONG};
use crate::alloc::{AllocError, Need, Space};
use crate::layout::geometry::lock_of_inode;
use crate::layout::inode::{CONTENT_BYTES, Form, InodeDisk};
use crate::layout::lock::LockKind;
use crate::layout::{Block, Magic};
use crate::lock::{Access, Guard, InUse, LockError, LockId, Mode, Patience};
use crate::rt::planted::{Bug, is_planted};
use crate::store::{Plan, StoreError};
use crate::tree::{NodeRead, NodeStore, TreeError};
use crate::types::{BlockNo, InodeNo};

/// Why an operation stops: for good, or to begin anew with more locks.
pub(super) enum Fail {
    Error(FsError),
    Again,
}

macro_rules! fails {
    ($($error:ty),*) => {$(
        impl From<$error> for Fail {
            fn from(e: $error) -> Self {
                Fail::Error(e.into())
            }
        }
    )*};
}
fails!(FsError, LockError, StoreError, TreeError, AllocError, crate::device::DeviceError);

pub(super) type OpResult<T> = Result<T, Fail>;

impl From<LockError> for FsError {
    fn from(e: LockError) -> Self {
        match e {
            LockError::WouldWait => FsError::WouldWait,
            LockError::Interrupted => FsError::Interrupted,
            other => FsError::Io(other.to_string()),
        }
    }
}

impl From<StoreError> for FsError {
    fn from(e: StoreError) -> Self {
        FsError::Io(e.to_string())
    }
}

impl From<TreeError> for FsError {
    fn from(e: TreeError) -> Self {
        FsError::Io(e.to_string())
    }
}

impl From<AllocError> for FsError {
    fn from(e: AllocError) -> Self {
        match e {
            AllocError::NoSpace => FsError::NoSpace,
            AllocError::Lock(e) => e.into(),
            other => FsError::Io(other.to_string()),
        }
    }
}

impl From<crate::device::DeviceError> for FsError {
    fn from(e: crate::device::DeviceError) -> Self {
        match e.is_full() {
            true => FsError::DeviceFull(e.to_string()),
            false => FsError::Io(e.to_string()),
        }
    }
}

impl From<crate::layout::LayoutError> for FsError {
    fn from(e: crate::layout::LayoutError) -> Self {
        FsError::Io(e.to_string())
    }
}

/// What an operation needs, as known so far.
#[derive(Clone, Default)]
pub(super) struct Needs {
    pub inodes: BTreeMap<InodeNo, (Mode, Access)>,
    pub clusters: BTreeSet<u64>,
    /// Clusters in which this operation found no room after all.
    pub full: BTreeSet<u64>,
    /// The rename lock, exclusively.
    pub rename: bool,
}

impl Needs {
    /// Reading these.
    pub fn read(inodes: &[InodeNo]) -> Self {
        Needs {
            inodes: inodes.iter().map(|i| (*i, (Mode::Shared, Access::Read))).collect(),
            ..Needs::default()
        }
    }

    /// Looking at this one, with what may follow in mind.
    pub fn look_at(fs: &Fs, ino: InodeNo) -> Self {
        let inodes = [(ino, (fs.mode_to_look(ino), Access::Read))].into();
        Needs { inodes, ..Needs::default() }
    }

    /// Changing these.
    pub fn write(inodes: &[InodeNo]) -> Self {
        Needs {
            inodes: inodes.iter().map(|i| (*i, (Mode::Exclusive, Access::Write))).collect(),
            ..Needs::default()
        }
    }
}

/// An operation under way.
pub(super) struct Op<'f> {
    pub fs: &'f Fs,
    pub patience: Patience,
    pub plan: Plan<'f>,
    meant: Meant,
    needs: Needs,
    guards: BTreeMap<InodeNo, Arc<Guard>>,
    spaces: BTreeMap<u64, Arc<Space>>,
    rename: Option<Guard>,
}

impl Hold for InUse {}

pub(super) fn patience_of(cx: &OpContext) -> Patience {
    Patience { may_wait: cx.may_wait, interrupt: cx.interrupt.clone(), not_for_the_dead: false }
}

impl Fs {
    /// Runs an operation until it ends one way or the other; then joins the running transaction with its
    /// plan. The answer keeps the inode locks in use.
    pub(super) fn run<T>(
        &self,
        cx: &OpContext,
        needs: Needs,
        mut body: impl FnMut(&mut Op<'_>) -> OpResult<T>,
    ) -> FsResult<Answer<T>> {
        let mut needs = needs;
        let mut settled = false;
        loop {
            let mut op = Op::begin(self, cx, needs)?;
            match body(&mut op) {
                Ok(value) => {
                    let Op { plan, guards, spaces, rename, .. } = op;
                    if !plan.is_empty() {
                        self.store.apply(plan)?;
                    }
                    drop((spaces, rename));
                    // What came from memory alone met no door on its way: a host that slept past its lease would
                    // answer from caches that others have changed since.
                    if !self.store.door().lease().allows() && !is_planted(Bug::AnswersPastLease) {
                        return Err(FsError::Fenced);
                    }
                    // The locks stay until the answer was delivered; other threads of this host go on.
                    let hold =
                        guards.values().map(|guard| Box::new(guard.in_use()) as Box<dyn Hold>).collect();
                    return Ok(Answer { value, valid_for: LONG, hold });
                }
                // Room that was given back becomes usable with a commit, and that of orphans when they are freed:
                // that is tried once.
                Err(Fail::Error(FsError::NoSpace))
                    if !settled && (self.alloc.has_frozen() || self.has_due_orphans()) =>
                {
                    if !cx.may_wait {
                        return Err(FsError::WouldWait);
                    }
                    settled = true;
                    needs = op.needs.clone();
                    drop(op);
                    self.reap();
                    self.store.sync()?;
                }
                Err(Fail::Error(e)) => return Err(e),
                Err(Fail::Again) => needs = op.needs,
            }
        }
    }
}

impl<'f> Op<'f> {
    fn begin(fs: &'f Fs, cx: &OpContext, needs: Needs) -> FsResult<Self> {
        let patience = patience_of(cx);
        let rename = match needs.rename {
            true => {
                let id = LockId { kind: LockKind::Rename, at: fs.geometry.rename_lock() };
                Some(fs.locks.acquire(id, Mode::Exclusive, Access::Write, &patience)?)
            }
            false => None,
        };
        let mut op = Op {
            fs,
            plan: fs.store.plan(),
            meant: cx.meant,
            patience,
            needs,
            guards: BTreeMap::new(),
            spaces: BTreeMap::new(),
            rename,
        };
        for (ino, (mode, access)) in op.needs.inodes.clone() {
            let id = fs.inode_lock(ino)?;
            let guard = fs.locks.acquire(id, fs.mode_for(ino, mode), access, &op.patience)?;
            op.guards.insert(ino, Arc::new(guard));
        }
        for cluster in op.needs.clusters.clone() {
            let space = fs.alloc.space_of(fs.geometry.cluster(cluster), &op.patience)?;
            op.spaces.insert(cluster, Arc::new(space));
        }
        Ok(op)
    }

    fn want(&mut self, ino: InodeNo, mode: Mode, access: Access) -> Fail {
        let entry = self.needs.inodes.entry(ino).or_insert((mode, access));
        entry.0 = entry.0.max(mode);
        if access != Access::Read && entry.1 != Access::Write {
            entry.1 = access;
        }
        Fail::Again
    }

    /// Access to an inode met on the way.
    pub fn inode(&mut self, ino: InodeNo, mode: Mode, access: Access) -> OpResult<Arc<Guard>> {
        let mode = self.fs.mode_for(ino, mode);
        if let Some(guard) = self.guards.get(&ino) {
            let enough = (mode == Mode::Shared || guard.is_exclusive())
                && (access == Access::Read || access == guard.access() || guard.access() == Access::Write);
            return if enough { Ok(guard.clone()) } else { Err(self.want(ino, mode, access)) };
        }
        let id = self.fs.inode_lock(ino)?;
        match self.fs.locks.try_held(id, mode, access) {
            Some(guard) => {
                let guard = Arc::new(guard);
                self.guards.insert(ino, guard.clone());
                Ok(guard)
            }
            None => Err(self.want(ino, mode, access)),
        }
    }

    pub fn read_inode(&mut self, ino: InodeNo) -> OpResult<Arc<Guard>> {
        self.inode(ino, Mode::Shared, Access::Read)
    }

    /// To look at, with what may follow in mind.
    pub fn look_at_inode(&mut self, ino: InodeNo) -> OpResult<Arc<Guard>> {
        self.inode(ino, self.fs.mode_to_look(ino), Access::Read)
    }

    pub fn write_inode(&mut self, ino: InodeNo) -> OpResult<Arc<Guard>> {
        self.inode(ino, Mode::Exclusive, Access::Write)
    }

    /// An inode just allocated.
    pub fn adopt(&mut self, ino: InodeNo, guard: Guard) -> Arc<Guard> {
        let guard = Arc::new(guard);
        self.guards.insert(ino, guard.clone());
        guard
    }

    /// The cluster of a block, to free it there.
    pub fn cluster(&mut self, block: BlockNo) -> OpResult<Arc<Space>> {
        let cluster = self
            .fs
            .geometry
            .cluster_of(block)
            .ok_or_else(|| FsError::Io(format!("block {block} lies in no cluster")))?;
        if let Some(space) = self.spaces.get(&cluster) {
            return Ok(space.clone());
        }
        let id = LockId { kind: LockKind::Cluster, at: self.fs.geometry.cluster(cluster) };
        if let Some(guard) = self.fs.locks.try_held(id, Mode::Exclusive, Access::Write) {
            let space = Arc::new(Space { cluster, guard });
            self.spaces.insert(cluster, space.clone());
            return Ok(space);
        }
        self.needs.clusters.insert(cluster);
        Err(Fail::Again)
    }

    /// A cluster with room. One at a time: it is the last lock an operation takes.
    pub fn space(&mut self, near: Option<u64>, need: Need) -> OpResult<Arc<Space>> {
        for (cluster, space) in &self.spaces {
            if !self.needs.full.contains(cluster) && self.fs.alloc.has_room(&self.plan, space, need)? {
                return Ok(space.clone());
            }
        }
        if !self.spaces.is_empty() {
            // Waiting for one more while holding others could close a circle: find out which one has
            // room without holding any, then begin anew with it.
            let held: BTreeSet<u64> = self.spaces.keys().chain(&self.needs.full).copied().collect();
            self.spaces.clear();
            let found = self.fs.alloc.space(near, need, &held, &self.patience)?;
            self.needs.clusters.insert(found.cluster);
            return Err(Fail::Again);
        }
        let space = Arc::new(self.fs.alloc.space(near, need, &self.needs.full, &self.patience)?);
        self.spaces.insert(space.cluster, space.clone());
        Ok(space)
    }

    /// A cluster that seemed to have room had none of the kind wanted (its free space is in pieces): the
    /// operation begins anew and looks elsewhere.
    pub fn unless_full<T>(&mut self, space: &Space, result: Result<T, AllocError>) -> OpResult<T> {
        match result {
            Err(AllocError::NoSpace) if self.needs.full.insert(space.cluster) => Err(Fail::Again),
            other => Ok(other?),
        }
    }

    /// The body of an inode that exists, in the life that the asker means.
    pub fn body(&mut self, guard: &Guard, ino: InodeNo) -> OpResult<Arc<Block>> {
        let block = self.plan.read(guard, ino.body(), Magic::Inode)?;
        let body = InodeDisk::of(&block);
        if body.form() == Form::Free || self.meant.is_another(ino, body.generation.get()) {
            return Err(FsError::Stale.into());
        }
        if body.form() == Form::Inline && body.size.get() > CONTENT_BYTES as u64 {
            return Err(FsError::Io(format!("inode {ino}: inline size {}", body.size.get())).into());
        }
        Ok(block)
    }

    /// The body, for changing.
    pub fn change(&mut self, guard: &Guard, ino: InodeNo) -> OpResult<&mut InodeDisk> {
        let block = self.plan.update(guard, ino.body(), Magic::Inode)?;
        let body = InodeDisk::of_mut(block);
        body.change = U64::new(body.change.get() + 1);
        Ok(body)
    }

    /// Runs `work` on the tree in an inode's body, for reading.
    pub fn look<T>(
        &mut self,
        guard: &Arc<Guard>,
        ino: InodeNo,
        work: impl FnOnce(&mut Nodes<'_, 'f>, &[u8]) -> OpResult<T>,
    ) -> OpResult<T> {
        let block = self.body(guard, ino)?;
        let mut nodes = Nodes { op: self, guard: guard.clone(), space: None };
        work(&mut nodes, &InodeDisk::of(&block).content)
    }

    /// Runs `work` on the tree in an inode's body, for changing; new nodes come from `space`.
    pub fn edit<T>(
        &mut self,
        guard: &Arc<Guard>,
        ino: InodeNo,
        space: Option<&Arc<Space>>,
        work: impl FnOnce(&mut Nodes<'_, 'f>, &mut [u8]) -> OpResult<T>,
    ) -> OpResult<T> {
        let block = self.body(guard, ino)?;
        let mut root = InodeDisk::of(&block).content;
        drop(block);
        let mut nodes = Nodes { op: self, guard: guard.clone(), space: space.cloned() };
        let value = work(&mut nodes, &mut root)?;
        self.change(guard, ino)?.content = root;
        Ok(value)
    }
}

/// The nodes of one inode's tree, within an operation.
pub(super) struct Nodes<'o, 'f> {
    op: &'o mut Op<'f>,
    guard: Arc<Guard>,
    space: Option<Arc<Space>>,
}

impl NodeRead for Nodes<'_, '_> {
    type Error = Fail;
    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, Fail> {
        Ok(self.op.plan.read(&self.guard, at, Magic::TreeNode)?)
    }
}

impl NodeStore for Nodes<'_, '_> {
    fn modify(&mut self, at: BlockNo, change: &mut dyn FnMut(&mut Block)) -> Result<(), Fail> {
        change(self.op.plan.update(&self.guard, at, Magic::TreeNode)?);
        Ok(())
    }

    fn put(&mut self, at: BlockNo, block: Box<Block>) -> Result<(), Fail> {
        Ok(self.op.plan.put(&self.guard, at, Arc::from(block))?)
    }

    fn allocate(&mut self) -> Result<BlockNo, Fail> {
        let space = self.space.clone().ok_or(FsError::NoSpace)?;
        let found = self.op.fs.alloc.blocks(&mut self.op.plan, &space, 1, 0);
        let (at, _) = self.op.unless_full(&space, found)?;
        self.op.plan.blocks_of_inode += 1;
        Ok(at)
    }

    fn free(&mut self, at: BlockNo) -> Result<(), Fail> {
        let space = self.op.cluster(at)?;
        self.op.plan.revoke(&self.guard, at)?;
        self.op.fs.alloc.free_blocks(&mut self.op.plan, &space, at, 1)?;
        self.op.plan.blocks_of_inode -= 1;
        Ok(())
    }
}

impl Fs {
    /// The mode in which who looks at an inode takes its lock: exclusively at once where it left us and a change
    /// may follow ([`crate::lock::LockManager::may_need_more`]). A create by name is a lookup of the directory,
    /// a stat of it, a lookup in it and the create itself; a share would be fetched only to fetch the whole.
    fn mode_to_look(&self, ino: InodeNo) -> Mode {
        let more = || self.inode_lock(ino).is_ok_and(|id| self.locks.may_need_more(id));
        if !self.read_only && more() { Mode::Exclusive } else { Mode::Shared }
    }

    /// The lock of an inode, if a lock can lie there at all.
    pub(super) fn inode_lock(&self, ino: InodeNo) -> FsResult<LockId> {
        if !self.geometry.can_be_inode(ino) {
            return Err(FsError::Stale);
        }
        Ok(LockId { kind: LockKind::Inode, at: lock_of_inode(ino) })
    }
}

impl Op<'_> {
    /// The volume's rename lock, exclusively. It comes before all others, so an operation that learns late
    /// that it needs it begins anew.
    pub(super) fn take_rename_lock(&mut self) -> OpResult<()> {
        if self.rename.is_some() {
            return Ok(());
        }
        self.needs.rename = true;
        Err(Fail::Again)
    }

    /// The parent of a directory. A lock that has to be waited for joins the operation's needs, so that it is
    /// taken in order.
    pub(super) fn parent_of(&mut self, ino: InodeNo) -> OpResult<InodeNo> {
        let guard = match self.guards.get(&ino) {
            Some(guard) => guard.clone(),
            None => self.read_inode(ino)?,
        };
        let block = self.body(&guard, ino)?;
        Ok(InodeNo(InodeDisk::of(&block).parent.get()))
    }
}
