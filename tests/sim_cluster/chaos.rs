//! Everything at once, or one kind of trouble alone: hosts are killed, frozen past their leases and thawed, cut off from
//! the LUN; the LUN's power fails, alone or with all hosts; answers are lost, or come late and false; the device fails
//! commands. Two to sixteen hosts, with reservations and without. The killed come back.
//!
//! Each life of a host works in a directory of its own, with the filesystem in memory beside it, and with all
//! others in one directory. What a life made durable is there in the end, and what else there is of it is what it
//! had at one moment after that: its operations are in order, none is half.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lunfs::device::sim::{FaultPlan, Keep, Partition, SimLunOptions};
use lunfs::durations::Profile;
use lunfs::fs::api::{FsError, Operations, SetAttributes};
use lunfs::layout::geometry::Geometry;
use lunfs::lease::LeaseState;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, freeze_host, seeds, thaw_host};
use lunfs::rt::{self, HostTag, JoinHandle};
use lunfs::testing::cluster::{Cluster, Formatted, cx};
use lunfs::testing::memfs::MemFs;
use lunfs::types::InodeNo;

use super::crash::{Tree, hasty, tree_of};
use super::model::{LONG, of_all_kinds, volumes};
use super::recovery::settled;

const MS: Duration = Duration::from_millis(1);
/// Longer than any command of a host that is gone can be on its way.
const GONE: Duration = Duration::from_secs(8);

/// What one life of a host did in its directory.
#[derive(Clone)]
struct Life {
    dir: String,
    /// What the directory held after each operation, the last one perhaps not done.
    states: Vec<Tree>,
    /// That state is durable.
    durable: Option<usize>,
}

type Lives = Arc<Mutex<BTreeMap<(HostTag, u32), Life>>>;

fn locked(lives: &Lives) -> MutexGuard<'_, BTreeMap<(HostTag, u32), Life>> {
    lives.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One random operation on both; `false`: it came to nothing.
fn step(fs: &dyn Operations, dir: InodeNo, rng: &mut SimRng) -> Result<(), FsError> {
    let name = format!("n{}", rng.below(9)).into_bytes();
    let other = format!("n{}", rng.below(9)).into_bytes();
    let (kind, len, first) = (rng.below(12), [30, 3000, 5000, 20_000][rng.index(4)], rng.below(256) as u8);
    let data: Vec<u8> = (0..len).map(|i| first.wrapping_add((i / 3) as u8)).collect();
    match kind {
        0..3 => fs.mknod(&cx(), dir, &name, libc::S_IFREG | 0o644, 0).map(drop),
        3 => fs.mkdir(&cx(), dir, &name, 0o755).map(drop),
        4 => fs.unlink(&cx(), dir, &name).map(drop),
        5 => fs.rmdir(&cx(), dir, &name).map(drop),
        6 | 7 => fs.rename(&cx(), dir, &name, dir, &other, 0).map(drop),
        8 => {
            let ino = fs.lookup(&cx(), dir, &name)?.value.ino;
            fs.link(&cx(), ino, dir, &other).map(drop)
        }
        9 => {
            let ino = fs.lookup(&cx(), dir, &name)?.value.ino;
            let set = SetAttributes { size: Some(0), ..SetAttributes::default() };
            fs.setattr(&cx(), ino, &set).map(drop)
        }
        _ => {
            // What is overwritten in place is no operation that can be absent.
            let ino = fs.lookup(&cx(), dir, &name)?.value.ino;
            fs.write(&cx(), ino, None, 0, &data, true).map(drop)
        }
    }
}

/// Is it an answer rather than a failure?
fn answers(error: &FsError) -> bool {
    use FsError::*;
    matches!(error, NotFound | Exists | Stale | NotEmpty | NoSpace | IsDirectory | NotDirectory)
        || error.errno() == libc::EPERM
        || error.errno() == libc::EINVAL
}

/// A life's work, until its host may not go on.
fn work(
    fs: &dyn Operations,
    me: (HostTag, u32),
    lives: &Lives,
    seed: u64,
    until: Duration,
) -> Result<(), FsError> {
    let mut rng = SimRng::new(seed, 1000 + u64::from(me.0.0) * 100 + u64::from(me.1));
    let name = format!("life-{}-{}", me.0.0, me.1);
    let mem = MemFs::new();
    let shared = fs.lookup(&cx(), fs.root(), b"shared")?.value.ino;
    let dir = fs.mkdir(&cx(), fs.root(), name.as_bytes(), 0o755)?.value.ino;
    fs.sync(&cx())?;
    let state = tree_of(&mem, mem.root());
    locked(lives).insert(me, Life { dir: name, states: vec![state], durable: Some(0) });
    while rt::sim::now().unwrap() < until {
        let mut both = rng.clone();
        let mine = step(&mem, mem.root(), &mut both);
        let last = {
            let mut lives = locked(lives);
            let life = lives.get_mut(&me).unwrap();
            life.states.push(tree_of(&mem, mem.root()));
            life.states.len() - 1
        };
        match (step(fs, dir, &mut rng), mine) {
            (Ok(()), Ok(())) => {}
            (Err(FsError::NoSpace), Ok(())) => return Ok(()),
            // Which of two errors is said is no promise.
            (Err(a), Err(_)) if answers(&a) => {}
            (Err(a), _) if !answers(&a) => return Err(a),
            (real, mem) => panic!("{me:?}: the volume says {real:?}, the filesystem in memory {mem:?}"),
        }
        if rng.chance(0.15) {
            fs.sync(&cx())?;
            locked(lives).get_mut(&me).unwrap().durable = Some(last);
        }
        if rng.chance(0.15) {
            match step(fs, shared, &mut rng) {
                Err(e) if !answers(&e) => return Err(e),
                _ => {}
            }
        }
        rt::sleep(Duration::from_micros(rng.below(60_000)));
    }
    Ok(())
}

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    Death,
    Freeze,
    Partition,
    /// The power of everything.
    Blackout,
    /// The power of the LUN; hosts go on.
    Reset,
    /// Answers to compare-and-writes that are lost, late or false.
    UnknownSwaps,
    /// Any command: answer lost, late, never executed, repeated below.
    UnknownOutcomes,
    /// Any command: an error, after which it may have been executed, wholly or in part.
    Errors,
}

const TROUBLES: [Trouble; 8] = [
    Trouble::Death,
    Trouble::Freeze,
    Trouble::Partition,
    Trouble::Blackout,
    Trouble::Reset,
    Trouble::UnknownSwaps,
    Trouble::UnknownOutcomes,
    Trouble::Errors,
];

/// The troubles of a run: one alone in every third, else a random choice.
fn troubles(seed: u64, rng: &mut SimRng) -> Vec<Trouble> {
    if seed % 3 == 2 {
        return vec![TROUBLES[(seed / 3) as usize % TROUBLES.len()]];
    }
    let likely = [0.3, 0.6, 1.0][rng.index(3)];
    TROUBLES.into_iter().filter(|_| rng.chance(likely)).collect()
}

/// Volumes with slots for sixteen hosts and their next lives.
fn crowds() -> &'static [Formatted; 4] {
    static VOLUMES: std::sync::OnceLock<[Formatted; 4]> = std::sync::OnceLock::new();
    VOLUMES.get_or_init(|| {
        let small = Geometry::tiny(8);
        let more = 24 * small.journal_blocks + 2 * small.cluster_blocks;
        let geometry = Geometry { slots: 32, size_blocks: small.size_blocks + more, ..small };
        let (size_bytes, hold_time) = (geometry.size_bytes(), Duration::from_millis(500));
        of_all_kinds(|lun| {
            let lun = SimLunOptions { size_bytes, hold_time, ..lun };
            Formatted::with_profile(lun, Some(geometry), Profile::Fast)
        })
    })
}

/// What befell the hosts of a run.
#[derive(Clone, Copy, Default, Debug)]
#[allow(dead_code, reason = "read by its Debug")]
pub struct Befell {
    pub hosts: u16,
    pub fencing: bool,
    pub resets: u32,
    pub killed: u32,
    pub frozen: u32,
    pub cut_off: u32,
    pub power_cuts: u32,
    pub ended: u32,
    pub lives: usize,
    pub operations: usize,
}

/// The hosts of a run, and what is going on.
struct Run {
    cluster: Cluster,
    lives: Lives,
    seed: u64,
    rng: SimRng,
    until: Duration,
    troubles: Vec<Trouble>,
    /// Hosts that are gone, and when they come back.
    gone: BTreeMap<HostTag, Duration>,
    /// Hosts that are frozen or cut off, until when.
    troubled: BTreeMap<HostTag, Duration>,
    workers: Vec<JoinHandle<()>>,
    next_life: u32,
    befell: Befell,
}

fn now() -> Duration {
    rt::sim::now().unwrap()
}

impl Run {
    fn millis(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.rng.between(least, most))
    }

    /// Starts a new life's work on a host that is up.
    fn put_to_work(&mut self, host: usize) {
        self.cluster.may_end(host);
        self.next_life += 1;
        let (tag, lease) = {
            let host = &self.cluster.hosts[host];
            (host.tag, host.volume.door().lease().clone())
        };
        let (me, lives, seed, until) = ((tag, self.next_life), self.lives.clone(), self.seed, self.until);
        let worker =
            self.cluster.spawn(host, "worker", move |fs| match work(&*fs, me, &lives, seed, until) {
                Ok(()) | Err(FsError::Fenced) => {}
                // A device that fails is an error of the operation; whether the host may go on is another question.
                Err(FsError::Io(_)) => {}
                Err(e) => panic!("{me:?}: {e}; its lease is {:?}", lease.state()),
            });
        self.workers.push(worker);
    }

    fn kill(&mut self, host: usize) {
        let tag = self.cluster.kill(host);
        self.cluster.lun.heal(tag);
        let back = now() + GONE + self.millis(0, 20_000);
        self.gone.insert(tag, back);
        self.troubled.remove(&tag);
    }

    /// Hosts that come back, and hosts whose lease ended.
    fn look_after(&mut self) {
        let now = now();
        self.troubled.retain(|_, until| *until > now);
        let ended = |run: &Run, host: usize| {
            let host = &run.cluster.hosts[host];
            !run.troubled.contains_key(&host.tag) && host.volume.door().lease().state() == LeaseState::Ended
        };
        while let Some(host) = (0..self.cluster.hosts.len()).find(|host| ended(self, *host)) {
            self.befell.ended += 1;
            self.kill(host);
        }
        let back: Vec<HostTag> =
            self.gone.iter().filter(|(_, at)| **at <= now).map(|(tag, _)| *tag).collect();
        for tag in back {
            match self.cluster.join(tag) {
                Ok(()) => {
                    self.gone.remove(&tag);
                    self.put_to_work(self.cluster.hosts.len() - 1);
                }
                // Something it needs is held by a host that is not recovered yet, or a command failed.
                Err(_) => {
                    rt::sim::kill_host(tag);
                    self.gone.insert(tag, now + GONE);
                }
            }
        }
    }

    /// Something happens.
    fn strike(&mut self) {
        let well: Vec<usize> = (0..self.cluster.hosts.len())
            .filter(|host| !self.troubled.contains_key(&self.cluster.hosts[*host].tag))
            .collect();
        if well.is_empty() {
            return;
        }
        let host = well[self.rng.index(well.len())];
        let tag = self.cluster.hosts[host].tag;
        // Some get over it, some lose their lease, some are found dead meanwhile.
        let span = match self.rng.below(3) {
            0 => self.millis(100, 1500),
            1 => self.millis(1500, 5000),
            _ => self.millis(5000, 15_000),
        };
        let keep = [Keep::Random, Keep::Random, Keep::Nothing, Keep::Everything][self.rng.index(4)];
        match self.troubles.get(self.rng.index(self.troubles.len().max(1))) {
            Some(Trouble::Death) => {
                self.befell.killed += 1;
                self.kill(host);
            }
            Some(Trouble::Freeze) => {
                self.befell.frozen += 1;
                freeze_host(tag);
                rt::sim::after(span, move || thaw_host(tag));
                self.troubled.insert(tag, now() + span + 20 * MS);
            }
            Some(Trouble::Partition) => {
                self.befell.cut_off += 1;
                let kind = [Partition::Hang, Partition::Fail][self.rng.index(2)];
                self.cluster.lun.partition(tag, kind);
                let lun = self.cluster.lun.clone();
                rt::sim::after(span, move || lun.heal(tag));
                self.troubled.insert(tag, now() + span + 20 * MS);
            }
            Some(Trouble::Blackout) => {
                self.befell.power_cuts += 1;
                while !self.cluster.hosts.is_empty() {
                    self.befell.killed += 1;
                    self.kill(0);
                }
                self.cluster.lun.power_cut(keep);
            }
            Some(Trouble::Reset) => {
                self.befell.resets += 1;
                self.cluster.lun.power_cut(keep);
            }
            Some(Trouble::UnknownSwaps | Trouble::UnknownOutcomes | Trouble::Errors) | None => {}
        }
    }

    /// Everybody is well again or gone, and somebody is there.
    fn calm_down(&mut self) {
        self.cluster.lun.clear_faults();
        while !self.troubled.is_empty() {
            rt::sleep(100 * MS);
            self.troubled.retain(|_, until| *until > now());
        }
        // Whose lease ended knows it by now; who missed beats had time for one.
        rt::sleep(Duration::from_secs(3));
        self.look_after();
        let gone: Vec<HostTag> = self.gone.keys().copied().collect();
        // A stranger would find no slot where all are taken by the dead.
        for tag in gone.into_iter().cycle() {
            if !self.cluster.hosts.is_empty() {
                break;
            }
            rt::sleep(GONE);
            if self.cluster.join(tag).is_err() {
                rt::sim::kill_host(tag);
            }
        }
        settled(&self.cluster);
        for worker in self.workers.drain(..) {
            // Those that were killed returned nothing.
            let _ = worker.join();
        }
    }

    /// What every life left, as one host sees it.
    fn check(&self, host: usize) {
        // The list is locked for an instant only: looking takes time.
        let lives = locked(&self.lives).clone();
        for (me, life) in lives {
            let Some(durable) = life.durable else { continue };
            let seen = self.cluster.on(host, |fs| {
                let found = fs.lookup(&cx(), fs.root(), life.dir.as_bytes());
                let dir = found.unwrap_or_else(|e| panic!("{me:?}: its directory: {e}")).value.ino;
                tree_of(fs, dir)
            });
            if life.states[durable..].contains(&seen) {
                continue;
            }
            let earlier = life.states[..durable].iter().rposition(|state| *state == seen);
            let shown: Vec<_> = seen.iter().map(|(path, s)| (path, s.0, s.1, s.2)).collect();
            panic!(
                "{me:?}: of {} states number {durable} was durable; what is there is {earlier:?}: {shown:?}",
                life.states.len()
            );
        }
    }
}

/// One run.
pub fn run(seed: u64, bug: Option<Bug>) -> Result<Befell, Failure> {
    let mut rng = SimRng::new(seed, 63);
    let many = seed % 8 == 5;
    let hosts = if many { rng.between(9, 16) } else { rng.between(2, 8) } as u16;
    let mut formatted = match seed % 8 {
        7 => &volumes()[(seed / 8 % 4) as usize],
        5 => &crowds()[(seed / 8 % 4) as usize],
        _ => &hasty()[(seed % 4) as usize],
    }
    .clone();
    formatted.lun.fencing = rng.chance(0.5);
    if seed % 16 == 7 {
        // A device that may hold a write for longer than a lease, as iSCSI does, and answers or gives up well within one.
        formatted.lun.hold_time = Duration::from_secs(6);
        formatted.lun.deadline = Duration::from_millis(1200);
    }
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let troubles = troubles(seed, &mut rng);
        let cluster = Cluster::start(&formatted, hosts);
        cluster.on(0, |fs| {
            fs.mkdir(&cx(), fs.root(), b"shared", 0o755).map(drop).unwrap();
            fs.sync(&cx()).unwrap();
        });
        if troubles.contains(&Trouble::UnknownSwaps) {
            cluster.unknown_swaps(seed, 60);
        }
        let (unknown, errors) = (Trouble::UnknownOutcomes, Trouble::Errors);
        let unknown = if troubles.contains(&unknown) { 0.0003 } else { 0.0 };
        let plan = FaultPlan::unknown_outcomes(unknown, formatted.lun.hold_time);
        let errors = if troubles.contains(&errors) { 0.0001 } else { 0.0 };
        // A write that executes again after it was answered is what no host can survive.
        cluster.lun.set_faults(FaultPlan { twice: 0.0, io_error: errors, refused: errors, ..plan });
        let befell = Befell { hosts, fencing: formatted.lun.fencing, ..Befell::default() };
        let until = now() + Duration::from_secs(60);
        let mut run = Run {
            cluster,
            lives: Lives::default(),
            seed,
            rng,
            until,
            gone: BTreeMap::new(),
            troubled: BTreeMap::new(),
            workers: Vec::new(),
            next_life: 0,
            troubles,
            befell,
        };
        (0..usize::from(hosts)).for_each(|host| run.put_to_work(host));
        let mut next = now() + run.millis(100, 3000);
        while now() < until {
            rt::sleep(50 * MS);
            run.look_after();
            if now() >= next {
                run.strike();
                next = now() + run.millis(100, 6000);
            }
        }
        run.calm_down();
        (0..run.cluster.hosts.len()).for_each(|host| run.check(host));
        run.befell.lives = locked(&run.lives).len();
        run.befell.operations = locked(&run.lives).values().map(|life| life.states.len()).sum();
        let befell = run.befell;
        run.cluster.finish();
        befell
    });
    finished.map(|f| f.value)
}

#[test]
fn whatever_befalls_the_hosts_what_was_durable_is_there() {
    for seed in seeds(0..16) {
        let befell = run(seed, None).unwrap_or_else(|e| panic!("{e}"));
        println!("seed {seed}: {befell:?}");
    }
}
