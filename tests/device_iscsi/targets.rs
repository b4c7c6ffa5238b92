//! LUNs to test on: the tests' own target, and two that other people wrote.

use lunfs_test_target::others::{Istgt, Tgtd, TgtdOptions, Unavailable};
use lunfs_test_target::{Config, LunConfig, Personality, Target};

const SIZE_BYTES: u64 = 256 << 20;

/// One LUN, and the target that goes with it.
pub enum Lun {
    Own { target: Target, name: String },
    Tgtd(Tgtd),
    Istgt(Istgt),
}

impl Lun {
    pub fn own(block_bytes: u32) -> Lun {
        Lun::with(block_bytes, Personality::default())
    }

    pub fn with(block_bytes: u32, personality: Personality) -> Lun {
        let lun = LunConfig::new(1, SIZE_BYTES).block_bytes(block_bytes).personality(personality);
        let target = Target::start(Config::of(lun)).expect("the test target starts");
        Lun::Own { target, name: format!("own target, blocks of {block_bytes}") }
    }

    pub fn url(&self) -> String {
        match self {
            Lun::Own { target, .. } => target.url(1),
            Lun::Tgtd(tgtd) => tgtd.url(),
            Lun::Istgt(istgt) => istgt.url(),
        }
    }

    pub fn name(&self) -> &str {
        match self {
            Lun::Own { name, .. } => name,
            Lun::Tgtd(_) => "tgtd",
            Lun::Istgt(_) => "istgt",
        }
    }
}

/// The tests' own, with blocks of either size.
pub fn each_own(body: impl Fn(&Lun)) {
    body(&Lun::own(512));
    body(&Lun::own(4096));
}

/// Each kind of target, one after the other.
pub fn each(body: impl Fn(&Lun)) {
    each_own(&body);
    let others = [
        ("tgtd", Tgtd::start(TgtdOptions::default()).map(Lun::Tgtd)),
        ("istgt", Istgt::start(SIZE_BYTES).map(Lun::Istgt)),
    ];
    for (name, started) in others {
        match started {
            Ok(lun) => body(&lun),
            Err(why) => skip(name, &why),
        }
    }
}

/// A target that can't be had here is said; one that is there and does not start is a failure.
pub fn skip(name: &str, why: &Unavailable) {
    assert!(why.may_skip(), "{name}: {why}");
    eprintln!("SKIPPED on {name}: {why}");
}
