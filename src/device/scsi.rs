//! What all SCSI backends share: commands, sense data, what an answer means, reservations.
//!
//! A backend brings a [`Transport`](transport::Transport): one path (an I_T nexus) over which a command goes
//! out and an answer comes back, or doesn't. Everything else is here, once, so that a kernel device behind SG_IO
//! and an iSCSI session from user space can't differ in it.
//!
//! Invariants
//!
//! 1. **Each answer is first judged by one question: may the command have been executed?** (`verdict`). Nothing
//!    above sees a status, a sense key or an errno.
//! 2. **Compare-and-write is one logical block**, whatever the target says of itself: targets advertise lengths
//!    that they refuse, refuse what they advertise, and answer GOOD without doing anything (`check` finds out).
//! 3. **No panic on any bytes** that a target sends; each length is believed as far as there are bytes.
//! 4. **A reservation conflict is the end**: after it nothing but reads goes out, and nothing registers again by
//!    itself.
//! 5. **A unit attention is drawn by a TEST UNIT READY where that can be arranged**: on a new path before its
//!    first other command, and after every unit attention. There is a target that loses the atomicity of its
//!    compare-and-writes for good if one of them ends in a unit attention.
//!
//! Not for: retrying a compare-and-write that may have been executed, choosing paths, making sessions, or
//! knowing any LunFS structure.

pub mod cdb;
pub mod inquiry;
pub mod ranges;
pub mod reservation;
#[cfg(test)]
mod script;
pub mod sense;
pub mod transport;
pub mod unit;
pub mod verdict;
