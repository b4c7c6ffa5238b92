//! One operation at a time, each through another host, against the filesystem in memory.

use std::time::Duration;

use lunfs::device::sim::SimLunOptions;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, Formatted};
use lunfs::testing::model::Model;

/// No run needs more virtual time; one that does waits for something that won't come.
pub const LONG: Duration = Duration::from_secs(1200);

/// One volume on each kind of LUN: with blocks of either size, with a volatile cache and without.
pub fn of_all_kinds(format: impl Fn(SimLunOptions) -> Formatted) -> [Formatted; 4] {
    [(512, true), (4096, true), (512, false), (4096, false)].map(|(logical_block_bytes, volatile_cache)| {
        format(SimLunOptions { logical_block_bytes, volatile_cache, ..SimLunOptions::default() })
    })
}

/// Volumes of all kinds, formatted once.
pub fn volumes() -> &'static [Formatted; 4] {
    static VOLUMES: std::sync::OnceLock<[Formatted; 4]> = std::sync::OnceLock::new();
    VOLUMES.get_or_init(|| of_all_kinds(|lun| Formatted::tiny_on(8, lun)))
}

/// The volume of a seed, and whether its compare-and-writes have unknown outcomes.
pub fn variant(seed: u64) -> (&'static Formatted, bool) {
    (&volumes()[(seed % 4) as usize], seed % 3 == 1)
}

/// Runs `work` on a cluster; then everybody leaves and the volume must be whole.
pub fn run(
    seed: u64,
    formatted: &'static Formatted,
    faults: bool,
    hosts: u16,
    work: impl FnOnce(&Cluster) + Send + 'static,
) {
    run_without(None, seed, formatted, faults, hosts, work).unwrap_or_else(|e| panic!("{e}"));
}

/// The same with a rule taken out.
pub fn run_without(
    bug: Option<Bug>,
    seed: u64,
    formatted: &'static Formatted,
    faults: bool,
    hosts: u16,
    work: impl FnOnce(&Cluster) + Send + 'static,
) -> Result<(), Failure> {
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let cluster = Cluster::start(formatted, hosts);
        if faults {
            cluster.unknown_swaps(seed, 30);
        }
        work(&cluster);
        cluster.finish();
    });
    finished.map(drop)
}

#[test]
fn operations_through_changing_hosts_are_those_of_one_filesystem() {
    for seed in seeds(0..12) {
        let (formatted, faults) = variant(seed);
        let hosts = 2 + (seed % 3) as u16;
        let done = Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(formatted, hosts);
            if faults {
                cluster.unknown_swaps(seed, 30);
            }
            let mut model = Model::new(seed, cluster.root());
            let mut rng = SimRng::new(seed, 9);
            // Some runs change the host at every operation, others seldom.
            let stay = [0.0, 0.5, 0.95][rng.index(3)];
            let mut host = 0;
            for i in 1..=400 {
                if !rng.chance(stay) {
                    host = rng.index(usize::from(hosts));
                }
                cluster.on(host, |fs| model.step(host, fs));
                if i % 100 == 0 {
                    for host in 0..usize::from(hosts) {
                        cluster.on(host, |fs| model.same_tree(host, fs));
                    }
                }
            }
            let open = rng.chance(0.5);
            if open {
                model.close_all(|host, close| cluster.on(host, close));
            }
            let mut cluster = cluster;
            cluster.lun.clear_faults();
            cluster.leave();
            cluster.at_rest();
            cluster.join(lunfs::rt::HostTag(9)).unwrap();
            cluster.on(0, |fs| model.same_tree(0, fs));
            cluster.finish();
            (model.done, model.no_space)
        });
        assert!(done.1 < done.0 / 20, "LUNFS_SIM_SEED={seed}: too often no space: {done:?}");
    }
}
