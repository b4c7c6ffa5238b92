//! Test-and-set on one disk block, between processes that share nothing but the disk.
//!
//! Everything LunFS does across hosts comes down to this one operation: "if the block still looks
//! like this, make it look like that". Run it with
//!
//! ```text
//! cargo run --example atomic_test_and_set [DEVICE]
//! ```
//!
//! Without DEVICE it uses a temporary file. One block of DEVICE is written; it must hold zeroes, and
//! holds zeroes again afterwards. Three scenes:
//!
//! 1. Four processes count one block up, each by compare-and-write; the total must be exact.
//! 2. A miscompare, with the image that was expected and the image that was found.
//! 3. An answer that gets lost. A lost answer is not a failure: the block is read again, and its
//!    content says whether the command was executed.
//!
//! It exits with an error if anything is not as said here.

use std::error::Error;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lunfs::device::count::Counting;
use lunfs::device::open::{OpenOptions, open_device};
use lunfs::device::{AlignedBuf, BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed};

type Outcome<T> = Result<T, Box<dyn Error>>;

const PROCESSES: u64 = 4;
const INCREMENTS: u64 = 1000;
/// The block that all processes fight for.
const COUNTER_AT: u64 = 64 * 1024;
/// Set for the processes that scene 1 starts: which of them this is.
const WRITER: &str = "ATOMIC_TEST_AND_SET_WRITER";

fn main() -> Outcome<()> {
    let device = std::env::args().nth(1);
    if let (Ok(writer), Some(path)) = (std::env::var(WRITER), &device) {
        return count_up(path, writer.parse()?);
    }
    let dir = tempfile::tempdir()?;
    let path = device.unwrap_or_else(|| dir.path().join("shared.img").display().to_string());
    let options = OpenOptions {
        create_size: (!Path::new(&path).exists()).then_some(1 << 20),
        ..OpenOptions::default()
    };
    let device = open_device(&path, options)?;
    let geometry = device.geometry();
    println!("{path}: {} bytes, logical block {}", geometry.size_bytes, geometry.logical_block_bytes);

    let zeroes = AlignedBuf::zeroed(geometry.logical_block_bytes as usize);
    ensure(*read_block(&*device)? == *zeroes, "the block is in use")?;

    scene_1_processes(&path, &device)?;
    scene_2_miscompare(&device)?;
    scene_3_lost_answers(&device)?;
    device.write(COUNTER_AT, &zeroes)?;
    println!("\nall as expected");
    Ok(())
}

/// What the block holds: who wrote it last, how often it was written, and a number that no other
/// image ever carried. The last makes it safe to ask "is this the image that I wrote?".
#[derive(Clone, Copy, PartialEq, Eq)]
struct Image {
    writer: u64,
    count: u64,
    nonce: u64,
}

impl Image {
    fn decode(block: &[u8]) -> Outcome<Image> {
        let word = |i: usize| -> Outcome<u64> {
            Ok(u64::from_le_bytes(block.get(8 * i..8 * i + 8).ok_or("short block")?.try_into()?))
        };
        Ok(Image { writer: word(0)?, count: word(1)?, nonce: word(2)? })
    }

    /// The image after this one. All other bytes of the logical block stay as they were found: the
    /// comparison covers the whole block, whatever its size.
    fn next(&self, found: &[u8], writer: u64) -> AlignedBuf {
        let mut block = AlignedBuf::copy_of(found);
        let words = [writer, self.count + 1, rand::random()];
        for (bytes, word) in block.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        block
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writer {} count {} nonce {:016x}", self.writer, self.count, self.nonce)
    }
}

fn read_block(device: &dyn BlockDevice) -> Result<AlignedBuf, DeviceError> {
    let mut block = AlignedBuf::zeroed(device.geometry().logical_block_bytes as usize);
    device.read(COUNTER_AT, &mut block)?;
    Ok(block)
}

fn ensure(what: bool, otherwise: &str) -> Outcome<()> {
    if what { Ok(()) } else { Err(otherwise.into()) }
}

// ---- Scene 1 -------------------------------------------------------------------------------------

fn scene_1_processes(path: &str, device: &Arc<dyn BlockDevice>) -> Outcome<()> {
    println!("\n1. {PROCESSES} processes count to {INCREMENTS} each on one block");
    let start = |writer: u64| {
        Command::new(std::env::current_exe()?)
            .arg(path)
            .env(WRITER, writer.to_string())
            .stdout(Stdio::inherit())
            .spawn()
    };
    let children = (1..=PROCESSES).map(start).collect::<Result<Vec<_>, _>>()?;
    for mut child in children {
        ensure(child.wait()?.success(), "a writer failed")?;
    }
    let total = Image::decode(&read_block(&**device)?)?.count;
    println!("   total {total}, expected {}", PROCESSES * INCREMENTS);
    ensure(total == PROCESSES * INCREMENTS, "an increment was lost")
}

/// What each process of scene 1 does.
fn count_up(path: &str, writer: u64) -> Outcome<()> {
    let device = Counting::new(open_device(path, OpenOptions::default())?);
    let mut known = read_block(&device)?;
    for _ in 0..INCREMENTS {
        loop {
            // Optimistic: compare with what we saw last, and read again only if that was wrong.
            let next = Image::decode(&known)?.next(&known, writer);
            match device.compare_and_write(COUNTER_AT, &known, &next)? {
                CompareOutcome::Swapped => {
                    known = next;
                    break;
                }
                CompareOutcome::Miscompare => known = read_block(&device)?,
            }
        }
    }
    let counts = device.counts();
    println!("   writer {writer}: {} swapped, {} miscompared", counts.swapped, counts.miscompared);
    ensure(counts.swapped == INCREMENTS, "the counts are wrong")
}

// ---- Scene 2 -------------------------------------------------------------------------------------

fn scene_2_miscompare(device: &Arc<dyn BlockDevice>) -> Outcome<()> {
    println!("\n2. A miscompare changes nothing");
    let old = read_block(&**device)?;
    let theirs = Image::decode(&old)?.next(&old, 2);
    let outcome = device.compare_and_write(COUNTER_AT, &old, &theirs)?;
    ensure(outcome == CompareOutcome::Swapped, "nobody else writes, so this must swap")?;

    // Writer 1 does not know that yet.
    let ours = Image::decode(&old)?.next(&old, 1);
    let outcome = device.compare_and_write(COUNTER_AT, &old, &ours)?;
    let found = read_block(&**device)?;
    println!("   expected {}", Image::decode(&old)?);
    println!("   found    {}", Image::decode(&found)?);
    println!("   -> {outcome:?}");
    ensure(outcome == CompareOutcome::Miscompare, "a stale image must not swap")?;
    ensure(*found == *theirs, "a miscompare must leave the block alone")
}

// ---- Scene 3 -------------------------------------------------------------------------------------

fn scene_3_lost_answers(device: &Arc<dyn BlockDevice>) -> Outcome<()> {
    println!("\n3. Lost answers are decided by the content");
    for executed in [true, false] {
        let lossy =
            LosesOneAnswer { inner: Arc::clone(device), executes: executed, armed: AtomicBool::new(true) };
        let old = read_block(device.as_ref())?;
        let new = Image::decode(&old)?.next(&old, 1);
        let Err(err) = lossy.compare_and_write(COUNTER_AT, &old, &new) else {
            return Err("the answer should have been lost".into());
        };
        println!("   answer: {err}");
        ensure(err.executed() == Executed::Maybe, "an unknown outcome must say so")?;

        // Never "failed", never "done": read, and let the block say what happened.
        let now = read_block(&lossy)?;
        println!("   the block now says: {}", Image::decode(&now)?);
        if *now == *new {
            println!("   -> our own image: it was executed");
            ensure(executed, "it was not executed")?;
        } else if *now == *old {
            // Not decided: the command may still be on its way. Another swap of ours from the same
            // image decides it: once that has landed, the old command can only miscompare.
            println!("   -> the old image: not decided; swapping again from it");
            let again = Image::decode(&old)?.next(&old, 1);
            let outcome = lossy.compare_and_write(COUNTER_AT, &old, &again)?;
            ensure(outcome == CompareOutcome::Swapped && !executed, "the second swap must land")?;
            let late = device.compare_and_write(COUNTER_AT, &old, &new)?;
            println!("   -> swapped; the lost command, arriving now: {late:?}");
            ensure(late == CompareOutcome::Miscompare, "a late command must not land")?;
        } else {
            return Err("nobody else writes, so the block must hold one of the two images".into());
        }
    }
    Ok(())
}

/// A device whose first compare-and-write gets no answer, executed or not.
struct LosesOneAnswer {
    inner: Arc<dyn BlockDevice>,
    executes: bool,
    armed: AtomicBool,
}

impl BlockDevice for LosesOneAnswer {
    fn compare_and_write(
        &self,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        if !self.armed.swap(false, Ordering::Relaxed) {
            return self.inner.compare_and_write(offset_bytes, expected, new);
        }
        if self.executes {
            self.inner.compare_and_write(offset_bytes, expected, new)?;
        }
        Err(DeviceError::TimedOut { op: "compare-and-write", offset_bytes, waited_ms: 5000 })
    }

    fn geometry(&self) -> DeviceGeometry {
        self.inner.geometry()
    }
    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.inner.read(offset_bytes, buf)
    }
    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.inner.write(offset_bytes, data)
    }
    fn flush(&self) -> Result<(), DeviceError> {
        self.inner.flush()
    }
    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.inner.discard(offset_bytes, len_bytes)
    }
    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.inner.write_zeroes(offset_bytes, len_bytes)
    }
    fn resets(&self) -> u64 {
        self.inner.resets()
    }
}
