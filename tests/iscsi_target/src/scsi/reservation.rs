//! Persistent reservations: who is registered, who holds, what others may do.
//!
//! Pure state: the logical unit calls it under its lock and carries out the effects (unit attentions, aborted
//! commands). Invariants: at most one registration per nexus; a holder is registered; every change of
//! registrations or of the reservation by PREEMPT, CLEAR or REGISTER raises the generation, RESERVE and RELEASE
//! don't.
//!
//! Not done: SPEC_I_PT, REGISTER AND MOVE, REPLACE LOST RESERVATION.

use crate::attention::{self, Code};
use crate::nexus::Nexus;
use crate::sense::Sense;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    WriteExclusive = 1,
    ExclusiveAccess = 3,
    WriteExclusiveRegistrants = 5,
    ExclusiveAccessRegistrants = 6,
    WriteExclusiveAll = 7,
    ExclusiveAccessAll = 8,
}

impl Type {
    pub fn from_code(code: u8) -> Option<Type> {
        Some(match code {
            1 => Type::WriteExclusive,
            3 => Type::ExclusiveAccess,
            5 => Type::WriteExclusiveRegistrants,
            6 => Type::ExclusiveAccessRegistrants,
            7 => Type::WriteExclusiveAll,
            8 => Type::ExclusiveAccessAll,
            _ => return None,
        })
    }

    fn all_registrants(self) -> bool {
        matches!(self, Type::WriteExclusiveAll | Type::ExclusiveAccessAll)
    }

    /// Every registrant may do what the holder may.
    fn for_registrants(self) -> bool {
        !matches!(self, Type::WriteExclusive | Type::ExclusiveAccess)
    }

    fn writes_only(self) -> bool {
        matches!(self, Type::WriteExclusive | Type::WriteExclusiveRegistrants | Type::WriteExclusiveAll)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    pub nexus: Nexus,
    pub key: u64,
    pub all_target_ports: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    pub kind: Type,
    /// `None`: all registrants hold it.
    pub holder: Option<Nexus>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reservations {
    pub generation: u32,
    pub registrations: Vec<Registration>,
    pub reservation: Option<Reservation>,
    /// Survive a loss of power.
    pub aptpl: bool,
    /// Counts registrations that became nobody's.
    orphans: u32,
}

/// What a command asks of the reservation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    Nothing,
    Read,
    Write,
}

/// What the logical unit has to do after a change.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Effects {
    pub attentions: Vec<(Nexus, Code)>,
    /// The commands of these nexuses are to be aborted.
    pub abort: Vec<Nexus>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Refusal {
    Conflict,
    Check(Sense),
}

/// The parameter list of PERSISTENT RESERVE OUT.
#[derive(Clone, Copy, Debug, Default)]
pub struct Parameters {
    pub key: u64,
    pub action_key: u64,
    pub specify_initiators: bool,
    pub all_target_ports: bool,
    pub aptpl: bool,
}

impl Parameters {
    pub const BYTES: usize = 24;

    pub fn parse(list: &[u8]) -> Option<Self> {
        let list: &[u8; Self::BYTES] = list.get(..Self::BYTES)?.try_into().ok()?;
        let number = |at: usize| list[at..at + 8].iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte));
        Some(Parameters {
            key: number(0),
            action_key: number(8),
            specify_initiators: list[20] & 0x08 != 0,
            all_target_ports: list[20] & 0x04 != 0,
            aptpl: list[20] & 0x01 != 0,
        })
    }
}

pub const REGISTER: u8 = 0;
pub const RESERVE: u8 = 1;
pub const RELEASE: u8 = 2;
pub const CLEAR: u8 = 3;
pub const PREEMPT: u8 = 4;
pub const PREEMPT_AND_ABORT: u8 = 5;
pub const REGISTER_AND_IGNORE: u8 = 6;

type Outcome = Result<Effects, Refusal>;

impl Reservations {
    pub fn key_of(&self, nexus: &Nexus) -> Option<u64> {
        self.registrations.iter().find(|one| one.nexus == *nexus).map(|one| one.key)
    }

    fn holds(&self, nexus: &Nexus) -> bool {
        match &self.reservation {
            None => false,
            Some(Reservation { holder: Some(holder), .. }) => holder == nexus,
            Some(Reservation { holder: None, .. }) => self.key_of(nexus).is_some(),
        }
    }

    pub fn allows(&self, nexus: &Nexus, need: Need) -> bool {
        let Some(reservation) = &self.reservation else {
            return true;
        };
        need == Need::Nothing
            || (need == Need::Read && reservation.kind.writes_only())
            || self.holds(nexus)
            || (reservation.kind.for_registrants() && self.key_of(nexus).is_some())
    }

    /// PERSISTENT RESERVE OUT. `kind` is the byte of the CDB with scope and type.
    pub fn out(&mut self, nexus: &Nexus, action: u8, kind: u8, list: Parameters) -> Outcome {
        match action {
            REGISTER | REGISTER_AND_IGNORE => self.register(nexus, action == REGISTER_AND_IGNORE, list),
            RESERVE | RELEASE | CLEAR | PREEMPT | PREEMPT_AND_ABORT => {
                if self.key_of(nexus) != Some(list.key) {
                    return Err(Refusal::Conflict);
                }
                match action {
                    CLEAR => Ok(self.clear(nexus)),
                    RESERVE => self.reserve(nexus, scope_and_type(kind)?),
                    RELEASE => self.release(nexus, scope_and_type(kind)?),
                    _ => self.preempt(nexus, kind, list.action_key, action == PREEMPT_AND_ABORT),
                }
            }
            _ => Err(Refusal::Check(Sense { field: Some(1), ..Sense::INVALID_FIELD_IN_CDB })),
        }
    }

    fn register(&mut self, nexus: &Nexus, ignore_key: bool, list: Parameters) -> Outcome {
        if list.specify_initiators {
            return Err(Refusal::Check(Sense { field: Some(20), ..Sense::INVALID_FIELD_IN_PARAMETER_LIST }));
        }
        let registered = self.key_of(nexus);
        if !ignore_key && list.key != registered.unwrap_or(0) {
            return Err(Refusal::Conflict);
        }
        let mut effects = Effects::default();
        match (registered, list.action_key) {
            (None, 0) => return Ok(effects),
            (None, key) => self.registrations.push(Registration {
                nexus: nexus.clone(),
                key,
                all_target_ports: list.all_target_ports,
            }),
            (Some(_), 0) => effects = self.unregister(nexus),
            (Some(_), key) => {
                for one in self.registrations.iter_mut().filter(|one| one.nexus == *nexus) {
                    one.key = key;
                }
            }
        }
        self.aptpl = list.aptpl;
        self.generation = self.generation.wrapping_add(1);
        Ok(effects)
    }

    /// Takes one registration away; a reservation that loses its holder ends.
    pub fn unregister(&mut self, nexus: &Nexus) -> Effects {
        let held = self.holds(nexus);
        self.registrations.retain(|one| one.nexus != *nexus);
        let mut effects = Effects::default();
        let Some(reservation) = self.reservation.clone() else {
            return effects;
        };
        let ends = if reservation.kind.all_registrants() { self.registrations.is_empty() } else { held };
        if ends {
            self.reservation = None;
            if reservation.kind.for_registrants() {
                effects.attentions = self.tell_others(nexus, attention::RESERVATIONS_RELEASED);
            }
        }
        effects
    }

    /// The registration stays and belongs to nobody who could log in; so does a reservation that it holds.
    pub fn orphan(&mut self, nexus: &Nexus) {
        self.orphans += 1;
        let nobody = Nexus::new(&format!("{}#{}", nexus.initiator, self.orphans), nexus.isid);
        for one in self.registrations.iter_mut().filter(|one| one.nexus == *nexus) {
            one.nexus = nobody.clone();
        }
        if let Some(Reservation { holder: Some(holder), .. }) = &mut self.reservation
            && holder == nexus
        {
            *holder = nobody;
        }
    }

    fn reserve(&mut self, nexus: &Nexus, kind: Type) -> Outcome {
        if let Some(existing) = &self.reservation {
            return if existing.kind == kind && self.holds(nexus) {
                Ok(Effects::default())
            } else {
                Err(Refusal::Conflict)
            };
        }
        self.establish(nexus, kind);
        Ok(Effects::default())
    }

    fn release(&mut self, nexus: &Nexus, kind: Type) -> Outcome {
        let Some(existing) = self.reservation.clone() else {
            return Ok(Effects::default());
        };
        if !self.holds(nexus) {
            return Ok(Effects::default());
        }
        if existing.kind != kind {
            return Err(Refusal::Check(Sense::INVALID_RELEASE));
        }
        self.reservation = None;
        let mut effects = Effects::default();
        if kind.for_registrants() {
            effects.attentions = self.tell_others(nexus, attention::RESERVATIONS_RELEASED);
        }
        Ok(effects)
    }

    fn clear(&mut self, nexus: &Nexus) -> Effects {
        let attentions = self.tell_others(nexus, attention::RESERVATIONS_PREEMPTED);
        self.registrations.clear();
        self.reservation = None;
        self.generation = self.generation.wrapping_add(1);
        Effects { attentions, abort: Vec::new() }
    }

    fn preempt(&mut self, nexus: &Nexus, kind: u8, victim: u64, abort: bool) -> Outcome {
        let invalid = Refusal::Check(Sense { field: Some(8), ..Sense::INVALID_FIELD_IN_PARAMETER_LIST });
        let existing = self.reservation.clone();
        let takes_over = match &existing {
            None if victim == 0 => return Err(invalid),
            None => false,
            Some(Reservation { holder: None, .. }) => victim == 0,
            Some(Reservation { holder: Some(_), .. }) if victim == 0 => return Err(invalid),
            Some(Reservation { holder: Some(holder), .. }) => self.key_of(holder) == Some(victim),
        };
        let everyone = takes_over && victim == 0;
        let losing: Vec<Nexus> = self
            .registrations
            .iter()
            .filter(|one| (everyone || one.key == victim) && (one.nexus != *nexus || !takes_over))
            .map(|one| one.nexus.clone())
            .collect();
        if !takes_over && losing.is_empty() {
            return Err(Refusal::Conflict);
        }
        let kind = if takes_over { Some(scope_and_type(kind)?) } else { None };
        let mut effects = Effects::default();
        self.registrations.retain(|one| !losing.contains(&one.nexus));
        for one in losing.iter().filter(|one| *one != nexus) {
            effects.attentions.push((one.clone(), attention::REGISTRATIONS_PREEMPTED));
        }
        if let (Some(kind), Some(existing)) = (kind, existing) {
            if existing.kind != kind && existing.kind.for_registrants() {
                effects.attentions.extend(self.tell_others(nexus, attention::RESERVATIONS_RELEASED));
            }
            self.establish(nexus, kind);
        } else if self.registrations.is_empty() {
            self.reservation = None;
        }
        if abort {
            effects.abort = losing.into_iter().filter(|one| one != nexus).collect();
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(effects)
    }

    fn establish(&mut self, nexus: &Nexus, kind: Type) {
        let holder = (!kind.all_registrants()).then(|| nexus.clone());
        self.reservation = Some(Reservation { kind, holder });
    }

    fn tell_others(&self, nexus: &Nexus, code: Code) -> Vec<(Nexus, Code)> {
        let others = self.registrations.iter().filter(|one| one.nexus != *nexus);
        others.map(|one| (one.nexus.clone(), code)).collect()
    }

    /// Power was lost: nothing stays, unless it was to.
    pub fn power_lost(&mut self) {
        if !self.aptpl {
            self.registrations.clear();
            self.reservation = None;
        }
        self.generation = 0;
    }

    // --- PERSISTENT RESERVE IN -------------------------------------------------------------------------

    pub fn read_keys(&self) -> Vec<u8> {
        let mut out = self.generation.to_be_bytes().to_vec();
        out.extend_from_slice(&(self.registrations.len() as u32 * 8).to_be_bytes());
        self.registrations.iter().for_each(|one| out.extend_from_slice(&one.key.to_be_bytes()));
        out
    }

    pub fn read_reservation(&self) -> Vec<u8> {
        let mut out = self.generation.to_be_bytes().to_vec();
        let Some(reservation) = &self.reservation else {
            out.extend_from_slice(&[0; 4]);
            return out;
        };
        let key = reservation.holder.as_ref().and_then(|holder| self.key_of(holder)).unwrap_or(0);
        out.extend_from_slice(&16u32.to_be_bytes());
        out.extend_from_slice(&key.to_be_bytes());
        out.extend_from_slice(&[0, 0, 0, 0, 0, reservation.kind as u8, 0, 0]);
        out
    }

    pub fn report_capabilities(&self, aptpl: bool) -> Vec<u8> {
        // CRH, ATP_C, PTPL_C; TMV, ALLOW_COMMANDS 0, PTPL_A; then the mask of types.
        let flags = 0x04 | u8::from(aptpl);
        let active = 0x80 | u8::from(aptpl && self.aptpl);
        vec![0, 8, flags, active, 0xea, 0x01, 0, 0]
    }

    pub fn full_status(&self) -> Vec<u8> {
        let mut list = Vec::new();
        for one in &self.registrations {
            let mut name = one.nexus.to_string().into_bytes();
            name.push(0);
            name.resize(name.len().next_multiple_of(4).max(20), 0);
            let holds = self.holds(&one.nexus);
            let kind = if holds { self.reservation.as_ref().map_or(0, |held| held.kind as u8) } else { 0 };
            list.extend_from_slice(&one.key.to_be_bytes());
            list.extend_from_slice(&[0; 4]);
            list.push(u8::from(one.all_target_ports) << 1 | u8::from(holds));
            list.extend_from_slice(&[kind, 0, 0, 0, 0, 0, 1]);
            list.extend_from_slice(&(4 + name.len() as u32).to_be_bytes());
            list.extend_from_slice(&[0x45, 0]);
            list.extend_from_slice(&(name.len() as u16).to_be_bytes());
            list.extend_from_slice(&name);
        }
        let mut out = self.generation.to_be_bytes().to_vec();
        out.extend_from_slice(&(list.len() as u32).to_be_bytes());
        out.extend_from_slice(&list);
        out
    }
}

fn scope_and_type(byte: u8) -> Result<Type, Refusal> {
    let invalid = Refusal::Check(Sense { field: Some(2), ..Sense::INVALID_FIELD_IN_CDB });
    if byte >> 4 != 0 {
        return Err(invalid);
    }
    Type::from_code(byte & 0x0f).ok_or(invalid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nexus(name: &str) -> Nexus {
        Nexus::new(name, [0x40, 0, 0, 0, 0, 1])
    }

    fn list(key: u64, action_key: u64) -> Parameters {
        Parameters { key, action_key, ..Parameters::default() }
    }

    fn registered(names: &[(&str, u64)]) -> Reservations {
        let mut all = Reservations::default();
        for (name, key) in names {
            all.out(&nexus(name), REGISTER, 0, list(0, *key)).unwrap();
        }
        all
    }

    #[test]
    fn registering_asks_for_the_key() {
        let mut all = registered(&[("a", 1)]);
        assert_eq!(all.out(&nexus("a"), REGISTER, 0, list(9, 2)), Err(Refusal::Conflict));
        assert_eq!(all.out(&nexus("b"), REGISTER, 0, list(9, 2)), Err(Refusal::Conflict));
        all.out(&nexus("a"), REGISTER_AND_IGNORE, 0, list(9, 2)).unwrap();
        assert_eq!((all.key_of(&nexus("a")), all.generation), (Some(2), 2));
        all.out(&nexus("a"), REGISTER, 0, list(2, 0)).unwrap();
        assert_eq!((all.registrations.len(), all.generation), (0, 3));
    }

    #[test]
    fn who_may_do_what() {
        for (code, outsider_reads, registrant_writes) in [
            (1, true, false),
            (3, false, false),
            (5, true, true),
            (6, false, true),
            (7, true, true),
            (8, false, true),
        ] {
            let mut all = registered(&[("a", 1), ("b", 2)]);
            all.out(&nexus("a"), RESERVE, code, list(1, 0)).unwrap();
            assert!(all.allows(&nexus("a"), Need::Write));
            assert_eq!(all.allows(&nexus("b"), Need::Write), registrant_writes, "type {code}");
            assert_eq!(all.allows(&nexus("c"), Need::Read), outsider_reads, "type {code}");
            assert!(!all.allows(&nexus("c"), Need::Write));
            assert!(all.allows(&nexus("c"), Need::Nothing));
        }
    }

    #[test]
    fn preempting_one_of_all_registrants_leaves_the_reservation() {
        let mut all = registered(&[("a", 1), ("b", 2), ("c", 2)]);
        all.out(&nexus("b"), RESERVE, 7, list(2, 0)).unwrap();
        let effects = all.out(&nexus("a"), PREEMPT_AND_ABORT, 7, list(1, 2)).unwrap();
        assert_eq!(effects.abort, [nexus("b"), nexus("c")]);
        assert!(effects.attentions.iter().all(|(_, code)| *code == attention::REGISTRATIONS_PREEMPTED));
        assert!(!all.allows(&nexus("b"), Need::Write) && all.allows(&nexus("a"), Need::Write));
        assert!(all.allows(&nexus("b"), Need::Read), "type 7 leaves reads alone");
        assert_eq!(
            all.out(&nexus("a"), PREEMPT, 7, list(1, 2)),
            Err(Refusal::Conflict),
            "nobody left with it"
        );
    }

    #[test]
    fn preempting_the_holder_takes_the_reservation() {
        let mut all = registered(&[("a", 1), ("b", 2)]);
        all.out(&nexus("b"), RESERVE, 1, list(2, 0)).unwrap();
        all.out(&nexus("a"), PREEMPT, 5, list(1, 2)).unwrap();
        let held = all.reservation.clone().unwrap();
        assert_eq!((held.kind, held.holder), (Type::WriteExclusiveRegistrants, Some(nexus("a"))));
        assert!(!all.allows(&nexus("b"), Need::Write));
    }

    #[test]
    fn the_last_registrant_ends_a_reservation_of_all() {
        let mut all = registered(&[("a", 1), ("b", 2)]);
        all.out(&nexus("a"), RESERVE, 8, list(1, 0)).unwrap();
        all.out(&nexus("a"), REGISTER, 0, list(1, 0)).unwrap();
        assert!(all.reservation.is_some());
        all.out(&nexus("b"), REGISTER, 0, list(2, 0)).unwrap();
        assert!(all.reservation.is_none());
    }

    #[test]
    fn releasing_another_type_is_an_error() {
        let mut all = registered(&[("a", 1), ("b", 2)]);
        all.out(&nexus("a"), RESERVE, 5, list(1, 0)).unwrap();
        assert_eq!(all.out(&nexus("a"), RELEASE, 7, list(1, 0)), Err(Refusal::Check(Sense::INVALID_RELEASE)));
        assert_eq!(all.out(&nexus("b"), RELEASE, 5, list(2, 0)), Ok(Effects::default()));
        let effects = all.out(&nexus("a"), RELEASE, 5, list(1, 0)).unwrap();
        assert_eq!(effects.attentions, [(nexus("b"), attention::RESERVATIONS_RELEASED)]);
    }

    #[test]
    fn full_status_names_each_registrant_and_who_holds() {
        let mut all = registered(&[("iqn.a", 1), ("iqn.b", 2)]);
        all.out(&nexus("iqn.b"), RESERVE, 5, list(2, 0)).unwrap();
        let status = all.full_status();
        let number = |at: usize| u32::from_be_bytes(status[at..at + 4].try_into().unwrap()) as usize;
        assert_eq!((number(0), number(4)), (2, status.len() - 8));
        let mut at = 8;
        for (name, key, holds, kind) in [("iqn.a", 1, 0, 0), ("iqn.b", 2, 1, 5)] {
            assert_eq!(status[at..at + 8], u64::to_be_bytes(key));
            assert_eq!((status[at + 12], status[at + 13]), (holds, kind));
            // TransportID: iSCSI, with the ISID in the name; its length counts from behind itself.
            let id = &status[at + 24..at + 24 + number(at + 20)];
            assert_eq!((id[0], usize::from(id[3])), (0x45, id.len() - 4));
            let text = format!("{name},i,0x400000000001\0");
            assert_eq!(&id[4..4 + text.len()], text.as_bytes());
            assert_eq!(id.len() % 4, 0);
            at += 24 + id.len();
        }
        assert_eq!(at, status.len());
    }

    #[test]
    fn power_takes_registrations_that_were_not_to_persist() {
        let mut all = registered(&[("a", 1)]);
        let keep = Parameters { aptpl: true, ..list(1, 5) };
        let mut kept = all.clone();
        kept.out(&nexus("a"), REGISTER, 0, keep).unwrap();
        all.power_lost();
        kept.power_lost();
        assert_eq!((all.registrations.len(), kept.key_of(&nexus("a"))), (0, Some(5)));
    }
}
