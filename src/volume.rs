//! A mounted volume: joins the rooms below it, in the order in which a mount needs them.
//!
//! Mount: read the superblock; claim a slot; beat; take the volume lock shared and read the superblock again
//! under it; begin an empty journal; serve. Leave: stop serving; everything durable and in place; the slot
//! says *left* last. A lock that still names a slot that left is free.
//!
//! Not for: the kernel (`fuse`), or parsing what users typed.

mod fencing;
mod identity;
mod keeper;
mod stats;
mod steward;

pub use fencing::{FencingMode, HostOpenError, open_as_host};
pub use identity::{is_process_gone, local_identity};
pub use stats::{
    CausesByKind, CommandsByClass, JournalStats, LatencyStats, LockCounts, SwapCounts, VolumeStats,
};

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use thiserror::Error;

use crate::ats::{Ats, AtsError, Image};
use crate::device::{AlignedBuf, BlockDevice, DeviceError, FencingKey};
use crate::durations::dead_after;
use crate::fs::api::{KernelCaches, Operations};
use crate::fs::{Fs, Parts};
pub use crate::heartbeat::Waiting;
use crate::heartbeat::{Claim, ClaimError, Heartbeat, HostIdentity, claim};
use crate::journal::Journal;
use crate::layout::lock::{LockKind, LockMode, LockRecord};
use crate::layout::slot::Durations;
use crate::layout::superblock::{Superblock, SuperblockError};
use crate::lease::{CommandCounts, Door, EndCause, IoClass, Lease, LeaseState};
use crate::lock::{Access, Demand, Guard, LockError, LockId, LockManager, Mode, Patience, Steward};
use crate::recovery::{Recovery, RecoveryError};
use crate::rt::planted::{Bug, is_planted};
use crate::rt::{self, Instant, Mutex};
use crate::store::{Store, StoreError};
use crate::types::{BLOCK_BYTES, BlockNo, Incarnation, Owner};
use keeper::Keeper;
use steward::VolumeSteward;

/// What a mount may choose.
#[derive(Clone, Debug)]
pub struct MountOptions {
    pub host: HostIdentity,
    pub read_only: bool,
    /// Memory for clean metadata blocks.
    pub cache_mib: u32,
    pub fencing: FencingMode,
}

/// Why a volume could not be mounted. One clear sentence each.
#[derive(Debug, Error)]
pub enum MountError {
    #[error(transparent)]
    Superblock(#[from] SuperblockError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
    #[error("fencing=required, but this device has no reservations")]
    NoFencing,
    #[error("the volume lock: {0}")]
    VolumeLock(LockError),
    #[error(transparent)]
    Ats(#[from] AtsError),
    #[error("recovering the last life of this host: {0}")]
    Recovery(#[from] RecoveryError),
    #[error(
        "the volume is under maintenance by {0} (fsck); if that program is gone, run fsck.lunfs -p on the device"
    )]
    Maintenance(Owner),
    #[error("the superblock changed to another volume while it was being mounted")]
    Changed,
}

/// Why leaving was not clean; others will have to recover this host.
#[derive(Debug, Error)]
pub enum LeaveError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Ats(#[from] AtsError),
}

type EndHook = Box<dyn FnOnce(String) + Send>;

/// How often a host that withdraws looks whether its changes are over.
const WITHDRAW_POLL: Duration = Duration::from_millis(10);

/// A volume as one host has it mounted.
pub struct Volume {
    superblock: Superblock,
    door: Arc<Door>,
    heartbeat: Arc<Heartbeat>,
    demand: Arc<Demand>,
    locks: Arc<LockManager>,
    store: Arc<Store>,
    fs: Arc<Fs>,
    steward: Arc<VolumeSteward>,
    keeper: Arc<Keeper>,
    end_hooks: Arc<Mutex<Vec<EndHook>>>,
    volume_guard: Mutex<Option<Guard>>,
    left: Mutex<bool>,
}

/// Reads and checks the superblock of a device.
pub fn read_superblock(device: &dyn BlockDevice, read_only: bool) -> Result<Superblock, MountError> {
    let mut buf = AlignedBuf::zeroed(BLOCK_BYTES);
    let device_bytes = device.geometry().size_bytes;
    if device_bytes < buf.len() as u64 {
        return Err(SuperblockError::NotLunfs { at: BlockNo(0) }.into());
    }
    device.read(0, &mut buf)?;
    let Some(block) = buf.first_chunk::<BLOCK_BYTES>() else {
        return Err(SuperblockError::NotLunfs { at: BlockNo(0) }.into());
    };
    let superblock = Superblock::decode(block, BlockNo(0), read_only)?;
    superblock.check_device_size(device_bytes)?;
    Ok(superblock)
}

impl Volume {
    /// Mounts the volume on `device` for one host. Returns when operations can be served.
    pub fn mount(device: Arc<dyn BlockDevice>, options: MountOptions) -> Result<Arc<Volume>, MountError> {
        Self::mount_patiently(device, options, &mut |_| true)
    }

    /// The same, for somebody who is told while no slot can be had, and may give it up.
    pub fn mount_patiently(
        device: Arc<dyn BlockDevice>,
        options: MountOptions,
        waiting: &mut dyn FnMut(&Waiting<'_>) -> bool,
    ) -> Result<Arc<Volume>, MountError> {
        loop {
            match Self::mount_in_a_slot(&device, &options, waiting) {
                // Its slot says so and is claimed by nobody: the next one may do. Ends, for there are not many.
                Err(MountError::Recovery(e @ RecoveryError::Unrecoverable { .. })) => {
                    log::error!("{e}; what it held gives errors until fsck.lunfs has repaired it");
                }
                mounted => return mounted,
            }
        }
    }

    fn mount_in_a_slot(
        device: &Arc<dyn BlockDevice>,
        options: &MountOptions,
        waiting: &mut dyn FnMut(&Waiting<'_>) -> bool,
    ) -> Result<Arc<Volume>, MountError> {
        let superblock = read_superblock(&**device, options.read_only)?;
        let geometry = superblock.geometry;
        let device_geometry = device.geometry();
        let door = Arc::new(Door::new(device.clone(), Arc::new(Lease::new())));
        let ats = Arc::new(Ats::new(door.clone(), superblock.volume));
        let hold_ms = u32::try_from(device_geometry.hold_time.as_millis()).unwrap_or(u32::MAX);
        let durations = Durations { hold_ms, ..superblock.durations };
        let fenced = options.fencing != FencingMode::Lease && device.fencing().is_some();
        if options.fencing == FencingMode::Required && !fenced {
            return Err(MountError::NoFencing);
        }
        let Claim { me, image, issued } = claim(&ats, &geometry, &options.host, durations, fenced, waiting)?;
        let heartbeat = Heartbeat::start(ats.clone(), geometry, me, image, issued);
        let mounted = Self::mount_claimed(superblock, door, ats, heartbeat.clone(), &**device, options);
        let left = match &mounted {
            Ok(_) => Ok(()),
            Err(MountError::Recovery(RecoveryError::Unrecoverable { .. })) => heartbeat.give_up_slot(),
            // Nothing was done in this life: it ends as if it had left.
            Err(_) => heartbeat.leave(),
        };
        if let Err(e) = left {
            log::warn!("giving the slot back: {e}");
        }
        mounted
    }

    fn mount_claimed(
        superblock: Superblock,
        door: Arc<Door>,
        ats: Arc<Ats>,
        heartbeat: Arc<Heartbeat>,
        device: &dyn BlockDevice,
        options: &MountOptions,
    ) -> Result<Arc<Volume>, MountError> {
        let geometry = superblock.geometry;
        let me = heartbeat.me();
        // After the claim, so that a fsck which took the lock before sees our slot move, and before anything is
        // written: nobody else ever holds this lock exclusively.
        let lock: Image<LockRecord> = ats.read(IoClass::Setup, geometry.volume_lock())?;
        if let LockMode::Exclusive { owner, .. } = lock.record.mode
            && !is_planted(Bug::MaintenanceIgnored)
        {
            return Err(MountError::Maintenance(owner));
        }
        let required = options.fencing == FencingMode::Required;
        let recovery = Arc::new(Recovery::new(ats.clone(), geometry, me, required));
        if heartbeat.record().fencing_key != 0
            && let Some(fencing) = door.fencing()
        {
            recovery.fence_earlier(&heartbeat.record())?;
            fencing.register(FencingKey::of(me))?;
        }
        heartbeat.peers().look()?;
        let demand = Demand::new(ats.clone(), geometry, me, heartbeat.peers().clone());
        let locks = LockManager::new(ats.clone(), me, heartbeat.peers().clone(), demand.clone());
        Self::recover_own(&recovery, &heartbeat)?;
        let journal =
            Journal::begin(door.clone(), superblock.volume, &geometry, me, heartbeat.published.net())?;
        let cache_blocks = options.cache_mib as usize * (1 << 20) / BLOCK_BYTES;
        let store = Arc::new(Store::new(
            door.clone(),
            superblock.volume,
            journal,
            heartbeat.published.clone(),
            cache_blocks,
        ));
        let steward = Arc::new(VolumeSteward {
            geometry,
            door: door.clone(),
            store: store.clone(),
            fs: OnceLock::new(),
            kernel: Mutex::new(None),
            superblock: superblock.clone(),
        });
        let as_steward: Arc<dyn Steward> = steward.clone();
        locks.set_steward(Arc::downgrade(&as_steward));
        demand.start()?;
        let id = LockId { kind: LockKind::Volume, at: geometry.volume_lock() };
        let patience = Patience { not_for_the_dead: true, ..Patience::endless() };
        let volume_guard = locks.acquire(id, Mode::Shared, Access::Read, &patience);
        let volume_guard = match volume_guard {
            Ok(guard) => guard,
            Err(e) => {
                demand.stop();
                return Err(MountError::VolumeLock(e));
            }
        };
        // Features and size are believed only under the lock that covers them.
        match read_superblock(device, options.read_only) {
            Ok(again) if again.volume == superblock.volume => {}
            other => {
                demand.stop();
                return Err(other.err().unwrap_or(MountError::Changed));
            }
        }
        let lease = Duration::from_millis(heartbeat.record().durations.lease_ms.into());
        let asked = demand.clone();
        heartbeat.vouch_for(Box::new(move || match asked.last_look() {
            late if late > lease => {
                Err(format!("the doorbell was not looked at for {} ms", late.as_millis()))
            }
            _ => Ok(()),
        }));
        let fs = Arc::new(Fs::new(Parts {
            superblock: superblock.clone(),
            locks: locks.clone(),
            demand: demand.clone(),
            peers: heartbeat.peers().clone(),
            store: store.clone(),
            read_only: options.read_only,
        }));
        let _ = steward.fs.set(Arc::downgrade(&fs));
        let keeper = Arc::new(Keeper::default());
        let commits = {
            let (keeper, store) = (keeper.clone(), store.clone());
            rt::spawn("commit", move || keeper.keep_committing(&store, lease))
        };
        let reaps = {
            let (keeper, fs, locks) = (keeper.clone(), fs.clone(), locks.clone());
            rt::spawn("reap", move || keeper.keep_reaping(&fs, &locks))
        };
        let recovers = {
            let (keeper, heartbeat) = (keeper.clone(), heartbeat.clone());
            rt::spawn("recover", move || keeper.keep_recovering(&recovery, &heartbeat))
        };
        keeper.threads.lock().extend([commits, reaps, recovers]);
        let end_hooks: Arc<Mutex<Vec<EndHook>>> = Arc::default();
        {
            // Takes no lock of ours until the lease has ended, so that nothing can delay it.
            let (lease, hooks, steward) = (door.lease().clone(), end_hooks.clone(), steward.clone());
            let (door, heartbeat) = (door.clone(), heartbeat.clone());
            rt::spawn_urgent("fence", move || {
                let reason = lease.wait_for_end();
                if reason == LEFT {
                    return;
                }
                log::error!("this host stops using the volume: {reason}");
                if let Some(kernel) = steward.kernel.lock().clone() {
                    kernel.silence();
                }
                if lease.withdraws() && !is_planted(Bug::WithdrawalNotTold) {
                    withdraw(&door, &heartbeat);
                }
                for hook in hooks.lock().drain(..) {
                    hook(reason.clone());
                }
            });
        }
        log::info!(
            "mounted volume \"{}\" ({}) as host \"{}\", {me}",
            superblock.label,
            superblock.volume,
            options.host.name
        );
        Ok(Arc::new(Volume {
            superblock,
            door,
            heartbeat,
            demand,
            locks,
            store,
            fs,
            steward,
            keeper,
            end_hooks,
            volume_guard: Mutex::new(Some(volume_guard)),
            left: Mutex::new(false),
        }))
    }

    /// What an earlier life of our own slot had committed comes into place before its journal is begun anew.
    fn recover_own(recovery: &Recovery, heartbeat: &Heartbeat) -> Result<(), MountError> {
        let record = heartbeat.record();
        if record.settled(Incarnation(record.incarnation.0.saturating_sub(1))) {
            return Ok(());
        }
        log::warn!("the last life in this host's slot ended without leaving; recovering it");
        let replayed = recovery.replay(heartbeat.me().slot, record.settled_up_to)?;
        heartbeat.earlier_settled(replayed.net)?;
        // Or what that life held would seem to wait for its recovery until the next look.
        heartbeat.peers().fresh(heartbeat.me().slot)?;
        log::warn!("recovered it: {replayed}");
        Ok(())
    }

    pub fn operations(&self) -> Arc<dyn Operations> {
        self.fs.clone()
    }

    pub fn fs(&self) -> &Arc<Fs> {
        &self.fs
    }

    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    pub fn locks(&self) -> &Arc<LockManager> {
        &self.locks
    }

    pub fn heartbeat(&self) -> &Arc<Heartbeat> {
        &self.heartbeat
    }

    pub fn door(&self) -> &Arc<Door> {
        &self.door
    }

    /// From now on the kernel is made to forget what a lock covers before it leaves.
    pub fn attach_kernel(&self, caches: Arc<dyn KernelCaches>) {
        *self.steward.kernel.lock() = Some(caches.clone());
        self.door.lease().observe_deadlines(move |until| caches.lease_until(until));
    }

    /// Calls `hook` with the reason when this host may not use the volume any more.
    pub fn on_end(&self, hook: impl FnOnce(String) + Send + 'static) {
        self.end_hooks.lock().push(Box::new(hook));
        // The end may have come before the hook did.
        if self.door.lease().state() == LeaseState::Ended {
            let reason = self.door.lease().reason().unwrap_or_default();
            for hook in self.end_hooks.lock().drain(..) {
                hook(reason.clone());
            }
        }
    }

    /// Why this host may not use the volume any more, in kind and in words; `None` while it may, and when it left.
    pub fn lost_by(&self) -> Option<(EndCause, String)> {
        let lease = self.door.lease();
        let cause = lease.cause().filter(|cause| *cause != EndCause::Left)?;
        // It is over, so this returns at once.
        Some((cause, lease.wait_for_end()))
    }

    /// Commands that operations caused so far.
    pub fn operation_counts(&self) -> CommandCounts {
        self.door.operation_counts()
    }

    /// Leaves the volume cleanly: everything durable and in place, the slot given back. The kernel's mount
    /// is gone by now. A second call does nothing.
    pub fn leave(&self) -> Result<(), LeaveError> {
        let mut left = self.left.lock();
        if *left {
            return Ok(());
        }
        *left = true;
        self.fs.stop_waiting();
        self.keeper.stop();
        if !self.door.lease().allows() {
            self.withdrawn();
            self.heartbeat.abandon();
            self.demand.stop();
            return Ok(());
        }
        if let Err(e) = self.store.drain() {
            // Others must not wait for a host that beats and can never give its locks away.
            self.door.lease().withdraw(&format!("leaving failed: {e}"));
            self.withdrawn();
            self.heartbeat.abandon();
            self.demand.stop();
            return Err(e.into());
        }
        self.demand.stop();
        drop(self.volume_guard.lock().take());
        self.heartbeat.leave()?;
        if let Some(fencing) = self.door.fencing()
            && let Err(e) = fencing.unregister()
        {
            log::warn!("giving the fencing key back: {e}");
        }
        self.door.lease().end(EndCause::Left, LEFT);
        Ok(())
    }
}

impl Volume {
    /// The process must not end before the last word is said.
    fn withdrawn(&self) {
        if self.door.lease().withdraws() {
            withdraw(&self.door, &self.heartbeat);
        }
    }
}

/// Says in the slot that this host gave up, once nothing of it can change the volume any more. Where that takes
/// as long as its dead time, the others need no word.
fn withdraw(door: &Door, heartbeat: &Heartbeat) {
    let since = Instant::now();
    let dead_after = dead_after(&heartbeat.record().durations);
    while !door.changes_are_over() {
        if since.elapsed() >= dead_after {
            return;
        }
        rt::sleep(WITHDRAW_POLL);
    }
    match heartbeat.withdraw() {
        Ok(()) => log::warn!("this host's slot says that it withdrew; others recover it now"),
        Err(e) => {
            log::warn!("saying in the slot that this host withdrew: {e}; others wait for its dead time")
        }
    }
}

/// Why the lease of a host that left ended.
const LEFT: &str = "left the volume";
