//! One mount from mount(2) to its end.
//!
//! Order at the start: everything that can fail for the volume's reasons happened before; then mount(2), the
//! answer to INIT, the guard, the kernel's abilities, and only when the volume knows whom to ask to forget
//! ([`Session::caches`]) are requests served. Requests that arrive earlier wait in the kernel.
//!
//! Order at the end: the kernel lets go first (unmounted, or detached and drained, or aborted), then waiting
//! requests end, then the guard, then the caller makes the volume leave. The other way round the kernel could ask
//! for something that this host no longer holds.
//!
//! A mount that lost its lease stays in place and answers errors: taken away, programs would go on in the
//! directory beneath it and believe it was the volume.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::capabilities::Capabilities;
use super::fusectl::AbortSwitch;
use super::guard::{Guard, GuardMemory, GuardOptions, Roster};
use super::handlers::Handlers;
use super::mountinfo;
use super::mounting::{self, MountSettings};
use super::nodes::NodeTable;
use super::notify::Notifier;
use super::silence::{Place, Silencer};
use super::transport::{Choice, Transport, Wanted};
use super::workers::{PoolLimits, WorkerPool};
use crate::fs::api::{KernelCaches, Operations};

/// How long a mount that is to end waits for programs that still use it.
const DRAIN: Duration = Duration::from_secs(10);
/// How long it waits for requests that wait for other hosts.
const GIVE_UP: Duration = Duration::from_secs(10);
const READ_AHEAD_KIB: u32 = 1024;

/// Why a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// Unmounted, or the connection was aborted from outside.
    KernelGone,
    /// Asked to end by this signal.
    Signal(i32),
    /// The volume can't be served any more: lease or device lost.
    Lost(String),
    /// A thread of this program failed in a way that nobody foresaw.
    Internal(String),
}

/// Where reasons to end are reported; made before anything else so that none is missed.
pub struct EndEvents {
    sender: Sender<EndReason>,
    receiver: Receiver<EndReason>,
}

impl EndEvents {
    #[allow(clippy::new_without_default)]
    pub fn new() -> EndEvents {
        let (sender, receiver) = channel();
        EndEvents { sender, receiver }
    }

    pub fn sender(&self) -> Sender<EndReason> {
        self.sender.clone()
    }
}

#[derive(Clone, Debug)]
pub struct SessionOptions {
    pub settings: MountSettings,
    pub transport: Choice,
    /// Threads that serve the kernel.
    pub threads: usize,
    /// Behave as on an old kernel.
    pub pretend_old: bool,
    /// Requests the kernel may have in flight in the background (read-ahead, write-back, async direct I/O).
    pub max_background: u16,
    pub guard: GuardOptions,
}

/// A mounted filesystem.
pub struct Session {
    options: SessionOptions,
    device: (u32, u32),
    handlers: Arc<Handlers>,
    kernel: Arc<Silencer>,
    guard: Arc<Guard>,
    notifier: Arc<Notifier>,
    capabilities: Capabilities,
    /// Until it is served.
    transport: Option<Transport>,
    events: EndEvents,
}

impl Session {
    /// Mounts and answers INIT. Serves nothing yet. On an error nothing is left mounted.
    pub fn mount(
        options: SessionOptions,
        operations: Arc<dyn Operations>,
        events: EndEvents,
    ) -> io::Result<Session> {
        let memory = Arc::new(GuardMemory::new()?);
        let nodes = Arc::new(NodeTable::new(operations.root(), Roster::new(memory.clone())));
        let ended = std::sync::Mutex::new(events.sender());
        let on_panic = Box::new(move |what: String| {
            if let Ok(sender) = ended.lock() {
                let _ = sender.send(EndReason::Internal(what));
            }
        });
        let workers = WorkerPool::new(PoolLimits::default());
        let handlers = Arc::new(Handlers::new(operations, nodes.clone(), workers, on_panic));
        let wanted = Wanted {
            settings: &options.settings,
            choice: options.transport,
            threads: options.threads,
            max_background: options.max_background,
            pretend_old: options.pretend_old,
        };
        let (transport, device_fd, capabilities) = Transport::open(&wanted, &handlers)?;
        let mountpoint = &options.settings.mountpoint;
        let device = match mountinfo::at(mountpoint)? {
            Some(entry) if entry.is_lunfs() => entry.device,
            _ => return Err(io::Error::other("the new mount was taken away at once")),
        };
        let abort = AbortSwitch::open(device.1);
        if let Err(error) = &abort {
            log::warn!("no abort switch for the mount ({error}); force is the way then");
        }
        let place = Place { mountpoint: mountpoint.clone(), device };
        let kernel = Arc::new(Silencer::new(device_fd, abort.ok(), place));
        let started = Guard::start(options.guard.clone(), kernel.clone(), memory, events.sender());
        let guard = started.inspect_err(|_| mounting::unmount_by_force(mountpoint, device))?;
        let notifier = Arc::new(Notifier::new(kernel.clone(), nodes, guard.clone()));
        let mut session = Session {
            capabilities,
            options,
            device,
            handlers,
            kernel,
            guard,
            notifier,
            transport: Some(transport),
            events,
        };
        session.settle_capabilities();
        if nix::unistd::geteuid().is_root() {
            mounting::raise_read_ahead(device, READ_AHEAD_KIB);
        }
        Ok(session)
    }

    fn settle_capabilities(&mut self) {
        self.capabilities.inc_epoch = self.capabilities.inc_epoch && self.notifier.probe_inc_epoch();
        self.notifier.set_inc_epoch(self.capabilities.inc_epoch);
        self.handlers.set_capabilities(self.capabilities.clone());
        self.handlers.set_notifier(self.notifier.clone());
        for line in self.capabilities.to_string().lines() {
            log::info!("{line}");
        }
    }

    /// Whom to ask to make the kernel forget.
    pub fn caches(&self) -> Arc<dyn KernelCaches> {
        self.notifier.clone()
    }

    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Major and minor of the mount.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    pub fn end_sender(&self) -> Sender<EndReason> {
        self.events.sender()
    }

    /// From here on requests are served.
    pub fn serve(&mut self) -> io::Result<()> {
        let Some(transport) = self.transport.take() else { return Ok(()) };
        let serving = transport.serve()?;
        let sender = self.events.sender();
        crate::rt::try_spawn("lunfs-session", move || {
            if let Err(error) = serving.join() {
                log::error!("serving the kernel ended: {error}");
            }
            let _ = sender.send(EndReason::KernelGone);
        })?;
        Ok(())
    }

    /// Waits for a reason to end and ends. When it returns, the kernel asks nothing any more and no
    /// operation runs, unless one refused to give up.
    pub fn run(self) -> EndReason {
        let mut reason = self.events.receiver.recv().unwrap_or(EndReason::KernelGone);
        if let (EndReason::KernelGone, Some(cause)) = (&reason, self.guard.acted()) {
            reason = EndReason::Lost(format!("its guard silenced the kernel: {cause}"));
        }
        if reason == EndReason::KernelGone && self.notifier.has_silenced() {
            // We aborted it ourselves; why, comes when the volume has done what it does then.
            reason = match self.events.receiver.recv_timeout(GIVE_UP) {
                Ok(told @ (EndReason::Lost(_) | EndReason::Internal(_))) => told,
                _ => EndReason::Lost("this host stopped using it".into()),
            };
        }
        match &reason {
            EndReason::KernelGone if self.kernel.is_mount_gone() => log::info!("unmounted"),
            EndReason::KernelGone => {
                log::warn!(
                    "somebody ended the connection to the kernel; the mount answers errors from now on"
                );
                self.notifier.silence();
            }
            EndReason::Signal(number) => {
                log::info!("asked to end by signal {number}");
                self.take_off();
            }
            EndReason::Lost(why) => {
                log::error!("the volume is lost: {why}; the mount answers errors from now on");
                self.notifier.silence();
            }
            EndReason::Internal(what) => {
                log::error!("internal error: {what}; the mount answers errors from now on");
                self.notifier.silence();
            }
        }
        if !self.handlers.finish(GIVE_UP) {
            log::error!("requests that wait for other hosts did not give up");
        }
        self.guard.end();
        reason
    }

    /// Unmounts; programs that still use it keep it for [`DRAIN`], then they get errors.
    fn take_off(&self) {
        let mountpoint = &self.options.settings.mountpoint;
        let unmounted = mounting::unmount(mountpoint, self.device, false).unwrap_or_else(|error| {
            log::warn!("{} could not be unmounted: {error}", mountpoint.display());
            false
        });
        if !unmounted {
            log::info!("{} is in use; detaching it", mountpoint.display());
            if let Err(error) = mounting::unmount(mountpoint, self.device, true) {
                log::error!("{} could not be detached: {error}", mountpoint.display());
            }
        }
        match self.events.receiver.recv_timeout(DRAIN) {
            Ok(EndReason::KernelGone) => return,
            Ok(EndReason::Signal(_)) => {
                log::warn!("asked again; programs that still use the mount get errors now");
            }
            Ok(EndReason::Lost(why)) => log::error!("the volume is lost: {why}"),
            Ok(EndReason::Internal(what)) => log::error!("internal error: {what}"),
            Err(_) => log::warn!("programs still use the mount; they get errors now"),
        }
        self.notifier.silence();
    }
}

impl Drop for Session {
    /// A session that was never served must not leave a mount that hangs everybody who looks at it.
    fn drop(&mut self) {
        if self.transport.take().is_some() {
            mounting::unmount_by_force(&self.options.settings.mountpoint, self.device);
            self.guard.end();
        }
    }
}
