//! `lunfs check-device` and mkfs on targets that are right, and on those that lie: each verdict in words.

use std::process::{Command, Output};

use lunfs_test_target::others::{Istgt, Tgtd, TgtdOptions};
use lunfs_test_target::personality::CompareAndWrite;
use lunfs_test_target::{Chap, Config, Personality, Target};
use serde_json::Value;

use super::targets::{Lun, skip};

fn lunfs(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lunfs")).args(args).output().expect("it runs")
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The verdict with everything asked, and the exit status.
fn verdict(url: &str) -> (String, i32) {
    let done = lunfs(&["check-device", "--json", "--exclusive", "--with-reservations", url]);
    let report: Value =
        serde_json::from_slice(&done.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(&done)));
    eprintln!("{report:#}");
    (report["words"].as_str().expect("words").to_owned(), done.status.code().expect("a status"))
}

#[test]
fn a_target_that_is_right_is_good() {
    for block_bytes in [512, 4096] {
        assert_eq!(verdict(&Lun::own(block_bytes).url()), ("good".into(), 0));
    }
}

#[test]
fn lies_are_found_out_and_mkfs_refuses() {
    let with = |compare_and_write| Personality { compare_and_write, ..Personality::default() };
    for (personality, words) in [
        (with(CompareAndWrite::Unsupported), "does not support compare-and-write"),
        (with(CompareAndWrite::DoesNothing), "does not write"),
        (with(CompareAndWrite::WritesBlindly), "was not what was expected"),
        (with(CompareAndWrite::Racy), "not atomic"),
    ] {
        let lun = Lun::with(512, personality);
        let (found, status) = verdict(&lun.url());
        assert!(found.starts_with("do not use") && found.contains(words), "{found}");
        assert_eq!(status, 4);
        let made = lunfs(&["mkfs", &lun.url()]);
        assert!(!made.status.success() && text(&made).contains(words), "{}", text(&made));
    }
}

#[test]
fn reservations_that_are_none_are_found_out() {
    let cases = [
        (Personality { reservations: false, ..Personality::default() }, "the device has none"),
        (
            Personality { reservations_cover_unmap: false, ..Personality::default() },
            "of a fenced host: executed",
        ),
        (
            Personality {
                compare_and_write: CompareAndWrite::AtomicUntilEndedEarly,
                ..Personality::default()
            },
            "compare-and-writes after a conflict",
        ),
    ];
    for (personality, words) in cases {
        let lun = Lun::with(512, personality);
        let (found, status) = verdict(&lun.url());
        assert!(found.starts_with("good without reservations") && found.contains(words), "{found}");
        assert_eq!(status, 3);
    }
}

/// Whose trial alone would cost every unit of the target its compare-and-writes.
#[test]
fn who_is_known_to_suffer_is_not_tried() {
    let lun = Lun::with(512, Personality { vendor: "LIO-ORG".into(), ..Personality::default() });
    let (found, status) = verdict(&lun.url());
    assert!(found.starts_with("good without reservations") && found.contains("not tried"), "{found}");
    assert_eq!(status, 3);
}

#[test]
fn what_other_targets_get() {
    match Tgtd::start(TgtdOptions::default()) {
        Ok(tgtd) => {
            let (found, status) = verdict(&tgtd.url());
            assert!(found.starts_with("good without reservations"), "{found}");
            assert_eq!(status, 3);
        }
        Err(why) => skip("tgtd", &why),
    }
    match Istgt::start(256 << 20) {
        Ok(istgt) => {
            let (found, _) = verdict(&istgt.url());
            assert!(!found.starts_with("do not use"), "{found}");
        }
        Err(why) => skip("istgt", &why),
    }
}

/// As it comes from its package tgtd says that it can compare and write, and can't; with asynchronous I/O it says GOOD
/// and does nothing.
#[test]
fn what_tgtd_gets_that_is_not_set_up_for_it() {
    let stock = TgtdOptions { compare_and_write: false, ..TgtdOptions::default() };
    let idle = TgtdOptions { backing: "aio", ..TgtdOptions::default() };
    for options in [stock, idle] {
        match Tgtd::start(options.clone()) {
            Ok(tgtd) => {
                let (found, status) = verdict(&tgtd.url());
                assert!(found.starts_with("do not use: compare-and-write"), "{options:?}: {found}");
                assert_eq!(status, 4);
            }
            Err(why) => skip("tgtd", &why),
        }
    }
}

/// Without --exclusive a LUN that carries a volume is not written to, and a mount of it goes on.
#[test]
fn a_volume_is_left_alone() {
    let lun = Lun::own(512);
    let made = lunfs(&["mkfs", "--quiet", &lun.url()]);
    assert!(made.status.success(), "{}", text(&made));
    let done = lunfs(&["check-device", &lun.url()]);
    assert_eq!(done.status.code(), Some(3), "{}", text(&done));
    assert!(text(&done).contains("carries something"), "{}", text(&done));
    let found = lunfs(&["fsck", &lun.url()]);
    assert!(found.status.success(), "{}", text(&found));
}

#[test]
fn a_login_needs_its_password_and_nothing_shows_it() {
    let mut config = Config::memory(256 << 20);
    let chap = |user: &str, secret: &str| Chap {
        user: user.into(),
        secret: secret.into(),
        target_user: String::new(),
        target_secret: String::new(),
    };
    config.chap = Some(chap("anna", "twelve-letters"));
    let target = Target::start(config).expect("the test target starts");
    let plain = target.url(1).replace("iscsi://", "");
    let address = plain.rsplit_once('@').map_or(&*plain, |(_, address)| address);
    let right = format!("iscsi://anna%twelve-letters@{address}");
    let made = lunfs(&["mkfs", &right]);
    assert!(made.status.success(), "{}", text(&made));
    assert!(!text(&made).contains("twelve"), "{}", text(&made));
    let wrong = lunfs(&["mkfs", &format!("iscsi://anna%thirteen-letters@{address}")]);
    assert!(!wrong.status.success() && !text(&wrong).contains("thirteen"), "{}", text(&wrong));
    let by_environment = Command::new(env!("CARGO_BIN_EXE_lunfs"))
        .args(["check-device", &format!("iscsi://anna@{address}")])
        .env("LUNFS_ISCSI_PASSWORD", "twelve-letters")
        .output()
        .expect("it runs");
    assert_eq!(by_environment.status.code(), Some(3), "{}", text(&by_environment));
}
