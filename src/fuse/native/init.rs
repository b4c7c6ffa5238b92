//! The first exchange: what the kernel can do, and what of it is wanted.
//!
//! Not for: what follows from it ([`Capabilities`]).

use std::io;

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{self, InitFlags, InitIn, InitInMore, InitOut, opcode};
use super::channel::{Channel, Inbox};
use super::decode::Message;
use crate::fuse::capabilities::{Capabilities, OfferedFlags};
use crate::types::BLOCK_BYTES;

/// Before this minor (Linux 3.15) answers have other forms.
const OLDEST_MINOR: u32 = 23;

/// What this mount wants of the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    pub max_write_bytes: u32,
    pub max_background: u16,
    /// Behave as on a kernel without the newer abilities.
    pub pretend_old: bool,
}

/// Answers INIT, which is the first request of a connection.
pub fn agree(channel: &Channel, inbox: &mut Inbox, wishes: &Wishes) -> io::Result<Capabilities> {
    let unclear = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's INIT can't be understood");
    loop {
        let gone = || io::Error::other("the mount went away before INIT");
        let bytes = channel.receive(inbox)?.ok_or_else(gone)?;
        let message = Message::read(bytes).map_err(|_| unclear())?;
        if message.opcode != opcode::INIT {
            return Err(unclear());
        }
        let (offer, more) = InitIn::ref_from_prefix(message.body()).map_err(|_| unclear())?;
        let more = InitInMore::ref_from_prefix(more).ok().map(|(more, _)| more);
        let (major, minor) = (offer.major.get(), offer.minor.get());
        if major > abi::MAJOR {
            // It asks again, in our words.
            let out = InitOut { major: abi::MAJOR.into(), minor: abi::MINOR.into(), ..Default::default() };
            channel.answer(message.unique, 0, &[out.as_bytes()])?;
            continue;
        }
        let refuse = |why: &str| {
            log::error!("the kernel has no {why}");
            let _ = channel.answer(message.unique, -libc::EPROTO, &[]);
            Err(io::Error::from_raw_os_error(libc::EPROTO))
        };
        if (major, minor) < (abi::MAJOR, OLDEST_MINOR) {
            return refuse("FUSE of this century's second decade (7.23)");
        }
        let mut offered = InitFlags::from_bits_retain(offer.flags.get().into());
        if offered.contains(InitFlags::INIT_EXT)
            && let Some(more) = more
        {
            offered |= InitFlags::from_bits_retain(u64::from(more.flags2.get()) << 32);
        }
        let capabilities =
            Capabilities::new((major, minor), flags(offered), wishes.max_write_bytes, wishes.pretend_old);
        if let Some(missing) = capabilities.missing_essentials() {
            return refuse(missing);
        }
        let wanted = wanted(&capabilities) & offered;
        let out = InitOut {
            major: abi::MAJOR.into(),
            minor: minor.min(abi::MINOR).into(),
            max_readahead: offer.max_readahead,
            flags: (wanted.bits() as u32).into(),
            flags2: ((wanted.bits() >> 32) as u32).into(),
            max_background: wishes.max_background.into(),
            // Where the kernel begins to slow writers down; its own default is this part, too.
            congestion_threshold: (wishes.max_background / 4 * 3).max(1).into(),
            max_write: wishes.max_write_bytes.into(),
            time_gran: 1.into(),
            max_pages: ((wishes.max_write_bytes as usize / BLOCK_BYTES) as u16).into(),
            ..Default::default()
        };
        channel.answer(message.unique, 0, &[out.as_bytes()])?;
        return Ok(capabilities);
    }
}

fn flags(offered: InitFlags) -> OfferedFlags {
    let has = |flag| offered.contains(flag);
    OfferedFlags {
        direct_io_mmap: has(InitFlags::DIRECT_IO_ALLOW_MMAP),
        parallel_directory_operations: has(InitFlags::PARALLEL_DIROPS),
        atomic_truncate: has(InitFlags::ATOMIC_O_TRUNC),
        async_direct_io: has(InitFlags::ASYNC_DIO),
        explicit_invalidation: has(InitFlags::EXPLICIT_INVAL_DATA),
        cached_symlinks: has(InitFlags::CACHE_SYMLINKS),
    }
}

/// Why others are not wanted stands at the transport by the library.
fn wanted(capabilities: &Capabilities) -> InitFlags {
    let mut wanted = InitFlags::ASYNC_READ
        | InitFlags::ATOMIC_O_TRUNC
        | InitFlags::BIG_WRITES
        | InitFlags::ASYNC_DIO
        | InitFlags::PARALLEL_DIROPS
        | InitFlags::MAX_PAGES
        | InitFlags::CACHE_SYMLINKS
        | InitFlags::EXPLICIT_INVAL_DATA
        | InitFlags::INIT_EXT;
    wanted.set(InitFlags::DIRECT_IO_ALLOW_MMAP, capabilities.direct_io_mmap);
    wanted
}
