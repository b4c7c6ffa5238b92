//! A guest that is paused together with its clocks, as hypervisors do for snapshots and migrations (QEMU's `stop`): when it goes
//! on it believes that no time has passed, so nothing but its next beat, or the target, can tell it that it is dead.
//!
//! QEMU lets commands that are on their way end before it stands still; so unlike a frozen guest's, all late commands
//! are ones that LunFS sent after the pause.

use std::time::{Duration, Instant};

use crate::machine::PATIENCE;
use crate::pair::Pair;
use crate::volume::{ENDED_IN_TIME, REQUIRED, mkfs, mount, with_volume};

/// How long a host that was paused may go on: until its next beat is due and one that was issued is answered.
const WINDOW: Duration = Duration::from_secs(6);

/// A guest is paused while it writes, the other takes over, and it goes on. What it changed after that, as microseconds of the
/// target's clock.
fn pause_until_taken_over(pair: &Pair, daemon: crate::machine::Running) -> Vec<u64> {
    let [paused, other] = &pair.guests[..] else { panic!("two guests") };
    let load = paused.start_command("agent load overwrite /mnt 1");
    load.wait_for("began", PATIENCE);
    paused.pause();
    let stopped = Instant::now();
    other.run("agent load once /mnt 2");
    eprintln!("paused: taken over after {:.1} s", stopped.elapsed().as_secs_f64());
    let taken = pair.target.trace_last();
    paused.unpause();
    let ended = daemon.end(PATIENCE);
    let status = ended.status.unwrap_or(-1);
    let late: Vec<u64> = pair.changes_of(0, taken).iter().map(|entry| entry.at_us).collect();
    let span = late.last().zip(late.first()).map_or(0, |(last, first)| last - first);
    eprintln!(
        "paused: status {status}, {} late changes in {} ms, {} commands refused",
        late.len(),
        span / 1000,
        pair.refused(0, taken).len()
    );
    assert!(ENDED_IN_TIME.contains(&status), "{ended:#?}");
    let load = load.end(PATIENCE);
    assert_ne!(load.status, Some(0), "{load:#?}");
    let shown = paused.try_run("cat /mnt/file");
    assert_ne!(shown.status, Some(0), "a dead mount serves nothing: {shown:#?}");
    late
}

/// With reservations the target refuses everything.
#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_survives_a_paused_guest_with_reservations() {
    with_volume(REQUIRED, |pair, daemons| {
        let late = pause_until_taken_over(pair, daemons.remove(0));
        assert!(late.is_empty(), "{late:?}");
        let [paused, other] = &pair.guests[..] else { panic!("two guests") };
        other.run("agent load is /mnt 2");
        paused.run("umount -l /mnt");
        daemons.insert(0, mount(paused, REQUIRED));
        paused.run("agent load is /mnt 2 && agent load once /mnt 3");
        other.run("agent load is /mnt 3 && rm /mnt/file");
    });
}

/// Without them there is a window, and this is how long it is: what the paused guest writes in it can overwrite what the
/// other wrote, which `docs/recovery.md` says.
#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn a_paused_guest_without_reservations_has_a_window() {
    let Some(pair) = Pair::boot() else { return };
    mkfs(&pair, "");
    let mut daemons: Vec<_> = pair.guests.iter().map(|guest| mount(guest, "")).collect();
    let late = pause_until_taken_over(&pair, daemons.remove(0));
    let span = late.last().zip(late.first()).map_or(0, |(last, first)| last - first);
    assert!(Duration::from_micros(span) < WINDOW, "{late:?}");
    // The other goes on as if nothing was.
    pair.guests[1].run("agent load once /mnt 3 && agent load is /mnt 3");
}
