//! Two guests and the LUN that they share.
//!
//! The target runs in the test's process, so a test can look at what was executed, by whom and in which order.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lunfs_test_target::{Config, Entry, LunConfig, Target};

use crate::machine::Guest;

pub const LUN_BYTES: u64 = 1 << 30;

/// One pair at a time: a guest wants two processors.
static ALONE: Mutex<()> = Mutex::new(());

pub struct Pair {
    pub guests: Vec<Guest>,
    pub target: Target,
    boot: PathBuf,
    directory: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// What guests boot from, made now if it has to be; `None`, loudly, where it can't be had.
fn boot_files() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let prepared = Command::new(root.join("tests/guests/prepare")).output().expect("bash runs");
    let said = String::from_utf8_lossy(&prepared.stdout);
    if prepared.status.code() == Some(77) {
        eprintln!("{}", said.trim_end());
        return None;
    }
    assert!(prepared.status.success(), "{said}{}", String::from_utf8_lossy(&prepared.stderr));
    Some(root.join("target/guest"))
}

impl Pair {
    /// Two guests that are ready, `g0` and `g1`.
    pub fn boot() -> Option<Pair> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let boot = boot_files()?;
        let directory = tempfile::Builder::new().prefix("lunfs-guests-").tempdir().expect("a directory");
        let lun = LunConfig::new(1, LUN_BYTES).file(directory.path().join("lun"));
        let config = Config { trace: 400_000, ..Config::of(lun) };
        let target = Target::start(config).expect("the test target starts");
        let mut pair = Pair { guests: Vec::new(), target, boot, directory, _alone: alone };
        let began = Instant::now();
        for name in ["g0", "g1"] {
            let guest = pair.start(name);
            pair.guests.push(guest);
        }
        pair.guests.iter().for_each(Guest::wait_until_ready);
        eprintln!("two guests are ready after {:.1} s", began.elapsed().as_secs_f64());
        Some(pair)
    }

    fn start(&self, name: &str) -> Guest {
        Guest::start(self.directory.path(), name, &self.boot, self.target.portal(), self.target.name())
    }

    /// The machine that died is switched on again.
    pub fn boot_again(&mut self, guest: usize) {
        let name = self.guests[guest].name.clone();
        self.guests[guest] = self.start(&name);
        self.guests[guest].wait_until_ready();
    }

    /// The LUN, as a file.
    pub fn image(&self) -> PathBuf {
        self.directory.path().join("lun")
    }

    /// Runs a script on both guests at the same time; what each said. Each has its number in `$n`.
    pub fn both(&self, script: &str) -> Vec<String> {
        let running: Vec<_> =
            (0..2).map(|n| self.guests[n].start_command(&format!("n={n}; {script}"))).collect();
        running.into_iter().map(|command| command.succeed(crate::machine::PATIENCE)).collect()
    }

    /// `lunfs` on the machine of the test, on the LUN as a file. Nobody may use it.
    pub fn lunfs(&self, words: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_lunfs")).args(words).arg(self.image()).output().expect("it runs")
    }

    /// What this guest's commands did to the LUN after this entry of the trace.
    pub fn changes_of(&self, guest: usize, since: u64) -> Vec<Entry> {
        let name = &self.guests[guest].initiator;
        let entries = self.target.trace_since(since).into_iter();
        entries.filter(|entry| *entry.nexus.initiator == **name && entry.changed).collect()
    }

    /// What it was refused by a reservation.
    pub fn refused(&self, guest: usize, since: u64) -> Vec<Entry> {
        const CONFLICT: u8 = 0x18;
        let name = &self.guests[guest].initiator;
        let entries = self.target.trace_since(since).into_iter();
        entries.filter(|entry| *entry.nexus.initiator == **name && entry.status == CONFLICT).collect()
    }
}
