//! Why a swap did not simply succeed. Pure: the decision is made on what the swap met, and nothing else.
//!
//! Each swap ends in at most one cause. Where several fit, the first of this order is taken: what is in the
//! block (damaged, older than what we compared with, declared dead), then the lost answer, then the
//! miscompare. What a cause means to an administrator is in `docs/miscompare.md`.

use std::time::Duration;

use super::record::{BlockKind, Image, SwapRecord};
use crate::types::{BlockNo, Owner};

macro_rules! causes {
    ($($(#[$doc:meta])* $variant:ident $field:ident $words:literal),+ $(,)?) => {
        /// Why a swap did not simply succeed.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Cause { $($(#[$doc])* $variant),+ }

        impl Cause {
            pub const ALL: &[Cause] = &[$(Cause::$variant),+];

            /// In an administrator's words.
            pub const fn words(self) -> &'static str {
                match self { $(Cause::$variant => $words),+ }
            }
        }

        /// Swaps of one kind of block that did not simply succeed, by cause.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
        pub struct CauseCounts { $($(#[$doc])* pub $field: u64),+ }

        impl CauseCounts {
            pub fn get(&self, cause: Cause) -> u64 {
                match cause { $(Cause::$variant => self.$field),+ }
            }

            pub(super) fn set(&mut self, cause: Cause, count: u64) {
                match cause { $(Cause::$variant => self.$field = count),+ }
            }
        }
    };
}

causes! {
    /// Miscompare: another host's newer image is there, and the image we compared with was fresh.
    LostRace lost_race "another host was faster",
    /// Miscompare: another host's newer image is there, and what we compared with was old.
    StaleImage stale_image "compared with a stale image",
    /// Miscompare, but our new image is in the block, or provably was.
    OwnWriteLanded own_write_landed "false miscompare: our own write had landed",
    /// Miscompare, but the block holds exactly what we compared with. Repeated.
    FalseMiscompare false_miscompare "false miscompare: the block is what it was compared with",
    /// Another writer changed what was this host's alone: its slot, or a lock that it held exclusively.
    DeclaredDead declared_dead "this host was declared dead",
    /// The block holds an older image than the one we compared with.
    WentBack went_back "the block went back in time",
    /// The block can't be believed: checksum, magic, address, volume or a field is wrong.
    Damaged damaged "damaged block",
    /// No usable answer; our image is in the block, or provably was.
    NoAnswerLanded no_answer_landed "no answer, but the write had landed",
    /// No usable answer; it was not executed and can't be any more.
    NoAnswerNotLanded no_answer_not_landed "no answer, and the write did not land",
    /// No usable answer; the block changed more than once since, so it can't be told.
    NoAnswerSuperseded no_answer_superseded "no answer, and the block has moved on",
    /// No usable answer, and none to the question what became of it.
    NoAnswerUnresolved no_answer_unresolved "no answer, and nothing could be found out",
}

/// An image of a block that other hosts change counts as stale when it was last seen on the disk this long,
/// and longer than the command took, before the command was issued.
pub const STALE_AFTER: Duration = Duration::from_millis(100);

/// Who this host is, once it has a slot.
#[derive(Clone, Copy, Debug)]
pub(super) struct Me {
    pub owner: Owner,
    pub slot_at: BlockNo,
}

/// What a swap compared, wrote and met.
pub(super) struct Met<'a, R> {
    pub from: &'a Image<R>,
    pub to: &'a R,
    pub found: &'a Image<R>,
    /// From the last sight of `from` to the issue of the first command.
    pub age: Duration,
    /// The last command, from issue to answer.
    pub took: Duration,
    /// A newer image than `from` had been seen before the swap began.
    pub newer_seen: bool,
    /// Some command got no usable answer.
    pub unanswered: bool,
    /// What is in the block was written by this host in this mount, by another swap.
    pub found_is_ours: bool,
    pub me: Option<Me>,
}

impl<R: SwapRecord> Met<'_, R> {
    /// The cause when the block holds neither what we compared with nor an image of this swap. `alive` reads
    /// our slot: are we still who we were?
    pub fn cause(&self, alive: impl FnOnce() -> bool) -> Cause {
        let (from, to, found) = (&self.from.record, self.to, &self.found.record);
        let landed = if self.unanswered { Cause::NoAnswerLanded } else { Cause::OwnWriteLanded };
        if found.version() <= from.version() {
            return Cause::WentBack;
        }
        // Ours of a swap that was given up before its answer came: had it been answered, it would have been seen.
        if found.proves(to) || (self.found_is_ours && !self.newer_seen) {
            return landed;
        }
        if self.on_own_slot() {
            return Cause::DeclaredDead;
        }
        if self.me.is_some_and(|me| from.sole_writer() == Some(me.owner)) {
            // Only we could swap it. If it moved on further than by one swap, ours was the first of them.
            let ours_landed = found.version() > to.version() && alive();
            return if ours_landed { landed } else { Cause::DeclaredDead };
        }
        match self.unanswered {
            // The one place behind `from` is taken by another.
            true if found.version() == to.version() => Cause::NoAnswerNotLanded,
            true => Cause::NoAnswerSuperseded,
            false if self.newer_seen || self.age > self.took.max(STALE_AFTER) => Cause::StaleImage,
            false => Cause::LostRace,
        }
    }

    fn on_own_slot(&self) -> bool {
        R::KIND == BlockKind::Heartbeat && self.me.is_some_and(|me| me.slot_at == self.to.address())
    }
}
