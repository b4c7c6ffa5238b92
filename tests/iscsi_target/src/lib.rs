//! An iSCSI target for tests: on loopback, without root, with faults inside.
//!
//! It stands in for a disk array. Every command is one instant under one lock per logical unit; several
//! initiators, sessions and LUNs; all of persistent reservations that hosts use; unit attentions per I_T nexus.
//! What real targets get wrong can be switched on: for a logical unit as a whole (`Personality`), for chosen
//! commands (`Rule`), or at a moment (power loss, freezing, cut sessions, another size). Whatever is random comes
//! from seeds. A trace tells what was executed, in which order.
//!
//! Beside it: `proxy`, which does mischief between any initiator and any target; `others`, which starts targets
//! that other people wrote; `initiator`, just enough of the other end for tests of all these.
//!
//! It is no target for data: nothing is authenticated but by CHAP, nothing encrypted, no digest computed.

mod attention;
pub mod control;
pub mod faults;
mod gate;
pub mod initiator;
mod login;
mod nexus;
pub mod others;
pub mod pdu;
pub mod personality;
pub mod proxy;
mod run;
pub mod scsi;
pub mod sense;
mod session;
mod store;
mod target;
mod trace;

use std::sync::{Mutex, MutexGuard};

pub use faults::{Fault, Rule, Select, Which};
pub use nexus::Nexus;
pub use personality::Personality;
pub use scsi::cdb::Kind;
pub use target::{Chap, Config, DEFAULT_NAME, LunConfig, Target, UnmappedLun};
pub use trace::{Entry, Judge};

/// A panic of another thread says nothing about the data here: each lock is held over whole steps only.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}
