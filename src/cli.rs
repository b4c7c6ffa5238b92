//! The subcommands.
pub mod locks;
pub mod status;
