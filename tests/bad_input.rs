//! Bad bytes are an error with a location, never a panic and never silent: status and locks on images
//! with every kind of damage. Nothing is ever written to an image by looking at it.

mod volumes;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use lunfs::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry};
use lunfs::inspect::path::Paths;
use lunfs::inspect::watch::SlotWatch;
use lunfs::layout::geometry::{GROUP_BLOCKS, GROUP_INODES};
use lunfs::layout::seal;
use lunfs::types::{BLOCK_BYTES, BlockNo, InodeNo, Slot};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};
use volumes::{Population, Volume, err, out, run};

const COMMANDS: [&[&str]; 4] = [
    &["status", "--watch-ms", "0"],
    &["status", "--watch-ms", "0", "--json"],
    &["locks", "--watch-ms", "0", "--scan"],
    &["locks", "--watch-ms", "0", "--scan", "--json"],
];

/// Runs a command; returns its exit status and all it said. A panic fails the test.
fn look(volume: &Volume, command: &[&str]) -> (i32, String) {
    let mut args = command.to_vec();
    args.push(volume.spec());
    let output = run("lunfs", &args);
    let text = out(&output) + &err(&output);
    let Some(code @ 0..=1) = output.status.code() else {
        panic!("{command:?} ended with {}: {text}", output.status)
    };
    assert!(!text.contains("panicked"), "{command:?}: {text}");
    if command.contains(&"--json") && !output.stdout.is_empty() {
        serde_json::from_slice::<serde_json::Value>(&output.stdout).expect("whole JSON");
    }
    (code, text)
}

/// Every command says `word` and fails, and writes nothing.
fn all_refuse(volume: &Volume, word: &str) {
    let before = volume.fingerprint();
    for command in COMMANDS {
        let (code, text) = look(volume, command);
        assert_eq!(code, 1, "{command:?}: {text}");
        assert!(text.contains(word), "{command:?}: '{word}' in: {text}");
    }
    assert_eq!(volume.fingerprint(), before);
}

fn handmade(dir: &tempfile::TempDir) -> (Volume, Population) {
    let volume = Volume::tiny(dir.path());
    let population = volume.populate();
    (volume, population)
}

/// Changes the primary superblock and seals it again; copies are wiped, so that nothing stands in.
fn change_superblock(volume: &Volume, change: impl FnOnce(&mut [u8])) {
    let mut block = volume.get(BlockNo(0)).to_vec();
    change(&mut block);
    seal(&mut block);
    volume.put(BlockNo(0), &block);
    wipe_copies(volume);
}

fn wipe_copies(volume: &Volume) {
    for at in volume.geometry().superblock_copies() {
        volume.put(at, &[0; BLOCK_BYTES]);
    }
}

#[test]
fn every_bad_superblock_is_called_what_it_is() {
    type Change = fn(&mut [u8]);
    let cases: [(&str, Change); 12] = [
        ("not a LunFS volume", |b| b.fill(0)),
        ("not a LunFS volume", |b| b[0] ^= 1),
        ("format version 2, this program knows version 1", |b| b[4] = 2),
        ("unknown feature bits 0x8000000000000000 that forbid mounting", |b| b[0x57] = 0x80),
        ("says that it belongs at block 0x7", |b| b[0x20] = 7),
        ("too small", |b| b[0x58..0x60].fill(0)),
        ("too large", |b| b[0x58..0x60].fill(0xff)),
        ("impossible journal_blocks", |b| b[0x60..0x68].fill(0xff)),
        ("impossible cluster_blocks", |b| b[0x68] = 3),
        ("0 slots", |b| b[0x70..0x72].fill(0)),
        ("leave no room", |b| b[0x62] = 1),
        ("lease_ms", |b| b[0x7c..0x80].fill(0)),
    ];
    for (word, change) in cases {
        let dir = tempfile::tempdir().unwrap();
        let (volume, _) = handmade(&dir);
        change_superblock(&volume, change);
        all_refuse(&volume, word);
        all_refuse(&volume, "block 0x0");
    }
    let dir = tempfile::tempdir().unwrap();
    let (volume, _) = handmade(&dir);
    let mut torn = volume.get(BlockNo(0));
    torn[200] ^= 4;
    volume.put(BlockNo(0), &torn[..]);
    for command in COMMANDS {
        let (code, text) = look(&volume, command);
        assert!(code == 1 && text.contains("superblock at block 0x0: checksum"), "{text}");
        assert!(text.contains("its copy at block 0x"), "{text}");
        assert!(text.contains("alpha"), "a copy should have stood in: {text}");
    }
    wipe_copies(&volume);
    all_refuse(&volume, "superblock at block 0x0: checksum");
}

#[test]
fn a_truncated_device_is_called_that() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _) = handmade(&dir);
    let size = volume.geometry().size_bytes();
    for (len, word) in [
        (size - 4096, "the device only"),
        (size / 2, "the device only"),
        (BLOCK_BYTES as u64, "the device only"),
        (512, "block 0x0 can't be read"),
        (0, "0 bytes"),
    ] {
        volume.file.set_len(len).unwrap();
        all_refuse(&volume, word);
    }
}

#[test]
fn mkfs_does_not_take_a_newer_volume_for_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _) = handmade(&dir);
    change_superblock(&volume, |b| b[4] = 9);
    let before = volume.fingerprint();
    let output = run("mkfs", &[volume.spec()]);
    assert!(output.status.code() == Some(1) && err(&output).contains("LunFS"), "{}", err(&output));
    assert_eq!(volume.fingerprint(), before);
}

/// Blocks that `locks --scan` reads whatever stands in the others, and so must name when they are bad.
fn always_read(volume: &Volume, population: &Population) -> Vec<BlockNo> {
    let g = volume.geometry();
    let mut blocks = vec![g.volume_lock(), g.rename_lock(), g.cluster_map(0, 0)];
    for slot in g.all_slots() {
        blocks.extend([g.slot(slot), g.doorbell(slot), g.request(slot)]);
    }
    for group in 0..g.system_groups() {
        blocks.extend((0..GROUP_INODES).map(|i| g.system_group(group).plus(i)));
    }
    for index in 0..g.clusters() {
        blocks.extend([g.cluster(index), g.cluster_header(index)]);
    }
    let group = population.vms.0 - GROUP_INODES;
    blocks.extend((0..GROUP_INODES).map(|i| BlockNo(group + i)));
    blocks
}

#[test]
fn garbage_in_any_block_that_is_read_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, population) = handmade(&dir);
    let mut rng = SmallRng::seed_from_u64(1);
    for at in always_read(&volume, &population) {
        let good = volume.get(at);
        let mut bad = *good;
        match rng.random_range(0..4) {
            0 => rng.fill_bytes(&mut bad),
            1 => bad[..512].fill(0),
            2 => bad[rng.random_range(0..200)] ^= 1 << rng.random_range(0..8),
            // Another block of the same volume: whole, but not here.
            _ => {
                bad = *volume.get(if at == volume.geometry().volume_lock() {
                    volume.geometry().rename_lock()
                } else {
                    volume.geometry().volume_lock()
                })
            }
        }
        volume.put(at, &bad);
        let (code, text) = look(&volume, COMMANDS[2]);
        assert_eq!(code, 1, "{at:?}: {text}");
        assert!(text.contains(&format!("at block {at}: ")), "{at:?}: {text}");
        volume.put(at, &good[..]);
    }
    assert_eq!(look(&volume, COMMANDS[2]).0, 0, "the volume is whole again");
}

#[test]
fn sealed_nonsense_in_any_field_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, population) = handmade(&dir);
    let g = volume.geometry();
    let records =
        [g.slot(Slot(0)), g.request(Slot(1)), g.volume_lock(), BlockNo(population.disk.0 - GROUP_INODES)];
    let blocks = [
        g.cluster_header(0),
        g.cluster_map(0, 0),
        population.disk.body(),
        population.vms.body(),
        g.root().body(),
        g.request(Slot(1)),
    ];
    let mut rng = SmallRng::seed_from_u64(2);
    for round in 0..60 {
        let (at, len) = match round % 2 {
            0 => (records[rng.random_range(0..records.len())], 512),
            _ => (blocks[rng.random_range(0..blocks.len())], BLOCK_BYTES),
        };
        let good = volume.get(at);
        let mut bad = *good;
        for _ in 0..rng.random_range(1..20) {
            // Identity stays, so that the fields behind it are believed.
            let end = len.min(rng.random_range(0x41..=len));
            bad[rng.random_range(0x40..end)] =
                *[0, 1, 0x7f, 0xff, rng.random()].get(rng.random_range(0..5)).unwrap();
        }
        seal(&mut bad[..len]);
        volume.put(at, &bad);
        let before = volume.fingerprint();
        for command in COMMANDS {
            look(&volume, command);
        }
        assert_eq!(volume.fingerprint(), before, "{at:?}");
        volume.put(at, &good[..]);
    }
}

#[test]
fn random_garbage_in_random_blocks_is_survived() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, _) = handmade(&dir);
    let g = volume.geometry();
    let mut rng = SmallRng::seed_from_u64(3);
    for round in 0..40 {
        let mut saved = Vec::new();
        for _ in 0..rng.random_range(1..6) {
            // Mostly among the blocks that mean something.
            let end = if rng.random_bool(0.8) { g.cluster(0).0 + 4 * GROUP_BLOCKS } else { g.size_blocks };
            let at = BlockNo(rng.random_range(0..end));
            let mut garbage = vec![0; BLOCK_BYTES];
            rng.fill_bytes(&mut garbage);
            saved.push((at, volume.get(at)));
            volume.put(at, &garbage);
        }
        let before = volume.fingerprint();
        look(&volume, COMMANDS[round % COMMANDS.len()]);
        assert_eq!(volume.fingerprint(), before);
        for (at, block) in saved.into_iter().rev() {
            volume.put(at, &block[..]);
        }
    }
    assert_eq!(look(&volume, COMMANDS[2]).0, 0, "the volume is whole again");
}

/// A device whose reads of one block come back torn, differently each time, for a while.
struct Torn {
    inner: std::sync::Arc<dyn BlockDevice>,
    at: BlockNo,
    bad_reads: AtomicU64,
}

impl BlockDevice for Torn {
    fn geometry(&self) -> DeviceGeometry {
        self.inner.geometry()
    }
    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read(offset_bytes, buf)?;
        let inside = self.at.offset_bytes().checked_sub(offset_bytes).filter(|o| *o < buf.len() as u64);
        if let Some(start) = inside {
            let left = self.bad_reads.load(Relaxed);
            if left > 0 {
                self.bad_reads.store(left - 1, Relaxed);
                buf[start as usize + 0x50] ^= left as u8 | 0x80;
            }
        }
        Ok(())
    }
    fn write(&self, _: u64, _: &[u8]) -> Result<(), DeviceError> {
        panic!("looking at a volume wrote")
    }
    fn compare_and_write(&self, _: u64, _: &[u8], _: &[u8]) -> Result<CompareOutcome, DeviceError> {
        panic!("looking at a volume swapped")
    }
    fn flush(&self) -> Result<(), DeviceError> {
        panic!("looking at a volume flushed")
    }
    fn discard(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        panic!("looking at a volume discarded")
    }
    fn write_zeroes(&self, _: u64, _: u64) -> Result<(), DeviceError> {
        panic!("looking at a volume zeroed")
    }
    fn resets(&self) -> u64 {
        self.inner.resets()
    }
}

#[test]
fn a_block_under_a_write_is_read_again_and_not_called_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let (volume, population) = handmade(&dir);
    let g = volume.geometry();
    for at in [BlockNo(0), g.slot(Slot(0)), g.request(Slot(1)), population.disk.body()] {
        let dev = Torn { inner: volume.device(), at, bad_reads: AtomicU64::new(3) };
        let open = lunfs::inspect::Volume::open(&dev).unwrap();
        assert!(open.primary_error.is_none());
        let watch = SlotWatch::start(&open).unwrap();
        assert_eq!(watch.slots[0].host_name(), "alpha");
        assert_eq!(open.requests(Slot(1)).unwrap().requests.len(), 2);
        assert_eq!(Paths::new(&open).of(population.disk).as_deref(), Some("/vms/disk.img"));
        assert_eq!(dev.bad_reads.load(Relaxed), 0, "{at:?} was read and read again");
    }
}

#[test]
fn parents_in_a_circle_end_and_foreign_parents_are_not_followed() {
    use lunfs::layout::inode::InodeDisk;
    let dir = tempfile::tempdir().unwrap();
    let (volume, population) = handmade(&dir);
    let set_parent = |ino: InodeNo, parent: u64| {
        let mut block = volume.get(ino.body());
        InodeDisk::of_mut(&mut block).parent = parent.into();
        volume.put_sealed(ino.body(), &block[..]);
    };
    for parent in [population.disk.0, population.vms.0, 0, 3, volume.geometry().cluster(0).0, u64::MAX] {
        set_parent(population.vms, parent);
        let (code, text) = look(&volume, &["locks", "--watch-ms", "0", "--json"]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("disk.img"), "{text}");
        assert!(!text.contains("/vms/"), "{text}");
    }
}
