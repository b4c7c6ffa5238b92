//! Rules between a daemon and its kernel, taken out one by one: the ordinary tests of several mounts must notice the
//! lack of each.
//!
//! A body runs in a child process of its own, whose daemons have the bug (`rt::planted`), and must fail in the way that
//! the bug makes it fail. That the same bodies pass with all rules in place is what the ordinary run shows.
#![cfg(debug_assertions)]

use std::process::Command;

use lunfs::rt::planted::{Bug, VARIABLE};

use super::harness::can_mount;

/// Tries for a body that meets the bug only if the moment is right.
const TRIES: u32 = 3;

/// Who notices that a rule is taken out, and with which words.
fn noticed_by(bug: Bug) -> (&'static str, &'static str) {
    match bug {
        Bug::KernelPagesKept => ("caches::no_stale_pages::file_4096", "STALE"),
        Bug::KernelInodesKept => ("caches::no_stale_kept_attributes::file_4096", "STALE"),
        Bug::KernelNamesKept => ("caches::no_stale_moved_names::file_4096", "STALE"),
        Bug::GuardOnlyAborts => {
            ("guard::a_killed_host_shows_nothing_old_while_another_takes_over", "old after the change")
        }
        Bug::WritableOpensShared => ("mappings::stores_are_seen_elsewhere::file_4096", "STALE"),
        other => panic!("{other:?} is a matter of simulations"),
    }
}

/// What one run of a test of this program says; `Err`: it failed.
fn run(test: &str, bug: Bug) -> Result<String, String> {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    command.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(VARIABLE, format!("{bug:?}"));
    let output = command.output().expect("it runs");
    let said =
        [output.stdout, output.stderr].map(|said| String::from_utf8_lossy(&said).into_owned()).concat();
    assert!(said.contains("running 1 test\n"), "there is no test {test}: {said}");
    if output.status.success() { Ok(said) } else { Err(said) }
}

fn is_noticed(bug: Bug) {
    if !can_mount() {
        return;
    }
    let (test, words) = noticed_by(bug);
    for number in 1..=TRIES {
        if let Err(said) = run(test, bug) {
            assert!(said.contains(words), "{test} failed in another way: {said}");
            println!("{bug:?}: noticed by {test} in run {number}");
            return;
        }
    }
    panic!("{bug:?}: {TRIES} runs of {test} noticed nothing");
}

#[test]
fn pages_that_the_kernel_keeps_are_noticed() {
    is_noticed(Bug::KernelPagesKept);
}

#[test]
fn attributes_that_the_kernel_keeps_are_noticed() {
    is_noticed(Bug::KernelInodesKept);
}

#[test]
fn names_that_the_kernel_keeps_are_noticed() {
    is_noticed(Bug::KernelNamesKept);
}

#[test]
fn a_guard_that_only_aborts_is_noticed() {
    is_noticed(Bug::GuardOnlyAborts);
}

#[test]
fn a_file_shared_while_open_for_writing_is_noticed() {
    is_noticed(Bug::WritableOpensShared);
}
