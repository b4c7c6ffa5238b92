//! What a mount's daemon does for who asks it through [`crate::control`].
//!
//! | command | arguments | events | answer |
//! | --- | --- | --- | --- |
//! | `info` | | | `pid`, `uptime_ms`, `device`, `mountpoint`, `host`, `program` (version) |
//! | `scrub` | [`ScrubArguments`] | `{"progress":{pass,done,of}}`, `{"finding":{name,severity,repair,place,at,text}}` | [`scrub::Report`] |
//!
//! One scrub at a time: a second one is refused as `busy`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::mount::MountedVolume;
use super::stats_socket::Source;
use super::{fsck, runtime_files};
use crate::control::{Call, Failure, FailureKind, Server, Service};
use crate::fsck::finding::Finding;
use crate::fsck::{Observer, Progress};
use crate::scrub::{self, ScrubError};

/// Progress is told no more often than this, but for a new pass.
const PROGRESS_PERIOD: Duration = Duration::from_millis(100);

/// How a scrub is asked for. Absent fields have the defaults of [`scrub::Options`].
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct ScrubArguments {
    pub bytes_per_s: Option<u64>,
    pub asks_per_s: Option<u32>,
    pub leave_busy: bool,
}

struct MountService {
    source: Arc<Source>,
    volume: Arc<dyn MountedVolume>,
    scrubbing: AtomicBool,
}

/// Takes commands for a mount. A mount that takes none is better than no mount.
pub(super) fn serve(identity: &str, source: &Arc<Source>, volume: Arc<dyn MountedVolume>) -> Option<Server> {
    let path = runtime_files::directory().join(runtime_files::file_name(identity, &source.host, "control"));
    let service = MountService { source: source.clone(), volume, scrubbing: AtomicBool::new(false) };
    Server::start(&path, Arc::new(service))
        .inspect_err(|e| log::warn!("{}: {e}; this mount takes no commands", path.display()))
        .ok()
}

impl Service for MountService {
    fn serve(&self, command: &str, arguments: Value, call: &Call) -> Result<Value, Failure> {
        match command {
            "info" => Ok(json!({
                "pid": std::process::id(),
                "uptime_ms": self.source.started.elapsed().as_millis() as u64,
                "device": self.source.device,
                "mountpoint": self.source.mountpoint,
                "host": self.source.host,
                "program": env!("CARGO_PKG_VERSION"),
            })),
            "scrub" => self.scrub(arguments, call),
            _ => {
                let text =
                    format!("the daemon knows no command '{command}'; it may be older than this program");
                Err(Failure::new(FailureKind::UnknownCommand, text))
            }
        }
    }
}

impl MountService {
    fn scrub(&self, arguments: Value, call: &Call) -> Result<Value, Failure> {
        let arguments: ScrubArguments = match arguments {
            Value::Null => ScrubArguments::default(),
            given => serde_json::from_value(given)
                .map_err(|e| Failure::new(FailureKind::BadArguments, e.to_string()))?,
        };
        if self.scrubbing.swap(true, Ordering::AcqRel) {
            let text = "this mount's volume is being scrubbed already";
            return Err(Failure::new(FailureKind::Busy, text));
        }
        let _scrubbing = Scrubbing(&self.scrubbing);
        let usual = scrub::Options::default();
        let options = scrub::Options {
            bytes_per_s: arguments.bytes_per_s.unwrap_or(usual.bytes_per_s),
            asks_per_s: arguments.asks_per_s.unwrap_or(usual.asks_per_s),
            leave_busy: arguments.leave_busy,
            cancelled: call.cancelled(),
        };
        log::info!("scrub begins");
        let mut teller = Teller { call, pass: "", told: Instant::now() };
        let result = self.volume.scrub(&options, &mut teller).ok_or_else(|| {
            Failure::new(FailureKind::Failed, "this filesystem lies on no volume that could be checked")
        })?;
        match result {
            Ok(report) => {
                log::info!(
                    "scrub ended: {} errors, {} not looked at, {} inodes",
                    report.errors,
                    report.not_looked,
                    report.inodes
                );
                serde_json::to_value(report).map_err(|e| Failure::new(FailureKind::Failed, e.to_string()))
            }
            Err(error) => {
                log::info!("scrub ended: {error}");
                Err(match error {
                    ScrubError::LeaseEnded(_) => Failure::new(FailureKind::Ended, error.to_string()),
                    ScrubError::Device(_) => Failure::new(FailureKind::Failed, error.to_string()),
                    ScrubError::Cancelled if call.is_ending() => {
                        Failure::new(FailureKind::Ended, "the mount ended before the check did")
                    }
                    ScrubError::Cancelled => Failure::new(FailureKind::Cancelled, "cancelled"),
                })
            }
        }
    }
}

/// The next one may come when this one ended, however it did.
struct Scrubbing<'s>(&'s AtomicBool);

impl Drop for Scrubbing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// Tells a client of a check.
struct Teller<'c> {
    call: &'c Call,
    pass: &'static str,
    told: Instant,
}

impl Observer for Teller<'_> {
    fn found(&mut self, finding: &Finding) {
        log::error!("scrub found: {finding}");
        let mut described = fsck::describe(finding);
        described["at"] = finding.place.to_string().into();
        self.call.event(&json!({ "finding": described }));
    }

    fn progress(&mut self, at: Progress) -> bool {
        if self.pass != at.pass || self.told.elapsed() >= PROGRESS_PERIOD {
            (self.pass, self.told) = (at.pass, Instant::now());
            self.call.event(&json!({ "progress": { "pass": at.pass, "done": at.done, "of": at.of } }));
        }
        !self.call.cancelled().load(Ordering::Relaxed)
    }
}
