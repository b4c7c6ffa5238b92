//! What a mount says while no slot can be had, and when it gives up: when it was signalled, or when the command that
//! started the daemon is gone.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::daemonize::ReadyPipe;
use crate::rt::Instant;
use crate::volume::Waiting;

const SAY_EVERY: Duration = Duration::from_secs(10);

pub(super) struct SlotWait<'p> {
    pub ready: &'p ReadyPipe,
    /// A signal asked this process to end.
    pub signalled: Arc<AtomicBool>,
    pub said: Option<Instant>,
}

impl SlotWait<'_> {
    /// False: it is given up.
    pub fn go_on(&mut self, waiting: &Waiting<'_>) -> bool {
        // A host that lives shows it by then, and there is nothing to wait for.
        let silent = waiting.so_far >= 3 * Duration::from_millis(waiting.record.durations.beat_ms.into());
        if silent && self.said.is_none_or(|at| at.elapsed() >= SAY_EVERY) {
            self.said = Some(Instant::now());
            log::warn!("{waiting}");
            // In the foreground that was the log's line. A daemon has its starter's stderr until it serves.
            if self.ready.is_daemon() {
                let _ = writeln!(io::stderr(), "lunfs: {waiting}");
            }
        }
        self.ready.is_awaited() && !self.signalled.load(Ordering::Relaxed)
    }
}
