//! Commands to a running daemon: one unix socket a mount, one request a connection.
//!
//! # The protocol, version 1
//!
//! Lines of JSON. The client sends one request and leaves the connection open; the daemon answers with events as they
//! come and ends with one answer:
//!
//! ```text
//! > {"version":1,"command":"scrub","arguments":{...}}
//! < {"event":{...}}            any number of them
//! < {"done":{...}}             or
//! < {"failed":{"kind":"busy","text":"a sentence"}}
//! ```
//!
//! `kind`: `version` (the daemon speaks another one), `unknown-command`, `bad-arguments`, `denied`, `busy`, `cancelled`,
//! `ended` (the mount ends, or may not be used any more), `failed`. Fields and kinds are only ever added; a client ignores
//! fields that it does not know.
//!
//! A client that closes its side, or goes away, cancels what it asked for; if it still reads, it is told the end. A
//! connection that closes without an end means that the daemon is gone.
//!
//! Invariants
//!
//! * Only root and the user the daemon runs as are served: by the mode of the socket, and by the peer's credentials.
//! * Nothing a client does, or leaves undone, holds up anything but its own request: each has a thread, their number
//!   and the length of a line are bounded, writes to who does not read time out.
//! * A daemon that ends tells all its clients first ([`Server::stop`]).
//! * A socket left over by a daemon that was killed is replaced by the next one of the same name; who connects to it until
//!   then is refused at once.
//!
//! Not for: knowing what commands do ([`Service`]), which socket belongs to which mount (`cli`), the kernel (`fuse`).

mod address;
mod client;
mod server;
mod wire;

pub use address::in_its_directory;
pub use client::{CallError, call};
pub use server::{Call, Server, Service};
pub use wire::{Failure, FailureKind, VERSION};
