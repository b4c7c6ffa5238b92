//! How a mount's daemon ends: each way has an exit status of its own and says so in the last line of its log, in the
//! foreground and in the background.

use std::fs::{self, File};
use std::time::Duration;

use lunfs::device::{BlockDevice, CompareOutcome};
use lunfs::layout::slot::{SlotRecord, SlotState};
use lunfs::types::{Incarnation, Owner, Slot};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use super::devices::superblock;
use super::harness::{Backing, Cluster, adopt_daemons, can_mount, status_of};
use crate::faults::{Action, FLUSH, FOR_EVER, Faults, READ, WRITE};

/// Longer than a lease of the profile `fast`, shorter than its dead time.
const PAST_THE_LEASE: Duration = Duration::from_millis(2700);

/// Mounts one host, lets `end` end it, and wants this status and these words in its log.
fn ends(end: fn(&Cluster, &Faults), status: i32, words: &[&str]) {
    if !can_mount() {
        return;
    }
    adopt_daemons();
    for foreground in [true, false] {
        let mut cluster = Cluster::with_profile("fast", Backing::File(512), 4, "1G");
        let faults = Faults::new(cluster.directory(), &cluster.image());
        cluster.environment = faults.environment();
        let pid = match foreground {
            true => cluster.mount_in_foreground("h0").0.pid,
            false => cluster.mount().pid,
        };
        fs::write(cluster.dir(0).join("file"), b"before").expect("write");
        File::open(cluster.dir(0).join("file")).and_then(|f| f.sync_all()).expect("fsync");
        end(&cluster, &faults);
        assert_eq!(status_of(pid), Some(status), "foreground {foreground}: {}", cluster.log("h0"));
        let log = cluster.log("h0");
        let last = format!("the mount on {} ends with status {status}: ", cluster.dir(0).display());
        for words in words.iter().chain([&&*last]) {
            assert!(log.contains(words), "foreground {foreground}: no {words:?} in {log}");
        }
        if status == 0 {
            assert!(!cluster.hosts[0].is_mounted());
            cluster.hosts.clear();
            cluster.demand_clean();
        } else if !log.contains("not left cleanly") {
            // Taken away, programs would write beneath it.
            assert!(cluster.hosts[0].is_mounted(), "foreground {foreground}");
            assert!(fs::metadata(cluster.dir(0).join("file")).is_err());
        }
    }
}

#[test]
fn unmounted() {
    let end = |cluster: &Cluster, _: &Faults| {
        umount2(cluster.dir(0), MntFlags::empty()).expect("nobody uses it");
    };
    ends(end, 0, &["left cleanly"]);
}

#[test]
fn asked_to_end() {
    ends(|cluster, _| cluster.hosts[0].signal(Signal::SIGTERM), 0, &["asked to end by signal 15"]);
}

#[test]
fn stood_still() {
    let end = |cluster: &Cluster, _: &Faults| {
        cluster.hosts[0].signal(Signal::SIGSTOP);
        std::thread::sleep(PAST_THE_LEASE);
        cluster.hosts[0].signal(Signal::SIGCONT);
    };
    ends(end, 75, &["no beat landed within the lease", "the volume is lost: "]);
}

#[test]
fn the_device_failed() {
    let end = |_: &Cluster, faults: &Faults| {
        // What was to be committed and put in place is.
        std::thread::sleep(Duration::from_secs(12));
        faults.inject(0, Action::Eio, READ | WRITE | FLUSH, 0..u64::MAX, FOR_EVER);
    };
    let words = ["no beat landed within the lease; the device's last answer: "];
    ends(end, 69, &words);
}

#[test]
fn a_commit_failed() {
    let end = |cluster: &Cluster, faults: &Faults| {
        faults.inject(0, Action::Eio, FLUSH, 0..u64::MAX, 1);
        fs::write(cluster.dir(0).join("file"), b"after").expect("write");
        File::open(cluster.dir(0).join("file")).and_then(|f| f.sync_all()).expect_err("fsync");
    };
    ends(end, 74, &["a commit failed: flush at byte", "this host's slot says that it withdrew"]);
}

/// The last commit of an unmount is as good as any other.
#[test]
fn the_last_commit_failed() {
    let end = |cluster: &Cluster, faults: &Faults| {
        fs::write(cluster.dir(0).join("file"), b"after").expect("write");
        faults.inject(0, Action::Eio, FLUSH, 0..u64::MAX, FOR_EVER);
        umount2(cluster.dir(0), MntFlags::MNT_DETACH).expect("it can be taken off");
    };
    ends(end, 74, &["the volume was not left cleanly: "]);
}

/// What another host writes into the slot of one that seems dead to it.
#[test]
fn declared_dead() {
    let end = |cluster: &Cluster, _: &Faults| {
        let (device, superblock) = superblock(cluster);
        let geometry = superblock.geometry;
        let mark = |slot: Slot| {
            let at = geometry.slot(slot);
            let mut block = vec![0; 512];
            device.read(at.offset_bytes(), &mut block).expect("read");
            let Ok(mut record) = SlotRecord::decode(&block, superblock.volume, at) else { return false };
            if record.host_name != "h0" {
                return false;
            }
            record.state = SlotState::Recovering;
            record.recoverer = Some(Owner { slot: Slot(3), incarnation: Incarnation(9) });
            let mut marked = block.clone();
            record.encode(superblock.volume, &mut marked);
            let swapped = device.compare_and_write(at.offset_bytes(), &block, &marked).expect("swap");
            swapped == CompareOutcome::Swapped
        };
        // Between two of its beats.
        let done = (0..1000).any(|_| geometry.all_slots().any(mark));
        assert!(done);
    };
    ends(end, 77, &["this host was declared dead by "]);
}

/// What the fence of the device keeps of a host that is shut out.
#[test]
fn shut_out_of_the_device() {
    let end = |cluster: &Cluster, _: &Faults| {
        let image = File::options().write(true).open(cluster.image()).expect("the image");
        let everybody = [0xff; 256 * 8];
        rustix::fs::fsetxattr(&image, "user.lunfs.fenced", &everybody, rustix::fs::XattrFlags::empty())
            .expect("the fence");
    };
    ends(end, 77, &["another host fenced this one at the device"]);
}
