use super::*;
use crate::device::open::{OpenOptions, open_device};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const SIZE_BYTES: u64 = 80 << 20;

struct Image {
    _file: tempfile::NamedTempFile,
    device: Arc<dyn BlockDevice>,
}

/// A sparse device that carries nothing, or what `fill` put there.
fn image(logical_block_bytes: u32, fill: impl FnOnce(&Path)) -> Image {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE_BYTES).unwrap();
    fill(file.path());
    let options = OpenOptions { logical_block_bytes: Some(logical_block_bytes), ..OpenOptions::default() };
    let device = open_device(file.path().to_str().unwrap(), options).unwrap();
    Image { _file: file, device }
}

fn put(path: &Path, offset_bytes: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    std::fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, offset_bytes).unwrap();
}

fn names(image: &Image) -> Vec<&'static str> {
    probe(&*image.device).unwrap().into_iter().map(|s| s.name).collect()
}

#[test]
fn nothing_is_found_on_zeroes_and_noise() {
    assert_eq!(names(&image(512, |_| {})), [""; 0]);
    assert_eq!(names(&image(4096, |_| {})), [""; 0]);
    // A boot signature without partitions is no partition table.
    assert_eq!(names(&image(512, |p| put(p, 510, b"\x55\xaa"))), [""; 0]);
    let noise: Vec<u8> = (0..1_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    assert_eq!(names(&image(512, |p| put(p, 0, &noise))), [""; 0]);
}

#[test]
fn every_entry_of_the_table_is_found_at_every_place() {
    for entry in MAGICS {
        for place in entry.places {
            let at = place.on(SIZE_BYTES).unwrap();
            let image = image(512, |p| {
                put(p, at, entry.magic);
                match entry.check {
                    Check::None => {}
                    Check::Follows { distance, bytes } => put(p, at + distance, bytes),
                    Check::Ext(4) => put(p, at + 0x60 - 0x38, &0x40u32.to_le_bytes()),
                    Check::Ext(3) => put(p, at + 0x5C - 0x38, &4u32.to_le_bytes()),
                    Check::Ext(_) => {}
                }
            });
            let found = probe(&*image.device).unwrap();
            assert_eq!(found, [Signature { name: entry.name, offset_bytes: at }], "{entry:?}");
        }
    }
}

#[test]
fn partition_tables_and_zfs() {
    let partition = [0x80, 1, 1, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0x40, 0, 0];
    let mbr = image(512, |p| {
        put(p, 446, &partition);
        put(p, 510, b"\x55\xaa");
    });
    assert_eq!(names(&mbr), ["MBR partition table"]);
    let fat = image(512, |p| {
        put(p, 82, b"FAT32   ");
        put(p, 446, &partition);
        put(p, 510, b"\x55\xaa");
    });
    assert_eq!(names(&fat), ["vfat"]);
    // The last label alone is enough, in the other byte order.
    let zfs = image(512, |p| put(p, SIZE_BYTES - 128 * 1024 + 5 * 1024, &0x00BA_B10Cu64.to_be_bytes()));
    assert_eq!(names(&zfs), ["zfs member"]);
}

#[test]
fn several_signatures_come_in_order() {
    let both = image(4096, |p| {
        put(p, 4096, b"EFI PART");
        put(p, 0, b"XFSB");
    });
    let found = probe(&*both.device).unwrap();
    assert_eq!(found[0], Signature { name: "xfs", offset_bytes: 0 });
    assert_eq!(found[1], Signature { name: "GPT partition table", offset_bytes: 4096 });
    assert_eq!(found.len(), 2);
}

#[test]
fn a_tiny_device_is_no_problem() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(512).unwrap();
    let options = OpenOptions { logical_block_bytes: Some(512), ..OpenOptions::default() };
    let device = open_device(file.path().to_str().unwrap(), options).unwrap();
    assert_eq!(probe(&*device).unwrap(), []);
}

/// Against the real tools, where they are installed.
#[test]
fn what_the_tools_make_is_found() {
    let cases: &[(&str, &[&str], &str)] = &[
        ("mkfs.ext4", &["-q", "-F"], "ext4"),
        ("mkfs.ext3", &["-q", "-F"], "ext3"),
        ("mkfs.ext2", &["-q", "-F"], "ext2"),
        ("mkswap", &["-q"], "swap"),
        ("mkfs.vfat", &[], "vfat"),
        ("mkfs.btrfs", &["-q", "-f"], "btrfs"),
    ];
    for (tool, arguments, expected) in cases {
        let mut ran = false;
        let image = image(512, |path| match Command::new(tool).args(*arguments).arg(path).output() {
            Ok(output) if output.status.success() => ran = true,
            Ok(output) => panic!("{tool}: {}", String::from_utf8_lossy(&output.stderr)),
            Err(_) => println!("{tool} is not installed: not compared with it"),
        });
        if ran {
            assert_eq!(names(&image), [*expected], "{tool}");
        }
    }
}
