//! `lunfs scrub`: asks the daemon of a mount to check its volume ([`crate::scrub`]), and shows what it says.
//!
//! The mount itself is not touched: which daemon serves it is known from /proc/self/mountinfo and the runtime directory.
//! Standard output gets the findings and a summary, or JSON; standard error gets errors and, when it is a terminal, a
//! progress bar.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::control_service::ScrubArguments;
use super::fsck::{EXIT_USAGE, count, new_bar, say};
use super::mkfs::Size;
use super::runtime_files;
use crate::control::{CallError, FailureKind, call};
use crate::fuse::mountinfo;
use crate::scrub::Report;

/// Nothing is wrong, and everything was looked at.
const EXIT_CLEAN: u8 = 0;
/// Added when something was not looked at.
const EXIT_NOT_LOOKED: u8 = 2;
/// Added when errors were found.
const EXIT_LEFT: u8 = 4;
/// The check did not come to its end.
const EXIT_OPERATIONAL: u8 = 8;
const EXIT_CANCELLED: u8 = 32;
/// The system did not give what the program needs.
const EXIT_SYSTEM: u8 = 128;

/// Shown at the end of the help.
const EXIT_STATUS: &str = "Exit status, a sum as of fsck(8): 0 nothing wrong, 2 something was not looked at, 4 errors found, \
                           8 could not be checked to the end, 16 wrong usage, 32 cancelled, 128 out of system resources.";

/// Check a mounted volume while all hosts go on using it. Changes nothing.
#[derive(clap::Args, Debug)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// Where the volume is mounted on this machine.
    pub mountpoint: PathBuf,
    /// Findings and summary as one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Read at most so much in a second, such as 8M; 0: as fast as possible.
    #[arg(long, value_name = "SIZE", default_value = "32M")]
    pub rate: Size,
    /// Ask other hosts for at most so many locks in a second, where something does not look whole.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub ask_rate: u32,
    /// Ask no other host for a lock; what can't be decided without is not looked at.
    #[arg(long)]
    pub leave_busy: bool,
}

/// Why there is nothing to show.
struct Failure {
    status: u8,
    text: String,
}

impl Failure {
    fn operational(text: impl Into<String>) -> Self {
        Failure { status: EXIT_OPERATIONAL, text: text.into() }
    }
}

/// Has the volume checked and says what was found.
pub fn run(args: Args) -> ExitCode {
    let mut screen = Screen::new(args.json);
    let outcome = ask(&args, &mut screen);
    let status = match &outcome {
        Ok(report) => {
            let found = if report.errors > 0 { EXIT_LEFT } else { EXIT_CLEAN };
            found | if report.not_looked > 0 { EXIT_NOT_LOOKED } else { EXIT_CLEAN }
        }
        Err(failure) => failure.status,
    };
    screen.end(&args.mountpoint, &outcome, status);
    if let Err(failure) = outcome {
        eprintln!("lunfs scrub: '{}': {}", args.mountpoint.display(), failure.text);
    }
    ExitCode::from(status)
}

fn ask(args: &Args, screen: &mut Screen) -> Result<Report, Failure> {
    let cancelled = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let registered = signal_hook::flag::register(signal, cancelled.clone());
        registered.map_err(|e| Failure { status: EXIT_SYSTEM, text: format!("catching signals: {e}") })?;
    }
    let sockets = sockets_of(&args.mountpoint)?;
    let arguments = ScrubArguments {
        bytes_per_s: Some(args.rate.0),
        asks_per_s: Some(args.ask_rate),
        leave_busy: args.leave_busy,
    };
    let arguments = serde_json::to_value(arguments).map_err(|e| Failure::operational(e.to_string()))?;
    let mut error = CallError::Gone;
    for socket in sockets {
        // Of several files that name this mount those of dead daemons refuse the connection.
        match call(&socket, "scrub", arguments.clone(), &cancelled, &mut |event| screen.event(&event)) {
            Err(CallError::Connect(e)) => error = CallError::Connect(e),
            Err(e) => return Err(failure(e)),
            Ok(report) => {
                return serde_json::from_value(report)
                    .map_err(|e| Failure::operational(format!("the daemon's report: {e}")));
            }
        }
    }
    Err(failure(error))
}

fn failure(error: CallError) -> Failure {
    let status = match &error {
        CallError::Unconfirmed => EXIT_CANCELLED,
        CallError::Failed(failure) if failure.kind == FailureKind::Cancelled => EXIT_CANCELLED,
        CallError::Failed(failure) if failure.kind == FailureKind::BadArguments => EXIT_USAGE,
        _ => EXIT_OPERATIONAL,
    };
    Failure { status, text: error.to_string() }
}

/// Where the daemon of this mount listens. The mount, which may hang, is not asked anything.
fn sockets_of(mountpoint: &Path) -> Result<Vec<PathBuf>, Failure> {
    let problem = |e: std::io::Error| Failure::operational(e.to_string());
    let resolved = mountinfo::resolve_without_touching(mountpoint).map_err(problem)?;
    let Some(mount) = mountinfo::at(&resolved).map_err(problem)? else {
        return Err(Failure::operational("nothing is mounted there"));
    };
    if !mount.is_lunfs() {
        return Err(Failure::operational(format!(
            "no LunFS volume is mounted there, but a {}",
            mount.fstype
        )));
    }
    let sockets = runtime_files::control_sockets_of(mount.device);
    if sockets.is_empty() {
        let directory = runtime_files::directory();
        let text = format!(
            "no daemon of this mount is known in {}; it may run in another container or with another LUNFS_RUN_DIR",
            directory.display()
        );
        return Err(Failure::operational(text));
    }
    Ok(sockets)
}

/// Shows findings as they come, and how far the check is.
struct Screen {
    json: bool,
    shown: u64,
    bar: Option<ProgressBar>,
    pass: String,
}

impl Screen {
    fn new(json: bool) -> Self {
        let bar = (std::io::stderr().is_terminal() && !json).then(|| {
            let bar = new_bar();
            bar.enable_steady_tick(Duration::from_secs(1));
            bar
        });
        if json {
            say("{\"findings\":[");
        }
        Screen { json, shown: 0, bar, pass: String::new() }
    }

    fn line(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(&format!("{text}\n"))),
            None => say(&format!("{text}\n")),
        }
    }

    fn event(&mut self, event: &Value) {
        if let Some(finding) = event.get("finding") {
            self.finding(finding);
        }
        if let (Some(progress), Some(bar)) = (event.get("progress"), &self.bar) {
            let pass = progress["pass"].as_str().unwrap_or_default();
            if self.pass != pass {
                self.pass = pass.to_owned();
                bar.set_message(self.pass.clone());
                bar.reset_eta();
            }
            bar.set_length(progress["of"].as_u64().unwrap_or(0));
            bar.set_position(progress["done"].as_u64().unwrap_or(0));
        }
    }

    fn finding(&mut self, finding: &Value) {
        if self.json {
            let mut finding = finding.clone();
            if let Some(fields) = finding.as_object_mut() {
                // For people; `place` says it to programs.
                fields.remove("at");
            }
            let comma = if self.shown > 0 { ",\n" } else { "" };
            say(&format!("{comma}{finding}"));
        } else {
            let text = |field: &str| finding[field].as_str().unwrap_or("?").to_owned();
            self.line(&format!("{} [{}]: {}", text("at"), text("name"), text("text")));
        }
        self.shown += 1;
    }

    fn end(&mut self, mountpoint: &Path, outcome: &Result<Report, Failure>, status: u8) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let mountpoint = mountpoint.display().to_string();
        if self.json {
            let rest = json!({
                "mountpoint": mountpoint,
                "report": outcome.as_ref().ok(),
                "error": outcome.as_ref().err().map(|failure| &failure.text),
                "status": status,
            });
            return say(&format!("],{}\n", rest.to_string().trim_start_matches('{')));
        }
        let Ok(report) = outcome else { return };
        for left in &report.not_looked_at {
            self.line(&format!("not looked at: {}: {}", left.what, left.why));
        }
        let more = report.not_looked.saturating_sub(report.not_looked_at.len() as u64);
        if more > 0 {
            self.line(&format!("not looked at: {more} more"));
        }
        if report.not_compared > 0 {
            let runs = count(report.not_compared, "run");
            self.line(&format!("not compared with all others, for want of memory: {runs} of blocks"));
        }
        let verdict = match (report.errors, report.not_looked) {
            (0, 0) => "nothing wrong".to_owned(),
            (0, left) => format!("nothing wrong as far as was looked, {left} not looked at"),
            (errors, 0) => count(errors, "error"),
            (errors, left) => format!("{}, {left} not looked at", count(errors, "error")),
        };
        self.line(&format!(
            "{mountpoint}: {verdict}; {}, {}, {} MiB read in {:.1} s",
            count(report.directories, "directory").replace("directorys", "directories"),
            count(report.files, "file"),
            report.bytes_read >> 20,
            report.elapsed_ms as f64 / 1000.0,
        ));
    }
}
