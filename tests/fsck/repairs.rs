//! One deliberate corruption for each finding: exactly that finding, one repair, then a clean volume that mounts and
//! shows its files.

use std::collections::BTreeSet;

use lunfs::fsck::finding::{Kind, Repair};
use lunfs::fsck::repair::Allow;
use lunfs::rt::sim::Simulation;

use super::broken::{Broken, populated};
use super::cases::CASES;

#[test]
fn each_finding_is_found_alone_and_repaired() {
    let only = std::env::var("LUNFS_FSCK_CASE").ok();
    let mut failed = Vec::new();
    for (number, (kind, harm, gone, new)) in CASES.iter().enumerate() {
        if only.as_ref().is_some_and(|only| only != kind.name()) {
            continue;
        }
        let populated = populated();
        let run = || {
            Simulation::new(number as u64).run(move || {
                let v = Broken::new(populated);
                let what = format!("case {number}, {}", kind.name());
                assert_eq!(v.check().1, [], "{what}: before");
                harm(&v);
                let found = v.check().1;
                let said: Vec<String> = found.iter().map(ToString::to_string).collect();
                assert!(found.len() == 1 && found[0].kind == *kind, "{what}: found {said:#?}");
                if kind.repair() == Repair::Lossy {
                    let (left, _) = v.repair(Allow::Safe);
                    assert!(left.report.errors > 0, "{what}: -p repaired it");
                }
                let (repaired, told) = v.repair(Allow::Everything);
                let told: Vec<String> = told.iter().map(ToString::to_string).collect();
                assert_eq!((repaired.report.errors, repaired.report.notes), (0, 0), "{what}: {told:#?}");
                let left: Vec<String> = v.check().1.iter().map(ToString::to_string).collect();
                assert!(left.is_empty(), "{what}: after its repair: {left:#?}; told {told:#?}");

                let after = v.listing();
                let generic = |name: &String| {
                    let hex = |part: &&str| part.len() == 16 && part.starts_with("0000");
                    let ino = name.split(['/', '.']).find(hex).map(str::to_owned);
                    let small = format!(".{:x}", v.inodes.small.0);
                    ino.map_or(name.clone(), |ino| name.replace(&ino, "INO")).replace(&small, ".INO")
                };
                let differ =
                    |one: &super::broken::Listing, two: &super::broken::Listing| -> BTreeSet<String> {
                        one.iter()
                            .filter(|(name, was)| two.get(*name) != Some(was))
                            .map(|(name, _)| generic(name))
                            .collect()
                    };
                let set = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<BTreeSet<_>>();
                assert_eq!(differ(&populated.listing, &after), set(gone), "{what}: gone or changed");
                assert_eq!(differ(&after, &populated.listing), set(new), "{what}: new or changed");
                let left: Vec<String> = v.check().1.iter().map(ToString::to_string).collect();
                assert!(left.is_empty(), "{what}: after a mount: {left:#?}");
            })
        };
        // All cases are seen, whatever becomes of one.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).is_err() {
            failed.push(format!("{number} ({})", kind.name()));
        }
    }
    assert!(failed.is_empty(), "cases that failed, each with its panic above: {failed:?}");
}

#[test]
fn each_finding_has_its_case() {
    let cases: BTreeSet<Kind> = CASES.iter().map(|case| case.0).collect();
    let elsewhere = BTreeSet::from([Kind::JournalPending]);
    let all: BTreeSet<Kind> = Kind::ALL.iter().copied().collect();
    assert_eq!(all.difference(&cases).copied().collect::<BTreeSet<_>>(), elsewhere);
}
