//! The lines of the protocol. See [`super`].

use std::io::{self, BufRead, Read};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub const VERSION: u32 = 1;

/// What a client asks for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub version: u32,
    pub command: String,
    #[serde(default)]
    pub arguments: Value,
}

/// What the daemon says.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Reply {
    Event(Value),
    Done(Value),
    Failed(Failure),
}

/// Why a command came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// A sentence for people.
    pub text: String,
}

impl Failure {
    pub fn new(kind: FailureKind, text: impl Into<String>) -> Self {
        Failure { kind, text: text.into() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    Version,
    UnknownCommand,
    BadArguments,
    Denied,
    /// It is being done for somebody else, or too much is.
    Busy,
    Cancelled,
    /// The mount ends, or may not be used any more.
    Ended,
    Failed,
    /// One that a later version added.
    #[serde(other)]
    Other,
}

/// Reads on until a line is whole. False: the stream ended. An error keeps what was read.
pub(super) fn read_line(stream: &mut impl BufRead, line: &mut Vec<u8>, most: usize) -> io::Result<bool> {
    let room = (most + 1).saturating_sub(line.len());
    stream.by_ref().take(room as u64).read_until(b'\n', line)?;
    match line.last() {
        Some(b'\n') => Ok(true),
        _ if line.len() > most => Err(io::Error::new(io::ErrorKind::InvalidData, "a line that is too long")),
        _ => Ok(false),
    }
}
