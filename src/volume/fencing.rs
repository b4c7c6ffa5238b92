//! The mount's choice of how a dead host is stopped.

use std::str::FromStr;

/// Whether a dead host is shut out of the device before it is recovered.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum FencingMode {
    /// Where the device can; else the lease and the waiting must do.
    #[default]
    Auto,
    /// Always: mounting fails where the device can't, and a dead host that can't be fenced is not recovered.
    Required,
    /// Never.
    Lease,
}

impl FromStr for FencingMode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(FencingMode::Auto),
            "required" => Ok(FencingMode::Required),
            "lease" => Ok(FencingMode::Lease),
            _ => Err("auto, required or lease".into()),
        }
    }
}
