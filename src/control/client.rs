//! The client's side: one command, its events, its end.

use std::io::{self, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;
use thiserror::Error;

use super::address::in_its_directory;
use super::wire::{Failure, Reply, Request, VERSION, read_line};

/// How often the wish to cancel is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long a daemon may take to say that it cancelled.
const GOODBYE: Duration = Duration::from_secs(10);
const MOST_REPLY_BYTES: usize = 16 << 20;

/// Why a command has no answer.
#[derive(Debug, Error)]
pub enum CallError {
    #[error("the daemon can't be reached: {0}")]
    Connect(io::Error),
    #[error("the daemon ended in the middle")]
    Gone,
    #[error("{}", .0.text)]
    Failed(Failure),
    #[error("the daemon said something that can't be understood: {0}")]
    Strange(String),
    /// We wanted it to end, and did not hear whether it did.
    #[error("cancelled; the daemon did not confirm it")]
    Unconfirmed,
    #[error("the connection to the daemon: {0}")]
    Io(#[from] io::Error),
}

/// Asks the daemon behind a socket. `cancelled`: set by whoever wants no more of it, such as a signal handler.
pub fn call(
    path: &Path,
    command: &str,
    arguments: Value,
    cancelled: &AtomicBool,
    on_event: &mut dyn FnMut(Value),
) -> Result<Value, CallError> {
    let mut stream = in_its_directory(path, |path| UnixStream::connect(path)).map_err(CallError::Connect)?;
    stream.set_read_timeout(Some(LOOK))?;
    let request = Request { version: VERSION, command: command.to_owned(), arguments };
    let mut line = serde_json::to_vec(&request).map_err(io::Error::from)?;
    line.push(b'\n');
    // A daemon that refused at once has closed its side; what it said is read below.
    let sent = stream.write_all(&line);
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    let mut goodbye: Option<Instant> = None;
    loop {
        match read_line(&mut reader, &mut line, MOST_REPLY_BYTES) {
            Ok(true) => {}
            Ok(false) => return Err(sent.err().map_or(CallError::Gone, CallError::Io)),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                match goodbye {
                    Some(since) if since.elapsed() > GOODBYE => return Err(CallError::Unconfirmed),
                    None if cancelled.load(Ordering::Relaxed) => {
                        goodbye = Some(Instant::now());
                        reader.get_ref().shutdown(Shutdown::Write)?;
                    }
                    _ => {}
                }
                continue;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(CallError::Gone),
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                return Err(CallError::Strange(e.to_string()));
            }
            Err(e) => return Err(e.into()),
        }
        let reply: Result<Reply, _> = serde_json::from_slice(&line);
        line.clear();
        match reply {
            Ok(Reply::Event(event)) => on_event(event),
            Ok(Reply::Done(value)) => return Ok(value),
            Ok(Reply::Failed(failure)) => return Err(CallError::Failed(failure)),
            Err(e) => return Err(CallError::Strange(e.to_string())),
        }
        // A stream of events that never pauses must not keep a wish to cancel from being seen.
        if goodbye.is_none() && cancelled.load(Ordering::Relaxed) {
            goodbye = Some(Instant::now());
            reader.get_ref().shutdown(Shutdown::Write)?;
        }
    }
}
