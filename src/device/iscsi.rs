//! The `iscsi` backend: a LUN of an iSCSI target, from user space through libiscsi, for hosts without a kernel
//! initiator. `iscsi://[user[%password]@]portal[:port]/target/lun`.
//!
//! Invariants
//!
//! 1. **Nothing is sent again below this room.** libiscsi would reconnect and repeat by itself; that is switched off.
//!    A connection that broke is never used again ([`connection`]), a new one is made and looked at ([`session`]).
//! 2. **Locks and heartbeats have a session of their own**, so that bulk data never stands before a beat.
//! 3. **A session keeps its name.** The initiator's name and the session's identifier (ISID) follow from the host,
//!    so a target knows a session that comes back: it ends the old one, with all its commands, before it
//!    answers the new login, and it keeps the registration of that path where it can.
//! 4. **Time is ours.** Each command has a moment after which it isn't sent any more and one after which nobody
//!    waits; both are kept by the thread that owns the connection, also after this process was stopped and continued
//!    ([`timing`]).
//! 5. **A new session counts as a reset**: the device may have lost its cache, and our registration with it.
//!
//! Not for: what answers mean (`scsi`), several portals of one target, discovery, digests of data.

#[cfg(all(feature = "iscsi", libiscsi))]
mod callbacks;
#[cfg(all(feature = "iscsi", libiscsi))]
mod connection;
#[cfg(all(feature = "iscsi", libiscsi))]
mod deadman;
#[cfg(all(feature = "iscsi", libiscsi))]
mod device;
#[cfg(all(feature = "iscsi", libiscsi))]
mod event_loop;
#[cfg(all(feature = "iscsi", libiscsi))]
mod fencing;
#[cfg(all(feature = "iscsi", libiscsi))]
mod ffi;
#[cfg(all(feature = "iscsi", libiscsi))]
mod login;
#[cfg(all(feature = "iscsi", libiscsi))]
mod pending;
#[cfg(all(feature = "iscsi", libiscsi))]
mod sending;
#[cfg(all(feature = "iscsi", libiscsi))]
mod session;
#[cfg(all(feature = "iscsi", libiscsi))]
mod socket;
#[cfg(all(feature = "iscsi", libiscsi))]
mod timing;
mod url;

#[cfg(all(feature = "iscsi", libiscsi))]
pub use device::{IscsiDevice, IscsiOptions};
pub use url::{SCHEME, Target, UrlError, without_password};

/// Was this program built with libiscsi?
pub const AVAILABLE: bool = cfg!(all(feature = "iscsi", libiscsi));
