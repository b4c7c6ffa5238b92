//! What a benchmark run says: figures with their conditions, and bars that were met or missed.

use std::fmt::Write as _;

use serde::Serialize;

/// Everything of one run; printed as a table or as one JSON object. Fields are only ever added.
#[derive(Serialize, Default)]
pub struct Report {
    pub version: u32,
    pub lunfs: &'static str,
    pub machine: Machine,
    pub figures: Vec<Figure>,
    pub bars: Vec<Bar>,
    /// What could not be measured here, and why.
    pub skipped: Vec<String>,
}

/// Where it was measured.
#[derive(Serialize, Default)]
pub struct Machine {
    pub kernel: String,
    pub cpus: usize,
    /// Type of the filesystem that the image lies on.
    pub image_on: String,
    pub image_bytes: u64,
    /// One-minute load average when the run began: what else was going on.
    pub load: f64,
}

#[derive(Serialize, Clone)]
pub struct Figure {
    pub group: &'static str,
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// Under which conditions; empty: as the group says.
    pub conditions: String,
}

#[derive(Serialize, Clone)]
pub struct Bar {
    pub name: String,
    pub value: f64,
    pub at_most: f64,
    pub unit: &'static str,
    pub met: bool,
}

impl Report {
    pub fn figure(
        &mut self,
        group: &'static str,
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        conditions: impl Into<String>,
    ) {
        let (name, conditions) = (name.into(), conditions.into());
        self.figures.push(Figure { group, name, value, unit, conditions });
    }

    pub fn bar(&mut self, name: impl Into<String>, value: f64, at_most: f64, unit: &'static str) {
        self.bars.push(Bar { name: name.into(), value, at_most, unit, met: value <= at_most });
    }

    pub fn all_met(&self) -> bool {
        self.bars.iter().all(|bar| bar.met)
    }

    pub fn table(&self) -> String {
        let m = &self.machine;
        let mut out = format!(
            "LunFS {} on {} CPUs, kernel {}, image ({}) on {}, load {:.1} when the run began\n",
            self.lunfs,
            m.cpus,
            m.kernel,
            crate::inspect::table::bytes(m.image_bytes),
            m.image_on,
            m.load
        );
        let (mut group, mut width) = ("", 0);
        for f in &self.figures {
            if f.group != group {
                group = f.group;
                let names = self.figures.iter().filter(|f| f.group == group).map(|f| f.name.chars().count());
                width = names.max().unwrap_or(0);
                let _ = write!(out, "\n{group}\n");
            }
            let line =
                format!("  {:width$}  {:>9}  {:<13}  {}", f.name, number(f.value), f.unit, f.conditions);
            let _ = writeln!(out, "{}", line.trim_end());
        }
        out.push_str("\nBars\n");
        let width = self.bars.iter().map(|b| b.name.chars().count()).max().unwrap_or(0);
        for b in &self.bars {
            let verdict = if b.met { "pass" } else { "FAIL" };
            let (value, limit) = (number(b.value), number(b.at_most));
            let _ = writeln!(out, "  {verdict}  {:width$}  {value:>8} of at most {limit} {}", b.name, b.unit);
        }
        for skipped in &self.skipped {
            let _ = writeln!(out, "  not measured: {skipped}");
        }
        out
    }
}

/// Three digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 || v == 0.0 => crate::cli::demo::grouped(value.round() as u64),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missed_bar_shows() {
        let mut report = Report::default();
        report.figure("Creates", "alone", 12_345.6, "a second", "10,000 files");
        report.bar("swaps", 0.0, 0.0, "a create");
        assert!(report.all_met());
        report.bar("commands", 0.6, 0.5, "a create");
        assert!(!report.all_met());
        let table = report.table();
        assert!(table.contains("12,346") && table.contains("FAIL  commands"), "{table}");
        assert!(serde_json::to_string(&report).is_ok_and(|json| json.contains("\"met\":false")));
    }
}
