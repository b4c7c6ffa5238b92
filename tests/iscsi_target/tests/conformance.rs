//! What libiscsi's own test suite says about the target: nothing may fail, and what it skips is on a list.
//!
//! The suite is other people's reading of the standards, so this is also the check that target and product don't share
//! a misunderstanding about a command.

use std::collections::BTreeSet;
use std::process::Command;

use lunfs_test_target::others::find_program;
use lunfs_test_target::{Config, LunConfig, Personality, Target};

/// Why tests of the suite may skip themselves. Everything else that is skipped fails the test.
const MAY_SKIP: &[(&str, &str)] = &[
    ("RESERVE6 is not implemented", "the reservations of SCSI-2; hosts of today don't use them"),
    ("WRITEATOMIC16 is not implemented", "no host here uses it"),
    ("EXTENDEDCOPY is not implemented", "copy offload is not offered"),
    ("RECEIVE_COPY_RESULTS is not implemented", "copy offload is not offered"),
    ("RECEIVECOPYRESULT is not implemented", "copy offload is not offered"),
    ("GET_LBA_STATUS is not implemented", "nothing here asks which blocks are provisioned"),
    ("GETLBASTATUS is not implemented", "nothing here asks which blocks are provisioned"),
    ("READDEFECTDATA", "there are no defects"),
    ("--allow-sanitize flag is not set", "nobody sanitizes"),
    ("Logical unit is not removable", "a disk"),
    ("Media is not removable", "a disk"),
    ("Logical unit is not write-protected", "the unit of this test can be written"),
    ("WRITESAME16 does not support 0-blocks", "WSNZ is set: a WRITE SAME of no blocks is refused"),
    ("WRITESAME10 does not support 0-blocks", "WSNZ is set: a WRITE SAME of no blocks is refused"),
    ("LBPPB < 2", "about physical blocks larger than logical ones; run with another unit below"),
    ("Multipath unavailable", "about two paths; run with two below"),
];

/// Runs a group and gives the number of tests that passed. Nothing may fail.
fn run(group: &str, urls: &[String]) -> Option<u32> {
    let Some(program) = find_program("iscsi-test-cu") else {
        println!("SKIPPED: iscsi-test-cu is not installed (apt-get install libiscsi-bin)");
        return None;
    };
    let output = Command::new("timeout")
        .args(["120".as_ref(), program.as_os_str()])
        .args(["--dataloss", "--ignore", "-t", group])
        .args(urls)
        .output()
        .unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let counts = text.lines().find(|line| line.trim_start().starts_with("tests "));
    let counts = counts.unwrap_or_else(|| panic!("no summary from the suite:\n{text}"));
    let numbers: Vec<u32> = counts.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [total, ran, passed, failed, ..] = numbers[..] else {
        panic!("another summary than expected: {counts}")
    };
    assert!(failed == 0 && ran == total && passed == ran, "{group}: {counts}\n{text}");
    let skipped: BTreeSet<&str> =
        text.lines().filter_map(|line| line.split_once("[SKIPPED]")).map(|(_, why)| why.trim()).collect();
    for line in &skipped {
        assert!(MAY_SKIP.iter().any(|(reason, _)| line.contains(reason)), "{group}: not on the list: {line}");
    }
    println!("{group}: {passed} passed, {} reasons to skip", skipped.len());
    Some(passed)
}

#[test]
fn all_scsi_groups() {
    let target = Target::start(Config::memory(256 << 20)).unwrap();
    if let Some(passed) = run("SCSI", &[target.url(1)]) {
        assert!(passed >= 200, "{passed}");
    }
}

#[test]
fn blocks_of_4096_bytes_in_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let lun = LunConfig::new(1, 64 << 20).block_bytes(4096).file(directory.path().join("lun"));
    let target = Target::start(Config::of(lun)).unwrap();
    for group in [
        "SCSI.Read16",
        "SCSI.Write16",
        "SCSI.CompareAndWrite",
        "SCSI.Unmap",
        "SCSI.WriteSame16",
        "SCSI.Prout*",
    ] {
        run(group, &[target.url(1)]);
    }
}

#[test]
fn physical_blocks_longer_compare_and_writes_and_a_volatile_cache() {
    let personality = Personality {
        physical_exponent: 3,
        compare_and_write_blocks: 16,
        volatile_cache: true,
        ..Personality::default()
    };
    let target = Target::start(Config::of(LunConfig::new(1, 256 << 20).personality(personality))).unwrap();
    for group in
        ["SCSI.CompareAndWrite", "SCSI.Unmap", "SCSI.WriteSame*", "SCSI.ReadCapacity*", "SCSI.ModeSense6"]
    {
        run(group, &[target.url(1)]);
    }
}

#[test]
fn the_iscsi_groups() {
    let target = Target::start(Config::memory(256 << 20)).unwrap();
    if let Some(passed) = run("iSCSI", &[target.url(1)]) {
        assert!(passed >= 15, "{passed}");
    }
}

#[test]
fn two_paths_to_one_unit() {
    let target = Target::start(Config::memory(256 << 20)).unwrap();
    if let Some(passed) = run("ALL.MultipathIO", &[target.url(1), target.url(1)]) {
        assert!(passed >= 4, "{passed}");
    }
}
