//! The filesystem: lookup, create, read, write, rename. Knows no FUSE and no SCSI.

pub mod api;
pub mod dirtree;
pub mod extents;
