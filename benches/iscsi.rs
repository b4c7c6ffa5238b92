//! The `iscsi` backend against `iscsi-perf`, libiscsi's own tool, in one run on the same targets: sequential reads, 32 at
//! a time, of 4 KiB and of 1 MiB; three rounds each, taking turns; the ratio of the medians. And what a compare-and-write
//! takes.
//!
//! `cargo bench --bench iscsi` measures; run in any other way it does nothing. Needs `iscsi-perf` (libiscsi-bin);
//! `-- URL` measures on that LUN (read only).

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lunfs::device::open::{OpenOptions, open_device};
use lunfs::device::{AlignedBuf, BlockDevice};
use lunfs_test_target::others::{Tgtd, TgtdOptions};
use lunfs_test_target::{Config, Target};

const AT_ONCE: usize = 32;
const ROUNDS: usize = 3;
const SPAN: Duration = Duration::from_secs(3);
const SIZE_BYTES: u64 = 1 << 30;
/// Serves the tests' own target in a process of its own until its standard input ends.
const SERVE: &str = "LUNFS_BENCH_SERVE";

fn main() {
    if std::env::var_os(SERVE).is_some() {
        let target = Target::start(Config::memory(SIZE_BYTES)).expect("the test target starts");
        println!("{}", target.url(1));
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    if !args.iter().any(|arg| arg == "--bench") {
        println!("nothing measured: cargo bench --bench iscsi");
        return;
    }
    if let Some(url) = args.iter().find(|arg| arg.starts_with("iscsi://")) {
        return compare("LUN", url, false);
    }
    let mut own = Served::start();
    compare("own target", &own.url.clone(), true);
    own.stop();
    match Tgtd::start(TgtdOptions::default()) {
        Ok(tgtd) => compare("tgtd", &tgtd.url(), true),
        Err(why) => println!("tgtd: {why}"),
    }
}

struct Served {
    process: Child,
    url: String,
}

impl Served {
    fn start() -> Served {
        let mut process = Command::new(std::env::current_exe().expect("this program"))
            .env(SERVE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a target");
        let mut url = String::new();
        let output = process.stdout.take().expect("its output");
        std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut url).expect("its address");
        Served { process, url: url.trim().to_owned() }
    }

    fn stop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn compare(name: &str, url: &str, may_write: bool) {
    let device = open_device(url, OpenOptions { read_only: !may_write, ..OpenOptions::default() })
        .unwrap_or_else(|e| panic!("{e}"));
    let block = u64::from(device.geometry().logical_block_bytes);
    for bytes in [4096u64, 1 << 20] {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            ours.push(reads(&device, bytes));
            theirs.push(perf(url, bytes / block));
        }
        let (ours, theirs) = (median(ours), median(theirs));
        println!(
            "{name:<12} reads of {:>4} KiB, {AT_ONCE} at a time: {ours:>8.0}/s, iscsi-perf {theirs:>8.0}/s, ratio {:.2}",
            bytes >> 10,
            ours / theirs
        );
    }
    if !may_write {
        return;
    }
    for bytes in [4096u64, 1 << 20] {
        let rate = median((0..ROUNDS).map(|_| writes(&device, bytes)).collect());
        println!("{name:<12} writes of {:>3} KiB, {AT_ONCE} at a time: {rate:>8.0}/s", bytes >> 10);
    }
    let mut times = Vec::new();
    let (mut known, mut next) = (vec![0; block as usize], vec![0; block as usize]);
    device.write(0, &known).expect("writes");
    for n in 0..5000u64 {
        next[..8].copy_from_slice(&(n + 1).to_le_bytes());
        let since = Instant::now();
        device.compare_and_write(0, &known, &next).expect("swaps");
        times.push(since.elapsed());
        std::mem::swap(&mut known, &mut next);
    }
    times.sort();
    let at = |part: usize| times[times.len() * part / 100].as_micros();
    println!("{name:<12} compare-and-write: median {} us, p99 {} us", at(50), at(99));
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Commands per second of threads that take turns through the LUN.
fn rate(
    device: &Arc<dyn BlockDevice>,
    bytes: u64,
    work: impl Fn(&dyn BlockDevice, u64, &mut [u8]) + Sync,
) -> f64 {
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let places = device.geometry().size_bytes / bytes;
    let since = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                let mut buf = AlignedBuf::zeroed(bytes as usize);
                while since.elapsed() < SPAN {
                    let place = next.fetch_add(1, Ordering::Relaxed) % places;
                    work(&**device, place * bytes, &mut buf);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    done.into_inner() as f64 / since.elapsed().as_secs_f64()
}

fn reads(device: &Arc<dyn BlockDevice>, bytes: u64) -> f64 {
    rate(device, bytes, |device, at, buf| device.read(at, buf).expect("reads"))
}

fn writes(device: &Arc<dyn BlockDevice>, bytes: u64) -> f64 {
    rate(device, bytes, |device, at, buf| device.write(at, buf).expect("writes"))
}

/// What iscsi-perf says of itself.
fn perf(url: &str, blocks: u64) -> f64 {
    let output = Command::new("iscsi-perf")
        .args(["-m", &AT_ONCE.to_string(), "-b", &blocks.to_string(), "-t", &SPAN.as_secs().to_string(), url])
        .output()
        .expect("iscsi-perf (package libiscsi-bin)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = text.rsplit("iops average ").next().and_then(|rest| rest.split_whitespace().next());
    last.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("iscsi-perf: {output:?}"))
}
