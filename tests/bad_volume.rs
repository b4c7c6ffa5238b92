//! Garbage in any block of a volume that is then mounted and used: an error that names the block, never a
//! panic, never a hang. Checksums are repaired in half of the rounds, so that the checks behind them are met.
//!
//! Not for: what tools that only read make of garbage (`bad_input`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lunfs::device::BlockDevice;
use lunfs::device::sim::{SimLun, SimLunOptions};
use lunfs::format::{FormatOptions, format};
use lunfs::fs::api::{Answer, FsError, FsResult, OpContext, Operations, SetAttributes, Whence};
use lunfs::heartbeat::HostIdentity;
use lunfs::layout::seal;
use lunfs::rt::HostTag;
use lunfs::types::{InodeNo, Slot};
use lunfs::volume::{MountOptions, Volume};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCK: u64 = 4096;

fn cx() -> OpContext {
    OpContext { uid: 0, gid: 0, pid: 1, may_wait: true, interrupt: None, meant: Default::default() }
}

/// A context whose waits end after a while: a harmed lock may name a host that is dead.
fn impatient() -> OpContext {
    let flag: Arc<AtomicBool> = Arc::default();
    let set = flag.clone();
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1500));
        set.store(true, Ordering::Relaxed);
    });
    OpContext { interrupt: Some(flag), ..cx() }
}

fn options(name: &str) -> MountOptions {
    let uuid = [name.len() as u8; 16];
    let host = HostIdentity {
        name: name.into(),
        uuid,
        boot_id: [1; 16],
        pid: 1,
        pid_namespace: 1,
        is_gone: |_| false,
    };
    MountOptions { host, read_only: false, cache_mib: 4, fencing: Default::default() }
}

fn lun() -> SimLun {
    SimLun::new(SimLunOptions { size_bytes: 24 << 20, ..SimLunOptions::default() })
}

/// Makes something of every kind.
fn populate(fs: &dyn Operations) {
    let root = fs.root();
    let dir = fs.mkdir(&cx(), root, b"dir", 0o755).unwrap().value.ino;
    for i in 0..200 {
        let name = format!("a-name-that-takes-some-room-{i:04}");
        fs.create(&cx(), dir, name.as_bytes(), 0o644, libc::O_WRONLY).unwrap();
    }
    let file = fs.create(&cx(), root, b"file", 0o644, libc::O_RDWR).unwrap().value.0.ino;
    for i in 0..40u64 {
        fs.write(&cx(), file, None, i * 3 * BLOCK, &[7; 4096], false).unwrap();
    }
    let small = fs.create(&cx(), root, b"small", 0o644, libc::O_RDWR).unwrap().value.0.ino;
    fs.write(&cx(), small, None, 0, b"inline", false).unwrap();
    fs.symlink(&cx(), root, b"link", b"dir/x").unwrap();
}

/// Uses everything that `populate` made; errors are fine.
fn exercise(fs: &dyn Operations) -> Vec<String> {
    let context = impatient();
    let cx = || context.clone();
    let mut errors = Vec::new();
    let root = fs.root();
    let mut note = |result: Result<(), FsError>| {
        if let Err(e) = result {
            errors.push(e.to_string());
        }
    };
    fn ok<T>(result: FsResult<Answer<T>>) -> Result<(), FsError> {
        result.map(|_| ())
    }
    let find = |parent: InodeNo, name: &[u8]| fs.lookup(&cx(), parent, name).map(|a| a.value.ino);
    note(ok(fs.readdir(&cx(), root, 0, 1 << 20, true)));
    match find(root, b"dir") {
        Ok(dir) => {
            let mut cookie = 0;
            for _ in 0..50 {
                match fs.readdir(&cx(), dir, cookie, 4096, false).map(|a| a.value) {
                    Ok(list) => match list.last() {
                        Some(last) => cookie = last.cookie,
                        None => break,
                    },
                    Err(e) => {
                        note(Err(e));
                        break;
                    }
                }
            }
            for i in 0..200 {
                let name = format!("a-name-that-takes-some-room-{i:04}");
                note(find(dir, name.as_bytes()).map(|_| ()));
                if i % 3 == 0 {
                    note(ok(fs.unlink(&cx(), dir, name.as_bytes())));
                }
            }
            note(ok(fs.create(&cx(), dir, b"new", 0o644, libc::O_RDWR)));
            note(ok(fs.rename(&cx(), dir, b"new", root, b"moved", 0)));
        }
        Err(e) => note(Err(e)),
    }
    match find(root, b"file") {
        Ok(file) => {
            note(ok(fs.read(&cx(), file, None, 0, 1 << 20)));
            note(ok(fs.write(&cx(), file, None, 5000, &[1; 9000], false)));
            note(ok(fs.fallocate(&cx(), file, None, 0, 1 << 20, 0)));
            note(ok(fs.lseek(&cx(), file, 0, Whence::Hole)));
            note(ok(fs.setattr(&cx(), file, &SetAttributes { size: Some(100), ..Default::default() })));
        }
        Err(e) => note(Err(e)),
    }
    match find(root, b"small") {
        Ok(small) => {
            note(ok(fs.write(&cx(), small, None, 0, &[2; 5000], true)));
            note(ok(fs.unlink(&cx(), root, b"small")));
        }
        Err(e) => note(Err(e)),
    }
    match find(root, b"link") {
        Ok(link) => note(ok(fs.readlink(&cx(), link))),
        Err(e) => note(Err(e)),
    }
    note(fs.sync(&cx()));
    note(fs.statfs(&cx()).map(|_| ()));
    errors
}

/// Runs `work` on a thread of its own and fails if it does not end.
fn within(limit: Duration, what: &str, work: impl FnOnce() + Send + 'static) {
    let (done, wait) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        work();
        let _ = done.send(());
    });
    match wait.recv_timeout(limit) {
        Ok(()) => thread.join().unwrap(),
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("{what}: still running after {limit:?}"),
        Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
            let panic = thread.join().unwrap_err();
            let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
            panic!("{what}: panicked: {text}");
        }
    }
}

#[test]
fn garbage_in_any_block_gives_errors_and_nothing_worse() {
    let first = lun();
    let device: Arc<dyn BlockDevice> = first.attach(HostTag(0));
    format(&*device, &FormatOptions::default()).unwrap();
    let volume = Volume::mount(device, options("maker")).unwrap();
    populate(&*volume.operations());
    volume.leave().unwrap();
    let snapshot = first.snapshot();
    // Only blocks that are in use are worth harming; what journals hold is settled.
    let geometry = volume.superblock().geometry;
    let journals = geometry.journal(Slot(0)).0..geometry.journal(Slot(geometry.slots)).0;
    let blocks: Vec<u64> = (0..(24 << 20) / BLOCK)
        .filter(|b| !journals.contains(b))
        .filter(|b| first.contents(b * BLOCK, BLOCK as usize).iter().any(|byte| *byte != 0))
        .collect();
    assert!(blocks.len() > 200, "{}", blocks.len());
    let seed: u64 =
        std::env::var("LUNFS_SIM_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    println!("LUNFS_SIM_SEED={seed}");
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut refused = 0;
    let mut failed = 0;
    let rounds = std::env::var("LUNFS_TEST_ROUNDS").ok().and_then(|s| s.parse().ok()).unwrap_or(400);
    for round in 0..rounds {
        let lun = lun();
        lun.restore(&snapshot);
        let mut what = format!("LUNFS_SIM_SEED={seed} round {round}:");
        for _ in 0..rng.random_range(1..4) {
            let at = blocks[rng.random_range(0..blocks.len())] * BLOCK;
            let mut block = lun.contents(at, BLOCK as usize);
            match rng.random_range(0..4) {
                0 => rng.fill(&mut block[..]),
                1 => block.fill(0),
                2 => {
                    for _ in 0..rng.random_range(1..8) {
                        let i = rng.random_range(0..block.len());
                        block[i] = rng.random();
                    }
                }
                _ => {
                    // A header field or what follows it, with the checksum made right again.
                    for _ in 0..rng.random_range(1..6) {
                        let i = rng.random_range(16..512);
                        block[i] = rng.random();
                    }
                }
            }
            if rng.random_bool(0.6) {
                let record = matches!(&block[..4], b"LnLK" | b"LnHB" | b"LnDB");
                let end = if record { 512 } else { block.len() };
                seal(&mut block[..end]);
            }
            what.push_str(&format!(" block {:#x}", at / BLOCK));
            lun.overwrite(at, &block);
        }
        let device: Arc<dyn BlockDevice> = lun.attach(HostTag(1));
        match Volume::mount(device, options("user-two")) {
            Err(e) => {
                assert!(!e.to_string().is_empty());
                refused += 1;
            }
            Ok(volume) => {
                let (fs, left) = (volume.operations(), volume.clone());
                let label = what.clone();
                within(Duration::from_secs(20), &label, move || {
                    let errors = exercise(&*fs);
                    if std::env::var_os("LUNFS_VERBOSE").is_some() && !errors.is_empty() {
                        println!("{what}: {errors:?}");
                    }
                    let _ = left.leave();
                });
                failed += 1;
            }
        }
    }
    println!("{refused} mounts refused, {failed} used");
    assert!(refused > 0 && failed > 0);
}
