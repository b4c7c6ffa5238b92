//! The pieces below the kernel's door, in one process: what an operation costs without FUSE.
//!
//! `cargo bench` measures; run in any other way (`cargo test --benches`) it only shows that all of it works.
//! Through the kernel, and against other filesystems: `lunfs bench`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use lunfs::device::BlockDevice;
use lunfs::device::open::{OpenOptions, open_device};
use lunfs::device::sim::{SimLun, SimLunOptions};
use lunfs::format::{FormatOptions, format};
use lunfs::fs::api::{OpContext, Operations};
use lunfs::heartbeat::HostIdentity;
use lunfs::rt::HostTag;
use lunfs::volume::{MountOptions, Volume};

const SIZE_BYTES: u64 = 4 << 30;

fn cx() -> OpContext {
    OpContext { uid: 0, gid: 0, pid: 1, may_wait: true, interrupt: None, meant: Default::default() }
}

fn mount(device: Arc<dyn BlockDevice>, n: u8) -> Arc<Volume> {
    let host = HostIdentity {
        name: format!("host-{n}"),
        uuid: [n; 16],
        boot_id: [9; 16],
        pid: 1,
        pid_namespace: 1,
        is_gone: |_| false,
    };
    Volume::mount(device, MountOptions { host, read_only: false, cache_mib: 64, fencing: Default::default() })
        .expect("a mount")
}

/// Prints one line; `act` is called with 0, 1, 2, ...
fn time(name: &str, count: u64, mut act: impl FnMut(u64)) {
    let mut times = Histogram::<u64>::new_with_bounds(1, 100_000_000_000, 3).expect("a histogram");
    let begun = Instant::now();
    for n in 0..count {
        let begun = Instant::now();
        act(n);
        times.saturating_record(begun.elapsed().as_nanos() as u64);
    }
    let rate = count as f64 / begun.elapsed().as_secs_f64();
    let us = |quantile| times.value_at_quantile(quantile) as f64 / 1e3;
    println!("{name:<44} {rate:>12.0}/s  median {:>9.2} us  p99 {:>9.2} us", us(0.5), us(0.99));
}

/// Two hosts on one device.
fn pieces(on: &str, devices: [Arc<dyn BlockDevice>; 2], scale: u64) {
    let [a, b] = devices;
    format(&*a, &FormatOptions::default()).expect("a volume");
    let (va, vb) = (mount(a, 1), mount(b, 2));
    let (fa, fb): (Arc<dyn Operations>, Arc<dyn Operations>) = (va.operations(), vb.operations());
    let root = fa.root();
    let own = fa.mkdir(&cx(), root, b"own", 0o755).expect("a directory").value.ino;
    let create = |fs: &Arc<dyn Operations>, parent, name: &str| {
        fs.create(&cx(), parent, name.as_bytes(), 0o644, libc::O_RDWR).expect("a file").value
    };
    time(&format!("{on}: create, cached"), 20 * scale, |n| {
        create(&fa, own, &format!("f{n}"));
    });
    time(&format!("{on}: lookup, cached"), 100 * scale, |n| {
        // Few enough for the cache, whose blocks hold one inode each.
        let name = format!("f{}", n % (5 * scale));
        fa.lookup(&cx(), own, name.as_bytes()).expect("the file");
    });
    time(&format!("{on}: journal commit of one create"), scale, |n| {
        create(&fa, own, &format!("c{n}"));
        fa.sync(&cx()).expect("a commit");
    });
    let shared = create(&fa, root, "shared").0.ino;
    let write = |fs: &Arc<dyn Operations>, n: u64| {
        fs.write(&cx(), shared, None, 0, &n.to_le_bytes(), false).expect("a write");
    };
    (0..8).for_each(|n| write(if n % 2 == 0 { &fa } else { &fb }, n));
    let before = va.operation_counts().plus(&vb.operation_counts());
    time(&format!("{on}: lock hand-over by a write"), scale, |n| {
        write(if n % 2 == 0 { &fa } else { &fb }, n);
    });
    let spent = va.operation_counts().plus(&vb.operation_counts()).since(&before);
    let each = |count: u64| count as f64 / scale as f64;
    println!(
        "{:<44} {:.2} compare-and-writes, {:.2} commands each",
        "",
        each(spent.swaps),
        each(spent.commands())
    );
    va.leave().expect("left");
    vb.leave().expect("left");
}

fn main() {
    let scale = if std::env::args().any(|argument| argument == "--bench") { 1000 } else { 10 };
    let lun = SimLun::new(SimLunOptions { size_bytes: SIZE_BYTES, ..SimLunOptions::default() });
    pieces("simulated LUN", [lun.attach(HostTag(0)), lun.attach(HostTag(1))], scale);
    let temp = tempfile::tempdir().expect("a temporary folder");
    let image = temp.path().join("img");
    let open = |create_size| {
        let spec = image.to_str().expect("a path of text");
        open_device(spec, OpenOptions { create_size, ..OpenOptions::default() }).expect("a device")
    };
    let devices = [open(Some(SIZE_BYTES)), open(None)];
    pieces("file", devices, scale);
    // Threads of a mount that ended may still be on their last wake-up.
    std::thread::sleep(Duration::from_millis(10));
}
