//! `lunfs mount`: makes a volume usable under a directory, or says in one line why not.
//!
//! What can fail fails before the command returns: options, directory, claim, volume, mount(2), INIT. On
//! success it prints nothing. The daemon ends when the mount is gone, when it is told to (SIGTERM, SIGINT),
//! or when it may not serve any more; how it ended is its exit status (`ending`).

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::daemonize::{self, ReadyPipe};
use super::mount_options::MountOptions;
use super::runtime_files::{self, Claim};
use super::slot_wait::SlotWait;
use super::stats_socket::{self, Source};
use super::{EXIT_SYSTEM, Failure, control_service, ending, guard, logging};
use crate::control;
use crate::device::check;
use crate::device::open::{OpenOptions, shown};
use crate::fs::api::{KernelCaches, Operations};
use crate::fsck::Observer;
use crate::fuse::mounting::MountSettings;
use crate::fuse::session::EndEvents;
use crate::fuse::{EndReason, Session, SessionOptions, mountinfo};
use crate::lease::EndCause;
use crate::scrub::{self, ScrubError};
use crate::testing::memfs_control::MemVolume;
use crate::volume::{self, Volume, VolumeStats};

/// Memory for clean metadata unless `cache_mib` says otherwise.
const DEFAULT_CACHE_MIB: u32 = 64;

/// How long what clients asked for may take to end when the mount ends.
const CLIENTS_PATIENCE: Duration = Duration::from_secs(5);

#[derive(clap::Args)]
pub struct Args {
    /// Stay in the foreground and log to stderr.
    #[arg(long)]
    foreground: bool,
    /// Name of this host towards the others; default: the machine's name.
    #[arg(long, value_name = "NAME")]
    host: Option<String>,
    /// Mount options, separated by commas; may be given several times.
    #[arg(short = 'o', value_name = "OPTIONS")]
    options: Vec<String>,
    /// Tolerate unknown mount options.
    #[arg(short = 's')]
    sloppy: bool,
    /// Accepted for mount(8): there is no mtab to write.
    #[arg(short = 'n')]
    no_mtab: bool,
    /// Accepted for mount(8).
    #[arg(short = 'v', action = clap::ArgAction::Count)]
    verbose: u8,
    /// Check the arguments, mount nothing.
    #[arg(short = 'f')]
    fake: bool,
    /// Mount read-write (default).
    #[arg(short = 'w')]
    read_write: bool,
    /// Mount read-only.
    #[arg(short = 'r', conflicts_with = "read_write")]
    read_only: bool,
    /// Accepted for mount(8).
    #[arg(short = 't', hide = true)]
    fstype: Option<String>,
    /// Where to say that the filesystem serves (given by the command to its daemon).
    #[arg(long, hide = true)]
    ready_fd: Option<i32>,
    /// Mount a filesystem in memory; DEVICE is only a name.
    #[arg(long, hide = true)]
    memfs: bool,
    /// Listen here for commands to the filesystem in memory.
    #[arg(long, hide = true, value_name = "SOCKET")]
    memfs_control: Option<PathBuf>,
    /// Block device, image file or address of the volume.
    device: OsString,
    /// Directory to mount on.
    directory: PathBuf,
}

/// A volume as this command needs it. The command knows nothing else of it.
pub trait MountedVolume: Send + Sync {
    fn operations(&self) -> Arc<dyn Operations>;
    /// Whom to ask to make the kernel forget; called before the kernel asks for anything.
    fn attach_kernel(&self, caches: Arc<dyn KernelCaches>);
    /// Called once when the volume may not be served any more, with the reason.
    fn on_end(&self, end: Box<dyn FnOnce(String) + Send>);
    /// Makes everything durable and frees the host's slot.
    fn leave(&self) -> Result<(), String>;
    /// Why it may not be used any more, in kind and in words, if it may not.
    fn lost_by(&self) -> Option<(EndCause, String)> {
        None
    }
    /// What was done so far; `None`: nobody counts.
    fn stats(&self) -> Option<VolumeStats> {
        None
    }
    /// Checks the volume while it is used; `None`: there is nothing to check.
    fn scrub(&self, _: &scrub::Options, _: &mut dyn Observer) -> Option<Result<scrub::Report, ScrubError>> {
        None
    }
}

/// What opening a volume needs to know.
pub struct VolumeRequest<'a> {
    pub device: &'a OsString,
    pub host_name: &'a str,
    pub options: &'a MountOptions,
}

impl MountedVolume for MemVolume {
    fn operations(&self) -> Arc<dyn Operations> {
        self.fs.clone()
    }
    fn attach_kernel(&self, caches: Arc<dyn KernelCaches>) {
        MemVolume::attach_kernel(self, caches);
    }
    fn on_end(&self, end: Box<dyn FnOnce(String) + Send>) {
        MemVolume::on_end(self, end);
    }
    fn leave(&self) -> Result<(), String> {
        Ok(())
    }
}

impl MountedVolume for Volume {
    fn operations(&self) -> Arc<dyn Operations> {
        Volume::operations(self)
    }
    fn attach_kernel(&self, caches: Arc<dyn KernelCaches>) {
        Volume::attach_kernel(self, caches);
    }
    fn on_end(&self, end: Box<dyn FnOnce(String) + Send>) {
        Volume::on_end(self, end);
    }
    fn leave(&self) -> Result<(), String> {
        Volume::leave(self).map_err(|e| e.to_string())
    }
    fn lost_by(&self) -> Option<(EndCause, String)> {
        Volume::lost_by(self)
    }
    fn stats(&self) -> Option<VolumeStats> {
        Some(Volume::stats(self))
    }
    fn scrub(
        &self,
        options: &scrub::Options,
        out: &mut dyn Observer,
    ) -> Option<Result<scrub::Report, ScrubError>> {
        Some(scrub::scrub(self, options, out))
    }
}

/// The one place that joins this command to the volume layer.
fn open_volume(
    args: &Args,
    request: &VolumeRequest<'_>,
    wait: &mut SlotWait<'_>,
) -> Result<Arc<dyn MountedVolume>, Failure> {
    if args.memfs {
        let volume = MemVolume::new();
        if let Some(socket) = &args.memfs_control {
            volume.listen(socket).map_err(|e| Failure::system(format!("{}: {e}", socket.display())))?;
        }
        return Ok(volume);
    }
    let device = shown_name(request.device);
    let spec = request.device.to_str().ok_or_else(|| Failure::mount(format!("{device}: not a name")))?;
    let host = volume::local_identity(Some(request.host_name));
    // Also for a read-only mount: its heartbeat and its shared locks are written.
    let how = OpenOptions {
        logical_block_bytes: request.options.logical_block,
        host: Some(host.uuid),
        ..Default::default()
    };
    let opened = volume::open_as_host(spec, how, request.options.fencing)
        .map_err(|e| Failure::mount(e.to_string()))?;
    // The superblock is no lock: nobody swaps it, and this leaves it as it is.
    check::harmless(&*opened, 0).map_err(|e| Failure::mount(format!("{device}: {e}")))?;
    let choices = volume::MountOptions {
        host,
        read_only: request.options.flags.read_only,
        cache_mib: request.options.cache_mib.unwrap_or(DEFAULT_CACHE_MIB),
        fencing: request.options.fencing,
    };
    let volume = Volume::mount_patiently(opened, choices, &mut |waiting| wait.go_on(waiting))
        .map_err(|e| Failure::mount(format!("{device}: {e}")))?;
    Ok(volume)
}

/// `raw` are the arguments as given, for the daemon.
pub fn run(args: Args, raw: &[OsString]) -> ExitCode {
    let options = match parse_options(&args) {
        Ok(options) => options,
        Err(failure) => {
            daemonize::report(&failure);
            return ExitCode::from(failure.status);
        }
    };
    if args.foreground {
        let ready = match args.ready_fd {
            Some(_) => ReadyPipe::from_stdout(),
            None => Ok(ReadyPipe::foreground()),
        };
        return match ready {
            Ok(ready) => serve(&args, &options, ready),
            Err(_) => ExitCode::from(EXIT_SYSTEM),
        };
    }
    let done = if options.remount {
        Err(remount(&args, &options))
    } else if args.fake {
        Ok(())
    } else {
        daemonize::launch(raw)
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            daemonize::report(&failure);
            ExitCode::from(failure.status)
        }
    }
}

fn parse_options(args: &Args) -> Result<MountOptions, Failure> {
    let mut options = MountOptions::parse(&args.options, args.sloppy)?;
    options.flags.read_only |= args.read_only;
    if let Some(host) = &args.host {
        let as_option = MountOptions::parse(&[format!("host={host}")], false)?;
        options.host = as_option.host;
    }
    Ok(options)
}

/// The kernel changes flags of a mount by itself; the daemon isn't told and needn't be. Returns on failure.
fn remount(args: &Args, options: &MountOptions) -> Failure {
    let error = std::process::Command::new("mount")
        .arg("-i")
        .arg("-o")
        .arg(options.remount_flags())
        .arg(&args.device)
        .arg(&args.directory)
        .exec();
    Failure::system(format!("cannot run mount: {error}"))
}

fn serve(args: &Args, options: &MountOptions, mut ready: ReadyPipe) -> ExitCode {
    let log_failure = match (&options.log, ready.is_daemon()) {
        (Some(path), _) => logging::to_file(path).err().map(|e| format!("{}: {e}", path.display())),
        (None, true) => {
            logging::to_syslog();
            None
        }
        (None, false) => {
            logging::to_stderr();
            None
        }
    };
    if let Some(message) = log_failure {
        return ready.failed(&Failure::system(message));
    }
    let mounted = match Mounted::make(args, options, &ready) {
        Ok(mounted) => mounted,
        Err(failure) => {
            log::error!("{}", failure.one_line());
            return ready.failed(&failure);
        }
    };
    if let Err(error) = ready.ready() {
        log::warn!("nobody waits for the mount any more ({error}); taking it off");
        let _ = mounted.session.end_sender().send(EndReason::Signal(SIGHUP));
    }
    // The directory we were started in shall not stay busy.
    let _ = std::env::set_current_dir("/");
    mounted.run()
}

/// Everything a mount consists of in this process.
struct Mounted {
    session: Session,
    volume: Arc<dyn MountedVolume>,
    counters: Arc<Source>,
    /// Absent where there is nothing to tell, or no place for the socket.
    _counter_server: Option<stats_socket::Server>,
    /// Absent where there is no place for the socket.
    control: Option<control::Server>,
    /// Given back by the end of the process, after everything else.
    _claim: Claim,
}

impl Mounted {
    fn make(args: &Args, options: &MountOptions, ready: &ReadyPipe) -> Result<Mounted, Failure> {
        raise_descriptor_limit();
        let begun = Instant::now();
        let events = EndEvents::new();
        let signalled = listen_to_signals(events.sender())?;
        let mountpoint = check_mountpoint(args)?;
        let host = host_name(options)?;
        let identity = if args.memfs {
            format!("memfs-{}", runtime_files::identity(&args.device))
        } else {
            runtime_files::identity(&args.device)
        };
        let mut claim = Claim::take(&identity, &host)?;
        let keep = claim.duplicate().map_err(|e| Failure::system(e.to_string()))?;
        let request = VolumeRequest { device: &args.device, host_name: &host, options };
        let mut wait = SlotWait { ready, signalled, said: None };
        let volume = open_volume(args, &request, &mut wait)?;
        let ended = events.sender();
        volume.on_end(Box::new(move |reason| {
            let _ = ended.send(EndReason::Lost(reason));
        }));
        let session_options = SessionOptions {
            settings: settings(args, options, mountpoint.clone()),
            transport: options.transport,
            threads: options.threads,
            pretend_old: options.kernel_old,
            max_background: options.max_background,
            guard: guard::options(options.log.as_ref(), ready.is_daemon(), keep),
        };
        let started = Session::mount(session_options, volume.operations(), events).and_then(|mut session| {
            volume.attach_kernel(session.caches());
            claim.record(session.device(), &mountpoint)?;
            session.serve()?;
            Ok(session)
        });
        match started {
            Ok(session) => {
                let counted = volume.clone();
                let counters = Arc::new(Source {
                    device: shown_name(&args.device),
                    mountpoint: mountpoint.display().to_string(),
                    host,
                    started: begun,
                    volume: Arc::new(move || counted.stats()),
                });
                let server = stats_socket::serve(&identity, &counters);
                let control = control_service::serve(&identity, &counters, volume.clone());
                Ok(Mounted { session, volume, counters, _counter_server: server, control, _claim: claim })
            }
            Err(error) => {
                if let Err(error) = volume.leave() {
                    log::error!("the volume was not left cleanly: {error}");
                }
                Err(Failure::mount(format!("cannot mount on {}: {error}", mountpoint.display())))
            }
        }
    }

    fn run(self) -> ExitCode {
        let reason = self.session.run();
        // Who waits for an answer gets a true one before the volume goes.
        if let Some(control) = &self.control {
            control.stop(CLIENTS_PATIENCE);
        }
        let left = self.volume.leave();
        if let Err(error) = &left {
            log::error!("the volume was not left cleanly: {error}");
        }
        // What a mount cost in all can't be asked any more when it is gone.
        if let Some(text) = self.counters.snapshot().and_then(|stats| serde_json::to_string(&stats).ok()) {
            log::info!("counters of this mount: {text}");
        }
        let lost = self.volume.lost_by();
        let ending = ending::of(&reason, lost.as_ref().map(|(cause, _)| *cause), left.is_ok());
        ending.log(&self.counters.mountpoint, lost.map(|(_, why)| why).as_deref());
        ExitCode::from(ending.status)
    }
}

fn settings(args: &Args, options: &MountOptions, mountpoint: PathBuf) -> MountSettings {
    MountSettings { source: source(args), mountpoint, flags: options.flags }
}

/// What the kernel shows as the device: what was given, but for a password.
fn source(args: &Args) -> OsString {
    args.device.to_str().map_or_else(|| args.device.clone(), |spec| shown(spec).into())
}

/// The same for messages.
fn shown_name(device: &OsString) -> String {
    shown(&device.to_string_lossy())
}

/// The directory without links and dots. A mount of the same source on it is refused, unasked: its daemon
/// may be the one that hangs.
fn check_mountpoint(args: &Args) -> Result<PathBuf, Failure> {
    let directory = &args.directory;
    let shown = directory.display();
    let fail = |e: std::io::Error| Failure::mount(format!("{shown}: {}", plain(&e)));
    let resolved = mountinfo::resolve_without_touching(directory).map_err(fail)?;
    if let Some(top) = mountinfo::at(&resolved).map_err(fail)?
        && top.is_lunfs()
        && top.source == source(args)
    {
        return Err(Failure::mount(format!("{shown}: {} is already mounted here", shown_name(&args.device))));
    }
    if !std::fs::metadata(&resolved).map_err(fail)?.is_dir() {
        return Err(Failure::mount(format!("{shown}: not a directory")));
    }
    Ok(resolved)
}

/// The error as strerror(3) says it.
fn plain(error: &std::io::Error) -> String {
    error
        .raw_os_error()
        .map_or_else(|| error.to_string(), |errno| nix::errno::Errno::from_raw(errno).desc().to_owned())
}

fn host_name(options: &MountOptions) -> Result<String, Failure> {
    if let Some(host) = &options.host {
        return Ok(host.clone());
    }
    let name = nix::unistd::gethostname().map_err(|e| Failure::system(format!("no host name: {e}")))?;
    Ok(name.to_string_lossy().into_owned())
}

/// Threads, connections and images need descriptors; up to what the administrator allows.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// Signals become events; true from the first one on.
fn listen_to_signals(end: Sender<EndReason>) -> Result<Arc<AtomicBool>, Failure> {
    let fail = |e: std::io::Error| Failure::system(format!("cannot listen to signals: {e}"));
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(fail)?;
    let seen = Arc::new(AtomicBool::new(false));
    let signalled = seen.clone();
    crate::rt::try_spawn("lunfs-signals", move || {
        for signal in signals.forever() {
            seen.store(true, Ordering::Relaxed);
            if end.send(EndReason::Signal(signal)).is_err() {
                return;
            }
        }
    })
    .map_err(fail)?;
    Ok(signalled)
}
