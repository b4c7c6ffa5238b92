//! An I_T nexus: initiator name and ISID. Whoever logs in with both the same is the same nexus, and keeps its
//! registrations; the target has one portal group, so the other end is always the same.

use std::fmt;
use std::sync::Arc;

#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nexus {
    pub initiator: Arc<str>,
    pub isid: [u8; 6],
}

impl Nexus {
    pub fn new(initiator: &str, isid: [u8; 6]) -> Self {
        Nexus { initiator: initiator.into(), isid }
    }
}

/// As in an iSCSI TransportID.
impl fmt::Display for Nexus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{},i,0x", self.initiator)?;
        self.isid.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Nexus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
