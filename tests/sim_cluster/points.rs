//! What scenes have in common that are run again for each point at which somebody can die: a failure says at which, and
//! the LUN may lose its power at the same moment.

use lunfs::device::sim::Keep;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation};

use super::model::LONG;

/// Runs the scene; a failure says where.
pub fn explained<T: Send + 'static>(
    at: String,
    seed: u64,
    bug: Option<Bug>,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    match Simulation::new(seed).max_time(LONG).planted(bug).try_run(run) {
        Ok(finished) => Ok(finished.value),
        Err(failure) => Err(Failure { message: format!("{at}: {}", failure.message), ..failure }),
    }
}

/// What a power cut leaves of a volatile cache; `None`: there is no cut.
pub fn cut_of(volatile: bool, rng: &mut SimRng) -> Option<Keep> {
    match rng.below(4) {
        _ if !volatile => None,
        0 => None,
        1 => Some(Keep::Nothing),
        2 => Some(Keep::Random),
        _ => Some([Keep::AllBut(rng.index(9)), Keep::Only(rng.index(9))][rng.index(2)]),
    }
}
