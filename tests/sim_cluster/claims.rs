//! Claiming a slot where none is free: after a power failure of all machines, in the place of one that never comes back,
//! and where nobody should wait in vain.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule, Keep, SimLunOptions};
use lunfs::durations::{dead_after, quarantine_after};
use lunfs::fs::api::{FsError, Operations};
use lunfs::heartbeat::ClaimError;
use lunfs::journal::Ring;
use lunfs::layout::journal::JournalHeader;
use lunfs::layout::slot::SlotState;
use lunfs::rt::sim::{self, SimRng, Simulation, seeds};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::{Incarnation, InodeNo};
use lunfs::volume::{FencingMode, MountError};

use super::model::LONG;
use super::recovery::settled;

const MS: Duration = Duration::from_millis(1);

/// A volume with a slot for each of its hosts and no more.
fn full(seed: u64, slots: u16, fencing: bool) -> Formatted {
    let logical_block_bytes = [512, 4096][(seed % 2) as usize];
    let volatile_cache = seed & 2 == 0;
    let lun = SimLunOptions { logical_block_bytes, volatile_cache, fencing, ..SimLunOptions::default() };
    Formatted::hasty_on(slots, lun)
}

/// Makes files until the host ends; notes how many are durable.
fn busy(cluster: &Cluster, host: usize) -> (InodeNo, Arc<Mutex<u32>>) {
    let name = format!("of-{}", cluster.hosts[host].tag.0);
    let dir = cluster.directory(host, name.as_bytes());
    let durable = Arc::new(Mutex::new(0));
    let noted = durable.clone();
    drop(cluster.spawn(host, "worker", move |fs| {
        for n in 0..120 {
            let made = fs.mknod(&cx(), dir, format!("f{n}").as_bytes(), libc::S_IFREG | 0o644, 0);
            if made.map(drop).is_err() {
                return;
            }
            if n % 3 == 2 {
                if fs.sync(&cx()).is_err() {
                    return;
                }
                *noted.lock().unwrap() = n + 1;
            }
        }
    }));
    (dir, durable)
}

fn all_there(fs: &dyn Operations, dir: InodeNo, durable: u32) {
    for n in 0..durable {
        let found = fs.lookup(&cx(), dir, format!("f{n}").as_bytes());
        found.map(drop).unwrap_or_else(|e| panic!("file {n} of {durable} durable ones: {e}"));
    }
}

/// Kills all hosts of the cluster; returns their tags.
fn everybody_dies(cluster: &mut Cluster) -> Vec<HostTag> {
    let mut tags: Vec<HostTag> = (0..cluster.hosts.len()).map(|_| cluster.kill(0)).collect();
    tags.sort();
    tags
}

#[test]
fn after_a_power_failure_of_all_machines_each_takes_its_slot_back() {
    for seed in seeds(0..24) {
        let fencing = seed % 3 == 0;
        let volume = full(seed, 3, fencing);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut rng = SimRng::new(seed, 1);
            let mut cluster = Cluster::start(&volume, 3);
            let work: Vec<_> = (0..3).map(|host| busy(&cluster, host)).collect();
            rt::sleep(Duration::from_micros(rng.below(900_000)));
            let tags = everybody_dies(&mut cluster);
            if rng.chance(0.5) {
                cluster.lun.power_cut(Keep::Random);
            }
            rt::sleep(rng.below(20_000) as u32 * MS);
            let begun = sim::now().unwrap();
            cluster.switch_on(&tags, FencingMode::Auto).unwrap();
            let took = sim::now().unwrap() - begun;
            let dead = dead_after(&cluster.slots()[0].durations);
            assert!(took < dead + 3000 * MS, "mounting took {took:?}; the dead time is {dead:?}");
            for (dir, durable) in work {
                let durable = *durable.lock().unwrap();
                cluster.on(0, |fs| all_there(fs, dir, durable));
            }
            let lives: Vec<Incarnation> = cluster.slots().iter().map(|s| s.incarnation).collect();
            assert_eq!(lives, [Incarnation(2); 3], "each slot was claimed once more");
            cluster.finish();
        });
    }
}

#[test]
fn a_new_machine_takes_a_dead_ones_slot_after_the_quarantine() {
    for seed in seeds(0..12) {
        let volume = full(seed, 1, seed % 3 == 0);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 1);
            let (dir, durable) = busy(&cluster, 0);
            rt::sleep(Duration::from_micros(SimRng::new(seed, 1).below(900_000)));
            everybody_dies(&mut cluster);
            let quarantine = quarantine_after(&cluster.slots()[0].durations);
            let begun = sim::now().unwrap();
            cluster.switch_on(&[HostTag(7)], FencingMode::Auto).unwrap();
            let took = sim::now().unwrap() - begun;
            assert!(took >= quarantine && took < quarantine + 3000 * MS, "{took:?}, {quarantine:?}");
            let durable = *durable.lock().unwrap();
            cluster.on(0, |fs| all_there(fs, dir, durable));
            cluster.finish();
        });
    }
}

#[test]
fn a_recovered_slot_is_anybodys_at_once_only_where_its_writer_was_fenced() {
    for seed in seeds(0..8) {
        let fencing = seed % 2 == 0;
        let volume = full(seed, 2, fencing);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 2);
            busy(&cluster, 0);
            rt::sleep(300 * MS);
            cluster.kill(0);
            settled(&cluster);
            let recovered = cluster.slots();
            let recovered = recovered.iter().find(|s| s.state == SlotState::Recovered).unwrap();
            assert_eq!(recovered.is_fenced(), fencing);
            let begun = sim::now().unwrap();
            cluster.switch_on(&[HostTag(7)], FencingMode::Auto).unwrap();
            let took = sim::now().unwrap() - begun;
            let quarantine = quarantine_after(&recovered.durations);
            let fits = if fencing { took < 2000 * MS } else { took >= quarantine };
            assert!(fits, "{took:?} with fencing {fencing}, the quarantine is {quarantine:?}");
            cluster.finish();
        });
    }
}

#[test]
fn where_all_slots_beat_a_mount_is_told_so_soon() {
    for seed in seeds(0..6) {
        let volume = full(seed, 3, false);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 3);
            let begun = sim::now().unwrap();
            let refused = cluster.switch_on(&[HostTag(7)], FencingMode::Auto);
            let took = sim::now().unwrap() - begun;
            assert!(
                matches!(refused, Err(MountError::Claim(ClaimError::AllTaken { slots: 3 }))),
                "{refused:?}"
            );
            assert!(took < 2000 * MS, "{took:?}");
            cluster.finish();
        });
    }
}

#[test]
fn a_host_that_lives_keeps_its_slot_whoever_waits_for_one() {
    // The one that is waited for beats seldom, for its LUN is slow to answer; it never loses its slot.
    for seed in seeds(0..8) {
        let volume = full(seed, 2, false);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 2);
            cluster.kill(1);
            let begun = sim::now().unwrap();
            // Two want the one slot; the other stays where it is.
            let first = cluster.switch_on(&[HostTag(7)], FencingMode::Auto);
            first.unwrap();
            assert!(sim::now().unwrap() - begun >= quarantine_after(&cluster.slots()[0].durations));
            cluster.on(0, |fs| fs.readdir(&cx(), fs.root(), 0, 4096, false).map(drop)).unwrap();
            assert!(cluster.switch_on(&[HostTag(8)], FencingMode::Auto).is_err());
            cluster.finish();
        });
    }
}

#[test]
fn claimers_that_die_while_they_recover_what_they_took_over() {
    // The slot's ring is that of a life several before the one that is recovered at last.
    for seed in seeds(0..40) {
        let fencing = seed % 3 == 0;
        let volume = full(seed, 2, fencing);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut rng = SimRng::new(seed, 3);
            let mut cluster = Cluster::start(&volume, 2);
            let work: Vec<_> = (0..2).map(|host| busy(&cluster, host)).collect();
            rt::sleep(Duration::from_micros(rng.below(900_000)));
            let tags = everybody_dies(&mut cluster);
            let dead = dead_after(&cluster.slots()[0].durations);
            for _ in 0..1 + rng.below(3) {
                let mounting = cluster.switching_on(&tags, FencingMode::Auto);
                // Somewhere in the second after the dead time is over they claim, replay and begin.
                rt::sleep(dead + Duration::from_micros(rng.below(1_000_000)));
                for tag in &tags {
                    sim::kill_host(*tag);
                }
                mounting.into_iter().for_each(std::mem::forget);
                if rng.chance(0.3) {
                    cluster.lun.power_cut(Keep::Random);
                }
            }
            cluster.switch_on(&tags, FencingMode::Auto).unwrap();
            settled(&cluster);
            for (dir, durable) in work {
                let durable = *durable.lock().unwrap();
                cluster.on(0, |fs| all_there(fs, dir, durable));
                cluster.on(1, |fs| all_there(fs, dir, durable));
            }
            cluster.finish();
        });
    }
}

#[test]
fn a_slot_whose_journal_is_damaged_is_given_up_for_another() {
    for seed in seeds(0..4) {
        let volume = full(seed, 2, false);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 1);
            let (dir, _) = busy(&cluster, 0);
            rt::sleep(400 * MS);
            let slot = cluster.hosts[0].volume.heartbeat().me().slot;
            let tags = everybody_dies(&mut cluster);
            let (geometry, volume) = (cluster.superblock.geometry, cluster.superblock.volume);
            let ring = Ring::of(&geometry, slot);
            let header = cluster.block(ring.header);
            let header = JournalHeader::decode(&header, volume, ring.header, ring.blocks).unwrap();
            cluster.lun.overwrite(ring.at(header.tail_position).offset_bytes(), &[0x5a; 4096]);
            // The same boot: its own slot is taken back at once, and can't be recovered.
            cluster.join(tags[0]).unwrap();
            assert_ne!(cluster.hosts[0].volume.heartbeat().me().slot, slot);
            let record = cluster.slots().swap_remove(usize::from(slot.0));
            assert_eq!(record.state, SlotState::Unrecoverable);
            let error = cluster.on(0, |fs| fs.lookup(&cx(), dir, b"f0").map(drop)).unwrap_err();
            assert!(matches!(error, FsError::Io(_)), "{error}");
            cluster.leave();
        });
    }
}

#[test]
fn a_host_that_stands_still_for_less_than_its_lease_keeps_its_slot() {
    // Two machines with one name and uuid, as copies of a virtual machine have: the second must not take the first
    // for its own dead self.
    for seed in seeds(0..12) {
        let volume = full(seed, 1, false);
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(&volume, 1);
            let copy = HostTag(256); // The uuid of host 0.
            let standing = Duration::from_micros(900_000 + SimRng::new(seed, 4).below(700_000));
            rt::sleep(Duration::from_micros(SimRng::new(seed, 5).below(400_000)));
            sim::freeze_host(HostTag(0));
            let mounting = cluster.switching_on(&[copy], FencingMode::Auto).remove(0);
            rt::sleep(standing);
            sim::thaw_host(HostTag(0));
            let refused = joined(mounting).map(drop).unwrap_err();
            assert!(matches!(refused, MountError::Claim(ClaimError::SameHost { .. })), "{refused}");
            cluster.on(0, |fs| fs.mkdir(&cx(), fs.root(), b"d", 0o755).map(drop)).unwrap();
            cluster.finish();
        });
    }
}

#[test]
fn a_device_that_refuses_for_a_moment_refuses_no_mount() {
    // A unit attention or BUSY meets the very first swap, before there is a lease.
    for seed in seeds(0..6) {
        let volume = full(seed, 2, false);
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 1);
            let rule = FaultRule::next_of(Fault::Refused, HostTag(7), CommandKind::CompareAndWrite);
            cluster.lun.inject(FaultRule { count: 1 + seed as u32 % 3, ..rule });
            cluster.join(HostTag(7)).unwrap();
            cluster.finish();
        });
    }
}

#[test]
fn a_device_that_never_answers_truly_ends_a_mount() {
    for fault in [Fault::FalseMiscompare, Fault::NeverExecuted, Fault::Refused] {
        let volume = full(0, 2, false);
        Simulation::new(1).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(&volume, 1);
            let rule = FaultRule::next_of(fault, HostTag(7), CommandKind::CompareAndWrite);
            cluster.lun.inject(FaultRule { count: u32::MAX, ..rule });
            let begun = sim::now().unwrap();
            let refused = cluster.join(HostTag(7)).unwrap_err();
            let took = sim::now().unwrap() - begun;
            assert!(matches!(refused, MountError::Claim(ClaimError::Ats(_))), "{refused}");
            assert!(took < Duration::from_secs(45), "{fault:?}: {took:?}");
            cluster.finish();
        });
    }
}
