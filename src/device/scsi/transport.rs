//! One path to a logical unit: a command out, an answer back, or a word on why there is none.

use std::time::Duration;

use thiserror::Error;

use super::cdb::Cdb;
use crate::rt::Instant;

/// Status bytes (SAM-5 5.3) that are told apart.
pub mod status {
    pub const GOOD: u8 = 0x00;
    pub const CHECK_CONDITION: u8 = 0x02;
    pub const CONDITION_MET: u8 = 0x04;
    pub const BUSY: u8 = 0x08;
    pub const RESERVATION_CONFLICT: u8 = 0x18;
    pub const TASK_SET_FULL: u8 = 0x28;
    pub const ACA_ACTIVE: u8 = 0x30;
    pub const TASK_ABORTED: u8 = 0x40;
}

/// Until when a command may go out, and until when its answer is waited for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// What was not handed to the network or the kernel by then never is, whatever stopped this process.
    pub send_until: Instant,
    pub answer_until: Instant,
}

impl Limits {
    /// Both at the same moment.
    pub fn within(span: Duration) -> Limits {
        let until = Instant::now() + span;
        Limits { send_until: until, answer_until: until }
    }
}

/// Data of a command.
pub enum Data<'a> {
    None,
    In(&'a mut [u8]),
    /// Sent one behind the other.
    Out(&'a [&'a [u8]]),
}

impl Data<'_> {
    pub fn len_bytes(&self) -> usize {
        match self {
            Data::None => 0,
            Data::In(buf) => buf.len(),
            Data::Out(parts) => parts.iter().map(|part| part.len()).sum(),
        }
    }

    /// The same data once more.
    pub fn again(&mut self) -> Data<'_> {
        match self {
            Data::None => Data::None,
            Data::In(buf) => Data::In(buf),
            Data::Out(parts) => Data::Out(parts),
        }
    }
}

/// An answer of the target.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reply {
    pub status: u8,
    /// Sense data as it came, empty where none did.
    pub sense: Vec<u8>,
    /// Bytes of data-in or data-out that were really moved.
    pub transferred: usize,
}

/// Why no answer came.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum TransportError {
    /// It did not leave this machine and never will.
    #[error("not sent: {0}")]
    NotSent(String),
    /// It was sent and the path broke. What was sent over a path ends before the next one to the same target
    /// is usable, so it comes no later than that.
    #[error("the path broke: {0}")]
    Broken(String),
    /// The path failed, and nothing says that the next one comes after what was sent over it: it can be executed later.
    #[error("lost: {0}")]
    Lost(String),
    /// No answer by the deadline, on a path that may still work: it can be executed later.
    #[error("no answer in time")]
    TimedOut,
    /// An answer that means nothing.
    #[error("senseless answer: {0}")]
    Garbled(String),
}

/// One path to one logical unit; several threads use it at once.
pub trait Transport: Send + Sync {
    /// Sends one command, once, and waits for its answer.
    fn execute(&self, cdb: &Cdb, data: Data<'_>, limits: Limits) -> Result<Reply, TransportError>;

    /// Does anything below send commands again by itself (a multipath layer, a virtual machine's disk), so that a
    /// unit attention or a miscompare may be the answer to the second of two executions?
    fn replays(&self) -> bool {
        false
    }
}
