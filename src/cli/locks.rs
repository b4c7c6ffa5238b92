//! `lunfs locks`: who waits for which lock and who holds it; with `--scan` every lock of the volume that
//! is not free. Read from the disk alone, on any host. Never writes.
//!
//! Exit status: 0 all was read, 1 the volume can't be read or parts of it are damaged (they are named), 2
//! wrong usage.
//!
//! # JSON (`--json`)
//!
//! One object. Fields are only ever added. Addresses are in 4 KiB blocks.
//!
//! ```text
//! volume     the volume's id
//! waits[]    as in `lunfs status --json`
//! contended[]  every lock that is waited for, once, as below
//! locks[]    only with --scan, in the order of the disk: every lock that is not free, or has openers,
//!            waiters or a next. Of each: lock, kind (volume rename inode cluster), mode (free shared
//!            exclusive), holders[], tenure, openers[], waiters[], next, swap_counter, change_counter,
//!            inode, cluster, path. A host is {slot, incarnation, host, life}; life is one of moving silent
//!            dead withdrawn recovering unrecoverable settled unknown
//! problems[]   sentences, each naming a block
//! ```
//!
//! Without `--scan` nothing but slots, request blocks and the locks named in them is read.

use std::collections::BTreeMap;
use std::io::{BufWriter, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use crate::device::open::{OpenOptions, open_device, shown};
use crate::inspect::locks::{Asked, LockView, Wait, hosts_text, requests, view, waits};
use crate::inspect::names::Hosts;
use crate::inspect::path::Paths;
use crate::inspect::scan::{Scanned, all_locks};
use crate::inspect::table::{Table, span_ms};
use crate::inspect::watch::{SlotWatch, WatchedSlot};
use crate::inspect::{InspectError, Volume};
use crate::layout::demand::Want;
use crate::layout::lock::{LockMode, LockRecord};

/// Show who waits for which lock and who holds it.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Exit status: 0 all was read, 1 the volume can't be read or is damaged, 2 wrong usage."
)]
pub struct Args {
    /// The block device or file that holds the volume.
    pub device: String,
    /// Print one JSON object.
    #[arg(long)]
    pub json: bool,
    /// Read every lock of the volume and show those that are not free.
    #[arg(long)]
    pub scan: bool,
    /// Watch the heartbeats for this long. Default: somewhat more than two beats.
    #[arg(long, value_name = "MS")]
    pub watch_ms: Option<u64>,
}

/// What slots and request blocks showed at both ends of a watch.
pub struct Look {
    pub slots: Vec<WatchedSlot>,
    pub watched_ms: u64,
    pub problems: Vec<String>,
    asked_first: Vec<Asked>,
    asked_last: Vec<Asked>,
}

impl Look {
    /// Watches for `span`, or for somewhat more than two beats of the slowest living host.
    pub fn at(volume: &Volume<'_>, span: Option<Duration>) -> Result<Self, InspectError> {
        let mut watch = SlotWatch::start(volume)?;
        let (asked_first, _) = requests(volume, &Hosts(&watch.slots));
        watch.run(span.unwrap_or_else(|| watch.two_beats()))?;
        let watched_ms = watch.watched_for().as_millis() as u64;
        let slots = watch.slots;
        let (asked_last, unread) = requests(volume, &Hosts(&slots));
        let stand_in =
            |error| format!("{error}; its copy at block {} was used instead", volume.superblock_at);
        let mut problems: Vec<String> = volume.primary_error.iter().map(stand_in).collect();
        problems.extend(slots.iter().filter_map(|w| w.record.as_ref().err()).map(ToString::to_string));
        problems.extend(unread);
        Ok(Look { slots, watched_ms, problems, asked_first, asked_last })
    }

    pub fn waits(&self, volume: &Volume<'_>) -> Vec<Wait> {
        let mut paths = Paths::new(volume);
        let hosts = Hosts(&self.slots);
        waits(volume, &hosts, &mut paths, &self.asked_last, &self.asked_first, self.watched_ms)
    }
}

/// Opens the volume read-only, lets `body` report on it, and turns the outcome into an exit status:
/// `body` says whether everything was sound.
pub fn with_volume(
    command: &str,
    device: &str,
    body: impl FnOnce(&Volume<'_>) -> Result<bool, InspectError>,
) -> ExitCode {
    let failed = |error: &dyn std::fmt::Display| {
        eprintln!("lunfs {command}: {}: {error}", shown(device));
        ExitCode::FAILURE
    };
    let dev = match open_device(device, OpenOptions { read_only: true, ..OpenOptions::default() }) {
        Ok(dev) => dev,
        Err(error) => {
            eprintln!("lunfs {command}: {error}");
            return ExitCode::FAILURE;
        }
    };
    match Volume::open(&*dev).and_then(|volume| body(&volume)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed(&error),
    }
}

/// Looks, scans if asked to, and reports.
pub fn run(args: Args) -> ExitCode {
    with_volume("locks", &args.device, |volume| {
        let look = Look::at(volume, args.watch_ms.map(Duration::from_millis))?;
        let waits = look.waits(volume);
        let mut out = BufWriter::new(std::io::stdout().lock());
        // Output errors (a reader that went away) end the scan and are no fault of the volume.
        let problems = match args.json {
            true => report_json(&mut out, volume, &look, &waits, args.scan),
            false => report_text(&mut out, volume, &look, &waits, args.scan),
        };
        let _ = out.flush();
        Ok(problems.unwrap_or(0) == 0)
    })
}

/// Locks that are waited for, once each.
fn contended(waits: &[Wait]) -> Vec<&LockView> {
    let by_address: BTreeMap<u64, &LockView> =
        waits.iter().filter_map(|w| w.record.as_ref()).map(|r| (r.lock, r)).collect();
    by_address.into_values().collect()
}

/// Hands every lock that is in use to `each`; what could not be read is returned.
fn scan(
    volume: &Volume<'_>,
    look: &Look,
    each: &mut dyn FnMut(LockView) -> std::io::Result<()>,
) -> std::io::Result<Vec<String>> {
    let (hosts, mut paths) = (Hosts(&look.slots), Paths::new(volume));
    let (mut problems, mut result) = (Vec::new(), Ok(()));
    all_locks(volume, &mut |scanned| {
        match scanned {
            Scanned::Lock(record) if in_use(&record) => {
                result = each(view(volume, &hosts, Some(&mut paths), &record));
            }
            Scanned::Lock(_) => {}
            Scanned::Problem(error) => problems.push(error.to_string()),
        }
        result.is_ok()
    });
    result.map(|()| problems)
}

fn in_use(record: &LockRecord) -> bool {
    record.mode != LockMode::Free
        || !record.openers.is_empty()
        || !record.waiters.is_empty()
        || record.next.is_some()
}

/// The JSON object, with the locks written as they are found: a volume can have millions.
fn report_json(
    out: &mut dyn Write,
    volume: &Volume<'_>,
    look: &Look,
    waits: &[Wait],
    scanning: bool,
) -> std::io::Result<usize> {
    let id = json(&volume.id().to_string());
    write!(out, "{{\"volume\":{id},\"waits\":{},\"contended\":{}", json(&waits), json(&contended(waits)))?;
    let mut problems = look.problems.clone();
    if scanning {
        write!(out, ",\"locks\":[")?;
        let mut comma = "";
        problems.extend(scan(volume, look, &mut |lock| {
            write!(out, "{comma}\n{}", json(&lock))?;
            comma = ",";
            Ok(())
        })?);
        write!(out, "]")?;
    }
    writeln!(out, ",\"problems\":{}}}", json(&problems))?;
    Ok(problems.len())
}

fn report_text(
    out: &mut dyn Write,
    volume: &Volume<'_>,
    look: &Look,
    waits: &[Wait],
    scanning: bool,
) -> std::io::Result<usize> {
    match waits.is_empty() {
        true => writeln!(out, "Nobody waits for a lock")?,
        false => write!(out, "Waits: {}\n{}", waits.len(), wait_table(waits))?,
    }
    let contended = contended(waits);
    if !contended.is_empty() {
        let mut table =
            Table::new(&["LOCK", "MODE", "HELD BY", "NEXT", "WAITERS", "OPENERS", "SWAPS", "COVERS"]);
        for lock in contended {
            table.row(lock_cells(lock));
        }
        write!(out, "\nContended locks:\n{table}")?;
    }
    let mut problems = look.problems.clone();
    if scanning {
        // One line as each is found, so the columns can't be as wide as their widest cell.
        writeln!(out, "\nLocks in use:")?;
        let mut count = 0u64;
        problems.extend(scan(volume, look, &mut |lock| {
            count += 1;
            let [at, mode, held, next, waiting, openers, swaps, covers] =
                lock_cells(&lock).try_into().unwrap_or_default();
            writeln!(
                out,
                "  {at:<12}{mode:<11}{covers}  held by {held}, next {next}, waiters {waiting}, openers \
                 {openers}, swaps {swaps}, changes {}",
                lock.change_counter
            )
        })?);
        writeln!(out, "  {count} in all")?;
    }
    let mut text = String::new();
    push_problems(&mut text, &problems);
    out.write_all(text.as_bytes())?;
    Ok(problems.len())
}

fn lock_cells(lock: &LockView) -> Vec<String> {
    vec![
        format!("{:#x}", lock.lock),
        lock.mode.to_owned(),
        lock.held_by(),
        lock.next.as_ref().map_or("-".into(), ToString::to_string),
        hosts_text(&lock.waiters),
        hosts_text(&lock.openers),
        lock.swap_counter.to_string(),
        lock.subject(),
    ]
}

/// Who waits, for what, held by whom.
pub fn wait_table(waits: &[Wait]) -> Table {
    let mut table = Table::new(&["WAITER", "WANTS", "OF", "HELD BY", "SINCE"]);
    for wait in waits {
        let want = match wait.want {
            Want::Shared => "share",
            Want::Exclusive => "exclusive",
            Want::Openers => "openers?",
        };
        let (subject, holders) = match (&wait.record, &wait.problem) {
            (Some(record), _) => (record.subject(), format!("{} ({})", record.held_by(), record.mode)),
            (None, problem) => (format!("lock {:#x}", wait.lock), problem.clone().unwrap_or_default()),
        };
        let swaps = wait.swaps_since_begin.map_or("?".into(), |n| n.to_string());
        let since = match wait.seen_for_ms {
            0 => format!("{swaps} swaps, new"),
            ms => format!("{swaps} swaps, {} or more", span_ms(ms)),
        };
        table.row(vec![wait.waiter.to_string(), want.into(), subject, holders, since]);
    }
    table
}

/// Appends what could not be read, if there is any.
pub fn push_problems(out: &mut String, problems: &[String]) {
    if problems.is_empty() {
        return;
    }
    out.push_str(&format!("\nProblems: {}\n", problems.len()));
    for problem in problems {
        out.push_str(&format!("  {problem}\n"));
    }
}

/// A value on one line of standard output.
pub fn print_json(value: &impl Serialize) {
    let _ = writeln!(std::io::stdout().lock(), "{}", json(value));
}

fn json(value: &impl Serialize) -> String {
    // Our own structures with string keys can't fail to serialise.
    serde_json::to_string(value).unwrap_or_else(|_| "null".into())
}
