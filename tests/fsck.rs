//! Does fsck find what is wrong, name it, and say it by its exit status?

#[path = "fsck/command.rs"]
mod command;
mod volumes;
