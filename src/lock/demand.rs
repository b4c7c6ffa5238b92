//! Demand without a network: request blocks, doorbells, and the thread that looks at them.
//!
//! The request block is the truth, the doorbell a hint. A waiter's request write completes *before* it reads
//! the holder's doorbell and swaps its bit in, unless the bit is set on the disk. The holder swaps the bits
//! to zero *before* it reads the requests. In any other order a wake-up can be lost. As a net, all living
//! slots' request blocks are read once a second: a lost ring costs a second. Our own is read along: it is not flushed,
//! and what the device forgot is written again.
//!
//! Not for: deciding what a request means (`give`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::device::AlignedBuf;
use crate::heartbeat::Peers;
use crate::layout::Block;
use crate::layout::demand::{DoorbellRecord, MAX_REQUESTS, Request, RequestBlock, Want};
use crate::layout::geometry::Geometry;
use crate::lease::IoClass;
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Condvar, Instant, JoinHandle, Mutex};
use crate::types::{BLOCK_BYTES, BlockNo, Owner, Slot, SlotSet};

/// Who hears what others want.
pub(super) trait RequestSink: Send + Sync {
    fn on_request(self: Arc<Self>, by: Owner, request: Request);
}

struct Own {
    sequence: u64,
    requests: BTreeMap<BlockNo, Request>,
    /// The block on the disk lists requests that ended.
    stale: bool,
    /// The locks that the block on the disk lists.
    published: BTreeSet<BlockNo>,
}

#[derive(Default)]
struct Wake {
    look_at: SlotSet,
    stop: bool,
}

/// This host's side of the demand protocol.
pub struct Demand {
    ats: Arc<Ats>,
    geometry: Geometry,
    me: Owner,
    peers: Arc<Peers>,
    own: Mutex<Own>,
    wake: Mutex<Wake>,
    woken: Condvar,
    sink: OnceLock<Weak<super::LockManager>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// When the thread last read the doorbell or all requests, in nanoseconds of the runtime's clock since `origin`.
    last_look_ns: AtomicU64,
    origin: Instant,
}

/// The doorbell is looked at this often while we were asked lately, and this seldom when nobody asks.
const POLL_BUSY: Duration = Duration::from_millis(1);
const POLL_IDLE: Duration = Duration::from_millis(100);
/// "Lately".
const BUSY_FOR: Duration = Duration::from_millis(200);
/// All living slots' requests are read this often.
const NET_PERIOD: Duration = Duration::from_secs(1);

impl Demand {
    pub fn new(ats: Arc<Ats>, geometry: Geometry, me: Owner, peers: Arc<Peers>) -> Arc<Self> {
        Arc::new(Demand {
            ats,
            geometry,
            me,
            peers,
            own: Mutex::new(Own {
                sequence: 0,
                requests: BTreeMap::new(),
                stale: true,
                published: BTreeSet::new(),
            }),
            wake: Mutex::new(Wake::default()),
            woken: Condvar::new(),
            sink: OnceLock::new(),
            thread: Mutex::new(None),
            last_look_ns: AtomicU64::new(0),
            origin: Instant::now(),
        })
    }

    pub(super) fn set_sink(&self, sink: Weak<super::LockManager>) {
        let _ = self.sink.set(sink);
    }

    /// Starts the thread. The request block is emptied first: requests of an earlier life are void.
    pub fn start(self: &Arc<Self>) -> Result<(), AtsError> {
        self.publish(&mut self.own.lock(), IoClass::Wish)?;
        let this = self.clone();
        *self.thread.lock() = Some(rt::spawn_urgent("demand", move || this.run()));
        Ok(())
    }

    pub fn stop(&self) {
        self.wake.lock().stop = true;
        self.woken.notify_all();
        if let Some(thread) = self.thread.lock().take() {
            // A panic of the thread was reported when it happened.
            let _ = thread.join();
        }
    }

    /// How long ago the doorbell was last looked at: the beat vouches for it.
    pub fn last_look(&self) -> Duration {
        let now = Instant::now().saturating_duration_since(self.origin).as_nanos() as u64;
        Duration::from_nanos(now.saturating_sub(self.last_look_ns.load(Ordering::Relaxed)))
    }

    /// The doorbell, or all requests, were really read: a look that failed hears nobody, and the beat must not vouch
    /// for it.
    fn looked(&self) {
        let now = Instant::now().saturating_duration_since(self.origin).as_nanos() as u64;
        self.last_look_ns.store(now, Ordering::Relaxed);
    }

    /// Writes a wish into our request block, unless it stands there already.
    pub(super) fn post(&self, lock: BlockNo, want: Want, since: u64) -> Result<(), AtsError> {
        let mut own = self.own.lock();
        // One request a lock: the strongest wish, and the age of the oldest.
        let request = match own.requests.get(&lock) {
            Some(old) if old.want != Want::Openers && want != Want::Openers => {
                Request { lock, want: old.want.max(want), since: old.since.min(since) }
            }
            _ => Request { lock, want, since },
        };
        if own.requests.get(&lock) == Some(&request) {
            return Ok(());
        }
        if own.requests.len() >= MAX_REQUESTS && !own.requests.contains_key(&lock) {
            // No place: the net of the others does not see this wait until one ends; the waiter's own
            // polling goes on.
            return Ok(());
        }
        own.requests.insert(lock, request);
        self.publish(&mut own, IoClass::Wish)
    }

    /// The wait ended. Written with the next wish, or within a second.
    pub(super) fn withdraw(&self, lock: BlockNo) {
        let mut own = self.own.lock();
        own.stale |= own.requests.remove(&lock).is_some();
    }

    /// Asks every living opener of an inode whether it still has it open.
    pub fn ask_openers(&self, lock: BlockNo, openers: &[Owner]) -> Result<(), AtsError> {
        self.post(lock, Want::Openers, 0)?;
        openers.iter().try_for_each(|owner| self.ring(*owner))
    }

    /// The answer to [`Demand::ask_openers`] came.
    pub fn openers_answered(&self, lock: BlockNo) {
        self.withdraw(lock);
    }

    fn publish(&self, own: &mut Own, class: IoClass) -> Result<(), AtsError> {
        own.sequence += 1;
        own.stale = false;
        own.published = own.requests.keys().copied().collect();
        let block = RequestBlock {
            address: self.geometry.request(self.me.slot),
            incarnation: self.me.incarnation,
            sequence: own.sequence,
            requests: own.requests.values().copied().collect(),
        };
        let mut bytes = AlignedBuf::zeroed(BLOCK_BYTES);
        if let Some(bytes) = bytes.first_chunk_mut::<BLOCK_BYTES>() {
            block.encode(self.ats.volume(), bytes);
        }
        match self.ats.door().write(class, block.address, &bytes) {
            Ok(()) => Ok(()),
            // It may be there, come late over the next one, or never: the net writes it again, and looks whether what it
            // wrote is what stands there.
            Err(e) if (e.may_come_later() || e.is_to_be_made_again()) && self.ats.door().lease().allows() => {
                log::warn!("what this host wants: {e}; written again within a second");
                own.stale = true;
                Ok(())
            }
            Err(e) => {
                own.stale = true;
                Err(e.into())
            }
        }
    }

    /// Rings at a host: our bit, unless it is set there.
    pub(super) fn ring(&self, at: Owner) -> Result<(), AtsError> {
        if at.slot == self.me.slot {
            return Ok(());
        }
        let bell = self.geometry.doorbell(at.slot);
        let mut image: Image<DoorbellRecord> = match self.ats.read(IoClass::Wish, bell) {
            Ok(image) => image,
            // Only a hint: without it our request is found within a second.
            Err(AtsError::Damaged(_)) => return Ok(()),
            Err(e) => return Err(e),
        };
        while !image.record.ringers.contains(self.me.slot) {
            let to = DoorbellRecord {
                ringers: image.record.ringers.with(self.me.slot),
                swap_counter: image.record.swap_counter + 1,
                ..image.record.clone()
            };
            match self.ats.swap(IoClass::Wish, &image, &to)? {
                Swapped::Done(_) => break,
                Swapped::Miscompare(found) => image = found,
            }
        }
        Ok(())
    }

    /// What this life of a slot still wants of the lock.
    pub(super) fn request_of(&self, owner: Owner, lock: BlockNo) -> Result<Option<Request>, AtsError> {
        let block = self.read_requests(owner.slot, IoClass::Wish)?;
        let block = block.filter(|b| b.incarnation == owner.incarnation);
        Ok(block.and_then(|b| b.requests.into_iter().find(|r| r.lock == lock && r.want != Want::Openers)))
    }

    /// Before a lock is passed on: a wish of ours that was served must not stand on the disk any more, or two
    /// hosts would pass the lock to and fro for nobody.
    pub(super) fn clear_served(&self, lock: BlockNo) -> Result<(), AtsError> {
        let mut own = self.own.lock();
        if own.published.contains(&lock) && !own.requests.contains_key(&lock) {
            self.publish(&mut own, IoClass::Wish)?;
        }
        Ok(())
    }

    /// The waiters an image carries: their requests are read at once.
    pub(super) fn look_at(&self, slots: SlotSet) {
        let mut wake = self.wake.lock();
        wake.look_at = wake.look_at.union(slots);
        self.woken.notify_all();
    }

    fn read_requests(&self, slot: Slot, class: IoClass) -> Result<Option<RequestBlock>, AtsError> {
        let at = self.geometry.request(slot);
        let mut bytes = AlignedBuf::zeroed(BLOCK_BYTES);
        // A plain write of its host may be under way: a torn block is read again.
        for _ in 0..3 {
            self.ats.door().read(class, at, &mut bytes)?;
            if let Some(block) = self.decode(&bytes, at) {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }

    fn decode(&self, bytes: &[u8], at: BlockNo) -> Option<RequestBlock> {
        let block: &Block = bytes.first_chunk()?;
        RequestBlock::decode(block, self.ats.volume(), at).ok()
    }

    fn run(&self) {
        let mut pause = POLL_BUSY;
        let mut last_asked = Instant::now();
        let mut next_net = Instant::now() + NET_PERIOD;
        loop {
            let until = Instant::now() + pause;
            let look_at = {
                let mut wake = self.wake.lock();
                while !wake.stop && wake.look_at.is_empty() && Instant::now() < until {
                    wake = self.woken.wait_until(wake, until).0;
                }
                if wake.stop {
                    return;
                }
                std::mem::take(&mut wake.look_at)
            };
            let mut failed = false;
            let ringers = match self.answer_doorbell() {
                Ok(ringers) => {
                    self.looked();
                    ringers
                }
                // Said and counted by `ats`; the net goes on.
                Err(AtsError::Damaged(_)) => {
                    self.looked();
                    SlotSet::EMPTY
                }
                Err(e) => {
                    if !self.ats.door().lease().allows() {
                        return;
                    }
                    log::warn!("looking at the doorbell: {e}");
                    failed = true;
                    SlotSet::EMPTY
                }
            };
            let now = Instant::now();
            let asked = ringers.union(look_at);
            if !asked.is_empty() {
                last_asked = now;
                for slot in asked.without(self.me.slot).iter() {
                    match self.read_requests(slot, IoClass::Wish) {
                        Ok(Some(block)) => self.deliver(slot, &block),
                        Ok(None) => log::warn!("the request block of {slot:?} is damaged"),
                        Err(e) => log::warn!("reading the requests of {slot:?}: {e}"),
                    }
                }
            }
            if now >= next_net && !is_planted(Bug::NetTakenOut) {
                next_net = now + NET_PERIOD;
                match self.net() {
                    Ok(()) => self.looked(),
                    Err(e) => log::warn!("reading the requests of all hosts: {e}"),
                }
            }
            let busy = last_asked.elapsed() < BUSY_FOR;
            // A device that fails is not asked, and its failure not said, a thousand times a second.
            pause = if failed {
                POLL_IDLE
            } else if busy {
                POLL_BUSY
            } else {
                (pause * 5 / 4).min(POLL_IDLE)
            };
        }
    }

    /// Reads our doorbell and, if somebody rang, swaps it to silence. Who rang.
    fn answer_doorbell(&self) -> Result<SlotSet, AtsError> {
        let bell = self.geometry.doorbell(self.me.slot);
        let mut image: Image<DoorbellRecord> = self.ats.read(IoClass::Demand, bell)?;
        // All that were seen: a swap that miscompared may have silenced the bell all the same, and whose bit it
        // took would not be looked at. Looking once too often costs a read.
        let mut ringers = SlotSet::EMPTY;
        while !image.record.ringers.is_empty() {
            ringers = ringers.union(image.record.ringers);
            let to = DoorbellRecord {
                ringers: SlotSet::EMPTY,
                swap_counter: image.record.swap_counter + 1,
                ..image.record.clone()
            };
            match self.ats.swap(IoClass::Wish, &image, &to)? {
                Swapped::Done(_) => break,
                Swapped::Miscompare(found) => image = found,
            }
        }
        Ok(ringers)
    }

    /// The safety net: our ended wishes go, and everybody's standing wishes are read.
    fn net(&self) -> Result<(), AtsError> {
        // Whoever writes it just now may wait for an answer that was lost; this thread has others to hear.
        if let Some(mut own) = self.own.try_lock()
            && own.stale
        {
            self.publish(&mut own, IoClass::Demand)?;
        }
        let living = self.peers.living();
        if living.is_empty() {
            return Ok(());
        }
        let sequence = self.own.try_lock().map(|own| own.sequence);
        let slots = || living.iter().map(|o| o.slot).chain([self.me.slot]);
        let (Some(first), Some(last)) = (slots().min(), slots().max()) else { return Ok(()) };
        let count = usize::from(last.0 - first.0) + 1;
        let mut buf = AlignedBuf::zeroed(count * BLOCK_BYTES);
        self.ats.door().read(IoClass::Demand, self.geometry.request(first), &mut buf)?;
        let block_of = |slot: Slot| {
            let offset = usize::from(slot.0 - first.0) * BLOCK_BYTES;
            buf.get(offset..offset + BLOCK_BYTES).and_then(|b| self.decode(b, self.geometry.request(slot)))
        };
        for owner in &living {
            // A torn block is met again a second later.
            if let Some(block) = block_of(owner.slot) {
                self.deliver(owner.slot, &block);
            }
        }
        let ours = block_of(self.me.slot);
        let as_written =
            |b: RequestBlock| b.incarnation == self.me.incarnation && Some(b.sequence) == sequence;
        if sequence.is_some() && !ours.is_some_and(as_written) && !is_planted(Bug::WishNotReadBack) {
            // The device forgot it, or a late write of an earlier life came over it: nobody would know what we
            // want, or all would believe that we want what we had long ago.
            if let Some(mut own) = self.own.try_lock()
                && Some(own.sequence) == sequence
            {
                self.publish(&mut own, IoClass::Demand)?;
            }
        }
        Ok(())
    }

    fn deliver(&self, slot: Slot, block: &RequestBlock) {
        let owner = Owner { slot, incarnation: block.incarnation };
        let known = self.peers.last_seen(slot).and_then(|r| r.living(slot));
        let living = match known {
            Some(living) if living == owner => true,
            // A life we have not seen yet, or none.
            _ => self.peers.fresh(slot).is_ok_and(|r| r.living(slot) == Some(owner)),
        };
        if !living {
            return;
        }
        let Some(sink) = self.sink.get().and_then(Weak::upgrade) else { return };
        for request in &block.requests {
            sink.clone().on_request(owner, *request);
        }
    }
}
