//! The transport without a kernel: a socket that keeps messages apart stands for /dev/fuse.

use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, InHeader, InitFlags, OutHeader, opcode};
use super::decode::Malformed;
use super::*;
use crate::device::AlignedBuf;
use crate::fs::api::{Attributes, DirEntry, SetTime, Timestamp, Whence};
use crate::fuse::guard::Roster;
use crate::fuse::nodes::NodeTable;
use crate::fuse::reply::{EntryReply, Listing, ListingEntry, Reply, Responder, Validity};
use crate::fuse::request::{NodeId, Payload};
use crate::types::InodeNo;

const MIB: usize = 1 << 20;

/// Both ends of a connection.
fn pair() -> (Arc<Channel>, OwnedFd) {
    let (ours, kernels) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("sockets");
    (Arc::new(Channel::new(ours)), kernels)
}

fn message(opcode: u32, node: u64, body: &[&[u8]]) -> Vec<u8> {
    let len = size_of::<InHeader>() + body.iter().map(|part| part.len()).sum::<usize>();
    let header = InHeader {
        len: (len as u32).into(),
        opcode: opcode.into(),
        unique: 6.into(),
        node: node.into(),
        uid: 10.into(),
        gid: 11.into(),
        pid: 12.into(),
        ..Default::default()
    };
    let mut bytes = header.as_bytes().to_vec();
    body.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}

fn answer(kernel: &OwnedFd) -> (OutHeader, Vec<u8>) {
    let mut bytes = vec![0; MIB];
    let len = nix::unistd::read(kernel, &mut bytes).expect("an answer");
    let (header, body) = OutHeader::read_from_prefix(&bytes[..len]).expect("a header");
    assert_eq!(header.len.get() as usize, len);
    (header, body.to_vec())
}

fn call(bytes: &[u8]) -> Call<'_> {
    match Message::read(bytes).and_then(|message| message.asked()) {
        Ok(Asked::Call(call)) => call,
        _ => panic!("no call: {bytes:?}"),
    }
}

fn agreed(flags: InitFlags, minor: u32) -> (io::Result<Capabilities>, OutHeader, Vec<u8>) {
    let (channel, kernel) = pair();
    let offer = abi::InitIn {
        major: 7.into(),
        minor: minor.into(),
        max_readahead: 131072.into(),
        flags: (flags.bits() as u32).into(),
    };
    let more = abi::InitInMore { flags2: ((flags.bits() >> 32) as u32).into(), ..Default::default() };
    let bytes = message(opcode::INIT, 0, &[offer.as_bytes(), more.as_bytes()]);
    nix::unistd::write(&kernel, &bytes).expect("sent");
    let wishes = Wishes { max_write_bytes: MIB as u32, max_background: 64, pretend_old: false };
    let capabilities = init::agree(&channel, &mut Inbox::new(MIB), &wishes);
    let (header, body) = answer(&kernel);
    (capabilities, header, body)
}

#[test]
fn init_asks_for_what_is_offered_and_wanted_only() {
    let (capabilities, header, body) = agreed(InitFlags::from_bits_retain(!0), 45);
    let capabilities = capabilities.expect("agreed");
    assert!(capabilities.direct_io_mmap && capabilities.inc_epoch);
    assert_eq!((header.error.get(), header.unique.get()), (0, 6));
    let out = abi::InitOut::read_from_bytes(&body).expect("an INIT answer");
    assert_eq!((out.major.get(), out.minor.get()), (7, 45));
    let flags = u64::from(out.flags.get()) | u64::from(out.flags2.get()) << 32;
    assert_eq!(
        InitFlags::from_bits(flags),
        Some(InitFlags::all()),
        "what we have no name for is not asked for"
    );
    assert_eq!((out.max_pages.get(), out.max_write.get(), out.max_background.get()), (256, MIB as u32, 64));

    // An older kernel: the second word is not there.
    let old = InitFlags::ATOMIC_O_TRUNC | InitFlags::MAX_PAGES | InitFlags::DIRECT_IO_ALLOW_MMAP;
    let (capabilities, _, body) = agreed(old, 31);
    assert!(!capabilities.expect("agreed").direct_io_mmap);
    let out = abi::InitOut::read_from_bytes(&body).expect("an INIT answer");
    assert_eq!((out.minor.get(), out.flags2.get()), (31, 0));
    assert_eq!(u64::from(out.flags.get()), (InitFlags::ATOMIC_O_TRUNC | InitFlags::MAX_PAGES).bits());
}

#[test]
fn a_kernel_that_lacks_the_essential_is_refused() {
    for (flags, minor) in [(InitFlags::MAX_PAGES, 45), (InitFlags::all(), 12)] {
        let (capabilities, header, _) = agreed(flags, minor);
        assert!(capabilities.is_err());
        assert_eq!(header.error.get(), -libc::EPROTO);
    }
}

#[test]
fn calls_are_read_as_they_were_meant() {
    let rename = abi::Rename2In { new_parent: 9.into(), flags: 2.into(), ..Default::default() };
    let bytes = message(opcode::RENAME2, 5, &[rename.as_bytes(), b"old\0new\0"]);
    match call(&bytes) {
        Call::Rename { parent: NodeId(5), name, new_parent: NodeId(9), new_name, flags: 2 } => {
            assert_eq!((&*name, &*new_name), (&b"old"[..], &b"new"[..]));
        }
        other => panic!("{other:?}"),
    }
    let message_read = Message::read(&bytes).expect("whole");
    assert_eq!((message_read.caller.uid, message_read.caller.gid, message_read.caller.pid), (10, 11, 12));

    let symlink = message(opcode::SYMLINK, 5, &[b"name\0target\0"]);
    let Call::MakeSymlink { name, target, .. } = call(&symlink) else { panic!("another call") };
    assert_eq!((&*name, &*target), (&b"name"[..], &b"target"[..]));

    let set = abi::SetAttrIn {
        valid: (1 << 0 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 8).into(),
        mode: (0o100644).into(),
        size: 77.into(),
        atime: (-3i64 as u64).into(),
        atime_nsec: 500.into(),
        ..Default::default()
    };
    let bytes = message(opcode::SETATTR, 5, &[set.as_bytes()]);
    let Call::SetAttributes { set, .. } = call(&bytes) else { panic!("another call") };
    assert_eq!((set.mode, set.size, set.uid, set.ctime), (Some(0o644), Some(77), None, None));
    assert_eq!(set.atime, Some(SetTime::At(Timestamp { secs: -3, nanos: 500 })));
    assert_eq!(set.mtime, Some(SetTime::Now));

    let seek =
        abi::LseekIn { offset: 3.into(), whence: (libc::SEEK_HOLE as u32).into(), ..Default::default() };
    let bytes = message(opcode::LSEEK, 5, &[seek.as_bytes()]);
    assert!(matches!(call(&bytes), Call::Seek { offset: 3, whence: Whence::Hole, .. }));

    let (one, two) = (
        abi::ForgetOne { node: 3.into(), count: 4.into() },
        abi::ForgetOne { node: 5.into(), count: 6.into() },
    );
    let count = abi::BatchForgetIn { count: 2.into(), ..Default::default() };
    let bytes = message(opcode::BATCH_FORGET, 0, &[count.as_bytes(), one.as_bytes(), two.as_bytes()]);
    let Ok(Asked::Forget(nodes)) = Message::read(&bytes).and_then(|m| m.asked()) else { panic!("no forget") };
    assert_eq!(nodes, [(NodeId(3), 4), (NodeId(5), 6)]);
}

#[test]
fn a_write_back_has_no_handle_and_an_append_is_one() {
    let of = |write_flags: u32, flags: i32| {
        let asked = abi::WriteIn {
            fh: 8.into(),
            offset: 4096.into(),
            size: 5.into(),
            write_flags: write_flags.into(),
            flags: (flags as u32).into(),
            ..Default::default()
        };
        message(opcode::WRITE, 5, &[asked.as_bytes(), b"bytes"])
    };
    let bytes = of(abi::WRITE_KILL_SUIDGID, libc::O_APPEND | libc::O_DSYNC);
    let Call::Write { handle: Some(_), append: true, drop_privileges: true, durable: true, .. } =
        call(&bytes)
    else {
        panic!("another call")
    };
    let bytes = of(abi::WRITE_CACHE, libc::O_APPEND);
    let Call::Write { handle: None, append: false, offset: 4096, data, .. } = call(&bytes) else {
        panic!("another call")
    };
    assert_eq!(&*data, b"bytes");
}

#[test]
fn the_data_of_a_write_lies_at_a_page() {
    let (channel, kernel) = pair();
    let asked = abi::WriteIn { size: 4096.into(), ..Default::default() };
    let bytes = message(opcode::WRITE, 5, &[asked.as_bytes(), &[7; 4096]]);
    nix::unistd::write(&kernel, &bytes).expect("sent");
    let mut inbox = Inbox::new(MIB);
    let received = channel.receive(&mut inbox).expect("no error").expect("a request");
    let Call::Write { data: Payload::Borrowed(data), .. } = call(received) else { panic!("another call") };
    assert!(data.len() == 4096 && AlignedBuf::is_aligned(data, 4096));
}

#[test]
fn a_message_too_short_for_what_it_says_is_refused() {
    let write = abi::WriteIn { size: 100.into(), ..Default::default() };
    for (opcode, body) in [
        (opcode::LOOKUP, &b"no end"[..]),
        (opcode::RENAME, b"12345678one name only\0"),
        (opcode::WRITE, write.as_bytes()),
        (opcode::GETATTR + 1, b"x"),
        (opcode::BATCH_FORGET, &[255; 24]),
    ] {
        let bytes = message(opcode, 5, &[body]);
        let asked = Message::read(&bytes).expect("a header").asked();
        assert!(matches!(asked, Err(Malformed)), "{opcode}");
    }
    let whole = message(opcode::STATFS, 1, &[]);
    assert!(Message::read(&whole[..39]).is_err());
    assert!(Message::read(&[&whole[..], b"more"].concat()).is_err(), "a length that isn't true");
}

proptest! {
    #[test]
    fn nothing_that_is_read_makes_it_panic(
        opcode in 0u32..60, body in proptest::collection::vec(any::<u8>(), 0..200), extension in any::<u16>(),
    ) {
        let mut bytes = message(opcode, 1, &[&body]);
        bytes[36..38].copy_from_slice(&extension.to_ne_bytes());
        if let Ok(message) = Message::read(&bytes) {
            let _ = message.asked();
        }
        let _ = Message::read(&body);
    }
}

#[test]
fn who_asked_is_answered_even_if_the_request_is_dropped() {
    let (channel, kernel) = pair();
    drop(Ticket::new(channel.clone(), 40, 0));
    let (header, body) = answer(&kernel);
    assert_eq!((header.unique.get(), header.error.get(), body.len()), (40, -libc::EIO, 0));
    Ticket::new(channel.clone(), 42, 0).send(Reply::Written(9));
    let (header, body) = answer(&kernel);
    assert_eq!((header.unique.get(), header.error.get()), (42, 0));
    assert_eq!(abi::WriteOut::read_from_bytes(&body).expect("a count").size.get(), 9);
    // A type that the kernel has no word for.
    let entry = EntryReply { node: NodeId(5), attributes: Attributes::default(), valid: Validity::default() };
    Ticket::new(channel, 44, 0).send(Reply::Entry(entry));
    assert_eq!(answer(&kernel).0.error.get(), -libc::EIO);
}

fn listed(names: &[&str], plus: bool, room: usize) -> (Arc<NodeTable>, Vec<u8>) {
    let (channel, kernel) = pair();
    let nodes = Arc::new(NodeTable::new(InodeNo(64), Roster::default()));
    let entry = |(n, name): (usize, &&str)| {
        let ino = InodeNo(70 + n as u64);
        let attributes = Attributes { ino, generation: 1, mode: libc::S_IFREG, ..Attributes::default() };
        ListingEntry {
            entry: DirEntry {
                ino,
                generation: 1,
                cookie: n as u64 + 1,
                kind: 8,
                name: name.as_bytes().to_vec(),
                attributes: plus.then_some(attributes),
            },
            valid: Validity::default(),
        }
    };
    let entries = names.iter().enumerate().map(entry).collect();
    Ticket::new(channel, 2, room).send(Reply::Listing(Listing { entries, plus, nodes: nodes.clone() }));
    (nodes, answer(&kernel).1)
}

#[test]
fn a_listing_holds_whole_entries_only() {
    // 24 bytes and a name, in eights: 32, 32, 40.
    let (_, bytes) = listed(&["a", "12345678", "123456789"], false, 103);
    assert_eq!(bytes.len(), 64);
    let second = abi::Dirent::ref_from_prefix(&bytes[32..]).expect("an entry").0;
    assert_eq!(
        (second.ino.get(), second.cookie.get(), second.name_len.get(), second.kind.get()),
        (71, 2, 8, 8)
    );
    assert_eq!(&bytes[56..64], b"12345678");
    assert_eq!(listed(&["a", "12345678", "123456789"], false, 104).1.len(), 104);
    assert!(listed(&[], false, 4096).1.is_empty());
}

#[test]
fn a_listing_with_attributes_counts_what_goes_out() {
    let (nodes, bytes) = listed(&[".", "a", "b", "c"], true, 3 * 160);
    assert_eq!(bytes.len(), 3 * 160);
    let node = |n: usize| abi::EntryOut::ref_from_prefix(&bytes[n * 160..]).expect("an entry").0.node.get();
    assert_eq!((node(0), node(1), node(2)), (0, 71, 72));
    let known = |ino: u64| nodes.of_inode(InodeNo(ino)).len();
    assert_eq!((known(70), known(71), known(72), known(73)), (0, 1, 1, 0));
}
