//! Rules: which command meets which fault.
//!
//! A rule selects by opcode or kind, LUN, blocks, initiator; of what it selects it takes the Nth, at most so
//! many, or each with a probability from the rule's own seed. The first rule that takes a command decides.
//! Counting is per rule and follows the order in which commands arrive.

use std::sync::Arc;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::nexus::Nexus;
use crate::scsi::cdb::{Cdb, Kind};

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Select {
    pub opcode: Option<u8>,
    pub kind: Option<Kind>,
    /// Service action.
    pub action: Option<u8>,
    pub lun: Option<u16>,
    /// First and last block; a command that touches any of them is meant.
    pub lba: Option<(u64, u64)>,
    /// Part of the initiator's name, or of the nexus as the trace shows it.
    pub initiator: Option<String>,
    /// Only the Nth of these commands, from 1.
    pub nth: Option<u64>,
    /// At most so many.
    pub times: Option<u64>,
    pub probability: f64,
    pub seed: u64,
}

impl Default for Select {
    fn default() -> Self {
        Select {
            opcode: None,
            kind: None,
            action: None,
            lun: None,
            lba: None,
            initiator: None,
            nth: None,
            times: None,
            probability: 1.0,
            seed: 0,
        }
    }
}

impl Select {
    pub fn kind(kind: Kind) -> Self {
        Select { kind: Some(kind), ..Select::default() }
    }

    pub fn nth(self, nth: u64) -> Self {
        Select { nth: Some(nth), ..self }
    }

    pub fn times(self, times: u64) -> Self {
        Select { times: Some(times), ..self }
    }

    pub fn lba(self, first: u64, last: u64) -> Self {
        Select { lba: Some((first, last)), ..self }
    }

    pub fn initiator(self, part: &str) -> Self {
        Select { initiator: Some(part.to_owned()), ..self }
    }

    pub fn probability(self, probability: f64, seed: u64) -> Self {
        Select { probability, seed, ..self }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    #[default]
    First,
    Second,
}

fn yes() -> bool {
    true
}

/// What happens to a command. Nothing here but `Late`, `Twice` and what says so lets a command of a dead session
/// or an aborted command execute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// Executed; the initiator never hears of it.
    LoseAnswer,
    /// Neither executed nor answered.
    Drop,
    /// Executed so much later.
    Late {
        ms: u64,
        /// Even if its session has ended by then.
        #[serde(default)]
        past_session: bool,
        /// Even if it was aborted by then (task management, PREEMPT AND ABORT).
        #[serde(default)]
        past_abort: bool,
        /// Without asking for reservation and attention again: it passed those when it arrived.
        #[serde(default)]
        past_reservation: bool,
        #[serde(default = "yes")]
        answer: bool,
    },
    /// Executed at once, answered so much later.
    AnswerLate { ms: u64 },
    /// Executed two times, so much apart. The answer of the first is "executed twice"; that of the second is what an
    /// initiator sees when something below it repeated the command.
    Twice {
        #[serde(default)]
        gap_ms: u64,
        #[serde(default)]
        answer: Which,
    },
    /// CHECK CONDITION, unit attention; not executed.
    Attention { asc: u8, ascq: u8 },
    /// A bare status, as BUSY 0x08 or TASK SET FULL 0x28; not executed.
    Status { status: u8 },
    /// CHECK CONDITION, after execution (perhaps of the first blocks only) or without.
    Check {
        key: u8,
        #[serde(default)]
        asc: u8,
        #[serde(default)]
        ascq: u8,
        #[serde(default)]
        executed: bool,
        #[serde(default)]
        only_blocks: Option<u32>,
    },
    /// GOOD, and nothing done.
    GoodForNothing,
    /// MISCOMPARE, executed or not, whatever the block held.
    Miscompare {
        #[serde(default)]
        executed: bool,
        #[serde(default)]
        information: Option<u32>,
    },
    /// A compare-and-write that lets others go first between comparing and writing.
    Race { us: u64 },
    /// The session is cut, after execution or instead of it.
    Cut {
        #[serde(default)]
        executed: bool,
    },
}

impl Fault {
    /// Whether it holds a command up, so that it can't be carried out by the thread that reads the connection.
    pub fn waits(&self) -> bool {
        match self {
            Fault::Late { .. } | Fault::AnswerLate { .. } | Fault::Race { .. } => true,
            Fault::Twice { gap_ms, .. } => *gap_ms > 0,
            _ => false,
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule<F = Fault> {
    /// Shown in the trace; given if empty.
    #[serde(default)]
    pub id: String,
    #[serde(default)]
    pub select: Select,
    pub fault: F,
}

impl<F> Rule<F> {
    pub fn new(id: &str, select: Select, fault: F) -> Self {
        Rule { id: id.to_owned(), select, fault }
    }
}

/// What rules look at.
pub struct Arrival<'a> {
    pub nexus: &'a Nexus,
    pub lun: u16,
    pub cdb: &'a Cdb,
    /// First block and number of blocks, for UNMAP of its first range.
    pub blocks: Option<(u64, u32)>,
}

struct Active<F> {
    rule: Rule<F>,
    id: Arc<str>,
    selected: u64,
    fired: u64,
    rng: SmallRng,
}

/// A rule and how often it was asked and used.
#[derive(Clone, Debug, Serialize)]
pub struct Standing<F = Fault> {
    pub rule: Rule<F>,
    pub selected: u64,
    pub fired: u64,
}

/// Rules of one kind of fault: those of the target, or those of the proxy.
pub struct Rules<F> {
    active: Vec<Active<F>>,
    given: u64,
}

impl<F> Default for Rules<F> {
    fn default() -> Self {
        Rules { active: Vec::new(), given: 0 }
    }
}

impl<F: Clone> Rules<F> {
    /// The id under which the trace will name it. A rule with the id of another takes its place.
    pub fn add(&mut self, mut rule: Rule<F>) -> String {
        if rule.id.is_empty() {
            self.given += 1;
            rule.id = format!("rule-{}", self.given);
        }
        self.remove(&rule.id.clone());
        let (id, rng) = (rule.id.clone(), SmallRng::seed_from_u64(rule.select.seed));
        self.active.push(Active { id: id.as_str().into(), rule, selected: 0, fired: 0, rng });
        id
    }

    pub fn remove(&mut self, id: &str) -> bool {
        let before = self.active.len();
        self.active.retain(|one| one.rule.id != id);
        self.active.len() < before
    }

    pub fn clear(&mut self) {
        self.active.clear();
    }

    pub fn is_empty(&self) -> bool {
        self.active.is_empty()
    }

    pub fn standing(&self) -> Vec<Standing<F>> {
        self.active
            .iter()
            .map(|one| Standing { rule: one.rule.clone(), selected: one.selected, fired: one.fired })
            .collect()
    }

    pub fn take(&mut self, arrival: &Arrival) -> Option<(Arc<str>, F)> {
        for one in &mut self.active {
            if !selects(&one.rule.select, arrival) {
                continue;
            }
            one.selected += 1;
            let select = &one.rule.select;
            let chosen = select.nth.is_none_or(|nth| nth == one.selected)
                && select.times.is_none_or(|times| one.fired < times)
                && (select.probability >= 1.0 || one.rng.random_bool(select.probability.max(0.0)));
            if chosen {
                one.fired += 1;
                return Some((one.id.clone(), one.rule.fault.clone()));
            }
        }
        None
    }
}

fn selects(select: &Select, arrival: &Arrival) -> bool {
    let touches = |(first, last): (u64, u64)| {
        arrival.blocks.is_some_and(|(lba, n)| lba <= last && lba.saturating_add(u64::from(n.max(1))) > first)
    };
    select.opcode.is_none_or(|opcode| opcode == arrival.cdb.opcode())
        && select.kind.is_none_or(|kind| kind == arrival.cdb.kind())
        && select.action.is_none_or(|action| action == arrival.cdb.service_action())
        && select.lun.is_none_or(|lun| lun == arrival.lun)
        && select.lba.is_none_or(touches)
        && select.initiator.as_ref().is_none_or(|part| arrival.nexus.to_string().contains(part.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(faults: &mut Rules<Fault>, opcode: u8, lba: u8, initiator: &str) -> Option<String> {
        let mut bytes = [0u8; 16];
        bytes[0] = opcode;
        bytes[9] = lba;
        bytes[13] = 1;
        let (cdb, nexus) = (Cdb::new(bytes), Nexus::new(initiator, [0; 6]));
        let arrival = Arrival { nexus: &nexus, lun: 1, cdb: &cdb, blocks: cdb.blocks() };
        faults.take(&arrival).map(|(id, _)| id.to_string())
    }

    #[test]
    fn the_nth_at_its_blocks_of_its_initiator() {
        let mut faults = Rules::default();
        let select = Select::kind(Kind::CompareAndWrite).lba(4, 6).initiator("host-b").nth(2);
        faults.add(Rule::new("x", select, Fault::Drop));
        assert_eq!(take(&mut faults, 0x89, 5, "host-b"), None, "the first");
        assert_eq!(take(&mut faults, 0x89, 7, "host-b"), None, "other blocks");
        assert_eq!(take(&mut faults, 0x89, 5, "host-a"), None, "another initiator");
        assert_eq!(take(&mut faults, 0x88, 5, "host-b"), None, "another command");
        assert_eq!(take(&mut faults, 0x89, 6, "host-b").as_deref(), Some("x"));
        assert_eq!(take(&mut faults, 0x89, 6, "host-b"), None, "the third");
        assert_eq!(faults.standing()[0].selected, 3);
    }

    #[test]
    fn the_same_seed_takes_the_same() {
        let run = |seed| {
            let mut faults = Rules::default();
            faults.add(Rule::new("x", Select::default().probability(0.3, seed), Fault::Drop));
            (0..200).map(|_| take(&mut faults, 0x89, 0, "a").is_some()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
        let taken = run(7).iter().filter(|one| **one).count();
        assert!((30..90).contains(&taken), "{taken} of 200 at 0.3");
    }

    #[test]
    fn rules_read_from_json() {
        let text = r#"{"id":"a","select":{"kind":"compare_and_write","nth":3},"fault":{"do":"twice","answer":"second"}}"#;
        let rule: Rule = serde_json::from_str(text).unwrap();
        assert_eq!(rule.fault, Fault::Twice { gap_ms: 0, answer: Which::Second });
        assert!(serde_json::from_str::<Rule>(r#"{"fault":{"do":"nonsense"}}"#).is_err());
        assert!(serde_json::from_str::<Rule>(r#"{"select":{"lbas":[1,2]},"fault":{"do":"drop"}}"#).is_err());
    }
}
