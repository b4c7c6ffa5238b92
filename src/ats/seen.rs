//! Which version of each block this host saw last, by whatever way: proof that an image in somebody's memory is
//! old. Bounded; what is forgotten costs only the proof. Not for decisions.
//!
//! Its mutex is a leaf that nobody waits under: see `lease::Timing`.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;

use super::record::Version;
use crate::rt::Instant;
use crate::types::BlockNo;

const BLOCKS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

pub(super) struct Seen(Mutex<LruCache<BlockNo, (Version, Instant)>>);

impl Default for Seen {
    fn default() -> Self {
        Seen(Mutex::new(LruCache::new(BLOCKS)))
    }
}

impl Seen {
    pub fn note(&self, at: BlockNo, version: Version) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).put(at, (version, Instant::now()));
    }

    /// How long before `now` a newer version than this was seen, if that was the last that was seen.
    pub fn newer_than(&self, at: BlockNo, version: Version, now: Instant) -> Option<Duration> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (newest, when) = *seen.get(&at)?;
        (newest > version).then(|| now.saturating_duration_since(when))
    }
}
