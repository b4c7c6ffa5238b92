//! Unmounts and waits until the daemon has left the volume.
//!
//! On type `fuse` the kernel does not wait for the daemon: umount(2) returns while it still flushes, and a
//! script's next step (fsck, mkfs, unmapping the LUN) would meet a volume in use.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use super::{EXIT_SYSTEM, Failure, daemonize, runtime_files};
use crate::fuse::mountinfo;

const PATIENCE: Duration = Duration::from_secs(90);

#[derive(clap::Args)]
pub(super) struct Args {
    /// The directory (or the device), and options of umount(8).
    #[arg(required = true, allow_hyphen_values = true, trailing_var_arg = true)]
    arguments: Vec<OsString>,
}

pub(super) fn run(args: Args) -> ExitCode {
    match unmount(&args.arguments) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            daemonize::report(&failure);
            ExitCode::from(failure.status)
        }
    }
}

fn unmount(arguments: &[OsString]) -> Result<u8, Failure> {
    let target = find_target(arguments);
    let device = target.as_deref().and_then(find_device);
    let daemons = device.map(runtime_files::daemons_of_mount).unwrap_or_default();
    // Counted now: once it is unmounted its number may be that of another mount.
    let mounts = device.map_or(Ok(0), mountinfo::count).unwrap_or(0);
    let lazy = arguments.iter().any(|a| is_short_flag(a, 'l') || a == "--lazy");
    let helper = target.as_deref().filter(|_| device.is_some() && !nix::unistd::geteuid().is_root());
    let mut command = match helper {
        // Who mounted by fusermount3 may unmount only by it.
        Some(target) => {
            let mut command = Command::new("fusermount3");
            command.arg(if lazy { "-uz" } else { "-u" }).arg("--").arg(target);
            command
        }
        // -i: not by way of helpers, which would be ourselves.
        None => {
            let mut command = Command::new("umount");
            command.arg("-i").args(arguments);
            command
        }
    };
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().map_err(|e| Failure::system(format!("cannot run {program}: {e}")))?;
    if !status.success() {
        return Ok(status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(EXIT_SYSTEM));
    }
    // Detached, or mounted elsewhere too: the daemon stays for those who still use it.
    let still = || device.is_some_and(|device| mountinfo::is_mounted(device).unwrap_or(false));
    let elsewhere = mounts > 1 && still();
    if lazy || elsewhere {
        return Ok(0);
    }
    for daemon in daemons {
        if !daemon.wait_until_gone(PATIENCE) {
            let waited = PATIENCE.as_secs();
            return Err(Failure::system(format!(
                "unmounted, but the daemon still works on the volume after {waited} s"
            )));
        }
    }
    Ok(0)
}

fn is_short_flag(argument: &OsString, flag: char) -> bool {
    argument.to_str().is_some_and(|a| a.starts_with('-') && !a.starts_with("--") && a.contains(flag))
}

/// The first argument that is neither an option nor the value of one.
fn find_target(arguments: &[OsString]) -> Option<PathBuf> {
    let mut arguments = arguments.iter();
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        if matches!(&*text, "-t" | "-N" | "-O" | "--types" | "--namespace" | "--test-opts") {
            arguments.next();
        } else if !text.starts_with('-') {
            return Some(PathBuf::from(argument));
        }
    }
    None
}

/// The mount on this directory, or the last one of this source.
fn find_device(target: &Path) -> Option<(u32, u32)> {
    let mounts = mountinfo::read().ok()?;
    let resolved = mountinfo::resolve_without_touching(target).unwrap_or_else(|_| target.to_owned());
    let ours = || mounts.iter().rev().filter(|m| m.is_lunfs());
    let found =
        ours().find(|m| m.mountpoint == resolved).or_else(|| ours().find(|m| m.source == target.as_os_str()));
    found.map(|m| m.device)
}
