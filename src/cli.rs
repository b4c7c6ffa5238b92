//! The command line: parses arguments and calls one function of the rooms below.
//!
//! One program for everything. Called as `mount.lunfs` or `umount.fuse.lunfs` it is the helper that mount(8)
//! and umount(8) look for; `contrib/install.sh` makes the links. Mounting has the exit statuses of mount(8);
//! the other subcommands say theirs.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub mod bench;
pub mod check_device;
mod control_service;
mod daemonize;
pub mod demo;
mod ending;
pub mod fsck;
mod guard;
pub mod locks;
mod logging;
pub mod mkfs;
pub mod mount;
pub mod mount_options;
mod runtime_files;
pub mod scene;
pub mod scrub;
mod slot_wait;
pub mod stats_socket;
pub mod status;
mod umount;

/// Wrong invocation.
pub const EXIT_USAGE: u8 = 1;
/// Wrong invocation of a subcommand that mount(8) has no say in.
const EXIT_USAGE_ELSEWHERE: u8 = 2;
/// Out of memory, threads, descriptors and the like.
pub const EXIT_SYSTEM: u8 = 2;
/// The mount could not be made.
pub const EXIT_MOUNT: u8 = 32;

#[derive(Parser)]
#[command(name = "lunfs", version, about = "A clustered filesystem for a LUN that several hosts see at once")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Mount a volume on a directory.
    Mount(mount::Args),
    /// Unmount and wait until the volume was left.
    Umount(umount::Args),
    Mkfs(mkfs::Args),
    Fsck(fsck::Args),
    Scrub(scrub::Args),
    Demo(demo::Args),
    Bench(bench::Args),
    Status(status::Args),
    Locks(locks::Args),
    CheckDevice(check_device::Args),
    #[command(hide = true)]
    Guard(guard::Args),
}

/// Runs the program; `argv[0]` says under which name.
pub fn main(argv: Vec<OsString>) -> ExitCode {
    let name = argv.first().and_then(|name| Path::new(name).file_name()).map(|name| name.as_bytes());
    let subcommand = match name {
        Some(b"mount.lunfs" | b"mount.fuse.lunfs") => Some("mount"),
        Some(b"umount.lunfs" | b"umount.fuse.lunfs") => Some("umount"),
        Some(b"mkfs.lunfs") => Some("mkfs"),
        Some(b"fsck.lunfs") => Some("fsck"),
        _ => None,
    };
    let mut arguments = vec![OsString::from("lunfs")];
    arguments.extend(subcommand.map(OsString::from));
    arguments.extend(argv.into_iter().skip(1));
    let cli = match Cli::try_parse_from(&arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors.
            let usage = match arguments.get(1).and_then(|a| a.to_str()) {
                Some("mount" | "umount") => EXIT_USAGE,
                Some("fsck" | "scrub") => fsck::EXIT_USAGE,
                _ => EXIT_USAGE_ELSEWHERE,
            };
            let status = if error.use_stderr() { usage } else { 0 };
            let _ = error.print();
            return ExitCode::from(status);
        }
    };
    let raw = arguments.split_off(2.min(arguments.len()));
    match cli.command {
        Command::Mount(args) => mount::run(args, &raw),
        Command::Umount(args) => umount::run(args),
        Command::Mkfs(args) => mkfs::run(args),
        Command::Fsck(args) => fsck::run(args),
        Command::Scrub(args) => scrub::run(args),
        Command::Demo(args) => demo::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Status(args) => status::run(args),
        Command::Locks(args) => locks::run(args),
        Command::CheckDevice(args) => check_device::run(args),
        Command::Guard(args) => guard::run(args),
    }
}

/// Why a command ended badly: the status and the one line for stderr.
#[derive(Debug)]
pub struct Failure {
    pub status: u8,
    pub message: String,
}

impl Failure {
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure { status: EXIT_USAGE, message: message.into() }
    }
    pub fn system(message: impl Into<String>) -> Failure {
        Failure { status: EXIT_SYSTEM, message: message.into() }
    }
    pub fn mount(message: impl Into<String>) -> Failure {
        Failure { status: EXIT_MOUNT, message: message.into() }
    }
    /// The message without line breaks.
    pub fn one_line(&self) -> String {
        self.message.split_whitespace().collect::<Vec<_>>().join(" ")
    }
}
