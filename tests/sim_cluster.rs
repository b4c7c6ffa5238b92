//! Hosts on one simulated LUN, every command judged, every interleaving from one seed.
//!
//! A failure prints its seed: `LUNFS_SIM_SEED=7 cargo test --test sim_cluster name_of_test`. More seeds:
//! `tests/simulate --seeds 0..200`.

#[path = "sim_cluster/chaos.rs"]
mod chaos;
#[path = "sim_cluster/claims.rs"]
mod claims;
#[path = "sim_cluster/counts.rs"]
mod counts;
#[path = "sim_cluster/crash.rs"]
mod crash;
#[path = "sim_cluster/fencing.rs"]
mod fencing;
#[path = "sim_cluster/history.rs"]
mod history;
#[path = "sim_cluster/kernel.rs"]
mod kernel;
#[path = "sim_cluster/late_writes.rs"]
mod late_writes;
#[path = "sim_cluster/long_work.rs"]
mod long_work;
#[path = "sim_cluster/miscompare.rs"]
mod miscompare;
#[path = "sim_cluster/model.rs"]
mod model;
#[path = "sim_cluster/names.rs"]
mod names;
#[path = "sim_cluster/planted.rs"]
mod planted;
#[path = "sim_cluster/points.rs"]
mod points;
#[path = "sim_cluster/power.rs"]
mod power;
#[path = "sim_cluster/recovery.rs"]
mod recovery;
#[path = "sim_cluster/registers.rs"]
mod registers;
#[path = "sim_cluster/revokes.rs"]
mod revokes;
#[path = "sim_cluster/rules.rs"]
mod rules;
#[path = "sim_cluster/scenes.rs"]
mod scenes;
#[path = "sim_cluster/scrub.rs"]
mod scrub;
#[path = "sim_cluster/space.rs"]
mod space;
#[path = "sim_cluster/together.rs"]
mod together;
#[path = "sim_cluster/tools.rs"]
mod tools;
#[path = "sim_cluster/winners.rs"]
mod winners;
#[path = "sim_cluster/withdrawal.rs"]
mod withdrawal;
