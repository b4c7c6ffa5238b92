//! The memory that a daemon and its guard share: FFI, and the meaning of its words.
//!
//! ```text
//! word 0            lease deadline, nanoseconds of CLOCK_BOOTTIME; 0: no lease known yet
//! word 1            what the daemon wants ([`Order`])
//! word 2            why the guard acted ([`Cause`]); 0: it did not
//! word 3            how many node words were ever used
//! word 512 ...      node numbers; 0: free
//! ```
//!
//! * Each fact is one word, stored at once: a daemon that dies anywhere leaves a table that can be read. A node is
//!   stored before the kernel hears of it, so a table that is read after the death lacks none.
//! * The guard takes what it reads for rubbish until checked: an unknown order is none, more words than there are
//!   count as all there are, and the kernel refuses numbers that mean nothing to it. The size is sealed, so that
//!   no page can vanish under the reader.
//! * All of it is reserved at once and sparse: memory is taken where a word was written, and stays in memory.
//!
//! Not for: any decision.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

use crate::fuse::request::NodeId;
use crate::rt::Instant;

const DEADLINE: usize = 0;
const ORDER: usize = 1;
const CAUSE: usize = 2;
const USED: usize = 3;
const HEADER_WORDS: usize = 512;
/// The kernel needs a hundred times the memory for each.
pub(crate) const MOST_NODES: usize = 1 << 26;
const WORDS: usize = HEADER_WORDS + MOST_NODES;
const BYTES: usize = WORDS * size_of::<u64>();

/// What the daemon wants of its guard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Watch,
    /// The kernel can show nothing any more: end.
    End,
    /// Silence the kernel now.
    Silence,
}

const ORDER_END: u64 = 0x656e_6421_656e_6421;
const ORDER_SILENCE: u64 = 0x7368_7368_7368_7368;

/// Why a guard acted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    LeaseOver,
    DaemonGone,
    Told,
}

impl Cause {
    const ALL: [Cause; 3] = [Cause::LeaseOver, Cause::DaemonGone, Cause::Told];

    fn word(self) -> u64 {
        self as u64 + 1
    }
}

impl std::fmt::Display for Cause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Cause::LeaseOver => "the lease is over and the daemon did not renew it",
            Cause::DaemonGone => "the daemon is gone",
            Cause::Told => "the daemon asked for it",
        })
    }
}

/// Mapped by both.
pub(crate) struct GuardMemory {
    file: OwnedFd,
    words: NonNull<AtomicU64>,
}

// SAFETY: the memory is reached through atomics only, and unmapped only when nobody refers to this any more.
unsafe impl Send for GuardMemory {}
// SAFETY: as above.
unsafe impl Sync for GuardMemory {}

impl GuardMemory {
    /// The daemon's: new, and empty.
    pub(crate) fn new() -> io::Result<GuardMemory> {
        let file = memfd_create(c"lunfs-guard", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&file, BYTES as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        GuardMemory::map(file)
    }

    /// The guard's, of what the daemon gave it.
    pub(crate) fn open(file: OwnedFd) -> io::Result<GuardMemory> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS)?;
        if seals & libc::F_SEAL_SHRINK == 0 {
            return Err(wrong("the shared memory could shrink"));
        }
        let file = File::from(file);
        if file.metadata()?.len() != BYTES as u64 {
            return Err(wrong("the shared memory has a wrong size"));
        }
        GuardMemory::map(file.into())
    }

    fn map(file: OwnedFd) -> io::Result<GuardMemory> {
        let len = std::num::NonZeroUsize::new(BYTES).ok_or(io::ErrorKind::InvalidInput)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is BYTES long and sealed against
        // shrinking, so every word of it can be reached as long as the mapping lives.
        let words = unsafe { mmap(None, len, prot, MapFlags::MAP_SHARED, &file, 0) }?;
        let memory = GuardMemory { file, words: words.cast() };
        memory.keep_in_memory();
        Ok(memory)
    }

    /// Swapped out, the table could not be read when the disk with the swap space is what failed. Users have no
    /// right to so much; then it stays as it is.
    fn keep_in_memory(&self) {
        // SAFETY: the range is our mapping; mlock2 changes no byte of it.
        let locked = unsafe { libc::mlock2(self.words.as_ptr().cast(), BYTES, libc::MLOCK_ONFAULT) };
        if locked < 0 {
            log::debug!("the guard's table can be swapped out: {}", io::Error::last_os_error());
        }
    }

    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is WORDS words long, aligned to pages, and lives as long as `self`; other processes
        // change it in whole words only as far as they keep the rules, and a torn number is but a wrong number.
        unsafe { std::slice::from_raw_parts(self.words.as_ptr(), WORDS) }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.words()[index]
    }

    /// The lease runs until then. True: none was known before.
    pub(crate) fn extend(&self, until: Instant) -> bool {
        self.word(DEADLINE).fetch_max(until.as_nanos(), Ordering::AcqRel) == 0
    }

    /// `None`: no lease is known.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.word(DEADLINE).load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Instant::from_nanos(nanos)),
        }
    }

    pub(crate) fn give_order(&self, order: Order) {
        let word = match order {
            Order::Watch => 0,
            Order::End => ORDER_END,
            Order::Silence => ORDER_SILENCE,
        };
        self.word(ORDER).store(word, Ordering::Release);
    }

    pub(crate) fn order(&self) -> Order {
        match self.word(ORDER).load(Ordering::Acquire) {
            ORDER_END => Order::End,
            ORDER_SILENCE => Order::Silence,
            _ => Order::Watch,
        }
    }

    pub(crate) fn acts(&self, cause: Cause) {
        self.word(CAUSE).store(cause.word(), Ordering::Release);
    }

    /// Why a guard acted, if one did.
    pub(crate) fn acted(&self) -> Option<Cause> {
        let word = self.word(CAUSE).load(Ordering::Acquire);
        Cause::ALL.into_iter().find(|cause| cause.word() == word)
    }

    /// Makes the first `count` node words part of the table; never fewer than before.
    pub(crate) fn use_up_to(&self, count: usize) {
        self.word(USED).fetch_max(count as u64, Ordering::AcqRel);
    }

    /// `index` is below [`MOST_NODES`].
    pub(crate) fn set_node(&self, index: usize, node: Option<NodeId>) {
        self.word(HEADER_WORDS + index).store(node.map_or(0, |node| node.0), Ordering::Release);
    }

    /// Every node in the table.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        let used = self.word(USED).load(Ordering::Acquire).min(MOST_NODES as u64) as usize;
        let words = &self.words()[HEADER_WORDS..HEADER_WORDS + used];
        words.iter().map(|word| word.load(Ordering::Acquire)).filter(|node| *node != 0).map(NodeId)
    }
}

impl Drop for GuardMemory {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `map` mapped; no reference into it outlives `self`.
        let _ = unsafe { munmap(self.words.cast(), BYTES) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_other_side_sees_it_and_doubts_it() {
        let ours = GuardMemory::new().expect("memory");
        let theirs = GuardMemory::open(ours.file.try_clone().expect("a duplicate")).expect("the same");
        assert_eq!((theirs.deadline(), theirs.order(), theirs.acted()), (None, Order::Watch, None));
        assert_eq!(theirs.nodes().count(), 0);
        ours.use_up_to(3);
        ours.set_node(0, Some(NodeId(70)));
        ours.set_node(2, Some(NodeId(72)));
        assert_eq!(theirs.nodes().collect::<Vec<_>>(), [NodeId(70), NodeId(72)]);
        ours.set_node(0, None);
        assert_eq!(theirs.nodes().collect::<Vec<_>>(), [NodeId(72)]);
        assert!(ours.extend(Instant::from_nanos(50)));
        assert!(!ours.extend(Instant::from_nanos(40)));
        assert_eq!(theirs.deadline(), Some(Instant::from_nanos(50)));
        for order in [Order::End, Order::Silence, Order::Watch] {
            ours.give_order(order);
            assert_eq!(theirs.order(), order);
        }
        for cause in Cause::ALL {
            theirs.acts(cause);
            assert_eq!(ours.acted(), Some(cause));
        }
        // A daemon gone mad.
        ours.word(ORDER).store(77, Ordering::Relaxed);
        ours.word(CAUSE).store(u64::MAX, Ordering::Relaxed);
        ours.word(USED).store(u64::MAX, Ordering::Relaxed);
        assert_eq!((theirs.order(), theirs.acted()), (Order::Watch, None));
        assert_eq!(theirs.nodes().next(), Some(NodeId(72)), "and the whole of it ends");
        assert!(nix::unistd::ftruncate(&ours.file, 4096).is_err(), "sealed");
    }

    #[test]
    fn other_memory_is_refused() {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let small = memfd_create(c"small", flags).expect("a memfd");
        assert!(GuardMemory::open(small.try_clone().expect("a duplicate")).is_err(), "not sealed");
        fcntl(&small, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).expect("sealed");
        assert!(GuardMemory::open(small).is_err(), "too small");
        assert!(GuardMemory::open(File::open("/dev/null").expect("open").into()).is_err());
    }
}
