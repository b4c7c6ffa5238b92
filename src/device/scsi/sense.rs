//! Sense data, decoded in one place: fixed format (70h, 71h) and descriptor format (72h, 73h), SPC-4 4.5.
//!
//! The bytes come from a target and may be short, long or senseless; whatever they are, the answer is a
//! [`Sense`], at worst one that says nothing. What a sense means for a command is `verdict`'s.

use std::fmt;

/// Sense keys that are told apart.
pub mod key {
    pub const NO_SENSE: u8 = 0x0;
    pub const RECOVERED_ERROR: u8 = 0x1;
    pub const NOT_READY: u8 = 0x2;
    pub const MEDIUM_ERROR: u8 = 0x3;
    pub const HARDWARE_ERROR: u8 = 0x4;
    pub const ILLEGAL_REQUEST: u8 = 0x5;
    pub const UNIT_ATTENTION: u8 = 0x6;
    pub const DATA_PROTECT: u8 = 0x7;
    pub const ABORTED_COMMAND: u8 = 0xB;
    pub const MISCOMPARE: u8 = 0xE;
}

/// Why a command was answered CHECK CONDITION.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sense {
    /// Of an earlier command (71h, 73h): says nothing about the one that was answered.
    pub deferred: bool,
    pub key: u8,
    /// Additional sense code and its qualifier.
    pub asc: u8,
    pub ascq: u8,
    /// The INFORMATION field where it is valid: for a miscompare the byte offset of the first difference, for
    /// a medium error the block. Optional; there are targets that fill it with zero, or not at all.
    pub information: Option<u64>,
}

impl Sense {
    /// Decodes what came; `None` where it is no sense data at all.
    pub fn decode(bytes: &[u8]) -> Option<Sense> {
        let code = bytes.first()? & 0x7F;
        let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
        match code {
            0x70 | 0x71 => {
                bytes.get(2)?;
                let valid = byte(0) & 0x80 != 0;
                let information = bytes.get(3..7).and_then(|field| field.first_chunk());
                // ADDITIONAL SENSE LENGTH says how far the rest is meant.
                let end = usize::from(byte(7)) + 8;
                let within = |at: usize| if at < end { byte(at) } else { 0 };
                Some(Sense {
                    deferred: code == 0x71,
                    key: byte(2) & 0x0F,
                    asc: within(12),
                    ascq: within(13),
                    information: information.filter(|_| valid).map(|field| u32::from_be_bytes(*field).into()),
                })
            }
            0x72 | 0x73 => {
                bytes.get(1)?;
                Some(Sense {
                    deferred: code == 0x73,
                    key: byte(1) & 0x0F,
                    asc: byte(2),
                    ascq: byte(3),
                    information: information_descriptor(bytes),
                })
            }
            _ => None,
        }
    }

    /// Additional sense code and qualifier as one number, as the lists of codes have it.
    pub fn code(&self) -> u16 {
        u16::from_be_bytes([self.asc, self.ascq])
    }
}

/// The INFORMATION descriptor (type 0) of descriptor format.
fn information_descriptor(bytes: &[u8]) -> Option<u64> {
    let list_len = usize::from(*bytes.get(7)?);
    let list = bytes.get(8..)?;
    let mut rest = &list[..list_len.min(list.len())];
    while let [kind, additional, ..] = rest {
        let len = usize::from(*additional) + 2;
        if *kind == 0 {
            let valid = rest.get(2)? & 0x80 != 0;
            let field = rest.get(4..12)?.first_chunk()?;
            return valid.then(|| u64::from_be_bytes(*field));
        }
        rest = rest.get(len..)?;
    }
    None
}

impl fmt::Display for Sense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self.key {
            key::NO_SENSE => "no sense",
            key::RECOVERED_ERROR => "recovered error",
            key::NOT_READY => "not ready",
            key::MEDIUM_ERROR => "medium error",
            key::HARDWARE_ERROR => "hardware error",
            key::ILLEGAL_REQUEST => "illegal request",
            key::UNIT_ATTENTION => "unit attention",
            key::DATA_PROTECT => "write protected",
            key::ABORTED_COMMAND => "aborted",
            key::MISCOMPARE => "miscompare",
            _ => "sense",
        };
        write!(f, "{words} {:X}h {:02X}/{:02X}", self.key, self.asc, self.ascq)?;
        if self.deferred {
            f.write_str(", of an earlier command")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fixed format as targets send it.
    pub(crate) fn fixed(key: u8, asc: u8, ascq: u8, information: Option<u32>) -> Vec<u8> {
        let mut bytes = vec![0; 18];
        bytes[0] = if information.is_some() { 0xF0 } else { 0x70 };
        bytes[2] = key;
        bytes[3..7].copy_from_slice(&information.unwrap_or(0).to_be_bytes());
        bytes[7] = 10;
        (bytes[12], bytes[13]) = (asc, ascq);
        bytes
    }

    #[test]
    fn fixed_format() {
        let sense = Sense::decode(&fixed(0xE, 0x1D, 0, Some(37))).unwrap();
        let expected = Sense { deferred: false, key: 0xE, asc: 0x1D, ascq: 0, information: Some(37) };
        assert_eq!(sense, expected);
        assert_eq!(sense.to_string(), "miscompare Eh 1D/00");
        // VALID is not set: the field means nothing.
        let mut bytes = fixed(0x6, 0x29, 0x01, None);
        bytes[3..7].copy_from_slice(&[1, 2, 3, 4]);
        let sense = Sense::decode(&bytes).unwrap();
        assert_eq!((sense.key, sense.code(), sense.information), (6, 0x2901, None));
        bytes[0] = 0x71;
        assert!(Sense::decode(&bytes).unwrap().deferred);
        // Short: what isn't there counts as zero.
        assert_eq!(Sense::decode(&bytes[..8]).unwrap().code(), 0);
        assert_eq!(Sense::decode(&bytes[..2]), None);
        // An additional length that ends before the codes.
        bytes[7] = 4;
        assert_eq!(Sense::decode(&bytes).unwrap().code(), 0);
    }

    #[test]
    fn descriptor_format() {
        let mut bytes = vec![0x72, 0x0E, 0x1D, 0x00, 0, 0, 0, 20];
        // A sense key specific descriptor comes first.
        bytes.extend([2, 6, 0, 0, 0, 0, 0, 0]);
        bytes.extend([0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        let sense = Sense::decode(&bytes).unwrap();
        assert_eq!((sense.key, sense.code(), sense.information), (0xE, 0x1D00, Some(256)));
        // Cut within the descriptor, a list length that lies, a descriptor that isn't valid.
        assert_eq!(Sense::decode(&bytes[..24]).unwrap().information, None);
        bytes[7] = 255;
        assert_eq!(Sense::decode(&bytes).unwrap().information, Some(256));
        bytes[18] = 0;
        assert_eq!(Sense::decode(&bytes).unwrap().information, None);
        bytes[0] = 0x73;
        assert!(Sense::decode(&bytes).unwrap().deferred);
    }

    #[test]
    fn no_sense_at_all() {
        for bytes in [&[][..], &[0; 18], &[0x7F, 1, 2, 3], &[0x70], &[0x72]] {
            assert_eq!(Sense::decode(bytes), None, "{bytes:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]

        /// Any bytes are an answer, and bytes behind what was decoded change nothing that was said.
        #[test]
        fn any_bytes(code in 0x6Eu8..0x76, mut bytes in proptest::collection::vec(any::<u8>(), 0..260)) {
            if let Some(first) = bytes.first_mut() {
                *first = *first & 0x80 | code;
            }
            let sense = Sense::decode(&bytes);
            if let Some(sense) = sense {
                prop_assert!(sense.key <= 0x0F);
                let _ = sense.to_string();
            }
        }

        /// What was put in comes out of either format.
        #[test]
        fn both_formats_agree(key in 0u8..16, asc: u8, ascq: u8, information: Option<u32>) {
            let one = Sense::decode(&fixed(key, asc, ascq, information)).unwrap();
            let mut bytes = vec![0x72, key, asc, ascq, 0, 0, 0, 12, 0, 10, 0, 0];
            bytes[10] = if information.is_some() { 0x80 } else { 0 };
            bytes.extend(u64::from(information.unwrap_or(9)).to_be_bytes());
            prop_assert_eq!(Some(one), Sense::decode(&bytes));
        }
    }
}
