//! The command: refusals, exit statuses, output.

use std::process::{Command, Output};

use lunfs::layout::slot::{Durations, SlotState};
use lunfs::types::{BlockNo, Slot};
use serde_json::Value;

use super::volumes::{Volume, err, out, run, while_beating};

fn fsck(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_fsck-lunfs")).args(args).output().unwrap()
}

/// Wants this exit status; what was said on both streams.
fn says(volume: &Volume, args: &[&str], status: i32) -> String {
    let before = volume.fingerprint();
    let mut all = args.to_vec();
    all.push(volume.spec());
    let output = fsck(&all);
    let text = out(&output) + &err(&output);
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert_eq!(volume.fingerprint(), before, "something was written");
    text
}

#[test]
fn a_new_volume_is_clean_and_a_damaged_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::tiny(dir.path());
    assert!(says(&volume, &["-n"], 0).contains("clean; 5 directories, 0 files, 0 blocks"));
    assert!(says(&volume, &[], 0).contains("clean"));
    let at = volume.geometry().doorbell(Slot(2));
    volume.put(at, &[7; 100]);
    let text = says(&volume, &[], 4);
    assert!(text.contains("slot 2 [doorbell]: ") && text.contains("1 error left;"), "{text}");
    let json: Value = serde_json::from_str(&says(&volume, &["--json"], 4)).unwrap();
    assert_eq!(json["findings"][0]["name"], "doorbell");
    assert_eq!(json["findings"][0]["severity"], "error");
    assert_eq!(json["findings"][0]["place"]["slot"], 2);
    assert_eq!((&json["report"]["errors"], &json["status"]), (&1.into(), &4.into()));
    let by_the_other_name = run("lunfs", &["fsck", volume.spec()]);
    assert_eq!(by_the_other_name.status.code(), Some(4));
}

#[test]
fn what_can_not_be_checked_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::tiny(dir.path());
    let records = [volume.slot_record(1, SlotState::Live, "busy")];
    // Claimed before fsck looks; the beats may begin later.
    volume.put_slot(&records[0]);
    while_beating(&volume, &records, || {
        let output = fsck(&["-n", volume.spec()]);
        assert_eq!(output.status.code(), Some(8), "{}", out(&output));
        assert!(err(&output).contains("'busy' (slot 1) uses the volume"), "{}", err(&output));
    });
    let text = says(&volume, &[], 0);
    assert!(text.contains("slot 1 [journal-pending]") && text.contains("clean, 1 note;"), "{text}");
    assert_eq!(fsck(&[]).status.code(), Some(16));
    assert_eq!(fsck(&["--nonsense", volume.spec()]).status.code(), Some(16));
    assert_eq!(run("lunfs", &["fsck"]).status.code(), Some(16));
    assert_eq!(fsck(&["--help"]).status.code(), Some(0));
    assert_eq!(fsck(&["/nonexistent/volume"]).status.code(), Some(8));
    for at in volume.geometry().superblock_copies().into_iter().chain([BlockNo(0)]) {
        volume.put(at, &[0; 4096]);
    }
    assert!(says(&volume, &[], 8).contains("not a LunFS volume"));
}

pub const PATIENT: Durations = Durations { beat_ms: 250, lease_ms: 6000, dead_ms: 6500, hold_ms: 0 };

/// A volume whose terms leave a loaded machine time to beat: it may stand still for most of six seconds. Nobody else
/// is there to be kept out, so the dead time need not be much longer.
pub fn patient(dir: &std::path::Path) -> Volume {
    let mut volume = Volume::tiny(dir);
    volume.superblock.durations = PATIENT;
    let mut block = lunfs::layout::zero_block();
    for at in volume.geometry().superblock_copies().into_iter().chain([BlockNo(0)]) {
        volume.superblock.encode(at, &mut block);
        volume.put(at, &block[..]);
    }
    volume
}

#[test]
fn repairs_are_told_by_the_exit_status() {
    let dir = tempfile::tempdir().unwrap();
    let volume = patient(dir.path());
    let status = |option: &str| {
        let output = fsck(&[option, volume.spec()]);
        (output.status.code(), out(&output) + &err(&output))
    };
    volume.put(volume.geometry().root().body(), &[7; 4096]);
    volume.put(volume.geometry().doorbell(Slot(2)), &[7; 100]);
    let (code, text) = status("-p");
    assert_eq!(code, Some(4), "{text}");
    assert!(text.contains("[doorbell]") && text.contains("[inode-unreadable]"), "{text}");
    assert!(text.contains("1 error left"), "{text}");
    let (code, text) = status("-y");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("clean after 1 repair;") && !text.contains("[doorbell]"), "{text}");
    let (code, text) = status("-n");
    assert_eq!(code, Some(0), "{text}");
    let output = fsck(&["-n", "-y", volume.spec()]);
    assert_eq!(output.status.code(), Some(16), "{}", err(&output));
}

#[test]
fn an_interrupt_ends_maintenance() {
    use lunfs::layout::lock::{LockMode, LockRecord};
    let dir = tempfile::tempdir().unwrap();
    let volume = patient(dir.path());
    let at = volume.geometry().volume_lock();
    let mode = || LockRecord::decode(&volume.get(at)[..], volume.superblock.volume, at).unwrap().mode;
    let mut child =
        Command::new(env!("CARGO_BIN_EXE_fsck-lunfs")).args(["-p", volume.spec()]).spawn().unwrap();
    while !matches!(mode(), LockMode::Exclusive { .. }) {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it took the volume");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(32));
    assert_eq!(mode(), LockMode::Free);
}
