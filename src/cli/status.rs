//! `lunfs status`: the volume, its hosts and who waits for whom, read from the disk alone, on any host,
//! mounted or not. Never writes. Where the volume is mounted on this machine and its daemons may be asked, also
//! how their compare-and-writes went.
//!
//! Exit status: 0 all was read, 1 the volume can't be read or parts of it are damaged (they are named), 2
//! wrong usage.
//!
//! # JSON (`--json`)
//!
//! One object. Fields are only ever added. Sizes in bytes, times in milliseconds unless the name says
//! otherwise; block addresses are in 4 KiB blocks.
//!
//! ```text
//! volume    id, label, size_bytes, usable_bytes, used_bytes, free_bytes, inodes (in use beyond those of
//!           mkfs), slots, clusters, cluster_bytes, journal_bytes, created_secs, generation, features [3],
//!           unit {name, checked_secs, verdict (not checked, good, good without reservations), reservations (hosts
//!           mount with them)},
//!           beat_ms, lease_ms, dead_ms, superblock_block, superblock_problem (null: the primary was used)
//! watched_ms  how long the slots were watched
//! hosts[]   one per slot that was ever claimed: slot, host, host_uuid, incarnation, state (free live left
//!           withdrawn recovering recovered unrecoverable; null: unreadable), verdict (moving silent dead
//!           ended unreadable), unchanged_ms, beat, beat_ms, lease_ms, dead_ms, hold_ms, fencing (device: it can be shut out of the device;
//!           lease: only waiting stops it), protocol,
//!           logical_block_bytes, pid, clock_skew_ms (null unless it moved), last_beat_clock_ms (how long ago
//!           by the two wall clocks), recoverer {slot, incarnation, host, life} or null, net_blocks,
//!           net_inodes, problem
//! waits[]   waiter {slot, incarnation, host, life}, lock, want (shared exclusive openers),
//!           swaps_since_begin, seen_for_ms, record (a lock as in `lunfs locks --json`, or null), problem
//! local[]   mounts of the volume on this machine whose daemon answered: host, mountpoint, slot, swaps and latency
//!           as in the counters of a mount (`stats_socket`)
//! problems[]  sentences, each naming a block
//! ```

mod local;

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use self::local::Local;
use super::locks::{Look, print_json, wait_table};
use crate::inspect::locks::Wait;
use crate::inspect::names::{Host, Hosts, printable};
use crate::inspect::table::{Table, bytes, span_ms};
use crate::inspect::watch::{Verdict, WatchedSlot, wall_ns};
use crate::inspect::{InspectError, Volume};
use crate::layout::slot::SlotState;
use crate::layout::superblock::CheckedUnit;
use crate::types::BLOCK_BYTES_U64;

/// Show a volume, its hosts and who waits for whom; of mounts on this machine also how compare-and-writes went.
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
    /// Watch the heartbeats for this long. Default: somewhat more than two beats.
    #[arg(long, value_name = "MS")]
    pub watch_ms: Option<u64>,
}

#[derive(Serialize)]
struct Report {
    volume: VolumeReport,
    watched_ms: u64,
    hosts: Vec<HostReport>,
    waits: Vec<Wait>,
    local: Vec<Local>,
    problems: Vec<String>,
}

#[derive(Serialize)]
struct VolumeReport {
    id: String,
    label: String,
    size_bytes: u64,
    usable_bytes: u64,
    used_bytes: u64,
    free_bytes: u64,
    inodes: u64,
    slots: u16,
    clusters: u64,
    cluster_bytes: u64,
    journal_bytes: u64,
    created_secs: u64,
    generation: u64,
    features: [u64; 3],
    unit: UnitReport,
    beat_ms: u32,
    lease_ms: u32,
    dead_ms: u32,
    superblock_block: u64,
    superblock_problem: Option<String>,
}

/// What mkfs found out of the unit.
#[derive(Serialize)]
struct UnitReport {
    name: String,
    checked_secs: u64,
    verdict: &'static str,
    reservations: bool,
}

impl UnitReport {
    fn of(unit: &CheckedUnit) -> UnitReport {
        let verdict = match (unit.checked_secs, unit.proved_reservations) {
            (0, _) => "not checked",
            (_, true) => "good",
            (_, false) => "good without reservations",
        };
        let CheckedUnit { name, checked_secs, reservations, .. } = unit.clone();
        UnitReport { name, checked_secs, verdict, reservations }
    }
}

#[derive(Serialize, Default)]
struct HostReport {
    slot: u16,
    host: String,
    host_uuid: String,
    incarnation: u64,
    state: Option<SlotState>,
    verdict: Option<Verdict>,
    unchanged_ms: u64,
    beat: u64,
    beat_ms: u32,
    lease_ms: u32,
    dead_ms: u32,
    hold_ms: u32,
    fencing: &'static str,
    protocol: u32,
    logical_block_bytes: u32,
    pid: u32,
    clock_skew_ms: Option<i64>,
    last_beat_clock_ms: Option<i64>,
    recoverer: Option<Host>,
    net_blocks: i64,
    net_inodes: i64,
    problem: Option<String>,
}

/// Looks, watches and reports.
pub fn run(args: Args) -> ExitCode {
    super::locks::with_volume("status", &args.device, |volume| {
        let report = look(volume, args.watch_ms.map(Duration::from_millis))?;
        let sound = report.problems.is_empty();
        if args.json {
            print_json(&report);
        } else {
            let _ = std::io::stdout().lock().write_all(text(&args.device, &report).as_bytes());
        }
        Ok(sound)
    })
}

fn look(volume: &Volume<'_>, watch: Option<Duration>) -> Result<Report, InspectError> {
    let look = Look::at(volume, watch)?;
    let hosts = Hosts(&look.slots);
    let claimed = |w: &&WatchedSlot| !matches!(&w.record, Ok(r) if r.state == SlotState::Free);
    Ok(Report {
        volume: volume_report(volume, &look.slots),
        watched_ms: look.watched_ms,
        hosts: look.slots.iter().filter(claimed).map(|w| host_report(w, &hosts)).collect(),
        waits: look.waits(volume),
        local: local::of_volume(&volume.id().to_string()),
        problems: look.problems,
    })
}

fn volume_report(volume: &Volume<'_>, slots: &[WatchedSlot]) -> VolumeReport {
    let (sb, g) = (&volume.superblock, volume.geometry());
    let records = || slots.iter().filter_map(|w| w.record.as_ref().ok());
    let used = records().fold(0i64, |sum, r| sum.saturating_add(r.net_blocks));
    let inodes = records().fold(0i64, |sum, r| sum.saturating_add(r.net_inodes));
    let usable = g.usable_blocks();
    // Counters of hosts that are at work are taken at different moments: keep the sum possible.
    let used = u64::try_from(used).unwrap_or(0).min(usable);
    VolumeReport {
        id: volume.id().to_string(),
        label: sb.label.clone(),
        size_bytes: g.size_bytes(),
        usable_bytes: usable * BLOCK_BYTES_U64,
        used_bytes: used * BLOCK_BYTES_U64,
        free_bytes: (usable - used) * BLOCK_BYTES_U64,
        inodes: u64::try_from(inodes).unwrap_or(0),
        slots: g.slots,
        clusters: g.clusters(),
        cluster_bytes: g.cluster_blocks * BLOCK_BYTES_U64,
        journal_bytes: g.journal_blocks * BLOCK_BYTES_U64,
        created_secs: sb.created_secs,
        generation: sb.generation,
        features: sb.features,
        unit: UnitReport::of(&sb.unit),
        beat_ms: sb.durations.beat_ms,
        lease_ms: sb.durations.lease_ms,
        dead_ms: sb.durations.dead_ms,
        superblock_block: volume.superblock_at.0,
        superblock_problem: volume.primary_error.as_ref().map(ToString::to_string),
    }
}

fn host_report(watched: &WatchedSlot, hosts: &Hosts<'_>) -> HostReport {
    let verdict = Some(watched.verdict());
    let unchanged_ms = watched.unchanged_for().as_millis() as u64;
    let slot = watched.slot.0;
    let record = match &watched.record {
        Ok(record) => record,
        Err(error) => {
            let problem = Some(error.to_string());
            return HostReport { slot, verdict, unchanged_ms, problem, ..HostReport::default() };
        }
    };
    HostReport {
        slot,
        host: record.host_name.clone(),
        host_uuid: uuid::Uuid::from_bytes(record.host_uuid).to_string(),
        incarnation: record.incarnation.0,
        state: Some(record.state),
        verdict,
        unchanged_ms,
        beat: record.beat,
        beat_ms: record.durations.beat_ms,
        lease_ms: record.durations.lease_ms,
        dead_ms: record.durations.dead_ms,
        hold_ms: record.durations.hold_ms,
        fencing: if record.fencing_key == 0 { "lease" } else { "device" },
        protocol: record.protocol,
        logical_block_bytes: record.logical_block_bytes,
        pid: record.pid,
        clock_skew_ms: watched.last_change.and_then(|c| c.skew_ms),
        last_beat_clock_ms: (record.wall_ns != 0)
            .then(|| wall_ns().saturating_sub(record.wall_ns) / 1_000_000),
        recoverer: record.recoverer.map(|owner| hosts.owner(owner)),
        net_blocks: record.net_blocks,
        net_inodes: record.net_inodes,
        problem: None,
    }
}

fn text(device: &str, report: &Report) -> String {
    let v = &report.volume;
    let label = if v.label.is_empty() { "(no label)".into() } else { printable(&v.label) };
    let percent = 100 * v.used_bytes / v.usable_bytes.max(1);
    let mut out = format!(
        "LunFS volume {label} on {device}\n  id     {}\n  size   {}, usable {}\n  used   {} ({percent} %), free {}\n  \
         terms  a beat each {}, a host stops after {}, is dead after {}\n",
        v.id,
        bytes(v.size_bytes),
        bytes(v.usable_bytes),
        bytes(v.used_bytes),
        bytes(v.free_bytes),
        span_ms(v.beat_ms.into()),
        span_ms(v.lease_ms.into()),
        span_ms(v.dead_ms.into()),
    );
    if !v.unit.name.is_empty() {
        let how = if v.unit.reservations { "with" } else { "without" };
        out.push_str(&format!(
            "  unit   {}: {} when the volume was made; hosts mount {how} reservations\n",
            printable(&v.unit.name),
            v.unit.verdict
        ));
    }
    let moving = report.hosts.iter().filter(|h| h.verdict == Some(Verdict::Moving)).count();
    let watched = span_ms(report.watched_ms);
    if report.hosts.is_empty() {
        out.push_str(&format!("\nHosts: none of {} slots was ever claimed\n", v.slots));
    } else {
        out.push_str(&format!("\nHosts: {moving} alive, {} slots (watched for {watched})\n", v.slots));
        out.push_str(&host_table(&report.hosts).to_string());
    }
    match report.waits.is_empty() {
        true => out.push_str("\nNobody waits for a lock\n"),
        false => out.push_str(&format!("\nWaits: {}\n{}", report.waits.len(), wait_table(&report.waits))),
    }
    report.local.iter().for_each(|mount| out.push_str(&local::text(mount)));
    super::locks::push_problems(&mut out, &report.problems);
    out
}

fn host_table(hosts: &[HostReport]) -> Table {
    let mut table = Table::new(&[
        "SLOT",
        "HOST",
        "LIFE",
        "STATE",
        "HEARTBEAT",
        "TERMS",
        "FENCING",
        "PROTO",
        "CLOCK",
        "RECOVERY",
    ]);
    for h in hosts {
        let heartbeat = match h.verdict {
            Some(Verdict::Moving) => format!("moving, last {} ago", span_ms(h.unchanged_ms)),
            Some(Verdict::Silent) => format!("silent for {} or more", span_ms(h.unchanged_ms)),
            Some(Verdict::Dead) => format!("DEAD, silent for {} or more", span_ms(h.unchanged_ms)),
            Some(Verdict::Unreadable) => "unreadable".into(),
            _ => "-".into(),
        };
        let clock = match (h.clock_skew_ms, h.last_beat_clock_ms) {
            (Some(skew), _) => format!("{skew:+} ms"),
            (None, Some(ago)) if ago >= 0 => format!("stopped {} ago", span_ms(ago as u64)),
            _ => "-".into(),
        };
        let state = h.state.map_or("?".into(), |s| format!("{s:?}").to_lowercase());
        let recovery = match (&h.recoverer, h.state) {
            (Some(by), Some(SlotState::Recovering)) => format!("by {by}"),
            (Some(by), Some(SlotState::Recovered)) => format!("done by {by}"),
            (Some(by), Some(SlotState::Unrecoverable)) => format!("failed at {by}"),
            _ => "-".into(),
        };
        table.row(vec![
            h.slot.to_string(),
            if h.host.is_empty() { "?".into() } else { printable(&h.host) },
            h.incarnation.to_string(),
            state,
            heartbeat,
            format!("{}+{} ms", h.dead_ms, h.hold_ms),
            h.fencing.into(),
            h.protocol.to_string(),
            clock,
            recovery,
        ]);
    }
    table
}
