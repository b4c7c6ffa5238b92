//! The `iscsi` backend against libiscsi itself, in one run on the same targets, 32 commands at a time: reads and writes
//! of 4 KiB and of 1 MiB, and compare-and-writes, each thread on its own block. Three measures: `bare.c`, one
//! loop around libiscsi that does nothing else, for every operation; the same with 32 threads that ask for each command and
//! wait for it, as our callers do, by the cheapest hand-over there is; and `iscsi-perf`, libiscsi's own tool, for reads,
//! which it takes all into one buffer. They take turns, and the table has the median of the rounds' ratios.
//!
//! ```text
//! cargo bench --bench iscsi                     # the tests' own target, tgtd, istgt
//! cargo bench --bench iscsi -- tgtd reads       # only lines that have these words
//! cargo bench --bench iscsi -- iscsi://...      # that LUN: reads only; with --write everything, what is on it is LOST
//! ```
//!
//! Run in any other way it does nothing. Needs libiscsi-dev, a C compiler, `iscsi-perf` (libiscsi-bin).

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use lunfs::device::open::{OpenOptions, open_device};
use lunfs::device::{AlignedBuf, BlockDevice, CompareOutcome};
use lunfs_test_target::others::{Istgt, Tgtd, TgtdOptions, Unavailable};
use lunfs_test_target::{Config, Target};
use nix::sys::resource::{UsageWho, getrusage};

const AT_ONCE: usize = 32;
const ROUNDS: usize = 5;
const SPAN: Duration = Duration::from_secs(2);
const SIZE_BYTES: u64 = 1 << 30;
/// Serves the tests' own target in a process of its own until its standard input ends.
const SERVE: &str = "LUNFS_BENCH_SERVE";

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Read,
    Write,
    Swap,
}

/// What is measured: words for the table, the operation, its bytes (0: one block).
const OPERATIONS: [(&str, Kind, u64); 5] = [
    ("reads of 4 KiB", Kind::Read, 4096),
    ("reads of 1 MiB", Kind::Read, 1 << 20),
    ("writes of 4 KiB", Kind::Write, 4096),
    ("writes of 1 MiB", Kind::Write, 1 << 20),
    ("compare-and-writes", Kind::Swap, 0),
];

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
    let words: Vec<&str> = args
        .iter()
        .map(String::as_str)
        .filter(|arg| !arg.starts_with("--") && !arg.contains("://"))
        .collect();
    let bench = Bench { bare: Bare::compile(), words };
    println!(
        "{AT_ONCE} at a time, {ROUNDS} rounds of {} s; CPU: microseconds of the initiator for each command",
        SPAN.as_secs()
    );
    println!(
        "target       what                   ours/s     CPU |   bare/s     CPU  ratio | callers/s     CPU  ratio | iscsi-perf/s  ratio"
    );
    if let Some(url) = args.iter().find(|arg| arg.starts_with("iscsi://")) {
        return bench.target("LUN", url, args.iter().any(|arg| arg == "--write"));
    }
    if bench.wants("own target") {
        let mut own = Served::start();
        bench.target("own target", &own.url.clone(), true);
        own.stop();
    }
    let missing = |name: &str, why: Unavailable| println!("{name}: {why}");
    if bench.wants("tgtd") {
        match Tgtd::start(TgtdOptions::default()) {
            Ok(tgtd) => bench.target("tgtd", &tgtd.url(), true),
            Err(why) => missing("tgtd", why),
        }
    }
    if bench.wants("istgt") {
        match Istgt::start(SIZE_BYTES) {
            Ok(istgt) => bench.target("istgt", &istgt.url(), true),
            Err(why) => missing("istgt", why),
        }
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

/// `bare.c`, compiled for this run.
struct Bare(tempfile::TempDir);

impl Bare {
    fn compile() -> Bare {
        let directory = tempfile::tempdir().expect("a directory");
        let source = directory.path().join("bare.c");
        std::fs::write(&source, include_str!("bare.c")).expect("writes");
        let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
        let status = Command::new(compiler)
            .args(["-O2", "-o"])
            .arg(directory.path().join("bare"))
            .arg(&source)
            .args(["-liscsi", "-lpthread"])
            .status()
            .expect("a C compiler");
        assert!(status.success(), "bare.c does not compile");
        Bare(directory)
    }

    fn measure(&self, url: &str, kind: Kind, bytes: u64, with_callers: bool) -> Rate {
        let kind = match kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Swap => "swap",
        };
        let output = Command::new(self.0.path().join("bare"))
            .args([url, kind, &bytes.to_string(), &AT_ONCE.to_string(), &SPAN.as_secs().to_string()])
            .args(with_callers.then_some("callers"))
            .output()
            .expect("it runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut numbers = text.split_whitespace().filter_map(|n| n.parse::<f64>().ok());
        match (numbers.next(), numbers.next()) {
            (Some(per_second), Some(cpu)) => Rate { per_second, cpu },
            _ => panic!("bare: {output:?}"),
        }
    }
}

#[derive(Clone, Copy)]
struct Rate {
    per_second: f64,
    /// Microseconds for each command.
    cpu: f64,
}

struct Bench<'a> {
    bare: Bare,
    words: Vec<&'a str>,
}

const TARGETS: [&str; 3] = ["own target", "tgtd", "istgt"];

impl Bench<'_> {
    /// Is this name of a target or of an operation wanted? Words of the other sort say nothing of it.
    fn wants(&self, name: &str) -> bool {
        let is_target = |word: &str| TARGETS.iter().any(|target| target.contains(word));
        let mut same = self.words.iter().filter(|word| is_target(word) == is_target(name)).peekable();
        same.peek().is_none() || same.any(|word| name.contains(*word))
    }

    fn target(&self, name: &str, url: &str, may_write: bool) {
        let device = open_device(url, OpenOptions { read_only: !may_write, ..OpenOptions::default() })
            .unwrap_or_else(|e| panic!("{e}"));
        let block = u64::from(device.geometry().logical_block_bytes);
        for (what, kind, bytes) in OPERATIONS {
            let bytes = if bytes == 0 { block } else { bytes };
            if !self.wants(what) || (kind != Kind::Read && !may_write) {
                continue;
            }
            let (mut ours, mut bare, mut callers, mut perf) =
                (Vec::new(), Vec::new(), Vec::new(), Vec::new());
            for _ in 0..ROUNDS {
                ours.push(measure(&device, kind, bytes));
                bare.push(self.bare.measure(url, kind, bytes, false));
                callers.push(self.bare.measure(url, kind, bytes, true));
                if kind == Kind::Read {
                    perf.push(iscsi_perf(url, bytes / block));
                }
            }
            let per_second = |rates: &[Rate]| median(rates.iter().map(|rate| rate.per_second));
            let cpu = |rates: &[Rate]| median(rates.iter().map(|rate| rate.cpu));
            let ratio = |others: &[Rate]| {
                median(ours.iter().zip(others).map(|(ours, other)| ours.per_second / other.per_second))
            };
            print!("{name:<12} {what:<20} {:>8.0} {:>7.1} |", per_second(&ours), cpu(&ours));
            for others in [&bare, &callers] {
                print!(" {:>8.0} {:>7.1} {:>6.2} |", per_second(others), cpu(others), ratio(others));
            }
            match perf.is_empty() {
                true => println!(),
                false => {
                    let ratio = median(ours.iter().zip(&perf).map(|(ours, perf)| ours.per_second / perf));
                    println!(" {:>12.0} {ratio:>6.2}", median(perf.into_iter()));
                }
            }
        }
        if may_write && self.wants("compare-and-writes") {
            one_by_one(name, &*device, block);
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Our rate: threads that take turns through the LUN, or count up a block each.
fn measure(device: &Arc<dyn BlockDevice>, kind: Kind, bytes: u64) -> Rate {
    let (next, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let places = device.geometry().size_bytes / bytes;
    // Memory, and what swaps find, is there before the clock starts.
    let all_there = Barrier::new(AT_ONCE + 1);
    let (since, cpu_before) = std::thread::scope(|scope| {
        for thread in 0..AT_ONCE as u64 {
            let (next, done, all_there) = (&next, &done, &all_there);
            scope.spawn(move || {
                let mut buf = AlignedBuf::zeroed(bytes as usize);
                buf.fill(1);
                let mut changed = AlignedBuf::zeroed(if kind == Kind::Swap { bytes as usize } else { 0 });
                if kind == Kind::Swap {
                    device.write(thread * bytes, &buf).expect("writes");
                    changed.copy_from_slice(&buf);
                }
                all_there.wait();
                let since = Instant::now();
                while since.elapsed() < SPAN {
                    let place = (next.fetch_add(1, Ordering::Relaxed) % places) * bytes;
                    match kind {
                        Kind::Read => device.read(place, &mut buf).expect("reads"),
                        Kind::Write => device.write(place, &buf).expect("writes"),
                        Kind::Swap => {
                            let count = u64::from_le_bytes(buf[..8].try_into().expect("8 bytes")) + 1;
                            changed[..8].copy_from_slice(&count.to_le_bytes());
                            let outcome = device.compare_and_write(thread * bytes, &buf, &changed);
                            assert_eq!(outcome.expect("swaps"), CompareOutcome::Swapped);
                            std::mem::swap(&mut buf, &mut changed);
                        }
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        all_there.wait();
        (Instant::now(), cpu())
    });
    let done = done.into_inner() as f64;
    Rate { per_second: done / since.elapsed().as_secs_f64(), cpu: (cpu() - cpu_before) * 1e6 / done }
}

/// CPU time of this process, in seconds.
fn cpu() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("its own usage");
    let seconds = |t: nix::sys::time::TimeVal| t.tv_sec() as f64 + t.tv_usec() as f64 / 1e6;
    seconds(usage.user_time()) + seconds(usage.system_time())
}

/// Compare-and-writes one after the other: what a lock costs.
fn one_by_one(name: &str, device: &dyn BlockDevice, block: u64) {
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
    println!("{name:<12} one compare-and-write after the other: median {} us, p99 {} us", at(50), at(99));
}

/// What iscsi-perf says of itself.
fn iscsi_perf(url: &str, blocks: u64) -> f64 {
    let output = Command::new("iscsi-perf")
        .args(["-m", &AT_ONCE.to_string(), "-b", &blocks.to_string(), "-t", &SPAN.as_secs().to_string(), url])
        .output()
        .expect("iscsi-perf (package libiscsi-bin)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let last = text.rsplit("iops average ").next().and_then(|rest| rest.split_whitespace().next());
    last.and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("iscsi-perf: {output:?}"))
}
