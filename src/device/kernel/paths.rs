//! All paths to a unit, and the thread that keeps them.
//!
//! A path is *up*, or in *doubt*: new, silent, failed, blocked by the kernel. A doubtful path is used for nothing until
//! the keeper has looked at it; one that was merely slow must pass the first question only, and for one that was merely
//! silent a late answer to whatever it was asked before is as good:
//!
//! 1. Its unit attentions are drawn, and it is ready.
//! 2. It leads to the same unit (VPD 83h and 80h), of the same block size, not smaller.
//! 3. This host is registered there, if it is registered at all. If it is not, another path must show that this host is
//!    not fenced: registered there before *and after* the new path was registered. A fence in between takes both.
//!    Without another path, a missing registration is a fence.
//!
//! Resets: a path that was lost counts as one, for its target may have begun a new life meanwhile, unless another path
//! stayed up throughout: a reset shows there as well. Then what the returning path says of resets is not counted either,
//! for many targets greet every new nexus with 29/00.
//!
//! With each round the keeper asks the kernel which paths there are (device-mapper's list, or the name that was
//! given) and what it thinks of them, so that nothing is sent into a queue that the kernel has blocked.

use std::sync::Arc;

use super::classify::{Disk, Found, classify, paths_now};
use super::door::Kernel;
use super::hold::Hold;
use super::path::{Bell, Condition, Doubt, Path};
use super::timing;
use crate::device::scsi::cdb::Cdb;
use crate::device::scsi::inquiry::Description;
use crate::device::scsi::transport::{Data, Limits};
use crate::device::scsi::unit::{Problem, Unit};
use crate::rt::{self, Instant, JoinHandle, Mutex};

/// What the keys of a device's paths are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Registered {
    pub key: Option<u64>,
}

#[derive(Default)]
struct State {
    paths: Vec<Arc<Path>>,
    /// The next path for bulk data.
    turn: usize,
    stop: bool,
}

struct Shared {
    kernel: Arc<dyn Kernel>,
    spec: std::path::PathBuf,
    found: Found,
    unit: Arc<Unit>,
    expected: Description,
    bell: Arc<Bell>,
    state: Mutex<State>,
    /// The key that every path carries; held while paths are registered, so that no path is forgotten.
    registered: Mutex<Registered>,
}

/// See the module's header.
pub struct Paths {
    shared: Arc<Shared>,
    keeper: Option<JoinHandle<()>>,
}

fn open(kernel: &dyn Kernel, disk: &Disk, bell: &Arc<Bell>) -> Result<Arc<Path>, String> {
    let node = kernel.open(&disk.name, disk.number).map_err(|e| format!("{}: open: {e}", disk.name))?;
    Ok(Arc::new(Path::new(disk.clone(), node, Hold::of(&disk.dir), bell.clone())))
}

/// Draws unit attentions, and waits until the unit is ready.
fn ready(unit: &Unit, path: &Arc<Path>) -> Result<(), Problem> {
    let timed = path.timed();
    unit.draw_attentions(&timed, Limits::within(timing::READY))?;
    unit.perform(&timed, &Cdb::test_unit_ready(), Data::None, Limits::within(timing::READY)).map(drop)
}

/// The same, and asks what it is.
fn look(unit: &Unit, path: &Arc<Path>) -> Result<Description, Problem> {
    ready(unit, path)?;
    unit.describe(&path.timed(), Limits::within(timing::ADMIN))
}

impl Paths {
    /// Opens the paths and looks at each. One that serves is enough.
    pub fn open(
        kernel: Arc<dyn Kernel>,
        spec: &std::path::Path,
        found: Found,
        unit: Arc<Unit>,
    ) -> Result<(Paths, Description), String> {
        let bell = Arc::new(Bell::default());
        let mut paths = Vec::new();
        let mut expected: Option<Description> = None;
        let mut trouble = Vec::new();
        for disk in &found.disks {
            let looked = open(&*kernel, disk, &bell).and_then(|path| {
                let what = look(&unit, &path).map_err(|problem| format!("{}: {problem}", disk.name));
                paths.push(path.clone());
                what.map(|what| (path, what))
            });
            match looked {
                Ok((path, what)) => match expected.as_ref().and_then(|first| what.differs_from(first)) {
                    Some(_) => return Err(format!("{}: its paths lead to different units", disk.name)),
                    None => {
                        expected.get_or_insert(what);
                        path.set_up(Doubt::Lost);
                    }
                },
                Err(why) => trouble.push(why),
            }
        }
        let Some(expected) = expected else { return Err(trouble.join("; ")) };
        for why in trouble {
            log::warn!("{why}; going on without this path");
        }
        let state = State { paths, ..State::default() };
        let shared = Arc::new(Shared {
            kernel,
            spec: spec.to_owned(),
            found,
            unit,
            expected: expected.clone(),
            bell,
            state: Mutex::new(state),
            registered: Mutex::new(Registered::default()),
        });
        let mine = shared.clone();
        // While the only path is in doubt, beats wait for this thread.
        let keeper = rt::try_spawn_urgent("scsi-keeper", move || mine.keep()).map_err(|e| e.to_string())?;
        Ok((Paths { shared, keeper: Some(keeper) }, expected))
    }

    pub fn all(&self) -> Vec<Arc<Path>> {
        self.shared.state.lock().paths.clone()
    }

    /// Paths in use, the best first.
    pub fn up(&self) -> Vec<Arc<Path>> {
        self.shared.up()
    }

    /// The path for locks and beats: the best one, always the same while it serves. Waits for one until `until`.
    pub fn one(&self, until: Instant) -> Option<Arc<Path>> {
        self.wait(until, |up| up.into_iter().next())
    }

    /// The next path for bulk data: all that are as good as the best take turns.
    pub fn next(&self, until: Instant) -> Option<Arc<Path>> {
        self.wait(until, |up| {
            let best = up.first()?.rank();
            let equal: Vec<_> = up.into_iter().filter(|path| path.rank() == best).collect();
            let mut state = self.shared.state.lock();
            state.turn = state.turn.wrapping_add(1);
            equal.get(state.turn % equal.len()).cloned()
        })
    }

    fn wait(
        &self,
        until: Instant,
        choose: impl Fn(Vec<Arc<Path>>) -> Option<Arc<Path>>,
    ) -> Option<Arc<Path>> {
        loop {
            let seen = self.shared.bell.count();
            if let Some(path) = choose(self.up()) {
                return Some(path);
            }
            if Instant::now() >= until {
                return None;
            }
            self.shared.bell.wait(seen, until);
        }
    }

    /// Why there is no path.
    pub fn trouble(&self) -> String {
        let each = |path: &Arc<Path>| match path.condition() {
            Condition::Up => format!("{}: just back", path.disk().name),
            Condition::Doubtful { why, .. } => format!("{}: {why}", path.disk().name),
        };
        let all: Vec<_> = self.all().iter().map(each).collect();
        match all.is_empty() {
            true => "no path to the unit".into(),
            false => format!("no path to the unit ({})", all.join("; ")),
        }
    }

    /// The key that paths carry. While the guard lives, no path comes into use.
    pub fn registered(&self) -> crate::rt::MutexGuard<'_, Registered> {
        self.shared.registered.lock()
    }
}

impl Drop for Paths {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.bell.ring();
        // It may be in the kernel; then it ends by itself.
        if let Some(keeper) = self.keeper.take().filter(JoinHandle::is_finished) {
            let _ = keeper.join();
        }
    }
}

impl Shared {
    fn up(&self) -> Vec<Arc<Path>> {
        let paths = self.state.lock().paths.clone();
        let mut up: Vec<_> = paths
            .into_iter()
            .filter(|path| path.is_up())
            .filter_map(|path| Some((path.rank()?, path)))
            .collect();
        up.sort_by_key(|(rank, _)| *rank);
        up.into_iter().map(|(_, path)| path).collect()
    }

    fn keep(&self) {
        let mut pause = timing::RETRY_FIRST;
        let mut listed = Instant::now();
        loop {
            let seen = self.bell.count();
            if self.state.lock().stop {
                return;
            }
            if listed.elapsed() >= timing::LOOK {
                self.list();
                listed = Instant::now();
            }
            let doubtful: Vec<_> =
                self.state.lock().paths.iter().filter(|path| !path.is_up()).cloned().collect();
            let back = doubtful.iter().filter(|path| self.look_again(path)).count();
            pause = match (doubtful.len(), back) {
                (0, _) => timing::RETRY_FIRST,
                (_, 0) => (pause * 2).min(timing::RETRY_LONGEST),
                _ => timing::RETRY_FIRST,
            };
            let rest = if doubtful.len() > back { pause } else { timing::LOOK };
            self.bell.wait(seen, Instant::now() + rest);
        }
    }

    /// Asks the kernel which paths there are, and in which state.
    fn list(&self) {
        let now = match self.found.multipath {
            Some(_) => paths_now(&self.found.top),
            // The name may lead to another disk by now: the one that was found when the unit came back.
            None => match self.kernel.block_device(&self.spec) {
                Ok(Some(number)) => classify(&*self.kernel, number).map(|f| f.disks).unwrap_or_default(),
                _ => Vec::new(),
            },
        };
        let mut fresh = Vec::new();
        {
            let mut state = self.state.lock();
            let known = |disk: &Disk, paths: &[Arc<Path>]| paths.iter().any(|path| path.disk() == disk);
            for disk in &now {
                if !known(disk, &state.paths) {
                    fresh.push(disk.clone());
                }
            }
            // Gone for good, unless it is the last: somebody must say what the trouble is.
            let gone = |path: &Arc<Path>| !path.is_up() && !now.contains(path.disk());
            let stays = state.paths.iter().filter(|path| !gone(path)).count() + fresh.len();
            if stays > 0 {
                state.paths.retain(|path| {
                    if gone(path) {
                        log::info!("{}: the path is gone", path.disk().name);
                    }
                    !gone(path)
                });
            }
            for path in state.paths.iter().filter(|path| path.is_up()) {
                let kernel = path.disk().dir.scsi_state();
                if kernel != "running" {
                    let doubt = if kernel == "quiesce" { Doubt::Unready } else { Doubt::Lost };
                    path.doubt(&format!("the kernel says '{kernel}'"), doubt);
                }
            }
        }
        for disk in fresh {
            match open(&*self.kernel, &disk, &self.bell) {
                Ok(path) => {
                    log::info!("{}: a new path", disk.name);
                    self.state.lock().paths.push(path);
                }
                Err(why) => log::debug!("{why}"),
            }
        }
    }

    /// Looks at a doubtful path; true: it is in use again.
    fn look_again(&self, path: &Arc<Path>) -> bool {
        let Condition::Doubtful { why: before, since, doubt } = path.condition() else { return true };
        // Offline disks answer at once; blocked ones only when the kernel gives them up.
        if path.disk().dir.scsi_state() != "running" || path.rank().is_none() || path.is_stuck() {
            return false;
        }
        match self.admit(path, doubt) {
            // Its answer said so.
            Ok(()) if path.is_up() => true,
            Ok(()) if !path.set_up(doubt) => false,
            Ok(()) => {
                if before != "new" {
                    let away = since.elapsed().as_millis();
                    log::warn!("{}: the path serves again after {away} ms ({before})", path.disk().name);
                }
                true
            }
            Err(why) => {
                log::debug!("{}: {why}", path.disk().name);
                // A dead node stays dead: the disk may be there again under the same number.
                if path.is_dead()
                    && let Ok(fresh) = open(&*self.kernel, path.disk(), &self.bell)
                {
                    fresh.doubt(&before, Doubt::Lost);
                    let mut state = self.state.lock();
                    if let Some(place) = state.paths.iter_mut().find(|p| Arc::ptr_eq(p, path)) {
                        *place = fresh;
                    }
                }
                false
            }
        }
    }

    /// See the module's header.
    fn admit(&self, path: &Arc<Path>, doubt: Doubt) -> Result<(), String> {
        // Nobody registers meanwhile, so the key is the one that all the others carry.
        let registered = self.registered.lock();
        let witness = self.up().into_iter().next();
        if doubt < Doubt::Lost {
            // It was slow, or its port was not for use: the same path to the same unit, registered as it was.
            return ready(&self.unit, path).map_err(|problem| problem.to_string());
        }
        let scratch = Unit::default();
        let unit = if witness.is_some() { &scratch } else { &*self.unit };
        let found = look(unit, path).map_err(|problem| problem.to_string())?;
        if let Some(why) = found.differs_from(&self.expected) {
            return Err(why);
        }
        if witness.is_none() {
            self.unit.note_reset();
        }
        let (Some(key), false) = (registered.key, self.unit.is_fenced()) else { return Ok(()) };
        let limits = || Limits::within(timing::READY);
        let (timed, problem) = (path.timed(), |problem: Problem| problem.to_string());
        if self.unit.is_registered(&timed, key, limits()).map_err(problem)? {
            return Ok(());
        }
        let Some(witness) = witness else {
            return match self.unit.confirm_registration(&timed, limits()) {
                // It may still read.
                Ok(()) | Err(Problem::Fenced) => Ok(()),
                Err(e) => Err(e.to_string()),
            };
        };
        let still = || self.unit.is_registered(&witness.timed(), key, limits()).map_err(problem);
        if still()? {
            self.unit.join_path(&timed, key, limits()).map_err(problem)?;
            match still() {
                Ok(true) => return Ok(()),
                known => {
                    // Fenced meanwhile, or nobody can tell: what was registered after that must not stay.
                    let _ = self.unit.unregister_path(&timed, key, limits());
                    known?;
                }
            }
        }
        // The one that was in use all the time is not registered any more.
        match self.unit.confirm_registration(&witness.timed(), limits()) {
            Ok(()) => Err("its registration can't be shown".into()),
            Err(e) => Err(e.to_string()),
        }
    }
}
