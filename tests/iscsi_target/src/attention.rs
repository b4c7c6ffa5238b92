//! Unit attentions: per logical unit and I_T nexus, delivered oldest first, one per command.
//!
//! A nexus that was never seen has the power-on attention waiting, as after a real power cycle; INQUIRY, REPORT
//! LUNS and REQUEST SENSE pass by.

use std::collections::{HashMap, VecDeque};

use crate::nexus::Nexus;

/// Additional sense code and qualifier.
pub type Code = (u8, u8);

pub const POWER_ON: Code = (0x29, 0x00);
pub const RESET: Code = (0x29, 0x03);
pub const NEXUS_LOSS: Code = (0x29, 0x07);
pub const RESERVATIONS_PREEMPTED: Code = (0x2a, 0x03);
pub const RESERVATIONS_RELEASED: Code = (0x2a, 0x04);
pub const REGISTRATIONS_PREEMPTED: Code = (0x2a, 0x05);
pub const CAPACITY_CHANGED: Code = (0x2a, 0x09);
pub const LUNS_CHANGED: Code = (0x3f, 0x0e);

const WAITING_MAX: usize = 16;

#[derive(Default)]
pub struct Attentions {
    waiting: HashMap<Nexus, VecDeque<Code>>,
}

impl Attentions {
    pub fn knows(&self, nexus: &Nexus) -> bool {
        self.waiting.contains_key(nexus)
    }

    /// A nexus logs in.
    pub fn introduce(&mut self, nexus: &Nexus) {
        self.waiting.entry(nexus.clone()).or_default();
    }

    /// One that is waiting already is not doubled.
    pub fn raise(&mut self, nexus: &Nexus, code: Code) {
        let waiting = self.waiting.entry(nexus.clone()).or_default();
        if !waiting.contains(&code) && waiting.len() < WAITING_MAX {
            waiting.push_back(code);
        }
    }

    pub fn raise_all(&mut self, code: Code, except: Option<&Nexus>) {
        let all: Vec<Nexus> = self.waiting.keys().filter(|nexus| Some(*nexus) != except).cloned().collect();
        all.iter().for_each(|nexus| self.raise(nexus, code));
    }

    /// A power cycle leaves nothing but its own attention.
    pub fn power_on(&mut self) {
        for waiting in self.waiting.values_mut() {
            *waiting = VecDeque::from([POWER_ON]);
        }
    }

    pub fn take(&mut self, nexus: &Nexus) -> Option<Code> {
        self.waiting.get_mut(nexus)?.pop_front()
    }

    pub fn clear(&mut self) {
        self.waiting.values_mut().for_each(VecDeque::clear);
    }
}
