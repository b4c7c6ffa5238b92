//! The block device over the paths of a unit.
//!
//! What is done about an unknown outcome, by kind of command:
//!
//! | command | then |
//! | --- | --- |
//! | read, flush | asked again, on another path if there is one, for [`timing::READ`]; what a flush proves is counted in resets |
//! | write, discard, zeroes | not repeated here unless nothing was executed and [`timing::SEND`] isn't over: once the ioctl has returned and the target had its [`timing::TARGET`], nothing of it can come any more, and the caller, who knows its lease, makes it again (`DeviceError::Interrupted`) |
//! | compare-and-write | the caller reads the block; another path is tried only if it was certainly not executed |
//!
//! Discards are UNMAP commands of ours and end like writes: a late one is as dangerous as a late write, and is counted
//! by the same hold time. BLKDISCARD would repeat them on its own.

mod opening;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

pub use self::opening::KernelOptions;

use super::door::Kernel;
use super::fencing::KernelFencing;
use super::hold::Published;
use super::path::{Condition, Path, SMALL_BYTES};
use super::paths::Paths;
use super::timing;
use crate::device::scsi::cdb::{Cdb, opcode};
use crate::device::scsi::inquiry::Description;
use crate::device::scsi::ranges;
use crate::device::scsi::transport::{Data, Limits};
use crate::device::scsi::unit::{Answer, At, Problem, Unit};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed, Fencing};
use crate::rt::{Instant, sleep};

/// Pause after an answer that said "not now".
const PASSING_PAUSE: Duration = Duration::from_millis(5);

/// A LUN; see the header of [`super`].
pub struct KernelDevice {
    kernel: Arc<dyn Kernel>,
    unit: Arc<Unit>,
    fencing: Option<KernelFencing>,
    paths: Arc<Paths>,
    description: Description,
    geometry: DeviceGeometry,
    multipath: Option<String>,
    published: Published,
    transfer_bytes: u64,
    resets_at_open: u64,
    read_only: bool,
    _claim: Option<Box<dyn Any + Send + Sync>>,
}

impl KernelDevice {
    /// What the target says of itself.
    pub fn description(&self) -> &Description {
        &self.description
    }

    fn check_change(&self, op: &'static str, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.geometry.check_range(op, offset_bytes, len_bytes)?;
        if self.read_only {
            return Err(DeviceError::write_protected(op, offset_bytes));
        }
        Ok(())
    }

    fn blocks(&self, bytes: u64) -> u64 {
        bytes / u64::from(self.geometry.logical_block_bytes)
    }

    /// A command that may be asked as often as one likes.
    fn ask(&self, at: At, cdb: &Cdb, mut data: Data<'_>) -> Result<usize, DeviceError> {
        let issued = Instant::now();
        let until = issued + timing::READ;
        let read = cdb.opcode() == opcode::READ_16;
        let small = read && at.len <= SMALL_BYTES as u64;
        let mut last = None;
        loop {
            let path = if small { self.paths.one(until) } else { self.paths.next(until) };
            let Some(path) = path else {
                let why = last.unwrap_or_else(|| self.paths.trouble());
                return Err(at.error(Problem::Unknown { why, later: true }, issued));
            };
            let one_try = Limits::within(if small { timing::SMALL_READ } else { timing::BULK_READ });
            // Nothing is gained by leaving the only path.
            let answered = match small || read && self.multipath.is_some() {
                true => self.unit.perform(&path.timed(), cdb, data.again(), one_try),
                false => self.unit.perform(&path.direct(), cdb, data.again(), one_try),
            };
            let problem = match answered {
                Ok(Answer::Done(transferred)) => return Ok(transferred),
                Ok(Answer::Miscompare) => {
                    Problem::Failed { why: "miscompare".into(), executed: Executed::Maybe }
                }
                Err(problem) => problem,
            };
            match problem {
                Problem::Passing(why) | Problem::Unknown { why, .. } if Instant::now() < until => {
                    log::debug!("{} at byte {}: {why}; again", at.op, at.offset);
                    last = Some(why);
                    sleep(PASSING_PAUSE);
                }
                other => return Err(at.error(other, issued)),
            }
        }
    }

    /// A plain change; see the table above.
    fn change(&self, at: At, cdb: &Cdb, mut data: Data<'_>) -> Result<(), DeviceError> {
        let issued = Instant::now();
        let send_until = issued + timing::SEND;
        let limits = Limits { send_until, answer_until: issued + timing::READ };
        loop {
            let Some(path) = self.paths.next(limits.send_until) else {
                return Err(interrupted(at, self.paths.trouble()));
            };
            // Of a list of ranges, or of a block to be repeated, targets count the bytes as they like.
            let wanted = if cdb.opcode() == opcode::WRITE_16 { data.len_bytes() } else { 0 };
            let problem = match self.unit.perform(&path.direct(), cdb, data.again(), limits) {
                Ok(Answer::Done(moved)) if moved >= wanted => return Ok(()),
                Ok(_) => Problem::Failed {
                    why: "the target took only a part of the data".into(),
                    executed: Executed::Maybe,
                },
                Err(problem) => problem,
            };
            match problem {
                Problem::Passing(why) if Instant::now() < send_until => {
                    log::debug!("{} at byte {}: {why}; again", at.op, at.offset);
                    sleep(PASSING_PAUSE);
                }
                Problem::Passing(why) => return Err(interrupted(at, why)),
                Problem::Unknown { why, later } => {
                    if later {
                        sleep(timing::TARGET);
                    }
                    return Err(interrupted(at, why));
                }
                other => return Err(at.error(other, issued)),
            }
        }
    }

    /// One line for each path: where it is, and how it is.
    fn path_words(&self, path: &Arc<Path>) -> String {
        let disk = path.disk();
        let condition = match path.condition() {
            Condition::Up => "up".to_owned(),
            Condition::Doubtful { why, since, .. } => {
                format!("not used for {} s: {why}", since.elapsed().as_secs())
            }
        };
        let place = disk.dir.scsi_device();
        let place =
            place.and_then(|p| Some(p.file_name()?.to_string_lossy().into_owned())).unwrap_or_default();
        let alua = disk.dir.text("device/access_state").map(|s| format!(", {s}")).unwrap_or_default();
        format!(
            "{} at {place} ({}), {}{alua}, {condition}",
            disk.name,
            path.hold.carrier,
            disk.dir.scsi_state()
        )
    }
}

/// Nobody knows what became of it, and nothing of it can come any more.
fn interrupted(at: At, why: String) -> DeviceError {
    DeviceError::Interrupted { op: at.op, offset_bytes: at.offset, why }
}

impl BlockDevice for KernelDevice {
    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.geometry.check_range("read", offset_bytes, buf.len() as u64)?;
        let mut offset = offset_bytes;
        for part in buf.chunks_mut(self.transfer_bytes as usize) {
            let len = part.len();
            let at = At { op: "read", offset, len: len as u64 };
            let cdb = Cdb::read_16(self.blocks(offset), self.blocks(len as u64) as u32);
            let transferred = self.ask(at, &cdb, Data::In(part))?;
            if transferred < len {
                let why = format!("the target brought {transferred} of {len} bytes");
                return Err(at.error(Problem::Failed { why, executed: Executed::Maybe }, Instant::now()));
            }
            offset += len as u64;
        }
        Ok(())
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check_change("write", offset_bytes, data.len() as u64)?;
        let mut offset = offset_bytes;
        for part in data.chunks(self.transfer_bytes as usize) {
            let len = part.len() as u64;
            let cdb = Cdb::write_16(self.blocks(offset), self.blocks(len) as u32);
            self.change(At { op: "write", offset, len }, &cdb, Data::Out(&[part]))?;
            offset += len;
        }
        Ok(())
    }

    fn compare_and_write(
        &self,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        const OP: &str = "compare-and-write";
        self.geometry.check_images(OP, offset_bytes, expected, new)?;
        let unit = expected.len();
        self.check_change(OP, offset_bytes, unit as u64)?;
        let at = At { op: OP, offset: offset_bytes, len: unit as u64 };
        let issued = Instant::now();
        let limits = Limits::within(timing::SWAP);
        let cdb = Cdb::compare_and_write(self.blocks(offset_bytes));
        let data: [&[u8]; 2] = [expected, new];
        loop {
            let Some(path) = self.paths.one(limits.send_until) else {
                return Err(at.error(Problem::Passing(self.paths.trouble()), issued));
            };
            let doubts = path.doubts();
            match self.unit.perform(&path.timed(), &cdb, Data::Out(&data), limits) {
                Ok(Answer::Done(_)) => return Ok(CompareOutcome::Swapped),
                Ok(Answer::Miscompare) => return Ok(CompareOutcome::Miscompare),
                // The path is to blame, and it was not executed: the next one.
                Err(Problem::Passing(why))
                    if path.doubts() != doubts && Instant::now() < limits.send_until =>
                {
                    log::debug!("{OP} at byte {offset_bytes}: {why}; on another path");
                }
                Err(problem) => return Err(at.error(problem, issued)),
            }
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.ask(At { op: "flush", offset: 0, len: 0 }, &Cdb::synchronize_cache(), Data::None).map(drop)
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.check_change("discard", offset_bytes, len_bytes)?;
        let change = |at: At, cdb: &Cdb, data: Data<'_>| self.change(at, cdb, data);
        ranges::discard(&self.description, offset_bytes, len_bytes, change)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.check_change("write-zeroes", offset_bytes, len_bytes)?;
        let change = |at: At, cdb: &Cdb, data: Data<'_>| self.change(at, cdb, data);
        ranges::write_zeroes(&self.description, self.transfer_bytes, offset_bytes, len_bytes, change)
    }

    fn resets(&self) -> u64 {
        self.unit.resets() - self.resets_at_open
    }

    fn unit_name(&self) -> Option<String> {
        Some(self.description.name()).filter(|name| !name.is_empty())
    }

    fn about(&self) -> Vec<(&'static str, String)> {
        let paths = self.paths.all();
        let all = |each: &dyn Fn(&Arc<Path>) -> String| {
            let mut words: Vec<String> = paths.iter().map(each).collect();
            words.dedup();
            words.join("; ")
        };
        let depth = |path: &Arc<Path>| path.disk().dir.text("device/queue_depth").unwrap_or_default();
        let trouble = self.published.refusal.iter().chain(&self.published.warnings).cloned();
        let mut about = vec![("backend", "scsi (a disk of this kernel, by SG_IO)".into())];
        about.extend(self.description.about());
        about.extend([
            ("largest command", format!("{} KiB", self.transfer_bytes / 1024)),
            ("multipath", self.multipath.clone().unwrap_or_else(|| "no".into())),
            ("paths", paths.iter().map(|path| self.path_words(path)).collect::<Vec<_>>().join("; ")),
            ("queue depth", all(&depth)),
            ("kernel settings", all(&|path| path.hold.words())),
            ("hold time", format!("{} ms", self.published.time.as_millis())),
            ("attention", trouble.collect::<Vec<_>>().join("; ")),
        ]);
        about
    }

    fn fencing(&self) -> Option<&dyn Fencing> {
        self.fencing.as_ref().map(|fencing| fencing as &dyn Fencing)
    }

    fn own_nexus(&self) -> bool {
        false
    }
}

impl Drop for KernelDevice {
    fn drop(&mut self) {
        // What the kernel cached meanwhile for others (udev, blkid) is old.
        if let Some(top) = self.paths.one(Instant::now())
            && !self.read_only
            && let Ok(node) = self.kernel.open(&top.disk().name, top.disk().number)
        {
            let _ = node.drop_page_cache();
        }
    }
}
