//! Writes that a device holds up until their host is taken for dead: another host has taken over and written by then, and
//! nothing of the late one may land on that.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::devices::{ALL, Scene, clusters, scene};
use super::harness::status_of;
use crate::faults::{Action, FOR_EVER, Faults, SHARED_LOCK, WRITE};

/// The bytes that a change locks, beyond all data, before it looks whether its host is fenced (`device::file`).
const GATES: Range<u64> = (1 << 62) + 4096..(1 << 62) + 4096 + 256;

/// A file that `h0` holds, and a write of it that a rule of `faults` holds up on its way.
fn late_write(scene: &mut Scene, inject: impl FnOnce(&Faults)) -> JoinHandle<std::io::Result<()>> {
    let path = scene.cluster.dir(0).join("file");
    let file = File::options().write(true).create(true).truncate(true).open(path).expect("open");
    file.write_all_at(&[1; 64 << 10], 0).expect("write");
    file.sync_all().expect("fsync");
    std::thread::sleep(Duration::from_millis(300));
    inject(&scene.faults);
    let late = std::thread::spawn(move || file.write_all_at(&[2; 64 << 10], 0));
    // Long enough for the write to come there, beside others that are held up, too.
    std::thread::sleep(Duration::from_millis(500));
    assert!(scene.faults.hits(0) > 0);
    late
}

/// The other host takes over and writes the same bytes.
fn taken_over(scene: &Scene) {
    let since = Instant::now();
    let other = File::options().write(true).open(scene.cluster.dir(1).join("file")).expect("open");
    other.write_all_at(&[3; 64 << 10], 0).expect("write");
    other.sync_all().expect("fsync");
    println!("taken over {:?} after the write was issued", since.elapsed());
}

/// What the write of the fenced host did: nothing.
fn demand_refused(mut scene: Scene, late: JoinHandle<std::io::Result<()>>, status: Option<i32>) {
    late.join().expect("the writer").expect_err("its host has lost the volume");
    assert_eq!(status_of(scene.child.id() as i32), status, "{}", scene.cluster.log("h0"));
    scene.cluster.take_off(0);
    scene.cluster.mount_as("h0", "rw");
    for host in 0..2 {
        let bytes = fs::read(scene.cluster.dir(host).join("file")).expect("read");
        assert!(bytes == [3; 64 << 10], "host {host}: a write of the fenced host landed");
    }
    scene.cluster.end_clean();
}

/// A write is held up after its host's lease was found good, before it looks whether its host is fenced, while another
/// host takes over and writes; then it goes on. Only the fence stands between it and the other host's bytes.
#[test]
fn a_late_write_of_a_fenced_host_is_refused() {
    let Some(mut scene) = scene() else { return };
    let late = late_write(&mut scene, |faults| faults.inject(0, Action::Hang, SHARED_LOCK, GATES, FOR_EVER));
    taken_over(&scene);
    assert!(scene.cluster.hosts[0].is_alive());
    scene.faults.clear();
    demand_refused(scene, late, Some(75));
}

/// One that is held up behind that look ends with its process: who fences kills it.
#[test]
fn a_write_inside_the_gate_ends_with_its_process() {
    let Some(mut scene) = scene() else { return };
    let range = clusters(&scene.superblock);
    let late = late_write(&mut scene, |faults| faults.inject(0, Action::Hang, WRITE, range, FOR_EVER));
    scene.cluster.hosts[0].signal(Signal::SIGSTOP);
    taken_over(&scene);
    assert!(!scene.cluster.hosts[0].is_alive(), "it could still write");
    scene.faults.clear();
    demand_refused(scene, late, None);
}

/// A host that is held up in the middle of a beat holds the range lock of its slot's block, by which this backend makes
/// swaps atomic. The mark of its recoverer is a swap of the same block and can't be made: so it is fenced first.
#[test]
fn a_host_that_hangs_inside_its_beat() {
    let Some(mut scene) = scene() else { return };
    let late = late_write(&mut scene, |faults| faults.inject(0, Action::Hang, WRITE, ALL, FOR_EVER));
    taken_over(&scene);
    scene.faults.clear();
    demand_refused(scene, late, None);
}
