//! What an answer means, by the question that counts: may the command have been executed?
//!
//! | verdict | from | executed? |
//! | --- | --- | --- |
//! | `Done` | GOOD, CONDITION MET, recovered error | yes |
//! | `Miscompare` | sense key Eh | no, unless it was sent twice below us |
//! | `Conflict` | RESERVATION CONFLICT | no |
//! | `Attention` | sense key 6h | no; on a path that replays: maybe |
//! | `Busy` | BUSY, TASK SET FULL, ACA ACTIVE, not ready 04/xx | no |
//! | `Unknown` | time-out, broken path, TASK ABORTED, sense key Bh, 0h or none | maybe |
//! | `Medium` | sense key 3h | maybe, in part |
//! | `Unsupported` | illegal request 20/00, 24/00, 25/00, 26/xx | no |
//! | `OutOfRange` | illegal request 21/00 | no |
//! | `WriteProtected` | sense key 7h | no |
//! | `Failed` | hardware error, other not ready and illegal requests | see the field |
//!
//! Deferred errors speak of an earlier command that was answered long ago: the one at hand was not executed, and
//! what was believed durable may not be.

use super::sense::{Sense, key};
use super::transport::{Reply, TransportError, status};
use crate::device::Executed;

/// The meaning of an answer, or of none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    Done,
    Miscompare {
        offset: Option<u64>,
    },
    Conflict,
    Attention(Sense),
    Busy(&'static str),
    Unknown {
        why: String,
        /// It can be executed after this moment, on the path as it is.
        later: bool,
    },
    /// It never left this machine.
    NotSent(String),
    Medium(Sense),
    Unsupported(Sense),
    OutOfRange,
    WriteProtected,
    /// An error of an earlier command.
    Deferred(Sense),
    Failed {
        why: String,
        executed: Executed,
    },
}

impl Verdict {
    pub fn of(outcome: &Result<Reply, TransportError>) -> Verdict {
        match outcome {
            Ok(reply) => Self::of_reply(reply),
            Err(TransportError::NotSent(why)) => Verdict::NotSent(why.clone()),
            Err(error @ (TransportError::TimedOut | TransportError::Lost(_))) => {
                Verdict::Unknown { why: error.to_string(), later: true }
            }
            Err(error) => Verdict::Unknown { why: error.to_string(), later: false },
        }
    }

    fn of_reply(reply: &Reply) -> Verdict {
        match reply.status {
            status::GOOD | status::CONDITION_MET => Verdict::Done,
            status::CHECK_CONDITION => Self::of_sense(&reply.sense),
            status::RESERVATION_CONFLICT => Verdict::Conflict,
            status::BUSY => Verdict::Busy("busy"),
            status::TASK_SET_FULL => Verdict::Busy("task set full"),
            status::ACA_ACTIVE => Verdict::Busy("auto contingent allegiance"),
            status::TASK_ABORTED => Verdict::Unknown { why: "task aborted".into(), later: false },
            other => Verdict::Unknown { why: format!("status {other:02X}h"), later: false },
        }
    }

    fn of_sense(bytes: &[u8]) -> Verdict {
        let Some(sense) = Sense::decode(bytes) else {
            return Verdict::Unknown { why: "check condition without sense data".into(), later: false };
        };
        if sense.deferred {
            return Verdict::Deferred(sense);
        }
        match (sense.key, sense.asc) {
            (key::RECOVERED_ERROR, _) => Verdict::Done,
            (key::MISCOMPARE, _) => Verdict::Miscompare { offset: sense.information },
            (key::UNIT_ATTENTION, _) => Verdict::Attention(sense),
            // Becoming ready, in transition, needs a command: passes, or is told as a failure at the deadline.
            (key::NOT_READY, 0x04) => Verdict::Busy("not ready"),
            (key::NOT_READY, _) => Verdict::Failed { why: sense.to_string(), executed: Executed::No },
            (key::MEDIUM_ERROR, _) => Verdict::Medium(sense),
            (key::ILLEGAL_REQUEST, 0x21) => Verdict::OutOfRange,
            (key::ILLEGAL_REQUEST, 0x20 | 0x24 | 0x25 | 0x26) => Verdict::Unsupported(sense),
            (key::ILLEGAL_REQUEST, _) => Verdict::Failed { why: sense.to_string(), executed: Executed::No },
            (key::DATA_PROTECT, _) => Verdict::WriteProtected,
            (key::HARDWARE_ERROR, _) => Verdict::Failed { why: sense.to_string(), executed: Executed::Maybe },
            _ => Verdict::Unknown { why: sense.to_string(), later: false },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(key: u8, asc: u8, ascq: u8) -> Verdict {
        let mut sense = vec![0; 18];
        (sense[0], sense[2], sense[7], sense[12], sense[13]) = (0x70, key, 10, asc, ascq);
        Verdict::of(&Ok(Reply { status: status::CHECK_CONDITION, sense, transferred: 0 }))
    }

    fn with(status: u8) -> Verdict {
        Verdict::of(&Ok(Reply { status, ..Reply::default() }))
    }

    #[test]
    fn the_table() {
        assert_eq!(with(0x00), Verdict::Done);
        assert_eq!(check(0x1, 0x17, 1), Verdict::Done);
        assert_eq!(check(0xE, 0x1D, 0), Verdict::Miscompare { offset: None });
        assert_eq!(with(0x18), Verdict::Conflict);
        assert!(matches!(check(0x6, 0x29, 0), Verdict::Attention(s) if s.code() == 0x2900));
        for busy in [with(0x08), with(0x28), with(0x30), check(0x2, 0x04, 0x0A)] {
            assert!(matches!(busy, Verdict::Busy(_)), "{busy:?}");
        }
        for unknown in [with(0x40), with(0x77), with(0x02), check(0xB, 0x0E, 3), check(0x0, 0, 0)] {
            assert!(matches!(unknown, Verdict::Unknown { later: false, .. }), "{unknown:?}");
        }
        let late = Verdict::of(&Err(TransportError::TimedOut));
        assert!(matches!(late, Verdict::Unknown { later: true, .. }));
        let broken = Verdict::of(&Err(TransportError::Broken("x".into())));
        assert!(matches!(broken, Verdict::Unknown { later: false, .. }));
        assert!(matches!(check(0x3, 0x11, 0), Verdict::Medium(_)));
        for (asc, ascq) in [(0x20, 0), (0x24, 0), (0x26, 4)] {
            assert!(matches!(check(0x5, asc, ascq), Verdict::Unsupported(_)));
        }
        assert_eq!(check(0x5, 0x21, 0), Verdict::OutOfRange);
        assert_eq!(check(0x7, 0x27, 0), Verdict::WriteProtected);
        assert!(matches!(check(0x4, 0x44, 0), Verdict::Failed { executed: Executed::Maybe, .. }));
        assert!(matches!(check(0x2, 0x3A, 0), Verdict::Failed { executed: Executed::No, .. }));
    }

    proptest! {
        /// No answer is taken for success but the three that are.
        #[test]
        fn nothing_else_is_done(status: u8, sense in proptest::collection::vec(any::<u8>(), 0..64)) {
            let reply = Reply { status, sense: sense.clone(), transferred: 0 };
            let recovered = Sense::decode(&sense).is_some_and(|s| s.key == key::RECOVERED_ERROR && !s.deferred);
            let may = status == 0 || status == 4 || status == 2 && recovered;
            prop_assert_eq!(Verdict::of(&Ok(reply)) == Verdict::Done, may);
        }
    }
}
