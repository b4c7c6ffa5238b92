//! Heartbeats: claiming a slot, beating in it, watching the others, leaving.
//!
//! * A beat is a swap from our last image. A miscompare that shows another writer means that we were
//!   declared dead: the lease ends at once.
//! * Others are judged by *change*, on our own clock: a slot is dead when it did not change for its dead
//!   time plus its hold time, measured from the end of the first read that showed the image to the issue of
//!   the last one. Clocks of hosts are never compared.
//! * The beat thread only beats. The watcher and the fence timer are threads of their own, so that a slow
//!   scan or a stuck beat delays nothing else.
//!
//! Not for: recovering the dead (`recovery`), or knowing locks.

mod claim;
mod watch;

pub use claim::{Claim, ClaimError, HostIdentity, Waiting, claim};
pub use watch::{Liveness, Peers};

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::ats::{Ats, AtsError, Image, SwapRecord, Swapped};
use crate::layout::geometry::Geometry;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::lease::{EndCause, IoClass, Lease};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Condvar, Instant, JoinHandle, Mutex};
use crate::types::{Incarnation, Owner};

/// What others read in our slot besides the beat: kept by whoever knows, published by the next beat.
#[derive(Default, Debug)]
pub struct Published {
    pub net_blocks: AtomicI64,
    pub net_inodes: AtomicI64,
}

impl Published {
    /// Blocks and inodes.
    pub fn net(&self) -> (i64, i64) {
        (self.net_blocks.load(Ordering::Relaxed), self.net_inodes.load(Ordering::Relaxed))
    }
}

/// This host's place on the volume.
pub struct Heartbeat {
    ats: Arc<Ats>,
    lease: Arc<Lease>,
    me: Owner,
    peers: Arc<Peers>,
    pub published: Arc<Published>,
    image: Mutex<Image<SlotRecord>>,
    stop: Arc<Stop>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Nanoseconds that the slowest beat so far took.
    slowest_beat_ns: AtomicU64,
    /// What the beat vouches for besides itself: `Err` names what is stuck.
    vital: OnceLock<Vital>,
}

type Vital = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Tells threads to end, and wakes them from their sleep.
#[derive(Default)]
pub struct Stop {
    flag: AtomicBool,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Stop {
    pub fn stop(&self) {
        self.flag.store(true, Ordering::Release);
        let _guard = self.lock.lock();
        self.wake.notify_all();
    }

    pub fn is_stopped(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    /// Sleeps until `until` or until stopped; true: go on.
    pub fn sleep_until(&self, until: Instant) -> bool {
        let mut guard = self.lock.lock();
        while !self.is_stopped() {
            if Instant::now() >= until {
                return true;
            }
            guard = self.wake.wait_until(guard, until).0;
        }
        false
    }
}

impl Heartbeat {
    /// Starts beating and watching in a slot that [`claim`] won.
    pub fn start(
        ats: Arc<Ats>,
        geometry: Geometry,
        me: Owner,
        image: Image<SlotRecord>,
        claimed_at: Instant,
    ) -> Arc<Self> {
        let lease = ats.door().lease().clone();
        let durations = image.record.durations;
        let published = Published {
            net_blocks: AtomicI64::new(image.record.net_blocks),
            net_inodes: AtomicI64::new(image.record.net_inodes),
        };
        lease.extend(claimed_at, Duration::from_millis(durations.lease_ms.into()));
        let this = Arc::new(Heartbeat {
            peers: Arc::new(Peers::new(ats.clone(), geometry, me)),
            ats,
            lease,
            me,
            published: Arc::new(published),
            image: Mutex::new(image),
            stop: Arc::new(Stop::default()),
            threads: Mutex::new(Vec::new()),
            slowest_beat_ns: AtomicU64::new(0),
            vital: OnceLock::new(),
        });
        this.ats.set_me(me, geometry.slot(me.slot));
        let peers = Arc::downgrade(&this.peers);
        this.ats.set_names(move |slot| Some(peers.upgrade()?.last_seen(slot)?.host_name));
        let beat = {
            let (this, period) = (this.clone(), Duration::from_millis(durations.beat_ms.into()));
            rt::spawn_urgent("beat", move || this.beat_loop(claimed_at, period))
        };
        let watch = {
            let (peers, stop) = (this.peers.clone(), this.stop.clone());
            let period = Duration::from_millis(durations.beat_ms.into());
            rt::spawn_urgent("watch", move || peers.watch_loop(&stop, period))
        };
        this.threads.lock().extend([beat, watch]);
        this
    }

    pub fn me(&self) -> Owner {
        self.me
    }

    pub fn peers(&self) -> &Arc<Peers> {
        &self.peers
    }

    /// Our slot as we last wrote it.
    pub fn record(&self) -> SlotRecord {
        self.image.lock().record.clone()
    }

    /// The slowest beat so far, from issue to answer.
    pub fn slowest_beat(&self) -> Duration {
        Duration::from_nanos(self.slowest_beat_ns.load(Ordering::Relaxed))
    }

    /// From now on the beat stops when `vital` fails: a host that beats but does not answer others would
    /// keep them waiting for ever.
    pub fn vouch_for(&self, vital: Vital) {
        let _ = self.vital.set(vital);
    }

    fn beat_loop(&self, claimed_at: Instant, period: Duration) {
        let mut next = claimed_at + period;
        while self.stop.sleep_until(next) {
            let issued = Instant::now();
            if let Err(reason) = self.beat(issued) {
                log::error!("{}: {reason}; this host stops using the volume", self.me);
                self.lease.end(EndCause::Silence, &reason);
                return;
            }
            let took = issued.elapsed();
            self.slowest_beat_ns.fetch_max(took.as_nanos() as u64, Ordering::Relaxed);
            if took > period {
                log::warn!("a beat took {} ms", took.as_millis());
            }
            next = (next + period).max(Instant::now());
        }
    }

    /// One beat. `Err`: the slot is no longer ours, or the lease ended.
    fn beat(&self, issued: Instant) -> Result<(), String> {
        if let Some(vital) = self.vital.get()
            && !is_planted(Bug::DeafAndBeating)
        {
            vital()?;
        }
        let mut image = self.image.lock();
        if self.stop.is_stopped() {
            return Ok(());
        }
        let mut record = image.record.clone();
        record.beat += 1;
        record.net_blocks = self.published.net_blocks.load(Ordering::Relaxed);
        record.net_inodes = self.published.net_inodes.load(Ordering::Relaxed);
        let (secs, nanos) = rt::wall_clock();
        record.wall_ns = secs.saturating_mul(1_000_000_000).saturating_add(nanos.into());
        match self.ats.swap(IoClass::Beat, &image, &record) {
            Ok(Swapped::Done(new)) => {
                let lease_ms = record.durations.lease_ms;
                *image = new;
                if self.lease.extend(issued, Duration::from_millis(lease_ms.into())) {
                    return Ok(());
                }
                Err(self.lease.reason().unwrap_or_default())
            }
            Ok(Swapped::Miscompare(found)) if rolled_back(&image.record, &found.record) => {
                // Beats are not flushed, so a device that forgets takes them back. Others see the slot change
                // and wait anew; our lease goes on from the beats that landed.
                log::warn!(
                    "the LUN shows beat {} of this host instead of {}",
                    found.record.beat,
                    image.record.beat
                );
                self.ats.door().notice_reset();
                *image = found;
                drop(image);
                self.beat(issued)
            }
            Ok(Swapped::Miscompare(found)) => {
                let reason = declared_dead(&image.record, &found.record);
                self.lease.end(EndCause::ShutOut, &reason);
                Err(reason)
            }
            Err(AtsError::Device(e)) if self.lease.allows() => {
                // The lease decides how long this may go on.
                log::warn!("beat failed: {e}");
                Ok(())
            }
            Err(e) => Err(e.to_string()),
        }
    }

    /// What an earlier life of this slot owed is in place: from now on only this life is open. `net` is what the
    /// slot had allocated when that life ended, if it came so far as to say.
    pub fn earlier_settled(&self, net: Option<(i64, i64)>) -> Result<(), AtsError> {
        if let Some((blocks, inodes)) = net {
            self.published.net_blocks.store(blocks, Ordering::Relaxed);
            self.published.net_inodes.store(inodes, Ordering::Relaxed);
        }
        self.change_slot(|record| {
            record.settled_up_to = Incarnation(record.incarnation.0.saturating_sub(1));
            record.keyless = false;
        })
    }

    /// Ends this life: cleanly, where nothing is outstanding. Where an earlier life of the slot still has to be
    /// recovered, this one withdraws and leaves that to whoever comes next. Call it last.
    pub fn leave(&self) -> Result<(), AtsError> {
        self.stop_threads();
        self.change_slot(|record| {
            if record.settled(Incarnation(record.incarnation.0.saturating_sub(1))) {
                record.state = SlotState::Left;
                record.settled_up_to = record.incarnation;
            } else {
                record.state = SlotState::Withdrawn;
            }
        })
    }

    /// Ends this life, which came to nothing, because what an earlier one left in the slot can't be recovered.
    pub fn give_up_slot(&self) -> Result<(), AtsError> {
        self.stop_threads();
        self.change_slot(|record| record.state = SlotState::Unrecoverable)
    }

    fn stop_threads(&self) {
        self.stop.stop();
        for thread in self.threads.lock().drain(..) {
            // A panic of the thread was reported when it happened; leaving goes on.
            let _ = thread.join();
        }
    }

    /// Changes more of our slot than a beat does, and makes it durable.
    fn change_slot(&self, change: impl Fn(&mut SlotRecord)) -> Result<(), AtsError> {
        let mut image = self.image.lock();
        loop {
            let mut record = image.record.clone();
            record.beat += 1;
            change(&mut record);
            (record.net_blocks, record.net_inodes) = self.published.net();
            match self.ats.swap(IoClass::Setup, &image, &record)? {
                Swapped::Done(new) => {
                    *image = new;
                    if self.settle_slot(&mut image)? {
                        return Ok(());
                    }
                }
                // We had left, and another host has claimed the slot already.
                Swapped::Miscompare(found) if found.record.proves(&record) => {
                    *image = found;
                    break;
                }
                Swapped::Miscompare(found) if rolled_back(&image.record, &found.record) => {
                    self.ats.door().notice_reset();
                    *image = found;
                }
                Swapped::Miscompare(found) => {
                    let reason = declared_dead(&image.record, &found.record);
                    log::error!("{}: {reason}", self.me);
                    self.lease.end(EndCause::ShutOut, &reason);
                    break;
                }
            }
        }
        Ok(())
    }

    /// Makes our slot durable as it is. False: the device took it back, and `image` shows what it holds now.
    fn settle_slot(&self, image: &mut Image<SlotRecord>) -> Result<bool, AtsError> {
        loop {
            match self.ats.settle(IoClass::Setup, image) {
                Ok(()) => return Ok(true),
                Err(AtsError::Forgotten) => {}
                Err(e) => return Err(e),
            }
            let found = self.ats.read::<SlotRecord>(IoClass::Setup, image.record.address)?;
            let same = found.record.nonce == image.record.nonce;
            let ours = found.record.incarnation == self.me.incarnation;
            *image = found;
            if !same {
                // What another life of the slot shows proves that ours was there.
                return Ok(!ours);
            }
        }
    }

    /// The last word of a host that gives up by itself, after its lease ended: none of its changes may come any
    /// more ([`Door::changes_are_over`](crate::lease::Door::changes_are_over)). Others recover it at once.
    pub fn withdraw(&self) -> Result<(), AtsError> {
        self.stop.stop();
        let mut image = self.image.lock();
        while image.record.state != SlotState::Withdrawn {
            let mut record = image.record.clone();
            record.beat += 1;
            record.state = SlotState::Withdrawn;
            (record.net_blocks, record.net_inodes) = self.published.net();
            *image = match self.ats.swap(IoClass::Farewell, &image, &record)? {
                // A beat of ours whose answer nobody waited for, or an older one that the device brought back.
                Swapped::Miscompare(found)
                    if found.record.incarnation == self.me.incarnation
                        && found.record.state == SlotState::Live =>
                {
                    found
                }
                Swapped::Done(new) => new,
                // Others have begun without it.
                Swapped::Miscompare(_) => return Ok(()),
            };
        }
        Ok(())
    }

    /// Stops the threads without touching the disk: after the lease ended.
    pub fn abandon(&self) {
        self.stop.stop();
    }
}

/// An older state of this very life, which only the device can bring back.
fn rolled_back(ours: &SlotRecord, found: &SlotRecord) -> bool {
    found.incarnation == ours.incarnation && found.beat < ours.beat && found.state == SlotState::Live
}

fn declared_dead(ours: &SlotRecord, found: &SlotRecord) -> String {
    match found.recoverer {
        Some(by) => format!("this host was declared dead by {by} (its slot says {:?})", found.state),
        None => format!(
            "another writer changed this host's slot (state {:?}, incarnation {}, ours {})",
            found.state, found.incarnation.0, ours.incarnation.0
        ),
    }
}
