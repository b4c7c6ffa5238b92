//! Inodes without a name: freed at once where nobody has them open and one transaction can do it, else
//! entered in this slot's orphan directory in the same transaction and freed step by step. Where nobody has
//! them open, the operation that took the last name does these steps before it returns: whoever removes a
//! large file to make room finds the room made, on every host. Otherwise they wait for the last opener.
//!
//! Not for: the orphans of dead hosts that are not recovered yet.

use std::sync::Arc;
use std::time::Duration;

use zerocopy::little_endian::{U32, U64};

use super::Fs;
use super::api::{Answer, Attributes, FileHandle, FsError, FsResult, OpContext};
use super::attr::{attributes, is_directory, touch};
use super::dirtree::DirTree;
use super::namespace::{group_in, target_of};
use super::op::{Fail, Needs, Op, OpResult};
use crate::alloc::{Need, Space};
use crate::device::AlignedBuf;
use crate::heartbeat::Liveness;
use crate::layout::Block;
use crate::layout::inode::{CONTENT_BYTES, Form, InodeDisk, LINKABLE};
use crate::lease::IoClass;
use crate::lock::Guard;
use crate::rt::Instant;
use crate::rt::planted::{Bug, is_planted};
use crate::types::{BLOCK_BYTES, InodeNo, Owner, Slot};

/// A file of more extents than this is freed step by step.
const FREE_AT_ONCE: usize = 4;
const FIRST_RETRY: Duration = Duration::from_millis(500);
const LAST_RETRY: Duration = Duration::from_secs(4);

/// Orphans that this host looks after.
#[derive(Default)]
pub(super) struct Orphans {
    list: Vec<Orphan>,
    noted: u64,
}

/// An inode that just lost its last name and still has to be freed.
#[derive(Clone, Copy)]
pub(super) struct Unnamed {
    ino: InodeNo,
    /// Somebody has it open, as far as is known.
    open: bool,
}

#[derive(Clone, Copy)]
struct Orphan {
    directory: InodeNo,
    ino: InodeNo,
    /// Tells it from an earlier life of the inode, which may just be leaving the list.
    noted: u64,
    due: Instant,
    pause: Duration,
}

/// What a round of reaping did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReapReport {
    pub freed: u32,
    pub waiting: u32,
}

enum Reap {
    Freed,
    Again,
    Open,
    Ask(Vec<Owner>),
}

fn name_of(ino: InodeNo) -> Vec<u8> {
    format!("{:016x}", ino.0).into_bytes()
}

impl Op<'_> {
    /// Puts an inode into the list of those without a name.
    fn enter_orphans(
        &mut self,
        orphans: &Arc<Guard>,
        directory: InodeNo,
        guard: &Arc<Guard>,
        ino: InodeNo,
        space: &Arc<Space>,
    ) -> OpResult<()> {
        let block = self.body(guard, ino)?;
        let target = target_of(ino, InodeDisk::of(&block));
        let key = self.enter(orphans, directory, &name_of(ino), target, space)?;
        let body = self.change(guard, ino)?;
        body.parent = U64::new(directory.0);
        body.parent_key = U64::new(key);
        Ok(())
    }

    /// Takes an inode that gets a name out of that list.
    pub(super) fn leave_orphans(&mut self, directory: InodeNo, ino: InodeNo) -> OpResult<()> {
        let orphans = self.write_inode(directory)?;
        self.leave(&orphans, directory, &name_of(ino)).map(drop)
    }
}

impl Fs {
    /// Nobody in particular asks, and waits end when the host leaves.
    fn background(&self) -> OpContext {
        OpContext {
            uid: 0,
            gid: 0,
            pid: 0,
            may_wait: true,
            interrupt: Some(self.stopping.clone()),
            meant: Default::default(),
        }
    }

    /// One name fewer. The last one gone: the inode is freed, or becomes an orphan, which is returned.
    pub(super) fn drop_link(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
    ) -> OpResult<Option<Unnamed>> {
        let body = op.change(guard, ino)?;
        let left = body.nlink.get().saturating_sub(1);
        body.nlink = U32::new(left);
        touch(body);
        if left > 0 {
            return Ok(None);
        }
        self.bury(op, guard, ino)
    }

    /// A directory that is empty and loses its name.
    pub(super) fn drop_directory(
        &self,
        op: &mut Op<'_>,
        guard: &Arc<Guard>,
        ino: InodeNo,
    ) -> OpResult<Option<Unnamed>> {
        let body = op.change(guard, ino)?;
        body.nlink = U32::ZERO;
        touch(body);
        self.bury(op, guard, ino)
    }

    fn bury(&self, op: &mut Op<'_>, guard: &Arc<Guard>, ino: InodeNo) -> OpResult<Option<Unnamed>> {
        let me = self.locks.me().slot;
        let opened_elsewhere = guard.record().is_none_or(|r| !r.openers.without(me).is_empty());
        let opened_here = self.opens.lock().contains_key(&ino);
        let open = opened_elsewhere || opened_here;
        if !open && self.is_small(op, guard, ino)? {
            self.free_inode(op, guard, ino)?;
            return Ok(None);
        }
        if !open && !op.patience.may_wait {
            // Freeing it takes steps that may have to wait, and once the name is gone nothing can be begun anew.
            return Err(FsError::WouldWait.into());
        }
        let dir = self.geometry.orphan_directory(me);
        if open && is_planted(Bug::OrphansForgotten) {
            return Ok(Some(Unnamed { ino, open }));
        }
        let orphans = op.write_inode(dir)?;
        let level = op.dir_level(&orphans, dir)?;
        let need = Need { blocks: DirTree::insert_cost(level).allocations, inode: false };
        let space = op.space(None, need)?;
        op.enter_orphans(&orphans, dir, guard, ino, &space)?;
        Ok(Some(Unnamed { ino, open }))
    }

    /// A file that has no name yet: an orphan from the beginning, open from the beginning.
    pub(super) fn do_tmpfile(
        &self,
        cx: &OpContext,
        parent: InodeNo,
        mode: u32,
        flags: i32,
    ) -> FsResult<Answer<(Attributes, FileHandle)>> {
        self.may_change()?;
        let orphanage = self.geometry.orphan_directory(self.locks.me().slot);
        let mut registered = None;
        let answer = self.run(cx, Needs::read(&[parent]), |op| {
            let dir = op.read_inode(parent)?;
            let block = op.living_directory(&dir, parent)?;
            let gid = group_in(cx, InodeDisk::of(&block));
            let orphans = op.write_inode(orphanage)?;
            let level = op.dir_level(&orphans, orphanage)?;
            let need = Need { blocks: DirTree::insert_cost(level).allocations, inode: true };
            let space = op.space(self.geometry.cluster_of(parent.body()), need)?;
            let Some((ino, guard)) = self.alloc.inode(&mut op.plan, &space)? else { return Err(Fail::Again) };
            let guard = op.adopt(ino, guard);
            self.begin_inode(op, &guard, ino, mode & 0o7777 | libc::S_IFREG)?;
            op.enter_orphans(&orphans, orphanage, &guard, ino, &space)?;
            let body = op.change(&guard, ino)?;
            body.uid = U32::new(cx.uid);
            body.gid = U32::new(gid);
            body.flags = U32::new(if flags & libc::O_EXCL == 0 { LINKABLE } else { 0 });
            let attributes = attributes(ino, body);
            // Under the guard: whoever frees orphans sees the open.
            let handle = self.open_handle(ino, flags);
            registered = Some(handle);
            Ok((attributes, handle))
        });
        match &answer {
            Ok(answer) => drop(self.watch_orphan(orphanage, answer.value.0.ino)),
            Err(_) => drop(registered.map(|handle| self.close_handle(handle))),
        }
        answer
    }

    /// Can everything it has be freed in one step?
    fn is_small(&self, op: &mut Op<'_>, guard: &Arc<Guard>, ino: InodeNo) -> OpResult<bool> {
        let block = op.body(guard, ino)?;
        let body = InodeDisk::of(&block);
        if body.form() != Form::Tree || is_directory(body) {
            return Ok(true);
        }
        let tree = self.extent_tree(ino);
        op.look(guard, ino, |nodes, root| {
            if tree.tree().root_level(root)? > 0 {
                return Ok(false);
            }
            let mut count = 0;
            tree.list(nodes, root, 0, |_| {
                count += 1;
                std::ops::ControlFlow::Continue(())
            })?;
            Ok(count <= FREE_AT_ONCE)
        })
    }

    /// Frees an inode and what is left of its extents; they fit into this step.
    fn free_inode(&self, op: &mut Op<'_>, guard: &Arc<Guard>, ino: InodeNo) -> OpResult<()> {
        let block = op.body(guard, ino)?;
        let body = InodeDisk::of(&block);
        if body.form() == Form::Tree && !is_directory(body) && !self.free_from(op, ino, 0)? {
            return Err(FsError::Io(format!("inode {ino} has more extents than were counted")).into());
        }
        let space = op.cluster(ino.body())?;
        self.alloc.free_inode(&mut op.plan, &space, ino)?;
        let body = op.change(guard, ino)?;
        body.mode = U32::ZERO;
        body.form = Form::Free.code();
        body.size = U64::ZERO;
        body.nlink = U32::ZERO;
        body.flags = U32::ZERO;
        body.content = [0; CONTENT_BYTES];
        Ok(())
    }

    /// What became of an operation that may have taken a last name. An orphan is looked after from now on; one
    /// that nobody has open is freed now, after the operation's locks are let go.
    pub(super) fn without_orphan(
        &self,
        cx: &OpContext,
        mut answer: Answer<()>,
        orphan: Option<Unnamed>,
    ) -> Answer<()> {
        let Some(Unnamed { ino, open }) = orphan else { return answer };
        let directory = self.geometry.orphan_directory(self.locks.me().slot);
        let orphan = self.watch_orphan(directory, ino);
        if !open {
            // Of a name that is gone the kernel keeps nothing.
            answer.hold.clear();
            match self.reap_one(cx, &orphan) {
                Ok(true) => self.orphans.lock().list.retain(|o| o.noted != orphan.noted),
                // The name is gone; the rest is done in the background.
                Ok(false) | Err(FsError::Interrupted) => {}
                Err(e) => log::warn!("freeing inode {ino}, which lost its last name: {e}"),
            }
        }
        answer
    }

    fn watch_orphan(&self, directory: InodeNo, ino: InodeNo) -> Orphan {
        let mut orphans = self.orphans.lock();
        orphans.noted += 1;
        let orphan = Orphan { directory, ino, noted: orphans.noted, due: Instant::now(), pause: FIRST_RETRY };
        match orphans.list.iter_mut().find(|o| o.ino == ino) {
            Some(known) => *known = orphan,
            None => orphans.list.push(orphan),
        }
        orphan
    }

    /// Is there an orphan that could be freed now?
    pub(super) fn has_due_orphans(&self) -> bool {
        let now = Instant::now();
        self.orphans.lock().list.iter().any(|o| o.due <= now)
    }

    /// The last descriptor of an inode on this host was closed: if it is an orphan, its time may have come.
    pub(super) fn closed(&self, ino: InodeNo) {
        let mut orphans = self.orphans.lock();
        if let Some(orphan) = orphans.list.iter_mut().find(|o| o.ino == ino) {
            orphan.due = Instant::now();
        }
    }

    /// Frees the orphans whose time has come.
    pub fn reap(&self) -> ReapReport {
        let now = Instant::now();
        let due: Vec<Orphan> = self.orphans.lock().list.iter().filter(|o| o.due <= now).copied().collect();
        let mut report = ReapReport::default();
        for orphan in due {
            match self.reap_one(&self.background(), &orphan) {
                Ok(true) => {
                    report.freed += 1;
                    self.orphans.lock().list.retain(|o| o.noted != orphan.noted);
                }
                other => {
                    if let Err(e) = other
                        && !matches!(e, FsError::Interrupted)
                    {
                        log::warn!("freeing orphan inode {}: {e}", orphan.ino);
                    }
                    report.waiting += 1;
                    if let Some(o) = self.orphans.lock().list.iter_mut().find(|o| o.noted == orphan.noted) {
                        o.due = Instant::now() + o.pause;
                        o.pause = (o.pause * 2).min(LAST_RETRY);
                    }
                }
            }
        }
        report
    }

    fn reap_one(&self, cx: &OpContext, orphan: &Orphan) -> FsResult<bool> {
        let (dir, ino) = (orphan.directory, orphan.ino);
        if self.opens.lock().contains_key(&ino) {
            return Ok(false);
        }
        loop {
            let cx = OpContext { meant: Default::default(), ..cx.clone() };
            let answer = self.run(&cx, Needs::write(&[dir, ino]), |op| self.reap_step(op, dir, ino))?;
            match answer.value {
                Reap::Freed => return Ok(true),
                Reap::Again => {}
                Reap::Open => return Ok(false),
                Reap::Ask(owners) => {
                    drop(answer.hold);
                    let id = self.inode_lock(ino)?;
                    self.demand.ask_openers(id.at, &owners).map_err(|e| FsError::Io(e.to_string()))?;
                    return Ok(false);
                }
            }
        }
    }

    fn reap_step(&self, op: &mut Op<'_>, dir: InodeNo, ino: InodeNo) -> OpResult<Reap> {
        let (orphans, guard) = (op.write_inode(dir)?, op.write_inode(ino)?);
        if op.find(&orphans, dir, &name_of(ino))?.is_none() {
            // Another host swept it, or another thread of ours was faster.
            self.demand.openers_answered(self.inode_lock(ino)?.at);
            return Ok(Reap::Freed);
        }
        let block = op.body(&guard, ino)?;
        if InodeDisk::of(&block).nlink.get() > 0 {
            op.leave(&orphans, dir, &name_of(ino))?;
            return Ok(Reap::Freed);
        }
        if self.opens.lock().contains_key(&ino) {
            return Ok(Reap::Open);
        }
        let mut ask = Vec::new();
        if let Some(record) = guard.record() {
            for slot in record.openers.without(self.locks.me().slot).iter() {
                let Some(seen) = self.peers.last_seen(slot) else { continue };
                let owner = Owner { slot, incarnation: seen.incarnation };
                match self.peers.liveness(owner) {
                    Liveness::Settled => {}
                    _ if seen.living(slot).is_none() => {}
                    _ => ask.push(owner),
                }
            }
        }
        if !ask.is_empty() && !is_planted(Bug::OpenersNotAsked) {
            return Ok(Reap::Ask(ask));
        }
        if !self.is_small(op, &guard, ino)? {
            self.free_from(op, ino, 0)?;
            return Ok(Reap::Again);
        }
        self.free_inode(op, &guard, ino)?;
        op.leave(&orphans, dir, &name_of(ino))?;
        let lock = self.inode_lock(ino)?;
        self.demand.openers_answered(lock.at);
        Ok(Reap::Freed)
    }

    /// Looks for orphans in our own list and in those of slots in which no host lives.
    pub fn sweep(&self) -> FsResult<()> {
        for slot in self.geometry.all_slots() {
            let mine = slot == self.locks.me().slot;
            if !mine && is_planted(Bug::DeadListsUnswept) {
                continue;
            }
            let abandoned = self
                .peers
                .last_seen(slot)
                .is_some_and(|r| r.incarnation.0 > 0 && r.settled(r.incarnation) && r.living(slot).is_none());
            if (mine || abandoned) && self.may_have_orphans(slot)? {
                self.collect_orphans(slot)?;
            }
        }
        Ok(())
    }

    /// A look without the lock: the count of a directory that nobody uses.
    fn may_have_orphans(&self, slot: Slot) -> FsResult<bool> {
        let dir = self.geometry.orphan_directory(slot);
        let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
        self.store.door().read(IoClass::Metadata, dir.body(), &mut buf)?;
        let Some(block) = buf.first_chunk::<BLOCK_BYTES>() else { return Ok(true) };
        let block: &Block = block;
        Ok(InodeDisk::parse(block, self.volume, dir).map_or(true, |b| b.entries.get() > 0))
    }

    fn collect_orphans(&self, slot: Slot) -> FsResult<()> {
        let dir = self.geometry.orphan_directory(slot);
        let answer = self.run(&self.background(), Needs::read(&[dir]), |op| {
            let guard = op.read_inode(dir)?;
            let tree = self.dir_tree(dir);
            let mut found = Vec::new();
            op.look(&guard, dir, |nodes, root| {
                tree.list(nodes, root, 0, |item| {
                    found.push(item.target.ino);
                    std::ops::ControlFlow::Continue(())
                })
            })?;
            Ok(found)
        })?;
        for ino in answer.value {
            self.watch_orphan(dir, ino);
        }
        Ok(())
    }
}
