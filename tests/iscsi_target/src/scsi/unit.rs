//! One logical unit: the state behind the target's one lock for it, and the execution of a command on it.
//!
//! `execute` is one instant: a caller holds the lock, so every command is atomic against every other. The one
//! exception is wanted: a racy compare-and-write is executed in two halves (`compare`, then `store_swapped`)
//! with the lock given up between them.
//!
//! Order of checks, as on the targets that were looked at: unit attention, then reservation, then the command.

use std::io;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use crate::attention::{self, Attentions};
use crate::nexus::Nexus;
use crate::personality::{CompareAndWrite, LoginAgain, Personality};
use crate::scsi::cdb::{self, Cdb, Kind, op};
use crate::scsi::pages::Describe;
use crate::scsi::reservation::{Need, PREEMPT_AND_ABORT, Parameters, Refusal, Reservations};
use crate::sense::{Answer, CHECK_CONDITION, RESERVATION_CONFLICT, Sense};
use crate::store::{Loss, Store};

/// One command with its data.
#[derive(Clone, Copy)]
pub struct Command<'a> {
    pub nexus: &'a Nexus,
    pub cdb: Cdb,
    /// What the initiator sent; can be less or more than the CDB says.
    pub data: &'a [u8],
}

/// Departures from an ordinary execution.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    /// Neither attention nor reservation is looked at: the command passed those checks when it arrived.
    pub unchecked: bool,
    /// A compare-and-write stops after the comparison.
    pub compare_only: bool,
    /// Only so many blocks of a write are written.
    pub only_blocks: Option<u32>,
}

pub struct Unit {
    pub store: Store,
    pub personality: Personality,
    pub attentions: Attentions,
    pub reservations: Reservations,
    pub serial: String,
    /// Nexuses whose commands the last PREEMPT AND ABORT ended; the target takes them.
    pub to_abort: Vec<Nexus>,
    /// A compare-and-write ended early on a unit that loses atomicity by that.
    pub atomicity_lost: bool,
    /// For latencies.
    pub rng: SmallRng,
}

impl Unit {
    pub fn new(mut store: Store, personality: Personality, serial: String, seed: u64) -> Self {
        store.set_volatile(personality.volatile_cache);
        Unit {
            store,
            personality,
            attentions: Attentions::default(),
            reservations: Reservations::default(),
            serial,
            to_abort: Vec::new(),
            atomicity_lost: false,
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    pub fn set_personality(&mut self, personality: Personality) {
        self.store.set_volatile(personality.volatile_cache);
        self.personality = personality;
    }

    pub fn execute(&mut self, command: &Command, how: How) -> Answer {
        let early = if how.unchecked { None } else { self.ends_early(command) };
        let answer = early.unwrap_or_else(|| self.carry_out(command, how));
        if command.cdb.opcode() == op::COMPARE_AND_WRITE
            && self.personality.compare_and_write == CompareAndWrite::AtomicUntilEndedEarly
        {
            let attention =
                answer.status == CHECK_CONDITION && answer.sense.is_some_and(|sense| sense.key == 0x06);
            self.atomicity_lost |= attention || answer.status == RESERVATION_CONFLICT;
        }
        answer
    }

    /// Whether a compare-and-write would be executed in two halves now.
    pub fn races(&self) -> bool {
        match self.personality.compare_and_write {
            CompareAndWrite::Racy => true,
            CompareAndWrite::AtomicUntilEndedEarly => self.atomicity_lost,
            _ => false,
        }
    }

    fn ends_early(&mut self, command: &Command) -> Option<Answer> {
        let opcode = command.cdb.opcode();
        if matches!(opcode, op::INQUIRY | op::REPORT_LUNS | op::REQUEST_SENSE) {
            return None;
        }
        if let Some((asc, ascq)) = self.attentions.take(command.nexus) {
            return Some(Sense::new(0x06, asc, ascq).into());
        }
        (!self.reservations.allows(command.nexus, self.need(&command.cdb))).then(Answer::conflict)
    }

    fn need(&self, cdb: &Cdb) -> Need {
        match cdb.kind() {
            Kind::Read | Kind::Verify => Need::Read,
            Kind::Write | Kind::CompareAndWrite | Kind::Flush => Need::Write,
            Kind::Unmap | Kind::WriteSame if self.personality.reservations_cover_unmap => Need::Write,
            _ => match cdb.opcode() {
                op::MODE_SENSE_6 | op::MODE_SENSE_10 | op::PREFETCH_10 | op::PREFETCH_16 => Need::Read,
                _ => Need::Nothing,
            },
        }
    }

    fn carry_out(&mut self, command: &Command, how: How) -> Answer {
        let cdb = &command.cdb;
        let pages = Describe {
            personality: &self.personality,
            serial: &self.serial,
            block_bytes: self.store.block_bytes() as u32,
            blocks: self.store.blocks(),
        };
        match cdb.opcode() {
            op::TEST_UNIT_READY | op::START_STOP => Answer::good(),
            op::REQUEST_SENSE => {
                let descriptor = cdb.bytes[1] & 1 != 0;
                Answer::allocated(Sense::new(0, 0, 0).bytes(descriptor), usize::from(cdb.bytes[4]))
            }
            op::INQUIRY => pages.inquiry(cdb),
            op::READ_CAPACITY_10 => pages.capacity_10(),
            op::SERVICE_ACTION_IN if cdb.service_action() == cdb::SA_READ_CAPACITY_16 => {
                pages.capacity_16(cdb)
            }
            op::SERVICE_ACTION_IN => Sense { field: Some(1), ..Sense::INVALID_FIELD_IN_CDB }.into(),
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => pages.mode_sense(cdb),
            op::MAINTENANCE_IN if cdb.service_action() == cdb::SA_REPORT_SUPPORTED_OPCODES => {
                pages.supported_opcodes(cdb)
            }
            op::MAINTENANCE_IN => Sense { field: Some(1), ..Sense::INVALID_FIELD_IN_CDB }.into(),
            op::PR_IN if self.personality.reservations => self.reserve_in(cdb),
            op::PR_OUT if self.personality.reservations => self.reserve_out(command),
            _ => self.transfer(command, how),
        }
    }

    fn reserve_in(&self, cdb: &Cdb) -> Answer {
        let all = &self.reservations;
        let data = match cdb.service_action() {
            0 => all.read_keys(),
            1 => all.read_reservation(),
            2 => all.report_capabilities(self.personality.aptpl),
            3 => all.full_status(),
            _ => return Sense { field: Some(1), ..Sense::INVALID_FIELD_IN_CDB }.into(),
        };
        Answer::allocated(data, usize::from(cdb.u16_at(7)))
    }

    fn reserve_out(&mut self, command: &Command) -> Answer {
        let cdb = &command.cdb;
        let length = cdb.u32_at(5) as usize;
        if length != Parameters::BYTES {
            return Answer::from(Sense::PARAMETER_LIST_LENGTH).taking(length);
        }
        let Some(list) = Parameters::parse(command.data) else {
            return Answer::from(Sense::PARAMETER_LIST_LENGTH).taking(length);
        };
        if list.aptpl && !self.personality.aptpl {
            let sense = Sense { field: Some(20), ..Sense::INVALID_FIELD_IN_PARAMETER_LIST };
            return Answer::from(sense).taking(length);
        }
        let action = cdb.service_action();
        if action == PREEMPT_AND_ABORT && !self.personality.preempt_and_abort {
            let sense = Sense { field: Some(1), ..Sense::INVALID_FIELD_IN_CDB };
            return Answer::from(sense).taking(length);
        }
        let answer = match self.reservations.out(command.nexus, action, cdb.bytes[2], list) {
            Ok(effects) => {
                for (nexus, code) in &effects.attentions {
                    self.attentions.raise(nexus, *code);
                }
                self.to_abort.extend(effects.abort);
                Answer::good().changing()
            }
            Err(Refusal::Conflict) => Answer::conflict(),
            Err(Refusal::Check(sense)) => Answer::from(sense),
        };
        answer.taking(length)
    }

    // --- events from outside ---------------------------------------------------------------------------

    pub fn nexus_logged_in(&mut self, nexus: &Nexus) {
        let known = self.attentions.knows(nexus);
        self.attentions.introduce(nexus);
        if self.personality.attention_at_login {
            self.attentions.raise(nexus, if known { attention::NEXUS_LOSS } else { attention::POWER_ON });
        }
        match self.personality.registration_at_login {
            LoginAgain::Kept => {}
            LoginAgain::Orphaned => self.reservations.orphan(nexus),
            LoginAgain::Lost => {
                for (other, code) in self.reservations.unregister(nexus).attentions {
                    self.attentions.raise(&other, code);
                }
            }
        }
    }

    pub fn lose_power(&mut self, seed: u64) -> io::Result<Loss> {
        self.attentions.power_on();
        self.reservations.power_lost();
        self.atomicity_lost = false;
        self.store.lose_power(seed)
    }

    pub fn resize(&mut self, blocks: u64) -> io::Result<()> {
        self.store.resize(blocks)?;
        self.attentions.raise_all(attention::CAPACITY_CHANGED, None);
        Ok(())
    }
}
