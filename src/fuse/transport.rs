//! Which transport carries a mount.
//!
//! | choice | who | what it adds |
//! | --- | --- | --- |
//! | `native` | root | waits can be ended by killing who waits; SYNCFS; writes without a copy |
//! | `fuser` | everybody | works through fusermount3 |
//! | `auto` | | `native` for root, else `fuser` |
//!
//! Both answer from the same handlers and pass the same tests.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::str::FromStr;
use std::sync::Arc;

use super::capabilities::Capabilities;
use super::fuser_transport::{self, FuserTransport};
use super::handlers::Handlers;
use super::mountinfo;
use super::mounting::{self, MountSettings};
use super::native::{self, Wishes};

/// The kernel caps a request at this anyway (256 pages), unless its administrator raised the limit.
pub(crate) const MAX_WRITE_BYTES: u32 = 1 << 20;

/// What the administrator wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    #[default]
    Auto,
    Native,
    Fuser,
}

impl FromStr for Choice {
    type Err = String;
    fn from_str(text: &str) -> Result<Choice, String> {
        match text {
            "auto" => Ok(Choice::Auto),
            "native" => Ok(Choice::Native),
            "fuser" => Ok(Choice::Fuser),
            _ => Err("auto, native or fuser".into()),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Choice::Auto => "auto",
            Choice::Native => "native",
            Choice::Fuser => "fuser",
        })
    }
}

/// How to mount.
pub(crate) struct Wanted<'a> {
    pub settings: &'a MountSettings,
    pub choice: Choice,
    /// Threads that serve the kernel.
    pub threads: usize,
    pub max_background: u16,
    pub pretend_old: bool,
}

/// Mounted, INIT answered, nothing served yet.
pub(crate) enum Transport {
    Native { connection: native::Connection, threads: usize },
    Fuser(fuser::Session<FuserTransport>),
}

/// A mount that is served.
pub(crate) enum Serving {
    Native(native::Serving),
    Fuser(fuser::BackgroundSession),
}

impl Transport {
    /// Mounts; also returns a duplicate of the descriptor for our own messages. On an error nothing is left mounted.
    pub(crate) fn open(
        wanted: &Wanted<'_>,
        handlers: &Arc<Handlers>,
    ) -> io::Result<(Transport, OwnedFd, Capabilities)> {
        let root = nix::unistd::geteuid().is_root();
        match wanted.choice {
            Choice::Native if !root => {
                return Err(io::Error::new(
                    io::ErrorKind::PermissionDenied,
                    "transport=native mounts by itself and needs root; transport=fuser doesn't",
                ));
            }
            Choice::Auto if root => {}
            Choice::Native => {}
            Choice::Auto | Choice::Fuser => {
                let (session, duplicate, capabilities) = fuser_transport::open(wanted, handlers)?;
                log::info!("transport: fuser");
                return Ok((Transport::Fuser(session), duplicate, capabilities));
            }
        }
        let settings = wanted.settings;
        let device = mounting::mount_as_root(settings)?;
        let wishes = Wishes {
            max_write_bytes: MAX_WRITE_BYTES,
            max_background: wanted.max_background,
            pretend_old: wanted.pretend_old,
        };
        let opened = device.try_clone().and_then(|duplicate| {
            let (connection, capabilities) = native::Connection::open(device, handlers.clone(), &wishes)?;
            Ok((Transport::Native { connection, threads: wanted.threads }, duplicate, capabilities))
        });
        log::info!("transport: native");
        opened.inspect_err(|_| take_off(settings))
    }

    /// From here on requests are served.
    pub(crate) fn serve(self) -> io::Result<Serving> {
        Ok(match self {
            Transport::Native { connection, threads } => Serving::Native(connection.serve(threads)?),
            Transport::Fuser(session) => Serving::Fuser(session.spawn()?),
        })
    }
}

impl Serving {
    /// Returns when the connection has ended.
    pub(crate) fn join(self) -> io::Result<()> {
        match self {
            Serving::Native(serving) => serving.join(),
            Serving::Fuser(serving) => serving.join(),
        }
    }
}

/// A mount that can't be served must not stay.
pub(crate) fn take_off(settings: &MountSettings) {
    if let Ok(Some(top)) = mountinfo::at(&settings.mountpoint)
        && top.is_lunfs()
    {
        mounting::unmount_by_force(&settings.mountpoint, top.device);
    }
}
