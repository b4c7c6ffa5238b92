//! Compare-and-writes that did not simply succeed: each cause produced for real, and what became of it.

use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule};
use lunfs::layout::geometry::lock_of_inode;
use lunfs::rt;
use lunfs::rt::sim::{self, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::{BLOCK_BYTES_U64, BlockNo, InodeNo};

use super::model::{LONG, volumes};

const MS: Duration = Duration::from_millis(1);

fn slot_of(cluster: &Cluster, host: usize) -> BlockNo {
    cluster.hosts[host].volume.heartbeat().record().address
}

/// The next compare-and-write of a host on a block.
fn plan(cluster: &Cluster, host: usize, at: BlockNo, fault: Fault) {
    let bytes = at.offset_bytes()..at.offset_bytes() + BLOCK_BYTES_U64;
    let rule = FaultRule::next_of(fault, cluster.hosts[host].tag, CommandKind::CompareAndWrite);
    cluster.lun.inject(FaultRule { bytes: Some(bytes), ..rule });
}

/// A directory that host 0 holds exclusively.
fn directory(cluster: &Cluster, name: &'static [u8]) -> InodeNo {
    let root = cluster.root();
    cluster.on(0, |fs| {
        let ino = fs.mkdir(&cx(), root, name, 0o755).unwrap().value.ino;
        fs.sync(&cx()).unwrap();
        ino
    })
}

/// Makes a file in the directory as another host: the lock has to move.
fn touch(cluster: &Cluster, host: usize, dir: InodeNo, name: &'static [u8]) {
    cluster.on(host, |fs| fs.mknod(&cx(), dir, name, 0o644, 0).map(drop)).unwrap();
}

#[test]
fn a_beat_answered_false_for_an_equal_block_ends_nobody() {
    let volume = &volumes()[0];
    Simulation::new(1).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 2);
        plan(&cluster, 0, slot_of(&cluster, 0), Fault::FalseMiscompare);
        rt::sleep(3000 * MS);
        assert_eq!(cluster.lun.fault_hits(), (1, 0));
        touch(&cluster, 0, cluster.root(), b"alive");
        cluster.finish();
    });
}

#[test]
fn a_hand_over_answered_false_for_an_equal_block_ends_nobody() {
    let volume = &volumes()[0];
    Simulation::new(2).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 2);
        let dir = directory(&cluster, b"d");
        plan(&cluster, 0, lock_of_inode(dir), Fault::FalseMiscompare);
        touch(&cluster, 1, dir, b"f");
        assert_eq!(cluster.lun.fault_hits(), (1, 0));
        cluster.finish();
    });
}

#[test]
fn a_host_that_left_was_not_declared_dead_when_another_took_its_slot_at_once() {
    let two_slots = Formatted::tiny(2);
    Simulation::new(3).max_time(LONG).run(move || {
        let mut cluster = Cluster::start(&two_slots, 2);
        plan(&cluster, 0, slot_of(&cluster, 0), Fault::LostAnswer);
        // The fault hits a beat or the leaving swap, whichever comes first: let it be the leaving one.
        let leaving = cluster.hosts.remove(0);
        let volume = leaving.volume.clone();
        let left = sim::spawn_on(leaving.tag, "leave", move || {
            (volume.leave().map_err(|e| e.to_string()), volume.door().lease().reason())
        });
        while cluster.join(rt::HostTag(2)).is_err() {
            rt::sleep(20 * MS);
        }
        assert_eq!(joined(left), (Ok(()), Some("left the volume".to_owned())));
        assert_eq!(cluster.lun.fault_hits(), (1, 0));
        cluster.finish();
    });
}

#[test]
fn no_ring_is_lost_when_clearing_the_doorbell_meets_its_own_image_late() {
    for seed in seeds(0..10) {
        let volume = &volumes()[0];
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 3);
            let (a, b) = (directory(&cluster, b"a"), directory(&cluster, b"b"));
            // Nobody was asked for a while.
            rt::sleep((2000 + 100 * seed as u32) * MS);
            let bell = cluster.superblock.geometry.doorbell(cluster.hosts[0].volume.heartbeat().me().slot);
            plan(&cluster, 0, bell, Fault::RetriedBelow(400 * MS));
            let first = cluster.spawn(1, "first", move |fs| {
                let begun = rt::Instant::now();
                fs.mknod(&cx(), a, b"f", 0o644, 0).map(drop).unwrap();
                begun.elapsed()
            });
            rt::sleep(150 * MS);
            touch(&cluster, 2, b, b"f");
            let took = joined(first);
            assert!(took < 700 * MS, "the first ring was lost: {took:?}");
            assert_eq!(cluster.lun.fault_hits(), (1, 0));
            cluster.finish();
        });
    }
}
