//! Four sessions count one number up by compare-and-write: is any increment lost?
//!
//! `LUNFS_INCREMENTS` says how often each does, instead of 10,000 times.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use lunfs_test_target::initiator::Login;
use lunfs_test_target::others::{Istgt, Tgtd, TgtdOptions, had};
use lunfs_test_target::{Config, Target};

const LBA: u64 = 8;
const SESSIONS: u64 = 4;

fn number(block: &[u8]) -> u64 {
    u64::from_be_bytes(block[..8].try_into().unwrap())
}

fn increments() -> u64 {
    std::env::var("LUNFS_INCREMENTS").ok().and_then(|text| text.parse().ok()).unwrap_or(10_000)
}

/// What the number is after so many increments by each session, and how many attempts lost.
fn count(portal: SocketAddr, name: &str, lun: u16, each: u64) -> (u64, u64) {
    let login = |n: u64| Login::at(portal, name, &format!("counter-{n}")).lun(lun);
    assert!(login(0).ready().unwrap().write(LBA, &[0; 512], 512).unwrap().is_good());
    let began = Instant::now();
    // A login takes a second on some targets, one after the other.
    let start = &Barrier::new(SESSIONS as usize);
    let lost: u64 = std::thread::scope(|scope| {
        let counters: Vec<_> = (0..SESSIONS)
            .map(|n| {
                let login = login(n);
                scope.spawn(move || {
                    let mut session = login.ready().unwrap();
                    start.wait();
                    let mut lost = 0;
                    for _ in 0..each {
                        loop {
                            let old = session.read(LBA, 1, 512).unwrap().data;
                            let mut new = old.clone();
                            new[..8].copy_from_slice(&(number(&old) + 1).to_be_bytes());
                            // Unique, so that no image comes back.
                            new[8..16].copy_from_slice(&n.to_be_bytes());
                            let done = session.compare_and_write(LBA, &old, &new).unwrap();
                            if done.is_good() {
                                break;
                            }
                            assert!(done.is_miscompare(), "{done:?}");
                            lost += 1;
                        }
                    }
                    lost
                })
            })
            .collect();
        counters.into_iter().map(|counter| counter.join().unwrap()).sum()
    });
    let counted = number(&login(9).ready().unwrap().read(LBA, 1, 512).unwrap().data);
    println!("{name}: {counted}, {lost} attempts lost, {:.1} s", began.elapsed().as_secs_f64());
    (counted, lost)
}

#[test]
fn forty_thousand_on_our_own_target() {
    let target = Target::start(Config::memory(1 << 20)).unwrap();
    let won = Arc::new(AtomicU64::new(0));
    let wins = won.clone();
    target.set_judge(Some(Box::new(move |entry, _| {
        if entry.opcode == 0x89 && entry.won() {
            wins.fetch_add(1, Ordering::Relaxed);
        }
    })));
    let (counted, lost) = count(target.portal(), target.name(), 1, increments());
    assert_eq!(counted, SESSIONS * increments());
    assert_eq!(won.load(Ordering::Relaxed), counted, "each win is one increment");
    assert!(lost > 0, "nobody met anybody");
}

#[test]
fn forty_thousand_on_tgtd() {
    let Some(tgtd) = had(Tgtd::start(TgtdOptions { bytes: 64 << 20, ..TgtdOptions::default() })) else {
        return;
    };
    let (counted, lost) = count(tgtd.portal(), tgtd.name(), 1, increments());
    assert_eq!(counted, SESSIONS * increments());
    assert!(lost > 0, "nobody met anybody");
}

#[test]
fn some_on_istgt() {
    let Some(istgt) = had(Istgt::start(64 << 20)) else { return };
    let (counted, _) = count(istgt.portal(), &istgt.name(), 0, 1_000);
    assert_eq!(counted, SESSIONS * 1_000);
}
