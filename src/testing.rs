//! Not part of the filesystem: what tests need and users don't.
//!
//! * [`memfs`]: the operations in memory, simple enough to be believed; the reference the real
//!   filesystem is compared with, and a partner for testing the kernel's door
//! * [`memfs_control`]: pulls its strings from another process

pub mod memfs;
pub mod memfs_control;
