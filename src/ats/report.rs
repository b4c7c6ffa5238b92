//! One log line for each swap that did not simply succeed.
//!
//! A line begins with the cause in an administrator's words, then says what was swapped and who holds it, how
//! long the command took beside what is usual, and both images field by field, with a `*` at those that differ.
//! Each cause has a budget of lines, so that contention or a sick array can't flood the log; the next line
//! that is let through says how many were not. What is ordinary under contention is logged at level debug.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::cause::Cause;
use super::record::{BlockKind, Image, SwapRecord};
use crate::layout::LayoutError;
use crate::layout::fields::marked;
use crate::layout::lock::LockMode;
use crate::lease::TimingSummary;
use crate::rt::Instant;
use crate::types::{BlockNo, Owner, Slot};

/// Lines of one cause in one [`PERIOD`].
const BURST: u32 = 5;
const PERIOD: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Default)]
struct Window {
    begun: Option<Instant>,
    lines: u32,
    withheld: u64,
}

/// Which lines are let through.
#[derive(Default)]
pub(super) struct Budget(Mutex<[Window; Cause::ALL.len()]>);

impl Budget {
    /// `None`: not now. Else how many were withheld since the last line of this cause.
    pub fn take(&self, cause: Cause, now: Instant) -> Option<u64> {
        let mut windows = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let window = &mut windows[cause as usize];
        if window.begun.is_none_or(|begun| now.saturating_duration_since(begun) >= PERIOD) {
            (window.begun, window.lines) = (Some(now), 0);
        }
        if window.lines == BURST {
            window.withheld += 1;
            return None;
        }
        window.lines += 1;
        Some(std::mem::take(&mut window.withheld))
    }
}

/// At which level a cause is logged.
pub(super) fn level(cause: Cause) -> log::Level {
    match cause {
        Cause::LostRace | Cause::StaleImage => log::Level::Debug,
        Cause::DeclaredDead | Cause::WentBack | Cause::Damaged => log::Level::Error,
        _ => log::Level::Warn,
    }
}

/// What a line is about.
pub(super) struct Event<'a, R> {
    pub cause: Cause,
    pub at: BlockNo,
    pub from: Option<&'a Image<R>>,
    pub found: Found<'a, R>,
    /// The last command; `None` where there was none.
    pub took: Option<Duration>,
    pub usual: TimingSummary,
    /// From the last sight of `from` to the first command.
    pub age: Duration,
    /// A newer image had been seen this long before.
    pub newer_seen: Option<Duration>,
    /// Commands without an answer, and how long it took to find out what became of them.
    pub unanswered: Option<(u32, Duration)>,
    pub withheld: u64,
}

/// What is in the block.
pub(super) enum Found<'a, R> {
    Image(&'a Image<R>),
    Damage(&'a LayoutError),
    /// The image that was compared with, until a swap of ours was answered.
    WhatWasExpected,
    Unread,
}

/// The line. `name_of` knows the host in a slot.
pub(super) fn line<R: SwapRecord>(event: &Event<'_, R>, name_of: &dyn Fn(Slot) -> Option<String>) -> String {
    let found = match event.found {
        Found::Image(image) => Some(&image.record),
        Found::Damage(_) | Found::WhatWasExpected | Found::Unread => None,
    };
    let from = event.from.map(|image| &image.record);
    let mut text = format!("{}: ", event.cause.words());
    if event.took.is_some() {
        text.push_str("compare-and-write of the ");
    }
    if let Some(lock) = found.or(from).and_then(R::as_lock) {
        text.push_str(lock.kind.name());
        text.push(' ');
    }
    text.push_str(&format!("{} at block {} (byte {})", R::KIND.name(), event.at, event.at.offset_bytes()));
    if let Some(holder) = found.or(from).and_then(|record| holder(record, name_of)) {
        text.push_str(&format!(", {holder}"));
    }
    if let Some(took) = event.took {
        let TimingSummary { p50_us, p99_us, count, .. } = event.usual;
        text.push_str(&format!("; took {}", span(took)));
        if count > 0 {
            let [p50, p99] = [p50_us, p99_us].map(|us| span(Duration::from_micros(us)));
            text.push_str(&format!(" (usually {p50}, 99 % within {p99})"));
        }
    }
    if let Some((commands, resolved)) = event.unanswered {
        let known = if event.cause == Cause::NoAnswerUnresolved { "given up after" } else { "known after" };
        text.push_str(&format!("; {commands} without an answer, {known} {}", span(resolved)));
    }
    if event.cause == Cause::StaleImage {
        text.push_str(&format!("; the expected image was last seen {} before", span(event.age)));
        if let Some(ago) = event.newer_seen {
            text.push_str(&format!(", a newer one {} before", span(ago)));
        }
    }
    let fields = [from.map(R::fields), found.map(R::fields)].map(Option::unwrap_or_default);
    let [expected, there] = &fields;
    if from.is_some() {
        text.push_str(&format!(
            "; expected: {}",
            marked(expected, if there.is_empty() { expected } else { there })
        ));
    }
    match event.found {
        Found::Image(_) => text.push_str(&format!("; found: {}", marked(there, expected))),
        Found::Damage(error) => text.push_str(&format!("; found: {error}")),
        Found::WhatWasExpected => text.push_str("; found: the same"),
        Found::Unread => {}
    }
    if event.withheld > 0 {
        text.push_str(&format!("; {} more like this were not logged", event.withheld));
    }
    text
}

fn holder<R: SwapRecord>(record: &R, name_of: &dyn Fn(Slot) -> Option<String>) -> Option<String> {
    let named = |slot: Slot| match name_of(slot) {
        Some(name) => format!("host {name:?}"),
        None => "a host".to_owned(),
    };
    let owner = |owner: Owner| format!("{} ({owner})", named(owner.slot));
    if let Some(slot) = record.as_slot() {
        let by = slot.recoverer.map(|by| format!(", being recovered or recovered by {}", owner(by)));
        return Some(format!("of host {:?}{}", slot.host_name, by.unwrap_or_default()));
    }
    Some(match record.as_lock()?.mode {
        LockMode::Free => "free".to_owned(),
        LockMode::Exclusive { owner: holder, .. } => format!("held by {}", owner(holder)),
        LockMode::Shared => {
            let sharers = record.as_lock()?.sharers;
            let names: Vec<_> =
                sharers.iter().take(4).map(|slot| format!("{} (slot {slot})", named(slot))).collect();
            let more = sharers.len().saturating_sub(4);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("shared by {}{more}", names.join(", "))
        }
    })
}

/// A duration for people, in ASCII: the log may be read anywhere.
fn span(span: Duration) -> String {
    let micros = span.as_micros();
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..1_000_000 => format!("{:.1} ms", micros as f64 / 1e3),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

/// For a swap that is not decided for a while: the cause is not known yet.
pub(super) fn still_undecided(
    kind: BlockKind,
    at: BlockNo,
    commands: usize,
    since: Duration,
    last: &str,
) -> String {
    format!(
        "not decided yet: compare-and-write of the {} at block {at} (byte {}); {commands} commands in {}, the last: {last}",
        kind.name(),
        at.offset_bytes(),
        span(since)
    )
}
