//! `lunfs guard`, which nobody types: the process that a mount's daemon starts to silence the kernel in its place.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::{EXIT_SYSTEM, daemonize, logging};
use crate::fuse::guard::{self, GuardOptions};
use crate::fuse::silence::Place;

/// A mount's guard. Started by `lunfs mount`; of no use otherwise.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Major and minor number of the mount.
    #[arg(long, value_parser = parse_device)]
    device: (u32, u32),
    /// Log to this file.
    #[arg(long)]
    log: Option<PathBuf>,
    /// Log to the system's log.
    #[arg(long, conflicts_with = "log")]
    syslog: bool,
    /// Where it is mounted.
    directory: PathBuf,
}

/// How a daemon that logs to `log` (or, without a file, to the system's log or stderr) starts its guard.
pub(super) fn options(log: Option<&PathBuf>, is_daemon: bool, keep: std::os::fd::OwnedFd) -> GuardOptions {
    let mut arguments = vec![OsString::from("guard")];
    match log {
        Some(path) => arguments.extend([OsString::from("--log"), path.into()]),
        None if is_daemon => arguments.push("--syslog".into()),
        None => {}
    }
    // Not the path of the program: there may be another version by now, or none.
    GuardOptions { program: "/proc/self/exe".into(), arguments, keep: Some(Arc::new(keep)) }
}

fn parse_device(text: &str) -> Result<(u32, u32), String> {
    let numbers =
        text.split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    numbers.ok_or_else(|| "MAJOR:MINOR is expected".into())
}

pub(super) fn run(args: Args) -> ExitCode {
    let place = Place { mountpoint: args.directory, device: args.device };
    let (log, syslog) = (args.log, args.syslog);
    let set_up_log = move || {
        let logs = match &log {
            Some(path) => logging::to_file(path),
            None if syslog => {
                logging::to_syslog();
                Ok(())
            }
            None => {
                logging::to_stderr();
                return;
            }
        };
        if let Err(error) = logs.and_then(|()| daemonize::close_stderr()) {
            log::warn!("the guard's log: {error}");
        }
    };
    match guard::run(place, set_up_log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("the guard can't watch: {error}");
            ExitCode::from(EXIT_SYSTEM)
        }
    }
}
