//! Does mkfs refuse what it should, write what it says and nothing else, and do status and locks tell
//! what stands on the disk?

mod volumes;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use lunfs::layout::geometry::{Geometry, lock_of_inode};
use lunfs::types::Slot;
use serde_json::Value;
use volumes::{Volume, err, out, run, while_beating};

fn file_of(dir: &Path, bytes: u64) -> (String, File) {
    let path = dir.join("device");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(bytes).unwrap();
    (path.to_str().unwrap().to_owned(), file)
}

/// Runs mkfs and wants it refused with a sentence that contains all of `words`, nothing written.
fn refused(args: &[&str], words: &[&str]) {
    let device = args.last().unwrap();
    let before = fs::read(device).unwrap_or_default();
    let output = run("mkfs", args);
    let text = err(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(words.iter().all(|word| text.contains(word)), "{words:?} in: {text}");
    assert!(out(&output).is_empty());
    assert!(fs::read(device).unwrap_or_default() == before, "a refusal wrote something: {text}");
}

fn made(args: &[&str]) -> String {
    let output = run("mkfs", args);
    assert!(output.status.success(), "{}", err(&output));
    assert_eq!(err(&output), "");
    out(&output)
}

#[test]
fn foreign_signatures_are_refused_and_gone_after_force() {
    let dir = tempfile::tempdir().unwrap();
    let size = 32 << 20;
    let gpt = |file: &File| {
        // A protective MBR, and both headers.
        file.write_all_at(&[0, 0, 2, 0, 0xee, 0xff, 0xff, 0xff, 1, 0, 0, 0, 0xff, 0xff, 0, 0], 446).unwrap();
        file.write_all_at(&[0x55, 0xaa], 510).unwrap();
        file.write_all_at(b"EFI PART", 512).unwrap();
        file.write_all_at(b"EFI PART", size - 512).unwrap();
    };
    let lvm = |file: &File| {
        file.write_all_at(b"LABELONE", 512).unwrap();
        file.write_all_at(b"LVM2 001", 512 + 24).unwrap();
    };
    let backup_gpt = |file: &File| file.write_all_at(b"EFI PART", size - 512).unwrap();
    let xfs = |file: &File| file.write_all_at(b"XFSB", 0).unwrap();
    type Fill<'a> = &'a dyn Fn(&File);
    let fills: [(&str, Fill<'_>); 4] = [("GPT", &gpt), ("LVM2", &lvm), ("GPT", &backup_gpt), ("xfs", &xfs)];
    for (word, fill) in fills {
        let (spec, file) = file_of(dir.path(), size);
        fill(&file);
        refused(&[&spec], &[word, "--force"]);
        made(&["--force", "--quiet", &spec]);
        let again = run("mkfs", &[&spec]);
        assert!(err(&again).contains("LunFS volume"), "{}", err(&again));
    }
    if Command::new("mkfs.ext4").arg("-V").output().is_ok() {
        let (spec, _file) = file_of(dir.path(), size);
        assert!(Command::new("mkfs.ext4").args(["-q", "-F", &spec]).status().unwrap().success());
        refused(&[&spec], &["ext4", "--force"]);
        made(&["--force", &spec]);
    }
}

#[test]
fn a_dry_run_says_everything_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, _file) = file_of(dir.path(), 64 << 20);
    let text = made(&["--dry-run", "--slots", "5", "--label", "dry", &spec]);
    assert!(text.contains("nothing was written") && text.contains("dry") && text.contains("5 x"), "{text}");
    assert!(fs::read(&spec).unwrap().iter().all(|b| *b == 0));
    let absent = dir.path().join("absent");
    made(&["-n", "--size", "1G", absent.to_str().unwrap()]);
    assert!(!absent.exists());
    assert_eq!(made(&["-n", "-q", "--size", "1G", absent.to_str().unwrap()]), "");
}

#[test]
fn wrong_usage_is_two_and_bad_wishes_are_one() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, _file) = file_of(dir.path(), 64 << 20);
    for wrong in [vec![], vec!["--slots", "0", &spec], vec!["--size", "big", &spec], vec![&*spec, "--what"]] {
        assert_eq!(run("mkfs", &wrong).status.code(), Some(2), "{wrong:?}");
    }
    refused(&["--label", &"x".repeat(65), &spec], &["64 bytes"]);
    refused(&["--slots", "256", &spec], &["no room"]);
    refused(&["--size", "1M", &spec], &["too small"]);
    refused(&["/nonexistent/device"], &["--size"]);
    refused(&["/dev/null"], &["neither"]);
    assert_eq!(run("mkfs", &["--help"]).status.code(), Some(0));
}

#[test]
fn nothing_beyond_the_volume_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    for logical_block in ["512", "4096"] {
        let (spec, file) = file_of(dir.path(), 48 << 20);
        let guard = vec![0x5a; 16 << 20];
        file.write_all_at(&guard, 32 << 20).unwrap();
        made(&["--size", "32M", "--logical-block", logical_block, &spec]);
        let mut back = vec![0; 16 << 20];
        file.read_exact_at(&mut back, 32 << 20).unwrap();
        assert!(back == guard);
        assert_eq!(file.metadata().unwrap().size(), 48 << 20);
        let status = run("lunfs", &["status", &spec]);
        assert!(status.status.success() && out(&status).contains("size   32 MiB"), "{}", out(&status));
    }
}

#[test]
fn a_blank_64_tib_file_takes_seconds_and_little_space() {
    // ext4 ends at 16 TiB; tmpfs does not. Use whatever takes such a file.
    for dir in ["/tmp", "/dev/shm", "/var/tmp"] {
        let Ok(dir) = tempfile::tempdir_in(dir) else { continue };
        let path = dir.path().join("huge");
        let spec = path.to_str().unwrap();
        if File::create(&path).and_then(|f| f.set_len(64 << 40)).is_err() {
            continue;
        }
        fs::remove_file(&path).unwrap();
        let started = Instant::now();
        let text = made(&["--size", "64T", spec]);
        let elapsed = started.elapsed();
        let allocated = fs::metadata(&path).unwrap().blocks() * 512;
        println!("64 TiB in {elapsed:?}, {allocated} bytes allocated\n{text}");
        assert!(elapsed.as_secs() < 20, "{elapsed:?}");
        assert!(allocated < 64 << 20, "{allocated}");
        assert!(run("lunfs", &["locks", "--scan", spec]).status.success());
        return;
    }
    println!("no filesystem here takes a file of 64 TiB: not tested");
}

#[test]
fn a_mounted_or_attached_device_is_refused_even_with_force() {
    let dir = tempfile::tempdir().unwrap();
    let (spec, _file) = file_of(dir.path(), 32 << 20);
    let Some(loop_device) = attach(&spec) else {
        println!("no loop devices here: not tested");
        return;
    };
    refused(&["--force", &spec], &["backing file", &loop_device]);
    assert!(Command::new("mkfs.ext4").args(["-q", "-F", &loop_device]).status().unwrap().success());
    let mount_point = dir.path().join("mnt");
    fs::create_dir(&mount_point).unwrap();
    let mounted = Command::new("mount").arg(&loop_device).arg(&mount_point).status().unwrap().success();
    let output = run("mkfs", &["--force", &loop_device]);
    if mounted {
        Command::new("umount").arg(&mount_point).status().unwrap();
    }
    detach(&loop_device);
    if mounted {
        assert_eq!(output.status.code(), Some(1));
        assert!(err(&output).contains("is mounted on"), "{}", err(&output));
    }
}

fn attach(file: &str) -> Option<String> {
    let output = Command::new("losetup").args(["--find", "--show", file]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn detach(device: &str) {
    Command::new("losetup").args(["--detach", device]).status().unwrap();
}

#[test]
fn a_moving_heartbeat_is_refused_even_with_force_and_a_dead_one_is_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::tiny(dir.path());
    let population = volume.populate();
    let words = ["'alpha'", "slot 0"];
    while_beating(&volume, &population.records[..1], || {
        let output = run("mkfs", &["--force", volume.spec()]);
        assert_eq!(output.status.code(), Some(1));
        assert!(words.iter().all(|w| err(&output).contains(w)), "{}", err(&output));
    });
    let before = volume.fingerprint();
    refused(&[volume.spec()], &["'handmade'", "--force"]);
    assert_eq!(volume.fingerprint(), before);
    let started = Instant::now();
    made(&["--force", volume.spec()]);
    // Its dead time and its hold time.
    assert!(started.elapsed().as_millis() >= 600);
    // Nothing of the old volume is believed any more.
    let device = volume.device();
    let now = lunfs::inspect::Volume::open(&*device).unwrap();
    assert_ne!(now.id(), volume.superblock.volume);
    let scan = run("lunfs", &["locks", "--scan", "--json", volume.spec()]);
    let scan: Value = serde_json::from_slice(&scan.stdout).unwrap();
    assert_eq!(scan["locks"].as_array().unwrap().len(), 0);
    assert!(now.lock(lock_of_inode(population.disk)).is_err());
}

#[test]
fn status_and_locks_tell_who_lives_who_waits_and_for_what() {
    let dir = tempfile::tempdir().unwrap();
    let volume = Volume::tiny(dir.path());
    let population = volume.populate();
    let json = |args: &[&str]| -> Value {
        let output = run("lunfs", args);
        assert!(output.status.success(), "{}{}", err(&output), out(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let spec = volume.spec();
    while_beating(&volume, &population.records[..2], || {
        let status = json(&["status", "--json", spec]);
        assert!((100..2000).contains(&status["watched_ms"].as_u64().unwrap()), "{status}");
        let verdicts: Vec<_> = status["hosts"].as_array().unwrap().iter().map(|h| &h["verdict"]).collect();
        assert_eq!(verdicts, ["moving", "moving", "silent", "ended"]);
        let alpha = &status["hosts"][0];
        assert!(alpha["host"] == "alpha" && alpha["incarnation"] == 1, "{alpha}");
        assert!(alpha["clock_skew_ms"].as_i64().unwrap().abs() < 1000);
        assert!(alpha["unchanged_ms"].as_u64().unwrap() < 500);
        assert_eq!(status["volume"]["label"], "handmade");
        assert_eq!(status["volume"]["used_bytes"], 100 * 4096);
        let wait = &status["waits"][0];
        assert!(wait["waiter"]["host"] == "beta" && wait["want"] == "exclusive", "{wait}");
        assert_eq!(wait["record"]["holders"][0]["host"], "alpha");
        assert_eq!(wait["record"]["path"], "/vms/disk.img");
        assert_eq!(wait["record"]["inode"], population.disk.0);
        assert_eq!(wait["swaps_since_begin"], 3);
        assert!(wait["seen_for_ms"].as_u64().unwrap() > 0);
        assert!(status["waits"][1]["problem"].as_str().unwrap().contains("0x5 is not the place of a lock"));

        let long = json(&["status", "--json", "--watch-ms", "700", spec]);
        assert_eq!(long["hosts"][2]["verdict"], "dead");

        let locks = json(&["locks", "--json", "--scan", spec]);
        assert_eq!(locks["contended"].as_array().unwrap().len(), 1);
        let paths: Vec<_> = locks["locks"].as_array().unwrap().iter().map(|l| &l["path"]).collect();
        assert_eq!(paths, [&Value::from("/"), &Value::from("/vms/disk.img"), &Value::Null]);
        let root = &locks["locks"][0];
        assert!(root["mode"] == "shared" && root["holders"].as_array().unwrap().len() == 2, "{root}");
        assert_eq!(locks["locks"][1]["next"]["host"], "beta");
        assert_eq!(
            (&locks["locks"][2]["kind"], &locks["locks"][2]["cluster"]),
            (&"cluster".into(), &1.into())
        );

        for args in [vec!["status", spec], vec!["locks", spec], vec!["locks", "--scan", spec]] {
            let text = out(&run("lunfs", &args));
            println!("$ lunfs {}\n{text}", args.join(" "));
            assert!(text.contains("/vms/disk.img") && text.contains("alpha/0"), "{text}");
        }
    });
    let orphan = Geometry::tiny(4).orphan_directory(Slot(1));
    let device = volume.device();
    let open = lunfs::inspect::Volume::open(&*device).unwrap();
    let path = lunfs::inspect::path::Paths::new(&open).of(orphan);
    assert_eq!(path.as_deref(), Some("<orphans of slot 1>"));
}
