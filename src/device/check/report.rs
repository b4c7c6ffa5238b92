//! What was found out, and the verdict in words.

use std::fmt;

use serde::Serialize;

/// What came of one question.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finding {
    Good,
    /// LunFS can live with it.
    Weak,
    /// It would lose data.
    Bad,
    NotAsked,
}

/// One question and its answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Property {
    pub name: &'static str,
    pub finding: Finding,
    pub words: String,
}

impl Property {
    /// What failed is bad.
    pub fn of(name: &'static str, found: Result<String, String>) -> Property {
        match found {
            Ok(words) => Property { name, finding: Finding::Good, words },
            Err(words) => Property { name, finding: Finding::Bad, words },
        }
    }

    pub fn not_asked(name: &'static str, words: &str) -> Property {
        Property { name, finding: Finding::NotAsked, words: words.to_owned() }
    }

    /// A failure that LunFS can live with.
    pub fn weak(self) -> Property {
        match self.finding {
            Finding::Bad => Property { finding: Finding::Weak, ..self },
            _ => self,
        }
    }
}

/// May the device be used?
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "because")]
pub enum Verdict {
    Good,
    /// With the lease alone; not with `fencing=required`.
    GoodWithoutReservations(String),
    DoNotUse(String),
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Good => f.write_str("good"),
            Verdict::GoodWithoutReservations(why) => write!(f, "good without reservations: {why}"),
            Verdict::DoNotUse(why) => write!(f, "do not use: {why}"),
        }
    }
}

/// All that was found out of a device.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Report {
    pub properties: Vec<Property>,
    /// About reservations; empty: not asked.
    pub reservations: Vec<Property>,
}

impl Report {
    pub fn verdict(&self) -> Verdict {
        let bad = |properties: &[Property]| {
            let bad = properties.iter().find(|p| p.finding == Finding::Bad);
            bad.map(|p| format!("{}: {}", p.name, p.words))
        };
        if let Some(why) = bad(&self.properties) {
            return Verdict::DoNotUse(why);
        }
        match bad(&self.reservations) {
            Some(why) => Verdict::GoodWithoutReservations(why),
            None if self.reservations.iter().all(|p| p.finding != Finding::Good) => {
                let why = self.reservations.first().map_or("they were not asked for", |p| &p.words);
                Verdict::GoodWithoutReservations(why.into())
            }
            None => Verdict::Good,
        }
    }
}
