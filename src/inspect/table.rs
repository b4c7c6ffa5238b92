//! Aligned text tables for tools. Widths are counted in characters; the last column is not padded.

/// Rows under a heading, each as long as the heading.
pub struct Table {
    heading: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(heading: &[&'static str]) -> Self {
        Table { heading: heading.to_vec(), rows: Vec::new() }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let heading: Vec<String> = self.heading.iter().map(|h| (*h).to_owned()).collect();
        let width = |column: usize| {
            let cells = std::iter::once(&heading).chain(&self.rows).filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..heading.len()).map(width).collect();
        for row in std::iter::once(&heading).chain(&self.rows) {
            let mut line = String::from(" ");
            for (cell, width) in row.iter().zip(&widths) {
                line.push(' ');
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', (width + 1).saturating_sub(cell.chars().count())));
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A number of bytes for people: three digits and a binary unit.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = count as f64;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match value {
        v if unit == 0 || v.fract() < 0.005 => format!("{v:.0} {}", UNITS[unit]),
        v if v < 10.0 => format!("{v:.2} {}", UNITS[unit]),
        v => format!("{v:.1} {}", UNITS[unit]),
    }
}

/// Milliseconds for people.
pub fn span_ms(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..120_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        120_000..7_200_000 => format!("{} min", ms / 60_000),
        7_200_000..172_800_000 => format!("{} h", ms / 3_600_000),
        _ => format!("{} days", ms / 86_400_000),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned_and_readable() {
        let mut table = Table::new(&["slot", "host"]);
        table.row(vec!["3".into(), "hypervisor-ä".into()]);
        assert_eq!(table.to_string(), "  slot  host\n  3     hypervisor-ä\n");
        assert_eq!(bytes(512), "512 B");
        assert_eq!(bytes(64 << 40), "64 TiB");
        assert_eq!(bytes(1536 << 20), "1.50 GiB");
        assert_eq!(span_ms(2345), "2.3 s");
        assert_eq!(span_ms(90 * 3_600_000), "3 days");
    }
}
