//! Mounts a filesystem (in memory, or a real volume in an image) in a process of its own and cleans up whatever
//! happens.
//!
//! Each mount has a watchdog (`mounts`).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mounts::Watchdog;
pub use crate::mounts::{PATIENCE, can_mount, lunfs, until};
use crate::processes;

/// Do mounts have what only our own transport carries?
pub fn native() -> bool {
    std::env::var("LUNFS_TEST_TRANSPORT").map_or(true, |transport| transport == "native")
}

/// What is behind a mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Backing {
    Memory,
    /// A volume in an image file with logical blocks of this many bytes.
    Image(u32),
}

/// Directories for one mount, and its end.
pub struct Place {
    temp: tempfile::TempDir,
    pub name: String,
    pub backing: Backing,
    /// The daemon, once known.
    pub pid: Option<i32>,
    watchdog: Watchdog,
}

impl Place {
    pub fn new(name: &str) -> Place {
        Place::on(name, Backing::Memory)
    }

    pub fn on(name: &str, backing: Backing) -> Place {
        let temp = tempfile::tempdir().expect("a temporary directory");
        let name = match backing {
            Backing::Memory => format!("lunfs-test-{name}-{}", std::process::id()),
            Backing::Image(_) => temp.path().join("image").to_str().expect("a plain path").to_owned(),
        };
        let place = Place { temp, name, backing, pid: None, watchdog: Watchdog::default() };
        for directory in [place.dir(), place.run_dir()] {
            std::fs::create_dir(directory).expect("a new directory");
        }
        if let Backing::Image(bytes) = backing {
            let mut mkfs = lunfs();
            mkfs.args(["mkfs", "--size", "512M", "--quiet", "--logical-block", &bytes.to_string()]);
            let made = mkfs.arg(&place.name).output().expect("mkfs runs");
            assert!(made.status.success(), "{made:?}");
        }
        place
    }

    pub fn dir(&self) -> PathBuf {
        self.temp.path().join("mnt")
    }

    pub fn run_dir(&self) -> PathBuf {
        self.temp.path().join("run")
    }

    pub fn scratch(&self) -> &Path {
        self.temp.path()
    }

    fn socket(&self) -> PathBuf {
        self.temp.path().join("control")
    }

    /// The command that mounts here, without options.
    pub fn mount_command(&self, program: Command) -> Command {
        let mut command = program;
        command.env("LUNFS_RUN_DIR", self.run_dir());
        match self.backing {
            Backing::Memory => command.arg("--memfs").arg("--memfs-control").arg(self.socket()),
            Backing::Image(bytes) => command.arg("-o").arg(format!("logical_block={bytes}")),
        };
        // The same tests for the other transport.
        if let Ok(transport) = std::env::var("LUNFS_TEST_TRANSPORT") {
            command.arg("-o").arg(format!("transport={transport}"));
        }
        command
    }

    pub fn is_mounted(&self) -> bool {
        lunfs::fuse::mountinfo::at(&self.dir()).expect("mountinfo").is_some()
    }

    /// The daemon's process id, from the file that it keeps locked.
    pub fn find_pid(&mut self) -> i32 {
        let mut pid = None;
        for entry in std::fs::read_dir(self.run_dir()).expect("the runtime directory").flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            pid = pid.or(text.split(' ').next().and_then(|pid| pid.parse().ok()));
        }
        self.watch(pid.expect("a daemon's process id"));
        pid.expect("just seen")
    }

    /// Kills this process at the end, or when the test hangs.
    pub fn watch(&mut self, pid: i32) {
        self.pid = Some(pid);
        self.watchdog.watch(pid, &self.name, 2 * PATIENCE);
    }

    pub fn is_alive(&self) -> bool {
        self.pid.is_some_and(processes::lives)
    }

    /// The guard of the daemon, while that lives.
    pub fn guard(&self) -> Option<i32> {
        processes::guard_of(self.pid?)
    }

    /// One command to the filesystem in memory.
    pub fn pull(&self, command: &str) -> String {
        let answer = self.try_pull(command);
        match answer.strip_prefix("ok ") {
            Some(text) => text.trim().to_owned(),
            None => panic!("{command}: {answer}"),
        }
    }

    /// The same; the daemon may be gone before it can answer.
    pub fn try_pull(&self, command: &str) -> String {
        let mut stream = UnixStream::connect(self.socket()).expect("the daemon listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(format!("{command}\n").as_bytes()).expect("the daemon reads");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).expect("the daemon answers");
        line
    }

    pub fn calls(&self, operation: &str) -> u64 {
        self.pull(&format!("calls {operation}")).parse().expect("a number")
    }

    pub fn unmount(&self) {
        let umount = lunfs()
            .env("LUNFS_RUN_DIR", self.run_dir())
            .arg("umount")
            .arg(self.dir())
            .output()
            .expect("umount runs");
        assert!(umount.status.success(), "{umount:?}");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.watchdog.call_off();
        if let Some(pid) = self.pid
            && self.is_alive()
        {
            // Its guard ends by itself.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        while self.is_mounted() {
            if umount2(&self.dir(), MntFlags::MNT_DETACH).is_err() {
                eprintln!("left mounted: {}", self.dir().display());
                break;
            }
        }
    }
}

/// A mount made in the background, as users make it.
pub fn mount(name: &str, options: &str) -> Place {
    mount_on(name, options, Backing::Memory)
}

pub fn mount_on(name: &str, options: &str, backing: Backing) -> Place {
    let mut place = Place::on(name, backing);
    let mut command = lunfs();
    command.arg("mount");
    let output = place
        .mount_command(command)
        .args(["-o", options])
        .arg(&place.name)
        .arg(place.dir())
        .output()
        .expect("mount runs");
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "a success is silent: {output:?}");
    assert!(place.is_mounted());
    place.find_pid();
    place
}

/// A mount by a child process that stays in the foreground, so that its exit status can be seen.
pub fn mount_in_foreground(name: &str) -> (Place, Child) {
    let mut place = Place::new(name);
    let mut command = lunfs();
    command.arg("mount");
    let child = place
        .mount_command(command)
        .arg("--foreground")
        .arg(&place.name)
        .arg(place.dir())
        .stderr(Stdio::null())
        .spawn()
        .expect("mount starts");
    place.watch(i32::try_from(child.id()).expect("a process id"));
    until("the mount shows", || place.is_mounted());
    (place, child)
}

/// Asserts that a command failed with this status and one line on stderr that contains the text.
pub fn assert_fails(output: &Output, status: i32, text: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert!(output.stdout.is_empty());
    assert_eq!(stderr.lines().count(), 1, "one clear line: {stderr}");
    assert!(stderr.contains(text), "{text:?} not in {stderr}");
}
