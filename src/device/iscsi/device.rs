//! The block device over two sessions: one for locks and heartbeats, one for everything else.
//!
//! What is done about an unknown outcome, by kind of command:
//!
//! | command | then |
//! | --- | --- |
//! | read | asked again, on the next connection if need be, for [`timing::READ`] |
//! | write, discard, zeroes | made again only on a newer connection (the old command is dead then) and only within [`timing::SEND`] of being asked for; after that the caller, who knows its lease, decides: `TimedOut` if it may still come, `Interrupted` if no connection has it: none ever took it, or the one that did was followed by another |
//! | compare-and-write | never: the caller reads the block |
//! | flush | asked again: what it proves is counted in resets |

use std::sync::Arc;
use std::time::Duration;

use super::connection::Login;
use super::fencing::IscsiFencing;
use super::session::{Path, Session};
use super::timing;
use super::url::Target;
use crate::device::scsi::cdb::{Cdb, opcode};
use crate::device::scsi::inquiry::Description;
use crate::device::scsi::ranges;
use crate::device::scsi::transport::{Data, Limits};
use crate::device::scsi::unit::{Answer, At, Problem, Unit};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed, Fencing, OpenError};
use crate::rt::{Instant, random_u64, sleep};

/// Bytes of one command at most; larger transfers gain nothing and keep others waiting.
const TRANSFER_BYTES: u64 = 1 << 20;
/// Pause after an answer that said "not now".
const PASSING_PAUSE: Duration = Duration::from_millis(5);

/// How to open a LUN.
#[derive(Clone, Debug, Default)]
pub struct IscsiOptions {
    pub read_only: bool,
    /// The logical block the caller insists on.
    pub logical_block_bytes: Option<u32>,
    /// Identity of the host, from which the names of its sessions follow. `None`: names that nobody ever had, for
    /// a tool that runs beside a mount of the same host.
    pub host: Option<[u8; 16]>,
    /// Offer reservations, where the target has them.
    pub reservations: bool,
}

/// A LUN; see the header of [`super`].
pub struct IscsiDevice {
    unit: Arc<Unit>,
    locks: Arc<Session>,
    bulk: Arc<Session>,
    description: Description,
    geometry: DeviceGeometry,
    resets_at_open: u64,
    read_only: bool,
    fencing: Option<IscsiFencing>,
}

/// Name of this machine's initiator: what the administrator says, what the kernel's initiator has, or one that
/// follows from the machine.
pub fn initiator_name() -> String {
    if let Ok(name) = std::env::var("LUNFS_INITIATOR_NAME") {
        return name;
    }
    let configured = std::fs::read_to_string("/etc/iscsi/initiatorname.iscsi").unwrap_or_default();
    let configured = configured.lines().find_map(|line| line.trim().strip_prefix("InitiatorName="));
    if let Some(name) = configured.map(str::trim).filter(|name| !name.is_empty()) {
        return name.to_owned();
    }
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let hash = siphasher::sip::SipHasher24::new_with_key(&[3; 16]).hash(machine.trim().as_bytes());
    format!("iqn.2026-01.org.lunfs:{hash:016x}")
}

/// Identifier of a session: the same for the same host, unit and number, so that a target knows it again; of another
/// host on the same machine, or to another unit of the same target, it is another.
fn isid(host: Option<[u8; 16]>, target: &Target, index: u8) -> (u32, u16) {
    let bits = match host {
        Some(host) => {
            let hasher = siphasher::sip::SipHasher24::new_with_key(&host);
            hasher.hash(format!("{}\n{}", target.name, target.lun).as_bytes())
        }
        None => random_u64(),
    };
    ((bits & 0xFF_FFFF) as u32, (((bits >> 24) & 0x1FFF) as u16) << 3 | u16::from(index & 7))
}

impl IscsiDevice {
    pub fn open(spec: &str, options: &IscsiOptions) -> Result<IscsiDevice, OpenError> {
        let target = Target::parse(spec)
            .map_err(|e| OpenError::Iscsi { spec: super::without_password(spec), why: e.to_string() })?;
        let refuse = |why: String| OpenError::Iscsi { spec: target.to_string(), why };
        let initiator = initiator_name();
        let login = |index| Login {
            portal: target.portal(),
            target: target.name.clone(),
            lun: target.lun,
            initiator: initiator.clone(),
            isid: isid(options.host, &target, index),
            user: target.user.clone(),
            password: target.password.clone(),
        };
        let unit = Arc::new(Unit::default());
        let (locks, description) = Session::first(login(0), unit.clone()).map_err(refuse)?;
        let bulk = Session::another(login(1), unit.clone(), &description).map_err(refuse)?;
        let (locks, bulk) = (Arc::new(locks), Arc::new(bulk));
        let unit_bytes = description.capacity.block_bytes;
        if unit_bytes != 512 && unit_bytes != 4096 {
            return Err(refuse(format!(
                "its logical block is {unit_bytes} bytes; 512 and 4096 are possible"
            )));
        }
        if let Some(asked) = options.logical_block_bytes.filter(|asked| *asked != unit_bytes) {
            return Err(OpenError::LogicalBlockUnmet { spec: target.to_string(), asked, needed: unit_bytes });
        }
        if description.write_protected && !options.read_only {
            return Err(OpenError::ReadOnly { spec: target.to_string() });
        }
        let fencing = match options.reservations && !options.read_only {
            true => IscsiFencing::probe(unit.clone(), vec![locks.clone(), bulk.clone()])
                .map_err(|problem| refuse(problem.to_string()))?,
            false => None,
        };
        let standard = &description.standard;
        log::info!(
            "{target}: {} {} {}, {}, {} bytes in blocks of {unit_bytes}, write cache {}",
            standard.vendor,
            standard.product,
            standard.revision,
            description.name(),
            description.capacity.size_bytes(),
            if description.write_cache { "on" } else { "off" }
        );
        Ok(IscsiDevice {
            geometry: DeviceGeometry {
                logical_block_bytes: unit_bytes,
                size_bytes: description.capacity.size_bytes(),
                volatile_cache: description.write_cache,
                hold_time: timing::HOLD,
            },
            resets_at_open: unit.resets(),
            read_only: options.read_only,
            unit,
            locks,
            bulk,
            description,
            fencing,
        })
    }

    /// What the target says of itself.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The target said that the size of the unit changed. Asked once.
    pub fn take_capacity_changed(&self) -> bool {
        self.unit.take_capacity_changed()
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

    /// Bytes of one transfer.
    fn transfer_bytes(&self) -> u64 {
        let unit = u64::from(self.geometry.logical_block_bytes);
        self.description
            .limits
            .transfer_blocks
            .map_or(TRANSFER_BYTES, |blocks| (u64::from(blocks) * unit).min(TRANSFER_BYTES))
    }

    /// Where single blocks go: a beat never waits behind bulk data.
    fn session_for_read(&self, len: usize) -> (&Session, Duration) {
        match len <= self.geometry.logical_block_bytes as usize {
            true => (&self.locks, timing::SMALL_READ),
            false => (&self.bulk, timing::ANSWER),
        }
    }

    /// A command that may be asked as often as one likes.
    fn ask(
        &self,
        session: &Session,
        at: At,
        cdb: &Cdb,
        mut data: Data<'_>,
        one_try: Duration,
    ) -> Result<usize, DeviceError> {
        let issued = Instant::now();
        let until = issued + timing::READ;
        let mut after = 0;
        let mut last = None;
        loop {
            let Some(path) = session.path(after, until) else {
                let why = last.unwrap_or_else(|| session.trouble());
                return Err(Problem::Unknown { why, later: true }.into_error(
                    at.op,
                    at.offset,
                    at.len,
                    issued.elapsed(),
                ));
            };
            let limits = Limits::within(one_try);
            let problem = match self.unit.perform(&*path.connection, cdb, data.again(), limits) {
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
                    after = spent(&path);
                    sleep(PASSING_PAUSE);
                }
                other => return Err(other.into_error(at.op, at.offset, at.len, issued.elapsed())),
            }
        }
    }

    /// A plain change; see the table above.
    fn change(&self, at: At, cdb: &Cdb, mut data: Data<'_>) -> Result<(), DeviceError> {
        let issued = Instant::now();
        let limits = Limits { send_until: issued + timing::SEND, answer_until: issued + timing::ANSWER };
        let mut after = 0;
        let mut lost = Lost::default();
        loop {
            let Some(path) = self.bulk.path(after, limits.send_until) else {
                return Err(lost.given_up(at, issued, self.bulk.trouble()));
            };
            lost.is_served_by(path.generation);
            // Of a list of ranges, or of a block to be repeated, targets count the bytes as they like.
            let wanted = if cdb.opcode() == opcode::WRITE_16 { data.len_bytes() } else { 0 };
            let problem = match self.unit.perform(&*path.connection, cdb, data.again(), limits) {
                Ok(Answer::Done(moved)) if moved >= wanted => return Ok(()),
                Ok(_) => Problem::Failed {
                    why: "the target took only a part of the data".into(),
                    executed: Executed::Maybe,
                },
                Err(problem) => problem,
            };
            let why = match problem {
                // Answered, or it did not leave this process.
                Problem::Passing(why) => why,
                // Nothing of it can come any more once the next connection stands.
                Problem::Unknown { why, later: false } => {
                    lost.went_out_over(path.generation);
                    why
                }
                Problem::Unknown { why, later: true } => {
                    lost.went_out_over(path.generation);
                    return Err(lost.given_up(at, issued, why));
                }
                other => return Err(other.into_error(at.op, at.offset, at.len, issued.elapsed())),
            };
            if Instant::now() >= limits.send_until {
                return Err(lost.given_up(at, issued, why));
            }
            log::info!("{} at byte {}: {why}; again", at.op, at.offset);
            after = spent(&path);
            sleep(PASSING_PAUSE);
        }
    }
}

/// Can a plain change that has no answer still come? Only from a connection that it was handed to, and only until
/// the next one stands.
#[derive(Default)]
struct Lost {
    /// The generation of the connection that took it and did not answer.
    out: Option<u64>,
}

impl Lost {
    /// Whoever sees a newer connection knows that the older ones are over at the target, with all they carried.
    fn is_served_by(&mut self, generation: u64) {
        self.out = self.out.filter(|out| *out >= generation);
    }

    fn went_out_over(&mut self, generation: u64) {
        self.out = Some(generation);
    }

    /// What its caller hears: to wait until it can't come any more, or to make it again at once.
    fn given_up(&self, at: At, issued: Instant, why: String) -> DeviceError {
        match self.out {
            Some(_) => {
                Problem::Unknown { why, later: true }.into_error(at.op, at.offset, at.len, issued.elapsed())
            }
            None => DeviceError::Interrupted { op: at.op, offset_bytes: at.offset, why },
        }
    }
}

/// The generation that must be exceeded before a command is tried again: this one, if it is over.
fn spent(path: &Path) -> u64 {
    if path.connection.is_up() { path.generation - 1 } else { path.generation }
}

impl BlockDevice for IscsiDevice {
    fn geometry(&self) -> DeviceGeometry {
        self.geometry
    }

    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        self.geometry.check_range("read", offset_bytes, buf.len() as u64)?;
        let (session, one_try) = self.session_for_read(buf.len());
        let mut offset = offset_bytes;
        for part in buf.chunks_mut(self.transfer_bytes() as usize) {
            let len = part.len();
            let at = At { op: "read", offset, len: len as u64 };
            let cdb = Cdb::read_16(self.blocks(offset), self.blocks(len as u64) as u32);
            let transferred = self.ask(session, at, &cdb, Data::In(part), one_try)?;
            if transferred < len {
                let why = format!("the target brought {transferred} of {len} bytes");
                return Err(Problem::Failed { why, executed: Executed::Maybe }.into_error(
                    "read",
                    offset,
                    len as u64,
                    Duration::ZERO,
                ));
            }
            offset += len as u64;
        }
        Ok(())
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        self.check_change("write", offset_bytes, data.len() as u64)?;
        let mut offset = offset_bytes;
        for part in data.chunks(self.transfer_bytes() as usize) {
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
        let issued = Instant::now();
        let limits = Limits::within(timing::SWAP);
        let Some(path) = self.locks.path(0, limits.send_until) else {
            return Err(Problem::Passing(self.locks.trouble()).into_error(
                OP,
                offset_bytes,
                unit as u64,
                issued.elapsed(),
            ));
        };
        let cdb = Cdb::compare_and_write(self.blocks(offset_bytes));
        let data: [&[u8]; 2] = [expected, new];
        match self.unit.perform(&*path.connection, &cdb, Data::Out(&data), limits) {
            Ok(Answer::Done(_)) => Ok(CompareOutcome::Swapped),
            Ok(Answer::Miscompare) => Ok(CompareOutcome::Miscompare),
            Err(problem) => Err(problem.into_error(OP, offset_bytes, unit as u64, issued.elapsed())),
        }
    }

    fn flush(&self) -> Result<(), DeviceError> {
        let at = At { op: "flush", offset: 0, len: 0 };
        self.ask(&self.bulk, at, &Cdb::synchronize_cache(), Data::None, timing::FLUSH).map(drop)
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.check_change("discard", offset_bytes, len_bytes)?;
        let change = |at: At, cdb: &Cdb, data: Data<'_>| self.change(at, cdb, data);
        ranges::discard(&self.description, offset_bytes, len_bytes, change)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.check_change("write-zeroes", offset_bytes, len_bytes)?;
        let change = |at: At, cdb: &Cdb, data: Data<'_>| self.change(at, cdb, data);
        ranges::write_zeroes(&self.description, self.transfer_bytes(), offset_bytes, len_bytes, change)
    }

    fn resets(&self) -> u64 {
        self.unit.resets() - self.resets_at_open
    }

    fn unit_name(&self) -> Option<String> {
        Some(self.description.name()).filter(|name| !name.is_empty())
    }

    fn about(&self) -> Vec<(&'static str, String)> {
        let mut about = vec![("backend", "iscsi (libiscsi)".into())];
        about.extend(self.description.about());
        about.push(("initiator", initiator_name()));
        about.push(("hold time", format!("{} ms", timing::HOLD.as_millis())));
        about
    }

    fn fencing(&self) -> Option<&dyn Fencing> {
        self.fencing.as_ref().map(|fencing| fencing as &dyn Fencing)
    }
}
