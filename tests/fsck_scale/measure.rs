//! One check in a process of its own: its peak of memory, its time, and how honest its progress was.

use std::fmt;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Instant;

use lunfs::fsck::finding::Finding;
use lunfs::fsck::{Limits, Observer, Progress, check_within};
use serde::{Deserialize, Serialize};

use super::breaks::{break_some, compare};
use super::device::Generated;

#[derive(Serialize, Deserialize, Debug)]
pub struct Figures {
    pub size_bytes: u64,
    pub files: u64,
    pub directories: u64,
    pub used_blocks: u64,
    pub rounds: u64,
    pub findings: u64,
    pub seconds: f64,
    pub read_commands: u64,
    pub read_bytes: u64,
    /// Peak of the process, and how far that was above what the device took before the check began.
    pub peak_bytes: u64,
    pub grown_bytes: u64,
    pub bound_bytes: u64,
    /// Of each pass: seconds, and the greatest difference between the part of the work that was said to be done
    /// and the part of the time that had passed, in per cent.
    pub passes: Vec<(String, f64, f64)>,
}

/// What `docs/fsck.md` says that a check takes: tables, what was met, what is read ahead, and 16 MiB for the rest.
pub fn bound_bytes(inodes: u64, directories: u64) -> u64 {
    inodes * 18 + directories * 52 + (128 << 20) + (48 << 20)
}

impl Figures {
    pub const HEAD: &str = "| volume | files | directories | used | findings | read | commands | time | memory | at most |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / 1048576.0;
        write!(
            f,
            "| {} TiB | {} | {} | {:.1} TiB | {} | {:.1} GB | {} | {:.0} s | {:.0} MiB | {:.0} MiB |",
            self.size_bytes >> 40,
            self.files,
            self.directories,
            self.used_blocks as f64 / (1u64 << 28) as f64,
            self.findings,
            self.read_bytes as f64 / 1e9,
            self.read_commands,
            self.seconds,
            mib(self.grown_bytes),
            mib(self.bound_bytes)
        )?;
        let passes = self.passes.iter().map(|(name, s, off)| format!("{name} {s:.1} s (off by {off:.0} %)"));
        write!(f, "\n  peak {:.0} MiB; {}", mib(self.peak_bytes), passes.collect::<Vec<_>>().join(", "))
    }
}

/// What to measure.
#[derive(Serialize, Deserialize, Clone, Copy)]
pub struct Wish {
    pub size_bytes: u64,
    pub files: u64,
    /// How much of the volume is used, in per cent.
    pub full: u64,
    /// Breaks something, at places by this seed.
    pub broken: Option<u64>,
    /// What each read takes more.
    pub latency_us: u64,
    pub read_ahead: bool,
}

impl Wish {
    pub const fn of(size_bytes: u64, files: u64) -> Self {
        Wish { size_bytes, files, full: 90, broken: None, latency_us: 0, read_ahead: true }
    }
}

/// Runs the worker.
pub fn measured(wish: Wish) -> Figures {
    let wish = serde_json::to_string(&wish).unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "worker", "--ignored", "--nocapture"])
        .env("LUNFS_FSCK_SCALE", wish)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let line = said.lines().find_map(|line| line.split_once("FIGURES ")).unwrap_or_else(|| panic!("{said}"));
    serde_json::from_str(line.1).unwrap()
}

/// A line of /proc/self/status, in bytes.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// A pass, and what was said when: part of the work, and seconds.
type Said = (&'static str, Vec<(f64, f64)>);

#[derive(Default)]
struct Watch {
    found: Vec<Finding>,
    passes: Vec<Said>,
    began: Option<Instant>,
}

impl Observer for Watch {
    fn found(&mut self, finding: &Finding) {
        self.found.push(finding.clone());
    }
    fn progress(&mut self, at: Progress) -> bool {
        let now = self.began.get_or_insert_with(Instant::now).elapsed().as_secs_f64();
        if self.passes.last().is_none_or(|(pass, _)| *pass != at.pass) {
            self.passes.push((at.pass, Vec::new()));
        }
        let said = &mut self.passes.last_mut().unwrap().1;
        let part = at.done as f64 / at.of.max(1) as f64;
        if said.last().is_none_or(|(before, _)| part - before >= 0.01) {
            said.push((part, now));
        }
        true
    }
}

impl Watch {
    fn passes(&self, ended: f64) -> Vec<(String, f64, f64)> {
        let starts = self.passes.iter().map(|(_, said)| said[0].1);
        let ends = starts.skip(1).chain([ended]);
        let of = |((pass, said), end): (&Said, f64)| {
            let took = (end - said[0].1).max(1e-9);
            let off =
                said.iter().map(|(part, at)| (part - (at - said[0].1) / took).abs()).fold(0.0, f64::max);
            (pass.to_string(), took, off * 100.0)
        };
        self.passes.iter().zip(ends).map(of).collect()
    }
}

pub fn worker() {
    let Ok(wish) = std::env::var("LUNFS_FSCK_SCALE") else { return };
    let wish: Wish = serde_json::from_str(&wish).unwrap();
    let Wish { size_bytes, files, full, broken, latency_us, read_ahead } = wish;
    let device = Generated::new(size_bytes, files, full);
    device.latency_us.store(latency_us, Ordering::Relaxed);
    let expected = broken.map(|seed| break_some(&device, seed)).unwrap_or_default();
    // The peak is reckoned from here.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = status("VmRSS:");
    device.reads();
    let began = Instant::now();
    let mut watch = Watch { began: Some(began), ..Watch::default() };
    let usual = Limits::default();
    let limits = if read_ahead { usual } else { Limits { ahead_from_groups: usize::MAX, ..usual } };
    let report = check_within(device.clone(), limits, &mut watch).unwrap();
    let seconds = began.elapsed().as_secs_f64();
    let peak_bytes = status("VmHWM:");
    compare(broken.unwrap_or_default(), &expected, &watch.found);
    let inodes = device.filled() * device.shape.inodes.len() as u64 + 8 + 8 * device.g().system_groups();
    let (read_commands, read_bytes) = device.reads();
    let figures = Figures {
        size_bytes,
        files: report.files,
        directories: report.directories,
        used_blocks: report.used_blocks,
        rounds: report.rounds,
        findings: watch.found.len() as u64,
        seconds,
        read_commands,
        read_bytes,
        peak_bytes,
        grown_bytes: peak_bytes.saturating_sub(before),
        bound_bytes: bound_bytes(inodes, report.directories),
        passes: watch.passes(seconds),
    };
    println!("FIGURES {}", serde_json::to_string(&figures).unwrap());
}
