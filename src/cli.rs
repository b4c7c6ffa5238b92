//! The subcommands.
pub mod locks;
pub mod mkfs;
pub mod status;
