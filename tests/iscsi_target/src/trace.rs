//! What was executed, in the order of execution: entries are made under the lock of the logical unit.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::nexus::Nexus;
use crate::sense::Sense;

#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// From 1, without gaps, also over what the trace has forgotten.
    pub sequence: u64,
    /// Since the target started.
    pub at_us: u64,
    #[serde(serialize_with = "as_text")]
    pub nexus: Nexus,
    pub lun: u16,
    pub opcode: u8,
    pub action: u8,
    pub name: &'static str,
    pub lba: Option<u64>,
    pub blocks: u32,
    /// Of the execution; what the initiator was told can differ by a fault.
    pub status: u8,
    pub sense: Option<Sense>,
    /// Blocks, reservations or durability were changed.
    pub changed: bool,
    /// The command met a fault and was not executed.
    pub skipped: bool,
    /// The second execution of one command.
    pub again: bool,
    /// The rule that took it.
    #[serde(serialize_with = "as_name")]
    pub fault: Option<Arc<str>>,
}

fn as_text<S: Serializer>(nexus: &Nexus, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(nexus)
}

fn as_name<S: Serializer>(name: &Option<Arc<str>>, to: S) -> Result<S::Ok, S::Error> {
    name.as_deref().serialize(to)
}

impl Entry {
    pub fn won(&self) -> bool {
        self.status == crate::sense::GOOD && !self.skipped
    }

    pub fn miscompared(&self) -> bool {
        self.sense.is_some_and(|sense| sense.key == 0x0e)
    }
}

/// Called at each execution, in order, with the data that the initiator sent. It is called under locks: it must
/// not call the target.
pub type Judge = Box<dyn FnMut(&Entry, &[u8]) + Send>;

pub struct Trace {
    entries: VecDeque<Entry>,
    kept_max: usize,
    last: u64,
    judge: Option<Judge>,
}

impl Trace {
    pub fn new(kept_max: usize) -> Self {
        Trace { entries: VecDeque::new(), kept_max, last: 0, judge: None }
    }

    pub fn judge(&mut self, judge: Option<Judge>) {
        self.judge = judge;
    }

    pub fn add(&mut self, mut entry: Entry, data: &[u8]) {
        self.last += 1;
        entry.sequence = self.last;
        if let Some(judge) = &mut self.judge {
            judge(&entry, data);
        }
        if self.kept_max == 0 {
            return;
        }
        if self.entries.len() == self.kept_max {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    pub fn last(&self) -> u64 {
        self.last
    }

    /// What came after this one, as far as it is kept.
    pub fn since(&self, sequence: u64) -> Vec<Entry> {
        let skip = self.entries.partition_point(|entry| entry.sequence <= sequence);
        self.entries.iter().skip(skip).cloned().collect()
    }
}
