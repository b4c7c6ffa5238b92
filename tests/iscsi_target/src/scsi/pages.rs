//! The pages and lists by which a logical unit describes itself: INQUIRY and its VPD pages, READ CAPACITY, MODE
//! SENSE, REPORT SUPPORTED OPERATION CODES. Where the personality lies, it lies here.

use crate::personality::{Personality, Unmapped};
use crate::scsi::cdb::{self, Cdb, op};
use crate::sense::{Answer, Sense};

/// What pages are made of.
pub struct Describe<'a> {
    pub personality: &'a Personality,
    pub serial: &'a str,
    pub block_bytes: u32,
    pub blocks: u64,
}

const UNMAP_BLOCKS_MAX: u32 = 1 << 20;
const UNMAP_DESCRIPTORS_MAX: u32 = 64;

fn padded(text: &str, bytes: usize) -> Vec<u8> {
    let mut out: Vec<u8> = text.bytes().take(bytes).collect();
    out.resize(bytes, b' ');
    out
}

impl Describe<'_> {
    pub fn inquiry(&self, cdb: &Cdb) -> Answer {
        let c = &cdb.bytes;
        let allocation = usize::from(cdb.u16_at(3));
        if c[1] & 0x01 == 0 {
            if c[2] != 0 {
                return Sense { field: Some(2), ..Sense::INVALID_FIELD_IN_CDB }.into();
            }
            return Answer::allocated(self.standard(), allocation);
        }
        let body = match c[2] {
            0x00 => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
            0x80 => self.serial.as_bytes().to_vec(),
            0x83 => self.identification(),
            0xb0 => self.block_limits(),
            0xb1 => {
                // A medium that doesn't rotate.
                let mut page = vec![0u8; 60];
                page[1] = 1;
                page
            }
            0xb2 => {
                let p = self.personality;
                let unmaps = if p.unmap && p.write_same { 0xe0 } else { u8::from(p.unmap) << 7 };
                let zeroes = u8::from(p.unmap && p.unmapped == Unmapped::Zeroes) << 2;
                // Thin provisioned only if it can unmap.
                vec![0, unmaps | zeroes, if p.unmap { 2 } else { 0 }, 0]
            }
            _ => return Sense { field: Some(2), ..Sense::INVALID_FIELD_IN_CDB }.into(),
        };
        let mut page = vec![0, c[2], (body.len() >> 8) as u8, body.len() as u8];
        page.extend_from_slice(&body);
        Answer::allocated(page, allocation)
    }

    fn standard(&self) -> Vec<u8> {
        // A disk, SPC-4, HISUP off, fixed response format 2; TPGS 0; CMDQUE.
        let mut out = vec![0x00, 0x00, 0x06, 0x02, 0, 0x00, 0x00, 0x02];
        out.extend(padded(&self.personality.vendor, 8));
        out.extend(padded(&self.personality.product, 16));
        out.extend(padded(&self.personality.revision, 4));
        out.resize(58, 0);
        // SAM-5, iSCSI, SPC-4, SBC-3.
        for version in [0x00a0u16, 0x0960, 0x0460, 0x04c0] {
            out.extend_from_slice(&version.to_be_bytes());
        }
        out.resize(74, 0);
        out[4] = (out.len() - 5) as u8;
        out
    }

    fn identification(&self) -> Vec<u8> {
        // NAA locally assigned, made of the serial; then a T10 vendor id.
        let hash = self
            .serial
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
        let naa = 3u64 << 60 | hash >> 4;
        let mut out = vec![0x01, 0x03, 0, 8];
        out.extend_from_slice(&naa.to_be_bytes());
        let mut t10 = padded(&self.personality.vendor, 8);
        t10.extend_from_slice(self.serial.as_bytes());
        out.extend_from_slice(&[0x02, 0x01, 0, t10.len() as u8]);
        out.extend(t10);
        out
    }

    fn block_limits(&self) -> Vec<u8> {
        let p = self.personality;
        let mut page = vec![0u8; 60];
        page[0] = 0x01; // WSNZ: a WRITE SAME of no blocks is refused
        page[1] = p.claims_compare_and_write_blocks.unwrap_or(p.compare_and_write_blocks);
        page[2..4].copy_from_slice(&(1u16 << p.physical_exponent.min(15)).to_be_bytes());
        page[4..8].copy_from_slice(&p.max_transfer_blocks.to_be_bytes());
        if p.unmap {
            page[16..20].copy_from_slice(&UNMAP_BLOCKS_MAX.to_be_bytes());
            page[20..24].copy_from_slice(&UNMAP_DESCRIPTORS_MAX.to_be_bytes());
            page[24..28].copy_from_slice(&1u32.to_be_bytes());
        }
        if p.write_same {
            page[32..40].copy_from_slice(&u64::from(WRITE_SAME_BLOCKS_MAX).to_be_bytes());
        }
        page
    }

    pub fn capacity_10(&self) -> Answer {
        let last = u32::try_from(self.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
        let mut out = last.to_be_bytes().to_vec();
        out.extend_from_slice(&self.block_bytes.to_be_bytes());
        Answer::data(out)
    }

    pub fn capacity_16(&self, cdb: &Cdb) -> Answer {
        let p = self.personality;
        let mut out = vec![0u8; 32];
        out[..8].copy_from_slice(&self.blocks.saturating_sub(1).to_be_bytes());
        out[8..12].copy_from_slice(&self.block_bytes.to_be_bytes());
        out[13] = p.physical_exponent & 0x0f;
        out[14] = u8::from(p.unmap) << 7 | u8::from(p.unmap && p.unmapped == Unmapped::Zeroes) << 6;
        Answer::allocated(out, cdb.u32_at(10) as usize)
    }

    pub fn mode_sense(&self, cdb: &Cdb) -> Answer {
        let c = &cdb.bytes;
        let six = cdb.opcode() == op::MODE_SENSE_6;
        let (control, page, subpage) = (c[2] >> 6, c[2] & 0x3f, c[3]);
        if control == 3 {
            return Sense::new(0x05, 0x39, 0x00).into(); // saving is not supported
        }
        if subpage != 0 && subpage != 0xff {
            return Sense { field: Some(3), ..Sense::INVALID_FIELD_IN_CDB }.into();
        }
        let changeable = control == 1;
        let mut pages = Vec::new();
        // Read-write error recovery.
        let all = page == 0x3f;
        if all || page == 0x01 {
            pages.extend_from_slice(&[0x01, 0x0a]);
            pages.extend_from_slice(&[0; 10]);
        }
        if all || page == 0x08 {
            let p = self.personality;
            let cache = p.claims_write_cache.unwrap_or(p.volatile_cache);
            let mut body = [0u8; 18];
            body[0] = if changeable { 0 } else { u8::from(cache) << 2 };
            pages.extend_from_slice(&[0x08, 0x12]);
            pages.extend_from_slice(&body);
        }
        if all || page == 0x0a {
            let p = self.personality;
            let mut body = [0u8; 10];
            if !changeable {
                body[0] = u8::from(p.descriptor_sense) << 2;
                body[3] = u8::from(p.task_aborted_status) << 6;
            }
            pages.extend_from_slice(&[0x0a, 0x0a]);
            pages.extend_from_slice(&body);
        }
        if pages.is_empty() {
            return Sense { field: Some(2), ..Sense::INVALID_FIELD_IN_CDB }.into();
        }
        // Write protection, and that DPO and FUA are taken.
        let device = u8::from(self.personality.write_protected) << 7 | 0x10;
        let no_descriptors = c[1] & 0x08 != 0;
        let mut descriptor = Vec::new();
        if !no_descriptors {
            let blocks = u32::try_from(self.blocks).unwrap_or(u32::MAX);
            descriptor.extend_from_slice(&blocks.to_be_bytes());
            descriptor.extend_from_slice(&self.block_bytes.to_be_bytes());
            descriptor[4] = 0;
        }
        let mut out = if six {
            vec![0, 0, device, descriptor.len() as u8]
        } else {
            vec![0, 0, 0, device, 0, 0, 0, descriptor.len() as u8]
        };
        out.extend(descriptor);
        out.extend(pages);
        if six {
            out[0] = (out.len() - 1) as u8;
            return Answer::allocated(out, usize::from(c[4]));
        }
        let length = (out.len() - 2) as u16;
        out[..2].copy_from_slice(&length.to_be_bytes());
        Answer::allocated(out, usize::from(cdb.u16_at(7)))
    }

    pub fn supported_opcodes(&self, cdb: &Cdb) -> Answer {
        let c = &cdb.bytes;
        let timeouts = c[2] & 0x80 != 0;
        let (opcode, action) = (c[3], cdb.u16_at(4));
        let allocation = cdb.u32_at(6) as usize;
        let offered: Vec<&Supported> = SUPPORTED.iter().filter(|one| self.offers(one.opcode)).collect();
        let invalid = || Answer::from(Sense { field: Some(2), ..Sense::INVALID_FIELD_IN_CDB });
        let descriptor: &[u8] = &[0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        match c[2] & 0x07 {
            0 => {
                let mut list = Vec::new();
                for one in offered {
                    let flags = u8::from(timeouts) << 1 | u8::from(one.action.is_some());
                    let action = u16::from(one.action.unwrap_or(0)).to_be_bytes();
                    list.extend_from_slice(&[one.opcode, 0, action[0], action[1], 0, flags, 0]);
                    list.push(one.usage.len() as u8);
                    if timeouts {
                        list.extend_from_slice(descriptor);
                    }
                }
                let mut out = (list.len() as u32).to_be_bytes().to_vec();
                out.extend(list);
                Answer::allocated(out, allocation)
            }
            how @ 1..=3 => {
                let known = offered.iter().any(|one| one.opcode == opcode);
                let with_actions = offered.iter().any(|one| one.opcode == opcode && one.action.is_some());
                // 1: opcodes without service actions only; 2: with them only.
                if known && ((how == 1 && with_actions) || (how == 2 && !with_actions)) {
                    return invalid();
                }
                let found = offered.iter().find(|one| {
                    one.opcode == opcode && one.action.is_none_or(|one| u16::from(one) == action)
                });
                let Some(found) = found else {
                    return Answer::allocated(vec![0, 1, 0, 0], allocation);
                };
                let mut out = vec![0, u8::from(timeouts) << 7 | 3, 0, found.usage.len() as u8];
                out.extend_from_slice(found.usage);
                if timeouts {
                    out.extend_from_slice(descriptor);
                }
                Answer::allocated(out, allocation)
            }
            _ => invalid(),
        }
    }

    fn offers(&self, opcode: u8) -> bool {
        let p = self.personality;
        match opcode {
            op::COMPARE_AND_WRITE => p
                .claims_compare_and_write
                .unwrap_or(p.compare_and_write != crate::personality::CompareAndWrite::Unsupported),
            op::UNMAP => p.unmap,
            op::WRITE_SAME_10 | op::WRITE_SAME_16 => p.write_same,
            op::PR_IN | op::PR_OUT => p.reservations,
            _ => true,
        }
    }
}

pub const WRITE_SAME_BLOCKS_MAX: u32 = 1 << 20;
pub const UNMAP_LIST_MAX: usize = UNMAP_DESCRIPTORS_MAX as usize;
pub const UNMAP_MAX: u32 = UNMAP_BLOCKS_MAX;

struct Supported {
    opcode: u8,
    action: Option<u8>,
    /// Which bits of the CDB are looked at; its length is that of the CDB.
    usage: &'static [u8],
}

macro_rules! supported {
    ($($opcode:expr, $action:expr, [$($usage:expr),*];)*) => {
        const SUPPORTED: &[Supported] = &[$(Supported { opcode: $opcode, action: $action, usage: &[$opcode, $($usage),*] }),*];
    };
}

supported! {
    op::TEST_UNIT_READY, None, [0, 0, 0, 0, 0];
    op::REQUEST_SENSE, None, [1, 0, 0, 0xff, 0];
    op::READ_6, None, [0x1f, 0xff, 0xff, 0xff, 0];
    op::WRITE_6, None, [0x1f, 0xff, 0xff, 0xff, 0];
    op::INQUIRY, None, [1, 0xff, 0xff, 0xff, 0];
    op::MODE_SENSE_6, None, [8, 0xff, 0xff, 0xff, 0];
    op::START_STOP, None, [1, 0, 0x0f, 0xf7, 0];
    op::READ_CAPACITY_10, None, [0, 0, 0, 0, 0, 0, 0, 0, 0];
    op::READ_10, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::WRITE_10, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::WRITE_VERIFY_10, None, [0x12, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::VERIFY_10, None, [0x12, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::PREFETCH_10, None, [2, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::SYNC_CACHE_10, None, [2, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::WRITE_SAME_10, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0];
    op::UNMAP, None, [0, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
    op::MODE_SENSE_10, None, [8, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0];
    op::PR_IN, Some(0), [0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
    op::PR_IN, Some(1), [0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
    op::PR_IN, Some(2), [0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
    op::PR_IN, Some(3), [0x1f, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
    op::PR_OUT, Some(0), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::PR_OUT, Some(1), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::PR_OUT, Some(2), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::PR_OUT, Some(3), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::PR_OUT, Some(4), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::PR_OUT, Some(5), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::PR_OUT, Some(6), [0x1f, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0];
    op::READ_16, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::COMPARE_AND_WRITE, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0, 0];
    op::WRITE_16, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::ORWRITE, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::WRITE_VERIFY_16, None, [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::VERIFY_16, None, [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::PREFETCH_16, None, [2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::SYNC_CACHE_16, None, [2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::WRITE_SAME_16, None, [0x19, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::SERVICE_ACTION_IN, Some(cdb::SA_READ_CAPACITY_16), [0x1f, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::REPORT_LUNS, None, [0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::MAINTENANCE_IN, Some(cdb::SA_REPORT_SUPPORTED_OPCODES), [0x1f, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::READ_12, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::WRITE_12, None, [0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::WRITE_VERIFY_12, None, [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
    op::VERIFY_12, None, [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0];
}
