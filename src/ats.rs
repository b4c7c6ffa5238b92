//! Typed atomic test-and-set: the only caller of compare-and-write.
//!
//! A swap has three outcomes: done, miscompare, unknown (invariant 6). A miscompare is believed as little as a
//! lost answer: both are decided by the content of the block.
//!
//! * One of our images for this swap is there: done (after a miscompare: the classic false one).
//! * The very image we compared with is there: nothing is decided. After a lost answer the command may execute
//!   later; after a miscompare the device said something untrue. We go on only after another swap of ours from
//!   that same image, with a new nonce, has landed: then a late one can only miscompare. Images never repeat,
//!   so this is no other image that looks alike.
//! * Anything else is returned as found, and its content decides.
//!
//! The compare image is the whole logical block as just read, and the new image keeps what lies behind the
//! record: a record formatted at 512 bytes stays right on a device of 4096.
//!
//! Each swap that did not simply succeed has one [`Cause`], which is counted and logged; no outcome depends on it.
//!
//! Not for: deciding what to write, or what a found image means (`lock`, `heartbeat`, `demand`).

mod cause;
mod record;
mod report;
mod seen;
mod stats;

pub use cause::{Cause, CauseCounts, STALE_AFTER};
pub use record::{BlockKind, Image, SwapRecord, Version};
pub use stats::AtsStats;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use thiserror::Error;

use crate::device::{AlignedBuf, CompareOutcome, DeviceError, Executed};
use crate::layout::slot::{SlotRecord, SlotState};
use crate::layout::{LayoutError, Nonce};
use crate::lease::{Door, IoClass, LeaseState, TimingSummary};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Instant};
use crate::types::{BlockNo, Owner, Slot, VolumeId};
use cause::{Me, Met};
use report::{Budget, Event, Found};
use seen::Seen;

/// What became of a swap.
#[derive(Debug)]
pub enum Swapped<R> {
    /// Our image is on the disk, this one.
    Done(Image<R>),
    /// The block holds something else; nothing of ours from this call is in it or can get there any more.
    Miscompare(Image<R>),
}

/// A swap or read that came to no result.
#[derive(Clone, Debug, Error)]
pub enum AtsError {
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Damaged(#[from] LayoutError),
    /// What was seen before may have been taken back; it has to be read again.
    #[error("the device was reset and may have forgotten what was seen of it")]
    Forgotten,
}

/// Reads and swaps records through the door.
pub struct Ats {
    door: Arc<Door>,
    volume: VolumeId,
    logical_bytes: usize,
    nonce_seed: u64,
    nonce_counter: AtomicU64,
    me: OnceLock<Me>,
    names: OnceLock<NameOf>,
    seen: Seen,
    budget: Budget,
    pub stats: AtsStats,
}

type NameOf = Box<dyn Fn(Slot) -> Option<String> + Send + Sync>;

/// For how long a command is tried.
#[derive(Clone, Copy)]
struct Tries {
    begun: Instant,
    /// None: as long as the lease allows.
    patience: Option<Duration>,
}

/// What one swap went through.
struct History<R> {
    begun: Instant,
    /// All images this call tried; any of them found on the disk is ours.
    tried: Vec<Image<R>>,
    /// The last command, from issue to answer.
    took: Duration,
    age: Duration,
    newer_seen: Option<Duration>,
    /// Issue of the first command without a usable answer, and how many there were.
    unanswered: Option<(Instant, u32)>,
    /// "Miscompare" although the block held what was expected.
    false_miscompares: u32,
    /// One of our images was found in the block.
    found_own: bool,
    say_next: Instant,
}

/// A record whose checksum is wrong is read again this often before it is called damaged.
const TORN_TRIES: u32 = 3;
/// Pause before a block is looked at again after an unknown outcome.
const RESOLVE_PAUSE: Duration = Duration::from_millis(5);
/// Tries go on for so long while no lease says how long.
const LEASELESS_PATIENCE: Duration = Duration::from_secs(20);
/// A swap that is not decided is spoken of this often.
const SAY_EVERY: Duration = Duration::from_secs(5);

impl Ats {
    pub fn new(door: Arc<Door>, volume: VolumeId) -> Self {
        let logical_bytes = door.geometry().logical_block_bytes as usize;
        Ats {
            door,
            volume,
            logical_bytes,
            nonce_seed: rt::random_u64(),
            nonce_counter: AtomicU64::new(1),
            me: OnceLock::new(),
            names: OnceLock::new(),
            seen: Seen::default(),
            budget: Budget::default(),
            stats: AtsStats::default(),
        }
    }

    /// This host has a slot: from now on what only it may change is known.
    pub fn set_me(&self, owner: Owner, slot_at: BlockNo) {
        let _ = self.me.set(Me { owner, slot_at });
    }

    /// Who knows the hosts' names, for log lines. Must not swap or read.
    pub fn set_names(&self, name_of: impl Fn(Slot) -> Option<String> + Send + Sync + 'static) {
        let _ = self.names.set(Box::new(name_of));
    }

    pub fn door(&self) -> &Arc<Door> {
        &self.door
    }

    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    /// A nonce that no image on this volume ever carried.
    pub fn fresh_nonce(&self) -> Nonce {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.nonce_seed.to_le_bytes());
        let step = u64::from(!is_planted(Bug::NonceRepeats));
        let count = self.nonce_counter.fetch_add(step, Ordering::Relaxed);
        bytes[8..].copy_from_slice(&count.to_le_bytes());
        Nonce(bytes)
    }

    /// The block as it is on the disk now.
    pub fn read<R: SwapRecord>(&self, class: IoClass, at: BlockNo) -> Result<Image<R>, AtsError> {
        let read = self.read_unreported(class, at);
        if let Err(AtsError::Damaged(error)) = &read {
            self.damaged::<R>(at, error);
        }
        read
    }

    /// A record that was read, here or as part of a larger read, can't be believed.
    pub fn damaged<R: SwapRecord>(&self, at: BlockNo, error: &LayoutError) {
        self.stats.count(R::KIND, Cause::Damaged);
        self.log(Event::<R> {
            cause: Cause::Damaged,
            at,
            from: None,
            found: Found::Damage(error),
            took: None,
            usual: TimingSummary::default(),
            age: Duration::ZERO,
            newer_seen: None,
            unanswered: None,
            withheld: 0,
        });
    }

    fn read_unreported<R: SwapRecord>(&self, class: IoClass, at: BlockNo) -> Result<Image<R>, AtsError> {
        let mut bytes = AlignedBuf::zeroed(self.logical_bytes);
        let mut tries = 0;
        loop {
            let resets = self.door.resets();
            self.door.read(class, at, &mut bytes)?;
            match R::decode(&bytes, self.volume, at) {
                Ok(record) => {
                    self.seen.note(at, record.version());
                    return Ok(Image::new(record, &bytes, resets));
                }
                // A read beside a swap may see half of each on some paths.
                Err(LayoutError::Checksum { .. }) if tries < TORN_TRIES => tries += 1,
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// The image of a record that this host itself wrote by a plain write (the birth of a lock): the
    /// rest of the block is zero.
    pub fn image_of_born<R: SwapRecord>(&self, record: &R) -> Image<R> {
        let mut bytes = vec![0; self.logical_bytes];
        record.encode(self.volume, &mut bytes);
        Image::new(record.clone(), &bytes, self.door.resets())
    }

    /// Replaces `from` by `to`, under a fresh nonce, if the block still equals `from`.
    pub fn swap<R: SwapRecord>(
        &self,
        class: IoClass,
        from: &Image<R>,
        to: &R,
    ) -> Result<Swapped<R>, AtsError> {
        self.swap_within(class, from, to, None)
    }

    /// The same, given up after `patience` if the device answers nothing usable until then: the outcome is unknown.
    pub fn swap_within<R: SwapRecord>(
        &self,
        class: IoClass,
        from: &Image<R>,
        to: &R,
        patience: Option<Duration>,
    ) -> Result<Swapped<R>, AtsError> {
        let begun = Instant::now();
        let tries = Tries { begun, patience };
        let mut history = History {
            begun,
            tried: Vec::new(),
            took: Duration::ZERO,
            age: begun.saturating_duration_since(from.seen),
            newer_seen: self.seen.newer_than(to.address(), from.record.version(), begun),
            unanswered: None,
            false_miscompares: 0,
            found_own: false,
            say_next: begun + SAY_EVERY,
        };
        let swapped = self.try_to_swap(class, from, to, tries, &mut history);
        if swapped.is_ok() {
            self.stats.swap_time.record(begun.elapsed());
        }
        if let Ok(Swapped::Done(image)) = &swapped {
            self.seen.note(to.address(), image.record.version());
        }
        self.conclude(class, from, to, &swapped, &history);
        swapped
    }

    fn try_to_swap<R: SwapRecord>(
        &self,
        class: IoClass,
        from: &Image<R>,
        to: &R,
        tries: Tries,
        history: &mut History<R>,
    ) -> Result<Swapped<R>, AtsError> {
        let at = to.address();
        let mut record = to.clone();
        let expected = from.block(self.logical_bytes);
        loop {
            record.set_nonce(self.fresh_nonce());
            let mut new = expected.clone();
            record.encode(self.volume, &mut new);
            let (issued, resets) = (Instant::now(), self.door.resets());
            let outcome = self.door.compare_and_write(class, at, &expected, &new);
            history.took = issued.elapsed();
            history.tried.push(Image::new(record.clone(), &new, resets));
            match &outcome {
                Ok(CompareOutcome::Swapped) => {
                    self.stats.done.fetch_add(1, Ordering::Relaxed);
                    return Ok(Swapped::Done(history.tried.swap_remove(history.tried.len() - 1)));
                }
                Ok(CompareOutcome::Miscompare) => {}
                Err(e) => {
                    if e.executed() == Executed::Maybe {
                        self.stats.unknown.fetch_add(1, Ordering::Relaxed);
                        let (first, count) = history.unanswered.unwrap_or((issued, 0));
                        history.unanswered = Some((first, count + 1));
                    }
                    if !self.may_repeat(e, tries) {
                        return Err(e.clone().into());
                    }
                    if e.executed() == Executed::No {
                        // Not executed and never will be (busy, unit attention): the same again.
                        self.stats.refused.fetch_add(1, Ordering::Relaxed);
                        log::debug!("swap of block {at}: {e}; again");
                        history.tried.pop();
                        rt::sleep(RESOLVE_PAUSE);
                        continue;
                    }
                }
            }
            let found = self.read_until_answered::<R>(class, at, tries)?;
            if let Some(i) = history.tried.iter().position(|t| t.equals(&found)) {
                let counter = &self.stats.own_had_landed;
                counter.fetch_add(u64::from(outcome.is_ok()), Ordering::Relaxed);
                history.found_own = true;
                let mut image = history.tried.swap_remove(i);
                image.resets = found.resets;
                return Ok(Swapped::Done(image));
            }
            if !found.equals(from) || is_planted(Bug::UnknownIsFailed) {
                self.stats.miscompared.fetch_add(1, Ordering::Relaxed);
                return Ok(Swapped::Miscompare(found));
            }
            // What we compared with: not decided. Go round with a new nonce.
            history.false_miscompares += u32::from(outcome.is_ok());
            if !self.is_worth_while(tries) {
                return Err(outcome.err().unwrap_or_else(|| self.never_true(at)).into());
            }
            if Instant::now() >= history.say_next {
                history.say_next = Instant::now() + SAY_EVERY;
                let last = match &outcome {
                    Ok(_) => "miscompare, but the block is what it was compared with".to_owned(),
                    Err(e) => e.to_string(),
                };
                let (commands, since) = (history.tried.len(), history.begun.elapsed());
                log::warn!("{}", report::still_undecided(R::KIND, at, commands, since, &last));
            }
            rt::sleep(RESOLVE_PAUSE);
        }
    }

    /// Counts and logs a swap that did not simply succeed.
    fn conclude<R: SwapRecord>(
        &self,
        class: IoClass,
        from: &Image<R>,
        to: &R,
        swapped: &Result<Swapped<R>, AtsError>,
        history: &History<R>,
    ) {
        let unanswered = history.unanswered.is_some();
        let cause = match swapped {
            Ok(Swapped::Done(_)) => match (unanswered, history.found_own) {
                (true, true) => Cause::NoAnswerLanded,
                (true, false) => Cause::NoAnswerNotLanded,
                (false, true) => Cause::OwnWriteLanded,
                (false, false) if history.false_miscompares > 0 => Cause::FalseMiscompare,
                (false, false) => return,
            },
            Ok(Swapped::Miscompare(found)) => {
                let met = Met {
                    from,
                    to,
                    found,
                    age: history.age,
                    took: history.took,
                    newer_seen: history.newer_seen.is_some(),
                    unanswered,
                    found_is_ours: found.record.nonce().0.starts_with(&self.nonce_seed.to_le_bytes()),
                    me: self.me.get().copied(),
                };
                met.cause(|| self.still_alive(class))
            }
            Err(AtsError::Damaged(_)) => Cause::Damaged,
            Err(AtsError::Device(_)) if unanswered => Cause::NoAnswerUnresolved,
            // Refused by the lease or the device, certainly not executed: no outcome of a swap.
            Err(AtsError::Device(_) | AtsError::Forgotten) => return,
        };
        self.stats.count(R::KIND, cause);
        let unanswered = history.unanswered.map(|(first, commands)| (commands, first.elapsed()));
        if let (Some((_, resolved)), Ok(_)) = (unanswered, swapped) {
            self.stats.resolve_time.record(resolved);
        }
        self.log(Event {
            cause,
            at: to.address(),
            from: Some(from),
            found: match swapped {
                // What was answered "swapped" last is no news.
                Ok(Swapped::Done(image)) if history.found_own => Found::Image(image),
                Ok(Swapped::Done(_)) => Found::WhatWasExpected,
                Ok(Swapped::Miscompare(image)) => Found::Image(image),
                Err(AtsError::Damaged(error)) => Found::Damage(error),
                Err(AtsError::Device(_) | AtsError::Forgotten) => Found::Unread,
            },
            took: Some(history.took),
            usual: self.door.compare_and_write_time().summary(),
            age: history.age,
            newer_seen: history.newer_seen,
            unanswered,
            withheld: 0,
        });
    }

    fn log<R: SwapRecord>(&self, event: Event<'_, R>) {
        let level = report::level(event.cause);
        if !log::log_enabled!(level) {
            return;
        }
        if let Some(withheld) = self.budget.take(event.cause, Instant::now()) {
            let name_of = |slot| self.names.get().and_then(|names| names(slot));
            log::log!(level, "{}", report::line(&Event { withheld, ..event }, &name_of));
        }
    }

    /// Does our slot still say that we live? Asked only where the answer decides what a miscompare means.
    fn still_alive(&self, class: IoClass) -> bool {
        self.me.get().is_some_and(|me| {
            let slot = self
                .read_until_answered::<SlotRecord>(
                    class,
                    me.slot_at,
                    Tries { begun: Instant::now(), patience: None },
                )
                .map(|image| image.record);
            slot.is_ok_and(|r| r.state == SlotState::Live && r.incarnation == me.owner.incarnation)
        })
    }

    /// Is a command worth repeating after this error?
    fn may_repeat(&self, e: &DeviceError, tries: Tries) -> bool {
        let passing = matches!(e, DeviceError::Io { .. } | DeviceError::TimedOut { .. });
        passing && self.is_worth_while(tries)
    }

    /// Within the lease a device may come back, and the lease says for how long. Before and after it nobody else does:
    /// a mount that begins finds a device that answers soon, and a host that gave up is recovered without its word.
    fn is_worth_while(&self, tries: Tries) -> bool {
        let elapsed = tries.begun.elapsed();
        let leased = match self.door.lease().state() {
            LeaseState::Running { .. } => true,
            LeaseState::Unclaimed | LeaseState::Ended => elapsed < LEASELESS_PATIENCE,
        };
        leased && tries.patience.is_none_or(|most| elapsed < most)
    }

    /// Reads until an answer comes or the lease ends: without one nothing can be decided.
    fn read_until_answered<R: SwapRecord>(
        &self,
        class: IoClass,
        at: BlockNo,
        tries: Tries,
    ) -> Result<Image<R>, AtsError> {
        let mut say_next = Instant::now() + SAY_EVERY;
        loop {
            match self.read_unreported(class, at) {
                Err(AtsError::Device(e)) if self.may_repeat(&e, tries) => {
                    if Instant::now() >= say_next {
                        say_next = Instant::now() + SAY_EVERY;
                        log::warn!("what became of a swap of block {at} can't be read: {e}; trying again");
                    }
                    rt::sleep(RESOLVE_PAUSE);
                }
                other => return other,
            }
        }
    }

    /// Why a swap was given up that the device never answered truly.
    fn never_true(&self, at: BlockNo) -> DeviceError {
        let text =
            "each compare-and-write is answered \"miscompare\", though the block holds what it compares with";
        DeviceError::Io {
            op: "compare-and-write",
            offset_bytes: at.offset_bytes(),
            executed: Executed::Maybe,
            source: Arc::new(std::io::Error::other(text)),
        }
    }

    /// Makes an image durable, and what was seen before it: the device could forget it, and no host acts on a
    /// swapped image, its own or another's, before this. A reset since then proves nothing any more.
    pub fn settle<R>(&self, class: IoClass, image: &Image<R>) -> Result<(), AtsError> {
        self.settle_since(class, image.resets)
    }

    /// The same for all that was seen since the device had been reset so often ([`Door::resets`]).
    pub fn settle_since(&self, class: IoClass, resets: u64) -> Result<(), AtsError> {
        if is_planted(Bug::ActsBeforeFlush) {
            return Ok(());
        }
        self.door.flush(class)?;
        if self.door.geometry().volatile_cache && self.door.resets() != resets {
            return Err(AtsError::Forgotten);
        }
        Ok(())
    }
}
