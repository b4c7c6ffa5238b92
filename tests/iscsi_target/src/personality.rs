//! What a logical unit claims about itself and how it behaves: the ways in which real targets differ, or lie.
//!
//! The default is a target that does everything right. Each departure is one that was seen on a real target, or
//! its neighbour. What happens once, or to some commands only, is a rule (`faults`) and not a personality.

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CompareAndWrite {
    #[default]
    Atomic,
    /// ILLEGAL REQUEST 20/00, whatever the pages say.
    Unsupported,
    /// GOOD, and nothing was compared or written.
    DoesNothing,
    /// GOOD, and written without a comparison.
    WritesBlindly,
    /// Compares, lets others go first for `race_us`, then writes.
    Racy,
    /// Atomic until one compare-and-write ended early by a reservation conflict or a unit attention; racy from then
    /// on until power is lost. A kernel target does that.
    AtomicUntilEndedEarly,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Information {
    #[default]
    FirstDifference,
    /// The VALID bit is off.
    Absent,
    /// Valid, and always 0.
    Zero,
    /// Valid, and not where the difference is.
    Wrong,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unmapped {
    #[default]
    Zeroes,
    /// Reads as before (LBPRZ is 0 then).
    Unchanged,
    /// Reads as 0xaf (LBPRZ is 0 then).
    Garbage,
}

/// What becomes of the registration of a nexus that logs in again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoginAgain {
    #[default]
    Kept,
    Lost,
    /// Its key stays in the list, and belongs to nobody any more. tgtd does that.
    Orphaned,
}

/// How long commands take before they execute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Latency {
    pub min_us: u64,
    pub max_us: u64,
    /// Of 1000 commands, how many take `tail_us` instead.
    pub tail_per_mille: u32,
    pub tail_us: u64,
}

/// Commands that touch these blocks take longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slow {
    pub first: u64,
    pub last: u64,
    pub us: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Personality {
    pub vendor: String,
    pub product: String,
    pub revision: String,

    pub compare_and_write: CompareAndWrite,
    /// Longest compare-and-write that is executed; longer ones give 24/00.
    pub compare_and_write_blocks: u8,
    pub information: Information,
    pub race_us: u64,

    /// VPD B0 says this instead of the truth.
    pub claims_compare_and_write_blocks: Option<u8>,
    /// REPORT SUPPORTED OPERATION CODES says this instead of the truth.
    pub claims_compare_and_write: Option<bool>,

    /// What is written is durable only when flushed, and the caching page says so.
    pub volatile_cache: bool,
    /// What the caching page says instead.
    pub claims_write_cache: Option<bool>,
    /// SYNCHRONIZE CACHE answers GOOD and makes nothing durable.
    pub flush_does_nothing: bool,
    /// FUA is taken and ignored.
    pub ignores_fua: bool,

    pub unmap: bool,
    pub unmapped: Unmapped,
    pub write_same: bool,
    pub write_protected: bool,
    /// Logical blocks per physical block, as a power of two.
    pub physical_exponent: u8,
    /// Longest READ or WRITE in blocks that VPD B0 names; 0: no limit.
    pub max_transfer_blocks: u32,

    pub reservations: bool,
    pub aptpl: bool,
    pub preempt_and_abort: bool,
    /// UNMAP and WRITE SAME of a host without the right are refused as well.
    pub reservations_cover_unmap: bool,
    /// What becomes of a registration when its nexus logs in again.
    pub registration_at_login: LoginAgain,
    /// Aborted by another nexus: TASK ABORTED instead of no answer.
    pub task_aborted_status: bool,

    /// A nexus seen for the first time finds UA 29/00, one that logs in again 29/07.
    pub attention_at_login: bool,
    pub descriptor_sense: bool,

    pub latency: Latency,
    pub slow: Vec<Slow>,
}

impl Default for Personality {
    fn default() -> Self {
        Personality {
            vendor: "LUNFS".into(),
            product: "TEST TARGET".into(),
            revision: "0001".into(),
            compare_and_write: CompareAndWrite::Atomic,
            compare_and_write_blocks: 1,
            information: Information::FirstDifference,
            race_us: 200,
            claims_compare_and_write_blocks: None,
            claims_compare_and_write: None,
            volatile_cache: false,
            claims_write_cache: None,
            flush_does_nothing: false,
            ignores_fua: false,
            unmap: true,
            unmapped: Unmapped::Zeroes,
            write_same: true,
            write_protected: false,
            physical_exponent: 0,
            max_transfer_blocks: 0,
            reservations: true,
            aptpl: true,
            preempt_and_abort: true,
            reservations_cover_unmap: true,
            registration_at_login: LoginAgain::Kept,
            task_aborted_status: true,
            attention_at_login: true,
            descriptor_sense: false,
            latency: Latency::default(),
            slow: Vec::new(),
        }
    }
}

impl Personality {
    /// A copy with the fields of a JSON object put over it; unknown fields are an error.
    pub fn with(&self, fields: &serde_json::Value) -> Result<Self, serde_json::Error> {
        let mut all = serde_json::to_value(self)?;
        if let (Some(all), Some(fields)) = (all.as_object_mut(), fields.as_object()) {
            for (name, value) in fields {
                all.insert(name.clone(), value.clone());
            }
        }
        serde_json::from_value(all)
    }
}
