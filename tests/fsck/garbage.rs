//! Garbage in any blocks: a check ends, a repair ends, and what is left mounts.

use lunfs::fsck::repair::Allow;
use lunfs::layout::seal;
use lunfs::rt::sim::{SimRng, Simulation, seeds};
use lunfs::types::{BlockNo, Slot};

use super::broken::{Broken, populated};

/// Blocks of the population that a structure begins in.
fn structures(v: &Broken) -> Vec<BlockNo> {
    let begins = |at: &BlockNo| v.get(*at)[..2] == *b"Ln";
    (0..v.geometry.size_blocks).map(BlockNo).filter(begins).collect()
}

#[test]
fn garbage_anywhere_is_repaired_or_refused() {
    let populated = populated();
    let (mut whole, mut refused) = (0, 0);
    for seed in seeds(0..60) {
        let ended = Simulation::new(seed).run(move || {
            let v = Broken::new(populated);
            let mut rng = SimRng::new(seed, 9);
            let structures = structures(&v);
            let slots = v.geometry.slot(Slot(0)).0..v.geometry.doorbell(Slot(0)).0;
            for _ in 0..rng.between(1, 6) {
                let at = structures[rng.below(structures.len() as u64) as usize];
                let mut block = v.get(at);
                // Half of the time beyond the header and with a good checksum, so that the checks behind are met.
                let sealed = rng.below(2) == 0;
                let superblock = block[..4] == *b"LnSB";
                for _ in 0..rng.between(1, 20) {
                    let first = if sealed { 0x40 } else { 0 };
                    let place = rng.between(first, 0x200) as usize;
                    // A dead time of years is waited for.
                    if sealed
                        && (superblock && (0x78..0x88).contains(&place)
                            || slots.contains(&at.0) && (0xc8..0xd8).contains(&place))
                    {
                        continue;
                    }
                    block[place] = rng.below(256) as u8;
                }
                if sealed {
                    let record = matches!(&block[..4], b"LnLK" | b"LnHB" | b"LnDB");
                    let len = if record { 512 } else { 4096 };
                    seal(&mut block[..len]);
                }
                v.put(at, &block[..]);
            }
            let Some((repaired, told)) = v.try_repair(Allow::Everything) else { return false };
            let told: Vec<String> = told.iter().map(ToString::to_string).collect();
            assert_eq!(repaired.report.errors, 0, "seed {seed}: errors left; told {told:#?}");
            let left: Vec<String> = v.check().1.iter().map(ToString::to_string).collect();
            assert!(left.is_empty(), "seed {seed}: found again: {left:#?}; told {told:#?}");
            v.listing();
            let left: Vec<String> = v.check().1.iter().map(ToString::to_string).collect();
            assert!(left.is_empty(), "seed {seed}: after a mount: {left:#?}; told {told:#?}");
            true
        });
        (whole, refused) = if ended { (whole + 1, refused) } else { (whole, refused + 1) };
    }
    assert!(whole > 4 * refused, "{whole} repaired, {refused} refused");
}
