//! What the running kernel can do for us, found once per mount and printed then.
//!
//! Two columns of behaviour follow from it:
//!
//! | ability | with it | without it |
//! | --- | --- | --- |
//! | `INC_EPOCH` (Linux 6.16) | names are cached as long as their directory's lock is held | names get time 0: each step of a path is asked anew. The other ways to forget names wait for requests in that directory, which may wait for the very lock we are giving up |
//! | shared mmap under direct I/O (Linux 6.6) | every open that may write bypasses the page cache | an open for reading and writing is cached, and pins the exclusive lock until RELEASE |
//!
//! `-o kernel=old` selects the second column on a new kernel, so that both are tested.

use std::fmt;

/// The first protocol minor (of major 7) whose kernel knows `FUSE_NOTIFY_INC_EPOCH`.
const MINOR_INC_EPOCH: u32 = 44;
/// ... and `FOPEN_PARALLEL_DIRECT_WRITES`.
const MINOR_PARALLEL_DIRECT_WRITES: u32 = 38;

/// What the kernel offered and what of it we use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    pub kernel_release: String,
    /// The kernel's own protocol version, not the one agreed on with the transport.
    pub protocol: (u32, u32),
    pub inc_epoch: bool,
    pub direct_io_mmap: bool,
    pub parallel_direct_writes: bool,
    pub parallel_directory_operations: bool,
    pub atomic_truncate: bool,
    pub async_direct_io: bool,
    pub explicit_invalidation: bool,
    pub cached_symlinks: bool,
    pub max_write_bytes: u32,
    /// The second column was asked for.
    pub pretend_old: bool,
}

/// Flags of the INIT request that matter, by what they mean; filled by the transport.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfferedFlags {
    pub direct_io_mmap: bool,
    pub parallel_directory_operations: bool,
    pub atomic_truncate: bool,
    pub async_direct_io: bool,
    pub explicit_invalidation: bool,
    pub cached_symlinks: bool,
}

impl Capabilities {
    pub fn new(
        protocol: (u32, u32),
        offered: OfferedFlags,
        max_write_bytes: u32,
        pretend_old: bool,
    ) -> Capabilities {
        Capabilities {
            kernel_release: nix::sys::utsname::uname()
                .map(|u| u.release().to_string_lossy().into_owned())
                .unwrap_or_else(|_| "unknown".into()),
            protocol,
            inc_epoch: protocol >= (7, MINOR_INC_EPOCH) && !pretend_old,
            direct_io_mmap: offered.direct_io_mmap && !pretend_old,
            parallel_direct_writes: protocol >= (7, MINOR_PARALLEL_DIRECT_WRITES) && !pretend_old,
            parallel_directory_operations: offered.parallel_directory_operations,
            atomic_truncate: offered.atomic_truncate,
            async_direct_io: offered.async_direct_io,
            explicit_invalidation: offered.explicit_invalidation,
            cached_symlinks: offered.cached_symlinks,
            max_write_bytes,
            pretend_old,
        }
    }

    /// Without this the kernel throws pages away on its own ideas, or keeps what it must not keep.
    pub fn missing_essentials(&self) -> Option<&'static str> {
        if !self.atomic_truncate {
            return Some("truncation by open (FUSE_ATOMIC_O_TRUNC)");
        }
        None
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |b: bool| if b { "yes" } else { "no" };
        writeln!(
            f,
            "kernel {} speaks FUSE {}.{}{}",
            self.kernel_release,
            self.protocol.0,
            self.protocol.1,
            if self.pretend_old { ", treated as an old one (kernel=old)" } else { "" }
        )?;
        writeln!(
            f,
            "  forget all names (INC_EPOCH)         {:3} {}",
            yes(self.inc_epoch),
            if self.inc_epoch {
                "names are cached under their lock"
            } else {
                "names are asked anew each time"
            }
        )?;
        writeln!(
            f,
            "  shared mmap under direct I/O         {:3} {}",
            yes(self.direct_io_mmap),
            if self.direct_io_mmap {
                "writable opens bypass the page cache"
            } else {
                "read-write opens are cached and pin their lock"
            }
        )?;
        writeln!(f, "  parallel direct writes               {}", yes(self.parallel_direct_writes))?;
        writeln!(f, "  parallel lookups in a directory      {}", yes(self.parallel_directory_operations))?;
        writeln!(f, "  invalidation only when told          {}", yes(self.explicit_invalidation))?;
        writeln!(f, "  asynchronous direct I/O              {}", yes(self.async_direct_io))?;
        writeln!(f, "  cached symbolic links                {}", yes(self.cached_symlinks))?;
        write!(f, "  largest write                        {} KiB", self.max_write_bytes / 1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_gets_the_second_column() {
        let offered = OfferedFlags { direct_io_mmap: true, ..Default::default() };
        let new = Capabilities::new((7, 45), offered, 1 << 20, false);
        assert!(new.inc_epoch && new.direct_io_mmap && new.parallel_direct_writes);
        let pretended = Capabilities::new((7, 45), offered, 1 << 20, true);
        assert!(!pretended.inc_epoch && !pretended.direct_io_mmap);
        let old = Capabilities::new((7, 36), OfferedFlags::default(), 1 << 20, false);
        assert!(!old.inc_epoch && !old.direct_io_mmap && !old.parallel_direct_writes);
    }
}
