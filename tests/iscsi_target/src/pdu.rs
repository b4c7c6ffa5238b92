//! iSCSI PDUs: 48 bytes of header, additional header segments (skipped), data padded to four bytes. No digests.

use std::io::{self, IoSlice, Read, Write};

pub const HEADER_BYTES: usize = 48;
/// Longest data segment that is taken; what we declare as MaxRecvDataSegmentLength.
pub const SEGMENT_BYTES_MAX: usize = 256 << 10;

pub mod initiator {
    pub const NOP_OUT: u8 = 0x00;
    pub const SCSI_COMMAND: u8 = 0x01;
    pub const TASK_MANAGEMENT: u8 = 0x02;
    pub const LOGIN: u8 = 0x03;
    pub const TEXT: u8 = 0x04;
    pub const DATA_OUT: u8 = 0x05;
    pub const LOGOUT: u8 = 0x06;
}

pub mod target {
    pub const NOP_IN: u8 = 0x20;
    pub const SCSI_RESPONSE: u8 = 0x21;
    pub const TASK_MANAGEMENT: u8 = 0x22;
    pub const LOGIN: u8 = 0x23;
    pub const TEXT: u8 = 0x24;
    pub const DATA_IN: u8 = 0x25;
    pub const LOGOUT: u8 = 0x26;
    pub const R2T: u8 = 0x31;
    pub const ASYNC: u8 = 0x32;
    pub const REJECT: u8 = 0x3f;
}

/// The tag that stands for "none".
pub const NO_TAG: u32 = 0xffff_ffff;

#[derive(Clone, PartialEq, Eq)]
pub struct Header(pub [u8; HEADER_BYTES]);

impl Header {
    pub fn new(opcode: u8, flags: u8) -> Self {
        let mut bytes = [0u8; HEADER_BYTES];
        bytes[0] = opcode;
        bytes[1] = flags;
        Header(bytes)
    }

    pub fn opcode(&self) -> u8 {
        self.0[0] & 0x3f
    }

    pub fn immediate(&self) -> bool {
        self.0[0] & 0x40 != 0
    }

    pub fn flags(&self) -> u8 {
        self.0[1]
    }

    pub fn is_final(&self) -> bool {
        self.0[1] & 0x80 != 0
    }

    pub fn u16_at(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.0[at], self.0[at + 1]])
    }

    pub fn u32_at(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.0[at], self.0[at + 1], self.0[at + 2], self.0[at + 3]])
    }

    pub fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        self.set(at, bytes);
        self
    }

    pub fn put_u32(self, at: usize, value: u32) -> Self {
        self.put(at, &value.to_be_bytes())
    }

    pub fn set(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Initiator task tag.
    pub fn tag(&self) -> u32 {
        self.u32_at(16)
    }

    /// Command sequence number, in what an initiator sends.
    pub fn command_number(&self) -> u32 {
        self.u32_at(24)
    }

    pub fn data_bytes(&self) -> usize {
        usize::from(self.0[5]) << 16 | usize::from(self.0[6]) << 8 | usize::from(self.0[7])
    }

    fn with_data_bytes(mut self, bytes: usize) -> Self {
        self.0[5..8].copy_from_slice(&(bytes as u32).to_be_bytes()[1..]);
        self
    }

    pub fn cdb(&self) -> [u8; 16] {
        let mut cdb = [0; 16];
        cdb.copy_from_slice(&self.0[32..48]);
        cdb
    }

    /// The first level of the LUN, by peripheral or flat addressing.
    pub fn lun(&self) -> Option<u16> {
        let (method, high) = (self.0[8] >> 6, self.0[8] & 0x3f);
        let rest_empty = self.0[10..16].iter().all(|byte| *byte == 0);
        (method <= 1 && rest_empty).then(|| u16::from(high) << 8 | u16::from(self.0[9]))
    }
}

pub struct Pdu {
    pub header: Header,
    /// Additional header segments as they came.
    pub extra: Vec<u8>,
    pub data: Vec<u8>,
}

/// `None` where a connection ends between two PDUs.
pub fn read(from: &mut impl Read) -> io::Result<Option<Pdu>> {
    let mut bytes = [0u8; HEADER_BYTES];
    let mut have = 0;
    while have < HEADER_BYTES {
        match from.read(&mut bytes[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let header = Header(bytes);
    let mut extra = vec![0u8; usize::from(header.0[4]) * 4];
    from.read_exact(&mut extra)?;
    let length = header.data_bytes();
    if length > 4 * SEGMENT_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a data segment longer than was agreed"));
    }
    let mut data = vec![0u8; length.next_multiple_of(4)];
    from.read_exact(&mut data)?;
    data.truncate(length);
    Ok(Some(Pdu { header, extra, data }))
}

/// In one system call where the socket takes it.
pub fn write(to: &mut impl Write, header: Header, extra: &[u8], data: &[u8]) -> io::Result<()> {
    let header = header.with_data_bytes(data.len());
    let padding = [0u8; 3];
    let pad = data.len().next_multiple_of(4) - data.len();
    let mut slices =
        [IoSlice::new(&header.0), IoSlice::new(extra), IoSlice::new(data), IoSlice::new(&padding[..pad])];
    let mut left = &mut slices[..];
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        match to.write_vectored(left) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut left, n),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// `key=value` pairs, each ended by a zero byte.
pub fn pairs(text: &[u8]) -> Vec<(String, String)> {
    text.split(|byte| *byte == 0)
        .filter_map(|pair| {
            let pair = String::from_utf8_lossy(pair);
            pair.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()))
        })
        .collect()
}

pub fn text(pairs: &[(String, String)]) -> Vec<u8> {
    pairs.iter().flat_map(|(key, value)| format!("{key}={value}\0").into_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pdu_survives_the_way() {
        for length in [0, 1, 3, 4, 1000] {
            let data = vec![7u8; length];
            let mut wire = Vec::new();
            write(&mut wire, Header::new(0x05, 0x80).put_u32(16, 99), &[], &data).unwrap();
            assert_eq!(wire.len() % 4, 0);
            let pdu = read(&mut wire.as_slice()).unwrap().unwrap();
            assert_eq!((pdu.header.opcode(), pdu.header.tag(), pdu.data), (5, 99, data));
            assert!(read(&mut wire[..wire.len() - 1].as_ref()).is_err());
        }
        assert!(read(&mut [].as_slice()).unwrap().is_none());
    }

    #[test]
    fn luns_of_both_methods() {
        let header = |bytes: &[u8]| Header::new(1, 0).put(8, bytes);
        assert_eq!(header(&[0, 7]).lun(), Some(7));
        assert_eq!(header(&[0x41, 2]).lun(), Some(258));
        assert_eq!(header(&[0xc1, 1]).lun(), None);
        assert_eq!(header(&[0, 1, 0, 1]).lun(), None);
    }
}
