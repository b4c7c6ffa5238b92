//! The deterministic scheduler behind [`crate::rt`]; its scheduling half follows.

pub(crate) mod hooks;
pub(crate) mod rng;

pub use rng::SimRng;
