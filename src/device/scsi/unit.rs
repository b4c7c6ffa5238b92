//! A logical unit over any path: sends a command, judges the answer, and does what the answer asks for.
//!
//! What is done here and nowhere else: busy states are waited out with jitter; unit attentions are taken in (each
//! counts what it means) and drawn by TEST UNIT READY until none is left; a reservation conflict latches; after a
//! reset this host's registration is looked at.
//!
//! The state is one for all paths of a device: a conflict on one of them ends all.
//!
//! Not for: sending a change again whose outcome is unknown. The backend knows whether its path is proof that the
//! first one can't come any more.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use thiserror::Error;

use super::cdb::{Cdb, opcode};
use super::inquiry::{self, BlockLimits, Caching, Capacity, Description, Standard};
use super::sense::Sense;
use super::transport::{Data, Limits, Transport};
use super::verdict::Verdict;
use crate::device::{DeviceError, Executed, FencingKey};
use crate::rt::{Instant, Mutex, random_u64, sleep};

/// More unit attentions than this in a row is a target that does nothing else.
const ATTENTIONS_MAX: u32 = 32;
const BUSY_PAUSE_FIRST: Duration = Duration::from_millis(1);
const BUSY_PAUSE_LONGEST: Duration = Duration::from_millis(100);

/// Answer to a command that was executed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// With the bytes that were moved.
    Done(usize),
    Miscompare,
}

/// Why a command has no such answer.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum Problem {
    /// This host is shut out.
    #[error("reservation conflict")]
    Fenced,
    /// RESERVATION CONFLICT to a command that changes no data.
    #[error("reservation conflict")]
    Conflict,
    /// Certainly not executed, and it passes: busy, not sent, a unit attention.
    #[error("{0}")]
    Passing(String),
    #[error("{why}")]
    Unknown { why: String, later: bool },
    #[error("the target does not know the command")]
    Unsupported,
    #[error("outside the unit")]
    OutOfRange,
    #[error("write protected")]
    WriteProtected,
    #[error("{why}")]
    Failed { why: String, executed: Executed },
}

impl Problem {
    /// As the device trait says it.
    pub fn into_error(
        self,
        op: &'static str,
        offset_bytes: u64,
        len_bytes: u64,
        waited: Duration,
    ) -> DeviceError {
        let io =
            |executed, why: String| DeviceError::io(op, offset_bytes, executed, std::io::Error::other(why));
        match self {
            Problem::Fenced | Problem::Conflict => DeviceError::Fenced { op, offset_bytes },
            Problem::Passing(why) => io(Executed::No, why),
            Problem::Unknown { later: true, .. } => {
                DeviceError::TimedOut { op, offset_bytes, waited_ms: waited.as_millis() as u64 }
            }
            Problem::Unknown { why, later: false } => io(Executed::Maybe, why),
            Problem::Unsupported => DeviceError::Unsupported { op },
            Problem::OutOfRange => DeviceError::BadRange { op, offset_bytes, len_bytes },
            Problem::WriteProtected => DeviceError::write_protected(op, offset_bytes),
            Problem::Failed { why, executed } => io(executed, why),
        }
    }
}

/// What error messages say of a command.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub op: &'static str,
    pub offset: u64,
    pub len: u64,
}

impl At {
    /// As the device trait says it.
    pub fn error(&self, problem: Problem, issued: Instant) -> DeviceError {
        problem.into_error(self.op, self.offset, self.len, issued.elapsed())
    }
}

/// What all paths of a device have in common.
#[derive(Default)]
pub struct Unit {
    /// See `BlockDevice::resets`.
    resets: AtomicU64,
    /// A conflict was met; only an explicit registration ends this.
    fenced: AtomicBool,
    /// The key this host changes the device under, once registered.
    key: Mutex<Option<FencingKey>>,
    /// The target refuses to keep registrations over a power loss of its own (APTPL).
    pub(super) forgets_registrations: AtomicBool,
    /// The target said that its capacity changed.
    capacity_changed: AtomicBool,
}

impl Unit {
    pub fn resets(&self) -> u64 {
        self.resets.load(Ordering::SeqCst)
    }

    /// The target may have lost its cache, or this host's registration.
    pub fn note_reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }

    pub fn is_fenced(&self) -> bool {
        self.fenced.load(Ordering::SeqCst)
    }

    pub fn key(&self) -> Option<FencingKey> {
        *self.key.lock()
    }

    /// What this host changes from now on it changes under this key, which is registered on all paths; a conflict
    /// that was met before is over.
    pub fn adopt_key(&self, key: Option<FencingKey>) {
        *self.key.lock() = key;
        self.fenced.store(false, Ordering::SeqCst);
    }

    pub(super) fn latch_fenced(&self, why: &str) {
        if !self.fenced.swap(true, Ordering::SeqCst) {
            log::error!("this host was fenced at the device: {why}; it changes nothing there any more");
        }
    }

    pub fn take_capacity_changed(&self) -> bool {
        self.capacity_changed.swap(false, Ordering::SeqCst)
    }

    /// Sends a command until it has an answer that means something, or until the limits.
    pub fn perform(
        &self,
        path: &dyn Transport,
        cdb: &Cdb,
        mut data: Data<'_>,
        limits: Limits,
    ) -> Result<Answer, Problem> {
        let mut pause = BUSY_PAUSE_FIRST;
        let mut attentions = 0;
        loop {
            if cdb.changes_data() && self.is_fenced() {
                return Err(Problem::Fenced);
            }
            let outcome = path.execute(cdb, data.again(), limits);
            let passing = match Verdict::of(&outcome) {
                Verdict::Done => return Ok(Answer::Done(outcome.map_or(0, |reply| reply.transferred))),
                Verdict::Miscompare { .. } if cdb.opcode() == opcode::COMPARE_AND_WRITE => {
                    return Ok(Answer::Miscompare);
                }
                Verdict::Miscompare { .. } => {
                    let why = "a miscompare of a command that compares nothing".into();
                    return Err(Problem::Failed { why, executed: Executed::Maybe });
                }
                Verdict::Conflict if cdb.changes_data() || cdb.opcode() == opcode::SYNCHRONIZE_CACHE_16 => {
                    self.latch_fenced(&format!("reservation conflict of a {}", cdb.name()));
                    return Err(Problem::Fenced);
                }
                Verdict::Conflict => return Err(Problem::Conflict),
                Verdict::Attention(sense) => {
                    attentions += 1;
                    match self.attend(path, sense, limits) {
                        // Who is shut out may still read.
                        Err(Problem::Fenced) if !cdb.changes_data() => {}
                        other => other?,
                    }
                    if cdb.opcode() == opcode::COMPARE_AND_WRITE {
                        let why = sense.to_string();
                        return Err(match path.replays() {
                            true => Problem::Unknown { why, later: false },
                            false => Problem::Passing(why),
                        });
                    }
                    if attentions < ATTENTIONS_MAX && Instant::now() < limits.send_until {
                        continue;
                    }
                    sense.to_string()
                }
                Verdict::Deferred(sense) => {
                    log::warn!("the device reports {sense}; what it had answered before may be lost");
                    self.note_reset();
                    attentions += 1;
                    if cdb.opcode() != opcode::COMPARE_AND_WRITE && attentions < ATTENTIONS_MAX {
                        continue;
                    }
                    sense.to_string()
                }
                Verdict::Busy(why) => {
                    let jittered = pause.mul_f64(0.5 + (random_u64() % 1024) as f64 / 1024.0);
                    if Instant::now() + jittered < limits.send_until {
                        sleep(jittered);
                        pause = (pause * 2).min(BUSY_PAUSE_LONGEST);
                        continue;
                    }
                    why.to_owned()
                }
                Verdict::NotSent(why) => why,
                Verdict::Unknown { why, later } => return Err(Problem::Unknown { why, later }),
                Verdict::Medium(sense) => {
                    return Err(Problem::Failed { why: sense.to_string(), executed: Executed::Maybe });
                }
                Verdict::Unsupported(_) => return Err(Problem::Unsupported),
                Verdict::OutOfRange => return Err(Problem::OutOfRange),
                Verdict::WriteProtected => return Err(Problem::WriteProtected),
                Verdict::Failed { why, executed } => return Err(Problem::Failed { why, executed }),
            };
            return Err(Problem::Passing(passing));
        }
    }

    /// Takes in a unit attention, and draws what others wait behind it.
    fn attend(&self, path: &dyn Transport, first: Sense, limits: Limits) -> Result<(), Problem> {
        let mut look_at_registration = self.note_attention(first);
        look_at_registration |= self.draw_attentions(path, limits)?;
        if look_at_registration { self.confirm_registration(path, limits) } else { Ok(()) }
    }

    /// Counts what a unit attention means. True: our registration may be gone.
    fn note_attention(&self, sense: Sense) -> bool {
        match (sense.asc, sense.ascq) {
            (0x29, _) => {
                log::info!("the device reports {sense}: it was reset, or this path is new to it");
                self.note_reset();
                true
            }
            // Reservations preempted, released; registrations preempted.
            (0x2A, 0x03..=0x05) => true,
            (0x2A, 0x09) => {
                log::warn!("the device reports {sense}: its capacity changed");
                self.capacity_changed.store(true, Ordering::SeqCst);
                false
            }
            _ => {
                log::info!("the device reports {sense}");
                false
            }
        }
    }

    /// TEST UNIT READY until no unit attention is left: to be done on a new path before anything else. True: one of
    /// them puts our registration in doubt.
    pub fn draw_attentions(&self, path: &dyn Transport, limits: Limits) -> Result<bool, Problem> {
        let mut doubt = false;
        for _ in 0..ATTENTIONS_MAX {
            match Verdict::of(&path.execute(&Cdb::test_unit_ready(), Data::None, limits)) {
                Verdict::Attention(sense) => doubt |= self.note_attention(sense),
                Verdict::Deferred(_) => self.note_reset(),
                Verdict::NotSent(why) => return Err(Problem::Passing(why)),
                Verdict::Unknown { why, .. } => return Err(Problem::Passing(why)),
                // Not ready, reserved, busy: the command at hand will hear of it.
                _ => return Ok(doubt),
            }
        }
        Err(Problem::Passing("nothing but unit attentions".into()))
    }

    /// Asks the target for what it is.
    pub fn describe(&self, path: &dyn Transport, limits: Limits) -> Result<Description, Problem> {
        let fail = |why: inquiry::Senseless| Problem::Failed { why: why.to_string(), executed: Executed::No };
        let standard =
            Standard::decode(&self.ask(path, &Cdb::inquiry(None, 96), 96, limits)?).map_err(fail)?;
        let capacity = self.ask(path, &Cdb::read_capacity_16(32), 32, limits)?;
        let capacity = Capacity::decode(&capacity).map_err(fail)?;
        let page = |code| match self.ask(path, &Cdb::inquiry(Some(code), 1024), 1024, limits) {
            Err(Problem::Unsupported | Problem::Failed { .. }) => Ok(Vec::new()),
            other => other,
        };
        let caching = match self.ask(path, &Cdb::mode_sense_caching(192), 192, limits) {
            Ok(bytes) => Caching::decode(&bytes),
            // Some targets don't answer this to a host without a registration.
            Err(Problem::Unsupported | Problem::Failed { .. } | Problem::Conflict) => None,
            Err(e) => return Err(e),
        };
        Ok(Description {
            standard,
            serial: inquiry::serial(&page(0x80)?),
            designators: inquiry::designators(&page(0x83)?),
            capacity,
            limits: BlockLimits::decode(&page(0xB0)?),
            write_cache: caching.is_none_or(|c| c.write_cache),
            write_protected: caching.is_some_and(|c| c.write_protected),
        })
    }

    /// A command that brings data: as much as came.
    pub(super) fn ask(
        &self,
        path: &dyn Transport,
        cdb: &Cdb,
        len: usize,
        limits: Limits,
    ) -> Result<Vec<u8>, Problem> {
        let mut buf = vec![0; len];
        match self.perform(path, cdb, Data::In(&mut buf), limits)? {
            Answer::Done(transferred) => buf.truncate(transferred),
            Answer::Miscompare => buf.clear(),
        }
        Ok(buf)
    }
}
