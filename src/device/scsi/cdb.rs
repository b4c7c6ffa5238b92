//! Command descriptor blocks: exactly the commands that are used, built in one place.
//!
//! References are to SPC-4 and SBC-3. Bytes not set are zero; DPO, FUA and group numbers are left zero: a commit
//! is made durable by SYNCHRONIZE CACHE, never by FUA alone, because there are targets that ignore it.

use std::fmt;

/// A command of up to 16 bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Cdb {
    bytes: [u8; 16],
    len: u8,
}

/// Operation codes, as they stand in byte 0.
pub mod opcode {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const INQUIRY: u8 = 0x12;
    pub const MODE_SENSE_6: u8 = 0x1A;
    pub const UNMAP: u8 = 0x42;
    pub const PERSISTENT_RESERVE_IN: u8 = 0x5E;
    pub const PERSISTENT_RESERVE_OUT: u8 = 0x5F;
    pub const READ_16: u8 = 0x88;
    pub const COMPARE_AND_WRITE: u8 = 0x89;
    pub const WRITE_16: u8 = 0x8A;
    pub const SYNCHRONIZE_CACHE_16: u8 = 0x91;
    pub const WRITE_SAME_16: u8 = 0x93;
    pub const SERVICE_ACTION_IN_16: u8 = 0x9E;
    pub const REPORT_LUNS: u8 = 0xA0;
}

/// What PERSISTENT RESERVE IN reports (SPC-4 6.15).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PrIn {
    ReadKeys = 0,
    ReadReservation = 1,
    ReportCapabilities = 2,
}

/// What PERSISTENT RESERVE OUT does (SPC-4 6.16).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PrOut {
    Register = 0,
    Reserve = 1,
    Release = 2,
    Clear = 3,
    Preempt = 4,
    PreemptAndAbort = 5,
    RegisterAndIgnore = 6,
}

/// Write exclusive, all registrants: everybody reads, whoever is registered writes.
pub const WRITE_EXCLUSIVE_ALL_REGISTRANTS: u8 = 7;

/// Length of the parameter list of PERSISTENT RESERVE OUT.
pub const PR_OUT_BYTES: usize = 24;

impl Cdb {
    fn new<const N: usize>(head: [u8; N]) -> Self {
        let mut bytes = [0; 16];
        let len = N.min(16);
        bytes[..len].copy_from_slice(&head[..len]);
        Cdb { bytes, len: len as u8 }
    }

    fn put<const N: usize>(mut self, at: usize, value: [u8; N]) -> Self {
        if let Some(place) = self.bytes.get_mut(at..at + N) {
            place.copy_from_slice(&value);
        }
        self
    }

    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    pub fn opcode(&self) -> u8 {
        self.bytes[0]
    }

    pub fn test_unit_ready() -> Self {
        Cdb::new([opcode::TEST_UNIT_READY, 0, 0, 0, 0, 0])
    }

    /// Standard data, or one vital product data page.
    pub fn inquiry(page: Option<u8>, allocation: u16) -> Self {
        Cdb::new([opcode::INQUIRY, u8::from(page.is_some()), page.unwrap_or(0), 0, 0, 0])
            .put(3, allocation.to_be_bytes())
    }

    /// The caching page, current values, without block descriptors.
    pub fn mode_sense_caching(allocation: u8) -> Self {
        Cdb::new([opcode::MODE_SENSE_6, 0x08, 0x08, 0, allocation, 0])
    }

    pub fn read_capacity_16(allocation: u32) -> Self {
        Cdb::new([opcode::SERVICE_ACTION_IN_16, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            .put(10, allocation.to_be_bytes())
    }

    pub fn report_luns(allocation: u32) -> Self {
        Cdb::new([opcode::REPORT_LUNS, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).put(6, allocation.to_be_bytes())
    }

    fn transfer(code: u8, lba: u64, blocks: u32) -> Self {
        Cdb::new([code, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
            .put(2, lba.to_be_bytes())
            .put(10, blocks.to_be_bytes())
    }

    pub fn read_16(lba: u64, blocks: u32) -> Self {
        Self::transfer(opcode::READ_16, lba, blocks)
    }

    pub fn write_16(lba: u64, blocks: u32) -> Self {
        Self::transfer(opcode::WRITE_16, lba, blocks)
    }

    /// One block: data-out is the expected block and then the new one.
    pub fn compare_and_write(lba: u64) -> Self {
        Cdb::new([opcode::COMPARE_AND_WRITE, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0])
            .put(2, lba.to_be_bytes())
    }

    /// The whole medium.
    pub fn synchronize_cache() -> Self {
        Self::transfer(opcode::SYNCHRONIZE_CACHE_16, 0, 0)
    }

    pub fn unmap(list_bytes: u16) -> Self {
        Cdb::new([opcode::UNMAP, 0, 0, 0, 0, 0, 0, 0, 0, 0]).put(7, list_bytes.to_be_bytes())
    }

    /// Data-out is one block, which the target writes to each of `blocks` blocks.
    pub fn write_same_16(lba: u64, blocks: u32) -> Self {
        Self::transfer(opcode::WRITE_SAME_16, lba, blocks)
    }

    pub fn persistent_reserve_in(action: PrIn, allocation: u16) -> Self {
        Cdb::new([opcode::PERSISTENT_RESERVE_IN, action as u8, 0, 0, 0, 0, 0, 0, 0, 0])
            .put(7, allocation.to_be_bytes())
    }

    /// `kind` is the type of the reservation where the action has one.
    pub fn persistent_reserve_out(action: PrOut, kind: u8) -> Self {
        Cdb::new([opcode::PERSISTENT_RESERVE_OUT, action as u8, kind & 0x0F, 0, 0, 0, 0, 0, 0, 0])
            .put(5, (PR_OUT_BYTES as u32).to_be_bytes())
    }

    /// In a person's words.
    pub fn name(&self) -> &'static str {
        match self.bytes[0] {
            opcode::TEST_UNIT_READY => "test unit ready",
            opcode::INQUIRY => "inquiry",
            opcode::MODE_SENSE_6 => "mode sense",
            opcode::UNMAP => "unmap",
            opcode::PERSISTENT_RESERVE_IN => "persistent reserve in",
            opcode::PERSISTENT_RESERVE_OUT => "persistent reserve out",
            opcode::READ_16 => "read",
            opcode::COMPARE_AND_WRITE => "compare-and-write",
            opcode::WRITE_16 => "write",
            opcode::SYNCHRONIZE_CACHE_16 => "flush",
            opcode::WRITE_SAME_16 => "write same",
            opcode::SERVICE_ACTION_IN_16 => "read capacity",
            opcode::REPORT_LUNS => "report luns",
            _ => "command",
        }
    }

    /// Does it change what other hosts read? Those are refused once this host was fenced.
    pub fn changes_data(&self) -> bool {
        matches!(
            self.bytes[0],
            opcode::UNMAP | opcode::COMPARE_AND_WRITE | opcode::WRITE_16 | opcode::WRITE_SAME_16
        )
    }
}

impl fmt::Debug for Cdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {:02x?}", self.name(), self.bytes())
    }
}

/// Parameter list of PERSISTENT RESERVE OUT. `persist`: the target keeps registrations through its power loss.
pub fn pr_out_parameters(key: u64, action_key: u64, persist: bool) -> [u8; PR_OUT_BYTES] {
    let mut list = [0; PR_OUT_BYTES];
    list[..8].copy_from_slice(&key.to_be_bytes());
    list[8..16].copy_from_slice(&action_key.to_be_bytes());
    list[20] = u8::from(persist);
    list
}

/// Parameter list of UNMAP with one range.
pub fn unmap_parameters(lba: u64, blocks: u32) -> [u8; 24] {
    let mut list = [0; 24];
    list[..2].copy_from_slice(&22u16.to_be_bytes());
    list[2..4].copy_from_slice(&16u16.to_be_bytes());
    list[8..16].copy_from_slice(&lba.to_be_bytes());
    list[16..20].copy_from_slice(&blocks.to_be_bytes());
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_where_the_standard_has_them() {
        let lba = 0x0102_0304_0506_0708;
        let head = [1, 2, 3, 4, 5, 6, 7, 8];
        let read = Cdb::read_16(lba, 0x0A0B_0C0D);
        assert_eq!(read.bytes()[0], 0x88);
        assert_eq!(read.bytes()[2..10], head);
        assert_eq!(read.bytes()[10..14], [10, 11, 12, 13]);
        let swap = Cdb::compare_and_write(lba);
        // NUMBER OF LOGICAL BLOCKS is one byte, 13.
        assert_eq!((swap.bytes()[0], &swap.bytes()[2..10], swap.bytes()[13]), (0x89, &head[..], 1));
        assert_eq!(Cdb::write_16(lba, 1).bytes()[0], 0x8A);
        assert_eq!(Cdb::write_same_16(lba, 9).bytes()[10..14], [0, 0, 0, 9]);
        assert_eq!(Cdb::synchronize_cache().bytes(), [0x91, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Cdb::inquiry(Some(0x83), 0x1234).bytes(), [0x12, 1, 0x83, 0x12, 0x34, 0]);
        assert_eq!(Cdb::inquiry(None, 96).bytes(), [0x12, 0, 0, 0, 96, 0]);
        assert_eq!(Cdb::mode_sense_caching(255).bytes(), [0x1A, 8, 8, 0, 255, 0]);
        assert_eq!(Cdb::read_capacity_16(32).bytes()[..2], [0x9E, 0x10]);
        assert_eq!(Cdb::read_capacity_16(32).bytes()[10..14], [0, 0, 0, 32]);
        assert_eq!(Cdb::report_luns(256).bytes(), [0xA0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        let keys = Cdb::persistent_reserve_in(PrIn::ReadKeys, 0x0408);
        assert_eq!(keys.bytes(), [0x5E, 0, 0, 0, 0, 0, 0, 4, 8, 0]);
        let preempt = Cdb::persistent_reserve_out(PrOut::PreemptAndAbort, 7);
        assert_eq!(preempt.bytes(), [0x5F, 5, 7, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(Cdb::unmap(24).bytes(), [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0]);
        assert_eq!(Cdb::test_unit_ready().bytes(), [0; 6]);
    }

    #[test]
    fn parameter_lists() {
        let list = pr_out_parameters(1, 0x0200_0000_0000_0003, true);
        assert_eq!(list[..16], [0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(list[16..], [0, 0, 0, 0, 1, 0, 0, 0]);
        let list = unmap_parameters(5, 6);
        assert_eq!(list, [0, 22, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 6, 0, 0, 0, 0]);
    }
}
