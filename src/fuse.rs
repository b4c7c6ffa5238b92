//! The kernel's door: the only room that knows FUSE.
//!
//! A transport reads the kernel's requests and turns them into [`request::Request`]; one set of
//! [`handlers`] calls the filesystem ([`Operations`](crate::fs::api::Operations)) and answers with a
//! [`reply::Reply`], which the transport writes back. There are two ([`transport`]): our own (`native`), and one by
//! the `fuser` library, which is known in `fuser_transport` only.
//!
//! What must hold, and what breaks without it:
//!
//! * **The hold of an answer is dropped after the reply was delivered.** Otherwise the lock may leave
//!   between our reading the state and the kernel caching it, and the kernel keeps a stale answer that
//!   no invalidation follows.
//! * **A thread that serves the kernel never waits for another host.** It asks with `may_wait = false`;
//!   what would wait moves to [`workers`]. Otherwise all serving threads end up waiting for locks whose
//!   holders wait for us: our invalidations make the kernel write back pages, and nobody is left to serve
//!   those writes.
//! * **No notification is sent from a thread that serves the kernel** ([`notify`]): it can wait for a
//!   request that only this thread would answer.
//! * **A name or attribute is cached only as long as its lock is held**: times come from `valid_for`.
//! * **Attributes are kept by the kernel only once it surely has the very same** ([`taken_in`]): it calls them
//!   valid before it has them all.
//! * **When this process can't silence the kernel any more, its [`guard`] does.**
//! * **The daemon never touches its own mount**: not to stat it, not to open it. It would wait for itself
//!   and could not be killed any more. Facts about the mount come from /proc/self/mountinfo.
//!
//! Not here yet: locks of files across hosts (flock and fcntl locks are the kernel's own, valid on one host
//! only), extended attributes and ACLs, and `fuseblk` (without which the kernel sends no SYNCFS).

pub mod capabilities;
pub(crate) mod fusectl;
pub mod fuser_transport;
pub mod guard;
pub mod handlers;
pub mod mountinfo;
pub mod mounting;
pub(crate) mod native;
pub mod nodes;
pub mod notify;
pub mod reply;
pub mod request;
pub mod session;
pub(crate) mod silence;
mod taken_in;
pub mod transport;
pub mod waits;
pub mod workers;

pub use session::{EndReason, Session, SessionOptions};
