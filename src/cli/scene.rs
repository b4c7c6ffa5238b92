//! A temporary volume and hosts that mount it: what the demo, the benchmarks and some tests play on.
//!
//! Hosts are daemons of their own, started exactly as `lunfs mount` starts them. Whatever happens, also
//! Ctrl-C, [`Scene::clear`] leaves no mount, no process and no file: nothing below a mount that could not
//! be taken off is ever deleted.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::runtime_files;
use super::stats_socket::{self, DaemonStats};
use crate::durations::Profile;
use crate::fuse::{mountinfo, mounting};

/// How long a command, a busy mount, or a daemon on its way out may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Who pressed Ctrl-C does not wait so long.
const INTERRUPTED_PATIENCE: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(5);
const IMAGE: &str = "lun.img";

/// What is wanted.
pub struct SceneOptions {
    /// The `lunfs` program.
    pub program: PathBuf,
    /// Part of the temporary folder's name.
    pub name: &'static str,
    pub size_bytes: u64,
    /// The hosts are ordinary mounts that outlive this process: their runtime files stand where
    /// `lunfs umount` looks for them.
    pub keep: bool,
}

/// A host that has the volume mounted.
#[derive(Clone, Debug)]
pub struct Host {
    pub name: String,
    pub root: PathBuf,
    pub pid: u32,
    socket: PathBuf,
    log: PathBuf,
}

/// Something to be taken off again.
struct Mounted {
    at: PathBuf,
    /// The daemon that has to be gone afterwards.
    pid: Option<u32>,
}

#[derive(Default)]
struct Props {
    mounts: Vec<Mounted>,
    cleared: bool,
}

/// The temporary folder with everything in it.
pub struct Scene {
    options: SceneOptions,
    directory: PathBuf,
    props: Mutex<Props>,
    interrupted: AtomicBool,
}

/// `Err`: in one line, why nobody can mount here.
pub fn can_mount() -> Result<(), String> {
    if !Path::new("/dev/fuse").exists() {
        return Err("there is no /dev/fuse: load the kernel module (modprobe fuse), or give the container \
                    the device (--device /dev/fuse)"
            .into());
    }
    if nix::unistd::geteuid().is_root() {
        let device = fs::File::options().read(true).write(true).open("/dev/fuse");
        return device.map(drop).map_err(|e| format!("/dev/fuse can't be opened: {e}"));
    }
    match in_path("fusermount3") {
        true => Ok(()),
        false => Err("mounting needs root, or fusermount3 (package fuse3)".into()),
    }
}

/// Is there such a program?
pub fn in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

impl Host {
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The daemon's counters now.
    pub fn stats(&self) -> Result<DaemonStats, String> {
        stats_socket::read(&self.socket).map_err(|e| format!("counters of host {}: {e}", self.name))
    }

    /// What it and its earlier lives had to say.
    pub fn log(&self) -> Result<String, String> {
        fs::read_to_string(&self.log).map_err(|e| format!("{}: {e}", self.log.display()))
    }

    /// The counters that the daemon left in its log when it ended: with all that leaving cost.
    pub fn last_stats(&self) -> Result<DaemonStats, String> {
        let log = self.log()?;
        let last = log.lines().rev().find_map(|line| line.split_once("counters of this mount: "));
        let (_, json) = last.ok_or_else(|| format!("host {} left no counters", self.name))?;
        serde_json::from_str(json).map_err(|e| format!("last counters of host {}: {e}", self.name))
    }
}

impl Scene {
    /// Makes the folder and a formatted image in it.
    pub fn set(options: SceneOptions) -> Result<Arc<Scene>, String> {
        let mut refused = String::new();
        // Some kernels have no direct I/O on the memory filesystem that /tmp often is.
        for parent in [std::env::temp_dir(), PathBuf::from("/var/tmp")] {
            let directory = match make_directory(&parent, options.name) {
                Ok(directory) => directory,
                Err(e) => {
                    refused = format!("{}: {e}", parent.display());
                    continue;
                }
            };
            match format(&options, &directory, Profile::default()) {
                Ok(()) => {
                    let (props, interrupted) = (Mutex::default(), AtomicBool::new(false));
                    return Ok(Arc::new(Scene { options, directory, props, interrupted }));
                }
                Err(e) => refused = e,
            }
            let _ = fs::remove_dir(&directory);
        }
        Err(refused)
    }

    /// A new volume in place of the old, which nobody has mounted.
    pub fn renew(&self, profile: Profile) -> Result<(), String> {
        let props = self.open_props()?;
        match props.mounts.first() {
            Some(mounted) => Err(format!("{} is still mounted", mounted.at.display())),
            None => format(&self.options, &self.directory, profile),
        }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn image(&self) -> PathBuf {
        self.directory.join(IMAGE)
    }

    fn props(&self) -> MutexGuard<'_, Props> {
        self.props.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_dir(&self) -> PathBuf {
        match self.options.keep {
            true => runtime_files::directory(),
            false => self.directory.join("run"),
        }
    }

    /// Mounts the volume as one more host.
    pub fn mount(&self, name: &str) -> Result<Host, String> {
        let mut props = self.open_props()?;
        let (root, log) = (self.directory.join(name), self.directory.join(format!("{name}.log")));
        make_missing(&root)?;
        let (image, run_dir) = (self.image(), self.run_dir());
        let mut command = Command::new(&self.options.program);
        command.arg("mount").arg("--host").arg(name).arg("-o").arg(format!("log={}", log.display()));
        command.arg(&image).arg(&root).env("LUNFS_RUN_DIR", &run_dir);
        // Before the try: a daemon that came up although the command failed has to go, too.
        props.mounts.push(Mounted { at: root.clone(), pid: None });
        run(command)?;
        let identity = runtime_files::identity(image.as_os_str());
        let socket = run_dir.join(runtime_files::file_name(&identity, name, "stats"));
        let mut host = Host { name: name.to_owned(), root, pid: 0, socket, log };
        host.pid = host.stats()?.pid;
        if let Some(mounted) = props.mounts.last_mut() {
            mounted.pid = Some(host.pid);
        }
        Ok(host)
    }

    /// Runs a command that mounts something else on a directory of this name.
    pub fn mount_other(&self, name: &str, command: impl FnOnce(&Path) -> Command) -> Result<PathBuf, String> {
        let mut props = self.open_props()?;
        let at = self.directory.join(name);
        make_missing(&at)?;
        props.mounts.push(Mounted { at: at.clone(), pid: None });
        run(command(&at))?;
        Ok(at)
    }

    fn open_props(&self) -> Result<MutexGuard<'_, Props>, String> {
        let props = self.props();
        match props.cleared {
            true => Err("interrupted".into()),
            false => Ok(props),
        }
    }

    /// The host dies without a chance to do anything. Its dead mount stays until [`Scene::unmount`]. Returns the moment
    /// before its death.
    pub fn kill(&self, host: &Host) -> Result<Instant, String> {
        let died = Instant::now();
        kill(Pid::from_raw(host.pid as i32), Signal::SIGKILL).map_err(|e| format!("{}: {e}", host.name))?;
        while is_running(host.pid) {
            if died.elapsed() > PATIENCE {
                return Err(format!("the daemon {} of host {} does not die", host.pid, host.name));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(died)
    }

    /// Takes a host's mount off and waits until its daemon left the volume.
    pub fn unmount(&self, at: &Path) -> Result<(), String> {
        let mut props = self.props();
        let Some(index) = props.mounts.iter().position(|m| m.at == at) else { return Ok(()) };
        let mounted = props.mounts.remove(index);
        take_off(&mounted, PATIENCE)
    }

    /// Takes everything off and away. Returns what could not be.
    pub fn clear(&self) -> Vec<String> {
        let mut props = self.props();
        props.cleared = true;
        let interrupted = self.interrupted.load(Ordering::SeqCst);
        let patience = if interrupted { INTERRUPTED_PATIENCE } else { PATIENCE };
        let mut problems = Vec::new();
        while let Some(mounted) = props.mounts.pop() {
            problems.extend(take_off(&mounted, patience).err());
            if !matches!(mountinfo::at(&mounted.at), Ok(None)) {
                problems.push(format!("{} is still mounted", mounted.at.display()));
            }
        }
        problems.extend(remove(&self.directory).err());
        problems
    }

    /// To be asked before anything is said or begun: returns only if nobody interrupted.
    pub fn halt_if_interrupted(&self) {
        while self.interrupted.load(Ordering::SeqCst) {
            // The process ends as soon as the scene is cleared.
            std::thread::sleep(PATIENCE);
        }
    }

    /// On Ctrl-C and the like: clears the scene and ends the process, wherever its threads are.
    pub fn clear_on_signal(self: &Arc<Self>) -> io::Result<()> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let scene = self.clone();
        crate::rt::try_spawn("lunfs-signals", move || {
            if let Some(signal) = signals.forever().next() {
                scene.interrupted.store(true, Ordering::SeqCst);
                eprintln!("\ninterrupted; cleaning up");
                for problem in scene.clear() {
                    eprintln!("{problem}");
                }
                std::process::exit(128 + signal);
            }
        })?;
        Ok(())
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !self.options.keep {
            self.clear();
        }
    }
}

/// A new directory that is ours alone.
fn make_directory(parent: &Path, name: &str) -> io::Result<PathBuf> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let directory = parent.canonicalize()?.join(format!("lunfs-{name}-{}-{number:x}", std::process::id()));
    fs::create_dir(&directory)?;
    Ok(directory)
}

/// A formatted image; an old one is deleted first. Nothing of it is left when this fails.
fn format(options: &SceneOptions, directory: &Path, profile: Profile) -> Result<(), String> {
    let image = directory.join(IMAGE);
    let _ = fs::remove_file(&image);
    let mut command = Command::new(&options.program);
    command.args(["mkfs", "--quiet", "--label", options.name, "--profile", profile.name(), "--size"]);
    command.arg(options.size_bytes.to_string()).arg(&image);
    run(command).map(drop).inspect_err(|_| drop(fs::remove_file(&image)))
}

fn make_missing(directory: &Path) -> Result<(), String> {
    match fs::create_dir(directory) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(format!("{}: {e}", directory.display())),
        _ => Ok(()),
    }
}

/// Removes the folder with everything in it, unless anything is still mounted there.
fn remove(directory: &Path) -> Result<(), String> {
    let fail = |e: io::Error| format!("{}: {e}", directory.display());
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mounts = mountinfo::read().map_err(fail)?;
        if let Some(left) = mounts.iter().find(|m| m.mountpoint.starts_with(directory)) {
            return Err(format!("{} stays: {} is mounted", directory.display(), left.mountpoint.display()));
        }
        match fs::remove_dir_all(directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            // A thread that was interrupted in its work may still add files.
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty && Instant::now() < deadline => {}
            done => return done.map_err(fail),
        }
    }
}

/// Runs a command out of reach of the terminal's Ctrl-C; an error is its own last words.
pub fn run(mut command: Command) -> Result<Output, String> {
    let name =
        Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .process_group(0)
        .output()
        .map_err(|e| format!("cannot run {name}: {e}"))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(if said.is_empty() { format!("{name}: {}", output.status) } else { said })
}

/// Unmounts and waits for the daemon's end. What is busy for longer than `patience` is detached, and its
/// daemon told to end all the same: our own interrupted threads may have files open for ever.
fn take_off(mounted: &Mounted, patience: Duration) -> Result<(), String> {
    let at = mounted.at.display();
    let deadline = Instant::now() + patience;
    let mut detached = false;
    while let Some(entry) = mountinfo::at(&mounted.at).map_err(|e| format!("{at}: {e}"))? {
        detached = Instant::now() > deadline;
        match mounting::unmount(&mounted.at, entry.device, detached) {
            Err(e) if detached => return Err(format!("{at} can't be unmounted: {e}")),
            _ => std::thread::sleep(POLL),
        }
    }
    let Some(pid) = mounted.pid else { return Ok(()) };
    let process = Pid::from_raw(pid as i32);
    if detached && is_running(pid) {
        let _ = kill(process, Signal::SIGTERM);
    }
    let deadline = Instant::now() + PATIENCE;
    while is_running(pid) {
        if Instant::now() > deadline {
            let _ = kill(process, Signal::SIGKILL);
            return Err(format!("the daemon {pid} of {at} did not end and was killed"));
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Is it there, and not only waiting for its parent to notice its end?
pub fn is_running(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return false };
    !matches!(stat.rsplit(") ").next().and_then(|rest| rest.chars().next()), Some('Z' | 'X') | None)
}
