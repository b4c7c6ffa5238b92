//! A command's way: issue, execution, answer.
//!
//! Invariants: a command executes at one instant (an event of the simulation), whoever still waits
//! for it; all that happens to it on the way was decided by the LUN's own stream of random numbers;
//! observers see executions in their order, outside the state's lock.

use std::sync::Arc;
use std::time::Duration;

use super::command::{Answer, Command, CommandKind, Executed, OBSERVED_FILL_BYTES, Payload, Reply};
use super::fault::Fault;
use super::lun::{Inner, LunState, Partition};
use crate::device::{CompareOutcome, DeviceError, Executed as MayBe};
use crate::rt::sim;

/// An execution's outcome, and the bytes around it if somebody observes.
struct Outcome {
    result: Result<Reply, DeviceError>,
    before: Vec<u8>,
    after: Vec<u8>,
    issuer_killed: bool,
    changed_or_read: bool,
}

/// Runs `step` after `delay`, or at once where no simulation keeps the time.
fn later(delay: Duration, step: impl FnOnce() + Send + 'static) {
    if sim::is_simulated() { sim::after(delay, step) } else { step() }
}

impl Inner {
    /// Sends a command on its way and waits for its answer.
    pub(super) fn submit(self: &Arc<Self>, command: Command) -> Answer {
        let command = Arc::new(command);
        let deadline = self.options.deadline;
        let fault = self.enter(&command);
        let mut state = self.lock();
        let mut out = self.options.latency.out(command.kind, command.len, &mut state.rng);
        drop(state);
        let mut answered = true;
        if let Some(Fault::Late(by)) = fault {
            out += by;
            answered = out < deadline;
        }
        if fault == Some(Fault::NeverExecuted) {
            self.lock().leave(&command);
        } else {
            let (lun, theirs) = (self.clone(), command.clone());
            later(out, move || lun.arrive(theirs, fault));
        }
        let answer = command.completion.wait(command.kind.name(), Some(deadline));
        match answer {
            // Outside a simulation nothing is late; a command that would have been is unanswered.
            Some(answer) if answered => answer,
            _ => Answer { result: Err(timed_out(&command, deadline)), resets: 0 },
        }
    }

    fn enter(&self, command: &Arc<Command>) -> Option<Fault> {
        let mut state = self.lock();
        let LunState { faults, rng, .. } = &mut *state;
        let fault = faults.choose(command, rng, self.options.hold_time);
        state.in_flight.insert(command.id, command.clone());
        if command.kind == CommandKind::Flush {
            state.media.flush_issued(command.issue_order);
        }
        state.note(command, "issued", fault);
        fault
    }

    /// The command reaches the LUN.
    fn arrive(self: Arc<Self>, command: Arc<Command>, fault: Option<Fault>) {
        let mut state = self.lock();
        if !state.in_flight.contains_key(&command.id) {
            // A power cut met it on its way.
            return;
        }
        let partition = state.host(command.host).partition;
        if partition == Some(Partition::Hang) {
            state.note(&command, "held by the partition", None);
            state.held.push((sim::now().unwrap_or_default(), command, fault));
            return;
        }
        drop(state);
        let is_swap = command.kind == CommandKind::CompareAndWrite;
        let says_false = |reply| Reply { compared: Some(CompareOutcome::Miscompare), ..reply };
        let answer = match fault {
            Some(Fault::FalseMiscompare) if is_swap => Ok(says_false(Reply::default())),
            _ => self.execute(&command, false, fault),
        };
        let mut state = self.lock();
        state.leave(&command);
        let back = self.options.latency.back(&mut state.rng);
        drop(state);
        match fault {
            Some(Fault::LostAnswer) => {}
            Some(Fault::AnsweredFalse) if is_swap => self.answer(&command, back, answer.map(says_false)),
            Some(Fault::Aborted) => {
                let aborted = answer.and_then(|_| Err(interrupted(&command)));
                self.answer(&command, back, aborted);
            }
            Some(Fault::Twice(by)) => {
                self.answer(&command, back, answer);
                let (lun, again) = (self.clone(), command.clone());
                later(by, move || drop(lun.execute(&again, true, None)));
            }
            Some(Fault::RetriedBelow(by)) => {
                let (lun, again) = (self.clone(), command.clone());
                later(by, move || {
                    let answer = lun.execute(&again, true, None);
                    lun.answer(&again, back, answer);
                });
            }
            _ => self.answer(&command, back, answer),
        }
    }

    /// The answer sets out; a partition can still swallow it.
    fn answer(self: &Arc<Self>, command: &Arc<Command>, back: Duration, result: Result<Reply, DeviceError>) {
        let (lun, command) = (self.clone(), command.clone());
        let resets = self.lock().losses(command.host);
        later(back, move || {
            let mut state = lun.lock();
            let cut_off = state.host(command.host).partition == Some(Partition::Hang);
            state.note(&command, if cut_off { "answer lost in the partition" } else { "answered" }, None);
            drop(state);
            if !cut_off {
                command.completion.complete(Answer { result, resets });
            }
        });
    }

    /// The command executes, whole, now.
    pub(super) fn execute(
        &self,
        command: &Arc<Command>,
        again: bool,
        fault: Option<Fault>,
    ) -> Result<Reply, DeviceError> {
        // Keeps executions and their observations in one order where threads really run at once.
        let _turn = self.executing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut state = self.lock();
        let observer = state.observer.clone();
        let fenced_key = command.key.is_some_and(|key| state.fenced_keys.contains(&key));
        if again && (command.resets != state.resets || state.host(command.host).fenced || fenced_key) {
            return Err(interrupted(command));
        }
        let outcome = state.execute(command, fault, observer.is_some());
        let compared = outcome.result.as_ref().ok().and_then(|reply| reply.compared);
        let what = match (&outcome.result, compared) {
            (Err(_), _) => "failed",
            (Ok(_), Some(CompareOutcome::Swapped)) => "swapped",
            (Ok(_), Some(CompareOutcome::Miscompare)) => "miscompared",
            (Ok(_), None) => "executed",
        };
        state.note(command, what, None);
        if !again {
            let counts = &mut state.host(command.host).counts;
            match &outcome.result {
                Ok(_) => counts.count(command.kind, command.len, compared),
                Err(_) => counts.failed += 1,
            }
        }
        drop(state);
        if let Some(observer) = observer
            && outcome.changed_or_read
        {
            observer.executed(&Executed {
                id: command.id,
                host: command.host,
                kind: command.kind,
                offset_bytes: command.offset,
                len_bytes: command.len,
                before: &outcome.before,
                after: &outcome.after,
                compared,
                issued: command.issued,
                executed: sim::now().unwrap_or_default(),
                again,
                issuer_killed: outcome.issuer_killed,
                failed: outcome.result.is_err(),
            });
        }
        outcome.result
    }
}

impl LunState {
    fn execute(&mut self, command: &Arc<Command>, fault: Option<Fault>, observed: bool) -> Outcome {
        let mut outcome = Outcome {
            result: Ok(Reply::default()),
            before: Vec::new(),
            after: Vec::new(),
            issuer_killed: command.issuer.is_some_and(sim::is_killed),
            changed_or_read: false,
        };
        if let Some(refusal) = self.refusal(command, fault) {
            outcome.result = Err(refusal);
            return outcome;
        }
        let torn = self.choose_torn(command, fault, outcome.issuer_killed);
        let keep_bytes = observed
            && (command.len <= OBSERVED_FILL_BYTES
                || !matches!(command.kind, CommandKind::Discard | CommandKind::WriteZeroes));
        if keep_bytes {
            outcome.before = self.media.bytes(command.offset, command.len as usize);
        }
        if torn != Torn::Nothing {
            outcome.result = Ok(self.apply(command, torn == Torn::Part));
            outcome.changed_or_read = true;
        }
        if keep_bytes {
            outcome.after = self.media.bytes(command.offset, command.len as usize);
        }
        if fault == Some(Fault::IoError) {
            outcome.result = Err(io_error(command, MayBe::Maybe, libc::EIO));
        } else if torn != Torn::Everything {
            outcome.result = Err(interrupted(command));
        }
        outcome
    }

    /// Why the LUN won't execute this command at all.
    fn refusal(&mut self, command: &Arc<Command>, fault: Option<Fault>) -> Option<DeviceError> {
        let op = command.kind.name();
        let powered = self.powered;
        let losses = self.losses(command.host);
        let fenced_key = command.key.is_some_and(|key| self.fenced_keys.contains(&key));
        let host = self.host(command.host);
        if host.fenced || fenced_key && command.kind.changes() {
            return Some(DeviceError::Fenced { op, offset_bytes: command.offset });
        }
        if !powered || host.partition == Some(Partition::Fail) {
            return Some(io_error(command, MayBe::No, libc::EIO));
        }
        if host.attention != losses && command.kind == CommandKind::CompareAndWrite {
            // The kernel's driver swallows a unit attention on plain commands; a raw one sees it.
            host.attention = losses;
            return Some(io_error(command, MayBe::No, libc::EIO));
        }
        (fault == Some(Fault::Refused)).then(|| io_error(command, MayBe::No, libc::EBUSY))
    }

    /// How much of the command executes, if something interrupts it.
    fn choose_torn(&mut self, command: &Arc<Command>, fault: Option<Fault>, killed: bool) -> Torn {
        if !killed && fault != Some(Fault::IoError) {
            return Torn::Everything;
        }
        let several = command.len > u64::from(self.block) && command.kind.changes();
        match self.rng.below(if several { 3 } else { 2 }) {
            0 => Torn::Nothing,
            1 => Torn::Everything,
            _ => Torn::Part,
        }
    }

    /// Changes the medium, or reads it; of a torn write each logical block by a coin.
    fn apply(&mut self, command: &Arc<Command>, torn: bool) -> Reply {
        self.executions += 1;
        let order = self.executions;
        let (offset, len) = (command.offset, command.len);
        let mut reply = Reply::default();
        match (command.kind, &command.payload) {
            (CommandKind::Read, _) => reply.data = self.media.bytes(offset, len as usize),
            (CommandKind::Flush, _) => self.media.flush(command.issue_order),
            (CommandKind::CompareAndWrite, Payload::Compare { expected, new }) => {
                let equal = self.media.bytes(offset, len as usize) == *expected;
                if equal {
                    self.media.write(order, offset, new);
                }
                reply.compared =
                    Some(if equal { CompareOutcome::Swapped } else { CompareOutcome::Miscompare });
            }
            (CommandKind::Write, Payload::Data(data)) if torn => {
                let block = self.block as usize;
                for (i, bytes) in data.chunks(block).enumerate() {
                    if self.rng.below(2) == 0 {
                        self.media.write(order, offset + (i * block) as u64, bytes);
                    }
                }
            }
            (CommandKind::Write, Payload::Data(data)) => self.media.write(order, offset, data),
            (kind, _) => {
                let len = if torn { len / 2 / u64::from(self.block) * u64::from(self.block) } else { len };
                self.media.fill(order, offset, len, kind == CommandKind::Discard);
            }
        }
        reply
    }

    /// The command is not on its way any more.
    pub(super) fn leave(&mut self, command: &Command) {
        self.in_flight.remove(&command.id);
        if command.kind == CommandKind::Flush {
            self.media.flush_gone(command.issue_order);
        }
    }
}

impl Inner {
    /// A partition ended: what it held goes on its way, if it is not too old, or is lost.
    pub(super) fn release(self: &Arc<Self>, host: crate::rt::HostTag) {
        let now = sim::now().unwrap_or_default();
        let mut going = Vec::new();
        let mut state = self.lock();
        let (mine, others): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.held).into_iter().partition(|(_, command, _)| command.host == host);
        state.held = others;
        for (since, command, fault) in mine {
            let too_old = now.saturating_sub(since) >= self.options.hold_time;
            if too_old || state.rng.below(2) == 0 {
                state.leave(&command);
                state.note(&command, "lost in the partition", None);
            } else {
                let out = self.options.latency.out(command.kind, command.len, &mut state.rng);
                going.push((out, command, fault));
            }
        }
        drop(state);
        for (out, command, fault) in going {
            let lun = self.clone();
            later(out, move || lun.arrive(command, fault));
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Torn {
    Nothing,
    Part,
    Everything,
}

fn timed_out(command: &Command, deadline: Duration) -> DeviceError {
    DeviceError::TimedOut {
        op: command.kind.name(),
        offset_bytes: command.offset,
        waited_ms: deadline.as_millis() as u64,
    }
}

fn io_error(command: &Command, executed: MayBe, errno: i32) -> DeviceError {
    DeviceError::io(command.kind.name(), command.offset, executed, std::io::Error::from_raw_os_error(errno))
}

/// The answer to a command that something broke off.
pub(super) fn interrupted(command: &Command) -> DeviceError {
    io_error(command, MayBe::Maybe, libc::EIO)
}
