//! What stat(2) shows is the same on all hosts, at once.

use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::harness::{Cluster, rounds};

on_every_device! {
    3 hosts: attributes_are_equal;
    2 hosts: modes_change_at_once;
    3 hosts: special_files;
    2 hosts: times_never_go_back;
}

/// Everything but the time of access, which a reader doesn't write.
fn shown(path: &Path) -> [u64; 12] {
    let m = fs::symlink_metadata(path).expect("stat");
    let ns = |s: i64, ns: i64| (s as u64, ns as u64);
    let ((ms, mn), (cs, cn)) = (ns(m.mtime(), m.mtime_nsec()), ns(m.ctime(), m.ctime_nsec()));
    let (mode, uid, gid) = (u64::from(m.mode()), u64::from(m.uid()), u64::from(m.gid()));
    [m.ino(), mode, m.nlink(), uid, gid, m.rdev(), m.size(), m.blocks(), ms, mn, cs, cn]
}

fn same_everywhere(cluster: &Cluster, name: &str) -> [u64; 12] {
    let all: Vec<_> = cluster.paths(name).iter().map(|path| shown(path)).collect();
    assert!(all.iter().all(|s| *s == all[0]), "{name}: {all:?}");
    all[0]
}

fn attributes_are_equal(cluster: &Cluster) {
    let count = cluster.hosts.len() as u64;
    for n in 0..rounds(60) {
        let (mine, other) = (cluster.dir((n % count) as usize), cluster.dir(((n + 1) % count) as usize));
        let name = format!("f{}", n % 7);
        fs::write(mine.join(&name), vec![1; (n * 331) as usize]).expect("write");
        same_everywhere(cluster, &name);
        fs::set_permissions(other.join(&name), Permissions::from_mode((n as u32 * 73) & 0o7777))
            .expect("chmod");
        let seen = same_everywhere(cluster, &name);
        assert_eq!(seen[1] & 0o7777, (n * 73) & 0o7777);
        chown(mine.join(&name), Some(n as u32 * 1000), Some(u32::MAX - 5 - n as u32)).expect("chown");
        let seen = same_everywhere(cluster, &name);
        assert_eq!((seen[3], seen[4]), (n * 1000, u64::from(u32::MAX) - 5 - n));
        let time = UNIX_EPOCH + Duration::new(1_000_000 + n, 123_456_789 + n as u32);
        let file = File::options().write(true).open(other.join(&name)).expect("open");
        file.set_times(FileTimes::new().set_modified(time)).expect("utimens");
        drop(file);
        let seen = same_everywhere(cluster, &name);
        assert_eq!((seen[8], seen[9]), (1_000_000 + n, 123_456_789 + n), "nanoseconds count");
        same_everywhere(cluster, ".");
    }
}

fn modes_change_at_once(cluster: &Cluster) {
    let paths = cluster.paths("f");
    File::create(&paths[0]).expect("create");
    for n in 0..rounds(300) {
        let (mine, theirs) = (n as usize % 2, 1 - n as usize % 2);
        let mode = 0o100 + (n as u32 * 7) % 0o600;
        fs::set_permissions(&paths[mine], Permissions::from_mode(mode)).expect("chmod");
        assert_eq!(fs::metadata(&paths[theirs]).expect("stat").mode() & 0o7777, mode);
    }
}

fn special_files(cluster: &Cluster) {
    for (host, root) in cluster.hosts.iter().map(|h| &h.dir).enumerate() {
        let mode = Mode::from_bits_truncate(0o640);
        let major_minor = makedev(1, 3 + 2 * host as u64);
        mknod(&root.join(format!("char-{host}")), SFlag::S_IFCHR, mode, major_minor).expect("mknod");
        mknod(&root.join(format!("block-{host}")), SFlag::S_IFBLK, mode, makedev(259, 1_000_000))
            .expect("mknod");
        mknod(&root.join(format!("pipe-{host}")), SFlag::S_IFIFO, mode, 0).expect("mkfifo");
        mknod(&root.join(format!("socket-{host}")), SFlag::S_IFSOCK, mode, 0).expect("mknod");
    }
    cluster.each(|_, root| {
        for host in 0..cluster.hosts.len() {
            let stat = |kind: &str| fs::symlink_metadata(root.join(format!("{kind}-{host}"))).expect("stat");
            assert!(stat("char").file_type().is_char_device());
            assert_eq!(stat("char").rdev(), makedev(1, 3 + 2 * host as u64));
            assert!(stat("block").file_type().is_block_device());
            assert_eq!(stat("block").rdev(), makedev(259, 1_000_000));
            assert!(stat("pipe").file_type().is_fifo() && stat("socket").file_type().is_socket());
        }
    });
    // The device behind a node of another host works; a pipe is one machine's own, and here it is one machine.
    fs::write(cluster.dir(1).join("char-0"), b"swallowed").expect("null");
    assert_eq!(fs::read(cluster.dir(2).join("char-0")).expect("null"), b"");
    for (host, root) in cluster.hosts.iter().map(|h| &h.dir).enumerate() {
        let other = (host + 1) % cluster.hosts.len();
        for kind in ["char", "block", "pipe", "socket"] {
            fs::remove_file(root.join(format!("{kind}-{other}"))).expect("unlink");
        }
    }
    assert!(super::names::listing(cluster.dir(0)).is_empty());
}

/// Times of a file only grow while hosts write it in turn, and a reader changes none.
fn times_never_go_back(cluster: &Cluster) {
    let paths = cluster.paths("f");
    File::create(&paths[0]).expect("create");
    let mut last = (0, 0);
    for n in 0..rounds(100) {
        let (mine, theirs) = (n as usize % 2, 1 - n as usize % 2);
        fs::write(&paths[mine], n.to_string()).expect("write");
        assert_eq!(fs::read_to_string(&paths[theirs]).expect("read"), n.to_string());
        let m = fs::metadata(&paths[theirs]).expect("stat");
        let now = (m.mtime(), m.mtime_nsec());
        assert!(now >= last, "{now:?} after {last:?}");
        assert!((m.ctime(), m.ctime_nsec()) >= now);
        last = now;
    }
}
