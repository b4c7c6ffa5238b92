//! Forgetting locks, so that memory stays bounded.
//!
//! A lock that was not used for a while is dropped from memory; the disk goes on naming this host. The lock
//! block alone says who holds: whoever asks for it later makes us read the block and pass the lock on, and a
//! thread of ours that needs it again finds it there. What is not in place under it stays with the store,
//! keyed by the lock, and is settled before the lock leaves.

use std::sync::Arc;

use super::entry::{Entry, State};
use super::{Held, LockManager};
use crate::types::BlockNo;

impl LockManager {
    /// How many locks this host remembers, and how many of them it holds.
    pub fn population(&self) -> (usize, usize) {
        let mut known = 0;
        let mut held = 0;
        for shard in &self.shards {
            let shard = shard.lock();
            known += shard.len();
            held += shard.values().filter(|e| e.state.lock().held != Held::Nothing).count();
        }
        (known, held)
    }

    /// Forgets locks that were not used since the last call, while more than `most` are remembered.
    pub fn trim(&self, most: usize) -> usize {
        let known: usize = self.shards.iter().map(|s| s.lock().len()).sum();
        let mut surplus = known.saturating_sub(most);
        let mut forgotten = 0;
        for shard in &self.shards {
            if surplus == 0 {
                break;
            }
            let candidates: Vec<(BlockNo, Arc<Entry>, u64)> = {
                let shard = shard.lock();
                let idle = |(at, entry): (&BlockNo, &Arc<Entry>)| {
                    let mut state = entry.state.lock();
                    let unused = state.served == state.served_at_trim && may_go(&state);
                    state.served_at_trim = state.served;
                    unused.then(|| (*at, entry.clone(), state.served))
                };
                shard.iter().filter_map(idle).take(surplus).collect()
            };
            for (at, entry, served) in candidates {
                // What the kernel caches would outlive our memory of the lock.
                if let Some(steward) = self.steward() {
                    steward.silence(entry.id);
                }
                let mut shard = shard.lock();
                let gone = {
                    let state = entry.state.lock();
                    // The table's reference and ours: nobody else can be about to use it.
                    state.served == served && may_go(&state) && Arc::strong_count(&entry) == 2
                };
                if gone {
                    shard.remove(&at);
                    // While nobody else can begin to use it.
                    if let Some(steward) = self.steward() {
                        steward.forgotten(entry.id);
                    }
                    forgotten += 1;
                    surplus -= 1;
                }
            }
        }
        forgotten
    }
}

fn may_go(state: &State) -> bool {
    state.idle() && !state.busy && !state.closing && !state.giving && state.wanted.is_empty()
}
