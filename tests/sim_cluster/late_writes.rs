//! Plain writes whose answer never came: they may execute long after the host gave up waiting.

use std::sync::Arc;
use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule, SimLun, SimLunOptions};
use lunfs::device::{AlignedBuf, BlockDevice, CompareOutcome, DeviceError, DeviceGeometry};
use lunfs::fs::api::{FsResult, Operations};
use lunfs::lease::{Door, IoClass, Lease};
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, seeds};
use lunfs::rt::{self, HostTag};
use lunfs::testing::cluster::{Cluster, Formatted, cx};
use lunfs::types::{BlockNo, InodeNo};

use super::model::{LONG, volumes};

const BLOCK: usize = 4096;

fn write(fs: &dyn Operations, ino: InodeNo, byte: u8) -> FsResult<()> {
    fs.write(&cx(), ino, None, 0, &[byte; 2 * BLOCK], false)?;
    fs.fsync(&cx(), ino, false).map(drop)
}

fn shown(fs: &dyn Operations, ino: InodeNo) -> Vec<u8> {
    fs.read(&cx(), ino, None, 0, 2 * BLOCK as u32).unwrap().value.to_vec()
}

/// The write of one host comes late, another host writes the same bytes meanwhile and has them durable.
pub fn late_write(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let volume = &volumes()[(seed % 4) as usize];
    Simulation::new(seed)
        .max_time(LONG)
        .planted(bug)
        .try_run(move || {
            let cluster = Cluster::start(volume, 2);
            let root = cluster.root();
            let ino = cluster.on(0, |fs| {
                let ino = fs.mknod(&cx(), root, b"file", 0o644, 0).unwrap().value.ino;
                write(fs, ino, 1).unwrap();
                fs.sync(&cx()).unwrap();
                ino
            });
            let mut rng = SimRng::new(seed, 70);
            let tag = cluster.hosts[0].tag;
            let late = Fault::Late(Duration::from_millis(rng.between(2_100, 4_900)));
            let fault = if seed % 3 == 2 { Fault::LostAnswer } else { late };
            cluster.lun.inject(FaultRule::next_of(fault, tag, CommandKind::Write));
            let first = cluster.spawn(0, "writer", move |fs| write(&*fs, ino, 2));
            rt::sleep(Duration::from_millis(rng.between(1, 1500)));
            cluster.on(1, |fs| write(fs, ino, 3).unwrap());
            rt::sleep(Duration::from_secs(10));
            assert_eq!(cluster.lun.fault_hits().1, 0, "the fault hit nothing");
            first.join().unwrap().unwrap();
            for host in 0..2 {
                cluster.on(host, |fs| {
                    let bytes = shown(fs, ino);
                    assert!(bytes.iter().all(|b| *b == bytes[0]), "the two writes are mixed");
                    assert_eq!(bytes[0], 3, "what was written last and made durable is gone");
                });
            }
            cluster.finish();
        })
        .map(drop)
}

#[test]
fn a_late_write_never_comes_over_another_hosts() {
    for seed in seeds(0..16) {
        late_write(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// What a host wants is written where others read it, and the answer to that write is lost, or the write comes late, on a
/// device that may hold a write for longer than a lease. It is a hint: nobody may wait for it, or the host that asks can't
/// hear what others ask of it for as long, and loses its lease.
pub fn late_wish(seed: u64, bug: Option<Bug>) -> Result<(), Failure> {
    let lun = SimLunOptions { hold_time: Duration::from_secs(20), ..SimLunOptions::default() };
    let volume = Formatted::tiny_on(8, lun);
    Simulation::new(seed)
        .max_time(LONG)
        .planted(bug)
        .try_run(move || {
            let cluster = Cluster::start(&volume, 2);
            let root = cluster.root();
            let make = |name: &[u8]| {
                cluster.on(0, |fs| {
                    let ino = fs.mknod(&cx(), root, name, 0o644, 0).unwrap().value.ino;
                    write(fs, ino, 1).unwrap();
                    ino
                })
            };
            let files = [make(b"first"), make(b"second")];
            let host = &cluster.hosts[1];
            let block = cluster.superblock.geometry.request(host.volume.heartbeat().me().slot).offset_bytes();
            let mut rng = SimRng::new(seed, 71);
            let late = Fault::Late(Duration::from_millis(rng.between(2_100, 19_000)));
            let fault = if seed.is_multiple_of(3) { Fault::LostAnswer } else { late };
            cluster.lun.inject(FaultRule {
                bytes: Some(block..block + BLOCK as u64),
                ..FaultRule::next_of(fault, host.tag, CommandKind::Write)
            });
            for ino in files {
                let begun = rt::Instant::now();
                cluster.on(1, |fs| write(fs, ino, 2).unwrap());
                let took = begun.elapsed();
                assert!(took < Duration::from_secs(7), "a wait of {took:?} for a host that is well");
                rt::sleep(Duration::from_secs(3));
            }
            assert_eq!(cluster.lun.fault_hits().1, 0, "the fault hit nothing");
            // Whatever comes late has come, and was put right.
            rt::sleep(Duration::from_secs(30));
            for ino in files {
                cluster.on(0, |fs| write(fs, ino, 3).unwrap());
                cluster.on(1, |fs| assert_eq!(shown(fs, ino), [3; 2 * BLOCK]));
            }
            cluster.finish();
        })
        .map(drop)
}

/// A device to which writes have no way, as an iSCSI unit whose bulk session is down.
struct NoWrites(Arc<dyn BlockDevice>);

impl BlockDevice for NoWrites {
    fn geometry(&self) -> DeviceGeometry {
        self.0.geometry()
    }
    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.0.read(offset_bytes, buf)
    }
    fn write(&self, offset_bytes: u64, _: &[u8]) -> Result<(), DeviceError> {
        rt::sleep(Duration::from_secs(3));
        Err(DeviceError::Interrupted { op: "write", offset_bytes, why: "no session".into() })
    }
    fn compare_and_write(&self, at: u64, old: &[u8], new: &[u8]) -> Result<CompareOutcome, DeviceError> {
        self.0.compare_and_write(at, old, new)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.0.flush()
    }
    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.0.discard(offset_bytes, len_bytes)
    }
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.0.write_zeroes(offset_bytes, len_bytes)
    }
    fn resets(&self) -> u64 {
        self.0.resets()
    }
}

/// A hint is not made again where nothing can be written: who writes it may be the thread that hears others.
#[test]
fn a_hint_that_has_no_way_to_the_device_is_given_back() {
    Simulation::new(1).max_time(Duration::from_secs(60)).run(|| {
        let lun = SimLun::new(SimLunOptions::default());
        let door = Door::new(Arc::new(NoWrites(lun.attach(HostTag(0)))), Arc::new(Lease::new()));
        let given_back = door.write(IoClass::Demand, BlockNo(9), &AlignedBuf::zeroed(4096));
        assert!(given_back.is_err_and(|e| e.is_to_be_made_again()));
    });
}

#[test]
fn a_wish_whose_answer_is_lost_costs_nobody_a_lease() {
    for seed in seeds(0..12) {
        late_wish(seed, None).unwrap_or_else(|e| panic!("{e}"));
    }
}
