//! `lunfs bench`: what LunFS costs on this machine, through real mounts of a temporary volume.
//!
//! Every figure says under which conditions it was taken; where another filesystem or raw I/O is compared
//! with, both were measured in the same run, because machines differ more than filesystems do.
//!
//! Exit status: 0 measured (with `--strict`: and every bar met), 1 not, 2 wrong usage, 32 nobody can mount
//! here.

pub mod creates;
pub mod failover;
pub mod io;
pub mod report;
pub mod turns;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use self::creates::{Company, Creates, Work};
use self::report::{Machine, Report};
use self::turns::{Turn, hand_overs};
use super::EXIT_MOUNT;
use super::demo::grouped;
use super::locks::print_json;
use super::scene::{Scene, SceneOptions, can_mount, in_path};
use crate::durations::Profile;
use crate::inspect::table::bytes;

/// Sparse; its clusters hold some 32,000 inodes each, so that no cluster fills up while creates are counted.
pub const SIZE_BYTES: u64 = 256 << 30;

/// The bars of this milestone.
pub const MOST_COMMANDS_PER_CREATE: f64 = 0.5;
pub const MOST_SWAPS_PER_HAND_OVER: f64 = 3.0;
pub const MOST_IDLE_COMMANDS_PER_SECOND: f64 = 15.0;
const MOST_HAND_OVER_MS: f64 = 10.0;

/// Measure creates, lookups, reads, writes and lock hand-overs on this machine.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Exit status: 0 measured, 1 not (or, with --strict, a bar was missed), 2 wrong usage, \
                        32 this machine or user can't mount."
)]
pub struct Args {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Fail if a bar is missed.
    #[arg(long)]
    strict: bool,
    /// Instead: what the death of a host costs the others, and itself when it comes back.
    #[arg(long)]
    failover: bool,
    /// A tenth of the work, for a first impression.
    #[arg(long)]
    quick: bool,
    /// Files per situation.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(10..=20_000))]
    files: u32,
}

pub fn run(args: Args) -> ExitCode {
    if let Err(reason) = can_mount() {
        eprintln!("lunfs bench: {reason}");
        return ExitCode::from(EXIT_MOUNT);
    }
    match measure(&args) {
        Ok(report) => {
            match args.json {
                true => print_json(&report),
                false => drop(write!(std::io::stdout().lock(), "{}", report.table())),
            }
            if args.strict && !report.all_met() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
        Err(error) => {
            eprintln!("lunfs bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Says on a terminal what goes on: some steps take seconds.
fn progress(scene: &Scene, what: &str) {
    scene.halt_if_interrupted();
    let mut err = std::io::stderr();
    if err.is_terminal() {
        let _ = write!(err, "\r\x1b[K{what}");
    }
}

fn measure(args: &Args) -> Result<Report, String> {
    let program = std::env::current_exe().map_err(|e| format!("cannot find the program's own file: {e}"))?;
    let options = SceneOptions { program, name: "bench", size_bytes: SIZE_BYTES, keep: false };
    let scene = Scene::set(options)?;
    scene.clear_on_signal().map_err(|e| format!("cannot listen to signals: {e}"))?;
    let mut report = Report {
        version: 1,
        lunfs: env!("CARGO_PKG_VERSION"),
        machine: machine(&scene),
        ..Report::default()
    };
    let measured = match args.failover {
        true => failover::run(&scene, &mut report, args.quick, &|what| progress(&scene, what)),
        false => steps(args, &scene, &mut report),
    };
    scene.halt_if_interrupted();
    progress(&scene, "");
    let problems = scene.clear();
    measured?;
    match problems.into_iter().next() {
        Some(problem) => Err(problem),
        None => Ok(report),
    }
}

fn steps(args: &Args, scene: &Arc<Scene>, report: &mut Report) -> Result<(), String> {
    let files = if args.quick { args.files.div_ceil(10) } else { args.files };
    let mut alone = None;
    for company in Company::ALL {
        progress(scene, &format!("{} files, {}", grouped(files.into()), company.name()));
        let measured = creates::run(scene, company, files)?;
        report_creates(report, company, &measured);
        alone.get_or_insert(measured);
    }
    progress(scene, "ext4");
    let root = nix::unistd::geteuid().is_root();
    if root && in_path("mkfs.ext4") {
        let other = creates::on_ext4(scene, files);
        match (other, alone) {
            (Ok(ext4), Some(alone)) => report_ext4(report, files, &alone.create, &ext4),
            (Err(e), _) => report.skipped.push(format!("creates on ext4: {e}")),
            _ => {}
        }
    } else {
        report.skipped.push("creates on ext4: needs root and mkfs.ext4".into());
    }
    // New, so that a hand-over costs what it costs, without inodes of an earlier life being taken over.
    scene.renew(Profile::default())?;
    let hosts = ["alpha", "beta", "gamma"];
    let [a, b] = [scene.mount("alpha")?, scene.mount("beta")?];
    progress(scene, "reads and writes");
    for io in io::run(scene, &a, SIZE_BYTES, args.quick)? {
        let group = "Reads and writes, O_DIRECT, one at a time, blocks that exist; writes end with an fsync";
        let name = format!("{:?} {}", io.direction, bytes(io.bytes as u64)).to_lowercase();
        let conditions = format!("raw image in the same run: {}", grouped(io.raw as u64));
        report.figure(group, &name, io.lunfs, "a second", conditions);
        report.figure(group, format!("{name}, of raw"), io.lunfs / io.raw, "times", "");
    }
    let turns = if args.quick { 100 } else { 1000 };
    let count = turns;
    for (turn, of) in [(Turn::Write, "writes of one file"), (Turn::Create, "creates in one directory")] {
        progress(scene, &format!("hand-overs, {of}"));
        let measured = hand_overs(&[&a, &b], turn, count)?;
        report_turns(report, of, 2, count, &measured);
        report.bar(format!("hand-over, {of}: median"), measured.quantile_ms(0.5), MOST_HAND_OVER_MS, "ms");
        let name = format!("hand-over, {of}: compare-and-writes");
        report.bar(name, measured.swaps_each(), MOST_SWAPS_PER_HAND_OVER, "each");
    }
    let c = scene.mount(hosts[2])?;
    let measured = hand_overs(&[&a, &b, &c], Turn::Write, count)?;
    report_turns(report, "writes of one file", 3, count, &measured);
    scene.unmount(&c.root)?;
    let seconds = if args.quick { 3 } else { 10 };
    progress(scene, "idle");
    turns::come_to_rest(&[&a, &b])?;
    let idle = turns::idle(&[&a, &b], Duration::from_secs(seconds))?;
    let most = idle.iter().copied().fold(0.0, f64::max);
    let conditions = format!("two hosts over {seconds} s, the busier one");
    report.figure("Idle", "commands", most, "a second", conditions);
    report.bar("idle host: commands a second", most, MOST_IDLE_COMMANDS_PER_SECOND, "a second");
    Ok(())
}

fn report_creates(report: &mut Report, company: Company, measured: &Creates) {
    let group = match company {
        Company::Alone => "Files in a directory of one's own; no other host",
        Company::Idle => "Files in a directory of one's own; a second host is mounted and idle",
        Company::Working => "Files in a directory of one's own; a second host creates in its own",
    };
    let files = f64::from(measured.files);
    let rate = |work: &Work| files / work.took.as_secs_f64();
    let each = |work: &Work| work.spent.commands() as f64 / files;
    let mut conditions =
        format!("{} files, fsync of the directory at the end", grouped(measured.files.into()));
    if company == Company::Working {
        conditions.push_str(&format!("; the other made {}", grouped(measured.others)));
    }
    report.figure(group, "create", rate(&measured.create), "a second", conditions);
    let create = &measured.create;
    report.figure(group, "create: commands", each(create), "each", "with all commits and checkpoints");
    let swaps = create.spent.swaps as f64;
    report.figure(group, "create: compare-and-writes", swaps, "in all", "until the host has left");
    report.figure(group, "stat, warm", rate(&measured.stat_warm), "a second", "by the host that made them");
    report.figure(group, "stat, cold", rate(&measured.stat_cold), "a second", "just mounted, nothing cached");
    report.figure(group, "stat, cold: commands", each(&measured.stat_cold), "each", "");
    report.figure(group, "unlink", rate(&measured.unlink), "a second", "fsync of the directory at the end");
    report.figure(group, "unlink: commands", each(&measured.unlink), "each", "with commits and checkpoints");
    let conditions = "inodes that were freed in the host's earlier life";
    report.figure(group, "create, reusing", rate(&measured.reuse), "a second", conditions);
    report.figure(group, "create, reusing: commands", each(&measured.reuse), "each", "");
    let name = company.name();
    report.bar(format!("create, {name}: commands"), each(create), MOST_COMMANDS_PER_CREATE, "each");
    report.bar(format!("create, {name}: compare-and-writes"), swaps, 0.0, "in all");
}

fn report_ext4(report: &mut Report, files: u32, ours: &Work, ext4: &Work) {
    let group = "Compared with ext4 on a loop device over a file beside the image, same run, one host";
    let conditions = format!("{} files, fsync of the directory at the end", grouped(files.into()));
    report.figure(group, "ext4: create", f64::from(files) / ext4.took.as_secs_f64(), "a second", conditions);
    let ratio = ext4.took.as_secs_f64() / ours.took.as_secs_f64();
    report.figure(group, "LunFS alone, of ext4", ratio, "times", "");
}

fn report_turns(report: &mut Report, of: &str, hosts: u32, turns: u32, measured: &turns::HandOvers) {
    let group = "Hand-over of a lock that hosts want in strict turns";
    let name = |what: &str| format!("{of}, {hosts} hosts: {what}");
    let conditions = format!("{} turns, as the caller waits", grouped(turns.into()));
    report.figure(group, name("median"), measured.quantile_ms(0.5), "ms", conditions);
    report.figure(group, name("p99"), measured.quantile_ms(0.99), "ms", "");
    let given = format!("{} hand-overs", grouped(measured.given));
    report.figure(group, name("compare-and-writes"), measured.swaps_each(), "per hand-over", given);
    let commands = measured.commands as f64 / measured.given.max(1) as f64;
    report.figure(group, name("commands"), commands, "per hand-over", "all hosts, without heartbeats");
}

fn machine(scene: &Scene) -> Machine {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let load = read("/proc/loadavg").split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0);
    let holder = crate::fuse::mountinfo::read().unwrap_or_default().into_iter();
    let holder = holder.filter(|m| scene.directory().starts_with(&m.mountpoint));
    let image_on = holder.max_by_key(|m| m.mountpoint.as_os_str().len()).map(|m| m.fstype);
    Machine {
        kernel: read("/proc/sys/kernel/osrelease"),
        cpus: std::thread::available_parallelism().map_or(0, usize::from),
        image_on: image_on.unwrap_or_default(),
        image_bytes: SIZE_BYTES,
        load,
    }
}
