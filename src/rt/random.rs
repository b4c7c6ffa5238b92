//! Random numbers: nonces, backoff, choices.
//!
//! Invariant: outside a simulation they come from a cryptographic generator seeded by the kernel, so
//! that nonces of different hosts never meet; inside they follow from the simulation's seed.
//!
//! Not for keys or anything that must stay secret.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use rand::rngs::StdRng;
use rand::{RngCore, SeedableRng};

use super::clock::Instant;
use super::sim::hooks;
use super::sim::rng::mix;

thread_local! {
    static GENERATOR: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// 64 random bits.
pub fn random_u64() -> u64 {
    if let Some(number) = hooks::random_u64() {
        return number;
    }
    let generated = GENERATOR.try_with(|cell| {
        let mut slot = cell.try_borrow_mut().ok()?;
        if slot.is_none() {
            *slot = StdRng::try_from_os_rng().ok();
        }
        slot.as_mut().map(RngCore::next_u64)
    });
    match generated {
        Ok(Some(number)) => number,
        _ => makeshift(),
    }
}

/// For a thread that is ending (its generator is gone) or a kernel without random numbers.
fn makeshift() -> u64 {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    mix(mix(Instant::now().as_nanos()) ^ mix(u64::from(std::process::id()) << 32 | count))
}
