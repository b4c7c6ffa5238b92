//! Targets that other people wrote, started for a test: on a free port of loopback, with their files in a directory of
//! their own, ended with the test whatever becomes of it.
//!
//! They are the second opinion: what the product gets right on our own target only may be a misunderstanding that both
//! share. `tgtd` is close to a good array, once its compare-and-write is switched on; `istgt` is the strange one.
//!
//! Where a program isn't installed, starting gives `Unavailable`, whose text says what to install; a test prints that as
//! SKIPPED and returns.

mod istgt;
mod tgtd;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

pub use istgt::Istgt;
pub use tgtd::{Tgtd, TgtdOptions};

/// Why a target can't be had here.
#[derive(Debug)]
pub enum Unavailable {
    /// Program, Debian package.
    Missing(&'static str, &'static str),
    NotRoot(&'static str),
    Failed(io::Error),
}

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unavailable::Missing(program, package) => {
                write!(f, "{program} is not installed (apt-get install {package})")
            }
            Unavailable::NotRoot(program) => write!(f, "{program} needs root"),
            Unavailable::Failed(error) => write!(f, "it does not start: {error}"),
        }
    }
}

impl From<io::Error> for Unavailable {
    fn from(error: io::Error) -> Self {
        Unavailable::Failed(error)
    }
}

impl Unavailable {
    /// Whether a test may go without: a target that is there and doesn't start is a failure.
    pub fn may_skip(&self) -> bool {
        !matches!(self, Unavailable::Failed(_))
    }
}

/// The target, or a line that says why a test goes without.
pub fn had<T>(started: Result<T, Unavailable>) -> Option<T> {
    match started {
        Ok(target) => Some(target),
        Err(why) if why.may_skip() => {
            eprintln!("SKIPPED: {why}");
            None
        }
        Err(why) => panic!("{why}"),
    }
}

/// The program's path, if it is installed; the administrator's directories are looked at as well.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    directories.map(|directory| directory.join(name)).find(|found| found.is_file())
}

fn require(program: &'static str, package: &'static str) -> Result<PathBuf, Unavailable> {
    find_program(program).ok_or(Unavailable::Missing(program, package))
}

/// A port that was free a moment ago.
fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

/// A directory for a target and its disk: in memory where that can be had, for these targets have one thread that writes, and a
/// disk that others keep busy holds up every answer.
fn directory(prefix: &str) -> io::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(prefix);
    builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir())
}

/// A process that doesn't outlive this one: a shell holds it, and kills it when the pipe from here ends.
struct Supervised {
    shell: Child,
    pid: Pid,
}

impl Supervised {
    fn start(
        program: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
        log: &Path,
    ) -> io::Result<Self> {
        let script = r#"exec 3<&0; "$@" </dev/null >&2 & child=$!; echo $child; exec >/dev/null
            read -r _ <&3; kill -9 $child 2>/dev/null; wait $child 2>/dev/null"#;
        // The shell is not to be preloaded with what is meant for the program.
        let log = File::create(log)?;
        let mut shell = Command::new("sh")
            .args(["-c", script, "sh", "env"])
            .args(environment.iter().map(|(name, value)| format!("{name}={value}")))
            .arg(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()?;
        let mut line = String::new();
        if let Some(output) = shell.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        let pid = line.trim().parse().map_err(|_| io::Error::other("no process id from the shell"))?;
        Ok(Supervised { shell, pid: Pid::from_raw(pid) })
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill(self.pid, signal)?)
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // The end of the pipe is the order to kill; a stopped process takes it as well.
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

fn wait_for_port(portal: SocketAddr, log: &Path) -> io::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(portal).is_err() {
        if Instant::now() > deadline {
            let said = std::fs::read_to_string(log).unwrap_or_default();
            return Err(io::Error::other(format!("nobody listens at {portal}: {said}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
