//! A volume, its hosts and their end.
//!
//! Everything is cleaned up by process id and path, also when a body panics. Each mount has a watchdog (`mounts`).

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lunfs::device::file::loopdev::{LoopDevice, LoopOptions};
use lunfs_test_target::{Config, LunConfig, Target};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

pub use super::backing::Backing;
use super::backing::Stranger;
use crate::mounts::Watchdog;
pub use crate::mounts::{PATIENCE, can_mount, lunfs, until};
use crate::processes;

/// How long a whole body may take.
const BODY_PATIENCE: Duration = Duration::from_secs(240);

/// Tests of one body, one for each kind of device.
macro_rules! on_every_device {
    ($($hosts:literal hosts: $body:ident;)*) => {$(
        pub mod $body {
            use crate::harness::{Backing, with_hosts};
            #[test]
            fn file_512() {
                with_hosts(Backing::File(512), $hosts, super::$body);
            }
            #[test]
            fn file_4096() {
                with_hosts(Backing::File(4096), $hosts, super::$body);
            }
            #[test]
            fn loop_512() {
                with_hosts(Backing::Loop(512), $hosts, super::$body);
            }
            #[test]
            fn loop_4096() {
                with_hosts(Backing::Loop(4096), $hosts, super::$body);
            }
            #[cfg(feature = "iscsi")]
            #[test]
            fn iscsi() {
                with_hosts(Backing::Iscsi(512), $hosts, super::$body);
            }
        }
    )*};
}

/// `n` rounds at scale 1; never none.
pub fn rounds(n: u64) -> u64 {
    let scale: f64 = std::env::var("LUNFS_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1.0);
    ((n as f64 * scale) as u64).max(2)
}

/// Runs a body on `count` mounted hosts, then sees them leave.
pub fn with_hosts(backing: Backing, count: usize, body: fn(&Cluster)) {
    if !can_mount() {
        return;
    }
    if matches!(backing, Backing::Iscsi(_)) && !lunfs::device::iscsi::AVAILABLE {
        eprintln!("SKIPPED: built without libiscsi");
        return;
    }
    let mut cluster = Cluster::new(backing, count as u16 + 1, "1G");
    for _ in 0..count {
        cluster.mount();
    }
    body(&cluster);
    cluster.end();
}

/// Two hosts and a slot to spare, unless nothing can be mounted here.
pub fn two_hosts(backing: Backing) -> Option<Cluster> {
    if !can_mount() {
        return None;
    }
    let mut cluster = Cluster::new(backing, 3, "1G");
    cluster.mount();
    cluster.mount();
    Some(cluster)
}

/// One host: a daemon and its mountpoint.
pub struct Host {
    pub name: String,
    pub dir: PathBuf,
    pub pid: i32,
}

impl Host {
    pub fn is_mounted(&self) -> bool {
        lunfs::fuse::mountinfo::at(&self.dir).expect("mountinfo").is_some()
    }

    pub fn is_alive(&self) -> bool {
        processes::lives(self.pid)
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal).expect("the daemon lives");
    }
}

/// A volume and the hosts that have it mounted.
pub struct Cluster {
    temp: tempfile::TempDir,
    backing: Backing,
    loops: Vec<LoopDevice>,
    /// Environment of the daemons that are mounted from now on.
    pub environment: Vec<(String, OsString)>,
    target: Option<Target>,
    stranger: Option<Stranger>,
    pub hosts: Vec<Host>,
    /// Mount options of every host.
    pub options: &'static str,
    made: usize,
    watchdog: Watchdog,
}

impl Cluster {
    /// Makes a volume; nobody has it mounted yet.
    pub fn new(backing: Backing, slots: u16, size: &str) -> Cluster {
        Cluster::with_profile("normal", backing, slots, size)
    }

    /// With other durations (`--profile`).
    pub fn with_profile(profile: &str, backing: Backing, slots: u16, size: &str) -> Cluster {
        let temp = tempfile::Builder::new().prefix("lunfs-hosts-").tempdir().expect("a temporary directory");
        Cluster::inside(temp, profile, backing, slots, size)
    }

    /// With the image in this directory.
    pub fn inside(
        temp: tempfile::TempDir,
        profile: &str,
        backing: Backing,
        slots: u16,
        size: &str,
    ) -> Cluster {
        Self::made_with(temp, profile, backing, slots, size, &[])
    }

    /// With more arguments for mkfs.
    pub fn made_with(
        temp: tempfile::TempDir,
        profile: &str,
        backing: Backing,
        slots: u16,
        size: &str,
        more: &[&str],
    ) -> Cluster {
        std::fs::create_dir(temp.path().join("run")).expect("a new directory");
        let hosts = Vec::new();
        let mut cluster = Cluster {
            temp,
            backing,
            loops: Vec::new(),
            environment: Vec::new(),
            target: None,
            stranger: None,
            hosts,
            options: "",
            made: 0,
            watchdog: Watchdog::default(),
        };
        let device = match backing {
            Backing::File(_) => cluster.image(),
            Backing::Loop(_) => {
                let image = std::fs::File::create(cluster.image()).expect("a new image");
                let bytes: u64 = size.trim_end_matches('G').parse().expect("whole GiB");
                image.set_len(bytes << 30).expect("a sparse image");
                cluster.attach().path().to_owned()
            }
            Backing::Iscsi(block_bytes) => {
                let bytes: u64 = size.trim_end_matches('G').parse().expect("whole GiB");
                let lun = LunConfig::new(1, bytes << 30).block_bytes(block_bytes).file(cluster.image());
                let target = Target::start(Config::of(lun)).expect("the test target starts");
                cluster.target.insert(target).url(1).into()
            }
            Backing::Tgtd | Backing::Istgt => {
                let bytes: u64 = size.trim_end_matches('G').parse().expect("whole GiB");
                let stranger = Stranger::start(backing, bytes << 30).expect("the target starts");
                cluster.stranger.insert(stranger).url().into()
            }
        };
        let mut mkfs = lunfs();
        mkfs.args(["mkfs", "--quiet", "--profile", profile, "--slots", &slots.to_string()]);
        if let Backing::File(bytes) = backing {
            mkfs.args(["--size", size, "--logical-block", &bytes.to_string()]);
        }
        let made = mkfs.args(more).arg(device).output().expect("mkfs runs");
        assert!(made.status.success(), "{made:?}");
        cluster
    }

    /// The loop device of host number `n`.
    pub fn loop_path(&self, n: usize) -> &Path {
        self.loops[n].path()
    }

    pub fn directory(&self) -> &Path {
        self.temp.path()
    }

    /// Address of the LUN of a cluster on a target.
    pub fn url(&self) -> String {
        match &self.stranger {
            Some(stranger) => stranger.url(),
            None => self.target().url(1),
        }
    }

    /// What a device of this kind adds to the time until a silent host is dead.
    pub fn hold_time(&self) -> Duration {
        Duration::from_secs(if self.target.is_some() || self.stranger.is_some() { 10 } else { 0 })
    }

    /// The target of a cluster on iSCSI.
    pub fn target(&self) -> &Target {
        self.target.as_ref().expect("a cluster on iSCSI")
    }

    /// The target ends, as by a crash: what it had answered is in its file.
    pub fn stop_target(&mut self) -> std::net::SocketAddr {
        self.target.take().expect("a cluster on iSCSI").portal()
    }

    /// It comes back under its old address, with what it had.
    pub fn start_target(&mut self, portal: std::net::SocketAddr) {
        let Backing::Iscsi(block_bytes) = self.backing else { panic!("no target wanted") };
        let bytes = std::fs::metadata(self.image()).expect("its file").len();
        let lun = LunConfig::new(1, bytes).block_bytes(block_bytes).file(self.image());
        let config = Config { listen: portal, ..Config::of(lun) };
        until("the target starts", || {
            self.target = Target::start(config.clone()).ok();
            self.target.is_some()
        });
    }

    pub fn image(&self) -> PathBuf {
        match &self.stranger {
            Some(stranger) => stranger.image(),
            None => self.temp.path().join("image"),
        }
    }

    fn attach(&mut self) -> &LoopDevice {
        let Backing::Loop(bytes) = self.backing else { panic!("no loop device wanted") };
        let options = LoopOptions { logical_block_bytes: bytes, ..LoopOptions::default() };
        let device = LoopDevice::attach(&self.image(), &options).expect("a loop device");
        forget_dead_mounts(device.path());
        self.loops.push(device);
        self.loops.last().expect("just pushed")
    }

    /// The device as host number `n` knows it.
    fn device(&mut self, n: usize) -> String {
        let path = match self.backing {
            Backing::File(_) => self.image(),
            Backing::Loop(_) => {
                while self.loops.len() <= n {
                    self.attach();
                }
                self.loops[n].path().to_owned()
            }
            Backing::Iscsi(_) => self.target.as_ref().expect("a target").url(1).into(),
            Backing::Tgtd | Backing::Istgt => self.url().into(),
        };
        path.to_str().expect("a plain path").to_owned()
    }

    /// A command that mounts as a new host, or as an old one under its name.
    pub fn mount_command(&mut self, name: &str, options: &str) -> (Command, PathBuf) {
        let number = self.made;
        self.made += 1;
        let dir = self.temp.path().join(format!("mnt-{name}-{number}"));
        std::fs::create_dir(&dir).expect("a new directory");
        let device = self.device(self.hosts.len());
        let log = self.temp.path().join(format!("log-{name}"));
        let mut command = lunfs();
        command.env("LUNFS_RUN_DIR", self.temp.path().join("run"));
        command.envs(self.environment.iter().cloned());
        command.args(["mount", "--host", name, "-o", &format!("log={}", log.display())]);
        if let Backing::File(bytes) = self.backing {
            command.args(["-o", &format!("logical_block={bytes}")]);
        }
        // The same tests for the other transport.
        if let Ok(transport) = std::env::var("LUNFS_TEST_TRANSPORT") {
            command.args(["-o", &format!("transport={transport}")]);
        }
        for options in [options, self.options].into_iter().filter(|options| !options.is_empty()) {
            command.args(["-o", options]);
        }
        command.arg(&device).arg(&dir);
        (command, dir)
    }

    pub fn mount(&mut self) -> &Host {
        let name = format!("h{}", self.hosts.len());
        self.mount_as(&name, "rw")
    }

    pub fn mount_as(&mut self, name: &str, options: &str) -> &Host {
        let (mut command, dir) = self.mount_command(name, options);
        let output = command.output().expect("mount runs");
        assert!(output.status.success(), "{output:?}\n{}", self.log(name));
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "a success is silent: {output:?}");
        let pid = self.find_pid(name);
        self.watchdog.watch(pid, name, BODY_PATIENCE);
        self.hosts.push(Host { name: name.to_owned(), dir, pid });
        self.hosts.last().expect("just pushed")
    }

    /// A mount by a child process that stays in the foreground, so that its exit status can be seen.
    pub fn mount_in_foreground(&mut self, name: &str) -> (&Host, Child) {
        let (mut command, dir) = self.mount_command(name, "rw");
        let child = command.arg("--foreground").stderr(Stdio::null()).spawn().expect("mount starts");
        let pid = i32::try_from(child.id()).expect("a process id");
        self.watchdog.watch(pid, name, BODY_PATIENCE);
        let host = Host { name: name.to_owned(), dir, pid };
        until("the mount shows", || host.is_mounted());
        self.hosts.push(host);
        (self.hosts.last().expect("just pushed"), child)
    }

    /// The daemon's process id, from the file that it keeps locked.
    fn find_pid(&self, name: &str) -> i32 {
        let end = format!("@{name}.lock");
        for entry in std::fs::read_dir(self.temp.path().join("run")).expect("the runtime directory").flatten()
        {
            if entry.file_name().to_string_lossy().ends_with(&end) {
                let text = std::fs::read_to_string(entry.path()).expect("its text");
                return text.split(' ').next().and_then(|pid| pid.parse().ok()).expect("a process id");
            }
        }
        panic!("no runtime file of {name}");
    }

    pub fn log_path(&self, name: &str) -> PathBuf {
        self.temp.path().join(format!("log-{name}"))
    }

    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    /// The same path as each host sees it.
    pub fn paths(&self, name: &str) -> Vec<PathBuf> {
        self.hosts.iter().map(|h| h.dir.join(name)).collect()
    }

    pub fn dir(&self, host: usize) -> &Path {
        &self.hosts[host].dir
    }

    /// Runs this once for each host, all at once; gives what each returned.
    pub fn each<T: Send>(&self, work: impl Fn(usize, &Path) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let hosts = self.hosts.iter().enumerate();
            let threads: Vec<_> = hosts.map(|(n, h)| scope.spawn(move || work(n, &h.dir))).collect();
            // All of them end before the first panic goes on.
            let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            results.into_iter().map(|r| r.unwrap_or_else(|e| std::panic::resume_unwind(e))).collect()
        })
    }

    /// Where the daemons of these hosts keep their files.
    pub fn run_dir(&self) -> PathBuf {
        self.temp.path().join("run")
    }

    /// A command to the daemons of these hosts.
    pub fn tool(&self, subcommand: &str) -> Command {
        let mut command = lunfs();
        command.env("LUNFS_RUN_DIR", self.temp.path().join("run")).arg(subcommand);
        command
    }

    pub fn umount_command(&self, dir: &Path) -> Output {
        let run = self.temp.path().join("run");
        lunfs().env("LUNFS_RUN_DIR", run).arg("umount").arg(dir).output().expect("umount runs")
    }

    /// One host leaves cleanly.
    pub fn unmount(&mut self, host: usize) {
        let host = self.hosts.remove(host);
        let output = self.umount_command(&host.dir);
        assert!(output.status.success(), "{output:?}");
        assert!(!host.is_mounted() && !host.is_alive(), "{} left", host.name);
    }

    /// The daemon of a host dies without a chance to do anything; its dead mount is taken off.
    pub fn kill(&mut self, host: usize) -> String {
        let host = self.hosts.remove(host);
        host.signal(Signal::SIGKILL);
        until("the daemon dies", || !host.is_alive());
        umount2(&host.dir, MntFlags::MNT_DETACH).expect("a dead mount can be taken off");
        host.name
    }

    /// Takes off the mount of a daemon that ended by itself.
    pub fn take_off(&mut self, host: usize) {
        let host = self.hosts.remove(host);
        umount2(&host.dir, MntFlags::MNT_DETACH).expect("a dead mount can be taken off");
    }

    /// `lunfs status --json`: the slots that were ever claimed, as (host, state).
    pub fn states(&self) -> Vec<(String, String)> {
        let device = match (&self.target, &self.stranger) {
            (None, None) => self.image(),
            _ => self.url().into(),
        };
        let output = lunfs().args(["status", "--json"]).arg(device).output().expect("status runs");
        assert!(output.status.success(), "{output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let text = |v: &serde_json::Value| v.as_str().unwrap_or("?").to_owned();
        let hosts = report["hosts"].as_array().expect("hosts");
        hosts.iter().map(|h| (text(&h["host"]), text(&h["state"]))).collect()
    }

    /// What `lunfs fsck -n` says of the unmounted volume.
    pub fn demand_clean(&self) {
        let device = match self.loops.first() {
            Some(device) => device.path().to_owned(),
            None => self.image(),
        };
        let output = lunfs().args(["fsck", "-n"]).arg(device).output().expect("fsck runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    /// Everybody leaves, and fsck finds nothing.
    pub fn end_clean(mut self) {
        while !self.hosts.is_empty() {
            self.unmount(0);
        }
        self.demand_clean();
        self.end();
    }

    /// Everybody leaves; nothing may stay.
    pub fn end(mut self) {
        while !self.hosts.is_empty() {
            self.unmount(0);
        }
        let states = self.states();
        assert!(!states.is_empty(), "nobody was ever there");
        assert!(states.iter().all(|(_, state)| state == "left"), "{states:?}");
        let paths: Vec<_> = self.loops.drain(..).map(|device| device.path().to_owned()).collect();
        for path in paths {
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            let backing = format!("/sys/block/{name}/loop/backing_file");
            let image = self.image();
            until("the loop device is free", || {
                std::fs::read_to_string(&backing).map_or(true, |text| Path::new(text.trim()) != image)
            });
        }
    }
}

/// A test run that was killed leaves dead mounts, under the name of a loop device that is now another one.
fn forget_dead_mounts(device: &Path) {
    for mount in lunfs::fuse::mountinfo::read().expect("mountinfo") {
        let ours = mount.mountpoint.to_string_lossy().contains("/lunfs-hosts-");
        if ours && mount.is_lunfs() && mount.source == device.as_os_str() {
            let state = std::fs::metadata(&mount.mountpoint).map_err(|e| e.raw_os_error());
            assert_eq!(state.map(drop), Err(Some(libc::ENOTCONN)), "{mount:?} is alive");
            umount2(&mount.mountpoint, MntFlags::MNT_DETACH).expect("a dead mount can be taken off");
            eprintln!("took off a dead mount: {}", mount.mountpoint.display());
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.watchdog.call_off();
        for host in &self.hosts {
            // A body failed: say what the daemon had to say of it.
            let log = self.log(&host.name);
            let bad =
                log.lines().filter(|l| l.contains("WARN") || l.contains("ERROR") || l.contains("panicked"));
            bad.take(20).for_each(|line| eprintln!("{}: {line}", host.name));
            if host.is_alive() {
                let _ = kill(Pid::from_raw(host.pid), Signal::SIGKILL);
            }
            while host.is_mounted() {
                if umount2(&host.dir, MntFlags::MNT_DETACH).is_err() {
                    eprintln!("left mounted: {}", host.dir.display());
                    break;
                }
            }
        }
    }
}

/// From now on a daemon becomes this process's child when the command that started it has ended, so that its exit
/// status can be seen.
pub fn adopt_daemons() {
    nix::sys::prctl::set_child_subreaper(true).expect("any process may");
}

/// The exit status of a child or adopted daemon; `None`: a signal ended it.
pub fn status_of(pid: i32) -> Option<i32> {
    let mut status = None;
    until("the daemon ends", || match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => {
            status = Some(code);
            true
        }
        Ok(WaitStatus::Signaled(..)) => true,
        Ok(_) => false,
        Err(errno) => panic!("waiting for {pid}: {errno}"),
    });
    status
}

/// A meeting point of threads that fails instead of waiting for ever when one of them is gone.
pub struct Gate {
    expected: usize,
    arrived: AtomicUsize,
}

impl Gate {
    pub fn new(expected: usize) -> Gate {
        Gate { expected, arrived: AtomicUsize::new(0) }
    }

    /// Goes on when everybody came here as often as the caller.
    pub fn meet(&self) {
        let turn = self.arrived.fetch_add(1, Ordering::AcqRel) / self.expected + 1;
        let start = Instant::now();
        let mut spins = 0;
        while self.arrived.load(Ordering::Acquire) < turn * self.expected {
            assert!(start.elapsed() < PATIENCE, "another thread did not come");
            spins += 1;
            if spins > 100 {
                std::thread::yield_now();
            }
        }
    }
}

/// When one thread fails the others need not go on until the watchdog comes.
pub struct StopOnPanic<'a>(pub &'a AtomicBool);

impl Drop for StopOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::SeqCst);
        }
    }
}

/// Every host must have had its share of successes: a phase in which one always failed tested nothing.
pub fn demand_success(phase: &str, counts: &[u64]) {
    assert!(counts.iter().all(|n| *n > 0), "{phase}: successes per host {counts:?}");
}

/// The system's number of an error.
pub fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.expect_err("must fail").raw_os_error().expect("an error of the system")
}
