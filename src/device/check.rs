//! Finding out by doing whether a device keeps what LunFS builds on. What a target says of itself is worth nothing
//! here: there are targets that advertise compare-and-write and refuse it, that answer GOOD and do nothing, that tear
//! it when several hosts race, and one that loses its atomicity for good after a reservation conflict.
//!
//! * [`harmless`] changes nothing, whoever uses the device at the same time: at each mount.
//! * [`Scratch::all`] writes to a range that nobody uses, and puts back what was there: at mkfs, and in `check-device`.
//! * [`fences`] reserves the device, so it is for devices that nobody uses at all. It provokes the conflicts and unit
//!   attentions after which compare-and-write must still be exclusive; so it leaves a bad target bad until it is
//!   restarted.
//!
//! This room and the tests are the only callers of compare-and-write besides `ats`.
//!
//! Not for: speed, or judging a device that is failing.

mod report;
mod reserved;

use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use report::{Finding, Property, Report, Verdict};
pub use reserved::{AFTER_A_CONFLICT, fences, known_to_suffer};

use super::{AlignedBuf, BlockDevice, CompareOutcome, DeviceError};
use crate::rt::{self, Instant, random_u64};

/// Bytes that [`Scratch`] writes to.
pub const SCRATCH_BYTES: u64 = 64 * 1024;
/// So many increments must have been made.
const RACE_PROVES: u64 = 500;
/// How long racers go on; what they made by then counts.
const RACE_PATIENCE: Duration = Duration::from_secs(60);
/// A compare-and-write that is not answered, or refused for the moment, is tried again so often.
const PASSING_TRIES: u32 = 100;

/// Why a device can't be used.
#[derive(Clone, Debug, Error)]
pub enum Unfit {
    #[error("compare-and-write does not work: {0}")]
    NoCompareAndWrite(DeviceError),
    #[error("compare-and-write claims success although the block did not hold what was expected")]
    SucceedsOnMismatch,
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// A compare-and-write whose outcome is known; what passes is tried again.
fn swap(
    device: &dyn BlockDevice,
    at: u64,
    expected: &[u8],
    new: &[u8],
) -> Result<CompareOutcome, DeviceError> {
    let mut tries = 0;
    loop {
        match device.compare_and_write(at, expected, new) {
            Err(error @ DeviceError::Io { .. }) if error.executed() == super::Executed::No => {
                tries += 1;
                if tries == PASSING_TRIES {
                    return Err(error);
                }
                rt::sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}

fn read_block(device: &dyn BlockDevice, at: u64) -> Result<AlignedBuf, DeviceError> {
    let mut block = AlignedBuf::zeroed(device.geometry().logical_block_bytes as usize);
    device.read(at, &mut block)?;
    Ok(block)
}

/// Is there a compare-and-write, and does it fail on what is not expected? Where it works nothing is written; where it
/// does not, what the block at `at` held. That it succeeds on what is expected can't be asked here: on a target that
/// does not keep it apart from plain writes, such a swap could undo another host's write.
pub fn harmless(device: &dyn BlockDevice, at: u64) -> Result<(), Unfit> {
    let block = read_block(device, at)?;
    let mut other = block.clone();
    for byte in other.iter_mut() {
        *byte ^= 0xA5;
    }
    match swap(device, at, &other, &block) {
        Ok(CompareOutcome::Miscompare) => Ok(()),
        Ok(CompareOutcome::Swapped) => Err(Unfit::SucceedsOnMismatch),
        // No answer: the mount will hear of that by itself.
        Err(e) if e.executed() == super::Executed::Maybe => Ok(()),
        Err(e) => Err(no_compare_and_write(e)),
    }
}

fn no_compare_and_write(error: DeviceError) -> Unfit {
    match error {
        DeviceError::Unsupported { .. } => Unfit::NoCompareAndWrite(error),
        other => Unfit::Device(other),
    }
}

/// A range of a device that may be written to, with several handles on the device: sessions of their own, where the
/// backend has such.
pub struct Scratch<'a> {
    handles: &'a [Arc<dyn BlockDevice>],
    at: u64,
    before: AlignedBuf,
    unit: u64,
}

impl<'a> Scratch<'a> {
    /// Takes [`SCRATCH_BYTES`] at `at`; `handles` is not empty. What stands there is put back by [`Scratch::restore`].
    pub fn take(handles: &'a [Arc<dyn BlockDevice>], at: u64) -> Result<Scratch<'a>, DeviceError> {
        let device = &handles[0];
        let mut before = AlignedBuf::zeroed(SCRATCH_BYTES as usize);
        device.read(at, &mut before)?;
        Ok(Scratch { handles, at, before, unit: device.geometry().logical_block_bytes.into() })
    }

    /// The last place of a device on a 4 KiB boundary.
    pub fn place_at_end(device: &dyn BlockDevice) -> Option<u64> {
        let size = device.geometry().size_bytes;
        (size - size % 4096).checked_sub(SCRATCH_BYTES)
    }

    pub fn restore(self) -> Result<(), DeviceError> {
        self.handles[0].write(self.at, &self.before)?;
        self.handles[0].flush()
    }

    fn device(&self) -> &dyn BlockDevice {
        &*self.handles[0]
    }

    /// Everything that can be found out without reserving the device. `rounds`: increments of each racer.
    pub fn all(&self, rounds: u64) -> Vec<Property> {
        let swaps = Property::of("compare-and-write", self.compare_and_write());
        let race = match swaps.finding {
            Finding::Good => Property::of("racing compare-and-writes", self.race(rounds)),
            _ => Property::not_asked("racing compare-and-writes", "one alone does not work"),
        };
        vec![
            swaps,
            race,
            Property::of("reads see the other's writes", self.freshness()),
            Property::of("flush", self.flush()),
            Property::of("discard", self.discard()),
            Property::of("write zeroes", self.zeroes()),
        ]
    }

    fn compare_and_write(&self) -> Result<String, String> {
        let device = self.device();
        let (at, unit) = (self.at, self.unit as usize);
        let neighbours = [at + self.unit, at + 2 * self.unit];
        let fail = |e: DeviceError| e.to_string();
        let (one, two) = (pattern(unit, 1), pattern(unit, 2));
        for block in [at, neighbours[0], neighbours[1]] {
            device.write(block, &one).map_err(fail)?;
        }
        let middle = neighbours[0];
        if swap(device, middle, &one, &two).map_err(fail)? != CompareOutcome::Swapped {
            return Err("a miscompare although the block held what was expected".into());
        }
        if *read_block(device, middle).map_err(fail)? != *two {
            return Err("it answers GOOD and does not write".into());
        }
        // One byte is enough, wherever it is.
        for differs_at in [0, unit / 2, unit - 1] {
            let mut expected = two.clone();
            expected[differs_at] ^= 1;
            if swap(device, middle, &expected, &one).map_err(fail)? != CompareOutcome::Miscompare {
                return Err(format!(
                    "success although byte {differs_at} of the block was not what was expected"
                ));
            }
            if *read_block(device, middle).map_err(fail)? != *two {
                return Err("a miscompare that wrote all the same".into());
            }
        }
        for neighbour in [at, neighbours[1]] {
            if *read_block(device, neighbour).map_err(fail)? != *one {
                return Err("it changed a block beside the one it was for".into());
            }
        }
        Ok("succeeds exactly on what is expected, changes nothing else".into())
    }

    /// Counts a block up from all handles at once, two threads each.
    pub(super) fn race(&self, rounds: u64) -> Result<String, String> {
        let at = self.at + 4096;
        let zero = vec![0; self.unit as usize];
        self.device().write(at, &zero).map_err(|e| e.to_string())?;
        let since = Instant::now();
        let racers: Vec<_> = (0..self.handles.len() * 2)
            .map(|n| {
                let device = self.handles[n % self.handles.len()].clone();
                rt::try_spawn("race", move || count_up(&*device, at, rounds, n)).map_err(|e| e.to_string())
            })
            .collect::<Result<_, String>>()?;
        let many = racers.len() as u64;
        let mut wanted = 0;
        for racer in racers {
            wanted += racer.join().map_err(|_| "a racer failed".to_owned())??;
        }
        let took = since.elapsed();
        let block = read_block(self.device(), at).map_err(|e| e.to_string())?;
        let found = number(&block, 0);
        if found != wanted {
            return Err(format!("of {wanted} increments the block shows {found}: it is not atomic"));
        }
        // A slow device is no bad one, but few increments prove nothing.
        if wanted < (rounds * many).min(RACE_PROVES) {
            return Err(format!("only {wanted} increments in {} s", took.as_secs()));
        }
        Ok(format!(
            "{wanted} increments by {many} racers over {} sessions, none lost, {} ms",
            self.handles.len(),
            took.as_millis()
        ))
    }

    /// What one handle wrote the other must read, each time.
    fn freshness(&self) -> Result<String, String> {
        const TURNS: u64 = 200;
        let at = self.at + 8192;
        let fail = |e: DeviceError| e.to_string();
        let mut data = vec![0; 4096];
        for turn in 0..TURNS {
            let count = self.handles.len();
            let (writer, reader) =
                (&self.handles[turn as usize % count], &self.handles[(turn as usize + 1) % count]);
            let nonce = random_u64().to_le_bytes();
            for place in data.as_chunks_mut::<8>().0 {
                *place = nonce;
            }
            writer.write(at, &data).map_err(fail)?;
            let mut found = AlignedBuf::zeroed(data.len());
            reader.read(at, &mut found).map_err(fail)?;
            if *found != *data {
                return Err(format!(
                    "a read after the write was answered showed something else (turn {turn})"
                ));
            }
        }
        Ok(match self.handles.len() {
            1 => "with one session only".into(),
            _ => format!("{TURNS} turns"),
        })
    }

    fn flush(&self) -> Result<String, String> {
        let since = Instant::now();
        self.device().flush().map_err(|e| e.to_string())?;
        let cached = self.device().geometry().volatile_cache;
        let cache = if cached { "volatile write cache" } else { "no volatile write cache" };
        Ok(format!("answered in {} us; {cache}", since.elapsed().as_micros()))
    }

    fn around(&self, change: impl Fn(u64, u64) -> Result<(), DeviceError>) -> Result<Vec<u8>, String> {
        let (at, len) = (self.at + 16384, 3 * 4096);
        let fail = |e: DeviceError| e.to_string();
        self.device().write(at, &vec![0x77; len]).map_err(fail)?;
        change(at + 4096, 4096).map_err(fail)?;
        let mut found = AlignedBuf::zeroed(len);
        self.device().read(at, &mut found).map_err(fail)?;
        if found[..4096].iter().chain(&found[8192..]).any(|byte| *byte != 0x77) {
            return Err("it changed blocks beside the range it was for".into());
        }
        Ok(found[4096..8192].to_vec())
    }

    fn discard(&self) -> Result<String, String> {
        let inside = self.around(|at, len| self.device().discard(at, len))?;
        Ok(match (inside.iter().all(|b| *b == 0), inside.iter().all(|b| *b == 0x77)) {
            (true, _) => "reads as zeroes afterwards".into(),
            (_, true) => "changes nothing".into(),
            _ => "reads as something else afterwards".into(),
        })
    }

    fn zeroes(&self) -> Result<String, String> {
        match self.around(|at, len| self.device().write_zeroes(at, len))?.iter().all(|b| *b == 0) {
            true => Ok("as they should be".into()),
            false => Err("what was zeroed does not read as zeroes".into()),
        }
    }
}

fn pattern(len: usize, n: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(n)).collect()
}

fn number(block: &[u8], at: usize) -> u64 {
    block.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Counts the block up `times` times, or until it has taken too long; how often it did. The block keeps the number of each
/// racer's last swap that landed, so that one whose answer was lost is known.
fn count_up(device: &dyn BlockDevice, at: u64, times: u64, racer: usize) -> Result<u64, String> {
    let place = 64 + racer % 48 * 8;
    let fail = |e: DeviceError| e.to_string();
    let mut known = read_block(device, at).map_err(fail)?;
    let (mut nonce, mut landed, mut done) = (0u64, 0u64, 0);
    let since = Instant::now();
    while done < times && since.elapsed() <= RACE_PATIENCE {
        nonce += 1;
        let mut next = known.clone();
        next[..8].copy_from_slice(&(number(&known, 0) + 1).to_le_bytes());
        next[place..place + 8].copy_from_slice(&nonce.to_le_bytes());
        match swap(device, at, &known, &next) {
            Ok(CompareOutcome::Swapped) => {
                (done, landed, known) = (done + 1, nonce, next);
                continue;
            }
            Ok(CompareOutcome::Miscompare) => {}
            Err(e) if e.executed() == super::Executed::Maybe => {}
            Err(e) => return Err(e.to_string()),
        }
        known = read_block(device, at).map_err(fail)?;
        if number(&known, place) > landed {
            (done, landed) = (done + 1, number(&known, place));
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests;
