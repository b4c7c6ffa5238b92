//! Mounts with the library: by ourselves as root, through fusermount3 as anybody else.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, OnceLock};

use super::FuserTransport;
use crate::fuse::capabilities::Capabilities;
use crate::fuse::handlers::Handlers;
use crate::fuse::mounting::{self, MountSettings};
use crate::fuse::transport::{Wanted, take_off};

/// The mounted and initialised library session, and our own duplicate of its descriptor.
pub(crate) fn open(
    wanted: &Wanted<'_>,
    handlers: &Arc<Handlers>,
) -> io::Result<(fuser::Session<FuserTransport>, OwnedFd, Capabilities)> {
    let found = Arc::new(OnceLock::new());
    let transport = FuserTransport {
        handlers: handlers.clone(),
        found: found.clone(),
        pretend_old: wanted.pretend_old,
        max_background: wanted.max_background,
    };
    let mut config = fuser::Config::default();
    config.acl = fuser::SessionACL::All;
    config.n_threads = Some(wanted.threads.max(1));
    config.clone_fd = false;
    let settings = wanted.settings;
    let (session, duplicate) = if nix::unistd::geteuid().is_root() {
        let device = mounting::mount_as_root(settings)?;
        let opened = device.try_clone().and_then(|duplicate| {
            Ok((fuser::Session::from_fd(transport, device, config.acl, config.clone())?, duplicate))
        });
        opened.inspect_err(|_| take_off(settings))?
    } else {
        // fusermount3 decides what a user may do.
        config.acl = fuser::SessionACL::Owner;
        config.mount_options = user_options(settings);
        let session = fuser::Session::new(transport, &settings.mountpoint, &config)?;
        let duplicate = session.as_fd().try_clone_to_owned()?;
        (session, duplicate)
    };
    let capabilities = found.get().cloned().ok_or_else(|| io::Error::other("no INIT was seen"))?;
    Ok((session, duplicate, capabilities))
}

fn user_options(settings: &MountSettings) -> Vec<fuser::MountOption> {
    use fuser::MountOption::*;
    let mut options = vec![
        FSName(settings.source.to_string_lossy().into_owned()),
        Subtype("lunfs".into()),
        DefaultPermissions,
    ];
    let flags = &settings.flags;
    let flags = [(flags.read_only, RO), (flags.no_exec, NoExec), (flags.no_atime, NoAtime)];
    options.extend(flags.into_iter().filter(|(on, _)| *on).map(|(_, option)| option));
    options
}
