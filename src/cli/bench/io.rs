//! Reads and writes of one file through a mount, against direct I/O on the image itself, in one run.
//!
//! The image file is longer than the volume in it; the raw figures come from the part behind the volume's
//! end: the same file, the same filesystem below, no interference. Rounds alternate, and the median round
//! counts, because other work on the machine comes and goes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Instant;

use crate::cli::scene::{Host, Scene};
use crate::device::AlignedBuf;

const ROUNDS: usize = 5;
const AREA_BYTES: u64 = 64 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    Read,
    Write,
}

/// One size and direction.
pub struct Io {
    pub direction: Direction,
    pub bytes: usize,
    /// Operations a second.
    pub lunfs: f64,
    pub raw: f64,
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn open_direct(path: &Path) -> Result<File, String> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_DIRECT);
    options.open(path).map_err(|e| format!("{}: {e}", path.display()))
}

fn fill(file: &File, base: u64) -> Result<(), String> {
    let mut buf = AlignedBuf::zeroed(1 << 20);
    buf.fill(0x5a);
    for offset in (0..AREA_BYTES).step_by(buf.len()) {
        file.write_all_at(&buf, base + offset).map_err(text)?;
    }
    file.sync_all().map_err(text)
}

/// Operations a second, one at a time, at scattered places; writes end with an fsync.
fn round(file: &File, base: u64, direction: Direction, bytes: usize, count: u64) -> Result<f64, String> {
    let mut buf = AlignedBuf::zeroed(bytes);
    let places = AREA_BYTES / bytes as u64;
    let begun = Instant::now();
    for n in 0..count {
        let offset = base + n.wrapping_mul(7919) % places * bytes as u64;
        match direction {
            Direction::Read => file.read_exact_at(&mut buf, offset).map_err(text)?,
            Direction::Write => file.write_all_at(&buf, offset).map_err(text)?,
        }
    }
    if direction == Direction::Write {
        file.sync_all().map_err(text)?;
    }
    Ok(count as f64 / begun.elapsed().as_secs_f64())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(0.0)
}

/// 4 KiB and 1 MiB, both directions.
pub fn run(scene: &Scene, host: &Host, volume_bytes: u64, quick: bool) -> Result<Vec<Io>, String> {
    let image = open_direct(&scene.image())?;
    let raw_base = volume_bytes;
    image.set_len(volume_bytes + AREA_BYTES).map_err(text)?;
    fill(&image, raw_base)?;
    let file = open_direct(&host.path("disk"))?;
    fill(&file, 0)?;
    let mut results = Vec::new();
    for (bytes, count) in [(4096, 4000), (1 << 20, 64)] {
        let count = if quick { count / 8 } else { count };
        for direction in [Direction::Read, Direction::Write] {
            let (mut lunfs, mut raw) = (Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                lunfs.push(round(&file, 0, direction, bytes, count)?);
                raw.push(round(&image, raw_base, direction, bytes, count)?);
            }
            results.push(Io { direction, bytes, lunfs: median(lunfs), raw: median(raw) });
        }
    }
    Ok(results)
}
