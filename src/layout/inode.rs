//! The inode body: attributes, and in its content area inline bytes or the root of a tree.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::geometry::lock_of_inode;
use super::{Block, Header, LayoutError, Magic, verify};
use crate::types::{BLOCK_BYTES, InodeNo, VolumeId};

/// Where the content area begins, and how long it is.
pub const CONTENT_OFFSET: usize = 256;
pub const CONTENT_BYTES: usize = BLOCK_BYTES - CONTENT_OFFSET;

/// Flag of a body: extents behind the end of the file wait to be freed.
pub const TRUNCATING: u32 = 1;
/// Flag of a body: made without a name, which it may get.
pub const LINKABLE: u32 = 2;
/// Flags of a body that this program knows.
pub const KNOWN_FLAGS: u32 = TRUNCATING | LINKABLE;

/// What the content area holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// The inode is free; lock, counters and generation stay.
    Free,
    /// `size` bytes of file data or of a symbolic link's target.
    Inline,
    /// The root of a tree: extents of a file, or entries of a directory.
    Tree,
    /// Nothing: devices, pipes, sockets.
    Empty,
}

/// A point in time: seconds since 1970 and nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Timestamp {
    pub secs: i64,
    pub nanos: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TimestampDisk {
    pub secs: I64,
    pub nanos: U32,
}

/// The inode body as it lies on the volume.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InodeDisk {
    /*000*/ pub header: Header,
    /// Raised each time the inode is used anew.
    /*040*/
    pub generation: U32,
    /// File type and permission bits as in stat(2); 0 for a free inode.
    /*044*/
    pub mode: U32,
    /*048*/ pub uid: U32,
    /*04c*/ pub gid: U32,
    /*050*/ pub nlink: U32,
    /*054*/ pub flags: U32,
    /// Bytes; for a directory the number of its entries times 32, as a hint for tools.
    /*058*/
    pub size: U64,
    /// Blocks of 4 KiB outside the body: data, tree nodes.
    /*060*/
    pub blocks: U64,
    /*068*/ pub rdev: U32,
    /*06c*/ pub form: u8,
    /*06d*/ pub reserved0: u8,
    /*06e*/ pub reserved1: U16,
    /*070*/ pub atime: TimestampDisk,
    /*07c*/ pub mtime: TimestampDisk,
    /*088*/ pub ctime: TimestampDisk,
    /*094*/ pub btime: TimestampDisk,
    /// The directory of the first name and that name's key there: for paths in tools and for orphan repair.
    /*0a0*/
    pub parent: U64,
    /*0a8*/ pub parent_key: U64,
    /// Entries of a directory.
    /*0b0*/
    pub entries: U64,
    /// Root of the extended attributes; 0: none.
    /*0b8*/
    pub xattr: U64,
    /// Raised by every change.
    /*0c0*/
    pub change: U64,
    /*0c8*/ pub reserved: [u8; CONTENT_OFFSET - 0xc8],
    /*100*/ pub content: [u8; CONTENT_BYTES],
}
const _: () = assert!(size_of::<InodeDisk>() == BLOCK_BYTES);
const _: () = assert!(std::mem::offset_of!(InodeDisk, content) == CONTENT_OFFSET);

impl From<TimestampDisk> for Timestamp {
    fn from(t: TimestampDisk) -> Self {
        Timestamp { secs: t.secs.get(), nanos: t.nanos.get().min(999_999_999) }
    }
}

impl From<Timestamp> for TimestampDisk {
    fn from(t: Timestamp) -> Self {
        TimestampDisk { secs: I64::new(t.secs), nanos: U32::new(t.nanos) }
    }
}

impl Form {
    pub fn code(self) -> u8 {
        match self {
            Form::Free => 0,
            Form::Inline => 1,
            Form::Tree => 2,
            Form::Empty => 3,
        }
    }
    pub fn from_code(code: u8) -> Option<Self> {
        [Form::Free, Form::Inline, Form::Tree, Form::Empty].into_iter().find(|f| f.code() == code)
    }
}

impl InodeDisk {
    /// A free inode, as it is born in its group (not sealed).
    pub fn new_free(volume: VolumeId, ino: InodeNo) -> Self {
        let mut this = InodeDisk::new_zeroed();
        this.header = Header::new(Magic::Inode, volume, ino.body(), lock_of_inode(ino));
        this
    }

    /// Checks a body just read.
    pub fn parse(block: &Block, volume: VolumeId, ino: InodeNo) -> Result<&Self, LayoutError> {
        let (what, at) = (Magic::Inode.name(), ino.body());
        verify(&block[..], Magic::Inode, volume, at)?;
        let this = Self::ref_from_bytes(&block[..]).map_err(|_| LayoutError::Short { what, at })?;
        let bad = |field, value| Err(LayoutError::Field { what, at, field, value });
        let Some(form) = Form::from_code(this.form) else { return bad("form", this.form.into()) };
        if this.header.lock.get() != lock_of_inode(ino).0 {
            return bad("lock", this.header.lock.get());
        }
        if form == Form::Inline && this.size.get() > CONTENT_BYTES as u64 {
            return bad("size", this.size.get());
        }
        if (form == Form::Free) != (this.mode.get() == 0) {
            return bad("mode", this.mode.get().into());
        }
        Ok(this)
    }

    /// The body in a block that was parsed before, for reading.
    pub fn of(block: &Block) -> &Self {
        zerocopy::transmute_ref!(block)
    }

    /// The body in a block that was parsed before, for changing.
    pub fn of_mut(block: &mut Block) -> &mut Self {
        zerocopy::transmute_mut!(block)
    }

    pub fn form(&self) -> Form {
        Form::from_code(self.form).unwrap_or(Form::Free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{seal, zero_block};

    #[test]
    fn a_free_inode_parses_and_a_bad_size_does_not() {
        let (volume, ino) = (VolumeId([2; 16]), InodeNo(88));
        let mut block = zero_block();
        block.copy_from_slice(InodeDisk::new_free(volume, ino).as_bytes());
        seal(&mut block[..]);
        InodeDisk::parse(&block, volume, ino).unwrap();
        let body = InodeDisk::of_mut(&mut block);
        body.form = Form::Inline.code();
        body.mode = U32::new(0o100644);
        body.size = U64::new(CONTENT_BYTES as u64 + 1);
        seal(&mut block[..]);
        assert!(matches!(
            InodeDisk::parse(&block, volume, ino),
            Err(LayoutError::Field { field: "size", .. })
        ));
    }
}
