//! What the daemons of this machine tell about their compare-and-writes on one volume: the one part of
//! `lunfs status` that does not come from the disk. A daemon that can't be asked is left out.

use serde::Serialize;

use crate::ats::{Cause, CauseCounts};
use crate::cli::stats_socket;
use crate::inspect::names::printable;
use crate::inspect::table::Table;
use crate::lease::TimingSummary;
use crate::volume::{LatencyStats, SwapCounts};

/// The compare-and-writes of one mount since it was made.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Local {
    pub host: String,
    pub mountpoint: String,
    pub slot: u16,
    pub swaps: SwapCounts,
    pub latency: LatencyStats,
}

/// The mounts of a volume on this machine.
pub fn of_volume(id: &str) -> Vec<Local> {
    let answers = stats_socket::all().into_iter().filter_map(|path| stats_socket::read(&path).ok());
    let mut mounts: Vec<Local> = answers
        .filter(|stats| stats.volume.volume == id)
        .map(|stats| Local {
            host: stats.host,
            mountpoint: stats.mountpoint,
            slot: stats.volume.slot,
            swaps: stats.volume.swaps,
            latency: stats.volume.latency,
        })
        .collect();
    mounts.sort_by_key(|mount| mount.slot);
    mounts
}

pub fn text(mount: &Local) -> String {
    let Local { host, mountpoint, swaps, latency, .. } = mount;
    let mut out = format!(
        "\nCompare-and-writes of host {} since it was mounted on {}\n  commands {}\n",
        printable(host),
        printable(mountpoint),
        times(&latency.compare_and_write),
    );
    out.push_str(&format!("  swaps    {}\n", times(&latency.swap)));
    let mut table = Table::new(&["BLOCK", "COUNT", "NOT SIMPLY SUCCEEDED"]);
    let kinds: [(&str, &CauseCounts); 3] = [
        ("lock", &swaps.causes.lock),
        ("heartbeat", &swaps.causes.heartbeat),
        ("doorbell", &swaps.causes.doorbell),
    ];
    for (kind, counts) in kinds {
        for cause in Cause::ALL.iter().filter(|cause| counts.get(**cause) > 0) {
            table.row(vec![kind.into(), counts.get(*cause).to_string(), cause.words().into()]);
        }
    }
    match table.is_empty() {
        true => out.push_str("  all succeeded\n"),
        false => out.push_str(&table.to_string()),
    }
    out
}

fn times(t: &TimingSummary) -> String {
    let span = |us: u64| if us < 1000 { format!("{us} us") } else { format!("{:.1} ms", us as f64 / 1000.0) };
    match t.count {
        0 => "none".into(),
        count => format!(
            "{count}, half within {}, 99 % within {}, longest {}",
            span(t.p50_us),
            span(t.p99_us),
            span(t.max_us)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_happened_is_shown() {
        let mut mount = Local { host: "alpha".into(), mountpoint: "/mnt".into(), ..Local::default() };
        assert!(text(&mount).contains("all succeeded"));
        mount.swaps.causes.heartbeat.own_write_landed = 3;
        mount.latency.compare_and_write =
            TimingSummary { count: 9, p50_us: 300, p99_us: 1200, max_us: 50_000 };
        let text = text(&mount);
        assert!(
            text.contains("commands 9, half within 300 us, 99 % within 1.2 ms, longest 50.0 ms"),
            "{text}"
        );
        assert!(text.contains("heartbeat  3      false miscompare: our own write had landed"), "{text}");
        assert!(!text.contains("another host was faster"), "{text}");
    }
}
