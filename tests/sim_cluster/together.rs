//! Several hosts at once.

use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule};
use lunfs::fs::api::{FsError, SetAttributes};
use lunfs::layout::demand::RequestBlock;
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::lock::LockMode;
use lunfs::rt;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, cx, joined};
use lunfs::types::{SlotSet, Tenure};

use super::model::{LONG, run, variant, volumes};
use super::planted::swap_lock;

const MS: Duration = Duration::from_millis(1);

#[test]
fn a_hand_over_that_landed_unseen_is_not_taken_for_theft() {
    // The swap by which host 0 gives host 1 a share lands and its answer is lost or false; before host 0 looks,
    // host 1 has passed its share on to host 2. Nobody took anything from host 0.
    for seed in seeds(0..8) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).run(move || {
            let cluster = Cluster::start(volume, 3);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| fs.mknod(&cx(), root, b"f", 0o644, 0).unwrap().value.ino);
            cluster.on(0, |fs| fs.write(&cx(), ino, None, 0, b"one", false).map(drop)).unwrap();
            let fault = if seed % 2 == 0 { Fault::LostAnswer } else { Fault::RetriedBelow(1000 * MS) };
            let at = lock_of_inode(ino).offset_bytes();
            let kind = CommandKind::CompareAndWrite;
            let rule = FaultRule::next_of(fault, cluster.hosts[0].tag, kind);
            cluster.lun.inject(FaultRule { bytes: Some(at..at + 512), ..rule });
            let reader = cluster
                .spawn(1, "reader", move |fs| fs.read(&cx(), ino, None, 0, 10).map(|a| a.value.to_vec()));
            assert_eq!(joined(reader).unwrap(), b"one");
            let writer =
                cluster.spawn(2, "writer", move |fs| fs.write(&cx(), ino, None, 0, b"two", false).map(drop));
            joined(writer).unwrap();
            rt::sleep(100 * MS);
            let reader = cluster
                .spawn(0, "reader", move |fs| fs.read(&cx(), ino, None, 0, 10).map(|a| a.value.to_vec()));
            assert_eq!(joined(reader).unwrap(), b"two");
            cluster.finish();
        });
    }
}

#[test]
fn a_grant_that_nobody_waits_for_is_passed_on() {
    // A sharer asked for its share by a request that was served meanwhile makes the other sharer the exclusive
    // owner, who does not know it. The owner, asked for a share, must look at the block instead of its memory.
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 3);
            let root = cluster.root();
            for host in 0..2 {
                cluster.on(host, |fs| fs.getattr(&cx(), root).map(drop)).unwrap();
            }
            let other = cluster.hosts[1].volume.heartbeat().me();
            swap_lock(&cluster, 0, lock_of_inode(root), |r| {
                assert_eq!(r.mode, LockMode::Shared);
                r.mode = LockMode::Exclusive { owner: other, tenure: Tenure(r.swap_counter) };
                r.sharers = SlotSet::EMPTY;
            });
            let reader = cluster.spawn(2, "reader", move |fs| fs.getattr(&cx(), root).map(drop));
            joined(reader).unwrap();
            cluster.finish();
        });
    }
}

/// What stands in a request block is believed: while `next` asks, nobody jumps the queue, and if the one before it died,
/// everybody would wait for a host that wants nothing.
#[test]
fn no_wish_outlives_its_wait() {
    for seed in seeds(0..12) {
        let (formatted, faults) = variant(seed);
        run(seed, formatted, faults, 3, move |cluster| {
            let root = cluster.root();
            let workers: Vec<_> = (0..9)
                .map(|number: usize| {
                    cluster.spawn(number % 3, "worker", move |fs| {
                        let mut rng = SimRng::new(seed, number as u64 + 95);
                        for n in 0..20 {
                            let name = format!("{number}-{n}");
                            let done = match rng.below(3) {
                                0 => {
                                    fs.mknod(&cx(), root, name.as_bytes(), libc::S_IFREG | 0o644, 0).map(drop)
                                }
                                1 => fs.getattr(&cx(), root).map(drop),
                                _ => fs.lookup(&cx(), root, b"none").map(drop),
                            };
                            assert!(!matches!(done, Err(FsError::Io(_))), "{done:?}");
                            rt::sleep(Duration::from_micros(rng.below(4000)));
                        }
                    })
                })
                .collect();
            workers.into_iter().for_each(joined);
            // Ended wishes go within a second.
            rt::sleep(3000 * MS);
            let g = cluster.superblock.geometry;
            for slot in g.all_slots() {
                let at = g.request(slot);
                let block = RequestBlock::decode(&cluster.block(at), cluster.superblock.volume, at).unwrap();
                assert!(block.requests.is_empty(), "{slot:?} still wants {:?}", block.requests);
            }
        });
    }
}

/// A host asks for a lock, dies, comes back as a new life and shares that lock; only then the wish of its earlier life is
/// answered. That one is settled, so whoever wants the lock next takes it without asking anybody: the share of the new life
/// must not be forgotten in between.
pub fn wish_of_an_earlier_life(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = &volumes()[(seed % 4) as usize];
    let finished = Simulation::new(seed).max_time(LONG).planted(bug).try_run(move || {
        let mut cluster = Cluster::start(volume, 3);
        let root = cluster.root();
        let ino = cluster.on(0, |fs| {
            let ino = fs.mknod(&cx(), root, b"file", libc::S_IFREG | 0o600, 0).unwrap().value.ino;
            fs.sync(&cx()).unwrap();
            ino
        });
        let shares = |cluster: &Cluster, host: usize| {
            cluster.on(host, move |fs| {
                // Often enough that nobody keeps it exclusively for want of others.
                for _ in 0..3 {
                    fs.getattr(&cx(), ino).map(drop).unwrap();
                }
            });
        };
        for host in [1, 0, 1, 0] {
            shares(&cluster, host);
        }
        // While an answer is on its way the lock does not leave this host.
        let busy = cluster.spawn(1, "busy", move |fs| {
            let answer = fs.getattr(&cx(), ino).unwrap();
            rt::sleep(Duration::from_millis(1500));
            drop(answer);
        });
        drop(cluster.spawn(0, "asks", move |fs| {
            let set = SetAttributes { mode: Some(0o640), ..SetAttributes::default() };
            let _ = fs.setattr(&cx(), ino, &set);
        }));
        rt::sleep(Duration::from_millis(100 + seed * 7));
        let tag = cluster.kill(0);
        cluster.join(tag).unwrap();
        // The new life, last of the hosts now.
        let back = cluster.hosts.len() - 1;
        shares(&cluster, back);
        joined(busy);
        rt::sleep(Duration::from_millis(300));
        let set = SetAttributes { mode: Some(0o604), ..SetAttributes::default() };
        cluster.on(1, |fs| fs.setattr(&cx(), ino, &set).map(drop)).unwrap();
        let seen = cluster.on(back, |fs| fs.getattr(&cx(), ino).unwrap().value.mode & 0o777);
        assert_eq!(seen, 0o604, "an answer from before the change");
        cluster.finish();
    });
    finished.map(drop)
}

#[test]
fn a_wish_of_an_earlier_life_is_not_granted_over_the_share_of_the_next_one() {
    for seed in seeds(0..12) {
        wish_of_an_earlier_life(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}
