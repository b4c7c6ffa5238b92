//! A lock that hosts want in turn, and what hosts cost that do nothing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::cli::scene::Host;
use crate::cli::stats_socket::DaemonStats;

/// Longer turns are counted as this long.
const LONGEST_NS: u64 = 100_000_000_000;

/// What moves the lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Four bytes into one file.
    Write,
    /// A new file in one directory.
    Create,
}

/// Hand-overs in strict turns.
pub struct HandOvers {
    /// Nanoseconds of each turn, as the caller waits for it.
    pub times: Histogram<u64>,
    /// As the daemons count: locks given to another host.
    pub given: u64,
    /// Compare-and-writes of all hosts for locks and doorbells.
    pub swaps: u64,
    /// All commands of all hosts but beats.
    pub commands: u64,
}

impl HandOvers {
    pub fn swaps_each(&self) -> f64 {
        self.swaps as f64 / self.given.max(1) as f64
    }

    pub fn quantile_ms(&self, quantile: f64) -> f64 {
        self.times.value_at_quantile(quantile) as f64 / 1e6
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn stats(hosts: &[&Host]) -> Result<Vec<DaemonStats>, String> {
    hosts.iter().map(|host| host.stats()).collect()
}

/// Given, swaps, commands.
fn moved(stats: &[DaemonStats]) -> (u64, u64, u64) {
    stats.iter().fold((0, 0, 0), |(given, swaps, commands), s| {
        let c = &s.volume.commands;
        let of_demand = c.demand.swaps;
        (
            given + s.volume.locks.given,
            swaps + c.lock.swaps + of_demand,
            commands + c.operations().commands() + c.demand.commands(),
        )
    })
}

/// `turns` turns, host after host.
pub fn hand_overs(hosts: &[&Host], turn: Turn, turns: u32) -> Result<HandOvers, String> {
    let name = format!("turns-{turn:?}-{}", hosts.len());
    if turn == Turn::Create
        && let Some(first) = hosts.first()
    {
        std::fs::create_dir(first.path(&name)).map_err(text)?;
    }
    let open = |host: &&Host| -> Result<Option<File>, String> {
        let open = || OpenOptions::new().write(true).create(true).truncate(false).open(host.path(&name));
        (turn == Turn::Write).then(open).transpose().map_err(text)
    };
    let files = hosts.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let act = |n: u32| -> Result<Duration, String> {
        let who = n as usize % hosts.len().max(1);
        let begun = Instant::now();
        match (files.get(who), hosts.get(who)) {
            (Some(Some(file)), _) => file.write_all_at(&n.to_le_bytes(), 0).map_err(text)?,
            (_, Some(host)) => {
                File::create_new(host.path(&name).join(n.to_string())).map_err(text)?;
            }
            _ => {}
        }
        Ok(begun.elapsed())
    };
    // The first rounds bring hosts to know each other's locks.
    let warm = 4 * hosts.len() as u32;
    for n in 0..warm {
        act(n)?;
    }
    let before = moved(&stats(hosts)?);
    let mut times = Histogram::new_with_bounds(1, LONGEST_NS, 3).map_err(text)?;
    for n in warm..warm + turns {
        times.saturating_record(act(n)?.as_nanos() as u64);
    }
    let after = moved(&stats(hosts)?);
    Ok(HandOvers {
        times,
        given: after.0 - before.0,
        swaps: after.1 - before.1,
        commands: after.2 - before.2,
    })
}

/// Commands per second and host while nobody does anything.
pub fn idle(hosts: &[&Host], time: Duration) -> Result<Vec<f64>, String> {
    let begun = Instant::now();
    let before = stats(hosts)?;
    std::thread::sleep(time);
    let (after, took) = (stats(hosts)?, begun.elapsed());
    let all = |s: &DaemonStats| {
        let c = &s.volume.commands;
        c.operations().plus(&c.idle()).commands()
    };
    Ok(before.iter().zip(&after).map(|(b, a)| (all(a) - all(b)) as f64 / took.as_secs_f64()).collect())
}

/// Waits until hosts that worked lately have committed what they did and brought it into place, and until one
/// that was asked lately looks at its doorbell seldom again.
pub fn come_to_rest(hosts: &[&Host]) -> Result<(), String> {
    let worked = || -> Result<Vec<u64>, String> {
        let of = |s: &DaemonStats| {
            let c = &s.volume.commands;
            c.journal.commands() + c.metadata.commands() + c.data.commands()
        };
        Ok(stats(hosts)?.iter().map(of).collect())
    };
    let begun = Instant::now();
    // Longer than what is committed may wait for its place.
    let quiet = Duration::from_secs(12);
    let (mut last, mut since) = (worked()?, Instant::now());
    while since.elapsed() < quiet && begun.elapsed() < 5 * quiet {
        std::thread::sleep(Duration::from_millis(500));
        let now = worked()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(())
}
