use std::sync::Mutex;

use super::*;
use crate::device::{CompareOutcome, DeviceGeometry, Executed};
use crate::inspect::path::Paths;
use crate::inspect::scan::{Scanned, all_locks};
use crate::layout::inode::{Form, InodeDisk};
use crate::layout::journal::JournalHeader;
use crate::layout::lock::{LockMode, LockRecord};
use crate::layout::slot::{Durations, SlotRecord, SlotState};
use crate::types::{BLOCK_BYTES, Incarnation, InodeNo};

/// A device in memory that can stop obeying after some commands.
struct MemDevice {
    logical_block_bytes: u32,
    state: Mutex<State>,
}

struct State {
    bytes: Vec<u8>,
    /// Writes that still succeed.
    writes_left: u64,
}

impl MemDevice {
    /// Filled with a byte that is no zero, so that what was not written shows.
    fn new(size_bytes: u64, logical_block_bytes: u32) -> Self {
        let state = State { bytes: vec![0xaa; size_bytes as usize], writes_left: u64::MAX };
        MemDevice { logical_block_bytes, state: Mutex::new(state) }
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap())
    }
}

impl BlockDevice for MemDevice {
    fn geometry(&self) -> DeviceGeometry {
        DeviceGeometry {
            logical_block_bytes: self.logical_block_bytes,
            size_bytes: self.with(|s| s.bytes.len() as u64),
            volatile_cache: true,
            hold_time: Duration::ZERO,
        }
    }
    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let (at, len) = (offset_bytes as usize, buf.len());
        self.with(|s| match s.bytes.get(at..at + len) {
            Some(bytes) => {
                buf.copy_from_slice(bytes);
                Ok(())
            }
            None => Err(DeviceError::BadRange { op: "read", offset_bytes, len_bytes: len as u64 }),
        })
    }
    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let align = u64::from(self.logical_block_bytes);
        assert!(offset_bytes.is_multiple_of(align) && (data.len() as u64).is_multiple_of(align));
        self.with(|s| {
            if s.writes_left == 0 {
                return Err(DeviceError::TimedOut { op: "write", offset_bytes, waited_ms: 0 });
            }
            s.writes_left -= 1;
            s.bytes[offset_bytes as usize..][..data.len()].copy_from_slice(data);
            Ok(())
        })
    }
    fn compare_and_write(
        &self,
        offset_bytes: u64,
        _: &[u8],
        _: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        let source = std::io::Error::from_raw_os_error(libc::EIO);
        Err(DeviceError::io("compare and write", offset_bytes, Executed::No, source))
    }
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported { op: "discard" })
    }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        Err(DeviceError::Unsupported { op: "write zeroes" })
    }
    fn resets(&self) -> u64 {
        0
    }
}

fn tiny() -> FormatOptions {
    FormatOptions { label: "tiny".into(), geometry: Some(Geometry::tiny(4)), ..FormatOptions::default() }
}

#[test]
fn everything_that_was_written_reads_back_and_nothing_else_was_touched() {
    let size_bytes = Geometry::tiny(4).size_bytes();
    for logical_block_bytes in [512, 4096] {
        let dev = MemDevice::new(size_bytes + 8192, logical_block_bytes);
        let report = format(&dev, &tiny()).unwrap();
        assert_eq!(report.flushes, 5);
        let volume = Volume::open(&dev).unwrap();
        assert_eq!(volume.superblock, report.superblock);
        let g = *volume.geometry();
        for at in g.superblock_copies() {
            let copy = volume.read_checked(at, |b| Ok(Superblock::decode(b, at, false))).unwrap().unwrap();
            assert_eq!(copy, report.superblock);
        }
        for slot in g.all_slots() {
            assert_eq!(volume.slot(slot).unwrap(), SlotRecord::new_free(g.slot(slot)));
            assert_eq!(volume.doorbell(slot).unwrap().swap_counter, 0);
            assert!(volume.requests(slot).unwrap().requests.is_empty());
            let at = g.journal(slot);
            let header = volume
                .read_checked(at, |b| JournalHeader::decode(b, volume.id(), at, g.journal_blocks - 1))
                .unwrap();
            assert_eq!((header.incarnation, header.tail_sequence), (Incarnation(0), 1));
            let orphans = volume.inode(g.orphan_directory(slot)).unwrap();
            assert_eq!(InodeDisk::of(&orphans).mode.get(), 0o40700);
        }
        let root = volume.inode(g.root()).unwrap();
        let root = InodeDisk::of(&root);
        assert_eq!((root.mode.get(), root.nlink.get(), root.form()), (0o40755, 2, Form::Tree));
        assert_eq!(Paths::new(&volume).of(g.root()).as_deref(), Some("/"));
        let spare = InodeNo(g.system_group(0).0 + 15);
        assert_eq!(InodeDisk::of(&volume.inode(spare).unwrap()).form(), Form::Free);
        for index in 0..g.clusters() {
            let usable = g.cluster_len(index) - g.cluster_overhead(index);
            assert_eq!(u64::from(volume.cluster_header(index).unwrap().free_blocks.get()), usable);
        }
        let mut count = 0;
        all_locks(&volume, &mut |scanned| {
            count += 1;
            matches!(scanned, Scanned::Lock(LockRecord { mode: LockMode::Free, .. }))
        });
        assert_eq!(count, 2 + 8 * g.system_groups() + g.clusters());
        dev.with(|s| assert!(s.bytes[size_bytes as usize..].iter().all(|b| *b == 0xaa)));
    }
}

#[test]
fn a_crash_after_any_write_leaves_a_whole_volume_or_none() {
    let size_bytes = Geometry::tiny(4).size_bytes();
    let dev = MemDevice::new(size_bytes, 512);
    let old = format(&dev, &tiny()).unwrap().superblock;
    let before = dev.with(|s| s.bytes.clone());
    let copies = old.geometry.superblock_copies().len() as u64;
    // Another number of slots, so that the copies of old and new lie in different places.
    let new = FormatOptions { geometry: Some(Geometry::tiny(7)), ..tiny() };
    let total = format(&dev, &new).unwrap().write_commands;
    for writes in 0..total {
        dev.with(|s| (s.bytes, s.writes_left) = (before.clone(), writes));
        format(&dev, &new).unwrap_err();
        dev.with(|s| s.writes_left = u64::MAX);
        match Volume::open(&dev) {
            Ok(volume) if writes <= copies => {
                // Nothing but copies is gone: the rest of the old volume must be as it was.
                assert_eq!(volume.id(), old.volume);
                let start = old.geometry.volume_lock().offset_bytes() as usize;
                let end = old.geometry.journal(Slot(0)).offset_bytes() as usize;
                dev.with(|s| assert_eq!(s.bytes[start..end], before[start..end]));
            }
            Ok(volume) => {
                assert!(writes >= total - 5, "a volume is visible after {writes} of {total} writes");
                assert_ne!(volume.id(), old.volume);
                all_locks(&volume, &mut |scanned| {
                    assert!(matches!(scanned, Scanned::Lock(_)));
                    true
                });
            }
            Err(_) => assert!(writes > copies),
        }
    }
}

#[test]
fn a_second_format_voids_every_record_of_the_first() {
    let dev = MemDevice::new(Geometry::tiny(4).size_bytes(), 4096);
    let first = format(&dev, &tiny()).unwrap().superblock;
    let second = format(&dev, &FormatOptions { geometry: Some(Geometry::tiny(9)), ..tiny() }).unwrap();
    assert_ne!(first.volume, second.superblock.volume);
    assert_ne!(first.hash_seed, second.superblock.hash_seed);
    let volume = Volume::open(&dev).unwrap();
    for index in 0..first.geometry.clusters() {
        // The old lock is void where it is still there, and replaced where the new volume has one.
        let at = first.geometry.cluster(index);
        let new_cluster = second.superblock.geometry.cluster_of(at);
        let replaced = new_cluster.is_some_and(|i| second.superblock.geometry.cluster(i) == at);
        assert_eq!(volume.lock(at).is_ok(), replaced);
    }
}

#[test]
fn bad_wishes_are_refused_before_anything_is_written() {
    let dev = MemDevice::new(32 << 20, 512);
    let refusal = |options: FormatOptions| format(&dev, &options).unwrap_err().to_string();
    let wish = FormatOptions::default;
    assert!(refusal(FormatOptions { label: "x".repeat(65), ..wish() }).contains("64 bytes"));
    assert!(refusal(FormatOptions { label: "a\nb".into(), ..wish() }).contains("control"));
    assert!(refusal(FormatOptions { size_bytes: Some(1 << 20), ..wish() }).contains("too small"));
    assert!(refusal(FormatOptions { size_bytes: Some(1 << 40), ..wish() }).contains("only 33554432"));
    assert!(refusal(FormatOptions { slots: Some(300), ..wish() }).contains("slots"));
    dev.with(|s| assert!(s.bytes.iter().all(|b| *b == 0xaa)));
}

/// Formats, gives the volume quick durations and claims slot 2.
fn claimed() -> (MemDevice, Superblock, SlotRecord) {
    let dev = MemDevice::new(Geometry::tiny(4).size_bytes(), 512);
    let mut superblock = format(&dev, &tiny()).unwrap().superblock;
    superblock.durations = Durations { beat_ms: 10, lease_ms: 40, dead_ms: 300, hold_ms: 0 };
    let mut block = zero_block();
    superblock.encode(BlockNo(0), &mut block);
    dev.write(0, &block[..]).unwrap();
    let mut record = SlotRecord::new_free(superblock.geometry.slot(Slot(2)));
    record.state = SlotState::Live;
    record.incarnation = Incarnation(1);
    record.host_name = "alpha".into();
    record.logical_block_bytes = 512;
    record.durations = superblock.durations;
    beat(&dev, &superblock, &mut record);
    (dev, superblock, record)
}

fn beat(dev: &MemDevice, superblock: &Superblock, record: &mut SlotRecord) {
    record.beat += 1;
    let mut block = zero_block();
    record.encode(superblock.volume, &mut block[..]);
    dev.write(record.address.offset_bytes(), &block[..512]).unwrap();
}

#[test]
fn a_dead_host_may_be_overwritten_after_its_dead_time_and_a_beating_one_never() {
    let (dev, superblock, mut record) = claimed();
    let mut quiet = |_| {};
    let refused = preflight::preflight(&dev, false, &mut quiet).unwrap_err().to_string();
    assert!(refused.contains("'tiny'") && refused.contains("--force"), "{refused}");
    let started = Instant::now();
    let previous = preflight::preflight(&dev, true, &mut quiet).unwrap().unwrap();
    assert!(started.elapsed() >= Duration::from_millis(300));
    // A host appears between the watch and the format: the format gives up and puts all back.
    beat(&dev, &superblock, &mut record);
    let options = FormatOptions { previous: Some(previous), ..tiny() };
    let refused = format(&dev, &options).unwrap_err();
    assert!(matches!(refused, FormatError::HostAppeared { slot: Slot(2) }), "{refused}");
    let volume = Volume::open(&dev).unwrap();
    assert!(volume.primary_error.is_none());
    assert_eq!(volume.superblock, superblock);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (dev, stop) = (&dev, &stop);
        scope.spawn(move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                beat(dev, &superblock, &mut record);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let refused = preflight::preflight(dev, true, &mut |_| {}).unwrap_err().to_string();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(refused.contains("'alpha'") && refused.contains("slot 2"), "{refused}");
    });
}

#[test]
fn a_copy_stands_in_for_a_damaged_primary_and_a_foreign_device_is_named() {
    let dev = MemDevice::new(Geometry::plan(32 << 20, None).unwrap().size_bytes(), 512);
    assert!(Volume::open(&dev).err().unwrap().to_string().contains("not a LunFS volume"));
    for geometry in [None, Some(Geometry::tiny(4))] {
        let superblock = format(&dev, &FormatOptions { geometry, ..tiny() }).unwrap().superblock;
        for damage in [vec![0xff; BLOCK_BYTES], vec![0; 512]] {
            dev.write(1024, &damage[..512]).unwrap();
            dev.write(0, &damage).unwrap();
            let volume = Volume::open(&dev).unwrap();
            assert_eq!(volume.superblock, superblock);
            assert!(volume.primary_error.is_some() && volume.superblock_at.0 > 0);
        }
    }
}
