//! What tests that mount have in common: can it be done here, the program, waiting, and a watchdog.
//!
//! A daemon inside the test's process would wait for itself, so each mount has a process of its own, and a test that
//! hangs in a system call is let go by the end of its daemon.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything may take on a slow machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// `false`, loudly, where a mount can't be made.
pub fn can_mount() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").is_ok();
    if !(root && device) {
        eprintln!("SKIPPED: needs root ({root}) and /dev/fuse ({device})");
    }
    root && device
}

pub fn lunfs() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lunfs"))
}

/// Waits until the condition holds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Kills the daemons of a test that hangs, so that the hanging system call fails and the test with it; it says so
/// first.
#[derive(Default)]
pub struct Watchdog {
    called_off: Arc<AtomicBool>,
}

impl Watchdog {
    /// Kills this process after so long, unless it was called off.
    pub fn watch(&self, pid: i32, whose: &str, patience: Duration) {
        let (called_off, whose) = (self.called_off.clone(), whose.to_owned());
        std::thread::spawn(move || {
            let start = Instant::now();
            while !called_off.load(Ordering::Acquire) {
                if start.elapsed() > patience {
                    eprintln!("WATCHDOG: the test hangs; killing the daemon of {whose} ({pid})");
                    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
    }

    /// From now on the process ids may be others' again.
    pub fn call_off(&self) {
        self.called_off.store(true, Ordering::Release);
    }
}
