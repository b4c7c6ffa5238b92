//! What a command is, read off its CDB: opcode, service action, address, length, and the kind by which rules
//! select it. Bytes of an initiator are never trusted: a CDB is always 16 bytes here, and nothing is computed
//! from it that could overflow.

use std::fmt;

use serde::{Deserialize, Serialize};

pub mod op {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const READ_6: u8 = 0x08;
    pub const WRITE_6: u8 = 0x0a;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1a;
    pub const START_STOP: u8 = 0x1b;
    pub const PREVENT_ALLOW: u8 = 0x1e;
    pub const READ_CAPACITY_10: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const WRITE_10: u8 = 0x2a;
    pub const WRITE_VERIFY_10: u8 = 0x2e;
    pub const VERIFY_10: u8 = 0x2f;
    pub const PREFETCH_10: u8 = 0x34;
    pub const SYNC_CACHE_10: u8 = 0x35;
    pub const WRITE_SAME_10: u8 = 0x41;
    pub const UNMAP: u8 = 0x42;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const PR_IN: u8 = 0x5e;
    pub const PR_OUT: u8 = 0x5f;
    pub const READ_16: u8 = 0x88;
    pub const COMPARE_AND_WRITE: u8 = 0x89;
    pub const WRITE_16: u8 = 0x8a;
    pub const ORWRITE: u8 = 0x8b;
    pub const WRITE_VERIFY_16: u8 = 0x8e;
    pub const VERIFY_16: u8 = 0x8f;
    pub const PREFETCH_16: u8 = 0x90;
    pub const SYNC_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN: u8 = 0x9e;
    pub const REPORT_LUNS: u8 = 0xa0;
    pub const MAINTENANCE_IN: u8 = 0xa3;
    pub const READ_12: u8 = 0xa8;
    pub const WRITE_12: u8 = 0xaa;
    pub const WRITE_VERIFY_12: u8 = 0xae;
    pub const VERIFY_12: u8 = 0xaf;
}

/// SERVICE ACTION IN(16).
pub const SA_READ_CAPACITY_16: u8 = 0x10;
pub const SA_GET_LBA_STATUS: u8 = 0x12;
/// MAINTENANCE IN.
pub const SA_REPORT_SUPPORTED_OPCODES: u8 = 0x0c;

/// Commands by what they are for, whatever the length of their CDB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    TestUnitReady,
    Inquiry,
    Read,
    Write,
    CompareAndWrite,
    Flush,
    Unmap,
    WriteSame,
    Verify,
    PrIn,
    PrOut,
    Capacity,
    Other,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cdb {
    pub bytes: [u8; 16],
}

fn be16(bytes: &[u8]) -> u32 {
    u32::from(bytes[0]) << 8 | u32::from(bytes[1])
}

fn be32(bytes: &[u8]) -> u32 {
    be16(bytes) << 16 | be16(&bytes[2..])
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from(be32(bytes)) << 32 | u64::from(be32(&bytes[4..]))
}

impl Cdb {
    pub fn new(bytes: [u8; 16]) -> Self {
        Cdb { bytes }
    }

    pub fn opcode(&self) -> u8 {
        self.bytes[0]
    }

    pub fn u16_at(&self, at: usize) -> u16 {
        be16(&self.bytes[at..]) as u16
    }

    pub fn u32_at(&self, at: usize) -> u32 {
        be32(&self.bytes[at..])
    }

    /// Zero for commands without one.
    pub fn service_action(&self) -> u8 {
        match self.opcode() {
            op::PR_IN | op::PR_OUT | op::SERVICE_ACTION_IN | op::MAINTENANCE_IN => self.bytes[1] & 0x1f,
            _ => 0,
        }
    }

    pub fn kind(&self) -> Kind {
        match self.opcode() {
            op::TEST_UNIT_READY => Kind::TestUnitReady,
            op::INQUIRY => Kind::Inquiry,
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => Kind::Read,
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => Kind::Write,
            op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16 | op::ORWRITE => Kind::Write,
            op::COMPARE_AND_WRITE => Kind::CompareAndWrite,
            op::SYNC_CACHE_10 | op::SYNC_CACHE_16 => Kind::Flush,
            op::UNMAP => Kind::Unmap,
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => Kind::WriteSame,
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => Kind::Verify,
            op::PR_IN => Kind::PrIn,
            op::PR_OUT => Kind::PrOut,
            op::READ_CAPACITY_10 => Kind::Capacity,
            op::SERVICE_ACTION_IN if self.service_action() == SA_READ_CAPACITY_16 => Kind::Capacity,
            _ => Kind::Other,
        }
    }

    /// First block and number of blocks, for commands that name blocks in the CDB (UNMAP doesn't).
    pub fn blocks(&self) -> Option<(u64, u32)> {
        let c = &self.bytes;
        Some(match self.opcode() {
            op::READ_6 | op::WRITE_6 => {
                let lba = u64::from(c[1] & 0x1f) << 16 | u64::from(be16(&c[2..]));
                (lba, if c[4] == 0 { 256 } else { u32::from(c[4]) })
            }
            op::READ_10
            | op::WRITE_10
            | op::WRITE_VERIFY_10
            | op::VERIFY_10
            | op::PREFETCH_10
            | op::SYNC_CACHE_10
            | op::WRITE_SAME_10 => (u64::from(be32(&c[2..])), be16(&c[7..])),
            op::READ_12 | op::WRITE_12 | op::WRITE_VERIFY_12 | op::VERIFY_12 => {
                (u64::from(be32(&c[2..])), be32(&c[6..]))
            }
            op::READ_16
            | op::WRITE_16
            | op::ORWRITE
            | op::WRITE_VERIFY_16
            | op::VERIFY_16
            | op::PREFETCH_16
            | op::SYNC_CACHE_16
            | op::WRITE_SAME_16 => (be64(&c[2..]), be32(&c[10..])),
            op::COMPARE_AND_WRITE => (be64(&c[2..]), u32::from(c[13])),
            _ => return None,
        })
    }

    /// RDPROTECT, WRPROTECT, VRPROTECT: in the same place wherever a command has one.
    pub fn protect(&self) -> u8 {
        self.bytes[1] >> 5
    }

    pub fn force_unit_access(&self) -> bool {
        self.bytes[1] & 0x08 != 0
    }

    pub fn name(&self) -> &'static str {
        match self.opcode() {
            op::TEST_UNIT_READY => "TEST UNIT READY",
            op::REQUEST_SENSE => "REQUEST SENSE",
            op::INQUIRY => "INQUIRY",
            op::MODE_SENSE_6 | op::MODE_SENSE_10 => "MODE SENSE",
            op::START_STOP => "START STOP UNIT",
            op::PREVENT_ALLOW => "PREVENT ALLOW",
            op::READ_6 | op::READ_10 | op::READ_12 | op::READ_16 => "READ",
            op::WRITE_6 | op::WRITE_10 | op::WRITE_12 | op::WRITE_16 => "WRITE",
            op::WRITE_VERIFY_10 | op::WRITE_VERIFY_12 | op::WRITE_VERIFY_16 => "WRITE AND VERIFY",
            op::VERIFY_10 | op::VERIFY_12 | op::VERIFY_16 => "VERIFY",
            op::PREFETCH_10 | op::PREFETCH_16 => "PRE-FETCH",
            op::SYNC_CACHE_10 | op::SYNC_CACHE_16 => "SYNCHRONIZE CACHE",
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => "WRITE SAME",
            op::ORWRITE => "ORWRITE",
            op::UNMAP => "UNMAP",
            op::COMPARE_AND_WRITE => "COMPARE AND WRITE",
            op::PR_IN => "PERSISTENT RESERVE IN",
            op::PR_OUT => "PERSISTENT RESERVE OUT",
            op::READ_CAPACITY_10 => "READ CAPACITY",
            op::SERVICE_ACTION_IN => match self.service_action() {
                SA_READ_CAPACITY_16 => "READ CAPACITY",
                SA_GET_LBA_STATUS => "GET LBA STATUS",
                _ => "SERVICE ACTION IN",
            },
            op::REPORT_LUNS => "REPORT LUNS",
            op::MAINTENANCE_IN => "MAINTENANCE IN",
            _ => "unknown",
        }
    }
}

impl fmt::Debug for Cdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name())?;
        self.bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))
    }
}
