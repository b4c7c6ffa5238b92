//! What a command comes back with: status, sense data, bytes for the initiator.
//!
//! Sense data is made in one place, in the fixed format or in the descriptor format, whichever the logical unit
//! is set to, so that a client's decoder can be tried with both.

use serde::{Deserialize, Serialize};

pub const GOOD: u8 = 0x00;
pub const CHECK_CONDITION: u8 = 0x02;
pub const BUSY: u8 = 0x08;
pub const RESERVATION_CONFLICT: u8 = 0x18;
pub const TASK_SET_FULL: u8 = 0x28;
pub const TASK_ABORTED: u8 = 0x40;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sense {
    pub key: u8,
    pub asc: u8,
    pub ascq: u8,
    /// The INFORMATION field, if it is valid: for a miscompare the byte offset of the first difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub information: Option<u32>,
    /// Byte of the CDB that an ILLEGAL REQUEST points at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<u16>,
}

impl Sense {
    pub const fn new(key: u8, asc: u8, ascq: u8) -> Self {
        Sense { key, asc, ascq, information: None, field: None }
    }

    pub const INVALID_OPCODE: Sense = Sense::new(0x05, 0x20, 0x00);
    pub const LBA_OUT_OF_RANGE: Sense = Sense::new(0x05, 0x21, 0x00);
    pub const INVALID_FIELD_IN_CDB: Sense = Sense::new(0x05, 0x24, 0x00);
    pub const LUN_NOT_SUPPORTED: Sense = Sense::new(0x05, 0x25, 0x00);
    pub const INVALID_FIELD_IN_PARAMETER_LIST: Sense = Sense::new(0x05, 0x26, 0x00);
    pub const INVALID_RELEASE: Sense = Sense::new(0x05, 0x26, 0x04);
    pub const PARAMETER_LIST_LENGTH: Sense = Sense::new(0x05, 0x1a, 0x00);
    pub const INVALID_FIELD_IN_COMMAND_IU: Sense = Sense::new(0x05, 0x0e, 0x03);
    pub const MISCOMPARE: Sense = Sense::new(0x0e, 0x1d, 0x00);
    pub const WRITE_PROTECTED: Sense = Sense::new(0x07, 0x27, 0x00);
    pub const TARGET_FAILURE: Sense = Sense::new(0x04, 0x44, 0x00);

    /// The bytes of the sense data, without the length that iSCSI puts before them.
    pub fn bytes(&self, descriptor_format: bool) -> Vec<u8> {
        if !descriptor_format {
            let mut out = vec![0u8; 18];
            out[0] = 0x70;
            out[2] = self.key;
            if let Some(information) = self.information {
                out[0] |= 0x80;
                out[3..7].copy_from_slice(&information.to_be_bytes());
            }
            out[7] = 10;
            out[12] = self.asc;
            out[13] = self.ascq;
            if let Some(field) = self.field {
                out[15] = 0x80 | 0x40;
                out[16..18].copy_from_slice(&field.to_be_bytes());
            }
            return out;
        }
        let mut out = vec![0x72, self.key, self.asc, self.ascq, 0, 0, 0, 0];
        if let Some(information) = self.information {
            out.extend_from_slice(&[0x00, 0x0a, 0x80, 0]);
            out.extend_from_slice(&u64::from(information).to_be_bytes());
        }
        if let Some(field) = self.field {
            out.extend_from_slice(&[0x02, 0x06, 0, 0, 0x80 | 0x40]);
            out.extend_from_slice(&field.to_be_bytes());
            out.push(0);
        }
        out[7] = (out.len() - 8) as u8;
        out
    }
}

/// The end of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    pub status: u8,
    pub sense: Option<Sense>,
    /// Bytes for the initiator, before they are cut to what it said that it expects.
    pub data: Vec<u8>,
    /// How many bytes the command takes from the initiator by its CDB.
    pub takes: usize,
    /// Whether the command changed blocks, reservations or what is durable.
    pub changed: bool,
}

impl Answer {
    pub fn good() -> Self {
        Answer::default()
    }

    pub fn data(data: Vec<u8>) -> Self {
        Answer { data, ..Answer::default() }
    }

    /// Data cut to the allocation length of the CDB.
    pub fn allocated(mut data: Vec<u8>, allocation: usize) -> Self {
        data.truncate(allocation);
        Answer::data(data)
    }

    pub fn status(status: u8) -> Self {
        Answer { status, ..Answer::default() }
    }

    pub fn check(sense: Sense) -> Self {
        Answer { status: CHECK_CONDITION, sense: Some(sense), ..Answer::default() }
    }

    pub fn conflict() -> Self {
        Answer::status(RESERVATION_CONFLICT)
    }

    pub fn taking(mut self, bytes: usize) -> Self {
        self.takes = bytes;
        self
    }

    pub fn changing(mut self) -> Self {
        self.changed = true;
        self
    }

    pub fn is_good(&self) -> bool {
        self.status == GOOD
    }
}

impl From<Sense> for Answer {
    fn from(sense: Sense) -> Self {
        Answer::check(sense)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_formats_carry_the_same() {
        let sense = Sense { information: Some(300), ..Sense::MISCOMPARE };
        let fixed = sense.bytes(false);
        assert_eq!((fixed[0], fixed[2], fixed[12], fixed[13]), (0xf0, 0x0e, 0x1d, 0));
        assert_eq!(fixed[3..7], 300u32.to_be_bytes());
        let descriptor = sense.bytes(true);
        assert_eq!(descriptor[..4], [0x72, 0x0e, 0x1d, 0]);
        assert_eq!(usize::from(descriptor[7]), descriptor.len() - 8);
        assert_eq!(descriptor[8..12], [0, 10, 0x80, 0]);
        assert_eq!(descriptor[12..20], 300u64.to_be_bytes());
    }
}
