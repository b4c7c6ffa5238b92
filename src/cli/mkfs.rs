//! `lunfs mkfs`, also installed as `mkfs.lunfs`: arguments to one call of [`format::format`].
//!
//! Exit status: 0 the volume was made (or, with `--dry-run`, could be made), 1 refused or failed, 2
//! wrong usage. Standard output gets the geometry; standard error gets nothing on success, except the
//! progress of a watch when it is a terminal.

use std::io::{IsTerminal, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::device::check::{
    AFTER_A_CONFLICT, Finding, Property, Report, SCRATCH_BYTES, Scratch, Verdict, fences, known_to_suffer,
};
use crate::device::open::{OpenOptions, open_device, shown};
use crate::device::{BlockDevice, DeviceError, OpenError};
use crate::durations::Profile;
use crate::format::in_use::{InUse, in_use};
use crate::format::preflight::{PreflightError, Previous, Watching, preflight};
use crate::format::{self, FormatError, FormatOptions, FormatReport};
use crate::inspect::table::{bytes, span_ms};
use crate::layout::superblock::{CheckedUnit, Superblock};
use crate::rt::wall_clock;

/// Increments of each racer before a volume is made.
const RACE_ROUNDS: u64 = 100;
/// The same once reservations have been tried: what they break is found by racing alone.
const ROUNDS_AFTER_CONFLICT: u64 = 500;

/// Shown at the end of the help.
pub const EXIT_STATUS: &str = "Exit status: 0 the volume was made (with --dry-run: could be made), 1 refused \
                               or failed, 2 wrong usage.";

/// Make a LunFS volume on a shared LUN or in a file.
#[derive(clap::Args, Debug)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// A block device or a file; a file is created when --size is given.
    pub device: String,
    /// Name of the volume, at most 64 bytes.
    #[arg(short = 'L', long, default_value = "")]
    pub label: String,
    /// The most hosts that can mount at once, 1 to 256; each gets a journal. Default: by size.
    #[arg(short = 'N', long, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub slots: Option<u16>,
    /// Bytes to use, such as 512M, 10G or 64T (powers of 1024). Default: the whole device.
    #[arg(short = 's', long)]
    pub size: Option<Size>,
    /// How quickly a silent host is declared dead: fast, normal or slow-array.
    #[arg(long, default_value = "normal")]
    pub profile: Profile,
    /// Overwrite an existing filesystem, partition table or LunFS volume. A LunFS volume is first watched
    /// for a full dead time, and never overwritten while a host's heartbeat moves.
    #[arg(short = 'f', long)]
    pub force: bool,
    /// Shall hosts that mount stop the dead by the device's reservations? auto: where trying shows that they work. On a
    /// disk of the kernel they can't be tried from one machine alone; required takes them as they are.
    #[arg(long, value_enum, default_value = "auto")]
    pub reservations: Reservations,
    /// Check everything and print what would be made; write nothing.
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Print nothing.
    #[arg(short, long)]
    pub quiet: bool,
    /// Logical block of a file, 512 or 4096, as if it were a disk with such blocks.
    #[arg(long, value_parser = logical_block, hide = true)]
    pub logical_block: Option<u32>,
}

/// Shall hosts use the device's reservations?
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Reservations {
    /// Where trying shows that they work.
    Auto,
    /// Or no volume is made.
    Required,
    /// Don't even try.
    Off,
}

/// A number of bytes as people type it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Size(pub u64);

#[derive(Debug, Error)]
enum MkfsError {
    #[error("'{device}': {use_}; it can't be overwritten")]
    InUse { device: String, use_: InUse },
    #[error("{0}")]
    Open(#[from] OpenError),
    #[error("'{device}': {error}")]
    Preflight { device: String, error: PreflightError },
    #[error("'{device}': {error}")]
    Format { device: String, error: FormatError },
    #[error("'{device}' does not exist; give --size to create a file")]
    Missing { device: String },
    #[error("'{device}' can't carry a volume: {why}")]
    Unfit { device: String, why: String },
    #[error("'{device}' has no reservations that can be trusted: {why}")]
    NoReservations { device: String, why: String },
    #[error("'{device}': what other hosts left of reservations can't be removed: {why}")]
    Reserved { device: String, why: String },
    #[error("'{device}': {error}")]
    Scratch { device: String, error: DeviceError },
    #[error("'{device}': {error}")]
    Look { device: String, error: std::io::Error },
}

/// Makes the volume and reports.
pub fn run(args: Args) -> ExitCode {
    match make(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mkfs.lunfs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn make(args: &Args) -> Result<(), MkfsError> {
    let device = shown(&args.device);
    let found = look(&args.device)?;
    if found == Found::Nothing && args.size.is_none() {
        return Err(MkfsError::Missing { device });
    }
    if let Some(use_) = in_use(Path::new(&args.device)) {
        return Err(MkfsError::InUse { device, use_ });
    }
    let mut options = FormatOptions {
        label: args.label.clone(),
        slots: args.slots,
        size_bytes: args.size.map(|s| s.0),
        profile: args.profile,
        // A volume in a file of an ordinary user would be of no use to them otherwise.
        root_owner: (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw()),
        ..FormatOptions::default()
    };
    let failed = |error| MkfsError::Format { device: device.clone(), error };
    // A file is made or grown only when all else is known to be right.
    let mut dev = None;
    if let Found::Device | Found::File = found {
        let opened = open(args, None)?;
        options.previous = check(args, &*opened)?;
        dev = Some(opened);
    }
    let present_bytes = dev.as_ref().map_or(0, |d| d.geometry().size_bytes);
    let wanted_bytes = match found {
        Found::Device => present_bytes,
        _ => present_bytes.max(args.size.map_or(0, |s| s.0)),
    };
    let planned = format::plan(wanted_bytes, &options).map_err(failed)?;
    if args.dry_run {
        if !args.quiet {
            print_volume(&device, &planned, None);
        }
        return Ok(());
    }
    let dev = match dev {
        Some(dev) if present_bytes >= wanted_bytes => dev,
        before => {
            drop(before);
            open(args, Some(wanted_bytes))?
        }
    };
    options.unit = prove(args, &dev, planned.geometry.size_bytes())?;
    let report = format::format(&*dev, &options).map_err(failed)?;
    if !args.quiet {
        print_volume(&device, &report.superblock, Some(&report));
    }
    Ok(())
}

/// What stands at the path that was given.
#[derive(PartialEq, Eq)]
enum Found {
    Nothing,
    /// A file without room for even a signature.
    EmptyFile,
    File,
    /// A block device, or something that only [`open_device`] understands.
    Device,
}

fn look(spec: &str) -> Result<Found, MkfsError> {
    if spec.contains("://") {
        return Ok(Found::Device);
    }
    match std::fs::metadata(spec) {
        Ok(meta) if meta.file_type().is_block_device() => Ok(Found::Device),
        Ok(meta) if meta.is_file() && meta.len() < 4096 => Ok(Found::EmptyFile),
        Ok(_) => Ok(Found::File),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(MkfsError::Look { device: spec.into(), error }),
    }
}

fn open(args: &Args, create_size: Option<u64>) -> Result<Arc<dyn BlockDevice>, MkfsError> {
    open_as(args, create_size, OpenOptions { exclusive: true, ..OpenOptions::default() })
}

fn open_as(
    args: &Args,
    create_size: Option<u64>,
    how: OpenOptions,
) -> Result<Arc<dyn BlockDevice>, MkfsError> {
    let options =
        OpenOptions { read_only: args.dry_run, logical_block_bytes: args.logical_block, create_size, ..how };
    Ok(open_device(&args.device, options)?)
}

/// The LUN once more, beside the handle that has it exclusively.
fn beside(args: &Args, reservations: bool) -> Result<Arc<dyn BlockDevice>, MkfsError> {
    open_as(args, None, OpenOptions { reservations, ..OpenOptions::default() })
}

/// Hosts of an earlier volume that died without leaving are still registered: nobody else could write, and they could,
/// should they wake up.
fn shut_out_the_past(args: &Args) -> Result<(), MkfsError> {
    let failed = |why: String| MkfsError::Reserved { device: shown(&args.device), why };
    let visitor = beside(args, true)?;
    let Some(fencing) = visitor.fencing() else { return Ok(()) };
    match fencing.fence_all_others() {
        Ok(0) => Ok(()),
        Ok(hosts) => {
            eprintln!(
                "mkfs.lunfs: {hosts} registrations that hosts had left on '{}' were removed",
                shown(&args.device)
            );
            Ok(())
        }
        Err(e) => Err(failed(e.to_string())),
    }
}

/// Finds out by doing whether the device keeps what a volume is built on; see `device::check`. What is written to is
/// about to be formatted, and is put back.
fn prove(args: &Args, dev: &Arc<dyn BlockDevice>, volume_bytes: u64) -> Result<CheckedUnit, MkfsError> {
    let device = shown(&args.device);
    let unit = CheckedUnit { name: dev.unit_name().unwrap_or_default(), ..CheckedUnit::default() };
    // Inside the volume: what lies behind it is not ours.
    let Some(at) = volume_bytes.checked_sub(SCRATCH_BYTES) else { return Ok(unit) };
    let mut handles = vec![dev.clone()];
    let is_lun = !unit.name.is_empty();
    if is_lun {
        shut_out_the_past(args)?;
        if dev.own_nexus() {
            // A file was opened for us alone; on a LUN two sessions must race.
            handles.push(beside(args, false)?);
        }
    }
    let failed = |error| MkfsError::Scratch { device: device.clone(), error };
    let scratch = Scratch::take(&handles, at).map_err(failed)?;
    let mut report = Report { properties: scratch.all(RACE_ROUNDS), ..Report::default() };
    if let Verdict::DoNotUse(why) = report.verdict() {
        scratch.restore().map_err(failed)?;
        return Err(MkfsError::Unfit { device, why });
    }
    if is_lun && args.reservations != Reservations::Off {
        let open = |reservations| beside(args, reservations).map_err(|e| e.to_string());
        report.reservations = match known_to_suffer(&**dev) {
            Some(why) => vec![Property::of("reservations", Err(why.into()))],
            None if !dev.own_nexus() => {
                let why = "to the target this machine is one party, so one host can't try them alone";
                vec![Property::not_asked("reservations", why)]
            }
            None => fences(&open, at, ROUNDS_AFTER_CONFLICT)
                .unwrap_or_else(|why| vec![Property::of("reservations", Err(why))]),
        };
    }
    let spoilt = |p: &&Property| p.name == AFTER_A_CONFLICT && p.finding == Finding::Bad;
    if let Some(spoilt) = report.reservations.iter().find(spoilt) {
        // Whatever is made on it now loses data.
        let why = format!(
            "{}: {}; restart the target before anybody uses the unit, then give --reservations off",
            spoilt.name, spoilt.words
        );
        return Err(MkfsError::Unfit { device, why });
    }
    if let Err(error) = scratch.restore() {
        if report.reservations.is_empty() {
            return Err(failed(error));
        }
        // There are targets that a reservation locks up.
        let why = format!(
            "after its reservations were tried: {error}; restart the target, then give --reservations off"
        );
        return Err(MkfsError::Unfit { device, why });
    }
    let verdict = report.verdict();
    let proved = verdict == Verdict::Good;
    let required = args.reservations == Reservations::Required;
    let untried = report.reservations.iter().all(|p| p.finding == Finding::NotAsked);
    if required && !is_lun {
        let why = "it is a file or a loop device, where each mount's fencing= says what is done".into();
        return Err(MkfsError::NoReservations { device, why });
    }
    // What can't be tried from here is taken from who says that it is so.
    if required && !proved && !untried {
        return Err(MkfsError::NoReservations { device, why: verdict.to_string() });
    }
    if !is_lun {
        // Nothing that could be told apart from another one.
        return Ok(unit);
    }
    Ok(CheckedUnit {
        checked_secs: u64::try_from(wall_clock().0).unwrap_or(0),
        proved_reservations: proved,
        reservations: proved || required,
        ..unit
    })
}

fn check(args: &Args, dev: &dyn BlockDevice) -> Result<Option<Previous>, MkfsError> {
    let show = !args.quiet && std::io::stderr().is_terminal();
    let mut shown = false;
    let mut progress = |at: Watching| {
        if show {
            shown = true;
            let (done, of) = (at.watched.as_secs(), at.of.as_secs());
            eprint!("\rwatching the heartbeats of the old volume: {done} of {of} s ");
            let _ = std::io::stderr().flush();
        }
    };
    let result = preflight(dev, args.force, &mut progress);
    if shown {
        eprintln!();
    }
    let device = crate::device::open::shown(&args.device);
    result.map_err(|error| MkfsError::Preflight { device, error })
}

fn print_volume(device: &str, superblock: &Superblock, report: Option<&FormatReport>) {
    let g = &superblock.geometry;
    let d = &superblock.durations;
    let block = crate::types::BLOCK_BYTES_U64;
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("  {name:<10}{value}\n"));
    if !superblock.label.is_empty() {
        line("label", superblock.label.clone());
    }
    line("id", superblock.volume.to_string());
    line("size", format!("{} ({} blocks of 4 KiB)", bytes(g.size_bytes()), g.size_blocks));
    line("usable", bytes(g.usable_blocks() * block));
    line("slots", format!("{} (hosts that can mount at once)", g.slots));
    line("journals", format!("{} x {}", g.slots, bytes(g.journal_blocks * block)));
    line("clusters", format!("{} x {}", g.clusters(), bytes(g.cluster_blocks * block)));
    let copies = g.superblock_copies().iter().map(|at| at.to_string()).collect::<Vec<_>>().join(" ");
    line("copies", format!("of the superblock at blocks {copies}"));
    line(
        "liveness",
        format!(
            "a beat each {}, a host stops after {}, is dead after {}",
            span_ms(d.beat_ms.into()),
            span_ms(d.lease_ms.into()),
            span_ms(d.dead_ms.into())
        ),
    );
    if let (Some(_), false) = (report, superblock.unit.name.is_empty()) {
        let how = if superblock.unit.reservations { "with reservations" } else { "without reservations" };
        line("unit", format!("{}, {how}", superblock.unit.name));
    }
    if let Some(report) = report {
        line(
            "written",
            format!(
                "{} in {} commands and {} flushes, {}",
                bytes(report.bytes_written),
                report.write_commands,
                report.flushes,
                span_ms(report.elapsed.as_millis() as u64)
            ),
        );
    }
    let heading = match report {
        Some(_) => "LunFS volume made on",
        None => "Would make a LunFS volume (nothing was written) on",
    };
    // A reader that went away is no reason to call the volume not made.
    let _ = write!(std::io::stdout().lock(), "{heading} {device}\n{out}");
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("'{text}' is not a size such as 512M, 10G or 64T");
        let trimmed = text.strip_suffix(['B', 'b']).unwrap_or(text);
        let trimmed = trimmed.strip_suffix(['i', 'I']).unwrap_or(trimmed);
        let (digits, shift) = match trimmed.char_indices().last() {
            Some((at, unit)) if unit.is_ascii_alphabetic() => {
                let power = "KMGTPE".find(unit.to_ascii_uppercase()).ok_or_else(bad)?;
                (&trimmed[..at], 10 * (power as u32 + 1))
            }
            _ => (trimmed, 0),
        };
        if !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let count: u64 = digits.parse().map_err(|_| bad())?;
        match count.checked_mul(1 << shift) {
            Some(size) => Ok(Size(size)),
            None => Err(format!("'{text}' is too large")),
        }
    }
}

pub(super) fn logical_block(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("512 or 4096".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let size = |text: &str| text.parse::<Size>().map(|s| s.0);
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("512M"), Ok(512 << 20));
        assert_eq!(size("64TiB"), Ok(64 << 40));
        assert_eq!(size("10gb"), Ok(10 << 30));
        for bad in ["", "M", "-1", "+5", "1.5G", "10X", "16E", "99999999999999999999", "é", "1é"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
