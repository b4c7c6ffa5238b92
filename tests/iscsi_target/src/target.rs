//! The target: its logical units, sessions, and what tests do to it from outside.
//!
//! Lock order: sessions, then a logical unit, then faults or trace. A session that is closed executes nothing
//! any more: whoever closes one marks it, then passes once through the lock of every logical unit.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::attention;
use crate::faults::{Fault, Rule, Rules, Standing};
use crate::gate::Gate;
use crate::lock;
use crate::nexus::Nexus;
use crate::personality::Personality;
use crate::scsi::reservation::Reservations;
use crate::scsi::unit::Unit;
use crate::session::{self, Session};
use crate::store::{Loss, Store};
use crate::trace::{Entry, Judge, Trace};

pub const DEFAULT_NAME: &str = "iqn.2026-01.org.lunfs.test:vol";

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Chap {
    pub user: String,
    pub secret: String,
    /// What the target proves itself with, to initiators that ask.
    #[serde(default)]
    pub target_user: String,
    #[serde(default)]
    pub target_secret: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LunConfig {
    pub number: u16,
    pub blocks: u64,
    pub block_bytes: u32,
    /// Memory without.
    #[serde(default)]
    pub file: Option<PathBuf>,
    #[serde(default)]
    pub personality: Personality,
}

impl LunConfig {
    /// In memory, with blocks of 512 bytes.
    pub fn new(number: u16, bytes: u64) -> Self {
        LunConfig {
            number,
            blocks: bytes / 512,
            block_bytes: 512,
            file: None,
            personality: Personality::default(),
        }
    }

    pub fn block_bytes(self, block_bytes: u32) -> Self {
        let bytes = self.blocks * u64::from(self.block_bytes);
        LunConfig { block_bytes, blocks: bytes / u64::from(block_bytes), ..self }
    }

    pub fn file(self, path: impl Into<PathBuf>) -> Self {
        LunConfig { file: Some(path.into()), ..self }
    }

    pub fn personality(self, personality: Personality) -> Self {
        LunConfig { personality, ..self }
    }
}

#[derive(Clone, Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub name: String,
    pub luns: Vec<LunConfig>,
    pub chap: Option<Chap>,
    /// A ping to each idle session this often.
    pub ping_ms: Option<u64>,
    /// Entries that the trace keeps.
    pub trace: usize,
    pub seed: u64,
}

impl Config {
    /// One LUN, number 1, in memory.
    pub fn memory(bytes: u64) -> Self {
        Config::of(LunConfig::new(1, bytes))
    }

    pub fn of(lun: LunConfig) -> Self {
        Config {
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            name: DEFAULT_NAME.to_owned(),
            luns: vec![lun],
            chap: None,
            ping_ms: None,
            trace: 100_000,
            seed: 0,
        }
    }
}

/// A logical unit behind its lock, with what was aborted on it: commands that arrived before the number.
pub(crate) struct Guarded {
    pub unit: Unit,
    pub aborted_all: u64,
    pub aborted: HashMap<Nexus, u64>,
    /// Commands from before the last loss of power, which nothing brings back.
    pub powered_on: u64,
}

pub(crate) struct Lun {
    pub number: u16,
    pub guarded: Mutex<Guarded>,
    /// Whether the personality has latencies: the common case costs one load.
    pub slow: AtomicBool,
}

#[derive(Default)]
pub(crate) struct Sessions {
    pub by_nexus: HashMap<Nexus, Arc<Session>>,
    /// Discovery sessions, which are no nexus.
    pub others: Vec<Arc<Session>>,
    pub next_handle: u16,
}

pub(crate) struct Shared {
    pub name: String,
    pub portal: SocketAddr,
    pub chap: Option<Chap>,
    pub ping_ms: Option<u64>,
    pub seed: u64,
    pub luns: RwLock<BTreeMap<u16, Arc<Lun>>>,
    pub sessions: Mutex<Sessions>,
    pub gate: Gate,
    pub faults: Mutex<Rules<Fault>>,
    pub any_fault: AtomicBool,
    pub trace: Mutex<Trace>,
    pub stopping: AtomicBool,
    pub started: Instant,
    /// Counts arriving commands.
    pub arrivals: AtomicU64,
}

impl Shared {
    pub fn lun(&self, number: u16) -> Option<Arc<Lun>> {
        self.luns.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&number).cloned()
    }

    pub fn all_luns(&self) -> Vec<Arc<Lun>> {
        self.luns.read().unwrap_or_else(|poisoned| poisoned.into_inner()).values().cloned().collect()
    }

    /// When it returns, no command that was being executed still is.
    pub fn pass_through_all(&self) {
        for lun in self.all_luns() {
            drop(lock(&lun.guarded));
        }
    }

    pub fn close(&self, session: &Session) {
        session.mark_closed();
        self.pass_through_all();
        session.hang_up();
    }

    /// Aborts what came to a logical unit until now, of one nexus or of all.
    pub fn abort(&self, guarded: &mut Guarded, nexus: Option<&Nexus>) {
        let until = self.arrivals.load(Ordering::SeqCst) + 1;
        match nexus {
            None => guarded.aborted_all = until,
            Some(nexus) => drop(guarded.aborted.insert(nexus.clone(), until)),
        }
    }

    pub fn reset_lun(&self, lun: &Lun) {
        let mut guarded = lock(&lun.guarded);
        self.abort(&mut guarded, None);
        guarded.unit.attentions.raise_all(attention::RESET, None);
    }

    /// All sessions but one end; used by resets and loss of power.
    pub fn drop_sessions(&self, sessions: &mut Sessions, which: impl Fn(&Session) -> bool) -> usize {
        let mut ended: Vec<Arc<Session>> =
            sessions.by_nexus.values().filter(|one| which(one)).cloned().collect();
        ended.extend(sessions.others.iter().filter(|one| which(one)).cloned());
        sessions.by_nexus.retain(|_, one| !which(one));
        sessions.others.retain(|one| !which(one));
        ended.iter().for_each(|one| self.close(one));
        ended.len()
    }

    pub fn lose_power(&self, seed: u64) -> io::Result<Loss> {
        let mut sessions = lock(&self.sessions);
        self.drop_sessions(&mut sessions, |_| true);
        let mut total = Loss::default();
        for lun in self.all_luns() {
            let mut guarded = lock(&lun.guarded);
            guarded.powered_on = self.arrivals.load(Ordering::SeqCst) + 1;
            let loss = guarded.unit.lose_power(seed ^ u64::from(lun.number))?;
            total.at_risk += loss.at_risk;
            total.went_back += loss.went_back;
        }
        Ok(total)
    }
}

/// A running target; dropping it ends it.
pub struct Target {
    pub(crate) shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

impl Target {
    pub fn start(config: Config) -> io::Result<Target> {
        let listener = TcpListener::bind(config.listen)?;
        let portal = listener.local_addr()?;
        let shared = Arc::new(Shared {
            name: config.name,
            portal,
            chap: config.chap,
            ping_ms: config.ping_ms,
            seed: config.seed,
            luns: RwLock::default(),
            sessions: Mutex::default(),
            gate: Gate::default(),
            faults: Mutex::default(),
            any_fault: AtomicBool::new(false),
            trace: Mutex::new(Trace::new(config.trace)),
            stopping: AtomicBool::new(false),
            started: Instant::now(),
            arrivals: AtomicU64::new(0),
        });
        let mut target = Target { shared: shared.clone(), acceptor: None };
        for lun in config.luns {
            target.add_lun(lun)?;
        }
        let acceptor = std::thread::Builder::new().name("accept".into()).spawn(move || {
            for stream in listener.incoming() {
                if shared.stopping.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                let shared = shared.clone();
                // An initiator that meets a full process sees its connection end; tests go on.
                let _ = std::thread::Builder::new()
                    .name("connection".into())
                    .spawn(move || session::serve(&shared, stream));
            }
        })?;
        target.acceptor = Some(acceptor);
        Ok(target)
    }

    pub fn portal(&self) -> SocketAddr {
        self.shared.portal
    }

    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// As libiscsi and QEMU write it.
    pub fn url(&self, lun: u16) -> String {
        format!("iscsi://{}/{}/{lun}", self.shared.portal, self.shared.name)
    }

    // --- logical units ---------------------------------------------------------------------------------

    /// Makes a LUN, or takes the place of one; all sessions hear 3F/0E.
    pub fn add_lun(&self, config: LunConfig) -> io::Result<()> {
        if !config.block_bytes.is_power_of_two()
            || !(512..=4096).contains(&config.block_bytes)
            || config.blocks == 0
        {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "blocks of 512 to 4096 bytes, at least one",
            ));
        }
        let store = match &config.file {
            None => Store::memory(config.block_bytes, config.blocks),
            Some(path) => Store::file(path, config.block_bytes, config.blocks)?,
        };
        let (number, shared) = (config.number, &self.shared);
        let serial = format!("LUNFS{:05}{number:04}", shared.portal.port());
        let slow = is_slow(&config.personality);
        let mut unit = Unit::new(store, config.personality, serial, shared.seed ^ u64::from(number));
        let sessions = lock(&shared.sessions);
        sessions.by_nexus.keys().for_each(|nexus| unit.attentions.introduce(nexus));
        let guarded = Guarded { unit, aborted_all: 0, aborted: HashMap::new(), powered_on: 0 };
        let lun = Arc::new(Lun { number, guarded: Mutex::new(guarded), slow: AtomicBool::new(slow) });
        shared.luns.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(number, lun);
        self.luns_changed();
        Ok(())
    }

    /// The LUN is there no more: 25/00 for all commands to it, 3F/0E on the others. Its bytes are kept for `map_lun`.
    pub fn unmap_lun(&self, number: u16) -> Option<UnmappedLun> {
        let lun =
            self.shared.luns.write().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&number)?;
        drop(lock(&lun.guarded));
        self.luns_changed();
        Some(UnmappedLun(lun))
    }

    pub fn map_lun(&self, lun: UnmappedLun) {
        let number = lun.0.number;
        self.shared.luns.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(number, lun.0);
        self.luns_changed();
    }

    fn luns_changed(&self) {
        for lun in self.shared.all_luns() {
            lock(&lun.guarded).unit.attentions.raise_all(attention::LUNS_CHANGED, None);
        }
    }

    fn with_lun<T>(&self, number: u16, f: impl FnOnce(&mut Guarded) -> T) -> io::Result<T> {
        let lun = self.shared.lun(number);
        let lun =
            lun.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no LUN {number}")))?;
        let result = f(&mut lock(&lun.guarded));
        Ok(result)
    }

    pub fn luns(&self) -> Vec<u16> {
        self.shared.all_luns().iter().map(|lun| lun.number).collect()
    }

    pub fn blocks(&self, lun: u16) -> io::Result<u64> {
        self.with_lun(lun, |guarded| guarded.unit.store.blocks())
    }

    /// Another size; all nexuses hear 2A/09.
    pub fn resize(&self, lun: u16, blocks: u64) -> io::Result<()> {
        self.with_lun(lun, |guarded| guarded.unit.resize(blocks))?
    }

    pub fn personality(&self, lun: u16) -> io::Result<Personality> {
        self.with_lun(lun, |guarded| guarded.unit.personality.clone())
    }

    pub fn set_personality(&self, lun: u16, personality: Personality) -> io::Result<()> {
        let found = self.shared.lun(lun).ok_or(io::ErrorKind::NotFound)?;
        found.slow.store(is_slow(&personality), Ordering::SeqCst);
        lock(&found.guarded).unit.set_personality(personality);
        Ok(())
    }

    pub fn change_personality(&self, lun: u16, change: impl FnOnce(&mut Personality)) -> io::Result<()> {
        let mut personality = self.personality(lun)?;
        change(&mut personality);
        self.set_personality(lun, personality)
    }

    pub fn reservations(&self, lun: u16) -> io::Result<Reservations> {
        self.with_lun(lun, |guarded| guarded.unit.reservations.clone())
    }

    /// The bytes as they are now, past all sessions and caches.
    pub fn read(&self, lun: u16, lba: u64, blocks: u64) -> io::Result<Vec<u8>> {
        self.with_lun(lun, |guarded| {
            inside(&guarded.unit.store, lba, blocks)?;
            guarded.unit.store.read_blocks(lba, blocks)
        })?
    }

    /// Writes past all sessions, durably.
    pub fn write(&self, lun: u16, lba: u64, data: &[u8]) -> io::Result<()> {
        self.with_lun(lun, |guarded| {
            let store = &mut guarded.unit.store;
            inside(store, lba, (data.len() / store.block_bytes()) as u64)?;
            store.write(lba, data, true)
        })?
    }

    /// Blocks that a loss of power could take back.
    pub fn not_durable(&self, lun: u16) -> io::Result<usize> {
        self.with_lun(lun, |guarded| guarded.unit.store.not_durable())
    }

    /// A unit attention for one initiator (part of its name), or for all; how many nexuses have it waiting now.
    pub fn raise_attention(&self, lun: u16, initiator: Option<&str>, asc: u8, ascq: u8) -> io::Result<usize> {
        let nexuses: Vec<Nexus> = lock(&self.shared.sessions).by_nexus.keys().cloned().collect();
        self.with_lun(lun, |guarded| {
            let meant =
                nexuses.iter().filter(|one| initiator.is_none_or(|part| one.initiator.contains(part)));
            meant.map(|nexus| guarded.unit.attentions.raise(nexus, (asc, ascq))).count()
        })
    }

    /// For tests that don't care about the attentions of a login.
    pub fn clear_attentions(&self) {
        self.shared.all_luns().iter().for_each(|lun| lock(&lun.guarded).unit.attentions.clear());
    }

    // --- faults ----------------------------------------------------------------------------------------

    pub fn add_rule(&self, rule: Rule) -> String {
        let id = lock(&self.shared.faults).add(rule);
        self.shared.any_fault.store(true, Ordering::SeqCst);
        id
    }

    pub fn remove_rule(&self, id: &str) -> bool {
        let mut faults = lock(&self.shared.faults);
        let found = faults.remove(id);
        self.shared.any_fault.store(!faults.is_empty(), Ordering::SeqCst);
        found
    }

    pub fn clear_rules(&self) {
        lock(&self.shared.faults).clear();
        self.shared.any_fault.store(false, Ordering::SeqCst);
    }

    pub fn rules(&self) -> Vec<Standing> {
        lock(&self.shared.faults).standing()
    }

    /// How often a rule was used.
    pub fn fired(&self, id: &str) -> u64 {
        self.rules().iter().find(|one| one.rule.id == id).map_or(0, |one| one.fired)
    }

    /// All sessions end; each block that is not durable stays or goes back, by seed; registrations are gone but those
    /// that were to persist; 29/00 waits for everybody.
    pub fn lose_power(&self, seed: u64) -> io::Result<Loss> {
        self.shared.lose_power(seed)
    }

    /// When it returns nothing of that initiator (part of its name), or of anybody, is executed until `thaw`.
    pub fn freeze(&self, initiator: Option<&str>) {
        self.shared.gate.freeze(initiator);
        self.shared.pass_through_all();
    }

    /// `None`: everything that is frozen.
    pub fn thaw(&self, initiator: Option<&str>) {
        self.shared.gate.thaw(initiator);
    }

    /// Ends the sessions of an initiator (part of its name), or all; how many there were. What they sent and was not
    /// executed yet never will be.
    pub fn cut(&self, initiator: Option<&str>) -> usize {
        let mut sessions = lock(&self.shared.sessions);
        let meant = |one: &Session| {
            initiator.is_none_or(|part| one.nexus().is_some_and(|nexus| nexus.to_string().contains(part)))
        };
        self.shared.drop_sessions(&mut sessions, meant)
    }

    pub fn sessions(&self) -> Vec<Nexus> {
        let mut all: Vec<Nexus> = lock(&self.shared.sessions).by_nexus.keys().cloned().collect();
        all.sort();
        all
    }

    // --- trace -----------------------------------------------------------------------------------------

    /// What was executed after the entry with this number (0: from the beginning).
    pub fn trace_since(&self, sequence: u64) -> Vec<Entry> {
        lock(&self.shared.trace).since(sequence)
    }

    pub fn trace_last(&self) -> u64 {
        lock(&self.shared.trace).last()
    }

    pub fn set_judge(&self, judge: Option<Judge>) {
        lock(&self.shared.trace).judge(judge);
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.gate.open_for_good();
        self.shared.pass_through_all();
        self.shared.drop_sessions(&mut lock(&self.shared.sessions), |_| true);
        // Wakes the acceptor, which looks at `stopping`.
        let _ = TcpStream::connect(self.shared.portal);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.shared.drop_sessions(&mut lock(&self.shared.sessions), |_| true);
    }
}

/// A LUN that was taken away and can be given back.
pub struct UnmappedLun(Arc<Lun>);

fn is_slow(personality: &Personality) -> bool {
    let latency = &personality.latency;
    latency.max_us > 0 || (latency.tail_per_mille > 0 && latency.tail_us > 0) || !personality.slow.is_empty()
}

fn inside(store: &Store, lba: u64, blocks: u64) -> io::Result<()> {
    if lba.checked_add(blocks).is_none_or(|end| end > store.blocks()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "blocks past the end of the LUN"));
    }
    Ok(())
}
