//! Hosts whose device fails them while their heartbeat goes on: they give up by themselves and say so, and the
//! others recover them at once instead of waiting for their dead time.

use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule};
use lunfs::fs::api::Operations;
use lunfs::layout::slot::SlotState;
use lunfs::rt::HostTag;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{self, Failure, SimRng, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::InodeNo;
use lunfs::{rt, types::BlockNo};

use super::model::{LONG, volumes};
use super::recovery::settled;

/// Far below the dead time of the profile in use.
const AT_ONCE: Duration = Duration::from_secs(4);

fn failing(cluster: &Cluster, host: usize, kind: CommandKind, first: BlockNo, blocks: u64) {
    let bytes = first.offset_bytes()..first.offset_bytes() + blocks * 4096;
    let rule = FaultRule::next_of(Fault::IoError, cluster.hosts[host].tag, kind);
    cluster.lun.inject(FaultRule { bytes: Some(bytes), count: u32::MAX, ..rule });
}

fn journal(cluster: &Cluster, host: usize) -> (BlockNo, u64) {
    let geometry = &cluster.superblock.geometry;
    (geometry.journal(cluster.hosts[host].volume.heartbeat().me().slot), geometry.journal_blocks)
}

fn file(fs: &dyn Operations, dir: InodeNo, name: &[u8], bytes: &[u8]) -> InodeNo {
    let ino = fs.mknod(&cx(), dir, name, 0o644, 0).unwrap().value.ino;
    fs.write(&cx(), ino, None, 0, bytes, false).map(drop).unwrap();
    fs.fsync(&cx(), ino, false).map(drop).unwrap();
    ino
}

/// A directory that host 0 holds, with a file that must survive.
fn with_something_durable(cluster: &Cluster) -> InodeNo {
    let root = cluster.root();
    cluster.on(0, |fs| {
        let dir = fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino;
        file(fs, dir, b"durable", b"kept");
        dir
    })
}

fn never_durable(fs: &dyn Operations, dir: InodeNo) {
    let made = fs.mknod(&cx(), dir, b"never durable", 0o644, 0).unwrap().value.ino;
    fs.fsync(&cx(), made, false).map(drop).unwrap_err();
}

/// How long another host waits for what host 0 holds from now on; the durable file must be there.
fn taken_over(cluster: &Cluster, dir: InodeNo) -> Duration {
    let before = sim::now().unwrap();
    let other = cluster.spawn(1, "other", move |fs| {
        let ino = fs.lookup(&cx(), dir, b"durable").unwrap().value.ino;
        assert_eq!(&*fs.read(&cx(), ino, None, 0, 100).unwrap().value, b"kept");
        fs.mknod(&cx(), dir, b"by the other", 0o644, 0).map(drop).unwrap();
    });
    joined(other);
    sim::now().unwrap() - before
}

fn withdraws(
    seed: u64,
    volume: &'static Formatted,
    bug: Option<Bug>,
    breaks: impl Fn(&Cluster, InodeNo) + Send + 'static,
) -> Result<(), Failure> {
    let simulation = Simulation::new(seed).max_time(LONG).planted(bug);
    let finished = simulation.try_run(move || {
        let mut cluster = Cluster::start(volume, 2);
        cluster.may_end(0);
        let dir = with_something_durable(&cluster);
        breaks(&cluster, dir);
        let took = taken_over(&cluster, dir);
        assert!(took < AT_ONCE, "the other host waited {took:?}");
        let slot = cluster.hosts[0].volume.heartbeat().record().address;
        let said = cluster.slots().into_iter().find(|s| s.address == slot).unwrap();
        assert_eq!(said.state, SlotState::Recovered);
        // It is refused whatever it still wants, and comes back as a new life.
        cluster.on(0, |fs| fs.mknod(&cx(), dir, b"too late", 0o644, 0).map(drop).unwrap_err());
        cluster.lun.clear_faults();
        let gone = cluster.hosts.remove(0);
        let tag = gone.tag;
        sim::on_host(tag, || gone.volume.leave().unwrap());
        drop(gone);
        cluster.join(tag).unwrap();
        cluster.on(1, |fs| fs.lookup(&cx(), dir, b"by the other").map(drop)).unwrap();
        cluster.finish();
    });
    finished.map(drop)
}

pub fn failing_commit(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    withdraws(seed, &volumes()[(seed % 4) as usize], bug, move |cluster, dir| {
        let (first, blocks) = journal(cluster, 0);
        failing(cluster, 0, CommandKind::Write, first, blocks);
        cluster.on(0, |fs| never_durable(fs, dir));
    })
}

#[test]
fn a_host_whose_commit_fails() {
    for seed in seeds(0..8) {
        failing_commit(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn a_host_whose_flush_fails() {
    for seed in seeds(0..4) {
        // Of those with a volatile cache.
        let flush_fails = withdraws(seed, &volumes()[(seed % 2) as usize], None, move |cluster, dir| {
            let rule = FaultRule::next_of(Fault::IoError, cluster.hosts[0].tag, CommandKind::Flush);
            cluster.lun.inject(FaultRule { count: u32::MAX, ..rule });
            cluster.on(0, |fs| never_durable(fs, dir));
        });
        flush_fails.unwrap_or_else(|e| panic!("{e}"));
    }
}

/// What can't be written in place keeps its lock: the host gives up after a lease of trying.
#[test]
fn a_host_that_can_not_write_in_place() {
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 2);
            cluster.may_end(0);
            let dir = with_something_durable(&cluster);
            failing(&cluster, 0, CommandKind::Write, BlockNo(dir.0), 1);
            let took = taken_over(&cluster, dir);
            assert!(took < Duration::from_secs(24), "the other host waited {took:?}");
            let door = cluster.hosts[0].volume.door().clone();
            assert!(door.lease().withdraws(), "it was to give up by itself");
            cluster.lun.clear_faults();
            drop(cluster.hosts.remove(0));
            cluster.finish();
        });
    }
}

/// A data write that timed out may still come: the host says that it withdrew only when it can't any more.
#[test]
fn with_a_late_write_under_way_the_others_wait_for_it() {
    for seed in seeds(0..12) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 2);
            cluster.may_end(0);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| file(fs, root, b"file", &[1; 8192]));
            let mut rng = SimRng::new(seed, 71);
            let tag = cluster.hosts[0].tag;
            let late = Fault::Late(Duration::from_millis(rng.between(2_100, 4_900)));
            cluster.lun.inject(FaultRule::next_of(late, tag, CommandKind::Write));
            let writer = cluster
                .spawn(0, "writer", move |fs| fs.write(&cx(), ino, None, 0, &[2; 8192], false).map(drop));
            rt::sleep(Duration::from_millis(rng.between(1, 2500)));
            let (first, blocks) = journal(&cluster, 0);
            failing(&cluster, 0, CommandKind::Write, first, blocks);
            let failed = cluster.spawn(0, "fails", move |fs| {
                let made = fs.mknod(&cx(), root, b"never durable", 0o644, 0)?.value.ino;
                fs.fsync(&cx(), made, false).map(drop)
            });
            joined(failed).unwrap_err();
            let other = cluster.spawn(1, "other", move |fs| {
                fs.write(&cx(), ino, None, 0, &[3; 8192], false).map(drop).unwrap();
                fs.fsync(&cx(), ino, false).map(drop).unwrap();
            });
            joined(other);
            drop(joined(writer));
            rt::sleep(Duration::from_secs(10));
            cluster.on(1, |fs| {
                let bytes = fs.read(&cx(), ino, None, 0, 8192).unwrap().value.to_vec();
                assert!(bytes.iter().all(|b| *b == 3), "a write of the host that withdrew came late");
            });
            cluster.lun.clear_faults();
            drop(cluster.hosts.remove(0));
            cluster.finish();
        });
    }
}

/// Its slot can't be changed any more, because each compare-and-write there is answered falsely: it gives up telling
/// and ends, though nobody recovers it meanwhile.
#[test]
fn a_host_that_can_not_say_that_it_withdraws() {
    for seed in seeds(0..4) {
        let volume = &volumes()[(seed % 4) as usize];
        Simulation::new(seed).max_time(LONG).run(move || {
            let mut cluster = Cluster::start(volume, 1);
            cluster.may_end(0);
            let dir = with_something_durable(&cluster);
            let slot = cluster.hosts[0].volume.heartbeat().record().address;
            let tag = cluster.hosts[0].tag;
            let rule = FaultRule::next_of(Fault::FalseMiscompare, tag, CommandKind::CompareAndWrite);
            let bytes = slot.offset_bytes()..slot.offset_bytes() + 4096;
            cluster.lun.inject(FaultRule { bytes: Some(bytes), count: u32::MAX, ..rule });
            let (first, blocks) = journal(&cluster, 0);
            failing(&cluster, 0, CommandKind::Write, first, blocks);
            cluster.on(0, |fs| never_durable(fs, dir));
            let gone = cluster.hosts.remove(0);
            let begun = sim::now().unwrap();
            // What the process does before it ends.
            drop(sim::on_host(tag, || gone.volume.leave()));
            let took = sim::now().unwrap() - begun;
            assert!(took < Duration::from_secs(60), "it took {took:?} to end");
            drop(gone);
            cluster.lun.clear_faults();
            cluster.join(HostTag(1)).unwrap();
            let found = cluster.on(0, |fs| fs.lookup(&cx(), dir, b"durable").map(drop));
            found.unwrap();
            settled(&cluster);
            cluster.finish();
        });
    }
}
