//! From the command to the end of the daemon.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, symlink};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{Place, assert_fails, can_mount, lunfs, mount, mount_in_foreground, until};

#[test]
fn a_signal_takes_the_mount_off() {
    if !can_mount() {
        return;
    }
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (place, mut child) = mount_in_foreground("signal");
        fs::write(place.dir().join("file"), b"x").expect("write");
        kill(Pid::from_raw(place.pid.expect("running")), signal).expect("signal");
        assert_eq!(child.wait().expect("it ends").code(), Some(0));
        assert!(!place.is_mounted());
        assert_eq!(fs::read_dir(place.dir()).expect("the old directory").count(), 0);
    }
}

#[test]
fn a_signal_ends_a_busy_mount_too() {
    if !can_mount() {
        return;
    }
    let (place, mut child) = mount_in_foreground("busy");
    fs::write(place.dir().join("file"), b"x").expect("write");
    let file = File::open(place.dir().join("file")).expect("open");
    let pid = Pid::from_raw(place.pid.expect("running"));
    kill(pid, Signal::SIGTERM).expect("signal");
    until("detached", || !place.is_mounted());
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).expect("who has it open keeps it for a while");
    assert!(place.is_alive());
    drop(file);
    assert_eq!(child.wait().expect("the last user leaves, the daemon too").code(), Some(0));
}

#[test]
fn a_lost_lease_silences_the_kernel() {
    if !can_mount() {
        return;
    }
    let (place, mut child) = mount_in_foreground("lost");
    let path = place.dir().join("file");
    fs::write(&path, vec![5; 8192]).expect("write");
    let file = File::open(&path).expect("open");
    let mut bytes = vec![0; 8192];
    file.read_exact_at(&mut bytes, 0).expect("read");
    // SAFETY: a new read-only mapping of a file two pages long, at an address of the kernel's choice.
    let map = unsafe {
        libc::mmap(std::ptr::null_mut(), 8192, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    // SAFETY: the mapping is 8192 bytes long.
    assert_eq!(unsafe { map.cast::<u8>().read_volatile() }, 5);
    let is_resident = || {
        let mut pages = [0u8; 2];
        // SAFETY: mincore writes one byte for each of the two pages.
        assert_eq!(unsafe { libc::mincore(map, 8192, pages.as_mut_ptr()) }, 0);
        pages[0] & 1 == 1
    };
    assert!(is_resident());
    place.try_pull("end the lease ended");
    assert_eq!(child.wait().expect("it ends").code(), Some(75));
    // Cached pages are gone from the open file and from the mapping.
    assert!(file.read_at(&mut bytes, 0).is_err(), "an open file must not show cached pages");
    assert!(!is_resident(), "a mapping must not show cached pages");
    assert!(fs::metadata(&path).is_err());
    assert!(fs::write(place.dir().join("new"), b"x").is_err());
    assert!(place.is_mounted(), "taken away, programs would write beneath it");
    // SAFETY: unmaps what was mapped above; nothing refers to it any more.
    assert_eq!(unsafe { libc::munmap(map, 8192) }, 0);
    drop(file);
    place.unmount();
    assert!(!place.is_mounted());
}

#[test]
fn failures_are_one_line_and_a_status() {
    if !can_mount() {
        return;
    }
    let place = Place::new("failures");
    let run = |arguments: &[&str]| {
        let mut command = lunfs();
        command.arg("mount");
        let mut command = place.mount_command(command);
        command.args(arguments).output().expect("it runs")
    };
    let dir = place.dir();
    let dir = dir.to_str().expect("text");
    assert_fails(&run(&["name", "/nonexistent/dir"]), 32, "No such file or directory");
    let file = place.scratch().join("file");
    fs::write(&file, b"").expect("write");
    assert_fails(&run(&["name", file.to_str().expect("text")]), 32, "not a directory");
    assert_fails(&run(&["-o", "r0", "name", dir]), 1, "r0");
    assert_fails(&run(&["-o", "threads=0", "name", dir]), 1, "threads=0");
    assert_eq!(run(&["-f", "-s", "-o", "r0", "name", dir]).status.code(), Some(0), "tolerated and faked");
    assert_eq!(run(&["name"]).status.code(), Some(1), "usage");
    assert_eq!(run(&["--nonsense", "name", dir]).status.code(), Some(1), "usage");
    let no_volume = lunfs()
        .env("LUNFS_RUN_DIR", place.run_dir())
        .args(["mount", "/dev/null", dir])
        .output()
        .expect("it runs");
    assert_fails(&no_volume, 32, "/dev/null");
    assert!(!place.is_mounted());
}

#[test]
fn a_volume_is_mounted_once_under_a_host_name() {
    if !can_mount() {
        return;
    }
    let place = mount("once", "host=a");
    let again = |host: &str, dir: &std::path::Path| {
        let mut command = lunfs();
        command.arg("mount").env("LUNFS_RUN_DIR", place.run_dir());
        command.args(["--memfs", "--host", host]).arg(&place.name).arg(dir).output().expect("it runs")
    };
    assert_fails(&again("a", &place.dir()), 32, "already mounted");
    let other = Place::new("other");
    assert_fails(&again("a", &other.dir()), 32, "already mounted by host name");
    assert!(!other.is_mounted());
    let second = again("b", &other.dir());
    assert!(second.status.success(), "another host name is another host: {second:?}");
    let umount = lunfs().env("LUNFS_RUN_DIR", place.run_dir()).arg("umount").arg(other.dir()).output();
    assert!(umount.expect("it runs").status.success());
    place.unmount();
    let third = again("a", &other.dir());
    assert!(third.status.success(), "free again: {third:?}");
    let umount = lunfs().env("LUNFS_RUN_DIR", place.run_dir()).arg("umount").arg(other.dir()).output();
    assert!(umount.expect("it runs").status.success());
}

#[test]
fn helpers_of_mount_and_umount() {
    if !can_mount() {
        return;
    }
    let mut place = Place::new("helper");
    let helper = |name: &str| {
        let path = place.scratch().join(name);
        symlink(env!("CARGO_BIN_EXE_lunfs"), &path).expect("symlink");
        let mut command = Command::new(path);
        command.env("LUNFS_RUN_DIR", place.run_dir());
        command
    };
    // As mount(8) calls it, with our hidden flags in between.
    let mut command = place.mount_command(helper("mount.fuse.lunfs"));
    command.arg(&place.name).arg(place.dir()).args(["-s", "-n", "-v", "-o", "rw,noatime,nodev"]);
    let output = command.output().expect("it runs");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let entry = lunfs::fuse::mountinfo::at(&place.dir()).expect("mountinfo").expect("mounted");
    assert_eq!(entry.fstype, "fuse.lunfs");
    assert_eq!(entry.source, place.name.as_str(), "people look a mount up by its source");
    fs::write(place.dir().join("file"), b"x").expect("write");
    let remount = |flags: &str| {
        let flags = format!("{flags},remount,relatime,user_id=0,group_id=0");
        let name = format!("mount.lunfs{}", flags.len());
        let path = place.scratch().join(&name);
        fs::create_dir(&path).expect("mkdir");
        let path = path.join("mount.lunfs");
        symlink(env!("CARGO_BIN_EXE_lunfs"), &path).expect("symlink");
        let output = Command::new(path).arg(&place.name).arg(place.dir()).args(["-o", &flags]).output();
        let output = output.expect("it runs");
        assert!(output.status.success(), "{output:?}");
    };
    remount("ro,nosuid");
    let refused = fs::write(place.dir().join("file"), b"y").expect_err("read-only now");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    remount("rw");
    fs::write(place.dir().join("file"), b"y").expect("read-write again");
    let mut umount = helper("umount.fuse.lunfs");
    umount.arg(place.dir());
    place.find_pid();
    let output = umount.output().expect("it runs");
    assert!(output.status.success(), "{output:?}");
    assert!(!place.is_mounted());
    assert!(!place.is_alive(), "the helper waits for the daemon");
}

#[test]
fn a_killed_daemon_frees_the_name() {
    if !can_mount() {
        return;
    }
    let place = mount("killed", "rw");
    kill(Pid::from_raw(place.pid.expect("running")), Signal::SIGKILL).expect("signal");
    until("gone", || !place.is_alive());
    assert!(fs::metadata(place.dir().join("x")).is_err(), "a dead mount answers errors");
    place.unmount();
}
