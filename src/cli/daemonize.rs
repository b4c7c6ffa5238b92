//! Mounting in the background: the command starts itself again as the daemon and waits for its word.
//!
//! No fork of a process with threads: the daemon is a fresh process in a session of its own. It says "ready"
//! through a pipe once the filesystem serves, or why not; only then does the command return, so that its
//! status tells the truth. A command that was killed while waiting makes the daemon take the mount off
//! again, for nobody was told of it.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{EXIT_SYSTEM, Failure};

/// First byte of the daemon's word.
const WORD_READY: u8 = b'R';
const WORD_FAILED: u8 = b'F';

/// Starts the daemon with the arguments of `mount` and waits for its word.
pub(super) fn launch(arguments: &[OsString]) -> Result<(), Failure> {
    let program = std::env::current_exe()
        .map_err(|e| Failure::system(format!("cannot find the program's own file: {e}")))?;
    let mut child = Command::new(program)
        .arg("mount")
        .arg("--foreground")
        .arg("--ready-fd=1")
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|e| Failure::system(format!("cannot start the daemon: {e}")))?;
    let mut word = Vec::new();
    if let Some(mut pipe) = child.stdout.take() {
        // The daemon closes its end after one word; so does the system when it dies.
        let _ = pipe.read_to_end(&mut word);
    }
    match word.split_first() {
        Some((&WORD_READY, _)) => Ok(()),
        Some((&WORD_FAILED, rest)) => {
            let (status, message) = rest.split_first().unwrap_or((&EXIT_SYSTEM, b""));
            // Nothing is left behind when the command returns.
            let _ = child.wait();
            Err(Failure { status: *status, message: String::from_utf8_lossy(message).into_owned() })
        }
        _ => {
            let how = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            Err(Failure::system(format!("the daemon ended before the filesystem was usable ({how})")))
        }
    }
}

/// The daemon's end of the pipe, or none in the foreground.
pub(super) struct ReadyPipe(Option<File>);

impl ReadyPipe {
    pub(super) fn foreground() -> ReadyPipe {
        ReadyPipe(None)
    }

    /// Takes the pipe from standard output, which becomes /dev/null, and leaves the starter's session.
    pub(super) fn from_stdout() -> io::Result<ReadyPipe> {
        let pipe = io::stdout().as_fd().try_clone_to_owned()?;
        let null = File::options().write(true).open("/dev/null")?;
        nix::unistd::dup2_stdout(&null)?;
        // Fails only for a process group leader, which we aren't.
        let _ = nix::unistd::setsid();
        // Where each session is scheduled as one (autogroup, sched(7)), the priority of the beat counts only within ours,
        // and a busy shell beside us would have as much of a processor as all that this host's files need.
        let _ = std::fs::write("/proc/self/autogroup", "-10");
        Ok(ReadyPipe(Some(File::from(pipe))))
    }

    pub(super) fn is_daemon(&self) -> bool {
        self.0.is_some()
    }

    /// Does anybody wait for our word, or is there nobody who could?
    pub(super) fn is_awaited(&self) -> bool {
        let Some(pipe) = &self.0 else { return true };
        // The writing end of a pipe without a reader shows an error.
        let mut ends = [PollFd::new(pipe.as_fd(), PollFlags::empty())];
        poll(&mut ends, PollTimeout::ZERO).is_err()
            || ends[0].revents().is_none_or(|seen| !seen.contains(PollFlags::POLLERR))
    }

    /// Says that the filesystem serves. An error: nobody listens any more.
    pub(super) fn ready(&mut self) -> io::Result<()> {
        let Some(mut pipe) = self.0.take() else { return Ok(()) };
        pipe.write_all(&[WORD_READY])?;
        close_stderr()
    }

    /// Reports why there is no mount; the status for the process itself.
    pub(super) fn failed(self, failure: &Failure) -> ExitCode {
        let line = failure.one_line();
        match self.0 {
            Some(mut pipe) => {
                let mut word = vec![WORD_FAILED, failure.status];
                word.extend_from_slice(line.as_bytes());
                let _ = pipe.write_all(&word);
            }
            None => report(failure),
        }
        ExitCode::from(failure.status)
    }
}

/// Makes stderr /dev/null: whoever reads the starter's stderr to its end must not wait for ours.
pub(super) fn close_stderr() -> io::Result<()> {
    let null = File::options().write(true).open("/dev/null")?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// The one line on stderr.
pub(super) fn report(failure: &Failure) {
    let _ = writeln!(io::stderr(), "lunfs: {}", failure.one_line());
}
