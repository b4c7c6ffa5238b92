//! Faults of the simulated LUN: by the seed's dice, or exactly where a test wants one.

use std::ops::Range;
use std::time::Duration;

use super::command::{Command, CommandKind};
use crate::rt::HostTag;
use crate::rt::sim::SimRng;

/// What happens to one command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// Executed; the answer is lost, the host times out.
    LostAnswer,
    /// Sits in the fabric for this long on top. Beyond the deadline the host has timed out by then.
    Late(Duration),
    /// Lost on the way; the host times out.
    NeverExecuted,
    /// EIO; not executed, executed, or, if it writes several blocks, some of them written.
    IoError,
    /// An error that says "not executed", such as BUSY, and is right.
    Refused,
    /// Executed and answered; a second copy executes this much later, unseen.
    Twice(Duration),
    /// Executed, the answer lost, repeated below the host this much later; the host gets the second
    /// answer: the classic false miscompare.
    RetriedBelow(Duration),
    /// A compare-and-write that is executed, and answered "miscompare" all the same.
    AnsweredFalse,
    /// A compare-and-write that is not executed, and answered "miscompare" whatever the block holds.
    FalseMiscompare,
    /// Executed, then aborted: an error at once that can't say whether it was executed.
    Aborted,
}

/// Which commands a fault hits; None matches all.
#[derive(Clone, Debug)]
pub struct FaultRule {
    pub fault: Fault,
    pub host: Option<HostTag>,
    pub kind: Option<CommandKind>,
    /// Hits commands that touch these bytes.
    pub bytes: Option<Range<u64>>,
    /// Matching commands to let pass first.
    pub skip: u32,
    /// Matching commands to hit after that.
    pub count: u32,
}

impl FaultRule {
    /// Hits the next command of any host and kind.
    pub fn next(fault: Fault) -> Self {
        FaultRule { fault, host: None, kind: None, bytes: None, skip: 0, count: 1 }
    }

    /// Hits the next command of this host and kind.
    pub fn next_of(fault: Fault, host: HostTag, kind: CommandKind) -> Self {
        FaultRule { host: Some(host), kind: Some(kind), ..Self::next(fault) }
    }

    fn matches(&self, command: &Command) -> bool {
        let end = command.offset + command.len;
        self.host.is_none_or(|host| host == command.host)
            && self.kind.is_none_or(|kind| kind == command.kind)
            && self.bytes.as_ref().is_none_or(|bytes| bytes.start < end && command.offset < bytes.end)
    }
}

/// Probabilities of each fault for every command, and how long delayed ones are delayed.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultPlan {
    pub lost_answer: f64,
    pub late: f64,
    pub never_executed: f64,
    pub io_error: f64,
    pub refused: f64,
    pub twice: f64,
    pub retried_below: f64,
    /// The most by which a command is late or repeated later; never more than the hold time that
    /// the device publishes.
    pub delay: Duration,
}

impl FaultPlan {
    /// Every fault with the same probability.
    pub fn all(probability: f64, delay: Duration) -> Self {
        FaultPlan {
            lost_answer: probability,
            late: probability,
            never_executed: probability,
            io_error: probability,
            refused: probability,
            twice: probability,
            retried_below: probability,
            delay,
        }
    }

    /// Only faults after which the host knows nothing or gets a wrong idea; no plain errors.
    pub fn unknown_outcomes(probability: f64, delay: Duration) -> Self {
        FaultPlan { io_error: 0.0, refused: 0.0, ..Self::all(probability, delay) }
    }

    fn roll(&self, rng: &mut SimRng, hold_time: Duration) -> Option<Fault> {
        let longest = self.delay.min(hold_time).as_nanos() as u64;
        let delay = Duration::from_nanos(rng.between(0, longest));
        let faults = [
            (self.lost_answer, Fault::LostAnswer),
            (self.late, Fault::Late(delay)),
            (self.never_executed, Fault::NeverExecuted),
            (self.io_error, Fault::IoError),
            (self.refused, Fault::Refused),
            (self.twice, Fault::Twice(delay)),
            (self.retried_below, Fault::RetriedBelow(delay)),
        ];
        faults.into_iter().find(|(probability, _)| rng.chance(*probability)).map(|(_, fault)| fault)
    }
}

/// The faults in force.
#[derive(Default)]
pub struct Faults {
    pub plan: FaultPlan,
    rules: Vec<FaultRule>,
    pub hits: u64,
}

impl Faults {
    pub fn add(&mut self, rule: FaultRule) {
        self.rules.push(rule);
    }

    /// Rules that have hits left.
    pub fn rules_left(&self) -> usize {
        self.rules.len()
    }

    pub fn clear(&mut self) {
        self.rules.clear();
        self.plan = FaultPlan::default();
    }

    /// What befalls this command: the first rule that hits, else the dice.
    pub fn choose(&mut self, command: &Command, rng: &mut SimRng, hold_time: Duration) -> Option<Fault> {
        let mut fault = None;
        for rule in self.rules.iter_mut().filter(|rule| rule.matches(command)) {
            if rule.skip > 0 {
                rule.skip -= 1;
            } else {
                rule.count = rule.count.saturating_sub(1);
                fault = Some(rule.fault);
                break;
            }
        }
        self.rules.retain(|rule| rule.count > 0);
        let fault = fault.or_else(|| self.plan.roll(rng, hold_time));
        self.hits += u64::from(fault.is_some());
        fault
    }
}
