//! How long things took: a histogram that many threads add to, for people who watch.
//!
//! Its mutex is a leaf that nobody waits under, so it is the standard one: in a simulation it must not be a
//! point at which threads are switched.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hdrhistogram::Histogram;

/// Durations from a microsecond to an hour, to within one percent.
pub struct Timing(Mutex<Histogram<u64>>);

/// What a [`Timing`] says, in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct TimingSummary {
    pub count: u64,
    pub p50_us: u64,
    pub p99_us: u64,
    pub max_us: u64,
}

const LONGEST_US: u64 = 3_600_000_000;

impl Default for Timing {
    fn default() -> Self {
        let bounded = Histogram::new_with_bounds(1, LONGEST_US, 2);
        Timing(Mutex::new(bounded.expect("the bounds are constants that fit")))
    }
}

impl Timing {
    fn lock(&self) -> MutexGuard<'_, Histogram<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn record(&self, span: Duration) {
        let micros = u64::try_from(span.as_micros()).unwrap_or(u64::MAX);
        self.lock().saturating_record(micros.max(1));
    }

    pub fn summary(&self) -> TimingSummary {
        let histogram = self.lock();
        TimingSummary {
            count: histogram.len(),
            p50_us: histogram.value_at_quantile(0.5),
            p99_us: histogram.value_at_quantile(0.99),
            max_us: histogram.max(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_summed_up() {
        let timing = Timing::default();
        assert_eq!(timing.summary(), TimingSummary::default());
        for ms in 1..=100 {
            timing.record(Duration::from_millis(ms));
        }
        timing.record(Duration::from_secs(1 << 40));
        timing.record(Duration::ZERO);
        let s = timing.summary();
        assert_eq!(s.count, 102);
        let near = |us: u64, ms: u64| us.abs_diff(ms * 1000) <= ms * 10;
        assert!(near(s.p50_us, 50) && near(s.p99_us, 100), "{s:?}");
        assert!(s.max_us >= LONGEST_US, "{s:?}");
    }
}
