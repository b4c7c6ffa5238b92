//! What LunFS builds on, asked of two kernels without LunFS: compare-and-write, direct reads, fencing.

use std::time::Duration;

use crate::machine::PATIENCE;
use crate::pair::Pair;

/// Blocks of a page, of which the LUN has eight.
const PAGE: u64 = 8;

/// Both count one number up by compare-and-write; none is lost, none is made twice.
pub fn swaps_are_exact(pair: &Pair, times: u64) {
    // On a busy machine one may have done before the other begins; that proves nothing, so once more.
    for round in 1..=20 {
        let said = pair.both(&format!("agent scsi count /dev/sda 0 {times} $n"));
        eprintln!("{said:?}");
        let block = pair.target.read(1, 0, 1).expect("a block");
        let value = u64::from_le_bytes(block[..8].try_into().expect("8 bytes"));
        assert_eq!(value, round * 2 * times, "{said:?}");
        if said.iter().all(|line| !line.ends_with("miscompares 0")) {
            return;
        }
    }
    panic!("they never met");
}

/// What one wrote with direct I/O, the other reads; a compare-and-write that doesn't match changes nothing.
pub fn direct_reads_see_direct_writes(pair: &Pair, rounds: u64) {
    let [one, other] = &pair.guests[..] else { panic!("two guests") };
    for n in 1..=rounds {
        let (writer, reader) = if n % 2 == 0 { (one, other) } else { (other, one) };
        let byte = n % 250;
        writer.run(&format!("agent scsi write /dev/sda {PAGE} {byte}"));
        assert_eq!(reader.run(&format!("agent scsi read /dev/sda {PAGE}")), byte.to_string());
    }
    let lba = 2 * PAGE;
    one.run(&format!("agent scsi write /dev/sda {lba} 1"));
    let missed = other.try_run(&format!("agent scsi swap /dev/sda {lba} 2 3"));
    assert_eq!((missed.status, missed.text().as_str()), (Some(3), "Miscompare"));
    assert_eq!(one.run(&format!("agent scsi read /dev/sda {lba}")), "1");
    other.run(&format!("agent scsi swap /dev/sda {lba} 1 3"));
    assert!(one.run(&format!("agent scsi read /dev/sda {lba}")).starts_with("mixed [3, 3"));
}

/// A guest is frozen while it writes, compares and writes, and unmaps. The other preempts it; when it wakes up, each of the
/// three is refused and nothing of it reaches the LUN.
pub fn a_frozen_guest_is_fenced(pair: &Pair) {
    let [frozen, other] = &pair.guests[..] else { panic!("two guests") };
    let (lba, pages) = (10 * PAGE, 3);
    frozen.run("agent scsi register /dev/sda 17");
    other.run("agent scsi register /dev/sda 34");
    other.run("agent scsi reserve /dev/sda 34");
    assert_eq!(frozen.run("agent scsi keys /dev/sda"), "[17, 34]");
    let load = frozen.start_command(&format!("agent scsi change /dev/sda {lba}"));
    for name in ["write", "swap", "unmap"] {
        load.wait_for(&format!("{name} began"), PATIENCE);
    }
    frozen.freeze();
    // Before it was frozen it changed all three pages.
    assert!(pair.changes_of(0, 0).len() > 3);
    other.run("agent scsi preempt /dev/sda 34 17");
    let fenced = pair.target.trace_last();
    for page in 0..pages {
        other.run(&format!("agent scsi write /dev/sda {} 200", lba + page * PAGE));
    }
    std::thread::sleep(Duration::from_secs(1));
    assert!(load.so_far().status.is_none(), "it is frozen");
    frozen.thaw();
    let said = load.end(PATIENCE);
    eprintln!("{}", said.text());
    assert_eq!(said.status, Some(0), "{said:#?}");
    for name in ["write", "swap", "unmap"] {
        assert!(said.out.iter().any(|line| line.starts_with(&format!("{name} refused"))), "{said:#?}");
    }
    assert!(pair.changes_of(0, fenced).is_empty(), "{:#?}", pair.changes_of(0, fenced));
    let refused = pair.refused(0, fenced);
    for opcode in [0x89, 0x42] {
        assert!(refused.iter().any(|entry| entry.opcode == opcode), "{opcode:#x} in {refused:#?}");
    }
    for page in 0..pages {
        assert_eq!(other.run(&format!("agent scsi read /dev/sda {}", lba + page * PAGE)), "200");
    }
    // Its kernel says so as well, and reading is no harm.
    assert!(frozen.run("dmesg").contains("reservation conflict"));
    assert_eq!(frozen.run(&format!("agent scsi read /dev/sda {lba}")), "200");
    let late = frozen.try_run(&format!("agent scsi write /dev/sda {lba} 9"));
    assert_eq!((late.status, late.text().as_str()), (Some(4), "Conflict"), "{late:#?}");
    // PERSISTENT RESERVE OUT, CLEAR: the next scenario begins without.
    other.run("agent scsi clear /dev/sda 34");
    frozen.run(&format!("agent scsi write /dev/sda {lba} 9"));
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn kernels_swap_exactly() {
    Pair::boot().iter().for_each(|pair| swaps_are_exact(pair, 10_000));
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn kernels_read_what_the_other_wrote() {
    Pair::boot().iter().for_each(|pair| direct_reads_see_direct_writes(pair, 100));
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn kernels_fence() {
    Pair::boot().iter().for_each(|pair| {
        for _ in 0..3 {
            a_frozen_guest_is_fenced(pair);
        }
    });
}
