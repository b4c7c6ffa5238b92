//! A command from arrival to answer: which fault it meets, when it executes, what goes back.
//!
//! A command that nothing holds up is executed by the thread that read it. One that waits gets a thread of its own, so
//! that the session goes on behind it, as on an array with a slow disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng;

use crate::faults::{Arrival, Fault, Which};
use crate::lock;
use crate::scsi::cdb::{Cdb, Kind, op};
use crate::scsi::unit::{Command, How};
use crate::sense::{Answer, GOOD, Sense, TASK_ABORTED};
use crate::session::Session;
use crate::target::{Guarded, Lun, Shared};
use crate::trace::Entry;

/// A command with all its data.
pub(crate) struct Task {
    /// Order of arrival over all sessions, from 1.
    pub arrival: u64,
    pub session: Arc<Session>,
    pub tag: u32,
    pub lun: Option<u16>,
    pub cdb: Cdb,
    pub data: Vec<u8>,
    /// What the initiator expects to transfer.
    pub expected: usize,
    pub reads: bool,
    /// By ABORT TASK or ABORT TASK SET of its own session.
    pub aborted: AtomicBool,
}

/// What a command outlives.
#[derive(Clone, Copy, Default)]
struct Outlives {
    session: bool,
    abort: bool,
}

enum Ended {
    With(Answer),
    /// Aborted, or its session is gone: nobody is told.
    Silently,
}

impl Shared {
    pub(crate) fn arrived(self: &Arc<Self>, task: Task) {
        let fault = self.fault_for(&task);
        let delay = self.delay_of(&task);
        if delay.is_none() && fault.as_ref().is_none_or(|(_, fault)| !fault.waits()) && !self.races(&task) {
            return self.carry_out(&task, fault);
        }
        let task = Arc::new(task);
        task.session.hold(&task);
        let (shared, held) = (self.clone(), task.clone());
        let started = std::thread::Builder::new().name("held".into()).spawn(move || {
            if let Some(delay) = delay {
                std::thread::sleep(delay);
            }
            shared.carry_out(&held, fault);
            held.session.let_go(&held);
        });
        if started.is_err() {
            task.session.let_go(&task);
            task.session.answer(&task, &Answer::status(crate::sense::TASK_SET_FULL), false);
        }
    }

    fn fault_for(&self, task: &Task) -> Option<(Arc<str>, Fault)> {
        if !self.any_fault.load(Ordering::SeqCst) {
            return None;
        }
        let (nexus, lun) = (task.session.nexus()?, task.lun?);
        let blocks = blocks_of(task);
        lock(&self.faults).take(&Arrival { nexus, lun, cdb: &task.cdb, blocks })
    }

    fn delay_of(&self, task: &Task) -> Option<Duration> {
        let lun = self.lun(task.lun?)?;
        if !lun.slow.load(Ordering::SeqCst) {
            return None;
        }
        let mut guarded = lock(&lun.guarded);
        let unit = &mut guarded.unit;
        let latency = unit.personality.latency;
        let mut us = latency.min_us;
        if latency.tail_per_mille > 0 && unit.rng.random_range(0..1000) < latency.tail_per_mille {
            us = latency.tail_us;
        } else if latency.max_us > latency.min_us {
            us = unit.rng.random_range(latency.min_us..=latency.max_us);
        }
        if let Some((lba, blocks)) = blocks_of(task) {
            let end = lba.saturating_add(u64::from(blocks));
            let slow = unit.personality.slow.iter().filter(|slow| lba <= slow.last && end > slow.first);
            us += slow.map(|slow| slow.us).sum::<u64>();
        }
        (us > 0).then(|| Duration::from_micros(us))
    }

    fn races(&self, task: &Task) -> bool {
        task.cdb.opcode() == op::COMPARE_AND_WRITE
            && task.lun.and_then(|lun| self.lun(lun)).is_some_and(|lun| lock(&lun.guarded).unit.races())
    }

    fn carry_out(&self, task: &Task, fault: Option<(Arc<str>, Fault)>) {
        let session = &task.session;
        let Some((id, fault)) = fault else {
            let ended = if self.races(task) { self.race(task, None, None) } else { self.execute(task, None) };
            return session.end(task, ended);
        };
        let id = Some(&id);
        match fault {
            Fault::LoseAnswer => drop(self.execute(task, id)),
            Fault::Drop => self.skip(task, id, GOOD, None),
            Fault::Late { ms, past_session, past_abort, past_reservation, answer } => {
                std::thread::sleep(Duration::from_millis(ms));
                let how = How { unchecked: past_reservation, ..How::default() };
                let ended = self.execute_how(
                    task,
                    Outlives { session: past_session, abort: past_abort },
                    how,
                    id,
                    false,
                );
                if answer {
                    session.end(task, ended);
                }
            }
            Fault::AnswerLate { ms } => {
                let ended = self.execute(task, id);
                std::thread::sleep(Duration::from_millis(ms));
                self.gate.wait(session.initiator());
                session.end(task, ended);
            }
            Fault::Twice { gap_ms, answer } => {
                let outlives = Outlives { session: true, abort: true };
                let first = self.execute(task, id);
                if matches!(first, Ended::Silently) {
                    return;
                }
                let mut first = Some(first);
                if answer == Which::First {
                    session.end(task, first.take().unwrap_or(Ended::Silently));
                }
                std::thread::sleep(Duration::from_millis(gap_ms));
                let second = self.execute_how(task, outlives, How::default(), id, true);
                if answer == Which::Second {
                    session.end(task, second);
                }
            }
            Fault::Attention { asc, ascq } => self.refuse(task, id, Sense::new(0x06, asc, ascq).into()),
            Fault::Status { status } => self.refuse(task, id, Answer::status(status)),
            Fault::Check { key, asc, ascq, executed, only_blocks } => {
                let answer = Answer::check(Sense::new(key, asc, ascq));
                self.instead(task, id, executed, How { only_blocks, ..How::default() }, answer);
            }
            Fault::GoodForNothing => self.refuse(task, id, Answer::good().taking(task.data.len())),
            Fault::Miscompare { executed, information } => {
                let answer = Answer::check(Sense { information, ..Sense::MISCOMPARE });
                self.instead(task, id, executed, How::default(), answer);
            }
            Fault::Race { us } => {
                let ended = self.race(task, Some(Duration::from_micros(us)), id);
                session.end(task, ended);
            }
            Fault::Cut { executed } => {
                match executed {
                    true => drop(self.execute(task, id)),
                    false => self.skip(task, id, GOOD, None),
                }
                self.close(session);
            }
        }
    }

    /// Told something else than what happened.
    fn instead(&self, task: &Task, id: Option<&Arc<str>>, executed: bool, how: How, answer: Answer) {
        if !executed {
            return self.refuse(task, id, answer);
        }
        if let Ended::With(_) = self.execute_how(task, Outlives::default(), how, id, false) {
            task.session.end(task, Ended::With(answer));
        }
    }

    fn refuse(&self, task: &Task, id: Option<&Arc<str>>, answer: Answer) {
        self.skip(task, id, answer.status, answer.sense);
        task.session.end(task, Ended::With(answer));
    }

    fn execute(&self, task: &Task, id: Option<&Arc<str>>) -> Ended {
        self.execute_how(task, Outlives::default(), How::default(), id, false)
    }

    /// The lock of the unit, once its initiator is not frozen.
    fn locked<T>(&self, task: &Task, lun: &Lun, f: impl FnOnce(&mut Guarded) -> T) -> T {
        loop {
            let mut guarded = lock(&lun.guarded);
            if !self.gate.is_closed_to(task.session.initiator()) {
                return f(&mut guarded);
            }
            drop(guarded);
            self.gate.wait(task.session.initiator());
        }
    }

    fn execute_how(
        &self,
        task: &Task,
        outlives: Outlives,
        how: How,
        id: Option<&Arc<str>>,
        again: bool,
    ) -> Ended {
        let (Some(number), Some(nexus)) = (task.lun, task.session.nexus()) else {
            return Ended::With(Sense::LUN_NOT_SUPPORTED.into());
        };
        if task.cdb.opcode() == op::REPORT_LUNS {
            return Ended::With(self.report_luns(&task.cdb));
        }
        let Some(lun) = self.lun(number) else {
            return Ended::With(no_such_lun(&task.cdb));
        };
        self.locked(task, &lun, |guarded| {
            if let Some(ended) = ended_before(task, guarded, outlives) {
                return ended;
            }
            let command = Command { nexus, cdb: task.cdb, data: &task.data };
            let answer = guarded.unit.execute(&command, how);
            for victim in std::mem::take(&mut guarded.unit.to_abort) {
                self.abort(guarded, Some(&victim));
            }
            // A compare-and-write in two halves is one entry, made by the half that ends it.
            if !(how.compare_only && answer.is_good()) {
                self.note(task, number, &answer, id, again);
            }
            Ended::With(answer)
        })
    }

    /// A compare-and-write in two halves.
    fn race(&self, task: &Task, gap: Option<Duration>, id: Option<&Arc<str>>) -> Ended {
        let compare_only = How { compare_only: true, ..How::default() };
        let compared = self.execute_how(task, Outlives::default(), compare_only, id, false);
        let (Ended::With(answer), Some(number), Some(nexus)) = (&compared, task.lun, task.session.nexus())
        else {
            return compared;
        };
        let Some(lun) = self.lun(number).filter(|_| answer.status == GOOD) else {
            return compared;
        };
        let gap = gap.unwrap_or_else(|| Duration::from_micros(lock(&lun.guarded).unit.personality.race_us));
        std::thread::sleep(gap);
        self.locked(task, &lun, |guarded| {
            let answer = guarded.unit.store_swapped(&Command { nexus, cdb: task.cdb, data: &task.data });
            self.note(task, number, &answer, id, false);
            Ended::With(answer)
        })
    }

    fn report_luns(&self, cdb: &Cdb) -> Answer {
        let mut list = Vec::new();
        for lun in self.all_luns() {
            let method = if lun.number < 256 { 0 } else { 0x4000 };
            list.extend_from_slice(&(lun.number | method).to_be_bytes());
            list.extend_from_slice(&[0; 6]);
        }
        let mut out = (list.len() as u32).to_be_bytes().to_vec();
        out.extend_from_slice(&[0; 4]);
        out.extend(list);
        Answer::allocated(out, cdb.u32_at(6) as usize)
    }

    // --- the trace -------------------------------------------------------------------------------------

    fn note(&self, task: &Task, lun: u16, answer: &Answer, id: Option<&Arc<str>>, again: bool) {
        self.add_entry(task, lun, (answer.status, answer.sense), (answer.changed, false, again), id);
    }

    fn skip(&self, task: &Task, id: Option<&Arc<str>>, status: u8, sense: Option<Sense>) {
        if let Some(lun) = task.lun {
            self.add_entry(task, lun, (status, sense), (false, true, false), id);
        }
    }

    fn add_entry(
        &self,
        task: &Task,
        lun: u16,
        (status, sense): (u8, Option<Sense>),
        (changed, skipped, again): (bool, bool, bool),
        id: Option<&Arc<str>>,
    ) {
        let Some(nexus) = task.session.nexus() else { return };
        let blocks = blocks_of(task);
        let entry = Entry {
            sequence: 0,
            at_us: self.started.elapsed().as_micros() as u64,
            nexus: nexus.clone(),
            lun,
            opcode: task.cdb.opcode(),
            action: task.cdb.service_action(),
            name: task.cdb.name(),
            lba: blocks.map(|(lba, _)| lba),
            blocks: blocks.map_or(0, |(_, n)| n),
            status,
            sense,
            changed,
            skipped,
            again,
            fault: id.cloned(),
        };
        lock(&self.trace).add(entry, &task.data);
    }
}

impl Session {
    fn end(&self, task: &Task, ended: Ended) {
        if let Ended::With(answer) = ended {
            self.answer(task, &answer, task.descriptor_sense(answer.sense.is_some()));
        }
    }
}

impl Task {
    fn descriptor_sense(&self, asked: bool) -> bool {
        asked
            && self
                .lun
                .and_then(|lun| self.session.shared().lun(lun))
                .is_some_and(|lun| lock(&lun.guarded).unit.personality.descriptor_sense)
    }
}

/// Whether a command may execute no more.
fn ended_before(task: &Task, guarded: &Guarded, outlives: Outlives) -> Option<Ended> {
    let stopping = task.session.shared().stopping.load(Ordering::SeqCst);
    if stopping || task.arrival < guarded.powered_on || (!outlives.session && task.session.is_closed()) {
        return Some(Ended::Silently);
    }
    if outlives.abort {
        return None;
    }
    let by_its_own = task.aborted.load(Ordering::SeqCst);
    let nexus = task.session.nexus()?;
    let by_another = task.arrival < guarded.aborted_all
        || guarded.aborted.get(nexus).is_some_and(|until| task.arrival < *until);
    if by_its_own {
        return Some(Ended::Silently);
    }
    by_another.then(|| match guarded.unit.personality.task_aborted_status {
        true => Ended::With(Answer::status(TASK_ABORTED)),
        false => Ended::Silently,
    })
}

fn blocks_of(task: &Task) -> Option<(u64, u32)> {
    if task.cdb.kind() != Kind::Unmap {
        return task.cdb.blocks();
    }
    let range = task.data.get(8..20)?;
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
    Some((number(&range[..8]), number(&range[8..12]) as u32))
}

fn no_such_lun(cdb: &Cdb) -> Answer {
    if cdb.opcode() != op::INQUIRY {
        return Sense::LUN_NOT_SUPPORTED.into();
    }
    if cdb.bytes[1] & 1 != 0 {
        return Sense { field: Some(1), ..Sense::INVALID_FIELD_IN_CDB }.into();
    }
    let mut data = vec![0u8; 36];
    data[0] = 0x7f;
    data[2] = 0x06;
    data[3] = 0x02;
    data[4] = 31;
    Answer::allocated(data, usize::from(cdb.u16_at(3)))
}
