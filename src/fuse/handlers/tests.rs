//! The handlers without a kernel: holds, waiting, lookup counts.

use std::borrow::Cow;
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::fuse::capabilities::OfferedFlags;
use crate::fuse::guard::Roster;
use crate::fuse::workers::PoolLimits;
use crate::testing::memfs::MemFs;

const PATIENCE: Duration = Duration::from_secs(20);

/// A kernel that looks at how many holds live while it takes the reply.
struct Kernel {
    fs: Arc<MemFs>,
    replies: Sender<(Reply, u64)>,
}

impl Responder for Kernel {
    fn send(self, reply: Reply) {
        let held = self.fs.held();
        self.replies.send((reply, held)).expect("the test listens");
    }
}

struct Bench {
    fs: Arc<MemFs>,
    nodes: Arc<NodeTable>,
    handlers: Arc<Handlers>,
    sender: Sender<(Reply, u64)>,
    replies: Receiver<(Reply, u64)>,
}

fn bench(pretend_old: bool) -> Bench {
    let fs = Arc::new(MemFs::new());
    let nodes = Arc::new(NodeTable::new(fs.root(), Roster::default()));
    let pool = WorkerPool::new(PoolLimits::default());
    let handlers = Arc::new(Handlers::new(fs.clone(), nodes.clone(), pool, Box::new(|_| {})));
    let offered = OfferedFlags { direct_io_mmap: true, ..Default::default() };
    handlers.set_capabilities(Capabilities::new((7, 45), offered, 1 << 20, pretend_old));
    let (sender, replies) = channel();
    Bench { fs, nodes, handlers, sender, replies }
}

impl Bench {
    fn start(&self, call: Call<'_>) {
        let kernel = Kernel { fs: self.fs.clone(), replies: self.sender.clone() };
        self.handlers.serve(Request { unique: 0, caller: Caller::default(), call }, kernel);
    }

    /// The reply and how many holds lived while it was delivered.
    fn ask(&self, call: Call<'_>) -> (Reply, u64) {
        self.start(call);
        self.replies.recv_timeout(PATIENCE).expect("a reply")
    }

    fn create(&self, name: &'static [u8], flags: i32) -> (NodeId, OpenReply) {
        let call = Call::Create { parent: NodeId::ROOT, name: Cow::Borrowed(name), mode: 0o644, flags };
        match self.ask(call).0 {
            Reply::Created(entry, open) => (entry.node, open),
            _ => panic!("not created"),
        }
    }
}

#[test]
fn a_hold_lives_until_the_reply_was_delivered_and_no_longer() {
    let bench = bench(false);
    let (node, _) = bench.create(b"file", libc::O_RDONLY);
    let (reply, held) = bench.ask(Call::GetAttributes { node });
    assert!(matches!(reply, Reply::Attributes { .. }));
    assert_eq!((held, bench.fs.held()), (1, 0));
    // Also by way of a worker, where the drop follows the delivery a moment later.
    let (reply, held) = bench.ask(Call::Sync { node, data_only: false });
    assert!(matches!(reply, Reply::Done));
    assert_eq!(held, 1);
    assert!(bench.handlers.finish(PATIENCE));
    assert_eq!(bench.fs.held(), 0);
}

#[test]
fn what_waits_is_answered_later_and_the_rest_at_once() {
    let bench = bench(false);
    let (node, _) = bench.create(b"file", libc::O_RDONLY);
    let ino = crate::types::InodeNo(node.0);
    bench.fs.set_blocked(ino, true);
    bench.start(Call::GetAttributes { node });
    let (reply, _) = bench.ask(Call::GetAttributes { node: NodeId::ROOT });
    assert!(matches!(reply, Reply::Attributes { attributes, .. } if attributes.ino != ino));
    bench.fs.set_blocked(ino, false);
    let (reply, held) = bench.replies.recv_timeout(PATIENCE).expect("answered after the wait");
    assert!(matches!(reply, Reply::Attributes { attributes, .. } if attributes.ino == ino));
    assert_eq!(held, 1);
}

#[test]
fn the_end_of_the_mount_ends_waits() {
    let bench = bench(false);
    let (node, _) = bench.create(b"file", libc::O_RDONLY);
    bench.fs.set_blocked(crate::types::InodeNo(node.0), true);
    bench.start(Call::GetAttributes { node });
    while bench.fs.waits().0 == 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(bench.handlers.finish(PATIENCE));
    let (reply, _) = bench.replies.recv_timeout(PATIENCE).expect("answered");
    assert!(matches!(reply, Reply::Error(libc::EINTR)));
}

#[test]
fn an_old_kernel_pins_the_lock_of_a_read_write_open_until_release() {
    for (pretend_old, flags, direct_io, pinned) in [
        (false, libc::O_RDWR, true, 0),
        (true, libc::O_RDWR, false, 1),
        (true, libc::O_WRONLY, true, 0),
        (true, libc::O_RDONLY, false, 0),
    ] {
        let bench = bench(pretend_old);
        let (node, open) = bench.create(b"file", flags);
        assert_eq!((open.direct_io, bench.fs.held()), (direct_io, pinned), "{pretend_old} {flags}");
        let (_, held) = bench.ask(Call::Release { node, handle: open.handle });
        assert_eq!(held, pinned, "until the release was answered");
        assert_eq!(bench.fs.held(), 0);
    }
}

#[test]
fn names_are_cacheable_only_where_they_can_be_forgotten() {
    for pretend_old in [false, true] {
        let bench = bench(pretend_old);
        bench.create(b"file", libc::O_RDONLY);
        let call = Call::Lookup { parent: NodeId::ROOT, name: Cow::Borrowed(b"file") };
        let (Reply::Entry(entry), _) = bench.ask(call) else { panic!("not found") };
        assert_eq!(entry.valid.name.is_zero(), pretend_old);
        assert!(entry.valid.attributes.is_zero(), "the kernel may make the inode anew");
    }
}

#[test]
fn attributes_are_kept_only_by_a_kernel_that_has_them() {
    let bench = bench(false);
    let (node, _) = bench.create(b"file", libc::O_RDONLY);
    let kept = |pid, call| {
        let kernel = Kernel { fs: bench.fs.clone(), replies: bench.sender.clone() };
        bench
            .handlers
            .serve(Request { unique: 0, caller: Caller { pid, ..Caller::default() }, call }, kernel);
        match bench.replies.recv_timeout(PATIENCE).expect("a reply").0 {
            Reply::Attributes { valid_for, .. } => !valid_for.is_zero(),
            _ => panic!("no attributes"),
        }
    };
    let ask = |pid| kept(pid, Call::GetAttributes { node });
    let until_kept = |pid| (1..).find(|_| ask(pid)).expect("at last");
    assert!(!ask(7) && !ask(7));
    until_kept(7);
    assert!(ask(8), "whoever asks");
    let set = SetAttributes { mode: Some(0o600), ..SetAttributes::default() };
    assert!(!kept(8, Call::SetAttributes { node, set }), "other attributes");
    assert!(!ask(9) && !ask(9));
    until_kept(9);
}

#[test]
fn every_reference_of_the_kernel_is_counted() {
    let bench = bench(false);
    let (node, _) = bench.create(b"file", libc::O_RDONLY);
    let lookup = || Call::Lookup { parent: NodeId::ROOT, name: Cow::Borrowed(b"file") };
    bench.ask(lookup());
    bench.handlers.forget(node, 1);
    assert_eq!(bench.nodes.all(), [NodeId::ROOT, node]);
    let missing = Call::Lookup { parent: NodeId::ROOT, name: Cow::Borrowed(b"none") };
    assert!(matches!(bench.ask(missing).0, Reply::Error(libc::ENOENT)));
    bench.handlers.forget(node, 1);
    assert!(bench.nodes.is_empty());
}

#[test]
fn names_longer_than_255_bytes_are_refused() {
    let bench = bench(false);
    let long = vec![b'n'; 256];
    let call = Call::Lookup { parent: NodeId::ROOT, name: Cow::Borrowed(&long) };
    assert!(matches!(bench.ask(call).0, Reply::Error(libc::ENAMETOOLONG)));
}

#[test]
fn a_write_through_o_sync_is_durable_before_its_answer() {
    let bench = bench(false);
    let (node, open) = bench.create(b"file", libc::O_RDWR | libc::O_DSYNC);
    let write = |durable| Call::Write {
        node,
        handle: Some(open.handle),
        offset: 0,
        data: crate::fuse::request::Payload::Borrowed(b"bytes"),
        append: false,
        drop_privileges: false,
        durable,
    };
    let synced = || bench.fs.calls().get("fsync").copied().unwrap_or(0);
    assert!(matches!(bench.ask(write(false)).0, Reply::Written(5)));
    assert_eq!(synced(), 0);
    assert!(matches!(bench.ask(write(true)).0, Reply::Written(5)));
    assert_eq!(synced(), 1);
    assert!(bench.handlers.finish(PATIENCE));
}
