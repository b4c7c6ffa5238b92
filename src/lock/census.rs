//! How many locks this host knows and holds: for people who watch, never for decisions.

use std::sync::Arc;

use super::entry::Entry;
use super::{Held, LockManager};
use crate::ats::AtsStats;

/// Locks in this host's memory, each counted once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Census {
    /// Seen at some time; most of them are also held.
    pub known: u64,
    pub held_shared: u64,
    pub held_exclusive: u64,
    /// Somebody else asked for them and has not got them yet.
    pub wanted: u64,
}

impl LockManager {
    /// Counts all locks in memory, one after the other: true for each, not for all at one moment.
    pub fn census(&self) -> Census {
        let mut census = Census::default();
        for shard in &self.shards {
            // Entries wait for their own lock while nobody waits for the shard's: never both at once here.
            let entries: Vec<Arc<Entry>> = shard.lock().values().cloned().collect();
            for entry in entries {
                let state = entry.state.lock();
                census.known += 1;
                match state.held {
                    Held::Nothing => {}
                    Held::Shared => census.held_shared += 1,
                    Held::Exclusive(_) => census.held_exclusive += 1,
                }
                census.wanted += u64::from(!state.wanted.is_empty());
            }
        }
        census
    }

    /// Swaps of this host by how they ended: locks, doorbells and beats together.
    pub fn swap_stats(&self) -> &AtsStats {
        &self.ats.stats
    }
}
