//! Two hosts share a volume inside one process: what a program does that uses LunFS as a library.
//!
//! ```text
//! cargo run --example two_hosts                    on a simulated LUN in memory
//! cargo run --example two_hosts -- /path/to/lun    on a file or device, which is FORMATTED
//! ```
//!
//! Each host opens the device, mounts, and works through `Operations`; nothing but the device lies between
//! them. The output shows the lock of one file wander.

use std::error::Error;
use std::sync::Arc;

use lunfs::device::BlockDevice;
use lunfs::device::open::{OpenOptions, open_device};
use lunfs::device::sim::{SimLun, SimLunOptions};
use lunfs::format::{FormatOptions, format};
use lunfs::fs::api::OpContext;
use lunfs::heartbeat::HostIdentity;
use lunfs::layout::geometry::lock_of_inode;
use lunfs::layout::lock::{LockKind, LockMode};
use lunfs::lock::LockId;
use lunfs::rt::HostTag;
use lunfs::types::InodeNo;
use lunfs::volume::{FencingMode, MountOptions, Volume};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn cx() -> OpContext {
    OpContext {
        uid: 0,
        gid: 0,
        pid: std::process::id(),
        may_wait: true,
        interrupt: None,
        meant: Default::default(),
    }
}

fn mount(device: Arc<dyn BlockDevice>, name: &str, number: u8) -> Result<Arc<Volume>> {
    // Of one machine, so the hosts differ by their name and uuid.
    let host = HostIdentity {
        name: name.into(),
        uuid: [number; 16],
        boot_id: [1; 16],
        pid: std::process::id(),
        pid_namespace: 0,
        is_gone: |_| false,
    };
    Ok(Volume::mount(
        device,
        MountOptions { host, read_only: false, cache_mib: 16, fencing: FencingMode::Auto },
    )?)
}

/// Who holds the lock of a file, as this host last saw it.
fn holder(volume: &Volume, ino: InodeNo) -> String {
    let id = LockId { kind: LockKind::Inode, at: lock_of_inode(ino) };
    match volume.locks().last_record(id).map(|r| (r.mode, r.sharers, r.swap_counter)) {
        Some((LockMode::Exclusive { owner, .. }, _, n)) => format!("exclusive, {owner}, swap {n}"),
        Some((LockMode::Shared, sharers, n)) => format!("shared by slots {sharers:?}, swap {n}"),
        Some((LockMode::Free, _, n)) => format!("free, swap {n}"),
        None => "never seen".into(),
    }
}

fn main() -> Result<()> {
    let [a, b] = match std::env::args().nth(1) {
        Some(path) => {
            let device =
                || -> Result<Arc<dyn BlockDevice>> { Ok(open_device(&path, OpenOptions::default())?) };
            [device()?, device()?]
        }
        None => {
            let lun = SimLun::new(SimLunOptions { size_bytes: 1 << 30, ..SimLunOptions::default() });
            [1, 2].map(|n| -> Arc<dyn BlockDevice> { lun.attach(HostTag(n)) })
        }
    };
    let report = format(&*a, &FormatOptions { label: "two hosts".into(), ..FormatOptions::default() })?;
    println!("formatted: {} with {} slots", report.superblock.volume, report.superblock.geometry.slots);

    let (one, two) = (mount(a, "one", 1)?, mount(b, "two", 2)?);
    println!("mounted:   \"one\" is {}, \"two\" is {}", one.heartbeat().me(), two.heartbeat().me());
    let (fs1, fs2) = (one.operations(), two.operations());
    let root = fs1.root();

    let ino = fs1.mknod(&cx(), root, b"greeting", 0o644, 0)?.value.ino;
    fs1.write(&cx(), ino, None, 0, b"hello from one", false)?;
    println!("\none writes the file    lock: {}", holder(&one, ino));

    let found = fs2.lookup(&cx(), root, b"greeting")?.value;
    let text = fs2.read(&cx(), found.ino, None, 0, 100)?.value;
    println!("two reads {:?}  lock: {}", String::from_utf8_lossy(&text), holder(&two, ino));

    fs2.write(&cx(), ino, None, 0, b", and two", true)?;
    println!("two appends to it      lock: {}", holder(&two, ino));
    let text = fs1.read(&cx(), ino, None, 0, 100)?.value;
    println!("one reads {:?}  lock: {}", String::from_utf8_lossy(&text), holder(&one, ino));

    let before = one.operation_counts();
    for _ in 0..1000 {
        fs1.read(&cx(), ino, None, 0, 100)?;
    }
    println!(
        "\n1000 reads of what \"one\" holds: {} commands",
        one.operation_counts().since(&before).commands()
    );
    let dir = fs1.mkdir(&cx(), root, b"private", 0o755)?.value.ino;
    let before = one.operation_counts();
    for i in 0..1000 {
        fs1.mknod(&cx(), dir, format!("file{i}").as_bytes(), 0o644, 0)?;
    }
    fs1.sync(&cx())?;
    let spent = one.operation_counts().since(&before);
    println!(
        "1000 files made and synced:     {} commands, {} compare-and-writes",
        spent.commands(),
        spent.swaps
    );

    for (name, volume) in [("one", &one), ("two", &two)] {
        let (all, idle) = (volume.operation_counts(), volume.door().idle_counts());
        println!(
            "\"{name}\" in all: {} reads, {} writes, {} compare-and-writes, {} flushes; beats and polls {}",
            all.reads,
            all.writes,
            all.swaps,
            all.flushes,
            idle.commands()
        );
    }
    one.leave()?;
    two.leave()?;
    println!("\nboth left; the volume is clean");
    Ok(())
}
