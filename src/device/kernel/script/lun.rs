//! The LUN behind the paths: its bytes, what it says of itself, and who is registered.
//!
//! One thing is done badly on purpose: reservation conflicts over `sda` are shown as newer kernels do, with a comment of
//! theirs in the host status, and over other paths as older ones do.

use std::collections::{HashMap, VecDeque};

use super::super::door::{SgAnswer, SgCommand, SgData};
use crate::device::scsi::transport::status;

pub const BLOCKS: u64 = 2048;

/// What the target keeps for each path that leads to it.
#[derive(Default)]
pub struct Nexus {
    pub attentions: VecDeque<(u8, u8)>,
    pub key: Option<u64>,
}

/// See the module's header.
pub struct Lun {
    pub bytes: Vec<u8>,
    pub serial: Vec<u8>,
    /// By the name of the disk that the kernel has there.
    pub nexuses: HashMap<String, Nexus>,
    reserved: bool,
}

impl Default for Lun {
    fn default() -> Self {
        Lun {
            bytes: vec![0; BLOCKS as usize * 512],
            serial: b"S1".to_vec(),
            nexuses: HashMap::new(),
            reserved: false,
        }
    }
}

/// CHECK CONDITION in fixed format.
pub fn check(key: u8, asc: u8, ascq: u8) -> SgAnswer {
    let mut sense = vec![0; 18];
    (sense[0], sense[2], sense[7], sense[12], sense[13]) = (0x70, key, 10, asc, ascq);
    SgAnswer { status: status::CHECK_CONDITION, driver_status: 8, sense, ..SgAnswer::default() }
}

pub fn with(status: u8) -> SgAnswer {
    SgAnswer { status, ..SgAnswer::default() }
}

impl Lun {
    pub fn nexus(&mut self, name: &str) -> &mut Nexus {
        self.nexuses.get_mut(name).unwrap()
    }

    /// What a command that arrives over this nexus does, and how it is answered.
    pub fn execute(&mut self, nexus: &str, command: &mut SgCommand<'_>) -> SgAnswer {
        let cdb = command.cdb;
        let opcode = cdb[0];
        let over = self.nexus(nexus);
        if opcode != 0x12
            && let Some((asc, ascq)) = over.attentions.pop_front()
        {
            return check(6, asc, ascq);
        }
        let mine = over.key;
        if self.reserved && mine.is_none() && matches!(opcode, 0x42 | 0x89 | 0x8A | 0x91 | 0x93) {
            // As newer kernels say it, and older ones: with their comment.
            let host_status = if nexus == "sda" { 0x11 } else { 0 };
            return SgAnswer { host_status, ..with(status::RESERVATION_CONFLICT) };
        }
        let lba = cdb.get(2..10).map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()));
        let from = (lba as usize).saturating_mul(512);
        match (opcode, &mut command.data) {
            (0x00, _) => with(status::GOOD),
            (0x91, _) => with(status::GOOD),
            (0x88, SgData::In(buf)) => {
                buf.copy_from_slice(&self.bytes[from..from + buf.len()]);
                with(status::GOOD)
            }
            (0x8A, SgData::Out(data)) => {
                self.bytes[from..from + data.len()].copy_from_slice(data);
                with(status::GOOD)
            }
            (0x89, SgData::Out(data)) => {
                assert_eq!((data.len(), cdb[13]), (1024, 1));
                if self.bytes[from..from + 512] != data[..512] {
                    return check(0xE, 0x1D, 0);
                }
                self.bytes[from..from + 512].copy_from_slice(&data[512..]);
                with(status::GOOD)
            }
            (0x93, SgData::Out(data)) => {
                let blocks = u32::from_be_bytes(cdb[10..14].try_into().unwrap()) as usize;
                for block in self.bytes[from..from + blocks * 512].chunks_mut(512) {
                    block.copy_from_slice(data);
                }
                with(status::GOOD)
            }
            (0x42, SgData::Out(list)) => {
                let at = u64::from_be_bytes(list[8..16].try_into().unwrap()) as usize * 512;
                let blocks = u32::from_be_bytes(list[16..20].try_into().unwrap()) as usize;
                self.bytes[at..at + blocks * 512].fill(0);
                with(status::GOOD)
            }
            (0x5F, SgData::Out(list)) => self.reserve_out(nexus, cdb[1], list),
            (_, SgData::In(buf)) => match self.describe(cdb) {
                Some(bytes) => {
                    let len = bytes.len().min(buf.len());
                    buf[..len].copy_from_slice(&bytes[..len]);
                    SgAnswer { residual: (buf.len() - len) as i32, ..SgAnswer::default() }
                }
                None => check(5, 0x24, 0),
            },
            _ => check(5, 0x20, 0),
        }
    }

    fn describe(&self, cdb: &[u8]) -> Option<Vec<u8>> {
        let page = |code: u8, body: &[u8]| {
            let mut bytes = vec![0, code, 0, body.len() as u8];
            bytes.extend(body);
            Some(bytes)
        };
        match (cdb[0], cdb[1], cdb[2]) {
            (0x12, 0, _) => {
                let mut bytes = vec![0; 8];
                bytes.extend(b"ACME    LUN of tests    0007");
                Some(bytes)
            }
            (0x12, 1, 0x80) => page(0x80, &self.serial),
            (0x12, 1, 0x83) => page(0x83, &[1, 3, 0, 4, 0x60, 1, 2, 3]),
            (0x9E, ..) => {
                let mut bytes = vec![0; 32];
                bytes[..8].copy_from_slice(&(BLOCKS - 1).to_be_bytes());
                bytes[8..12].copy_from_slice(&512u32.to_be_bytes());
                bytes[14] = 0x80;
                Some(bytes)
            }
            (0x1A, ..) => Some(vec![15, 0, 0, 0, 8, 10, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
            (0x5E, 0, _) => {
                let keys: Vec<u64> = self.nexuses.values().filter_map(|nexus| nexus.key).collect();
                let mut bytes = vec![0, 0, 0, 1, 0, 0, 0, keys.len() as u8 * 8];
                bytes.extend(keys.iter().flat_map(|key| key.to_be_bytes()));
                Some(bytes)
            }
            _ => None,
        }
    }

    fn reserve_out(&mut self, nexus: &str, action: u8, list: &[u8]) -> SgAnswer {
        let key = u64::from_be_bytes(list[..8].try_into().unwrap());
        let service = u64::from_be_bytes(list[8..16].try_into().unwrap());
        let over = self.nexus(nexus);
        let registered = over.key;
        match action & 0x1F {
            0 if registered.unwrap_or(0) != key => return with(status::RESERVATION_CONFLICT),
            0 | 6 => over.key = Some(service).filter(|key| *key != 0),
            _ if registered != Some(key) => return with(status::RESERVATION_CONFLICT),
            1 => self.reserved = true,
            4 | 5 => {
                for nexus in self.nexuses.values_mut() {
                    if nexus.key == Some(service) {
                        nexus.key = None;
                    }
                }
            }
            _ => return check(5, 0x24, 0),
        }
        if self.nexuses.values().all(|nexus| nexus.key.is_none()) {
            self.reserved = false;
        }
        with(status::GOOD)
    }
}
