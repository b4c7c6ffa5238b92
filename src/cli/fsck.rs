//! `lunfs fsck`, also installed as `fsck.lunfs`: arguments to one call of [`fsck::examine`] or [`repair`].
//!
//! The exit status is that of fsck(8). Standard output gets the findings and a summary, or JSON; standard error
//! gets errors and, when it is a terminal, a progress bar.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use thiserror::Error;

use crate::device::OpenError;
use crate::device::open::{OpenOptions, open_device, shown};
use crate::format::in_use::{InUse, in_use};
use crate::fsck::finding::Finding;
use crate::fsck::repair::{Allow, Repaired, repair};
use crate::fsck::{self, FsckError, Observer, Progress};
use crate::volume::{FencingMode, HostOpenError, local_identity, open_as_host};

/// Nothing is wrong.
const EXIT_CLEAN: u8 = 0;
/// Errors were found and repaired.
const EXIT_REPAIRED: u8 = 1;
/// Errors were found and are still there.
const EXIT_LEFT: u8 = 4;
/// The volume could not be checked.
const EXIT_OPERATIONAL: u8 = 8;
/// Wrong invocation.
pub const EXIT_USAGE: u8 = 16;
const EXIT_CANCELLED: u8 = 32;
/// The system did not give what the program needs.
const EXIT_SYSTEM: u8 = 128;

/// Shown at the end of the help.
pub const EXIT_STATUS: &str = "Exit status, as of fsck(8): 0 nothing wrong, 1 errors repaired, 4 errors left, 8 could not be checked, \
                               16 wrong usage, 32 cancelled, 128 out of system resources.";

/// Check, and with -p or -y repair, a LunFS volume that no host uses.
#[derive(clap::Args, Debug)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// A block device or a file.
    pub device: String,
    /// Only check; write nothing. It is what is done without any option, too.
    #[arg(short = 'n')]
    pub no_changes: bool,
    /// Repair what loses nothing and has one possible outcome.
    #[arg(short = 'p', visible_short_alias = 'a', conflicts_with_all = ["no_changes", "everything"])]
    pub preen: bool,
    /// Repair everything, also where something is given up.
    #[arg(short = 'y', conflicts_with = "no_changes")]
    pub everything: bool,
    /// Findings and summary as one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Check although the volume says that it is clean: done in any case.
    #[arg(short = 'f', hide = true)]
    pub force: bool,
    /// Descriptor for progress, as fsck(8) passes it; the bar goes to a terminal only.
    #[arg(short = 'C', hide = true, num_args = 0..=1, require_equals = false, value_name = "FD")]
    pub progress: Option<Option<i32>>,
    /// Logical block of a file, 512 or 4096, as if it were a disk with such blocks.
    #[arg(long, value_parser = super::mkfs::logical_block, hide = true)]
    pub logical_block: Option<u32>,
}

#[derive(Debug, Error)]
enum Failure {
    #[error("'{device}': {use_}; unmount it first")]
    InUse { device: String, use_: InUse },
    #[error("{0}")]
    Open(#[from] OpenError),
    #[error("{0}")]
    OpenAsHost(#[from] HostOpenError),
    #[error("'{device}': {error}")]
    Fsck { device: String, error: FsckError },
    #[error("catching signals: {0}")]
    Signals(std::io::Error),
}

impl Failure {
    fn status(&self) -> u8 {
        match self {
            Failure::Fsck { error: FsckError::Cancelled, .. } => EXIT_CANCELLED,
            Failure::Signals(_) => EXIT_SYSTEM,
            _ => EXIT_OPERATIONAL,
        }
    }
}

/// Checks the volume and says what was found.
pub fn run(args: Args) -> ExitCode {
    match examine(&args) {
        Ok(status) => ExitCode::from(status),
        Err(failure) => {
            eprintln!("fsck.lunfs: {failure}");
            ExitCode::from(failure.status())
        }
    }
}

fn examine(args: &Args) -> Result<u8, Failure> {
    let device = shown(&args.device);
    if let Some(use_) = in_use(Path::new(&args.device)) {
        return Err(Failure::InUse { device, use_ });
    }
    let cancelled = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register(signal, cancelled.clone()).map_err(Failure::Signals)?;
    }
    let allow = match (args.preen, args.everything) {
        (true, _) => Some(Allow::Safe),
        (_, true) => Some(Allow::Everything),
        _ => None,
    };
    let options = OpenOptions {
        read_only: allow.is_none(),
        logical_block_bytes: args.logical_block,
        exclusive: true,
        ..OpenOptions::default()
    };
    // Who repairs writes, so it is a host as any other; who only looks needs no leave.
    let dev = match allow {
        None => open_device(&args.device, options)?,
        Some(_) => open_as_host(&args.device, options, FencingMode::Auto)?,
    };
    let mut screen = Screen::new(args.json, cancelled);
    let result = match allow {
        None => fsck::examine(dev, &mut screen).map(|report| Repaired { report, ..Repaired::default() }),
        Some(allow) => {
            // A slot of its own, whoever else this machine is.
            let mut host = local_identity(None);
            host.name = format!("fsck on {}", host.name);
            host.uuid = *uuid::Uuid::new_v4().as_bytes();
            repair(dev, &host, allow, &mut screen)
        }
    };
    let status = match &result {
        Ok(done) if done.report.errors > 0 => EXIT_LEFT,
        Ok(done) if done.repaired > 0 => EXIT_REPAIRED,
        Ok(_) => EXIT_CLEAN,
        Err(_) => EXIT_OPERATIONAL,
    };
    screen.end(&device, result.as_ref().ok(), status);
    result.map(|_| status).map_err(|error| Failure::Fsck { device, error })
}

/// Shows findings as they come, and how far the check is.
struct Screen {
    json: bool,
    shown: u64,
    bar: Option<ProgressBar>,
    pass: &'static str,
    cancelled: Arc<AtomicBool>,
}

impl Screen {
    fn new(json: bool, cancelled: Arc<AtomicBool>) -> Self {
        let bar = (std::io::stderr().is_terminal() && !json).then(new_bar);
        if json {
            say("{\"findings\":[");
        }
        Screen { json, shown: 0, bar, pass: "", cancelled }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(&format!("{text}\n"))),
            None => say(&format!("{text}\n")),
        }
    }

    fn end(&mut self, device: &str, done: Option<&Repaired>, status: u8) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.json {
            let rest = json!({
                "device": device,
                "report": done.map(|d| d.report),
                "repaired": done.map(|d| d.repaired),
                "status": status,
            });
            let rest = rest.to_string();
            say(&format!("],{}\n", rest.trim_start_matches('{')));
            return;
        }
        let Some(Repaired { report, repaired, .. }) = done else { return };
        let verdict = match (report.errors, report.notes) {
            (0, _) if *repaired > 0 => format!("clean after {}", count(*repaired, "repair")),
            (0, 0) => "clean".to_owned(),
            (0, notes) => format!("clean, {}", count(notes, "note")),
            (errors, _) => format!("{} left", count(errors, "error")),
        };
        self.line(&format!(
            "{device}: {verdict}; {}, {}, {} of 4 KiB used",
            count(report.directories, "directory").replace("directorys", "directories"),
            count(report.files, "file"),
            count(report.used_blocks, "block"),
        ));
    }
}

impl Observer for Screen {
    fn found(&mut self, finding: &Finding) {
        if self.json {
            let comma = if self.shown > 0 { ",\n" } else { "" };
            say(&format!("{comma}{}", describe(finding)));
        } else {
            self.line(&finding.to_string());
        }
        self.shown += 1;
    }

    fn progress(&mut self, at: Progress) -> bool {
        if let Some(bar) = &mut self.bar {
            if self.pass != at.pass {
                self.pass = at.pass;
                // A bar of its own for each pass: what is left is reckoned from its pace alone, and nothing of the one
                // before is shown under its name.
                bar.finish_and_clear();
                *bar = new_bar().with_message(at.pass);
            }
            bar.set_length(at.of);
            bar.set_position(at.done);
        }
        !self.cancelled.load(Ordering::Relaxed)
    }
}

pub(super) fn new_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:28} {wide_bar} {percent:>3}% {eta:>6}");
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

pub(super) fn describe(finding: &Finding) -> serde_json::Value {
    json!({
        "name": finding.kind.name(),
        "severity": finding.kind.severity(),
        "repair": finding.kind.repair(),
        "place": finding.place,
        "text": finding.text,
    })
}

pub(super) fn count(number: u64, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        _ => format!("{number} {what}s"),
    }
}

/// A reader that went away is no reason to call the check failed.
pub(super) fn say(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}
