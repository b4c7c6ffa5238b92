//! What the hosts of a cluster share: an image, or a LUN of a target.

use std::path::PathBuf;

use lunfs_test_target::others::{Istgt, Tgtd, TgtdOptions, Unavailable, had};

/// What the hosts share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    /// One image file, opened by every daemon, with logical blocks of this many bytes.
    File(u32),
    /// A loop device per host over one image, with sectors of this many bytes.
    Loop(u32),
    /// A LUN of an iSCSI target that the test's process serves, with logical blocks of this many bytes.
    Iscsi(u32),
    /// A LUN of a target that other people wrote.
    Tgtd,
    Istgt,
}

/// A target that other people wrote, for one cluster.
pub enum Stranger {
    Tgtd(Tgtd),
    Istgt(Istgt),
}

impl Stranger {
    pub fn start(backing: Backing, bytes: u64) -> Result<Stranger, Unavailable> {
        match backing {
            Backing::Istgt => Istgt::start(bytes).map(Stranger::Istgt),
            _ => Tgtd::start(TgtdOptions { bytes, ..TgtdOptions::default() }).map(Stranger::Tgtd),
        }
    }

    pub fn url(&self) -> String {
        match self {
            Stranger::Tgtd(tgtd) => tgtd.url(),
            Stranger::Istgt(istgt) => istgt.url(),
        }
    }

    pub fn image(&self) -> PathBuf {
        match self {
            Stranger::Tgtd(tgtd) => tgtd.image(),
            Stranger::Istgt(istgt) => istgt.image(),
        }
    }
}

/// Can such a target be had here? If not, it says so.
pub fn can_serve(backing: Backing) -> bool {
    had(Stranger::start(backing, 64 << 20)).is_some()
}
