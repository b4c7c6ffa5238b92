//! Plain writes whose answer never came: they may execute long after the host gave up waiting.

use std::time::Duration;

use lunfs::device::sim::{CommandKind, Fault, FaultRule};
use lunfs::fs::api::{FsResult, Operations};
use lunfs::rt;
use lunfs::rt::planted::Bug;
use lunfs::rt::sim::{Failure, SimRng, Simulation, seeds};
use lunfs::testing::cluster::{Cluster, cx};
use lunfs::types::InodeNo;

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
