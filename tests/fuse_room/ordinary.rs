//! What every filesystem must do, through the kernel: the one in memory and a real volume.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::statvfs::statvfs;

use super::harness::{Backing, Place, can_mount, lunfs, mount_on, native};

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).expect("opens")
}

#[test]
fn ordinary_operations() {
    if !can_mount() {
        return;
    }
    for options in ["rw", "kernel=old", "threads=1"] {
        ordinary(options, Backing::Memory);
    }
}

#[test]
fn ordinary_operations_on_a_volume() {
    if !can_mount() {
        return;
    }
    for (options, bytes) in [("rw", 512), ("rw", 4096), ("kernel=old", 512), ("threads=1", 4096)] {
        ordinary(options, Backing::Image(bytes));
    }
}

fn ordinary(options: &str, backing: Backing) {
    {
        let place = mount_on("ordinary", options, backing);
        let dir = place.dir();
        files(&dir);
        directories(&dir);
        special_files(&dir);
        names(&dir);
        open_modes(&dir);
        sparse(&dir);
        shared_mapping(&dir);
        usage(&dir);
        place.unmount();
        assert!(!place.is_mounted() && !place.is_alive());
    }
}

fn files(dir: &Path) {
    let path = dir.join("file");
    let content: Vec<u8> = (0..3_000_001u32).map(|i| (i % 251) as u8).collect();
    fs::write(&path, &content).expect("write");
    assert_eq!(fs::read(&path).expect("read"), content);
    let file = read_write(&path);
    file.set_len(5000).expect("shorten");
    assert_eq!(fs::metadata(&path).expect("stat").len(), 5000);
    file.set_len(10_000).expect("lengthen");
    let mut bytes = fs::read(&path).expect("read");
    assert_eq!(bytes.split_off(5000), vec![0; 5000], "new bytes are zero");
    assert_eq!(bytes, content[..5000]);
    file.sync_all().expect("fsync");
    file.sync_data().expect("fdatasync");
    // Open and unlinked.
    fs::remove_file(&path).expect("unlink");
    file.write_all_at(b"still here", 0).expect("write to an unlinked file");
    assert_eq!(file.metadata().expect("fstat").nlink(), 0);
    let mut start = [0; 10];
    file.read_exact_at(&mut start, 0).expect("read of an unlinked file");
    assert_eq!(&start, b"still here");
    assert_eq!(fs::metadata(&path).expect_err("gone").kind(), ErrorKind::NotFound);
}

fn directories(dir: &Path) {
    fs::create_dir_all(dir.join("d/e/f")).expect("mkdir");
    assert_eq!(fs::metadata(dir.join("d")).expect("stat").nlink(), 3);
    assert_eq!(fs::create_dir(dir.join("d")).expect_err("exists").kind(), ErrorKind::AlreadyExists);
    fs::write(dir.join("d/a"), b"a").expect("write");
    fs::write(dir.join("d/b"), b"b").expect("write");
    fs::rename(dir.join("d/a"), dir.join("d/b")).expect("rename over a file");
    assert_eq!(fs::read(dir.join("d/b")).expect("read"), b"a");
    fs::rename(dir.join("d/e"), dir.join("moved")).expect("rename of a directory");
    assert!(dir.join("moved/f").is_dir());
    let into_itself = fs::rename(dir.join("moved"), dir.join("moved/f/g")).expect_err("into itself");
    assert_eq!(into_itself.raw_os_error(), Some(libc::EINVAL));
    assert_eq!(fs::remove_dir(dir.join("moved")).expect_err("full").raw_os_error(), Some(libc::ENOTEMPTY));
    fs::hard_link(dir.join("d/b"), dir.join("hard")).expect("link");
    assert_eq!(fs::metadata(dir.join("hard")).expect("stat").nlink(), 2);
    assert_eq!(
        fs::metadata(dir.join("hard")).expect("stat").ino(),
        fs::metadata(dir.join("d/b")).expect("stat").ino()
    );
    fs::remove_dir_all(dir.join("moved")).expect("rm -r");
    fs::remove_dir_all(dir.join("d")).expect("rm -r");
    assert_eq!(fs::read(dir.join("hard")).expect("the other name stays"), b"a");
    fs::remove_file(dir.join("hard")).expect("unlink");
    // The group of a directory with the set-group-id bit is inherited.
    fs::create_dir(dir.join("group")).expect("mkdir");
    std::os::unix::fs::chown(dir.join("group"), None, Some(4242)).expect("chown");
    fs::set_permissions(dir.join("group"), fs::Permissions::from_mode(0o2775)).expect("chmod");
    fs::create_dir(dir.join("group/sub")).expect("mkdir");
    let sub = fs::metadata(dir.join("group/sub")).expect("stat");
    assert_eq!((sub.gid(), sub.mode() & 0o2000), (4242, 0o2000));
    fs::remove_dir_all(dir.join("group")).expect("rm -r");
    assert_eq!(fs::read_dir(dir).expect("readdir").count(), 0);
}

fn special_files(dir: &Path) {
    symlink("some/where", dir.join("link")).expect("symlink");
    assert_eq!(fs::read_link(dir.join("link")).expect("readlink"), Path::new("some/where"));
    mknod(&dir.join("pipe"), SFlag::S_IFIFO, Mode::from_bits_truncate(0o600), 0).expect("mkfifo");
    mknod(&dir.join("null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3)).expect("mknod");
    assert!(fs::metadata(dir.join("pipe")).expect("stat").file_type().is_fifo());
    let null = fs::metadata(dir.join("null")).expect("stat");
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), makedev(1, 3));
    fs::write(dir.join("null"), b"swallowed").expect("device nodes work");
    for name in ["link", "pipe", "null"] {
        fs::remove_file(dir.join(name)).expect("unlink");
    }
}

fn names(dir: &Path) {
    let longest = "n".repeat(255);
    fs::write(dir.join(&longest), b"x").expect("255 bytes are a name");
    assert_eq!(fs::read(dir.join(&longest)).expect("read"), b"x");
    fs::remove_file(dir.join(&longest)).expect("unlink");
    let too_long = dir.join("n".repeat(256));
    for error in [
        fs::write(&too_long, b"x").expect_err("create"),
        fs::metadata(&too_long).expect_err("lookup"),
        fs::create_dir(&too_long).expect_err("mkdir"),
        symlink("a", &too_long).expect_err("symlink"),
    ] {
        assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
    }
    let odd = std::ffi::OsStr::from_bytes(b"\xff\xfe new\nline");
    fs::write(dir.join(odd), b"x").expect("any bytes are a name");
    let listed = fs::read_dir(dir).expect("readdir").next().expect("one").expect("entry");
    assert_eq!(listed.file_name(), odd);
    fs::remove_file(dir.join(odd)).expect("unlink");
}

fn open_modes(dir: &Path) {
    let path = dir.join("modes");
    let exclusive = || OpenOptions::new().write(true).create_new(true).open(&path);
    let mut file = exclusive().expect("new");
    assert_eq!(exclusive().expect_err("O_EXCL").kind(), ErrorKind::AlreadyExists);
    file.write_all(b"0123456789").expect("write");
    let mut append = OpenOptions::new().append(true).open(&path).expect("O_APPEND");
    append.write_all(b"abc").expect("append");
    // Another descriptor makes the file longer; the next append goes to the true end.
    file.write_all_at(b"long", 20).expect("write");
    append.write_all(b"end").expect("append");
    let content = fs::read(&path).expect("read");
    assert_eq!(content, b"0123456789abc\0\0\0\0\0\0\0longend");
    let truncated = OpenOptions::new().write(true).truncate(true).open(&path).expect("O_TRUNC");
    assert_eq!(truncated.metadata().expect("fstat").len(), 0);
    fs::write(&path, b"").expect("empty");
    let directory = OpenOptions::new().write(true).open(dir).expect_err("a directory is no file");
    assert_eq!(directory.raw_os_error(), Some(libc::EISDIR));
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path);
    direct.expect("O_DIRECT is allowed");
    // Times, also before 1970.
    let file = read_write(&path);
    let early = std::time::UNIX_EPOCH - std::time::Duration::from_millis(1500);
    file.set_times(fs::FileTimes::new().set_modified(early).set_accessed(early)).expect("utimens");
    assert_eq!(file.metadata().expect("fstat").modified().expect("mtime"), early);
    fs::remove_file(&path).expect("unlink");
}

fn sparse(dir: &Path) {
    let path = dir.join("sparse");
    let mut file = read_write(&path);
    file.write_all_at(b"data", 1 << 40).expect("write far out");
    let meta = file.metadata().expect("fstat");
    assert_eq!(meta.len(), (1 << 40) + 4);
    assert!(meta.blocks() <= 16, "holes take no space");
    let seek = |whence, from| nix::unistd::lseek(&file, from, whence).map(|at| at as u64);
    use nix::unistd::Whence::{SeekData, SeekHole};
    assert_eq!(seek(SeekHole, 0), Ok(0));
    assert_eq!(seek(SeekData, 0), Ok(1 << 40));
    assert_eq!(seek(SeekHole, 1 << 40), Ok((1 << 40) + 4));
    assert_eq!(seek(SeekData, (1 << 40) + 4), Err(nix::errno::Errno::ENXIO));
    use nix::fcntl::{FallocateFlags, fallocate};
    fallocate(&file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, 8192).expect("allocate");
    file.write_all_at(&[7; 8192], 0).expect("write");
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, punch, 100, 4096).expect("punch");
    let mut bytes = vec![1; 8192];
    file.seek(SeekFrom::Start(0)).expect("seek");
    file.read_exact(&mut bytes).expect("read");
    assert!(bytes[..100].iter().chain(&bytes[4196..]).all(|b| *b == 7));
    assert!(bytes[100..4196].iter().all(|b| *b == 0));
    fs::remove_file(&path).expect("unlink");
}

fn shared_mapping(dir: &Path) {
    let path = dir.join("mapped");
    let file = read_write(&path);
    file.set_len(8192).expect("size");
    // SAFETY: a new mapping at an address of the kernel's choice, of a file that is two pages long.
    let map = unsafe {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        libc::mmap(std::ptr::null_mut(), 8192, protection, flags, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED, "shared writable mapping: {}", std::io::Error::last_os_error());
    // SAFETY: the mapping is 8192 bytes long, writable, and used by this thread only.
    unsafe {
        std::slice::from_raw_parts_mut(map.cast::<u8>(), 8192)[4000..4200].fill(9);
        assert_eq!(libc::msync(map, 8192, libc::MS_SYNC), 0);
        assert_eq!(libc::munmap(map, 8192), 0);
    }
    let mut bytes = vec![0; 8192];
    file.read_exact_at(&mut bytes, 0).expect("read");
    assert!(bytes[4000..4200].iter().all(|b| *b == 9) && bytes[3999] == 0 && bytes[4200] == 0);
    fs::remove_file(&path).expect("unlink");
}

fn usage(dir: &Path) {
    let usage = statvfs(dir).expect("statfs");
    assert_eq!(usage.block_size(), 4096);
    assert_eq!(usage.name_max(), 255);
    assert!(usage.blocks() > 100_000 && usage.blocks_free() <= usage.blocks());
}

#[test]
fn a_listing_of_ten_thousand_with_positions() {
    if !can_mount() {
        return;
    }
    for backing in [Backing::Memory, Backing::Image(512)] {
        listing(backing);
    }
}

fn listing(backing: Backing) {
    let place = mount_on("listing", "rw", backing);
    let dir = place.dir();
    let wanted: BTreeSet<String> = (0..10_000).map(|i| format!("entry-{i:05}")).collect();
    for name in &wanted {
        create(&place, name);
    }
    let listed: Vec<_> = fs::read_dir(&dir).expect("readdir").map(|e| e.expect("entry")).collect();
    assert_eq!(listed.len(), 10_000, "each once");
    let names: BTreeSet<String> =
        listed.iter().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    assert_eq!(names, wanted);
    assert!(listed.iter().take(500).all(|e| e.metadata().expect("stat").is_file()));
    drop(listed);
    assert_eq!(fs::read_dir(&dir).expect("readdir").count(), 10_000);
    if backing == Backing::Memory {
        // The names of such a listing could outlive the directory's lock (see the transport).
        assert_eq!(place.calls("readdirplus"), 0);
    }
    positions(&place);
    place.unmount();
}

/// By another host where that can be had, so that the kernel has to be told.
fn create(place: &Place, name: &str) {
    match place.backing {
        Backing::Memory => drop(place.pull(&format!("create {name}"))),
        Backing::Image(_) => drop(File::create(place.dir().join(name)).expect("create")),
    }
}

fn remove(place: &Place, name: &str) {
    match place.backing {
        Backing::Memory => drop(place.pull(&format!("remove {name}"))),
        Backing::Image(_) => fs::remove_file(place.dir().join(name)).expect("unlink"),
    }
}

/// Positions stay good while names come and go.
fn positions(place: &Place) {
    let path = CString::new(place.dir().as_os_str().as_bytes()).expect("no NUL");
    // SAFETY: the path is NUL-terminated; the stream is used by this thread only and closed once; entries
    // are read before the next call.
    unsafe {
        let stream = libc::opendir(path.as_ptr());
        assert!(!stream.is_null());
        let next = || {
            let entry = libc::readdir64(stream);
            (!entry.is_null())
                .then(|| std::ffi::CStr::from_ptr((*entry).d_name.as_ptr()).to_string_lossy().into_owned())
        };
        for _ in 0..5000 {
            next().expect("entries");
        }
        let position = libc::telldir(stream);
        let here = next().expect("an entry");
        let after: Vec<String> = std::iter::from_fn(next).collect();
        // One gone and one added, wherever they lie: neither may shift what follows the position.
        let gone = if here == "entry-00003" { "entry-00004" } else { "entry-00003" };
        remove(place, gone);
        create(place, "zzz");
        libc::seekdir(stream, position);
        assert_eq!(next().as_deref(), Some(here.as_str()));
        let again: Vec<String> = std::iter::from_fn(next).filter(|name| name != "zzz").collect();
        let expected: Vec<String> = after.into_iter().filter(|name| name != gone).collect();
        assert_eq!(again, expected);
        libc::closedir(stream);
    }
}

#[test]
fn set_user_id_bits_go_when_somebody_else_writes() {
    if !can_mount() {
        return;
    }
    for (options, backing) in [
        ("rw", Backing::Memory),
        ("kernel=old", Backing::Memory),
        ("rw", Backing::Image(512)),
        ("kernel=old", Backing::Image(4096)),
    ] {
        let place = mount_on("suid", options, backing);
        let make = |name: &str| {
            let path = place.dir().join(name);
            fs::write(&path, b"#!/bin/sh\n").expect("write");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).expect("chmod");
            path
        };
        let mode = |path: &Path| fs::metadata(path).expect("stat").mode() & 0o7777;
        fs::set_permissions(place.dir(), fs::Permissions::from_mode(0o777)).expect("chmod");
        fs::set_permissions(place.scratch(), fs::Permissions::from_mode(0o755)).expect("chmod");
        for script in ["echo x >> $1", ": > $1", "truncate -s 5 $1", "fallocate -l 50000 $1"] {
            let path = make("file");
            let status = std::process::Command::new("sh")
                .args(["-c", script, "sh"])
                .arg(&path)
                .uid(65534)
                .gid(65534)
                .status()
                .expect("sh runs");
            assert!(status.success(), "{script}");
            assert_eq!(mode(&path), 0o777, "{options}: {script}");
        }
        let path = make("file");
        OpenOptions::new().append(true).open(&path).expect("open").write_all(b"x").expect("root writes");
        assert_eq!(mode(&path), 0o6777, "root keeps the bits");
        std::os::unix::fs::chown(&path, Some(1000), None).expect("chown");
        assert_eq!(mode(&path), 0o777, "a new owner doesn't get them");
    }
}

fn without_a_name(dir: &Path, flags: i32) -> File {
    let flags = libc::O_TMPFILE | flags;
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .mode(0o640)
        .open(dir)
        .expect("no name needed")
}

fn give_name(file: &File, path: &Path) -> nix::Result<()> {
    let number = format!("/proc/self/fd/{}", file.as_raw_fd());
    nix::unistd::linkat(AT_FDCWD, number.as_str(), AT_FDCWD, path, AtFlags::AT_SYMLINK_FOLLOW)
}

/// O_TMPFILE: a file gets its name when it is whole, or never had one.
#[test]
fn files_without_a_name() {
    if !can_mount() || !native() {
        return;
    }
    for bytes in [512, 4096] {
        let place = mount_on("unnamed", "rw", Backing::Image(bytes));
        let dir = place.dir().join("d");
        fs::create_dir(&dir).expect("mkdir");
        let file = without_a_name(&dir, 0);
        file.write_all_at(&[7; 10_000], 0).expect("write");
        let before = file.metadata().expect("stat");
        assert_eq!((before.nlink(), before.len(), before.mode() & 0o7777), (0, 10_000, 0o640));
        assert_eq!(fs::read_dir(&dir).expect("listing").count(), 0);
        give_name(&file, &dir.join("named")).expect("link");
        assert_eq!(fs::read(dir.join("named")).expect("read"), [7; 10_000]);
        assert_eq!(give_name(&file, &dir.join("named")), Err(Errno::EEXIST));
        give_name(&file, &dir.join("again")).expect("link");
        let after = file.metadata().expect("stat");
        assert_eq!((after.nlink(), after.ino()), (2, before.ino()));
        drop(file);
        fs::remove_file(dir.join("again")).expect("unlink");

        // Its last name gone, it never gets one again.
        let file = without_a_name(&dir, 0);
        give_name(&file, &dir.join("gone")).expect("link");
        fs::remove_file(dir.join("gone")).expect("unlink");
        assert_eq!(give_name(&file, &dir.join("back")), Err(Errno::ENOENT));
        drop(file);
        let file = without_a_name(&dir, libc::O_EXCL);
        assert_eq!(give_name(&file, &dir.join("never")), Err(Errno::ENOENT));
        file.write_all_at(&[8; 1 << 20], 0).expect("write");
        drop(file);

        drop(without_a_name(&dir, 0));
        assert_eq!(fs::read_dir(&dir).expect("listing").count(), 1);
        place.unmount();
        let checked = lunfs().args(["fsck", "-n"]).arg(&place.name).output().expect("fsck runs");
        assert_eq!(checked.status.code(), Some(0), "{checked:?}");
    }
}

/// A kernel told so tells programs when a file was made.
#[test]
fn the_time_of_birth_stays() {
    if !can_mount() || !native() {
        return;
    }
    for backing in [Backing::Memory, Backing::Image(512)] {
        let place = mount_on("birth", "rw", backing);
        let path = place.dir().join("f");
        fs::write(&path, b"f").expect("write");
        let born = || fs::metadata(&path).expect("stat").created().expect("a time of birth");
        let first = born();
        let age = SystemTime::now().duration_since(first).unwrap_or_default();
        assert!(age < Duration::from_secs(60), "{age:?}");
        fs::write(&path, b"more").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
        let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1000);
        File::options().write(true).open(&path).and_then(|f| f.set_modified(long_ago)).expect("utimes");
        let metadata = fs::metadata(&path).expect("stat");
        assert_eq!((born(), metadata.modified().expect("mtime")), (first, long_ago));
        assert_eq!((metadata.len(), metadata.mode() & 0o7777), (4, 0o600));
        place.unmount();
    }
}
