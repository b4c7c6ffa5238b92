//! Does anybody use the volume? Hosts are judged as other hosts judge them: by whether their slots change.
//!
//! Not for: keeping hosts out (`maintenance`).

use std::time::Duration;

use super::{FsckError, Observer, Progress};
use crate::inspect::Volume;
use crate::inspect::names::printable;
use crate::inspect::watch::SlotWatch;
use crate::layout::RECORD_BYTES;
use crate::layout::slot::SlotState;

/// The slots of a volume on which nothing moved.
pub struct Quiet(Vec<[u8; RECORD_BYTES]>);

/// Watches for a full dead time if any slot leaves room for doubt, or if asked for; else looks once.
pub fn watch(volume: &Volume<'_>, thorough: bool, out: &mut dyn Observer) -> Result<Quiet, FsckError> {
    let mut watch = SlotWatch::start(volume)?;
    let ended = |state| matches!(state, SlotState::Free | SlotState::Left | SlotState::Recovered);
    let doubt = watch.slots.iter().any(|s| !s.record.as_ref().is_ok_and(|r| ended(r.state)));
    let mut of = if doubt || thorough { watch.full_dead_time() } else { Duration::ZERO };
    loop {
        let watched = watch.watched_for().min(of);
        let (done, all) = (watched.as_millis() as u64, of.as_millis() as u64);
        if !out.progress(Progress { pass: "watching for other hosts", done, of: all }) {
            return Err(FsckError::Cancelled);
        }
        if watched >= of {
            break;
        }
        let next = watched + watch.poll_interval().max(Duration::from_millis(250));
        watch.run(next.min(of))?;
        if let Some(moving) = watch.first_moving() {
            return Err(FsckError::InUse { host: printable(moving.host_name()), slot: moving.slot });
        }
        of = of.max(watch.full_dead_time());
    }
    Ok(Quiet(watch.slots.iter().map(|s| *s.raw()).collect()))
}

impl Quiet {
    /// Nothing moved since: what was read in between is of one moment.
    pub fn still(&self, volume: &Volume<'_>) -> Result<(), FsckError> {
        let now = SlotWatch::start(volume)?;
        match now.slots.iter().zip(&self.0).find(|(slot, before)| slot.raw() != *before) {
            Some((slot, _)) => {
                Err(FsckError::Appeared { host: printable(slot.host_name()), slot: slot.slot })
            }
            None => Ok(()),
        }
    }
}
