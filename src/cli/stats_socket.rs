//! The counters of a running mount, for anybody on this machine who may read them.
//!
//! Each daemon listens on a unix socket in its runtime directory, beside the file that it keeps locked and
//! with the same name: `VOLUME@HOST.stats`. Whoever connects gets one JSON object and the end of the stream;
//! nothing is read from the connection. `socat - UNIX-CONNECT:FILE` is a client.
//!
//! # JSON
//!
//! Fields are only ever added; a field that changes its meaning raises `version`.
//!
//! ```text
//! version    1
//! pid, uptime_ms, device, mountpoint, host
//! volume, label, slot, incarnation      the volume, and this host's place on it
//! commands   by what they were for: beat demand lock journal metadata data setup; of each: reads, writes,
//!            swaps (compare-and-writes), flushes, bytes_read, bytes_written
//! swaps      by how they ended: done, miscompared, unknown, own_had_landed; refused; causes: of lock, heartbeat
//!            and doorbell each, why swaps did not simply succeed: lost_race, stale_image, own_write_landed,
//!            false_miscompare, declared_dead, went_back, damaged, no_answer_landed, no_answer_not_landed,
//!            no_answer_superseded, no_answer_unresolved
//! latency    compare_and_write, small_read, small_write (the device's answers), swap (whole swaps), resolve
//!            (after a lost answer); of each: count, p50_us, p99_us, max_us
//! locks      known, held_shared, held_exclusive, wanted; acquired, given, waits, wait_ns
//! journal    free_blocks, capacity_blocks (4 KiB each), or null while a commit is under way
//! slowest_beat_ns
//! ```
//!
//! Not for telling whether a mount lives: a stuck daemon may still answer here.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::runtime_files;
use crate::control::in_its_directory;
use crate::volume::VolumeStats;

pub const VERSION: u32 = 1;

/// What a daemon tells about itself and its volume.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct DaemonStats {
    pub version: u32,
    pub pid: u32,
    pub uptime_ms: u64,
    pub device: String,
    pub mountpoint: String,
    pub host: String,
    #[serde(flatten)]
    pub volume: VolumeStats,
}

/// What does not change while a daemon lives, and where the rest comes from.
pub(super) struct Source {
    pub device: String,
    pub mountpoint: String,
    pub host: String,
    pub started: Instant,
    pub volume: Arc<dyn Fn() -> Option<VolumeStats> + Send + Sync>,
}

impl Source {
    /// The counters now; `None` for a filesystem that has none.
    pub(super) fn snapshot(&self) -> Option<DaemonStats> {
        Some(DaemonStats {
            version: VERSION,
            pid: std::process::id(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            device: self.device.clone(),
            mountpoint: self.mountpoint.clone(),
            host: self.host.clone(),
            volume: (self.volume)()?,
        })
    }
}

/// Serves the counters until dropped.
pub(super) struct Server {
    path: PathBuf,
}

/// A client that does not read may hold up other clients for this long, never the filesystem.
const CLIENT_PATIENCE: Duration = Duration::from_secs(1);
/// After an error of accept(2), such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the counters of a mount, if it has any. A mount without its counters is better than no mount.
pub(super) fn serve(identity: &str, source: &Arc<Source>) -> Option<Server> {
    source.snapshot()?;
    let path = runtime_files::directory().join(runtime_files::file_name(identity, &source.host, "stats"));
    Server::start(path.clone(), source.clone())
        .inspect_err(|e| log::warn!("{}: {e}; the counters of this mount can't be read", path.display()))
        .ok()
}

impl Server {
    fn start(path: PathBuf, source: Arc<Source>) -> io::Result<Server> {
        let listener = in_its_directory(&path, |path| {
            // Left over by a daemon that was killed; ours is the claim now.
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
            Ok(listener)
        })?;
        crate::rt::try_spawn("lunfs-stats", move || {
            loop {
                match listener.accept() {
                    // A client that went away is no concern of ours.
                    Ok((client, _)) => drop(answer(client, &source)),
                    Err(_) => std::thread::sleep(ACCEPT_PAUSE),
                }
            }
        })?;
        Ok(Server { path })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The thread and its socket go with the process.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn answer(mut client: UnixStream, source: &Source) -> io::Result<()> {
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let mut line = serde_json::to_vec(&source.snapshot())?;
    line.push(b'\n');
    client.write_all(&line)
}

/// Reads the counters of the daemon behind a socket.
pub fn read(path: &Path) -> io::Result<DaemonStats> {
    let mut stream = in_its_directory(path, |path| UnixStream::connect(path))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    let stats: DaemonStats = serde_json::from_slice(&text)?;
    if stats.version != VERSION {
        return Err(io::Error::other(format!("counters of version {}, not {VERSION}", stats.version)));
    }
    Ok(stats)
}

/// The sockets of all daemons on this machine, living or not.
pub fn all() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(runtime_files::directory()).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension() == Some(OsStr::new("stats"))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_what_the_source_says() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let deep = directory.path().join("x".repeat(90));
        std::fs::create_dir(&deep).expect("a new directory");
        let path = deep.join("volume@host.stats");
        let volume = VolumeStats { slot: 3, slowest_beat_ns: 7, ..VolumeStats::default() };
        let source = Source {
            device: "/dev/x".into(),
            mountpoint: "/mnt".into(),
            host: "alpha".into(),
            started: Instant::now(),
            volume: Arc::new(move || Some(volume.clone())),
        };
        std::fs::write(&path, "").expect("something left over");
        let server = Server::start(path.clone(), Arc::new(source)).expect("a socket");
        for _ in 0..2 {
            let stats = read(&path).expect("counters");
            assert_eq!(
                (stats.host.as_str(), stats.volume.slot, stats.volume.slowest_beat_ns),
                ("alpha", 3, 7)
            );
        }
        drop(server);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_later_version_adds_is_ignored_and_what_it_lacks_is_zero() {
        let text = r#"{"version":1,"pid":2,"uptime_ms":3,"device":"d","mountpoint":"m","host":"h",
            "slot":1,"locks":{"known":4,"new":5},"commands":{"beat":{"reads":1,"writes":0,"swaps":2,
            "flushes":0,"bytes_read":0,"bytes_written":0}},"journal":null,"newer":{}}"#;
        let stats: DaemonStats = serde_json::from_str(text).expect("counters");
        assert_eq!((stats.volume.locks.known, stats.volume.commands.idle().swaps), (4, 2));
        assert_eq!(stats.volume.commands.operations().commands(), 0);
    }
}
