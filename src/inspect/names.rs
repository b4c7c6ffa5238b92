//! Names for what a lock record holds as numbers: slots become hosts, lives become present or past.

use super::watch::{Verdict, WatchedSlot};
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::slot::SlotState;
use crate::types::{Incarnation, Owner, Slot, SlotSet};

/// A host as a lock record names it.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Host {
    pub slot: u16,
    /// The life named; null where the record names only the slot.
    pub incarnation: Option<u64>,
    /// Null when nobody lives there or the life is a past one.
    pub host: Option<String>,
    /// How that life stands now.
    pub life: Life,
}

/// How the life that a record names stands now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Life {
    Moving,
    Silent,
    Dead,
    /// Gave up by itself; waits to be recovered.
    Withdrawn,
    /// Somebody replays its journal.
    Recovering,
    /// Its journal can't be replayed.
    Unrecoverable,
    /// Left cleanly or recovered: what it held counts as free.
    Settled,
    /// Its slot can't be read.
    Unknown,
}

/// The slots as they were when the watch ended.
pub struct Hosts<'w>(pub &'w [WatchedSlot]);

impl Hosts<'_> {
    pub fn owner(&self, owner: Owner) -> Host {
        let watched = self.0.get(usize::from(owner.slot.0));
        let record = watched.and_then(|w| w.record.as_ref().ok());
        let (life, host) = match (watched, record) {
            (Some(watched), Some(record)) => {
                let same = record.incarnation == owner.incarnation;
                let life = if record.settled(owner.incarnation) {
                    Life::Settled
                } else if same {
                    life_of(record.state, watched.verdict())
                } else {
                    Life::Unknown
                };
                let name = (same && !record.host_name.is_empty()).then(|| record.host_name.clone());
                (life, name)
            }
            _ => (Life::Unknown, None),
        };
        Host { slot: owner.slot.0, incarnation: Some(owner.incarnation.0), host, life }
    }

    /// Whoever lives in `slot`.
    pub fn slot(&self, slot: Slot) -> Host {
        let incarnation = self
            .0
            .get(usize::from(slot.0))
            .and_then(|w| w.record.as_ref().ok())
            .map_or(Incarnation(0), |r| r.incarnation);
        Host { incarnation: None, ..self.owner(Owner { slot, incarnation }) }
    }

    pub fn set(&self, set: SlotSet) -> Vec<Host> {
        set.iter().map(|slot| self.slot(slot)).collect()
    }

    /// Who holds the lock: its owner, or its sharers.
    pub fn holders(&self, lock: &LockRecord) -> Vec<Host> {
        match lock.mode {
            LockMode::Free => Vec::new(),
            LockMode::Shared => self.set(lock.sharers),
            LockMode::Exclusive { owner, .. } => vec![self.owner(owner)],
        }
    }
}

impl std::fmt::Display for Host {
    /// `name/slot`, with the life if it is not a living one.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.host.as_deref().map(printable).as_deref().unwrap_or("?"), self.slot)?;
        match self.life {
            Life::Moving => Ok(()),
            Life::Silent => f.write_str(" (silent)"),
            Life::Dead => f.write_str(" (dead)"),
            Life::Withdrawn => f.write_str(" (withdrawn)"),
            Life::Recovering => f.write_str(" (recovering)"),
            Life::Unrecoverable => f.write_str(" (unrecoverable)"),
            Life::Settled => f.write_str(" (settled)"),
            Life::Unknown => f.write_str(" (unknown life)"),
        }
    }
}

fn life_of(state: SlotState, verdict: Verdict) -> Life {
    match (state, verdict) {
        (SlotState::Free | SlotState::Left | SlotState::Recovered, _) => Life::Settled,
        (SlotState::Withdrawn, _) => Life::Withdrawn,
        (SlotState::Recovering, _) => Life::Recovering,
        (SlotState::Unrecoverable, _) => Life::Unrecoverable,
        (SlotState::Live, Verdict::Moving) => Life::Moving,
        (SlotState::Live, Verdict::Dead) => Life::Dead,
        (SlotState::Live, _) => Life::Silent,
    }
}

/// A name from the disk with control characters replaced, so that it can't steer a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}
