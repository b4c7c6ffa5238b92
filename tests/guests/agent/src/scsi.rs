//! SCSI commands through the kernel by SG_IO, written without a look at LunFS's own: a second opinion.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use libc::c_void;

/// How long the kernel may take; it is no promise (virtio-scsi waits for ever).
const TIMEOUT_MS: u32 = 20_000;

const SG_DXFER_TO_DEV: i32 = -2;
const SG_DXFER_FROM_DEV: i32 = -3;

/// `struct sg_io_hdr` of <scsi/sg.h>.
#[repr(C)]
struct SgIo {
    interface_id: i32,
    direction: i32,
    cdb_len: u8,
    sense_len_max: u8,
    iovec_count: u16,
    data_len: u32,
    data: *mut c_void,
    cdb: *const u8,
    sense: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: i32,
    user: *mut c_void,
    status: u8,
    masked_status: u8,
    message_status: u8,
    sense_len: u8,
    host_status: u16,
    driver_status: u16,
    residual: i32,
    duration_ms: u32,
    info: u32,
}

nix::ioctl_readwrite_bad!(sg_io, 0x2285, SgIo);

/// What came of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Good,
    Miscompare,
    Conflict,
    /// A unit attention: additional sense code and qualifier.
    Attention(u8, u8),
    Other(String),
}

pub enum Data<'a> {
    Out(&'a [u8]),
    In(&'a mut [u8]),
}

pub struct Disk {
    file: File,
    pub block_bytes: usize,
}

/// Memory as direct I/O wants it, of whole pages.
#[derive(Clone)]
#[repr(align(4096))]
pub struct Page(pub [u8; 4096]);

impl Disk {
    pub fn open(path: &str) -> io::Result<Disk> {
        let file = File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
        let mut disk = Disk { file, block_bytes: 0 };
        let mut capacity = [0; 32];
        let cdb = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];
        disk.settled(&cdb, &mut capacity)?;
        let bytes = u32::from_be_bytes([capacity[8], capacity[9], capacity[10], capacity[11]]);
        disk.block_bytes = bytes as usize;
        Ok(disk)
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// A command that only reads, again until no unit attention is in its way.
    fn settled(&self, cdb: &[u8], data: &mut [u8]) -> io::Result<()> {
        for _ in 0..10 {
            match self.command(cdb, Data::In(data))? {
                Answer::Good => return Ok(()),
                Answer::Attention(..) => {}
                other => return Err(io::Error::other(format!("{other:?}"))),
            }
        }
        Err(io::Error::other("unit attentions without end"))
    }

    pub fn command(&self, cdb: &[u8], mut data: Data<'_>) -> io::Result<Answer> {
        let mut sense = [0u8; 64];
        let (direction, pointer, len) = match &mut data {
            Data::Out(bytes) => (SG_DXFER_TO_DEV, bytes.as_ptr().cast_mut().cast(), bytes.len()),
            Data::In(bytes) => (SG_DXFER_FROM_DEV, bytes.as_mut_ptr().cast(), bytes.len()),
        };
        let mut io = SgIo {
            interface_id: i32::from(b'S'),
            direction,
            cdb_len: cdb.len() as u8,
            sense_len_max: sense.len() as u8,
            iovec_count: 0,
            data_len: len as u32,
            data: pointer,
            cdb: cdb.as_ptr(),
            sense: sense.as_mut_ptr(),
            timeout_ms: TIMEOUT_MS,
            flags: 0,
            pack_id: 0,
            user: std::ptr::null_mut(),
            status: 0,
            masked_status: 0,
            message_status: 0,
            sense_len: 0,
            host_status: 0,
            driver_status: 0,
            residual: 0,
            duration_ms: 0,
            info: 0,
        };
        // SAFETY: the structure is the kernel's; all pointers are to live memory of the lengths given, and the kernel
        // writes to `data` only if the command reads.
        unsafe { sg_io(self.file.as_raw_fd(), &mut io)? };
        let sense = &sense[..usize::from(io.sense_len).min(sense.len())];
        Ok(judge(&io, sense))
    }

    pub fn compare_and_write(&self, lba: u64, old: &[u8], new: &[u8]) -> io::Result<Answer> {
        let mut cdb = [0; 16];
        cdb[0] = 0x89;
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb[13] = 1;
        self.command(&cdb, Data::Out(&[old, new].concat()))
    }

    pub fn unmap(&self, lba: u64, blocks: u32) -> io::Result<Answer> {
        let mut list = [0; 24];
        list[1] = 22;
        list[3] = 16;
        list[8..16].copy_from_slice(&lba.to_be_bytes());
        list[16..20].copy_from_slice(&blocks.to_be_bytes());
        self.command(&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], Data::Out(&list))
    }

    /// PERSISTENT RESERVE OUT of this action; the type is write exclusive, all registrants.
    pub fn reserve_out(&self, action: u8, key: u64, action_key: u64) -> io::Result<Answer> {
        let mut list = [0; 24];
        list[..8].copy_from_slice(&key.to_be_bytes());
        list[8..16].copy_from_slice(&action_key.to_be_bytes());
        self.command(&[0x5f, action, 7, 0, 0, 0, 0, 0, 24, 0], Data::Out(&list))
    }

    pub fn keys(&self) -> io::Result<Vec<u64>> {
        let mut list = [0; 256];
        self.settled(&[0x5e, 0, 0, 0, 0, 0, 0, 1, 0, 0], &mut list)?;
        let bytes = u32::from_be_bytes([list[4], list[5], list[6], list[7]]) as usize;
        let keys = list[8..].chunks_exact(8).take(bytes / 8);
        Ok(keys.map(|key| key.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))).collect())
    }
}

fn judge(io: &SgIo, sense: &[u8]) -> Answer {
    let (key, asc, ascq) = match sense.first().map(|code| code & 0x7f) {
        Some(0x70 | 0x71) if sense.len() >= 14 => (sense[2] & 15, sense[12], sense[13]),
        Some(0x72 | 0x73) if sense.len() >= 4 => (sense[1] & 15, sense[2], sense[3]),
        _ => (0, 0, 0),
    };
    match (io.host_status, io.status, key) {
        (0, 0, 0) => Answer::Good,
        (_, 0x18, _) => Answer::Conflict,
        (0, 2, 0x0e) if (asc, ascq) == (0x1d, 0) => Answer::Miscompare,
        (0, 2, 6) => Answer::Attention(asc, ascq),
        (host, status, key) => Answer::Other(format!(
            "status {status:#x}, sense {key:x}/{asc:02x}/{ascq:02x}, host {host:#x}, driver {:#x}",
            io.driver_status
        )),
    }
}
