//! Devices that lie, in memory: each must be found out.

use super::*;
use crate::device::{DeviceGeometry, Executed, Fencing};
use crate::rt::Mutex;

/// What is wrong with it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lie {
    None,
    NotSupported,
    /// GOOD, and nothing done.
    DoesNothing,
    AlwaysWrites,
    MiscompareWrites,
    NeverMatches,
    /// Compares only the beginning.
    ComparesHalf,
    NotAtomic,
    StaleReads,
    ZeroesNothing,
    DiscardsTooMuch,
}

struct Liar {
    lie: Lie,
    bytes: Mutex<Vec<u8>>,
    old: Mutex<Vec<u8>>,
}

impl Liar {
    fn handle(lie: Lie) -> Arc<dyn BlockDevice> {
        let bytes = vec![9; 1 << 20];
        Arc::new(Liar { lie, old: Mutex::new(bytes.clone()), bytes: Mutex::new(bytes) })
    }
}

impl BlockDevice for Liar {
    fn geometry(&self) -> DeviceGeometry {
        DeviceGeometry {
            logical_block_bytes: 512,
            size_bytes: 1 << 20,
            volatile_cache: true,
            hold_time: Duration::ZERO,
        }
    }
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let from = if self.lie == Lie::StaleReads && buf.len() == 4096 { &self.old } else { &self.bytes };
        buf.copy_from_slice(&from.lock()[at as usize..at as usize + buf.len()]);
        Ok(())
    }
    fn write(&self, at: u64, data: &[u8]) -> Result<(), DeviceError> {
        let mut bytes = self.bytes.lock();
        *self.old.lock() = bytes.clone();
        bytes[at as usize..at as usize + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn compare_and_write(&self, at: u64, expected: &[u8], new: &[u8]) -> Result<CompareOutcome, DeviceError> {
        let range = at as usize..at as usize + 512;
        let mut bytes = self.bytes.lock();
        let len = if self.lie == Lie::ComparesHalf { 256 } else { 512 };
        let same = bytes[range.clone()][..len] == expected[..len];
        let outcome = if same { CompareOutcome::Swapped } else { CompareOutcome::Miscompare };
        match self.lie {
            Lie::NotSupported => return Err(DeviceError::Unsupported { op: "compare-and-write" }),
            Lie::DoesNothing => return Ok(CompareOutcome::Swapped),
            Lie::AlwaysWrites => bytes[range].copy_from_slice(new),
            Lie::MiscompareWrites => {
                bytes[range].copy_from_slice(new);
                return Ok(outcome);
            }
            Lie::NeverMatches => return Ok(CompareOutcome::Miscompare),
            Lie::NotAtomic => {
                drop(bytes);
                rt::sleep(Duration::from_micros(20));
                if same {
                    self.bytes.lock()[range].copy_from_slice(new);
                }
                return Ok(outcome);
            }
            _ if same => bytes[range].copy_from_slice(new),
            _ => {}
        }
        Ok(if self.lie == Lie::AlwaysWrites { CompareOutcome::Swapped } else { outcome })
    }
    fn flush(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn discard(&self, at: u64, len: u64) -> Result<(), DeviceError> {
        let more = if self.lie == Lie::DiscardsTooMuch { 512 } else { 0 };
        self.bytes.lock()[at as usize..(at + len) as usize + more].fill(0);
        Ok(())
    }
    fn write_zeroes(&self, at: u64, len: u64) -> Result<(), DeviceError> {
        if self.lie != Lie::ZeroesNothing {
            self.bytes.lock()[at as usize..(at + len) as usize].fill(0);
        }
        Ok(())
    }
    fn resets(&self) -> u64 {
        0
    }
    fn fencing(&self) -> Option<&dyn Fencing> {
        None
    }
}

fn verdict(lie: Lie) -> Verdict {
    let handles = [Liar::handle(lie)];
    let at = Scratch::place_at_end(&*handles[0]).unwrap();
    let scratch = Scratch::take(&handles, at).unwrap();
    let report = Report { properties: scratch.all(200), ..Report::default() };
    scratch.restore().unwrap();
    let mut found = vec![0; SCRATCH_BYTES as usize];
    handles[0].read(at, &mut found).unwrap();
    assert!(found.iter().all(|byte| *byte == 9), "what was there is back");
    report.verdict()
}

#[test]
fn an_honest_device_is_good() {
    assert_eq!(verdict(Lie::None), Verdict::GoodWithoutReservations("they were not asked for".into()));
    harmless(&*Liar::handle(Lie::None), 0).unwrap();
}

#[test]
fn each_lie_is_found_out() {
    for (lie, words) in [
        (Lie::NotSupported, "does not support"),
        (Lie::DoesNothing, "does not write"),
        (Lie::AlwaysWrites, "success although byte 0"),
        (Lie::MiscompareWrites, "wrote all the same"),
        (Lie::NeverMatches, "a miscompare although"),
        (Lie::ComparesHalf, "success although byte 256"),
        (Lie::NotAtomic, "not atomic"),
        (Lie::StaleReads, "showed something else"),
        (Lie::ZeroesNothing, "does not read as zeroes"),
        (Lie::DiscardsTooMuch, "beside the range"),
    ] {
        let found = verdict(lie).to_string();
        assert!(found.starts_with("do not use: ") && found.contains(words), "{found}");
    }
}

#[test]
fn the_harmless_questions_find_the_worst_and_change_nothing() {
    for (lie, unfit) in [
        (Lie::NotSupported, "does not work"),
        (Lie::DoesNothing, "claims success"),
        (Lie::AlwaysWrites, "claims success"),
    ] {
        let device = Liar::handle(lie);
        let error = harmless(&*device, 512).unwrap_err();
        assert!(error.to_string().contains(unfit), "{error}");
        assert_eq!(*read_block(&*device, 512).unwrap(), [9; 512]);
    }
    assert_eq!(DeviceError::Unsupported { op: "x" }.executed(), Executed::No);
}
