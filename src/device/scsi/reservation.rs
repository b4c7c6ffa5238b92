//! Persistent reservations: write exclusive, all registrants (type 7). Everybody reads; who is registered writes; a
//! key that is preempted takes its host's writes with it.
//!
//! * The key is registered on every path that is written through: each is an I_T nexus of its own to the target.
//! * PREEMPT AND ABORT is proof: what was sent under that key is aborted or ended when it is answered. Where a
//!   target only knows PREEMPT, what it had already taken in is waited for ([`PREEMPT_SETTLES`]).
//! * "Is this path still registered?" is asked by registering the same key again: the target refuses that with a
//!   conflict on a path that isn't, and changes nothing on one that is. It needs no list and no identity.
//! * Whether registrations survive the target's own power loss (APTPL) is what the last REGISTER of anybody said (SPC-4
//!   5.13.5): so every one of ours says it, also the one that only asks and the one that leaves.
//! * Nothing here registers by itself: a host that lost its registration was fenced, or can't tell.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::cdb::{Cdb, PrIn, PrOut, WRITE_EXCLUSIVE_ALL_REGISTRANTS, pr_out_parameters};
use super::transport::{Data, Limits, Transport};
use super::unit::{Problem, Unit};
use crate::device::{Executed, FencingKey};
use crate::rt::{random_u64, sleep};

/// How long a target may still execute what it had taken in before a PREEMPT without abort.
pub const PREEMPT_SETTLES: Duration = Duration::from_secs(2);
/// Allocation of the first question for keys, and of the second if there are more: 8,190 keys.
const KEYS_BYTES_FIRST: u16 = 8 + 64 * 8;
const KEYS_BYTES_MOST: u16 = 65528;
/// Keys of a host that must register to preempt and has none: no slot has this number.
const VISITOR: u64 = 0xFFFF << 48;

/// A key that names no host of any volume.
pub fn visitor_key() -> u64 {
    VISITOR | (random_u64() >> 16)
}

/// Registered keys as far as they arrived, one for each path that registered.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Keys {
    pub generation: u32,
    pub keys: Vec<u64>,
    /// The target has this many.
    pub total: usize,
}

/// The reservation there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reservation {
    /// Zero where all registrants hold it.
    pub key: u64,
    pub kind: u8,
}

fn header(bytes: &[u8]) -> Option<(u32, usize, &[u8])> {
    let generation = u32::from_be_bytes(*bytes.first_chunk()?);
    let len = u32::from_be_bytes(*bytes.get(4..)?.first_chunk()?);
    Some((generation, usize::try_from(len).ok()?, bytes.get(8..)?))
}

/// READ KEYS; `None`: not even a header.
pub fn decode_keys(bytes: &[u8]) -> Option<Keys> {
    let (generation, len, body) = header(bytes)?;
    let present = &body[..len.min(body.len())];
    let keys = present.as_chunks::<8>().0.iter().map(|key| u64::from_be_bytes(*key)).collect();
    Some(Keys { generation, keys, total: len / 8 })
}

/// READ RESERVATION; `Ok(None)`: there is none.
pub fn decode_reservation(bytes: &[u8]) -> Option<Option<Reservation>> {
    let (_, len, body) = header(bytes)?;
    if len == 0 {
        return Some(None);
    }
    let key = u64::from_be_bytes(*body.first_chunk()?);
    Some(Some(Reservation { key, kind: body.get(13)? & 0x0F }))
}

impl Unit {
    fn out(
        &self,
        path: &dyn Transport,
        action: PrOut,
        key: u64,
        action_key: u64,
        persist: bool,
        limits: Limits,
    ) -> Result<(), Problem> {
        let list = pr_out_parameters(key, action_key, persist);
        let cdb = Cdb::persistent_reserve_out(action, WRITE_EXCLUSIVE_ALL_REGISTRANTS);
        self.perform(path, &cdb, Data::Out(&[&list]), limits).map(drop)
    }

    /// All registered keys.
    pub fn read_keys(&self, path: &dyn Transport, limits: Limits) -> Result<Keys, Problem> {
        let garbled =
            || Problem::Failed { why: "read keys: a senseless answer".into(), executed: Executed::No };
        let ask = |bytes: u16| {
            let cdb = Cdb::persistent_reserve_in(PrIn::ReadKeys, bytes);
            decode_keys(&self.ask(path, &cdb, bytes.into(), limits)?).ok_or_else(garbled)
        };
        let mut found = ask(KEYS_BYTES_FIRST)?;
        if found.total > found.keys.len() {
            found = ask(KEYS_BYTES_MOST)?;
        }
        match found.keys.len() < found.total {
            true => Err(garbled()),
            false => Ok(found),
        }
    }

    pub fn read_reservation(
        &self,
        path: &dyn Transport,
        limits: Limits,
    ) -> Result<Option<Reservation>, Problem> {
        let bytes = self.ask(path, &Cdb::persistent_reserve_in(PrIn::ReadReservation, 24), 24, limits)?;
        let garbled =
            || Problem::Failed { why: "read reservation: a senseless answer".into(), executed: Executed::No };
        decode_reservation(&bytes).ok_or_else(garbled)
    }

    /// Registers `key` on this path, whatever it was registered under, and reserves nothing.
    pub fn join_path(&self, path: &dyn Transport, key: u64, limits: Limits) -> Result<(), Problem> {
        match self.out(path, PrOut::RegisterAndIgnore, 0, key, true, limits) {
            Err(Problem::Unsupported | Problem::Failed { executed: Executed::No, .. }) => {
                self.forgets_registrations.store(true, Ordering::Relaxed);
                self.out(path, PrOut::RegisterAndIgnore, 0, key, false, limits)
            }
            other => other,
        }
    }

    /// Registers `key` on this path, whatever it was registered under, and makes sure of the reservation. Surviving
    /// the target's own power loss is asked for, and gone without where the target can't.
    pub fn register_path(&self, path: &dyn Transport, key: u64, limits: Limits) -> Result<(), Problem> {
        self.join_path(path, key, limits)?;
        match self.out(path, PrOut::Reserve, key, 0, false, limits) {
            Err(Problem::Conflict) => match self.read_reservation(path, limits)? {
                // Held by all registrants, and so by us; some targets don't say GOOD to that.
                Some(held) if held.kind == WRITE_EXCLUSIVE_ALL_REGISTRANTS => Ok(()),
                held => {
                    let why = format!("the device is reserved in a way that is not LunFS's ({held:?})");
                    Err(Problem::Failed { why, executed: Executed::No })
                }
            },
            other => other,
        }
    }

    /// Takes the registration of this path back. With the last one the reservation goes, too.
    pub fn unregister_path(&self, path: &dyn Transport, key: u64, limits: Limits) -> Result<(), Problem> {
        let persist = !self.forgets_registrations.load(Ordering::Relaxed);
        match self.out(path, PrOut::Register, key, 0, persist, limits) {
            // It is gone already.
            Err(Problem::Conflict) => Ok(()),
            other => other,
        }
    }

    /// Is this path still registered under our key, if we have one? If not this host is fenced.
    pub fn confirm_registration(&self, path: &dyn Transport, limits: Limits) -> Result<(), Problem> {
        let Some(key) = self.key() else { return Ok(()) };
        if self.is_registered(path, key.value(), limits)? {
            return Ok(());
        }
        self.latch_fenced("the target does not know its registration any more");
        Err(Problem::Fenced)
    }

    /// Is this path registered under `key`? Concludes nothing.
    pub fn is_registered(&self, path: &dyn Transport, key: u64, limits: Limits) -> Result<bool, Problem> {
        use super::verdict::Verdict;
        // Not `perform`: a unit attention would lead here again.
        let persist = !self.forgets_registrations.load(Ordering::Relaxed);
        let list = pr_out_parameters(key, key, persist);
        let cdb = Cdb::persistent_reserve_out(PrOut::Register, 0);
        for _ in 0..8 {
            match Verdict::of(&path.execute(&cdb, Data::Out(&[&list]), limits)) {
                Verdict::Done => return Ok(true),
                Verdict::Conflict => return Ok(false),
                Verdict::Attention(_) => {}
                Verdict::Busy(_) => sleep(Duration::from_millis(5)),
                other => return Err(Problem::Passing(format!("looking at the registration: {other:?}"))),
            }
        }
        Err(Problem::Passing("looking at the registration: no answer".into()))
    }

    /// Shuts `victim` out. Once this is Ok nothing that was sent under its key changes the device any more.
    pub fn fence_key(&self, path: &dyn Transport, victim: FencingKey, limits: Limits) -> Result<(), Problem> {
        if let Some(key) = self.key() {
            return self.preempt(path, key.value(), victim.value(), limits);
        }
        // Only who is registered may preempt: as a visitor, for this one command.
        let visitor = visitor_key();
        self.register_path(path, visitor, limits)?;
        let preempted = self.preempt(path, visitor, victim.value(), limits);
        let left = self.unregister_path(path, visitor, limits);
        preempted.and(left)
    }

    /// Shuts out every key but `own`, under which this path is registered. How many were there?
    pub fn fence_others(&self, path: &dyn Transport, own: u64, limits: Limits) -> Result<usize, Problem> {
        // Before its own registration nobody can preempt who holds the reservation.
        let mut others = self.read_keys(path, limits)?.keys;
        others.retain(|key| *key != own);
        others.sort_unstable();
        others.dedup();
        others.iter().try_for_each(|victim| self.preempt(path, own, *victim, limits))?;
        Ok(others.len())
    }

    fn preempt(&self, path: &dyn Transport, own: u64, victim: u64, limits: Limits) -> Result<(), Problem> {
        if own == victim {
            let why = "a host can't fence itself".into();
            return Err(Problem::Failed { why, executed: Executed::No });
        }
        let mut outcome = self.out(path, PrOut::PreemptAndAbort, own, victim, false, limits);
        let mut aborted = true;
        if let Err(Problem::Unsupported | Problem::Failed { executed: Executed::No, .. }) = outcome {
            aborted = false;
            outcome = self.out(path, PrOut::Preempt, own, victim, false, limits);
        }
        match outcome {
            Ok(()) => {}
            // Not registered: never, or not any more; or it is we who aren't.
            Err(Problem::Conflict | Problem::Unsupported | Problem::Failed { .. }) => {
                let keys = self.read_keys(path, limits)?.keys;
                if !keys.contains(&own) {
                    self.latch_fenced("the target does not know its registration any more");
                    return Err(Problem::Fenced);
                }
                if keys.contains(&victim) {
                    return Err(Problem::Failed {
                        why: "the target refuses to preempt".into(),
                        executed: Executed::No,
                    });
                }
            }
            Err(e) => return Err(e),
        }
        if self.read_keys(path, limits)?.keys.contains(&victim) {
            let why = "the target said that it had preempted, and the key is still there".into();
            return Err(Problem::Failed { why, executed: Executed::Maybe });
        }
        if !aborted {
            sleep(PREEMPT_SETTLES);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys(generation: u32, len: u32, keys: &[u64]) -> Vec<u8> {
        let mut bytes = generation.to_be_bytes().to_vec();
        bytes.extend(len.to_be_bytes());
        bytes.extend(keys.iter().flat_map(|key| key.to_be_bytes()));
        bytes
    }

    #[test]
    fn keys_in_pieces() {
        let all = decode_keys(&keys(7, 16, &[1, 2])).unwrap();
        assert_eq!(all, Keys { generation: 7, keys: vec![1, 2], total: 2 });
        // More than arrived, fewer than arrived, half a key, a length that can't be.
        let part = decode_keys(&keys(7, 80, &[1, 2])).unwrap();
        assert_eq!((part.keys.len(), part.total), (2, 10));
        assert_eq!(decode_keys(&keys(7, 8, &[1, 2])).unwrap().keys, [1]);
        assert_eq!(decode_keys(&keys(7, 16, &[1, 2])[..20]).unwrap().keys, [1]);
        assert_eq!(decode_keys(&keys(7, u32::MAX, &[1])).unwrap().keys, [1]);
        assert_eq!(decode_keys(&[0; 7]), None);
    }

    #[test]
    fn reservations() {
        assert_eq!(decode_reservation(&keys(1, 0, &[])), Some(None));
        let mut bytes = keys(1, 16, &[0xAB, 0]);
        bytes[8 + 13] = 0x07;
        assert_eq!(decode_reservation(&bytes), Some(Some(Reservation { key: 0xAB, kind: 7 })));
        assert_eq!(decode_reservation(&bytes[..20]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            if let Some(keys) = decode_keys(&bytes) {
                prop_assert!(keys.keys.len() <= bytes.len() / 8);
                prop_assert!(keys.keys.len() <= keys.total);
            }
            let _ = decode_reservation(&bytes);
        }
    }
}
