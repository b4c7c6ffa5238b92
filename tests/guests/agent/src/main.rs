//! What runs inside a guest: a server of commands for the host's test, SCSI commands, and loads.
//!
//! The test drives it (`tests/guests/machine.rs`); every other subcommand is one of the commands that a test asks for.
//! What a load says on its standard output is with the host as soon as the line is complete, so that a line survives
//! the guest: a load that says *durable* must have made it so before.

mod loads;
mod port;
mod scsi;
mod scsi_tool;

use std::io;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words.as_slice() {
        ["serve"] => port::serve().map(|()| ExitCode::SUCCESS),
        ["scsi", rest @ ..] => scsi_tool::run(rest),
        ["load", rest @ ..] => loads::run(rest).map(|()| ExitCode::SUCCESS),
        _ => Err(io::Error::other("agent serve | scsi COMMAND DEVICE ... | load NAME DIRECTORY ...")),
    };
    done.unwrap_or_else(|e| {
        eprintln!("agent: {e}");
        ExitCode::FAILURE
    })
}

/// Argument `n` of a subcommand, parsed.
pub fn number<T: std::str::FromStr>(words: &[&str], n: usize, what: &str) -> io::Result<T> {
    let word = words.get(n).ok_or_else(|| io::Error::other(format!("{what} is missing")))?;
    word.parse().map_err(|_| io::Error::other(format!("{word:?} is no {what}")))
}
