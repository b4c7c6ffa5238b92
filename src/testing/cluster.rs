//! A cluster in one process: N simulated hosts that have one volume mounted, on one simulated LUN.
//!
//! ```
//! use lunfs::rt::sim::Simulation;
//! use lunfs::testing::cluster::{Cluster, Formatted, cx};
//!
//! let volume = Formatted::tiny(4);
//! Simulation::new(7).run(move || {
//!     let cluster = Cluster::start(&volume, 2);
//!     let root = cluster.root();
//!     cluster.on(0, move |fs| fs.mkdir(&cx(), root, b"made here", 0o755).map(drop)).unwrap();
//!     cluster.on(1, move |fs| fs.lookup(&cx(), root, b"made here").map(drop)).unwrap();
//!     cluster.finish();
//! });
//! ```
//!
//! Invariants: the LUN is formatted once, in a simulation of a fixed seed, and every run begins with the
//! same bytes; everything a host does runs on threads of that host; the [`Judge`] watches every command;
//! [`Cluster::finish`] leaves no test without its standing checks at rest.
//!
//! Not for: tests of mkfs.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::audit::audit;
use super::checkers::Judge;
use super::tripwire::Tripwire;
use crate::device::BlockDevice;
use crate::device::sim::{CommandKind, Fault, FaultRule, LunSnapshot, SimLun, SimLunOptions};
use crate::durations::Profile;
use crate::format::{FormatOptions, format};
use crate::fs::api::{OpContext, Operations};
use crate::fsck::Report;
use crate::heartbeat::HostIdentity;
use crate::layout::demand::RequestBlock;
use crate::layout::geometry::Geometry;
use crate::layout::slot::{SlotRecord, SlotState};
use crate::layout::superblock::Superblock;
use crate::layout::{Block, RECORD_BYTES, zero_block};
use crate::rt::sim::{SimRng, Simulation, kill_host, on_failure, on_host, spawn_on};
use crate::rt::{HostTag, JoinHandle, random_u64};
use crate::types::{BLOCK_BYTES, BlockNo, InodeNo};
use crate::volume::{FencingMode, MountError, MountOptions, Volume};

/// The context of an operation that may wait as long as it takes.
pub fn cx() -> OpContext {
    OpContext { uid: 0, gid: 0, pid: 1, may_wait: true, interrupt: None, meant: Default::default() }
}

/// Bytes of a formatted LUN, and what it is like.
#[derive(Clone)]
pub struct Formatted {
    pub superblock: Superblock,
    pub lun: SimLunOptions,
    snapshot: LunSnapshot,
}

impl Formatted {
    /// Formats once; the bytes are the same in every process.
    pub fn new(lun: SimLunOptions, geometry: Option<Geometry>) -> Self {
        Self::with_profile(lun, geometry, Profile::Normal)
    }

    pub fn with_profile(lun: SimLunOptions, geometry: Option<Geometry>, profile: Profile) -> Self {
        let options = lun.clone();
        let (superblock, snapshot) = Simulation::new(0).run(move || {
            let lun = SimLun::new(options);
            let device = lun.attach(HostTag(u16::MAX));
            let options = FormatOptions { geometry, profile, ..FormatOptions::default() };
            let report = format(&*device, &options).expect("formatting the simulated LUN");
            (report.superblock, lun.snapshot())
        });
        Formatted { superblock, lun, snapshot }
    }

    /// A small volume on a LUN of 512-byte blocks with a volatile cache.
    pub fn tiny(slots: u16) -> Self {
        Self::tiny_on(slots, SimLunOptions::default())
    }

    /// A small volume whose hosts are soon found dead.
    pub fn hasty_on(slots: u16, lun: SimLunOptions) -> Self {
        let geometry = Geometry::tiny(slots);
        let hold_time = Duration::from_millis(500);
        let lun = SimLunOptions { size_bytes: geometry.size_bytes(), hold_time, ..lun };
        Self::with_profile(lun, Some(geometry), Profile::Fast)
    }

    /// A small volume on a LUN of this kind.
    pub fn tiny_on(slots: u16, lun: SimLunOptions) -> Self {
        let geometry = Geometry::tiny(slots);
        Self::new(SimLunOptions { size_bytes: geometry.size_bytes(), ..lun }, Some(geometry))
    }
}

/// One host of a cluster.
pub struct Host {
    pub tag: HostTag,
    pub volume: Arc<Volume>,
    pub fs: Arc<dyn Operations>,
}

/// Who a simulated host is after its first boot.
pub fn identity(tag: HostTag) -> HostIdentity {
    HostIdentity {
        name: format!("host{}", tag.0),
        uuid: [tag.0 as u8 + 1; 16],
        boot_id: [tag.0 as u8 + 100; 16],
        pid: 1,
        pid_namespace: 1,
        is_gone: |_| true,
    }
}

/// A running cluster. Made and used inside a simulation.
pub struct Cluster {
    pub lun: SimLun,
    pub superblock: Superblock,
    pub hosts: Vec<Host>,
    pub judge: Arc<Judge>,
    pub wire: Arc<Tripwire>,
    /// Hosts that a test may make lose their lease; of any other that is a failure.
    may_end: Arc<Mutex<BTreeSet<HostTag>>>,
}

impl Cluster {
    /// Restores the LUN and mounts it on hosts 0 to `hosts`, all at once.
    pub fn start(formatted: &Formatted, hosts: u16) -> Self {
        // A long trace costs time, so it is asked for when a seed is looked into.
        let asked = std::env::var("LUNFS_SIM_TRACE").ok().and_then(|n| n.parse().ok());
        let trace_len = asked.unwrap_or(formatted.lun.trace_len);
        let lun = SimLun::new(SimLunOptions { trace_len, ..formatted.lun.clone() });
        lun.restore(&formatted.snapshot);
        let judge = Judge::new(&lun, &formatted.superblock);
        let wire = Tripwire::new(judge.clone());
        lun.set_observer(wire.clone());
        let mut cluster = Cluster {
            lun,
            superblock: formatted.superblock.clone(),
            hosts: Vec::new(),
            judge,
            wire,
            may_end: Arc::default(),
        };
        let (shown, geometry) = (cluster.judge.clone(), cluster.superblock.geometry);
        on_failure("who wants what", Box::new(move || wishes(&shown, &geometry)));
        let tags: Vec<HostTag> = (0..hosts).map(HostTag).collect();
        let mounting: Vec<_> = tags.iter().map(|tag| cluster.mounting(*tag)).collect();
        for (tag, thread) in tags.into_iter().zip(mounting) {
            let volume = joined(thread).unwrap_or_else(|e| panic!("mounting on {tag}: {e}"));
            cluster.add(tag, volume);
        }
        cluster
    }

    /// Mounts on one more host.
    pub fn join(&mut self, tag: HostTag) -> Result<(), MountError> {
        let volume = joined(self.mounting(tag))?;
        self.add(tag, volume);
        Ok(())
    }

    /// Several machines are switched on at once and mount, none of them knowing what became of its last boot.
    pub fn switch_on(&mut self, tags: &[HostTag], fencing: FencingMode) -> Result<(), MountError> {
        let mounting = self.switching_on(tags, fencing);
        for (tag, thread) in tags.iter().zip(mounting) {
            let volume = joined(thread)?;
            self.add(*tag, volume);
        }
        Ok(())
    }

    /// The same, for who does not wait for it.
    pub fn switching_on(
        &self,
        tags: &[HostTag],
        fencing: FencingMode,
    ) -> Vec<JoinHandle<Result<Arc<Volume>, MountError>>> {
        let as_booted = |tag: &HostTag| {
            let mut boot_id = [0; 16];
            boot_id[..8].copy_from_slice(&random_u64().to_le_bytes());
            self.mounting_as(*tag, HostIdentity { boot_id, ..identity(*tag) }, fencing)
        };
        tags.iter().map(as_booted).collect()
    }

    fn mounting(&self, tag: HostTag) -> JoinHandle<Result<Arc<Volume>, MountError>> {
        self.mounting_as(tag, identity(tag), FencingMode::Auto)
    }

    fn mounting_as(
        &self,
        tag: HostTag,
        host: HostIdentity,
        fencing: FencingMode,
    ) -> JoinHandle<Result<Arc<Volume>, MountError>> {
        let device: Arc<dyn BlockDevice> = self.lun.attach(tag);
        let options = MountOptions { host, read_only: false, cache_mib: 4, fencing };
        spawn_on(tag, "mount", move || Volume::mount(device, options))
    }

    fn add(&mut self, tag: HostTag, volume: Arc<Volume>) {
        volume.store().set_hit_check(self.judge.hit_check(tag));
        let may_end = self.may_end.clone();
        volume.on_end(move |reason| {
            let expected = may_end.lock().unwrap_or_else(PoisonError::into_inner).contains(&tag);
            assert!(expected, "{tag} stopped using the volume: {reason}");
        });
        let fs = volume.operations();
        self.hosts.push(Host { tag, volume, fs });
    }

    pub fn root(&self) -> InodeNo {
        self.superblock.geometry.root()
    }

    /// What is done to this host may end its lease.
    pub fn may_end(&self, host: usize) {
        self.may_end.lock().unwrap_or_else(PoisonError::into_inner).insert(self.hosts[host].tag);
    }

    /// Does something on one host and waits for it. The calling thread is a visitor there.
    pub fn on<T>(&self, host: usize, work: impl FnOnce(&dyn Operations) -> T) -> T {
        let host = &self.hosts[host];
        on_host(host.tag, || work(&*host.fs))
    }

    /// A new directory of the root; the host that made it holds it, and has it durable.
    pub fn directory(&self, host: usize, name: &[u8]) -> InodeNo {
        let root = self.root();
        self.on(host, |fs| {
            let ino = fs.mkdir(&cx(), root, name, 0o755).expect("a new directory").value.ino;
            fs.sync(&cx()).expect("syncing it");
            ino
        })
    }

    /// Starts a thread of one host.
    pub fn spawn<T: Send + 'static>(
        &self,
        host: usize,
        name: &str,
        work: impl FnOnce(Arc<dyn Operations>) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let host = &self.hosts[host];
        let fs = host.fs.clone();
        spawn_on(host.tag, name, move || work(fs))
    }

    /// Plans one fault in about `one_in` compare-and-writes, a hundred of them, of the kind after which a host
    /// does not know what happened or is told something untrue. Much more often, and a beat would fail several times in a row, which
    /// rightly ends a lease. None is late by more than the device may hold it.
    pub fn unknown_swaps(&self, seed: u64, one_in: u32) {
        let mut rng = SimRng::new(seed, 77);
        let hold_time = self.lun.geometry().hold_time;
        for _ in 0..100 {
            let delay = Duration::from_micros(rng.between(100, 900_000));
            let most = |delay: Duration| delay.min(hold_time);
            let fault = match rng.below(8) {
                0 => Fault::LostAnswer,
                1 => Fault::RetriedBelow(most(delay)),
                2 => Fault::NeverExecuted,
                3 => Fault::Late(most(Duration::from_secs(2) + delay)),
                4 => Fault::AnsweredFalse,
                5 => Fault::FalseMiscompare,
                6 => Fault::Aborted,
                _ => Fault::Late(most(delay)),
            };
            let skip = rng.below(100 * u64::from(one_in)) as u32;
            let kind = Some(CommandKind::CompareAndWrite);
            self.lun.inject(FaultRule { kind, skip, ..FaultRule::next(fault) });
        }
    }

    /// A host dies where it stands: no thread of it runs again. What it sent to the LUN still arrives.
    pub fn kill(&mut self, host: usize) -> HostTag {
        let host = self.hosts.remove(host);
        let tag = host.tag;
        kill_host(tag);
        // Its threads died holding its own locks; nothing of it may be dropped, as nothing of a machine that lost
        // its power is.
        std::mem::forget(host);
        tag
    }

    /// All hosts leave, at once; their slots say so.
    pub fn leave(&mut self) {
        let leaving: Vec<_> = self
            .hosts
            .drain(..)
            .map(|host| {
                let volume = host.volume;
                (
                    host.tag,
                    spawn_on(host.tag, "leave", move || (volume.leave(), volume.door().lease().reason())),
                )
            })
            .collect();
        for (tag, thread) in leaving {
            let (left, reason) = joined(thread);
            left.unwrap_or_else(|e| panic!("{tag} leaves: {e}"));
            assert_eq!(reason.as_deref(), Some("left the volume"), "{tag}");
        }
    }

    /// Is it the slot of a host of this cluster that was not killed?
    pub fn lives(&self, record: &SlotRecord) -> bool {
        // Not by what the host has in memory under a lock: it may die holding that.
        let slot_of = |h: &Host| self.superblock.geometry.slot(h.volume.heartbeat().me().slot);
        self.hosts.iter().any(|h| slot_of(h) == record.address)
    }

    /// What every slot says.
    pub fn slots(&self) -> Vec<SlotRecord> {
        let geometry = &self.superblock.geometry;
        geometry
            .all_slots()
            .map(|slot| {
                let at = geometry.slot(slot);
                let bytes = self.lun.contents(at.offset_bytes(), RECORD_BYTES);
                SlotRecord::decode(&bytes, self.superblock.volume, at).expect("a slot of the volume")
            })
            .collect()
    }

    /// The block as a read would see it now.
    pub fn block(&self, at: BlockNo) -> Box<Block> {
        let mut block = zero_block();
        block.copy_from_slice(&self.lun.contents(at.offset_bytes(), BLOCK_BYTES));
        block
    }

    /// Everybody leaves; then the volume must be whole. Returns what it consists of.
    pub fn finish(mut self) -> Report {
        self.lun.clear_faults();
        self.leave();
        self.at_rest()
    }

    /// The checks of a volume that nobody has mounted.
    pub fn at_rest(&self) -> Report {
        for slot in self.slots() {
            let good = matches!(slot.state, SlotState::Left | SlotState::Free | SlotState::Recovered);
            assert!(good, "after everybody left a slot says {:?}", slot.state);
        }
        let (report, findings) = audit(&self.lun);
        let said: Vec<String> = findings.iter().map(ToString::to_string).collect();
        assert!(said.is_empty(), "fsck found:\n  {}", said.join("\n  "));
        report
    }
}

/// The requests that stand on the LUN, and the locks they are about.
fn wishes(judge: &Judge, geometry: &Geometry) -> String {
    let mut text = String::new();
    for slot in geometry.all_slots() {
        let at = geometry.request(slot);
        if let Some(record) = judge.slot_on_lun(slot).filter(|r| r.state != SlotState::Free) {
            let (name, state) = (record.host_name, record.state);
            let by = record.recoverer.map(|by| format!(" by {by}")).unwrap_or_default();
            text.push_str(&format!("  {slot:?}: {name}, life {}, {state:?}{by}\n", record.incarnation.0));
        }
        let bytes = judge.lun.contents(at.offset_bytes(), BLOCK_BYTES);
        let block = bytes.first_chunk().and_then(|b| RequestBlock::decode(b, judge.volume, at).ok());
        for request in block.into_iter().flat_map(|b| b.requests) {
            let lock = judge.lock_on_lun(request.lock);
            text.push_str(&format!("  {slot:?} wants {request:?}\n    the lock says {lock:?}\n"));
        }
    }
    text
}

/// What a thread returned; its panic goes on here.
pub fn joined<T>(thread: JoinHandle<T>) -> T {
    match thread.join() {
        Ok(value) => value,
        Err(payload) => std::panic::resume_unwind(payload),
    }
}
