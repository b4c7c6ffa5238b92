//! A path that answers from a script, and remembers what was asked: for the tests of this room.

use std::collections::VecDeque;

use super::cdb::Cdb;
use super::transport::{Data, Limits, Reply, Transport, TransportError, status};
use super::unit::{Answer, Problem, Unit};
use crate::device::FencingKey;
use crate::rt::Mutex;
use crate::types::{Incarnation, Owner, Slot};
use std::time::Duration;

pub(super) type Outcome = Result<Reply, TransportError>;

#[derive(Default)]
pub(super) struct Script {
    steps: Mutex<VecDeque<(u8, Outcome)>>,
    pub replays: bool,
}

impl Script {
    /// Operation codes in the order they must come, and the answer to each.
    pub fn of(steps: impl IntoIterator<Item = (u8, Outcome)>) -> Self {
        Script { steps: Mutex::new(steps.into_iter().collect()), replays: false }
    }

    pub fn assert_done(&self) {
        assert!(self.steps.lock().is_empty(), "left over: {:?}", self.steps.lock());
    }
}

impl Transport for Script {
    fn execute(&self, cdb: &Cdb, data: Data<'_>, _: Limits) -> Outcome {
        let (code, mut outcome) =
            self.steps.lock().pop_front().unwrap_or_else(|| panic!("unexpected {cdb:?}"));
        assert_eq!(code, cdb.opcode(), "{cdb:?}");
        if let (Data::In(buf), Ok(reply)) = (data, &mut outcome)
            && reply.status == status::GOOD
        {
            // Data-in stands in the place of sense data.
            let bytes = std::mem::take(&mut reply.sense);
            let len = bytes.len().min(buf.len());
            buf[..len].copy_from_slice(&bytes[..len]);
            reply.transferred = len;
        }
        outcome
    }
    fn replays(&self) -> bool {
        self.replays
    }
}

pub(super) fn good() -> Outcome {
    Ok(Reply::default())
}

pub(super) fn data(bytes: &[u8]) -> Outcome {
    Ok(Reply { sense: bytes.to_vec(), ..Reply::default() })
}

pub(super) fn with(status: u8) -> Outcome {
    Ok(Reply { status, ..Reply::default() })
}

pub(super) fn check(key: u8, asc: u8, ascq: u8) -> Outcome {
    let mut sense = vec![0; 18];
    (sense[0], sense[2], sense[7], sense[12], sense[13]) = (0x70, key, 10, asc, ascq);
    Ok(Reply { status: status::CHECK_CONDITION, sense, transferred: 0 })
}

fn key(life: u64) -> FencingKey {
    FencingKey::of(Owner { slot: Slot(3), incarnation: Incarnation(life) })
}

fn limits() -> Limits {
    Limits::within(Duration::from_secs(5))
}

const TUR: u8 = 0x00;
const PR_IN: u8 = 0x5E;
const PR_OUT: u8 = 0x5F;
const SWAP: u8 = 0x89;
const WRITE: u8 = 0x8A;

fn swap(unit: &Unit, path: &Script) -> Result<Answer, Problem> {
    unit.perform(path, &Cdb::compare_and_write(0), Data::Out(&[&[0; 512], &[1; 512]]), limits())
}

fn write(unit: &Unit, path: &Script) -> Result<Answer, Problem> {
    unit.perform(path, &Cdb::write_16(0, 1), Data::Out(&[&[0; 512]]), limits())
}

#[test]
fn a_unit_attention_is_drawn_before_the_next_swap_and_not_by_it() {
    let unit = Unit::default();
    let steps = [(SWAP, check(6, 0x29, 0)), (TUR, check(6, 0x3F, 0x0E)), (TUR, good()), (SWAP, good())];
    let path = Script::of(steps);
    assert!(matches!(swap(&unit, &path), Err(Problem::Passing(_))));
    assert_eq!(unit.resets(), 1);
    assert_eq!(swap(&unit, &path), Ok(Answer::Done(0)));
    path.assert_done();
}

#[test]
fn behind_a_replaying_path_a_unit_attention_leaves_a_swap_undecided() {
    let path = Script { replays: true, ..Script::of([(SWAP, check(6, 0x29, 0)), (TUR, good())]) };
    assert!(matches!(swap(&Unit::default(), &path), Err(Problem::Unknown { .. })));
}

#[test]
fn other_commands_go_on_after_a_unit_attention_and_after_busy() {
    let unit = Unit::default();
    let steps = [
        (WRITE, check(6, 0x2A, 0x09)),
        (TUR, good()),
        (WRITE, with(status::BUSY)),
        (WRITE, with(status::TASK_SET_FULL)),
        (WRITE, good()),
    ];
    let path = Script::of(steps);
    assert_eq!(write(&unit, &path), Ok(Answer::Done(0)));
    assert!(unit.take_capacity_changed());
    path.assert_done();
    // Busy for ever: not executed, and said so in time.
    let path = Script::of(std::iter::repeat_with(|| (WRITE, with(status::BUSY))).take(1000));
    let soon = Limits::within(Duration::from_millis(20));
    let busy = unit.perform(&path, &Cdb::write_16(0, 1), Data::Out(&[&[0; 512]]), soon);
    assert_eq!(busy, Err(Problem::Passing("busy".into())));
}

#[test]
fn after_a_conflict_nothing_but_reads_is_sent() {
    let unit = Unit::default();
    let path = Script::of([(WRITE, with(status::RESERVATION_CONFLICT)), (0x88, data(&[7; 512]))]);
    assert_eq!(write(&unit, &path), Err(Problem::Fenced));
    assert_eq!(swap(&unit, &path), Err(Problem::Fenced));
    let mut buf = [0; 512];
    let read = unit.perform(&path, &Cdb::read_16(0, 1), Data::In(&mut buf), limits());
    assert_eq!((read, buf), (Ok(Answer::Done(512)), [7; 512]));
    path.assert_done();
    unit.adopt_key(Some(key(9)));
    assert!(!unit.is_fenced());
}

#[test]
fn who_learns_at_a_read_that_it_was_fenced_still_reads() {
    let unit = Unit::default();
    unit.adopt_key(Some(key(1)));
    let conflict = with(status::RESERVATION_CONFLICT);
    let steps = [(0x88, check(6, 0x2A, 0x05)), (TUR, good()), (PR_OUT, conflict), (0x88, data(&[7; 512]))];
    let path = Script::of(steps);
    let mut buf = [0; 512];
    let read = unit.perform(&path, &Cdb::read_16(0, 1), Data::In(&mut buf), limits());
    assert_eq!((read, buf, unit.is_fenced()), (Ok(Answer::Done(512)), [7; 512], true));
    path.assert_done();
}

#[test]
fn a_reset_asks_for_the_registration_and_a_conflict_there_is_the_end() {
    for (answer, fenced) in [(good(), false), (with(status::RESERVATION_CONFLICT), true)] {
        for attention in [check(6, 0x29, 0x01), check(6, 0x2A, 0x05)] {
            let unit = Unit::default();
            unit.adopt_key(Some(key(1)));
            let mut steps = vec![(WRITE, attention), (TUR, good()), (PR_OUT, answer.clone())];
            if !fenced {
                steps.push((WRITE, good()));
            }
            let path = Script::of(steps);
            assert_eq!(write(&unit, &path).is_err(), fenced);
            assert_eq!(unit.is_fenced(), fenced);
            path.assert_done();
        }
    }
}

#[test]
fn an_error_of_an_earlier_command_is_a_lost_cache() {
    let unit = Unit::default();
    let deferred =
        Reply { status: status::CHECK_CONDITION, sense: vec![0x71, 0, 3, 0, 0, 0, 0, 10], transferred: 0 };
    let path = Script::of([(0x91, Ok(deferred)), (0x91, good())]);
    unit.perform(&path, &Cdb::synchronize_cache(), Data::None, limits()).unwrap();
    assert_eq!(unit.resets(), 1);
}

fn keys(keys: &[u64]) -> Outcome {
    let mut bytes = vec![0, 0, 0, 1, 0, 0, 0, keys.len() as u8 * 8];
    bytes.extend(keys.iter().flat_map(|key| key.to_be_bytes()));
    data(&bytes)
}

#[test]
fn fencing_believes_the_list_of_keys() {
    let (own, victim) = (key(1), key(2));
    let conflict = || with(status::RESERVATION_CONFLICT);
    let run = |steps: Vec<(u8, Outcome)>| {
        let unit = Unit::default();
        unit.adopt_key(Some(own));
        let path = Script::of(steps);
        let outcome = unit.fence_key(&path, victim, limits());
        path.assert_done();
        outcome
    };
    assert_eq!(run(vec![(PR_OUT, good()), (PR_IN, keys(&[own.value()]))]), Ok(()));
    // GOOD, and the victim is still there: a target that does nothing.
    let lies = run(vec![(PR_OUT, good()), (PR_IN, keys(&[own.value(), victim.value()]))]);
    assert!(matches!(lies, Err(Problem::Failed { .. })), "{lies:?}");
    // It was not registered (any more).
    let only_own = || (PR_IN, keys(&[own.value()]));
    assert_eq!(run(vec![(PR_OUT, conflict()), only_own(), only_own()]), Ok(()));
    // We are not registered any more.
    assert_eq!(run(vec![(PR_OUT, conflict()), (PR_IN, keys(&[]))]), Err(Problem::Fenced));
    // A target without PREEMPT AND ABORT: PREEMPT, and what it had taken in is waited for.
    let since = crate::rt::Instant::now();
    let unsupported = (PR_OUT, check(5, 0x24, 0));
    assert_eq!(run(vec![unsupported, (PR_OUT, good()), only_own()]), Ok(()));
    assert!(since.elapsed() >= super::reservation::PREEMPT_SETTLES);
}
