//! The one set of handlers: each request becomes one operation of the filesystem, its answer one reply.
//!
//! Serving: the transport's thread asks with `may_wait = false`; a request that would wait is made
//! independent and repeated on a worker with `may_wait = true`. The reply is delivered, then the answer's
//! hold is dropped (see the room's rules).
//!
//! Done here and not below, because only the kernel's door knows: node ids, lookup counts, which opens
//! bypass the page cache on which kernel, and taking set-user-id bits off a file that somebody without the
//! right to keep them writes to. (The kernel asks for that by SETATTR on chown, truncate, fallocate and
//! cached writes, since we don't claim `HANDLE_KILLPRIV`; direct writes carry a flag instead, and a
//! truncating open carries nothing.)
//!
//! Done below: umask is the kernel's (we don't ask for `DONT_MASK`), so `mode` arrives masked; inheriting
//! group and set-group-id bit from the directory is the filesystem's.
//!
//! Names that don't exist are answered without caching: `NotFound` carries no hold, so nothing would keep
//! the directory's lock until the kernel has the answer, and a name created by another host could stay
//! invisible. To cache them safely `lookup` must answer "absent" as an [`Answer`] (`Answer<Option<..>>`); the
//! reply is then an entry with node 0 and the name's time.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use super::capabilities::Capabilities;
use super::nodes::NodeTable;
use super::notify::{Notifier, ServingMark};
use super::reply::{EntryReply, Listing, ListingEntry, OpenReply, Reply, Responder, Validity, is_dot};
use super::request::{Call, Caller, NodeId, Request};
use super::taken_in::Arrival;
use super::waits::{Waiting, Waits};
use super::workers::WorkerPool;
use crate::fs::api::{
    Answer, Attributes, DirEntry, FileHandle, FsError, FsResult, Hold, Meant, OpContext, Opened, Operations,
    SetAttributes,
};
use crate::types::InodeNo;

/// The longest name; the kernel's own limit is larger, so longer ones reach us.
const MAX_NAME_BYTES: usize = 255;
/// An entry with attributes takes about so many times the room of one without.
const PLUS_TIMES: usize = 4;

type Holds = Vec<Box<dyn Hold>>;
/// A reply and what must stay held until it was delivered.
type Outcome = FsResult<(Reply, Holds)>;

/// Told when an operation panicked; the mount can't be trusted after that.
pub type PanicReport = Box<dyn Fn(String) + Send + Sync>;

pub struct Handlers {
    operations: Arc<dyn Operations>,
    root: InodeNo,
    nodes: Arc<NodeTable>,
    workers: WorkerPool,
    notifier: OnceLock<Arc<Notifier>>,
    capabilities: OnceLock<Capabilities>,
    waits: Waits,
    /// Locks pinned by cached read-write opens until RELEASE (kernels without mmap under direct I/O).
    pins: Mutex<HashMap<FileHandle, Holds>>,
    on_panic: PanicReport,
}

impl Handlers {
    pub fn new(
        operations: Arc<dyn Operations>,
        nodes: Arc<NodeTable>,
        workers: WorkerPool,
        on_panic: PanicReport,
    ) -> Handlers {
        let root = operations.root();
        Handlers {
            operations,
            root,
            nodes,
            workers,
            notifier: OnceLock::new(),
            capabilities: OnceLock::new(),
            waits: Waits::default(),
            pins: Mutex::default(),
            on_panic,
        }
    }

    /// What INIT agreed on. Until then nothing is cached.
    pub fn set_capabilities(&self, capabilities: Capabilities) {
        let _ = self.capabilities.set(capabilities);
    }

    pub fn set_notifier(&self, notifier: Arc<Notifier>) {
        let _ = self.notifier.set(notifier);
    }

    /// Serves a request on the transport's thread, or has it served where waiting is allowed.
    pub fn serve<R: Responder>(self: &Arc<Self>, request: Request<'_>, responder: R) {
        let _mark = ServingMark::enter();
        // Of a thread that doesn't wait for the answer an arrival would prove nothing.
        let thread = if request.call.is_waited_for() { request.caller.pid } else { 0 };
        let arrival = self.nodes.taken_in.arrived(thread);
        match self.perform(&request, arrival, None) {
            Err(FsError::WouldWait) => {
                let waiting = self.waits.begin(request.unique, request.caller);
                let request = request.into_owned();
                let me = self.clone();
                self.workers.submit(
                    request.is_write(),
                    Box::new(move || {
                        let _mark = ServingMark::enter();
                        let outcome = me.perform(&request, arrival, Some(&waiting));
                        deliver(outcome, responder);
                    }),
                );
            }
            outcome => deliver(outcome, responder),
        }
    }

    /// The kernel gives back references; there is no reply.
    pub fn forget(&self, node: NodeId, count: u64) {
        let _mark = ServingMark::enter();
        self.nodes.forgotten(node, count);
        let ino = self.ino(node);
        self.guarded(|| {
            self.operations.forget(ino, count);
            Ok(())
        })
        .unwrap_or(());
    }

    /// The thread that waits for the answer to this request was sent a signal.
    pub fn signalled(&self, unique: u64) {
        self.waits.signalled(unique);
    }

    /// Makes waiting requests give up, waits for them, then lets go of everything pinned.
    pub fn finish(&self, patience: Duration) -> bool {
        self.waits.end();
        let ended = self.workers.stop(patience);
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).clear();
        ended
    }

    fn ino(&self, node: NodeId) -> InodeNo {
        if node == NodeId::ROOT { self.root } else { node.inode() }
    }

    /// The inode that the kernel means; the operation is to refuse another life of it.
    fn means(&self, cx: &mut OpContext, node: NodeId) -> FsResult<InodeNo> {
        let (ino, generation) = self.nodes.meaning(node).ok_or(FsError::Stale)?;
        if let Some(generation) = generation {
            cx.meant.add(ino, generation);
        }
        Ok(ino)
    }

    /// A bug in an operation must cost its caller an error and the mount its service, not a thread that
    /// silently is no more.
    fn guarded<T>(&self, operation: impl FnOnce() -> FsResult<T>) -> FsResult<T> {
        catch_unwind(AssertUnwindSafe(operation)).unwrap_or_else(|panic| {
            let what = panic
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            log::error!("an operation panicked: {what}");
            (self.on_panic)(what);
            Err(FsError::Io("internal error".into()))
        })
    }

    /// Without `waiting` it may not wait.
    fn perform(&self, request: &Request<'_>, arrival: Arrival, waiting: Option<&Waiting>) -> Outcome {
        self.guarded(|| {
            let outcome = self.dispatch(self.context(request.caller, waiting), arrival, &request.call);
            match outcome {
                Err(FsError::WouldWait) if waiting.is_some() => {
                    log::error!("an operation refused to wait where it may: {:?}", request.call);
                    Err(FsError::Io("internal error".into()))
                }
                other => other,
            }
        })
    }

    fn context(&self, caller: Caller, waiting: Option<&Waiting>) -> OpContext {
        OpContext {
            uid: caller.uid,
            gid: caller.gid,
            pid: caller.pid,
            may_wait: waiting.is_some(),
            interrupt: waiting.map(Waiting::give_up),
            meant: Meant::default(),
        }
    }

    fn dispatch(&self, mut cx: OpContext, arrival: Arrival, call: &Call<'_>) -> Outcome {
        let ops = &*self.operations;
        let cx = &mut cx;
        match call {
            Call::Lookup { parent, name } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                self.entry(arrival, ops.lookup(cx, parent, name)?)
            }
            Call::GetAttributes { node } => {
                let ino = self.means(cx, *node)?;
                Ok(self.attributes(arrival, *node, ops.getattr(cx, ino)?))
            }
            Call::GetAllAttributes { node } => {
                let ino = self.means(cx, *node)?;
                let answer = ops.getattr(cx, ino)?;
                match self.attributes(arrival, *node, answer) {
                    (Reply::Attributes { node, attributes, valid_for }, hold) => {
                        Ok((Reply::AllAttributes { node, attributes, valid_for }, hold))
                    }
                    other => Ok(other),
                }
            }
            Call::SetAttributes { node, set } => {
                let ino = self.means(cx, *node)?;
                Ok(self.attributes(arrival, *node, ops.setattr(cx, ino, set)?))
            }
            Call::ReadLink { node } => {
                let ino = self.means(cx, *node)?;
                let answer = ops.readlink(cx, ino)?;
                Ok((Reply::Target(answer.value), answer.hold))
            }
            Call::MakeNode { parent, name, mode, rdev } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                self.entry(arrival, ops.mknod(cx, parent, name, *mode, *rdev)?)
            }
            Call::MakeDirectory { parent, name, mode } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                self.entry(arrival, ops.mkdir(cx, parent, name, *mode)?)
            }
            Call::MakeSymlink { parent, name, target } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                self.entry(arrival, ops.symlink(cx, parent, name, target)?)
            }
            Call::Link { node, new_parent, new_name } => {
                check_name(new_name)?;
                let (ino, parent) = (self.means(cx, *node)?, self.means(cx, *new_parent)?);
                self.entry(arrival, ops.link(cx, ino, parent, new_name)?)
            }
            Call::Unlink { parent, name } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                Ok(done(ops.unlink(cx, parent, name)?))
            }
            Call::RemoveDirectory { parent, name } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                Ok(done(ops.rmdir(cx, parent, name)?))
            }
            Call::Rename { parent, name, new_parent, new_name, flags } => {
                check_name(name)?;
                check_name(new_name)?;
                let (from, to) = (self.means(cx, *parent)?, self.means(cx, *new_parent)?);
                Ok(done(ops.rename(cx, from, name, to, new_name, *flags)?))
            }
            Call::Open { node, flags } => {
                let ino = self.means(cx, *node)?;
                self.open(cx, ino, *flags)
            }
            Call::Create { parent, name, mode, flags } => {
                check_name(name)?;
                let parent = self.means(cx, *parent)?;
                self.created(arrival, ops.create(cx, parent, name, *mode, *flags)?, *flags)
            }
            Call::CreateUnnamed { parent, mode, flags } => {
                let parent = self.means(cx, *parent)?;
                self.created(arrival, ops.tmpfile(cx, parent, *mode, *flags)?, *flags)
            }
            Call::Read { node, handle, offset, len } => {
                let ino = self.means(cx, *node)?;
                let answer = ops.read(cx, ino, Some(*handle), *offset, *len)?;
                Ok((Reply::Data(answer.value), answer.hold))
            }
            Call::Write { node, handle, offset, data, append, drop_privileges, durable } => {
                let ino = self.means(cx, *node)?;
                if *drop_privileges {
                    self.drop_privilege_bits(cx, ino)?;
                }
                let answer = ops.write(cx, ino, *handle, *offset, data, *append)?;
                if *durable {
                    drop(ops.fsync(cx, ino, true)?);
                }
                Ok((Reply::Written(answer.value), answer.hold))
            }
            Call::Flush { node, handle } => Ok(done(ops.flush(cx, self.ino(*node), *handle)?)),
            Call::Release { node, handle } => {
                ops.release(self.ino(*node), *handle);
                let pinned = self.pins.lock().unwrap_or_else(PoisonError::into_inner).remove(handle);
                Ok((Reply::Done, pinned.unwrap_or_default()))
            }
            Call::Sync { node, data_only } => Ok(done(ops.fsync(cx, self.ino(*node), *data_only)?)),
            Call::Allocate { node, handle, offset, len, mode } => {
                let ino = self.means(cx, *node)?;
                Ok(done(ops.fallocate(cx, ino, Some(*handle), *offset, *len, *mode)?))
            }
            Call::Seek { node, offset, whence } => {
                let ino = self.means(cx, *node)?;
                let answer = ops.lseek(cx, ino, *offset, *whence)?;
                Ok((Reply::Offset(answer.value), answer.hold))
            }
            Call::OpenDirectory { node } => {
                let ino = self.means(cx, *node)?;
                let answer = ops.opendir(cx, ino)?;
                let open = OpenReply { handle: answer.value, direct_io: false, keep_cache: false };
                Ok((Reply::Opened(open), answer.hold))
            }
            Call::ReadDirectory { node, cookie, max_bytes, plus } => {
                let ino = self.means(cx, *node)?;
                let max_bytes = *max_bytes as usize / if *plus { PLUS_TIMES } else { 1 };
                self.listing(cx, ino, *cookie, max_bytes, *plus)
            }
            Call::ReleaseDirectory { node, handle } => {
                ops.releasedir(self.ino(*node), *handle);
                Ok((Reply::Done, Vec::new()))
            }
            Call::Statistics => Ok((Reply::Usage(ops.statfs(cx)?), Vec::new())),
            Call::SyncVolume => {
                ops.sync(cx)?;
                Ok((Reply::Done, Vec::new()))
            }
        }
    }

    /// How long the kernel may keep what an entry says: never its attributes (see `taken_in`).
    fn entry_validity(&self, valid_for: Duration) -> Validity {
        let names = self.capabilities.get().is_some_and(|c| c.inc_epoch);
        Validity { name: if names { valid_for } else { Duration::ZERO }, attributes: Duration::ZERO }
    }

    /// Counts the reference that this entry gives to the kernel.
    fn entry_reply(
        &self,
        arrival: Arrival,
        attributes: Attributes,
        valid_for: Duration,
    ) -> FsResult<EntryReply> {
        let node = self.nodes.looked_up(attributes.ino, attributes.generation).ok_or(FsError::Stale)?;
        self.nodes.taken_in.answered(arrival, node, &attributes);
        Ok(EntryReply { node, attributes, valid: self.entry_validity(valid_for) })
    }

    fn entry(&self, arrival: Arrival, answer: Answer<Attributes>) -> Outcome {
        let reply = self.entry_reply(arrival, answer.value, answer.valid_for)?;
        Ok((Reply::Entry(reply), answer.hold))
    }

    fn attributes(&self, arrival: Arrival, node: NodeId, answer: Answer<Attributes>) -> (Reply, Holds) {
        let Answer { value: attributes, valid_for, hold } = answer;
        let may_keep = self.nodes.taken_in.answered(arrival, node, &attributes);
        let valid_for = if may_keep { valid_for } else { Duration::ZERO };
        (Reply::Attributes { node, attributes, valid_for }, hold)
    }

    fn open(&self, cx: &OpContext, ino: InodeNo, flags: i32) -> Outcome {
        if flags & libc::O_TRUNC != 0 && cx.uid != 0 {
            self.drop_privilege_bits(cx, ino)?;
        }
        let answer = self.operations.open(cx, ino, flags)?;
        let (reply, hold) = self.opened(answer.value, flags, answer.hold);
        Ok((Reply::Opened(reply), hold))
    }

    fn created(&self, arrival: Arrival, answer: Answer<(Attributes, Opened)>, flags: i32) -> Outcome {
        let (attributes, opened) = answer.value;
        let (reply, hold) = self.opened(opened, flags, answer.hold);
        let entry = self.entry_reply(arrival, attributes, answer.valid_for)?;
        Ok((Reply::Created(entry, reply), hold))
    }

    /// How the kernel treats the open file. Where it can't map a file under direct I/O, a read-write open is
    /// cached, which is coherent only while the lock can't leave: the answer's hold stays until RELEASE.
    fn opened(&self, opened: Opened, flags: i32, hold: Holds) -> (OpenReply, Holds) {
        let mappable = self.capabilities.get().is_some_and(|c| c.direct_io_mmap);
        let read_write = flags & libc::O_ACCMODE == libc::O_RDWR;
        let mut reply = OpenReply {
            handle: opened.handle,
            direct_io: opened.direct_io,
            keep_cache: opened.keep_cache && !opened.direct_io,
        };
        if opened.direct_io && read_write && !mappable {
            reply.direct_io = false;
            self.pins.lock().unwrap_or_else(PoisonError::into_inner).insert(opened.handle, hold);
            return (reply, Vec::new());
        }
        (reply, hold)
    }

    /// Takes set-user-id, and set-group-id where it means that, off a regular file before it is written.
    /// Before: a crash in between must not leave new content with old rights.
    fn drop_privilege_bits(&self, cx: &OpContext, ino: InodeNo) -> FsResult<()> {
        let answer = self.operations.getattr(cx, ino)?;
        let mode = answer.value.mode;
        drop(answer);
        let group_exec = libc::S_ISGID | libc::S_IXGRP;
        let mut drop_bits = mode & libc::S_ISUID;
        if mode & group_exec == group_exec {
            drop_bits |= libc::S_ISGID;
        }
        if drop_bits == 0 || mode & libc::S_IFMT != libc::S_IFREG {
            return Ok(());
        }
        let set = SetAttributes { mode: Some(mode & 0o7777 & !drop_bits), ..Default::default() };
        drop(self.operations.setattr(cx, ino, &set)?);
        // The kernel did not ask for this change and would run the file with its old rights.
        if let Some(notifier) = self.notifier.get() {
            notifier.forget_attributes(ino);
        }
        Ok(())
    }

    /// A listing. While it keeps the directory's lock in use it waits for no other lock: another host may hold
    /// the child's and wait for the directory's.
    fn listing(&self, cx: &OpContext, ino: InodeNo, cookie: u64, max_bytes: usize, plus: bool) -> Outcome {
        let at_once = OpContext { may_wait: false, ..cx.clone() };
        loop {
            let answer = self.operations.readdir(cx, ino, cookie, max_bytes, plus)?;
            let valid = self.entry_validity(answer.valid_for);
            let mut holds = answer.hold;
            let mut entries = Vec::with_capacity(answer.value.len());
            let mut missing = None;
            for entry in answer.value {
                if !plus || entry.attributes.is_some() || is_dot(&entry.name) {
                    entries.push(ListingEntry { entry, valid });
                    continue;
                }
                let child = entry.ino;
                match self.with_attributes(&at_once, entry) {
                    Ok(None) => {}
                    Ok(Some((entry, attributes_for, hold))) => {
                        let valid = Validity { name: valid.name.min(attributes_for), ..valid };
                        entries.push(ListingEntry { entry, valid });
                        holds.extend(hold);
                    }
                    // The rest comes with the next request, which begins here.
                    Err(_) if !entries.is_empty() => break,
                    Err(FsError::WouldWait) => {
                        missing = Some(child);
                        break;
                    }
                    Err(error) => return Err(error),
                }
            }
            let Some(child) = missing else {
                return Ok((Reply::Listing(Listing { entries, plus, nodes: self.nodes.clone() }), holds));
            };
            // Let go of the directory, fetch the child's lock alone, and begin anew: then it is at hand.
            drop(holds);
            match self.operations.getattr(cx, child) {
                Ok(_) | Err(FsError::NotFound | FsError::Stale) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Every line of a listing with attributes needs them: the transport's library takes the inode number
    /// from nowhere else. `None`: the inode is gone by now, so is the name.
    fn with_attributes(
        &self,
        cx: &OpContext,
        mut entry: DirEntry,
    ) -> FsResult<Option<(DirEntry, Duration, Holds)>> {
        match self.operations.getattr(cx, entry.ino) {
            Ok(answer) => {
                entry.attributes = Some(answer.value);
                Ok(Some((entry, answer.valid_for, answer.hold)))
            }
            Err(FsError::NotFound | FsError::Stale) => Ok(None),
            Err(error @ (FsError::WouldWait | FsError::Interrupted | FsError::Fenced)) => Err(error),
            Err(error) => {
                // One damaged inode must not hide its neighbours. Stat of it says what is wrong.
                log::warn!("listing shows {:?} without its attributes: {error}", entry.ino);
                Ok(Some((entry, Duration::ZERO, Vec::new())))
            }
        }
    }
}

fn deliver<R: Responder>(outcome: Outcome, responder: R) {
    match outcome {
        Ok((reply, hold)) => {
            responder.send(reply);
            drop(hold);
        }
        Err(error) => {
            if matches!(error, FsError::Io(_)) {
                log::error!("a request failed: {error}");
            }
            responder.send(Reply::Error(error.errno()));
        }
    }
}

fn check_name(name: &[u8]) -> FsResult<()> {
    if name.len() > MAX_NAME_BYTES { Err(FsError::NameTooLong) } else { Ok(()) }
}

fn done(answer: Answer<()>) -> (Reply, Holds) {
    (Reply::Done, answer.hold)
}

#[cfg(test)]
mod tests;
