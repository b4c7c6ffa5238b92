//! Keeping hosts out while a volume is changed: the volume lock says *maintenance*, which is that a beating slot of
//! this program holds it exclusively; nobody else ever does.
//!
//! Order, and what breaks without it: claim a slot; swap the volume lock; watch all other slots for a full dead time. A
//! mount claims its slot first and reads the volume lock afterwards. So either it sees the lock and leaves, or its slot
//! moves while we watch and we give the lock back as it was. A host that was only slow beats meanwhile, too.
//!
//! A program that dies leaves the lock behind. Mounts are refused until fsck is run again: what it was changing may
//! be half done.
//!
//! Not for: deciding what to repair (`repair`).

use std::sync::Arc;
use std::time::Duration;

use super::{FsckError, Observer, Progress};
use crate::ats::{Ats, AtsError, Image, Swapped};
use crate::device::{BlockDevice, Fencing, FencingKey};
use crate::heartbeat::{Claim, Heartbeat, HostIdentity, Waiting, claim};
use crate::inspect::Volume;
use crate::inspect::names::printable;
use crate::inspect::watch::SlotWatch;
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::slot::{Durations, SlotState};
use crate::lease::{Door, EndCause, IoClass, Lease};
use crate::recovery::{Recovery, RecoveryError};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Instant};
use crate::types::{Incarnation, Owner, SlotSet, Tenure};

/// A volume that is ours alone.
pub struct Maintenance {
    pub ats: Arc<Ats>,
    pub heartbeat: Arc<Heartbeat>,
    recovery: Recovery,
    lock: Image<LockRecord>,
    /// The lock as it was found.
    before: LockRecord,
}

/// Takes the volume for maintenance. Whoever calls made sure that nothing moves ([`super::quiet`]).
pub fn enter(
    device: &Arc<dyn BlockDevice>,
    volume: &Volume<'_>,
    host: &HostIdentity,
    out: &mut dyn Observer,
) -> Result<Maintenance, FsckError> {
    let geometry = *volume.geometry();
    let door = Arc::new(Door::new(device.clone(), Arc::new(Lease::new())));
    let ats = Arc::new(Ats::new(door, volume.id()));
    let hold_ms = u32::try_from(device.geometry().hold_time.as_millis()).unwrap_or(u32::MAX);
    let durations = Durations { hold_ms, ..volume.superblock.durations };
    let mut waiting = |waiting: &Waiting<'_>| {
        let (done, of) = (waiting.so_far.as_millis() as u64, waiting.of.as_millis() as u64);
        out.progress(Progress { pass: "waiting for a slot", done, of })
    };
    let fenced = device.fencing().is_some();
    let Claim { me, image, issued } = claim(&ats, &geometry, host, durations, fenced, &mut waiting)?;
    let heartbeat = Heartbeat::start(ats.clone(), geometry, me, image, issued);
    let registered = device.fencing().map_or(Ok(()), |fencing| fencing.register(FencingKey::of(me)));
    let taken = registered.map_err(FsckError::from).and_then(|()| take_lock(&ats, volume, me));
    let entered = taken.and_then(|(lock, before)| {
        let recovery = Recovery::new(ats.clone(), geometry, me, false);
        let maintenance = Maintenance { ats, heartbeat: heartbeat.clone(), recovery, lock, before };
        match maintenance.watch_others(volume, out) {
            Ok(()) => Ok(maintenance),
            Err(e) => {
                maintenance.give_back()?;
                Err(e)
            }
        }
    });
    if entered.is_err() {
        leave_slot(&heartbeat, device.fencing())?;
    }
    entered
}

fn leave_slot(heartbeat: &Heartbeat, fencing: Option<&dyn Fencing>) -> Result<(), FsckError> {
    heartbeat.leave()?;
    if let Some(fencing) = fencing
        && let Err(e) = fencing.unregister()
    {
        log::warn!("giving the fencing key back: {e}");
    }
    Ok(())
}

fn take_lock(
    ats: &Ats,
    volume: &Volume<'_>,
    me: Owner,
) -> Result<(Image<LockRecord>, LockRecord), FsckError> {
    let at = volume.geometry().volume_lock();
    let mut image: Image<LockRecord> = ats.read(IoClass::Setup, at)?;
    let mut before = image.record.clone();
    loop {
        if !matches!(image.record.mode, LockMode::Exclusive { owner, .. } if owner == me) {
            before = image.record.clone();
            let swap_counter = before.swap_counter + 1;
            let mode = LockMode::Exclusive { owner: me, tenure: Tenure(swap_counter) };
            let to = LockRecord { mode, sharers: SlotSet::EMPTY, next: None, swap_counter, ..before.clone() };
            match ats.swap(IoClass::Setup, &image, &to)? {
                Swapped::Done(ours) => image = ours,
                Swapped::Miscompare(found) => {
                    image = found;
                    continue;
                }
            }
        }
        match ats.settle(IoClass::Setup, &image) {
            Ok(()) => return Ok((image, before)),
            // The device forgot something, perhaps this: what is there now decides.
            Err(AtsError::Forgotten) => image = ats.read(IoClass::Setup, at)?,
            Err(e) => return Err(e.into()),
        }
    }
}

/// The life before this one.
pub fn before(life: Incarnation) -> Incarnation {
    Incarnation(life.0.saturating_sub(1))
}

impl Maintenance {
    pub fn me(&self) -> Owner {
        self.heartbeat.me()
    }

    /// All other slots for a full dead time: nobody lives who could believe that he shares the volume lock.
    fn watch_others(&self, volume: &Volume<'_>, out: &mut dyn Observer) -> Result<(), FsckError> {
        if is_planted(Bug::MaintenanceUnwatched) {
            return Ok(());
        }
        let me = self.me().slot;
        let mut watch = SlotWatch::start(volume)?;
        let mut moved: Option<Instant> = None;
        loop {
            let (watched, of) = (watch.watched_for(), watch.full_dead_time());
            let (done, all) = (watched.min(of).as_millis() as u64, of.as_millis() as u64);
            if !out.progress(Progress { pass: "keeping other hosts out", done, of: all }) {
                return Err(FsckError::Cancelled);
            }
            let living = watch.slots.iter().find(|s| {
                let lives = s.record.as_ref().is_ok_and(|r| r.state == SlotState::Live);
                s.slot != me && s.last_change.is_some() && lives
            });
            match living {
                // A mount that came too late sees the lock and leaves at once; whoever stays, lives here.
                Some(slot) if moved.is_some_and(|since| since.elapsed() > watch.two_beats() * 2) => {
                    let host = printable(slot.host_name());
                    return Err(FsckError::InUse { host, slot: slot.slot });
                }
                Some(_) => drop(moved.get_or_insert_with(Instant::now)),
                None if watched >= of => return Ok(()),
                None => moved = None,
            }
            watch.run(watched + Duration::from_millis(250))?;
        }
    }

    /// Replays the journals of the dead. What can't be replayed is for the check to find.
    pub fn recover_the_dead(&self, volume: &Volume<'_>) -> Result<(), FsckError> {
        self.recover_own()?;
        let beat = Duration::from_millis(u64::from(volume.superblock.durations.beat_ms));
        // Nothing moved for a full dead time; what is missing is a last look at it, and what that takes.
        let until = Instant::now() + 8 * beat;
        loop {
            self.recovery.recover_the_dead(self.heartbeat.peers());
            let open = volume.geometry().all_slots().filter(|s| *s != self.me().slot).any(|slot| {
                volume.slot(slot).is_ok_and(|record| {
                    !record.settled(record.incarnation) && record.state != SlotState::Unrecoverable
                })
            });
            if !open || Instant::now() >= until {
                return Ok(());
            }
            rt::sleep(beat / 4);
        }
    }

    /// What an earlier life of our own slot left: where no other was free, we took it over.
    fn recover_own(&self) -> Result<(), FsckError> {
        let record = self.heartbeat.record();
        if record.settled(before(record.incarnation)) {
            return Ok(());
        }
        let passing = |e: RecoveryError| match e {
            RecoveryError::Ats(e) => e.into(),
            RecoveryError::Device(e) => e.into(),
            e => FsckError::Recovery(e),
        };
        self.recovery.fence_earlier(&record).map_err(passing)?;
        match self.recovery.replay(self.me().slot, record.settled_up_to) {
            Ok(replayed) => Ok(self.heartbeat.earlier_settled(replayed.net)?),
            Err(RecoveryError::Unrecoverable { owner, reason }) => {
                log::error!("the journal of {owner} can't be replayed: {reason}");
                Ok(())
            }
            Err(e) => Err(passing(e)),
        }
    }

    /// The lock as it was before: somebody lives who may count on it.
    fn give_back(&self) -> Result<(), FsckError> {
        let swap_counter = self.lock.record.swap_counter + 1;
        self.swap_lock(LockRecord { swap_counter, ..self.before.clone() })
    }

    fn swap_lock(&self, to: LockRecord) -> Result<(), FsckError> {
        match self.ats.swap(IoClass::Setup, &self.lock, &to)? {
            Swapped::Done(done) => Ok(self.ats.settle(IoClass::Setup, &done)?),
            Swapped::Miscompare(found) => Err(FsckError::Stolen(format!("{:?}", found.record.mode))),
        }
    }

    /// Hosts may come again.
    pub fn leave(&self) -> Result<(), FsckError> {
        let record = &self.lock.record;
        let freed = self.swap_lock(LockRecord {
            mode: LockMode::Free,
            swap_counter: record.swap_counter + 1,
            change_counter: record.change_counter + 1,
            ..record.clone()
        });
        let left = leave_slot(&self.heartbeat, self.ats.door().fencing());
        self.ats.door().lease().end(EndCause::Left, "maintenance ended");
        freed.and(left)
    }
}
