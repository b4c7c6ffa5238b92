//! The simulated LUN itself: its state, what a test can do to it and see of it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::command::{Answer, Command, CommandCounts, CommandKind, LunObserver};
use super::engine::interrupted;
use super::fault::{Fault, FaultPlan, FaultRule, Faults};
use super::handle::SimDevice;
use super::media::{Keep, Media};
use super::options::SimLunOptions;
use crate::device::{DeviceGeometry, FencingKey};
use crate::rt::sim::{self, SimRng};
use crate::rt::{HostTag, random_u64};

/// What a cut-off host's commands meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Partition {
    /// Nothing comes back; what is on its way may execute once the partition has ended.
    Hang,
    /// Errors at once, not executed; what is on its way fails on arrival.
    Fail,
}

#[derive(Default)]
pub(super) struct HostState {
    pub fenced: bool,
    pub partition: Option<Partition>,
    /// How often the host's session with the LUN had to be made anew.
    pub sessions: u64,
    /// The count of losses the host has been told of by a unit attention.
    pub attention: u64,
    pub counts: CommandCounts,
}

struct TraceEntry {
    at: Duration,
    id: u64,
    host: HostTag,
    kind: CommandKind,
    offset: u64,
    len: u64,
    what: &'static str,
    fault: Option<Fault>,
}

pub(super) struct LunState {
    pub block: u32,
    pub media: Media,
    pub rng: SimRng,
    pub faults: Faults,
    /// Commands that have not executed yet.
    pub in_flight: BTreeMap<u64, Arc<Command>>,
    /// Commands that a partition holds, since when, and their faults.
    pub held: Vec<(Duration, Arc<Command>, Option<Fault>)>,
    pub executions: u64,
    pub resets: u64,
    pub powered: bool,
    pub observer: Option<Arc<dyn LunObserver>>,
    /// Keys that were preempted: commands under them are refused, whenever they were issued.
    pub fenced_keys: BTreeSet<FencingKey>,
    hosts: BTreeMap<HostTag, HostState>,
    trace: VecDeque<TraceEntry>,
    trace_len: usize,
    next_id: u64,
}

pub(super) struct Inner {
    pub options: SimLunOptions,
    state: Mutex<LunState>,
    /// Held while a command executes and is observed.
    pub executing: Mutex<()>,
}

/// A LUN in memory that several hosts share. Clones are the same LUN.
#[derive(Clone)]
pub struct SimLun(Arc<Inner>);

/// Contents of a LUN at one moment, with what was not flushed then.
#[derive(Clone)]
pub struct LunSnapshot(Media);

impl Inner {
    pub fn lock(&self) -> MutexGuard<'_, LunState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LunState {
    pub fn host(&mut self, host: HostTag) -> &mut HostState {
        let resets = self.resets;
        self.hosts.entry(host).or_insert_with(|| HostState { attention: resets, ..HostState::default() })
    }

    /// How often the LUN's cache or this host's session was lost.
    pub fn losses(&mut self, host: HostTag) -> u64 {
        self.resets + self.host(host).sessions
    }

    pub fn next_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Notes a step of a command, for failure reports and the run's fingerprint.
    pub fn note(&mut self, command: &Command, what: &'static str, fault: Option<Fault>) {
        let at = sim::now().unwrap_or_default();
        let name =
            what.bytes().fold(command.kind as u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        sim::mark(name.wrapping_mul(31).wrapping_add(command.id) ^ command.offset.rotate_left(32));
        if self.trace_len == 0 {
            return;
        }
        if self.trace.len() == self.trace_len {
            self.trace.pop_front();
        }
        let Command { id, host, kind, offset, len, .. } = *command;
        self.trace.push_back(TraceEntry { at, id, host, kind, offset, len, what, fault });
    }
}

impl SimLun {
    /// Best made inside the simulation that uses it: then its seed follows from the simulation's, and
    /// a failure prints its last commands.
    pub fn new(options: SimLunOptions) -> Self {
        let seed = options.seed.unwrap_or_else(|| if sim::is_simulated() { random_u64() } else { 0 });
        let state = LunState {
            block: options.logical_block_bytes,
            media: Media::new(options.logical_block_bytes, options.volatile_cache),
            rng: SimRng::new(seed, 0),
            faults: Faults::default(),
            in_flight: BTreeMap::new(),
            held: Vec::new(),
            executions: 0,
            resets: 0,
            powered: true,
            observer: None,
            fenced_keys: BTreeSet::new(),
            hosts: BTreeMap::new(),
            trace: VecDeque::new(),
            trace_len: options.trace_len,
            next_id: 0,
        };
        let lun = SimLun(Arc::new(Inner { options, state: Mutex::new(state), executing: Mutex::new(()) }));
        let reported = lun.clone();
        sim::on_failure("last commands of the LUN", Box::new(move || reported.trace()));
        lun
    }

    /// The LUN as one host sees it; a host's next life attaches anew.
    pub fn attach(&self, host: HostTag) -> Arc<SimDevice> {
        let resets = {
            let mut state = self.0.lock();
            let losses = state.losses(host);
            state.host(host).attention = losses;
            losses
        };
        Arc::new(SimDevice::new(self.0.clone(), host, resets))
    }

    pub fn geometry(&self) -> DeviceGeometry {
        let options = &self.0.options;
        DeviceGeometry {
            logical_block_bytes: options.logical_block_bytes,
            size_bytes: options.size_bytes,
            volatile_cache: options.volatile_cache,
            hold_time: options.hold_time,
        }
    }

    /// Random faults from now on, for every host.
    pub fn set_faults(&self, plan: FaultPlan) {
        self.0.lock().faults.plan = plan;
    }

    /// One planned fault; rules are tried in the order they were added, before the dice.
    pub fn inject(&self, rule: FaultRule) {
        self.0.lock().faults.add(rule);
    }

    /// No more planned or random faults.
    pub fn clear_faults(&self) {
        self.0.lock().faults.clear();
    }

    /// How many commands were hit by a fault, and how many rules have hits left.
    pub fn fault_hits(&self) -> (u64, usize) {
        let state = self.0.lock();
        (state.faults.hits, state.faults.rules_left())
    }

    /// Shuts a host out: its commands fail as fenced, those on their way included.
    pub fn fence(&self, host: HostTag) {
        self.0.lock().host(host).fenced = true;
    }

    pub fn unfence(&self, host: HostTag) {
        self.0.lock().host(host).fenced = false;
    }

    /// Cuts the paths between a host and the LUN.
    pub fn partition(&self, host: HostTag, partition: Partition) {
        self.0.lock().host(host).partition = Some(partition);
    }

    /// Mends them, by a new session. A command that was held meanwhile executes late or never.
    pub fn heal(&self, host: HostTag) {
        let mut state = self.0.lock();
        let host_state = state.host(host);
        host_state.sessions += u64::from(host_state.partition.take().is_some());
        drop(state);
        self.0.release(host);
    }

    /// The LUN loses power and comes back at once.
    pub fn power_cut(&self, keep: Keep) {
        self.power_off(keep);
        self.power_on();
    }

    /// The LUN loses power: of commands on their way each is lost, lands, or is torn; of writes in
    /// the volatile cache `keep` says what stays. Until `power_on` all commands fail.
    pub fn power_off(&self, keep: Keep) {
        let lost: Vec<Arc<Command>> = self.0.lock().in_flight.values().cloned().collect();
        for command in &lost {
            let reachable = self.0.lock().host(command.host).partition.is_none();
            if reachable && command.kind.changes() {
                // Not, wholly or partly executed, as after any error in the middle.
                drop(self.0.execute(command, false, Some(Fault::IoError)));
            }
        }
        let mut state = self.0.lock();
        state.in_flight.clear();
        state.held.clear();
        for command in &lost {
            state.note(command, "lost power", None);
        }
        let LunState { media, rng, .. } = &mut *state;
        media.power_cut(rng, keep);
        state.resets += 1;
        state.powered = false;
        let observer = state.observer.clone();
        // Some hosts see the session break, others wait in vain.
        let told: Vec<_> = lost.into_iter().filter(|_| state.rng.below(2) == 0).collect();
        let told: Vec<_> = told.into_iter().map(|lost| (state.losses(lost.host), lost)).collect();
        drop(state);
        for (resets, command) in told {
            let result = Err(interrupted(&command));
            command.completion.complete(Answer { result, resets });
        }
        if let Some(observer) = observer {
            observer.power_cut();
        }
    }

    pub fn power_on(&self) {
        self.0.lock().powered = true;
    }

    /// How often the LUN lost power.
    pub fn resets(&self) -> u64 {
        self.0.lock().resets
    }

    /// Who judges every execution from now on.
    pub fn set_observer(&self, observer: Arc<dyn LunObserver>) {
        self.0.lock().observer = Some(observer);
    }

    pub fn clear_observer(&self) {
        self.0.lock().observer = None;
    }

    /// The commands of one host that executed.
    pub fn counts(&self, host: HostTag) -> CommandCounts {
        self.0.lock().host(host).counts
    }

    /// The commands of all hosts that executed.
    pub fn total_counts(&self) -> CommandCounts {
        let state = self.0.lock();
        state.hosts.values().fold(CommandCounts::default(), |sum, host| sum.plus(&host.counts))
    }

    /// Bytes as a read would see them now; not a command.
    pub fn contents(&self, offset_bytes: u64, len_bytes: usize) -> Vec<u8> {
        self.0.lock().media.bytes(offset_bytes, len_bytes)
    }

    /// Changes bytes behind everybody's back, durably: for planting corruption. Not a command.
    pub fn overwrite(&self, offset_bytes: u64, data: &[u8]) {
        let mut state = self.0.lock();
        state.executions += 1;
        let order = state.executions;
        let block = u64::from(state.block);
        let start = offset_bytes / block * block;
        let end = (offset_bytes + data.len() as u64).next_multiple_of(block);
        let mut bytes = state.media.bytes(start, (end - start) as usize);
        let at = (offset_bytes - start) as usize;
        bytes[at..at + data.len()].copy_from_slice(data);
        state.media.write_durable(order, start, &bytes);
    }

    /// How many logical blocks a power cut could change now.
    pub fn unflushed_blocks(&self) -> usize {
        self.0.lock().media.unflushed_blocks()
    }

    /// Could a power cut change the logical block at this offset?
    pub fn is_at_risk(&self, offset_bytes: u64) -> bool {
        self.0.lock().media.is_at_risk(offset_bytes)
    }

    /// How many commands are on their way to their execution.
    pub fn in_flight(&self) -> usize {
        self.0.lock().in_flight.len()
    }

    pub fn snapshot(&self) -> LunSnapshot {
        LunSnapshot(self.0.lock().media.clone())
    }

    /// Puts back contents taken from a LUN with the same logical block and cache. Best done at rest.
    pub fn restore(&self, snapshot: &LunSnapshot) {
        self.0.lock().media = snapshot.0.clone();
    }

    /// The last commands, a line for each step.
    pub fn trace(&self) -> String {
        let state = self.0.lock();
        let mut text = String::new();
        for entry in &state.trace {
            let (at, kind) = (entry.at, entry.kind.name());
            text.push_str(&format!(
                "  {at:>14.6?} #{:<6} {} {kind} {:#x}+{:#x} {}",
                entry.id, entry.host, entry.offset, entry.len, entry.what
            ));
            if let Some(fault) = entry.fault {
                text.push_str(&format!(" [{fault:?}]"));
            }
            text.push('\n');
        }
        text
    }
}
