//! Compare-and-writes that did not simply succeed: each cause produced for real, and what became of it.

use std::sync::Arc;
use std::time::Duration;

use lunfs::ats::{Ats, AtsError, BlockKind, Cause, CauseCounts, Image, STALE_AFTER, Swapped};
use lunfs::device::sim::{CommandKind, Fault, FaultRule, Partition};
use lunfs::layout::RECORD_BYTES;
use lunfs::layout::demand::DoorbellRecord;
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::lock::LockMode;
use lunfs::layout::slot::{SlotRecord, SlotState};
use lunfs::lease::{Door, IoClass, Lease};
use lunfs::rt;
use lunfs::rt::sim::{self, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::{BLOCK_BYTES_U64, BlockNo, InodeNo, Owner, Tenure};
use lunfs::volume::CausesByKind;

use super::model::{LONG, volumes};
use super::planted::swap_lock;

const MS: Duration = Duration::from_millis(1);

fn slot_of(cluster: &Cluster, host: usize) -> BlockNo {
    cluster.hosts[host].volume.heartbeat().record().address
}

fn bell_of(cluster: &Cluster, host: usize) -> BlockNo {
    cluster.superblock.geometry.doorbell(cluster.hosts[host].volume.heartbeat().me().slot)
}

/// The next compare-and-write of a host on a block.
fn plan(cluster: &Cluster, host: usize, at: BlockNo, fault: Fault) {
    let bytes = at.offset_bytes()..at.offset_bytes() + BLOCK_BYTES_U64;
    let rule = FaultRule::next_of(fault, cluster.hosts[host].tag, CommandKind::CompareAndWrite);
    cluster.lun.inject(FaultRule { bytes: Some(bytes), ..rule });
}

/// Makes a file in the directory as another host: the lock has to move.
fn touch(cluster: &Cluster, host: usize, dir: InodeNo, name: &'static [u8]) {
    cluster.on(host, |fs| fs.mknod(&cx(), dir, name, 0o644, 0).map(drop)).unwrap();
}

/// What was counted on a host since `before`: kind of block, cause and how often.
fn counted(cluster: &Cluster, host: usize, before: &CausesByKind) -> Vec<(BlockKind, Cause, u64)> {
    differences(&causes(cluster, host), before)
}

fn causes(cluster: &Cluster, host: usize) -> CausesByKind {
    cluster.hosts[host].volume.stats().swaps.causes
}

fn differences(now: &CausesByKind, before: &CausesByKind) -> Vec<(BlockKind, Cause, u64)> {
    let kinds = [
        (BlockKind::Lock, &now.lock, &before.lock),
        (BlockKind::Heartbeat, &now.heartbeat, &before.heartbeat),
        (BlockKind::Doorbell, &now.doorbell, &before.doorbell),
    ];
    let all = kinds.into_iter().flat_map(|(kind, now, before)| {
        Cause::ALL.iter().map(move |cause| (kind, *cause, now.get(*cause) - before.get(*cause)))
    });
    all.filter(|(_, _, count)| *count > 0).collect()
}

/// Faults of one compare-and-write, and the cause that the host must find. The last is a device that is late
/// beyond its deadline, and lands between our look at the block and the next command.
const FAULTS: [(Fault, Option<Cause>); 10] = [
    (Fault::RetriedBelow(Duration::from_millis(50)), Some(Cause::OwnWriteLanded)),
    (Fault::AnsweredFalse, Some(Cause::OwnWriteLanded)),
    (Fault::FalseMiscompare, Some(Cause::FalseMiscompare)),
    (Fault::LostAnswer, Some(Cause::NoAnswerLanded)),
    (Fault::Aborted, Some(Cause::NoAnswerLanded)),
    (Fault::NeverExecuted, Some(Cause::NoAnswerNotLanded)),
    (Fault::Late(Duration::from_millis(2500)), Some(Cause::NoAnswerNotLanded)),
    (Fault::Refused, None),
    (Fault::Twice(Duration::from_millis(300)), None),
    (Fault::Late(Duration::from_millis(2003)), Some(Cause::NoAnswerLanded)),
];

#[test]
fn every_fault_of_a_beat_has_its_cause_and_ends_nobody() {
    for (fault, cause) in FAULTS {
        let volume = &volumes()[0];
        Simulation::new(1).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let before = causes(&cluster, 0);
            plan(&cluster, 0, slot_of(&cluster, 0), fault);
            rt::sleep(5000 * MS);
            assert_eq!(cluster.lun.fault_hits(), (1, 0), "{fault:?}");
            let expected: Vec<_> = cause.into_iter().map(|cause| (BlockKind::Heartbeat, cause, 1)).collect();
            assert_eq!(counted(&cluster, 0, &before), expected, "{fault:?}");
            let stats = cluster.hosts[0].volume.stats();
            assert_eq!(stats.swaps.refused, u64::from(fault == Fault::Refused));
            let lost = expected
                .iter()
                .any(|(_, cause, _)| matches!(cause, Cause::NoAnswerLanded | Cause::NoAnswerNotLanded));
            assert_eq!(stats.latency.resolve.count, u64::from(lost), "{fault:?}");
            touch(&cluster, 0, cluster.root(), b"alive");
            cluster.finish();
        });
    }
}

#[test]
fn every_fault_of_a_hand_over_has_its_cause_and_the_lock_moves_once() {
    for (fault, cause) in FAULTS {
        let volume = &volumes()[0];
        Simulation::new(2).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let dir = cluster.directory(0, b"d");
            let before = causes(&cluster, 0);
            plan(&cluster, 0, lock_of_inode(dir), fault);
            touch(&cluster, 1, dir, b"f");
            rt::sleep(5000 * MS);
            assert_eq!(cluster.lun.fault_hits(), (1, 0), "{fault:?}");
            let expected: Vec<_> = cause.into_iter().map(|cause| (BlockKind::Lock, cause, 1)).collect();
            assert_eq!(counted(&cluster, 0, &before), expected, "{fault:?}");
            cluster.on(0, |fs| fs.lookup(&cx(), dir, b"f").map(drop)).unwrap();
            cluster.finish();
        });
    }
}

#[test]
fn a_hand_over_that_landed_and_was_built_upon_is_our_own_write() {
    // The lock goes on to others before the answer comes: nothing of our image is left in the block.
    for (fault, cause) in
        [(Fault::RetriedBelow(1000 * MS), Cause::OwnWriteLanded), (Fault::LostAnswer, Cause::NoAnswerLanded)]
    {
        let volume = &volumes()[0];
        Simulation::new(4).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 3);
            let dir = cluster.directory(0, b"d");
            let before = causes(&cluster, 0);
            plan(&cluster, 0, lock_of_inode(dir), fault);
            touch(&cluster, 1, dir, b"one");
            touch(&cluster, 2, dir, b"two");
            rt::sleep(4000 * MS);
            assert_eq!(counted(&cluster, 0, &before), [(BlockKind::Lock, cause, 1)]);
            touch(&cluster, 0, dir, b"three");
            cluster.finish();
        });
    }
}

#[test]
fn who_rings_second_lost_a_race() {
    let volume = &volumes()[0];
    Simulation::new(5).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 3);
        let (a, b) = (cluster.directory(0, b"a"), cluster.directory(0, b"b"));
        let before = causes(&cluster, 1);
        plan(&cluster, 1, bell_of(&cluster, 0), Fault::Late(40 * MS));
        let late = cluster.spawn(1, "late", move |fs| fs.mknod(&cx(), a, b"f", 0o644, 0).map(drop));
        // Its image of the bell is from before the other rings.
        while cluster.lun.fault_hits().0 == 0 {
            rt::sleep(MS / 10);
        }
        touch(&cluster, 2, b, b"f");
        joined(late).unwrap();
        assert_eq!(cluster.lun.fault_hits(), (1, 0));
        assert_eq!(counted(&cluster, 1, &before), [(BlockKind::Doorbell, Cause::LostRace, 1)]);
        let took = cluster.hosts[1].volume.stats().latency.compare_and_write;
        assert!(took.max_us >= 40_000 && took.p50_us < 1000, "{took:?}");
        cluster.finish();
    });
}

#[test]
fn a_sharer_that_remembers_an_old_image_compares_with_a_stale_one() {
    let volume = &volumes()[0];
    Simulation::new(6).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 3);
        let dir = cluster.directory(0, b"d");
        for host in [1, 2] {
            rt::sleep(500 * MS);
            cluster.on(host, |fs| fs.readdir(&cx(), dir, 0, 1 << 16, false).map(drop)).unwrap();
        }
        rt::sleep(500 * MS);
        let before = causes(&cluster, 0);
        // Host 2 joined after host 0 last saw the lock. It yields later than host 0, not at the same time.
        plan(&cluster, 2, lock_of_inode(dir), Fault::Late(50 * MS));
        touch(&cluster, 1, dir, b"f");
        assert_eq!(cluster.lun.fault_hits(), (1, 0));
        assert_eq!(counted(&cluster, 0, &before), [(BlockKind::Lock, Cause::StaleImage, 1)]);
        cluster.finish();
    });
}

#[test]
fn a_ring_without_an_answer_that_was_heard_cannot_be_told() {
    let volume = &volumes()[0];
    Simulation::new(7).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 2);
        let dir = cluster.directory(0, b"d");
        let before = causes(&cluster, 1);
        plan(&cluster, 1, bell_of(&cluster, 0), Fault::LostAnswer);
        touch(&cluster, 1, dir, b"f");
        assert_eq!(counted(&cluster, 1, &before), [(BlockKind::Doorbell, Cause::NoAnswerSuperseded, 1)]);
        cluster.finish();
    });
}

#[test]
fn images_and_answers_of_one_block_are_told_apart() {
    let volume = &volumes()[0];
    Simulation::new(8).max_time(LONG).run(move || {
        let cluster = Arc::new(Cluster::start(volume, 2));
        let here = cluster.clone();
        // All on one host's clock.
        cluster.on(1, move |_| tell_apart(&here));
    });
}

fn tell_apart(cluster: &Cluster) {
    let at = bell_of(cluster, 0);
    // Doors without a lease: it would be judged by another host's clock.
    let ats = |host: usize| {
        let door = Door::new(cluster.lun.attach(cluster.hosts[host].tag), Arc::new(Lease::new()));
        Ats::new(Arc::new(door), cluster.superblock.volume)
    };
    let (ours, theirs) = (ats(1), ats(0));
    cluster.lun.clear_observer();
    let read = |ats: &Ats| ats.read::<DoorbellRecord>(IoClass::Setup, at).unwrap();
    let next = |image: &Image<DoorbellRecord>| DoorbellRecord {
        swap_counter: image.record.swap_counter + 1,
        ..image.record.clone()
    };
    let swap = |ats: &Ats, image: &Image<DoorbellRecord>| {
        matches!(ats.swap(IoClass::Setup, image, &next(image)).unwrap(), Swapped::Done(_))
    };
    // Issues our swap first; another host's is executed before it.
    let overtaken = |image: &Image<DoorbellRecord>| {
        let (theirs, their_image, to) = (ats(0), image.clone(), next(image));
        let work = move || matches!(theirs.swap(IoClass::Setup, &their_image, &to), Ok(Swapped::Done(_)));
        let racing = sim::spawn_on(cluster.hosts[0].tag, "racing", work);
        assert!(!swap(&ours, image) && joined(racing));
    };
    let mut known = ours.stats.causes(BlockKind::Doorbell);
    let mut expect = |cause: Cause| {
        let now = ours.stats.causes(BlockKind::Doorbell);
        for each in Cause::ALL {
            let more = u64::from(*each == cause);
            assert_eq!(now.get(*each), known.get(*each) + more, "{each:?} instead of {cause:?}");
        }
        known = now;
    };
    // Fresh, and overtaken.
    let image = read(&ours);
    assert!(swap(&theirs, &image) && !swap(&ours, &image));
    expect(Cause::LostRace);
    // As fresh, but something newer had been seen.
    let image = read(&ours);
    assert!(swap(&theirs, &image));
    read(&ours);
    assert!(!swap(&ours, &image));
    expect(Cause::StaleImage);
    // Old.
    let image = read(&ours);
    assert!(swap(&theirs, &image));
    rt::sleep(STALE_AFTER + MS);
    assert!(!swap(&ours, &image));
    expect(Cause::StaleImage);
    // As old, but the command took longer than that.
    let image = read(&ours);
    rt::sleep(STALE_AFTER + MS);
    plan(cluster, 1, at, Fault::Late(1000 * MS));
    overtaken(&image);
    expect(Cause::LostRace);
    // Lost on its way, and the one place behind the image is taken by another.
    let image = read(&ours);
    plan(cluster, 1, at, Fault::NeverExecuted);
    overtaken(&image);
    expect(Cause::NoAnswerNotLanded);
    // Nobody waited for the answer to a swap of ours, and the next one meets what became of it.
    let lease = Arc::new(Lease::new());
    let door = Door::new(cluster.lun.attach(cluster.hosts[1].tag), lease.clone());
    let leaving = Ats::new(Arc::new(door), cluster.superblock.volume);
    let image = read(&leaving);
    lease.extend(rt::Instant::now(), 1000 * MS);
    plan(cluster, 1, at, Fault::LostAnswer);
    let cut = leaving.swap(IoClass::Setup, &image, &next(&image));
    assert!(matches!(cut, Err(AtsError::Device(_))), "{cut:?}");
    let last = leaving.swap(IoClass::Farewell, &image, &next(&image)).unwrap();
    assert!(matches!(last, Swapped::Miscompare(_)), "{last:?}");
    let counts = leaving.stats.causes(BlockKind::Doorbell);
    let expected = CauseCounts { no_answer_unresolved: 1, own_write_landed: 1, ..CauseCounts::default() };
    assert_eq!(counts, expected);
    // An older image than the one that was read is there.
    let old = cluster.lun.contents(at.offset_bytes(), RECORD_BYTES);
    let image = read(&ours);
    assert!(swap(&theirs, &image));
    let image = read(&ours);
    cluster.lun.overwrite(at.offset_bytes(), &old);
    assert!(!swap(&ours, &image));
    expect(Cause::WentBack);
    // And back again, with a bit of it flipped.
    let image = read(&ours);
    cluster.lun.overwrite(at.offset_bytes() + 100, &[old[100] ^ 1]);
    let damaged = ours.swap(IoClass::Setup, &image, &next(&image));
    let Err(AtsError::Damaged(error)) = damaged else { panic!("{damaged:?}") };
    assert!(error.to_string().contains(&format!("doorbell at block {at}: checksum")), "{error}");
    expect(Cause::Damaged);
    ours.read::<DoorbellRecord>(IoClass::Setup, at).unwrap_err();
    expect(Cause::Damaged);
    cluster.lun.overwrite(at.offset_bytes(), &old);
    assert!(swap(&ours, &read(&ours)));
    assert_eq!(ours.stats.causes(BlockKind::Lock), CauseCounts::default());
}

/// How another writer changes what is this host's alone.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Theft {
    Slot,
    Lock,
    /// Both, as a recovery and a new owner of the lock do.
    Everything,
}

#[test]
fn a_host_that_was_declared_dead_says_so_and_stops() {
    let volume = &volumes()[0];
    for theft in [Theft::Slot, Theft::Lock, Theft::Everything] {
        Simulation::new(9).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let dir = cluster.directory(0, b"d");
            let before = causes(&cluster, 0);
            cluster.may_end(0);
            cluster.lun.clear_observer();
            let by = cluster.hosts[1].volume.heartbeat().me();
            let steal = || {
                swap_lock(&cluster, 1, lock_of_inode(dir), |lock| {
                    lock.mode = LockMode::Exclusive { owner: by, tenure: Tenure(lock.swap_counter) };
                });
            };
            if theft != Theft::Slot {
                // While the hand-over to host 1 is on its way.
                plan(&cluster, 0, lock_of_inode(dir), Fault::Late(400 * MS));
                drop(cluster.spawn(1, "asks", move |fs| fs.mknod(&cx(), dir, b"f", 0o644, 0).map(drop)));
                rt::sleep(300 * MS);
                steal();
            }
            if theft != Theft::Lock {
                mark_dead(&cluster, 0, by);
            }
            if theft == Theft::Everything {
                // Further on than the hand-over would have brought it.
                steal();
            }
            rt::sleep(300 * MS);
            if theft != Theft::Slot {
                assert_eq!(counted(&cluster, 0, &before), [(BlockKind::Lock, Cause::DeclaredDead, 1)]);
            }
            rt::sleep(5000 * MS);
            let reason = cluster.hosts[0].volume.door().lease().reason().unwrap();
            if theft == Theft::Slot {
                assert_eq!(counted(&cluster, 0, &before), [(BlockKind::Heartbeat, Cause::DeclaredDead, 1)]);
                assert!(reason.contains("declared dead"), "{reason}");
            } else {
                assert!(reason.contains("was taken from this host"), "{reason}");
            }
        });
    }
}

/// Marks a host's slot as a recoverer does.
fn mark_dead(cluster: &Cluster, host: usize, by: Owner) {
    let door = cluster.hosts[1].volume.door().clone();
    cluster.on(1, |_| {
        let ats = Ats::new(door, cluster.superblock.volume);
        let image = ats.read::<SlotRecord>(IoClass::Setup, slot_of(cluster, host)).unwrap();
        let mut mark = image.record.clone();
        (mark.state, mark.recoverer) = (SlotState::Recovering, Some(by));
        mark.beat += 1;
        assert!(matches!(ats.swap(IoClass::Setup, &image, &mark).unwrap(), Swapped::Done(_)));
    });
}

#[test]
fn a_slot_that_went_back_ends_nobody_and_a_damaged_one_its_host() {
    let volume = &volumes()[0];
    for damage in [false, true] {
        Simulation::new(10).max_time(LONG).run(move || {
            let cluster = Cluster::start(volume, 2);
            let before = causes(&cluster, 0);
            cluster.may_end(0);
            cluster.lun.clear_observer();
            let at = slot_of(&cluster, 0).offset_bytes();
            let old = cluster.lun.contents(at, RECORD_BYTES);
            rt::sleep(3500 * MS);
            match damage {
                true => cluster.lun.overwrite(at + 20, &[0xff; 4]),
                false => cluster.lun.overwrite(at, &old),
            }
            rt::sleep(3500 * MS);
            let cause = if damage { Cause::Damaged } else { Cause::WentBack };
            // A damaged slot may have been met by the watch over all slots, too.
            let counted = counted(&cluster, 0, &before);
            let once = |count: u64| count == 1 || (damage && count == 2);
            assert!(
                matches!(counted[..], [(BlockKind::Heartbeat, found, n)] if found == cause && once(n)),
                "{counted:?}"
            );
            let reason = cluster.hosts[0].volume.door().lease().reason();
            match damage {
                true => assert!(reason.unwrap().contains("another volume")),
                // Beats are not flushed: one that a device forgot is no reason to stop.
                false => assert_eq!(reason, None),
            }
        });
    }
}

#[test]
fn a_damaged_lock_is_an_error_with_a_place() {
    let volume = &volumes()[0];
    Simulation::new(11).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 2);
        let dir = cluster.directory(0, b"d");
        let before = causes(&cluster, 1);
        cluster.lun.overwrite(lock_of_inode(dir).offset_bytes() + 200, b"?");
        let refused = cluster.on(1, |fs| fs.mknod(&cx(), dir, b"f", 0o644, 0).map(drop)).unwrap_err();
        assert!(refused.to_string().contains(&lock_of_inode(dir).to_string()), "{refused}");
        assert_eq!(counted(&cluster, 1, &before), [(BlockKind::Lock, Cause::Damaged, 1)]);
    });
}

#[test]
fn a_damaged_doorbell_costs_a_second_and_no_error() {
    let volume = &volumes()[0];
    Simulation::new(13).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 2);
        let dir = cluster.directory(0, b"d");
        let before = causes(&cluster, 1);
        cluster.lun.overwrite(bell_of(&cluster, 0).offset_bytes() + 200, b"?");
        let begun = sim::now().unwrap();
        touch(&cluster, 1, dir, b"f");
        let took = sim::now().unwrap() - begun;
        assert!(took < 1500 * MS, "{took:?}");
        let counted = counted(&cluster, 1, &before);
        assert!(matches!(counted[..], [(BlockKind::Doorbell, Cause::Damaged, 1..)]), "{counted:?}");
    });
}

#[test]
fn what_became_of_the_last_beat_of_a_host_that_was_cut_off_is_unknown() {
    let volume = &volumes()[0];
    Simulation::new(12).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, 2);
        let before = causes(&cluster, 0);
        cluster.may_end(0);
        cluster.lun.partition(cluster.hosts[0].tag, Partition::Hang);
        rt::sleep(15_000 * MS);
        assert_eq!(counted(&cluster, 0, &before), [(BlockKind::Heartbeat, Cause::NoAnswerUnresolved, 1)]);
        assert_eq!(cluster.hosts[0].volume.stats().latency.resolve.count, 0);
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
        let (volume, before) = (leaving.volume.clone(), leaving.volume.stats().swaps.causes);
        let left = sim::spawn_on(leaving.tag, "leave", move || {
            (volume.leave().map_err(|e| e.to_string()), volume.door().lease().reason())
        });
        while cluster.join(rt::HostTag(2)).is_err() {
            rt::sleep(20 * MS);
        }
        assert_eq!(joined(left), (Ok(()), Some("left the volume".to_owned())));
        let counted = differences(&leaving.volume.stats().swaps.causes, &before);
        assert_eq!(counted, [(BlockKind::Heartbeat, Cause::NoAnswerLanded, 1)]);
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
            let (a, b) = (cluster.directory(0, b"a"), cluster.directory(0, b"b"));
            // Nobody was asked for a while.
            rt::sleep((2000 + 100 * seed as u32) * MS);
            plan(&cluster, 0, bell_of(&cluster, 0), Fault::RetriedBelow(400 * MS));
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
