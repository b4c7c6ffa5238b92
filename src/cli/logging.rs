//! Where log lines go: stderr in the foreground, a file where one was named, else the system's log.
//!
//! The level comes from `LUNFS_LOG` in the syntax of env_logger (`debug`, `lunfs::fuse=trace,warn`).

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use env_logger::{Builder, Env, Target};
use log::Level;

const SYSLOG_SOCKET: &str = "/dev/log";
/// Facility "daemon" of syslog(3).
const FACILITY_DAEMON: u8 = 3 << 3;

fn builder() -> Builder {
    Builder::from_env(Env::new().filter_or("LUNFS_LOG", "warn,lunfs=info").write_style("LUNFS_LOG_STYLE"))
}

/// To stderr.
pub(super) fn to_stderr() {
    let _ = builder().try_init();
}

/// Appends to a file.
pub(super) fn to_file(path: &Path) -> io::Result<()> {
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    let _ = builder().target(Target::Pipe(Box::new(file))).try_init();
    Ok(())
}

/// To the system's log; where there is none, nowhere.
pub(super) fn to_syslog() {
    let Ok(socket) = UnixDatagram::unbound() else { return };
    if socket.connect(SYSLOG_SOCKET).is_err() {
        return;
    }
    let pid = std::process::id();
    let _ = builder()
        .format(move |out, record| {
            let severity = match record.level() {
                Level::Error => 3,
                Level::Warn => 4,
                Level::Info => 6,
                Level::Debug | Level::Trace => 7,
            };
            write!(out, "<{}>lunfs[{pid}]: {}", FACILITY_DAEMON | severity, record.args())
        })
        .target(Target::Pipe(Box::new(Datagrams(socket))))
        .try_init();
}

/// One datagram for each record; a log that can't take it must not stop the filesystem.
struct Datagrams(UnixDatagram);

impl Write for Datagrams {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let _ = self.0.set_nonblocking(true);
        if self.0.send(record).is_err() {
            let _ = self.0.connect(SYSLOG_SOCKET).and_then(|()| self.0.send(record));
        }
        Ok(record.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
