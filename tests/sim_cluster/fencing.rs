//! Hosts that are shut out of the device before they are recovered, and what happens where that can't be.

use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule, SimLunOptions};
use lunfs::fs::api::Operations;
use lunfs::rt;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, freeze_host, seeds, thaw_host};
use lunfs::testing::cluster::{Cluster, Formatted, cx};
use lunfs::types::InodeNo;

use super::model::LONG;

pub fn volume(fencing: bool) -> Formatted {
    Formatted::tiny_on(4, SimLunOptions { fencing, ..SimLunOptions::default() })
}

fn write(fs: &dyn Operations, ino: InodeNo, byte: u8) {
    fs.write(&cx(), ino, None, 0, &[byte; 8192], false).map(drop).unwrap();
    fs.fsync(&cx(), ino, false).map(drop).unwrap();
}

/// A write of a host that dies sits in the fabric for longer than the device says it can. Another host recovers
/// the dead one, writes the same bytes and has them durable; then the late write arrives.
pub fn a_device_that_lies(seed: u64, fencing: bool, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = volume(fencing);
    Simulation::new(seed)
        .max_time(LONG)
        .planted(bug)
        .try_run(move || {
            let mut cluster = Cluster::start(&volume, 2);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| {
                let ino = fs.mknod(&cx(), root, b"file", 0o644, 0).unwrap().value.ino;
                write(fs, ino, 1);
                fs.sync(&cx()).unwrap();
                ino
            });
            let tag = cluster.hosts[0].tag;
            let late = Fault::Late(Duration::from_secs(90));
            cluster.lun.inject(FaultRule::next_of(late, tag, CommandKind::Write));
            drop(cluster.spawn(0, "writer", move |fs| write(&*fs, ino, 2)));
            rt::sleep(Duration::from_millis(SimRng::new(seed, 72).between(1, 900)));
            cluster.kill(0);
            cluster.on(0, |fs| write(fs, ino, 3));
            rt::sleep(Duration::from_secs(120));
            cluster.on(0, |fs| {
                let bytes = fs.read(&cx(), ino, None, 0, 8192).unwrap().value.to_vec();
                assert!(bytes.iter().all(|b| *b == 3), "a late write of the dead host landed");
            });
            cluster.finish();
        })
        .map(drop)
}

#[test]
fn a_late_write_of_a_fenced_host_is_refused() {
    for seed in seeds(0..8) {
        if let Err(failure) = a_device_that_lies(seed, true, None) {
            panic!("seed {seed}: {}", failure.message);
        }
    }
}

/// The window that the docs name: without a fence nothing stops it. Were this not so, the test above would
/// prove nothing.
#[test]
fn without_a_fence_a_write_that_is_held_too_long_gets_through() {
    // Of a host that is killed a command on its way lands, or not.
    let harm: Vec<_> = seeds(0..8).filter_map(|seed| a_device_that_lies(seed, false, None).err()).collect();
    assert!(!harm.is_empty(), "nobody stopped it, yet it did no harm");
    let late = |f: &Failure| f.message.contains("check 2") || f.message.contains("late write");
    assert!(harm.iter().all(late), "{}", harm[0].message);
}

/// Frozen for longer than its dead time with a write on its way that is held up below it, it wakes up, is refused, and
/// stops for good; the write arrives after that, and is refused, too.
#[test]
fn a_host_that_wakes_up_fenced_says_so_and_stops() {
    for seed in seeds(0..8) {
        let volume = volume(true);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 2);
            cluster.may_end(0);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| {
                let ino = fs.mknod(&cx(), root, b"file", 0o644, 0).unwrap().value.ino;
                write(fs, ino, 1);
                ino
            });
            let writer = cluster.spawn(0, "writer", move |fs| {
                while fs.write(&cx(), ino, None, 0, &[2; 8192], false).is_ok() {
                    rt::sleep(Duration::from_micros(300));
                }
            });
            rt::sleep(Duration::from_millis(SimRng::new(seed, 73).between(1, 900)));
            let tag = cluster.hosts[0].tag;
            let late = Fault::Late(Duration::from_secs(60));
            cluster.lun.inject(FaultRule::next_of(late, tag, CommandKind::Write));
            rt::sleep(Duration::from_millis(2));
            freeze_host(tag);
            cluster.on(1, |fs| write(fs, ino, 3));
            thaw_host(tag);
            writer.join().unwrap();
            rt::sleep(Duration::from_secs(90));
            assert!(cluster.hosts[0].volume.door().lease().reason().is_some());
            cluster.on(1, |fs| {
                let bytes = fs.read(&cx(), ino, None, 0, 8192).unwrap().value.to_vec();
                assert!(bytes.iter().all(|b| *b == 3), "the host that woke up wrote");
                write(fs, ino, 4);
            });
            // Its next life registers anew and works.
            drop(cluster.hosts.remove(0));
            cluster.join(tag).unwrap();
            cluster.on(1, |fs| write(fs, ino, 5));
            cluster.finish();
        });
    }
}
