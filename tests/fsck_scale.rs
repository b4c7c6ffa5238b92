//! What does a check of a large volume cost, and does it find in it what is wrong and nothing else? On a device
//! that makes up what was not written (`fsck_scale/device.rs`).
//!
//! ```sh
//! cargo test --release --test fsck_scale -- --ignored --nocapture --test-threads=1    # 64 TiB, ten million files
//! ```
//!
//! Each measurement is a process of its own, so that its peak of memory is its own.

#[path = "fsck_scale/breaks.rs"]
mod breaks;
#[path = "fsck_scale/contents.rs"]
mod contents;
#[path = "fsck_scale/device.rs"]
mod device;
#[path = "fsck_scale/measure.rs"]
mod measure;
#[path = "fsck_scale/nodes.rs"]
mod nodes;
#[path = "fsck_scale/shape.rs"]
mod shape;
#[path = "fsck_scale/system.rs"]
mod system;

use std::sync::atomic::Ordering;

use lunfs::fsck::finding::Finding;
use lunfs::fsck::{Limits, check, check_within};

use self::breaks::break_some;
use self::device::Generated;
use self::measure::{Figures, Wish, bound_bytes, measured};

const TIB: u64 = 1 << 40;

#[test]
fn a_generated_volume_is_clean_and_what_breaks_is_found_exactly() {
    let device = Generated::new(TIB, 12_000, 60);
    let mut found: Vec<Finding> = Vec::new();
    let report = check(device.clone(), &mut found).unwrap();
    assert_eq!(found, [], "a volume as it should be");
    let filled = device.filled();
    assert_eq!(report.files, filled * device.shape.files);
    assert_eq!(
        report.directories,
        filled * (1 + device.shape.subs.len() as u64) + 2 + u64::from(device.g().slots)
    );
    assert_eq!((report.orphans, report.rounds), (filled, 1));
    for seed in lunfs::rt::sim::seeds(0..4) {
        let device = Generated::new(TIB, 12_000, 60);
        let expected = break_some(&device, seed);
        let mut found: Vec<Finding> = Vec::new();
        check(device, &mut found).unwrap();
        breaks::compare(seed, &expected, &found);
    }
}

#[test]
fn several_rounds_find_the_same_as_one() {
    for seed in lunfs::rt::sim::seeds(10..13) {
        let device = Generated::new(TIB, 12_000, 60);
        let expected = break_some(&device, seed);
        let mut found: Vec<Finding> = Vec::new();
        let limits = Limits { usage_bytes: 600 << 10, ..Limits::default() };
        let report = check_within(device, limits, &mut found).unwrap();
        assert!((2..40).contains(&report.rounds), "{report:?}");
        breaks::compare(seed, &expected, &found);
    }
}

#[test]
fn memory_stays_within_what_the_documentation_says() {
    let [small, large] =
        [(TIB, 20_000), (4 * TIB, 120_000)].map(|(size, files)| measured(Wish::of(size, files)));
    for figures in [&small, &large] {
        assert!(figures.grown_bytes <= figures.bound_bytes, "{figures:?}");
        assert_eq!(figures.findings, 0, "{figures:?}");
    }
    assert!(large.bound_bytes < bound_bytes(200_000, 10_000) && large.files > 100_000, "{large:?}");
}

#[test]
fn large_volumes_are_read_ahead_and_found_to_be_the_same() {
    for seed in [20, 21] {
        let device = Generated::new(TIB, 12_000, 60);
        device.latency_us.store(200, Ordering::Relaxed);
        let expected = break_some(&device, seed);
        let mut found: Vec<Finding> = Vec::new();
        let usual = Limits::default();
        check_within(device.clone(), Limits { ahead_from_groups: usize::MAX, ..usual }, &mut found).unwrap();
        assert_eq!(device.most_at_once(), 1);
        breaks::compare(seed, &expected, &found);
        let mut again: Vec<Finding> = Vec::new();
        check_within(device.clone(), Limits { usage_bytes: 600 << 10, ..usual }, &mut again).unwrap();
        assert!(device.most_at_once() > 2);
        breaks::compare(seed, &expected, &again);
    }
}

/// The full size; the figures are in `docs/fsck.md`.
#[test]
#[ignore = "minutes, in a release build: docs/fsck.md has the command"]
fn ten_million_files_on_64_tib() {
    let sizes = [(TIB, 100_000), (8 * TIB, 1_000_000), (64 * TIB, 10_000_000)];
    let all = sizes.map(|(size, files)| measured(Wish::of(size, files)));
    let broken = measured(Wish { broken: Some(7), ..Wish::of(64 * TIB, 10_000_000) });
    // Each read takes half a millisecond, as on a LUN: what reading ahead is for.
    let far = Wish { latency_us: 500, ..Wish::of(8 * TIB, 1_000_000) };
    for wish in [Wish { read_ahead: false, ..far }, far] {
        println!("read ahead: {}, 0.5 ms a command\n{}", wish.read_ahead, measured(wish));
    }
    println!("{}", Figures::HEAD);
    all.iter().chain([&broken]).for_each(|figures| println!("{figures}"));
    for figures in all.iter().chain([&broken]) {
        assert!(figures.grown_bytes <= figures.bound_bytes, "{figures:?}");
    }
    assert!(all.iter().all(|figures| figures.findings == 0));
    assert!(all[2].files >= 9_900_000 && broken.findings > 10);
}

/// Not a test of its own: what [`measured`] starts.
#[test]
#[ignore = "no test: the child process that the others measure"]
fn worker() {
    measure::worker();
}
