//! The guard: a small process beside each daemon that silences the kernel when the daemon can't.
//!
//! A daemon that was killed, stopped, or hangs silences nobody, and the kernel goes on showing what it cached to
//! open files, mappings and names, while other hosts take over and change it. The guard has locked memory, no device,
//! a duplicate of the /dev/fuse descriptor, the abort switch, and [`memory`] shared with the daemon: the lease deadline
//! and the nodes that the kernel may know. It acts when the deadline passes, when the daemon is gone, or when it is
//! told.
//!
//! What must hold, and what breaks without it:
//!
//! * **It watches before the kernel is answered anything that it may cache**, or an early death is seen by nobody.
//!   So a mount without a guard is refused.
//! * **A node stands in the memory before the kernel hears of it** (`nodes`).
//! * **The deadline in the memory is never later than the lease**: it is the lease's own.
//! * **It needs nothing that a dying machine may not have**: no file is opened, no memory taken, no line logged
//!   until the kernel is silent.
//! * **Its end is waited for**: the duplicated descriptor keeps the connection open. A clean end of the mount ends it
//!   first. It keeps [`GuardOptions::keep`] open, by which others see that the mount still has somebody.
//! * **It is started by executing the program anew**, never by a fork of a process with threads.
//!
//! A guard that dies is replaced. Where none can be started the daemon goes on, says so once, and tries again: it still
//! silences the kernel itself when its lease ends, so nothing is wrong until it is killed or stopped as well; to end the
//! mount would be a certain harm against an unlikely one, and waiting never kills.
//!
//! Not for: a machine that stands still as a whole (suspended, or a paused virtual machine): then the guard stands
//! still, too, and acts when it goes on.

mod memory;
mod process;
mod roster;
mod sys;

pub use memory::Cause;
pub(crate) use memory::GuardMemory;
pub use process::run;
pub use roster::{Line, Roster};

use std::ffi::OsString;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use self::memory::Order;
use super::session::EndReason;
use super::silence::Silencer;
use crate::rt::Instant;

/// How long a new guard may take to say that it watches.
const START_PATIENCE: Duration = Duration::from_secs(20);
/// How long its end is waited for.
const END_PATIENCE: Duration = Duration::from_secs(10);
/// Between two tries to start one; also the life that is too short to replace it at once.
const PAUSE: Duration = Duration::from_secs(2);

/// What a descriptor sent to the guard is.
const ROLE_DEVICE: u8 = b'D';
const ROLE_MEMORY: u8 = b'M';
const ROLE_ABORT: u8 = b'A';
const ROLE_KEEP: u8 = b'K';
const MOST_DESCRIPTORS: usize = 4;
/// The guard's word that it watches.
const WATCHING: u8 = b'W';

/// How to start a guard.
#[derive(Clone, Debug)]
pub struct GuardOptions {
    pub program: PathBuf,
    /// Before `--device MAJOR:MINOR DIRECTORY`.
    pub arguments: Vec<OsString>,
    /// Kept open as long as a guard lives.
    pub keep: Option<Arc<OwnedFd>>,
}

/// The daemon's side.
pub(crate) struct Guard {
    options: GuardOptions,
    kernel: Arc<Silencer>,
    memory: Arc<GuardMemory>,
    events: Mutex<Sender<EndReason>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// To the guard that lives.
    line: Option<UnixStream>,
    ending: bool,
    ended: bool,
}

impl Guard {
    /// Starts a guard; it watches when this returns. What it does on its own is reported to `events`.
    pub(crate) fn start(
        options: GuardOptions,
        kernel: Arc<Silencer>,
        memory: Arc<GuardMemory>,
        events: Sender<EndReason>,
    ) -> io::Result<Arc<Guard>> {
        let guard = Arc::new(Guard {
            options,
            kernel,
            memory,
            events: Mutex::new(events),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let fail = |e: io::Error| io::Error::new(e.kind(), format!("cannot start the mount's guard: {e}"));
        let child = guard.launch().map_err(fail)?;
        let watched = guard.clone();
        crate::rt::try_spawn("lunfs-guard", move || watched.watch(child)).map_err(fail)?;
        Ok(guard)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new process that watches.
    fn launch(&self) -> io::Result<Child> {
        let (ours, theirs) = UnixStream::pair()?;
        let place = self.kernel.place();
        let (major, minor) = place.device;
        let mut child = Command::new(&self.options.program)
            .arg0("lunfs")
            .args(&self.options.arguments)
            .arg("--device")
            .arg(format!("{major}:{minor}"))
            .arg(&place.mountpoint)
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        match self.brief(&ours) {
            Ok(()) => {
                self.state().line = Some(ours);
                Ok(child)
            }
            Err(error) => {
                let _ = child.kill();
                let how = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
                Err(io::Error::new(error.kind(), format!("{error} ({how})")))
            }
        }
    }

    /// Gives a new guard what it needs and waits for its word.
    fn brief(&self, line: &UnixStream) -> io::Result<()> {
        let keep = self.options.keep.as_ref().map(|fd| fd.as_fd());
        let given: [(u8, Option<BorrowedFd<'_>>); MOST_DESCRIPTORS] = [
            (ROLE_DEVICE, Some(self.kernel.device())),
            (ROLE_MEMORY, Some(self.memory.descriptor())),
            (ROLE_ABORT, self.kernel.abort_switch()),
            (ROLE_KEEP, keep),
        ];
        let given = given.into_iter().filter_map(|(role, fd)| Some((role, fd?.as_raw_fd())));
        let (roles, descriptors): (Vec<u8>, Vec<i32>) = given.unzip();
        let sent = sendmsg::<()>(
            line.as_raw_fd(),
            &[IoSlice::new(&roles)],
            &[ControlMessage::ScmRights(&descriptors)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        if sent != roles.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        line.set_read_timeout(Some(START_PATIENCE))?;
        let mut word = [0];
        let mut reader = line;
        reader.read_exact(&mut word)?;
        if word == [WATCHING] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
    }

    /// Waits for the end of each guard, and starts the next.
    fn watch(&self, mut child: Child) {
        let mut begun = Instant::now();
        let mut without = false;
        loop {
            let how = child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
            self.state().line = None;
            if self.state().ending {
                break;
            }
            if let Some(cause) = self.memory.acted() {
                let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = events.send(EndReason::Lost(format!("its guard silenced the kernel: {cause}")));
                break;
            }
            log::error!("the guard of the mount ended ({how}); starting another one");
            if begun.elapsed() < PAUSE && !self.pause() {
                break;
            }
            let next = loop {
                match self.launch() {
                    Ok(next) => break Some(next),
                    Err(error) if !without => {
                        log::error!(
                            "no guard can be started ({error}): until one is, a daemon that is killed or stopped \
                             leaves its kernel showing what it cached"
                        );
                        without = true;
                    }
                    Err(_) => {}
                }
                if !self.pause() {
                    break None;
                }
            };
            let Some(next) = next else { break };
            if without {
                log::warn!("the mount has a guard again");
            }
            (child, begun, without) = (next, Instant::now(), false);
            // It may have been told to end while nobody listened; it looks at its order first.
        }
        self.state().ended = true;
        self.changed.notify_all();
    }

    /// Sleeps for a while; false: the mount ends.
    fn pause(&self) -> bool {
        let state = self.state();
        let waited = self.changed.wait_timeout_while(state, PAUSE, |state| !state.ending);
        !waited.unwrap_or_else(PoisonError::into_inner).0.ending
    }

    fn poke(&self) {
        if let Some(mut line) = self.state().line.as_ref() {
            // Nobody there: nobody to tell.
            let _ = line.write_all(b"!");
        }
    }

    /// The lease runs until then.
    pub(crate) fn lease_until(&self, until: Instant) {
        if self.memory.extend(until) {
            // It slept without a time to wake.
            self.poke();
        }
    }

    pub(crate) fn tell_to_silence(&self) {
        self.memory.give_order(Order::Silence);
        self.poke();
    }

    /// Why a guard silenced the kernel, if one did.
    pub(crate) fn acted(&self) -> Option<Cause> {
        self.memory.acted()
    }

    /// The kernel can show nothing any more: the guard ends, and is waited for.
    pub(crate) fn end(&self) {
        self.memory.give_order(Order::End);
        self.state().ending = true;
        self.changed.notify_all();
        self.poke();
        let waited = self.changed.wait_timeout_while(self.state(), END_PATIENCE, |state| !state.ended);
        if !waited.unwrap_or_else(PoisonError::into_inner).0.ended {
            log::error!("the guard of the mount did not end; it will when this process has");
        }
    }
}
