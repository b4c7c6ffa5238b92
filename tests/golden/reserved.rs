//! Bytes that have no meaning in this version (`docs/format.md`): what is written today leaves them zero.

use lunfs::layout::{FORMAT_VERSION, header_of};
use lunfs::types::{BLOCK_BYTES, BlockNo};

type Ranges = &'static [(usize, usize)];

/// First byte and first byte behind; the record of 512 bytes where it is one.
const RESERVED: &[(&[u8; 4], Ranges)] = &[
    (b"LnSB", &[(0x72, 0x78), (0x84, 0x88), (0xe8, 0x1000)]),
    (b"LnLK", &[(0x47, 0x48), (0xd0, 0x200)]),
    (b"LnHB", &[(0x120, 0x200)]),
    (b"LnDB", &[(0x68, 0x200)]),
    (b"LnRQ", &[(0x52, 0x60), (0xc60, 0x1000)]),
    (b"LnCH", &[(0x5c, 0x80), (0xc80, 0x1000)]),
    (b"LnCM", &[]),
    (b"LnIN", &[(0x6d, 0x70), (0xb8, 0xc0), (0xc8, 0x100)]),
    (b"LnTN", &[(0x4e, 0x50)]),
    (b"LnJH", &[(0x5c, 0x60), (0x70, 0x1000)]),
    (b"LnJD", &[(0x52, 0x80)]),
    (b"LnJC", &[(0x68, 0x1000)]),
];
/// In every header.
const OF_HEADER: Ranges = &[(0x06, 0x08), (0x0c, 0x10)];
/// Feature words: a bit there says that more has a meaning.
const FEATURES: (usize, usize) = (0x40, 0x58);

/// A sentence for each byte that is not zero.
pub fn used(bytes: &[u8]) -> Vec<String> {
    let mut wrong = Vec::new();
    for (number, block) in (0..).zip(bytes.chunks_exact(BLOCK_BYTES)) {
        if !block.starts_with(b"Ln") {
            continue;
        }
        let at = BlockNo(number);
        let header = header_of(block).expect("a header");
        if header.version.get() != FORMAT_VERSION {
            wrong.push(format!("{at} has version {}", header.version.get()));
        }
        let magic = &block[..4];
        let Some((_, ranges)) = RESERVED.iter().find(|(known, _)| *known == magic) else {
            wrong.push(format!(
                "{at} is a '{}', which version {FORMAT_VERSION} has not",
                magic.escape_ascii()
            ));
            continue;
        };
        let entries: Vec<(usize, usize)> = match magic {
            b"LnRQ" => (0..128).map(|i| (0x60 + i * 24 + 0x11, 0x60 + i * 24 + 0x18)).collect(),
            b"LnJD" => (0..124).map(|i| (0x80 + i * 32 + 25, 0x80 + i * 32 + 32)).collect(),
            b"LnCH" => (0..384).map(|i| (0x80 + i * 8 + 5, 0x80 + i * 8 + 8)).collect(),
            b"LnSB" => vec![FEATURES],
            _ => Vec::new(),
        };
        for (from, to) in ranges.iter().chain(OF_HEADER).chain(&entries) {
            if let Some(byte) = (*from..*to).find(|byte| block[*byte] != 0) {
                wrong.push(format!(
                    "{} at {at}: byte {byte:#x} is used, and reserved in version {FORMAT_VERSION}",
                    magic.escape_ascii()
                ));
            }
        }
    }
    wrong.truncate(20);
    wrong
}
