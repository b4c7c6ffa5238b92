//! Two QEMU guests whose kernels share one LUN through their SCSI stacks.
//!
//! Needs QEMU and a Debian kernel package; says SKIPPED where they are missing. `tests/guests/run` fetches both. By default
//! one scenario runs, [`fast`]; the others are minutes (`tests/guests/run all`).
//!
//! * `machine`: a guest and commands in it; `monitor`: what QEMU is told; `pair`: guests and their LUN
//! * `kernels`: what LunFS builds on, without LunFS; `volume`: LunFS on it; `paused`: one that loses time
//! * `lio`: the Linux kernel's target; `initiator`: its initiator

#[path = "guests/initiator.rs"]
mod initiator;
#[path = "guests/kernels.rs"]
mod kernels;
#[path = "guests/lio.rs"]
mod lio;
#[path = "guests/machine.rs"]
mod machine;
#[path = "guests/monitor.rs"]
mod monitor;
#[path = "guests/pair.rs"]
mod pair;
#[path = "guests/paused.rs"]
mod paused;
#[path = "guests/volume.rs"]
mod volume;

/// A little of everything, in one boot.
#[test]
fn fast() {
    let Some(mut pair) = pair::Pair::boot() else { return };
    kernels::swaps_are_exact(&pair, 1000);
    kernels::direct_reads_see_direct_writes(&pair, 6);
    kernels::a_frozen_guest_is_fenced(&pair);
    volume::brief(&mut pair);
}
