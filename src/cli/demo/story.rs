//! How the demo speaks: one line for each thing it checked, aligned, with colour only on a terminal.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;

use crate::cli::scene::Scene;

/// Columns of what is claimed; what was measured stands right of it.
const CLAIM_COLUMNS: usize = 66;

/// Prints as the demo goes, and counts.
pub struct Story {
    scene: Arc<Scene>,
    colour: bool,
    pub checked: u32,
    pub failed: u32,
}

impl Story {
    pub fn begin(scene: Arc<Scene>) -> Story {
        let colour = io::stdout().is_terminal()
            && std::env::var_os("NO_COLOR").is_none()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb");
        Story { scene, colour, checked: 0, failed: 0 }
    }

    fn paint(&self, code: &str, text: &str) -> String {
        match self.colour {
            true => format!("\x1b[{code}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }

    /// A line. A reader that went away does not stop the demo: it still has to clean up.
    pub fn say(&self, line: &str) {
        self.scene.halt_if_interrupted();
        let _ = writeln!(io::stdout().lock(), "{line}");
    }

    pub fn chapter(&self, title: &str) {
        self.say("");
        self.say(&self.paint("1", title));
    }

    /// Does `act` and says whether `claim` holds: `Ok` with what was measured, `Err` with what was seen
    /// instead.
    pub fn check(&mut self, claim: &str, act: impl FnOnce() -> Result<String, String>) {
        self.checked += 1;
        match act() {
            Ok(measured) => {
                let gap = CLAIM_COLUMNS.saturating_sub(claim.chars().count());
                let line = match measured.as_str() {
                    "" => claim.to_owned(),
                    _ => format!("{claim}{:gap$}  {}", "", self.paint("2", &measured)),
                };
                self.say(&format!("  {}  {line}", self.paint("32", "ok")));
            }
            Err(instead) => {
                self.failed += 1;
                self.say(&format!("  {}  {claim}", self.paint("1;31", "NO")));
                self.say(&format!("      {}", self.paint("31", &instead)));
            }
        }
    }

    /// Names and values below each other.
    pub fn facts(&self, facts: &[(&str, String)]) {
        let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        for (name, value) in facts {
            self.say(&format!("  {name:width$}  {value}"));
        }
    }
}

/// A number with a comma between thousands.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A time as people read it.
pub fn duration(time: std::time::Duration) -> String {
    match time.as_secs_f64() {
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 1.0 => format!("{:.1} ms", s * 1e3),
        s => format!("{s:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn numbers_are_readable() {
        assert_eq!((grouped(7), grouped(999), grouped(1000)), ("7".into(), "999".into(), "1,000".into()));
        assert_eq!(grouped(12_345_678), "12,345,678");
        assert_eq!(duration(Duration::from_micros(250)), "250 us");
        assert_eq!(duration(Duration::from_micros(2_540)), "2.5 ms");
        assert_eq!(duration(Duration::from_millis(2_540)), "2.5 s");
    }
}
