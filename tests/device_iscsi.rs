//! The `iscsi` backend against targets: the tests' own, with faults, and two independent ones beside it (tgtd, istgt), so
//! that both sides can't share a misunderstanding. Those are used where they are installed; else it says SKIPPED.
#![cfg(all(feature = "iscsi", target_os = "linux"))]

#[path = "device_iscsi/check.rs"]
mod check;
#[path = "device_iscsi/every.rs"]
mod every;
#[path = "device_iscsi/faults.rs"]
mod faults;
#[path = "device_iscsi/hold.rs"]
mod hold;
#[path = "device_iscsi/targets.rs"]
mod targets;

mod devices;

use std::sync::Arc;

use lunfs::device::BlockDevice;
use lunfs::device::open::{OpenOptions, open_device};
use targets::Lun;

/// A handle with sessions of its own.
pub fn open(url: &str, reservations: bool) -> Arc<dyn BlockDevice> {
    let options = OpenOptions { reservations, ..OpenOptions::default() };
    open_device(url, options).unwrap_or_else(|e| panic!("{e}"))
}

fn on_targets(body: impl Fn(devices::Open<'_>)) {
    targets::each(|lun: &Lun| {
        eprintln!("on {}", lun.name());
        body(&|| open(&lun.url(), false));
    });
}

#[test]
fn a_miscompare_leaves_the_block_alone() {
    on_targets(devices::a_miscompare_leaves_the_block_alone);
}

#[test]
fn ranges_are_checked() {
    on_targets(devices::ranges_are_checked);
}

#[test]
fn misaligned_memory_and_large_transfers() {
    on_targets(devices::misaligned_memory_and_large_transfers);
}

#[test]
fn discarded_and_zeroed_ranges() {
    on_targets(devices::discarded_and_zeroed_ranges);
}

#[test]
fn read_only_refuses_every_change() {
    targets::each(|lun| {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        devices::read_only_refuses_every_change(&*open_device(&lun.url(), options).unwrap());
    });
}

#[test]
fn a_fenced_writer_is_refused_and_registers_anew() {
    // tgtd forgets its reservation when the first who registered is fenced; see the verdicts in `check`.
    targets::each_own(|lun| {
        devices::a_fenced_writer_is_refused_and_registers_anew(&|| open(&lun.url(), true))
    });
}

/// 100,000 contended compare-and-writes on each target.
#[test]
fn four_handles_count_exactly() {
    targets::each(|lun| {
        let since = std::time::Instant::now();
        let tally = devices::handles_count_exactly(&|| open(&lun.url(), false), 4, 1, 25_000);
        eprintln!("{}: {tally:?} in {:?}", lun.name(), since.elapsed());
    });
}

#[test]
fn wrong_addresses_and_units_are_refused_in_words() {
    let lun = Lun::own(512);
    let url = lun.url();
    let refusal = |url: &str, options: OpenOptions| match open_device(url, options) {
        Ok(_) => panic!("{url} was opened"),
        Err(e) => e.to_string(),
    };
    let plain = OpenOptions::default;
    let no_lun = format!("{}/77", url.rsplit_once('/').unwrap().0);
    assert!(refusal(&no_lun, plain()).contains("no such logical unit"), "{}", refusal(&no_lun, plain()));
    let other = url.replace(":vol/", ":no-such/");
    assert!(refusal(&other, plain()).contains("logging in"), "{}", refusal(&other, plain()));
    let sized = OpenOptions { create_size: Some(1 << 30), ..plain() };
    assert!(refusal(&url, sized).contains("fixed size"));
    let blocks = OpenOptions { logical_block_bytes: Some(4096), ..plain() };
    assert!(refusal(&url, blocks).contains("4096"));
    // Nobody listens there.
    let nobody = "iscsi://127.0.0.1:1/iqn.2026-01.org.example:x/1";
    assert!(refusal(nobody, plain()).contains("connecting"), "{}", refusal(nobody, plain()));
}
