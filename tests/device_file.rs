//! The `file` backend between processes, threads and loop devices.
//!
//! Processes are this test binary started again with [`JOB`] in its environment; `job` is their
//! entry. Tests with loop devices need root and say so when they are skipped.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod devices;

use devices::{counter, increment, key, read_block};
use lunfs::device::file::loopdev::{LoopDevice, LoopOptions};
use lunfs::device::open::{OpenOptions, device_identity, open_device};
use lunfs::device::{AlignedBuf, BlockDevice, CompareOutcome, DeviceError, Executed, OpenError};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What a child process is to do: `increment PATH BLOCK_BYTES COUNT OFFSET`, or `write PATH BLOCK_BYTES LIFE OFFSET`:
/// registered as that life of slot 3, writes numbers until it is refused.
const JOB: &str = "LUNFS_TEST_JOB";

fn open(path: &Path, logical_block_bytes: u32) -> Arc<dyn BlockDevice> {
    let options = OpenOptions { logical_block_bytes: Some(logical_block_bytes), ..OpenOptions::default() };
    open_device(path.to_str().unwrap(), options).unwrap()
}

fn refused(path: &Path, options: OpenOptions) -> OpenError {
    match open_device(path.to_str().unwrap(), options) {
        Ok(_) => panic!("{} was opened", path.display()),
        Err(err) => err,
    }
}

/// An image of 1 MiB of zeroes.
fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

/// Not a test by itself: the entry of child processes.
#[test]
fn job() {
    let Ok(job) = std::env::var(JOB) else { return };
    let words: Vec<&str> = job.split(' ').collect();
    let [what, path, block_bytes, number, offset] = words[..] else { panic!("{job}") };
    let device = open(Path::new(path), block_bytes.parse().unwrap());
    let (number, offset) = (number.parse().unwrap(), offset.parse().unwrap());
    match what {
        "increment" => {
            println!("ready");
            increment(&*device, offset, number, std::process::id().into());
        }
        "write" => {
            device.fencing().expect("a fence").register(key(number)).unwrap();
            println!("ready");
            write_until_fenced(&*device, offset);
            println!("fenced");
        }
        _ => panic!("{job}"),
    }
}

fn write_until_fenced(device: &dyn BlockDevice, offset_bytes: u64) {
    let mut block = AlignedBuf::zeroed(device.geometry().logical_block_bytes as usize);
    for n in 1u64.. {
        block[..8].copy_from_slice(&n.to_le_bytes());
        match device.write(offset_bytes, &block) {
            Ok(()) => {}
            Err(DeviceError::Fenced { .. }) => return,
            Err(e) => panic!("{e}"),
        }
    }
}

/// A child process that is killed with the test.
struct Process(Child);

impl Process {
    fn start(path: &Path, block_bytes: u32, times: u64, offset_bytes: u64) -> Self {
        Self::run("increment", path, block_bytes, times, offset_bytes)
    }

    fn run(what: &str, path: &Path, block_bytes: u32, number: u64, offset_bytes: u64) -> Self {
        let job = format!("{what} {} {block_bytes} {number} {offset_bytes}", path.display());
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "job", "--nocapture", "--test-threads=1"])
            .env(JOB, job)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Process(child)
    }

    fn wait_ready(&mut self) {
        let mut lines = BufReader::new(self.0.stdout.take().unwrap());
        let mut line = String::new();
        while !line.ends_with("ready\n") {
            line.clear();
            assert_ne!(lines.read_line(&mut line).unwrap(), 0, "the child ended early");
        }
        // Kept open: its last words must not meet a closed pipe.
        self.0.stdout = Some(lines.into_inner());
    }

    fn finish(mut self) {
        let mut rest = String::new();
        self.0.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
        assert!(self.0.wait().unwrap().success(), "{rest}");
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn processes_count_exactly(paths: &[PathBuf], block_bytes: u32, times: u64) {
    let offset = u64::from(block_bytes);
    let children: Vec<_> = paths.iter().map(|p| Process::start(p, block_bytes, times, offset)).collect();
    children.into_iter().for_each(Process::finish);
    for path in paths {
        let total = counter(&read_block(&*open(path, block_bytes), offset));
        assert_eq!(total, times * paths.len() as u64, "{}", path.display());
    }
}

#[test]
fn four_processes_count_exactly() {
    for block_bytes in [512, 4096] {
        let file = image();
        processes_count_exactly(&vec![file.path().to_path_buf(); 4], block_bytes, 1000);
    }
}

#[test]
fn threads_of_one_process_count_exactly() {
    let file = image();
    devices::handles_count_exactly(&|| open(file.path(), 512), 2, 2, 1000);
}

/// What every device has to do, with both sizes of blocks.
fn on_images(body: impl Fn(devices::Open<'_>)) {
    for block_bytes in [512, 4096] {
        let file = image();
        body(&|| open(file.path(), block_bytes));
    }
}

#[test]
fn a_miscompare_leaves_the_block_alone() {
    on_images(devices::a_miscompare_leaves_the_block_alone);
}

#[test]
fn ranges_are_checked() {
    on_images(devices::ranges_are_checked);
}

#[test]
fn misaligned_memory_and_large_transfers() {
    on_images(devices::misaligned_memory_and_large_transfers);
}

#[test]
fn discarded_and_zeroed_ranges() {
    on_images(devices::discarded_and_zeroed_ranges);
}

#[test]
fn read_only_refuses_every_change() {
    let file = image();
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    devices::read_only_refuses_every_change(&*open_device(file.path().to_str().unwrap(), options).unwrap());
}

#[test]
fn logical_blocks_and_sizes_that_make_no_sense() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert!(matches!(refused(file.path(), OpenOptions::default()), OpenError::TooSmall { .. }));
    file.as_file().set_len(10_000).unwrap();
    let options = OpenOptions { logical_block_bytes: Some(1024), ..OpenOptions::default() };
    assert!(matches!(refused(file.path(), options), OpenError::BadLogicalBlock { asked: 1024 }));
    assert_eq!(open(file.path(), 4096).geometry().size_bytes, 8192);
}

/// A process that is stopped with the lock of a block in its hands costs that block and no other.
#[test]
fn a_process_stopped_inside_a_swap_blocks_only_that_block() {
    const HELD: u64 = 8192;
    let file = image();
    let mut child = Process::start(file.path(), 512, u64::MAX, HELD);
    child.wait_ready();
    let options = OpenOptions {
        logical_block_bytes: Some(512),
        swap_deadline: Some(Duration::from_millis(200)),
        ..OpenOptions::default()
    };
    let device = open_device(file.path().to_str().unwrap(), options).unwrap();
    // Stop it again and again until it happens to be inside.
    let began = Instant::now();
    let err = loop {
        child.signal(Signal::SIGSTOP);
        let tried = Instant::now();
        match device.compare_and_write(HELD, &[0xEE; 512], &[0xEE; 512]) {
            Err(err) => {
                assert!(tried.elapsed() < Duration::from_secs(2), "the deadline was not kept");
                break err;
            }
            Ok(outcome) => assert_eq!(outcome, CompareOutcome::Miscompare),
        }
        child.signal(Signal::SIGCONT);
        std::thread::sleep(Duration::from_millis(1));
        assert!(began.elapsed() < Duration::from_secs(60), "never met it inside a swap");
    };
    assert_eq!(err.executed(), Executed::No, "{err}");
    assert!(err.to_string().contains("lock of this block"), "{err}");
    increment(&*device, HELD - 512, 10, 0);
    increment(&*device, HELD + 512, 10, 0);
    // It goes on, and nothing is lost: whoever was stopped completes its swap first.
    child.signal(Signal::SIGCONT);
    let device = open(file.path(), 512);
    let before = counter(&read_block(&*device, HELD));
    increment(&*device, HELD, 10, 0);
    assert!(counter(&read_block(&*device, HELD)) >= before + 10);
    // A killed one leaves no lock behind.
    child.signal(Signal::SIGSTOP);
    drop(child);
    increment(&*device, HELD, 1, 0);
}

#[test]
fn a_fenced_writer_is_refused_and_registers_anew() {
    on_images(devices::a_fenced_writer_is_refused_and_registers_anew);
}

/// Wherever a writer is when it is fenced, stopped or running: what the device shows when `fence` returns stays.
#[test]
fn nothing_of_a_fenced_process_lands_later() {
    let file = image();
    let options = OpenOptions {
        logical_block_bytes: Some(512),
        swap_deadline: Some(Duration::from_millis(60)),
        ..OpenOptions::default()
    };
    let device = open_device(file.path().to_str().unwrap(), options).unwrap();
    let fencing = device.fencing().expect("a fence");
    let mut killed = 0;
    for life in 1..=60 {
        let mut child = Process::run("write", file.path(), 512, life, 4096);
        child.wait_ready();
        std::thread::sleep(Duration::from_micros(97 * life));
        let stopped = life % 3 != 0;
        if stopped {
            child.signal(Signal::SIGSTOP);
        }
        fencing.fence(key(life)).unwrap();
        let mut ours = AlignedBuf::zeroed(512);
        ours[..8].copy_from_slice(&(u64::MAX - life).to_le_bytes());
        device.write(4096, &ours).unwrap();
        if stopped {
            // It may have been killed: then there is nobody to go on.
            let _ = kill(Pid::from_raw(child.0.id() as i32), Signal::SIGCONT);
        }
        let mut rest = String::new();
        child.0.stdout.take().unwrap().read_to_string(&mut rest).unwrap();
        let ended = child.0.wait().unwrap();
        killed += u32::from(!ended.success());
        assert!(ended.success() && rest.contains("fenced") || stopped, "life {life}: {ended}, {rest}");
        assert_eq!(counter(&read_block(&*device, 4096)), u64::MAX - life, "a late write of life {life}");
    }
    println!("{killed} of 60 writers were stopped inside the gate and killed");
}

/// Disks that other machines or other nodes may reach are refused by their kind, without an open.
#[test]
fn other_block_devices_are_refused() {
    let Ok(disks) = std::fs::read_dir("/sys/block") else { return };
    for disk in disks {
        let name = disk.unwrap().file_name();
        let node = Path::new("/dev").join(&name);
        if name.to_string_lossy().starts_with("loop") || !node.exists() {
            continue;
        }
        let err = refused(&node, OpenOptions { read_only: true, ..OpenOptions::default() });
        assert!(matches!(err, OpenError::NotEmulated { .. } | OpenError::Kernel { .. }), "{err}");
        let id = device_identity(node.to_str().unwrap()).unwrap();
        assert!(id.same_node(&id) && id.node.is_some());
    }
}

/// Past the capture of the test harness: a skipped test must not look like one that ran.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// Attaches a loop device, or says why not and gives None.
fn attach(file: &Path, options: LoopOptions) -> Option<LoopDevice> {
    if !nix::unistd::geteuid().is_root() {
        skipped("loop devices need root");
        return None;
    }
    match LoopDevice::attach(file, &options) {
        Ok(device) => Some(device),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
            skipped(&format!("no loop driver here: {err}"));
            None
        }
        Err(err) => panic!("attaching a loop device: {err}"),
    }
}

#[test]
fn two_loop_devices_over_one_file_count_exactly() {
    for logical_block_bytes in [512, 4096] {
        let file = image();
        let options = LoopOptions { logical_block_bytes, ..LoopOptions::default() };
        let Some(one) = attach(file.path(), options) else { return };
        let Some(two) = attach(file.path(), options) else { return };
        let (a, b) = (one.path().to_path_buf(), two.path().to_path_buf());
        let geometry = open(&a, logical_block_bytes).geometry();
        assert_eq!((geometry.logical_block_bytes, geometry.size_bytes), (logical_block_bytes, 1 << 20));
        assert!(geometry.volatile_cache);
        // And the file itself beside them: all three meet on its inode.
        processes_count_exactly(&[a, b, file.path().into()], logical_block_bytes, 500);
    }
}

#[test]
fn a_loop_device_with_an_offset_meets_the_file() {
    let file = image();
    let Some(shifted) = attach(file.path(), LoopOptions { offset_bytes: 65536, ..LoopOptions::default() })
    else {
        return;
    };
    let (whole, part) = (open(file.path(), 512), open(shifted.path(), 512));
    std::thread::scope(|scope| {
        scope.spawn(|| increment(&*whole, 65536 + 512, 200, 1));
        scope.spawn(|| increment(&*part, 512, 200, 2));
    });
    assert_eq!(counter(&read_block(&*whole, 65536 + 512)), 400);
    let [a, b] = [file.path(), shifted.path()].map(|p| device_identity(p.to_str().unwrap()).unwrap());
    assert!(!a.same_bytes(&b));
    assert_eq!(b.base_bytes, 65536);
}

#[test]
fn identities_of_loop_devices() {
    let file = image();
    let Some(one) = attach(file.path(), LoopOptions::default()) else { return };
    let Some(two) = attach(file.path(), LoopOptions::default()) else { return };
    let [file_id, one_id, two_id] =
        [file.path(), one.path(), two.path()].map(|p| device_identity(p.to_str().unwrap()).unwrap());
    assert!(one_id.same_bytes(&two_id) && one_id.same_bytes(&file_id));
    assert!(one_id.same_node(&one_id) && !one_id.same_node(&two_id) && !one_id.same_node(&file_id));
}

#[test]
fn loop_devices_that_are_refused() {
    let file = image();
    let Some(device) = attach(file.path(), LoopOptions { read_only: true, ..LoopOptions::default() }) else {
        return;
    };
    let writable = refused(device.path(), OpenOptions::default());
    assert!(matches!(writable, OpenError::ReadOnly { .. } | OpenError::Io { .. }), "{writable}");
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    open_device(device.path().to_str().unwrap(), read_only.clone()).unwrap();

    let other = image();
    let device = attach(other.path(), LoopOptions::default()).unwrap();
    let unmet = OpenOptions { logical_block_bytes: Some(4096), ..OpenOptions::default() };
    assert!(matches!(refused(device.path(), unmet), OpenError::LogicalBlockUnmet { needed: 512, .. }));
    let grown = OpenOptions { create_size: Some(1 << 30), ..OpenOptions::default() };
    assert!(matches!(refused(device.path(), grown), OpenError::FixedSize { .. }));

    // Two loop devices over a loop device: the lock would be on a node.
    let stacked = attach(device.path(), LoopOptions::default()).unwrap();
    let err = refused(stacked.path(), OpenOptions::default());
    assert!(err.to_string().contains("not a regular file"), "{err}");
    drop(stacked);

    // Renamed is fine; replaced or deleted is not.
    let dir = tempfile::tempdir().unwrap();
    let moved = dir.path().join("moved image");
    let path = other.into_temp_path().keep().unwrap();
    std::fs::rename(&path, &moved).unwrap();
    drop(open(device.path(), 512));
    std::fs::remove_file(&moved).unwrap();
    let err = refused(device.path(), OpenOptions::default());
    assert!(matches!(err, OpenError::LoopBacking { .. }), "{err}");
    std::fs::write(&moved, [0; 4096]).unwrap();
    let err = refused(device.path(), OpenOptions::default());
    assert!(matches!(err, OpenError::LoopBacking { .. }), "{err}");
}

#[test]
fn direct_and_cached_access_do_not_mix() {
    let file = image();
    let cached = LoopOptions { direct_io: false, ..LoopOptions::default() };
    let Some(device) = attach(file.path(), cached) else { return };
    // Who only reads leaves the loop device as it is: it goes through the page cache of the file.
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let spec = device.path().to_str().unwrap();
    let held = open_device(spec, read_only.clone()).unwrap();
    match open_device(file.path().to_str().unwrap(), OpenOptions::default()) {
        Err(err) => assert!(matches!(err, OpenError::MixedCaching { .. }), "{err}"),
        Ok(_) => return skipped("temporary files lie in memory here: page cache is all there is"),
    }
    drop(held);
    let held = open(file.path(), 512);
    assert!(matches!(refused(device.path(), read_only), OpenError::MixedCaching { .. }));
    // Who writes asks the loop device to go direct, which ends the mixture.
    drop(open(device.path(), 512));
    drop(held);
}
