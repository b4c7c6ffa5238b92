//! What every device has to do, asked of each backend: bodies over a function that opens the device once more.
#![allow(dead_code)]

use std::sync::Arc;

use lunfs::device::{AlignedBuf, BlockDevice, CompareOutcome, DeviceError, Executed, FencingKey};
use lunfs::types::{Incarnation, Owner, Slot};

/// Opens the device under test; each call is a handle of its own.
pub type Open<'a> = &'a dyn Fn() -> Arc<dyn BlockDevice>;

/// The bodies use the first so many bytes.
pub const BYTES: usize = 1 << 20;

pub fn key(life: u64) -> FencingKey {
    FencingKey::of(Owner { slot: Slot(3), incarnation: Incarnation(life) })
}

pub fn read_block(device: &dyn BlockDevice, offset_bytes: u64) -> AlignedBuf {
    let mut block = AlignedBuf::zeroed(device.geometry().logical_block_bytes as usize);
    device.read(offset_bytes, &mut block).unwrap();
    block
}

pub fn counter(block: &[u8]) -> u64 {
    u64::from_le_bytes(block[..8].try_into().unwrap())
}

/// Counts the block up by compare-and-write. The block holds a counter and, for each of 48 writers, the number of
/// its last swap that landed: so an outcome that is not known, or a miscompare that is not true, is decided by
/// the content even when others have written since.
pub fn increment(device: &dyn BlockDevice, offset_bytes: u64, times: u64, writer: u64) -> Tally {
    let place = 64 + (writer % 48) as usize * 8;
    let landed = |block: &[u8]| u64::from_le_bytes(block[place..place + 8].try_into().unwrap());
    let mut known = read_block(device, offset_bytes);
    let mut tally = Tally::default();
    let mut nonce = landed(&known);
    // Swaps of which one may have landed: the numbers after this one.
    let mut last_done = nonce;
    while tally.done < times {
        nonce += 1;
        let mut next = known.clone();
        next[..8].copy_from_slice(&(counter(&known) + 1).to_le_bytes());
        next[place..place + 8].copy_from_slice(&nonce.to_le_bytes());
        match device.compare_and_write(offset_bytes, &known, &next) {
            Ok(CompareOutcome::Swapped) => {
                tally.done += 1;
                last_done = nonce;
                known = next;
                continue;
            }
            Ok(CompareOutcome::Miscompare) => tally.miscompares += 1,
            Err(error) if error.executed() == Executed::No => {
                tally.refused += 1;
                assert!(matches!(error, DeviceError::Io { .. }), "{error}");
                std::thread::sleep(std::time::Duration::from_millis(2));
                continue;
            }
            Err(error) => {
                assert!(!matches!(error, DeviceError::Fenced { .. }), "{error}");
                tally.unknown += 1;
            }
        }
        known = read_block(device, offset_bytes);
        if landed(&known) > last_done {
            tally.done += 1;
            last_done = landed(&known);
        }
    }
    tally
}

/// What became of the tries.
#[derive(Default, Debug, Clone, Copy)]
pub struct Tally {
    pub done: u64,
    pub miscompares: u64,
    pub refused: u64,
    pub unknown: u64,
}

/// Several handles, each with threads of its own, count one block up: no increment may be lost or made twice.
pub fn handles_count_exactly(open: Open<'_>, handles: usize, threads: usize, times: u64) -> Tally {
    let unit = u64::from(open().geometry().logical_block_bytes);
    let devices: Vec<_> = (0..handles).map(|_| open()).collect();
    let before = counter(&read_block(&*devices[0], unit));
    let tallies: Vec<Tally> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..handles * threads)
            .map(|n| {
                let device = &devices[n % handles];
                scope.spawn(move || increment(&**device, unit, times, n as u64 + 1))
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let after = counter(&read_block(&*devices[0], unit));
    assert_eq!(after - before, times * (handles * threads) as u64, "{tallies:?}");
    tallies.iter().fold(Tally::default(), |sum, t| Tally {
        done: sum.done + t.done,
        miscompares: sum.miscompares + t.miscompares,
        refused: sum.refused + t.refused,
        unknown: sum.unknown + t.unknown,
    })
}

pub fn a_miscompare_leaves_the_block_alone(open: Open<'_>) {
    let device = open();
    let unit = device.geometry().logical_block_bytes as usize;
    let at = 2 * unit as u64;
    device.write_zeroes(0, 8 * unit as u64).unwrap();
    device.write(at, &vec![7; unit]).unwrap();
    // One wrong byte at the very end is enough.
    let mut nearly = vec![7; unit];
    nearly[unit - 1] = 8;
    let outcome = device.compare_and_write(at, &nearly, &vec![9; unit]).unwrap();
    assert_eq!(outcome, CompareOutcome::Miscompare);
    assert_eq!(*read_block(&*device, at), vec![7; unit]);
    let outcome = device.compare_and_write(at, &vec![7; unit], &vec![9; unit]).unwrap();
    assert_eq!(outcome, CompareOutcome::Swapped);
    // Another handle sees it at once.
    assert_eq!(*read_block(&*open(), at), vec![9; unit]);
    for neighbour in [at - unit as u64, at + unit as u64] {
        assert_eq!(*read_block(&*device, neighbour), vec![0; unit]);
    }
}

pub fn ranges_are_checked(open: Open<'_>) {
    let device = open();
    let geometry = device.geometry();
    let block_bytes = geometry.logical_block_bytes as usize;
    let end = geometry.size_bytes;
    let mut buf = vec![0; 2 * block_bytes];
    let unit = block_bytes as u64;
    for (offset, len) in [
        (end, block_bytes),
        (end - unit, 2 * block_bytes),
        (u64::MAX - unit + 1, block_bytes),
        (1, block_bytes),
        (0, 100),
        (unit / 2, block_bytes),
    ] {
        let bad = |result: Result<(), DeviceError>| {
            let err = result.unwrap_err();
            assert!(matches!(err, DeviceError::BadRange { .. }), "{offset} {len}: {err}");
            assert_eq!(err.executed(), Executed::No);
        };
        bad(device.read(offset, &mut buf[..len]));
        bad(device.write(offset, &buf[..len]));
        bad(device.discard(offset, len as u64));
        bad(device.write_zeroes(offset, len as u64));
        bad(device.compare_and_write(offset, &buf[..len], &buf[..len]).map(drop));
    }
    // A swap of two blocks, or of images of unequal length, is no swap.
    device.compare_and_write(0, &buf, &buf).unwrap_err();
    device.compare_and_write(0, &buf[..block_bytes], &buf).unwrap_err();
    device.read(end - unit, &mut buf[..block_bytes]).unwrap();
}

pub fn misaligned_memory_and_large_transfers(open: Open<'_>) {
    let device = open();
    let pattern: Vec<u8> = (0..BYTES as u32).map(|i| (i / 512 + i) as u8).collect();
    for shift in [0, 1, 7, 512] {
        let mut memory = vec![0; pattern.len() + shift];
        memory[shift..].copy_from_slice(&pattern);
        device.write_zeroes(0, BYTES as u64).unwrap();
        device.write(0, &memory[shift..]).unwrap();
        memory.fill(0);
        device.read(0, &mut memory[shift..]).unwrap();
        assert!(memory[shift..] == pattern[..], "shift {shift}");
    }
    device.flush().unwrap();
    assert_eq!(device.resets(), 0);
}

pub fn discarded_and_zeroed_ranges(open: Open<'_>) {
    let device = open();
    let unit = device.geometry().logical_block_bytes as usize;
    let discarded = 16 * 4096;
    device.write(0, &vec![5; BYTES]).unwrap();
    // Nothing outside the range may change, whatever becomes of the inside.
    device.discard(unit as u64, discarded as u64).unwrap();
    let mut all = vec![0; BYTES];
    device.read(0, &mut all).unwrap();
    assert!(all[..unit].iter().chain(&all[unit + discarded..]).all(|b| *b == 5));
    let zeroed = 3 * unit..3 * unit + 25 * 4096;
    device.write_zeroes(zeroed.start as u64, zeroed.len() as u64).unwrap();
    device.read(0, &mut all).unwrap();
    assert!(all[zeroed.clone()].iter().all(|b| *b == 0));
    assert!(all[zeroed.end.max(unit + discarded)..].iter().all(|b| *b == 5));
    device.flush().unwrap();
}

pub fn read_only_refuses_every_change(device: &dyn BlockDevice) {
    let block = vec![0; device.geometry().logical_block_bytes as usize];
    device.read(0, &mut block.clone()).unwrap();
    for err in [
        device.write(0, &block).unwrap_err(),
        device.compare_and_write(0, &block, &block).unwrap_err(),
        device.discard(0, 4096).unwrap_err(),
        device.write_zeroes(0, 4096).unwrap_err(),
    ] {
        assert_eq!(err.executed(), Executed::No, "{err}");
    }
}

pub fn a_fenced_writer_is_refused_and_registers_anew(open: Open<'_>) {
    let (writer, other) = (open(), open());
    let unit = writer.geometry().logical_block_bytes as usize;
    let block = |n: u8| vec![n; unit];
    let (writes, others) = (writer.fencing().expect("a fence"), other.fencing().expect("a fence"));
    others.fence(key(6)).unwrap();
    writes.register(key(7)).unwrap();
    writer.write(0, &block(1)).unwrap();
    others.register(key(77)).unwrap();
    others.fence(key(6)).unwrap();
    writer.write(0, &block(2)).unwrap();
    others.fence(key(7)).unwrap();
    for refused in [
        writer.write(0, &block(3)),
        writer.discard(0, 4096),
        writer.write_zeroes(0, 4096),
        writer.compare_and_write(0, &block(2), &block(3)).map(drop),
    ] {
        assert!(matches!(refused, Err(DeviceError::Fenced { .. })), "{refused:?}");
    }
    // Reading is no harm, others go on, and fencing once more is no harm.
    assert_eq!(read_block(&*writer, 0)[..], block(2)[..]);
    other.write(unit as u64, &block(4)).unwrap();
    others.fence(key(7)).unwrap();
    writes.register(key(8)).unwrap();
    writer.write(0, &block(5)).unwrap();
    writes.unregister().unwrap();
    others.fence(key(8)).unwrap();
    others.unregister().unwrap();
    writer.write(0, &block(6)).unwrap();
}
