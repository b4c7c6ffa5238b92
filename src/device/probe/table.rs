//! The signatures: what, the bytes, and where they stand. Data only.

/// Where a magic number stands.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// Bytes from the start of the device.
    Start(u64),
    /// Bytes before its end.
    BeforeEnd(u64),
    /// The end-of-device superblocks of Linux software RAID.
    Md10,
    Md090,
}

/// What else must be true.
#[derive(Clone, Copy, Debug)]
pub(super) enum Check {
    None,
    /// More bytes, this far after the start of the magic number.
    Follows {
        distance: u64,
        bytes: &'static [u8],
    },
    /// The features of ext2, ext3 or ext4.
    Ext(u32),
}

#[derive(Debug)]
pub(super) struct Magic {
    pub name: &'static str,
    /// At most 32 bytes.
    pub magic: &'static [u8],
    pub places: &'static [Place],
    pub check: Check,
}

const fn plain(name: &'static str, magic: &'static [u8], places: &'static [Place]) -> Magic {
    Magic { name, magic, places, check: Check::None }
}

use Place::{BeforeEnd, Start};

const ANY_PAGE_SIZE: &[Place] = &[Start(4086), Start(8182), Start(16374), Start(32758), Start(65526)];
const LVM2_SECTORS: &[Place] = &[Start(0), Start(512), Start(1024), Start(1536)];
const LUKS2_COPIES: &[Place] = &[
    Start(0x4000),
    Start(0x8000),
    Start(0x10000),
    Start(0x20000),
    Start(0x40000),
    Start(0x80000),
    Start(0x10_0000),
    Start(0x20_0000),
    Start(0x40_0000),
];
const EXT: &[Place] = &[Start(0x438)];

pub(super) const MAGICS: &[Magic] = &[
    // Filesystems.
    Magic { name: "ext4", magic: b"\x53\xef", places: EXT, check: Check::Ext(4) },
    Magic { name: "ext3", magic: b"\x53\xef", places: EXT, check: Check::Ext(3) },
    Magic { name: "ext2", magic: b"\x53\xef", places: EXT, check: Check::Ext(2) },
    plain("xfs", b"XFSB", &[Start(0)]),
    plain("btrfs", b"_BHRfS_M", &[Start(0x1_0040), Start(0x400_0040)]),
    plain("vfat", b"FAT12   ", &[Start(54)]),
    plain("vfat", b"FAT16   ", &[Start(54)]),
    plain("vfat", b"FAT32   ", &[Start(82)]),
    plain("ntfs", b"NTFS    ", &[Start(3)]),
    plain("exfat", b"EXFAT   ", &[Start(3)]),
    plain("BitLocker", b"-FVE-FS-", &[Start(3)]),
    plain("iso9660", b"CD001", &[Start(0x8001)]),
    plain("udf", b"BEA01", &[Start(0x8001)]),
    plain("f2fs", b"\x10\x20\xf5\xf2", &[Start(0x400), Start(0x1400)]),
    plain("bcachefs", b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef", &[Start(0x1018)]),
    plain("squashfs", b"hsqs", &[Start(0)]),
    plain("squashfs", b"sqsh", &[Start(0)]),
    plain("erofs", b"\xe2\xe1\xf5\xe0", &[Start(0x400)]),
    plain("jfs", b"JFS1", &[Start(0x8000)]),
    plain("reiserfs", b"ReIsErFs", &[Start(0x1_0034), Start(0x2034)]),
    plain("reiserfs", b"ReIsEr2Fs", &[Start(0x1_0034)]),
    plain("reiserfs", b"ReIsEr3Fs", &[Start(0x1_0034)]),
    plain("reiser4", b"ReIsEr4", &[Start(0x1_0000)]),
    // The revision follows the length of the header; two bytes of magic alone are weak.
    Magic {
        name: "nilfs2",
        magic: b"\x34\x34",
        places: &[Start(0x406)],
        check: Check::Follows { distance: 2, bytes: &[0x18, 0x01] },
    },
    plain("apfs", b"NXSB", &[Start(32)]),
    plain("hfs+", b"H+\x00\x04", &[Start(0x400)]),
    plain("hfsx", b"HX\x00\x05", &[Start(0x400)]),
    plain("ufs2", b"\x19\x01\x54\x19", &[Start(0x1_055C)]),
    plain("romfs", b"-rom1fs-", &[Start(0)]),
    // Filesystems for shared disks.
    plain("gfs2", b"\x01\x16\x19\x70\x00\x00\x00\x01", &[Start(0x1_0000)]),
    plain("ocfs2", b"OCFSV2", &[Start(0x400), Start(0x800), Start(0x1000), Start(0x2000)]),
    plain("vmfs member", b"\x0d\xd0\x01\xc0", &[Start(0x10_0000)]),
    plain("vmfs", b"\x5e\xf1\xab\x2f", &[Start(0x20_0000), Start(0x120_0000)]),
    plain("oracle asm disk", b"ORCLDISK", &[Start(32)]),
    plain("ceph bluestore", b"bluestore block device", &[Start(0)]),
    // Swap and hibernation.
    plain("swap", b"SWAPSPACE2", ANY_PAGE_SIZE),
    plain("swap", b"SWAP-SPACE", ANY_PAGE_SIZE),
    plain("suspended system", b"S1SUSPEND", ANY_PAGE_SIZE),
    plain("suspended system", b"S2SUSPEND", ANY_PAGE_SIZE),
    plain("suspended system", b"ULSUSPEND", ANY_PAGE_SIZE),
    plain("suspended system", b"LINHIB0001", ANY_PAGE_SIZE),
    // Volume managers, encryption, caches, replication.
    Magic {
        name: "LVM2 physical volume",
        magic: b"LABELONE",
        places: LVM2_SECTORS,
        check: Check::Follows { distance: 24, bytes: b"LVM2 001" },
    },
    plain("LUKS", b"LUKS\xba\xbe", &[Start(0)]),
    plain("LUKS", b"SKUL\xba\xbe", LUKS2_COPIES),
    plain("bcache", b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81", &[Start(0x1018)]),
    plain("stratis", b"!Stra0tis\x86\xff\x02^\x41rh", &[Start(0x204), Start(0x1204)]),
    plain("vdo", b"dmvdo001", &[Start(0)]),
    plain("drbd", b"\x83\x74\x02\x6b", &[BeforeEnd(4096 - 60)]),
    plain("drbd", b"\x83\x74\x02\x6c", &[BeforeEnd(4096 - 60)]),
    plain("drbd", b"\x83\x74\x02\x6d", &[BeforeEnd(4096 - 60)]),
    // RAID members.
    plain("Linux RAID member", b"\xfc\x4e\x2b\xa9", &[Start(0), Start(4096), Place::Md10, Place::Md090]),
    plain("Linux RAID member", b"\xa9\x2b\x4e\xfc", &[Place::Md090]),
    plain("Intel RAID member", b"Intel Raid ISM Cfg Sig. ", &[BeforeEnd(1024), BeforeEnd(8192)]),
    plain("DDF RAID member", b"\xde\x11\xde\x11", &[BeforeEnd(512), BeforeEnd(257 * 512)]),
    // Partition tables; MBR is judged in code.
    plain("GPT partition table", b"EFI PART", &[Start(512), Start(4096), BeforeEnd(512), BeforeEnd(4096)]),
];
