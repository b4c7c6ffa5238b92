//! Guests, mostly two, and the LUN that they share.
//!
//! The target runs in the test's process, so a test can look at what was executed, by whom and in which order.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lunfs_test_target::{Config, Entry, LunConfig, Target};

use crate::machine::{Guest, Lun, Machine, Network};

pub const LUN_BYTES: u64 = 1 << 30;

/// One scenario at a time: a guest wants two processors.
static ALONE: Mutex<()> = Mutex::new(());

pub struct Pair {
    pub guests: Vec<Guest>,
    machines: Vec<Machine>,
    pub target: Target,
    directory: tempfile::TempDir,
    _alone: MutexGuard<'static, ()>,
}

/// Which kernel guests have; see `prepare`.
fn kernel() -> String {
    std::env::var("LUNFS_GUESTS_KERNEL").unwrap_or_else(|_| "stock".into())
}

/// What guests boot from, made now if it has to be; `None`, loudly, where it can't be had.
fn boot_files(extras: &[&str]) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let prepared = Command::new(root.join("tests/guests/prepare")).args(extras).output().expect("bash runs");
    let said = String::from_utf8_lossy(&prepared.stdout);
    if prepared.status.code() == Some(77) {
        eprintln!("{}", said.trim_end());
        return None;
    }
    assert!(prepared.status.success(), "{said}{}", String::from_utf8_lossy(&prepared.stderr));
    Some(root.join("target/guest"))
}

/// The initramfs, and behind it what else is wanted: the kernel unpacks one after the other.
fn initramfs(boot: &Path, extras: &[&str], directory: &Path) -> PathBuf {
    let own = boot.join(kernel()).join("initramfs");
    if extras.is_empty() {
        return own;
    }
    let mut bytes = std::fs::read(own).expect("an initramfs");
    for extra in extras {
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(std::fs::read(boot.join(extra)).expect("what was prepared"));
    }
    let all = directory.join("initramfs");
    std::fs::write(&all, bytes).expect("room for an initramfs");
    all
}

/// A port of loopback that nobody has.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

impl Pair {
    /// Two guests that are ready, `g0` and `g1`, whose `/dev/sda` is the LUN.
    pub fn boot() -> Option<Pair> {
        Pair::of(&[], |pair| vec![pair.machine("g0", 1), pair.machine("g1", 1)])
    }

    /// Guests that are ready, with more in their initramfs.
    pub fn of(extras: &[&str], machines: impl FnOnce(&Pair) -> Vec<Machine>) -> Option<Pair> {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let boot = boot_files(extras)?;
        let directory = tempfile::Builder::new().prefix("lunfs-guests-").tempdir().expect("a directory");
        let lun = LunConfig::new(1, LUN_BYTES).file(directory.path().join("lun"));
        let config = Config { trace: 400_000, ..Config::of(lun) };
        let target = Target::start(config).expect("the test target starts");
        let mut pair = Pair { guests: Vec::new(), machines: Vec::new(), target, directory, _alone: alone };
        let (vmlinuz, initramfs) =
            (boot.join(kernel()).join("vmlinuz"), initramfs(&boot, extras, pair.directory.path()));
        let began = Instant::now();
        for mut machine in machines(&pair) {
            (machine.kernel, machine.initramfs) = (vmlinuz.clone(), initramfs.clone());
            pair.guests.push(Guest::start(pair.directory.path(), &machine));
            pair.machines.push(machine);
        }
        pair.guests.iter().for_each(Guest::wait_until_ready);
        let release = pair.guests[0].run("uname -r");
        eprintln!(
            "Linux {release}: {} ready after {:.1} s",
            pair.guests.len(),
            began.elapsed().as_secs_f64()
        );
        Some(pair)
    }

    /// A machine with this many ways to the LUN.
    pub fn machine(&self, name: &str, disks: usize) -> Machine {
        let lun = Lun { portal: self.target.portal(), target: self.target.name().to_owned() };
        Machine {
            name: name.to_owned(),
            kernel: PathBuf::new(),
            initramfs: PathBuf::new(),
            disks: vec![lun; disks],
            network: Network::None,
            memory_mib: 512,
        }
    }

    pub fn portal(&self) -> SocketAddr {
        self.target.portal()
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The machine that died is switched on again.
    pub fn boot_again(&mut self, guest: usize) {
        self.guests[guest] = Guest::start(self.directory.path(), &self.machines[guest]);
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
