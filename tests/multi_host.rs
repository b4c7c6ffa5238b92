//! Several hosts on one volume, through the kernel: a daemon per host, each with a mount of its own.
//!
//! Needs root and /dev/fuse; says so and passes where they are missing. Every body runs on every kind of
//! device in [`backing::Backing`], in the test's process, which is no daemon; it gets the mountpoints and
//! nothing else. After each body every host leaves, and no slot, process, mount or loop device may stay.
//!
//! * `names`, `races`, `moves`: directories under several hands
//! * `files`, `space`, `turns`: contents, sizes and room; who writes next sees what was written before
//! * `attributes`, `mappings`: what stat(2) and mmap(2) show elsewhere
//! * `caches`: reads, stats and lookups that began after a change never show what was before it
//! * `devices`: devices that fail, hang and come back; `late_writes`: what they hold up until its host is fenced;
//!   `real_devices`: write protected or full; `workers`: who works there meanwhile
//! * `endings`: how a daemon ends, by status and log
//! * `rules`: the same tests must notice when a rule between daemon and kernel is taken out
//! * `deaths`: daemons that are killed; `guard`: what their kernels show while others take over
//! * `scrub`: a volume checked while its hosts work, and what the command says
//! * `target`: an iSCSI target that loses answers, goes away and comes back; `strangers`: targets that other people wrote
//! * `lifetime`: mounting, leaving, being killed, coming back
//!
//! `LUNFS_TEST_SCALE` multiplies the rounds (1 by default). An intermittent failure is a bug until explained;
//! `tests/soak` repeats.

#[path = "multi_host/harness.rs"]
#[macro_use]
mod harness;

#[path = "multi_host/attributes.rs"]
mod attributes;
#[path = "multi_host/backing.rs"]
mod backing;
#[path = "multi_host/caches.rs"]
mod caches;
#[path = "multi_host/deaths.rs"]
mod deaths;
#[path = "multi_host/devices.rs"]
mod devices;
#[path = "multi_host/endings.rs"]
mod endings;
#[path = "faults/mod.rs"]
mod faults;
#[path = "multi_host/files.rs"]
mod files;
#[path = "multi_host/guard.rs"]
mod guard;
#[path = "multi_host/late_writes.rs"]
mod late_writes;
#[path = "multi_host/lifetime.rs"]
mod lifetime;
#[path = "multi_host/mappings.rs"]
mod mappings;
#[path = "mounts/mod.rs"]
mod mounts;
#[path = "multi_host/moves.rs"]
mod moves;
#[path = "multi_host/names.rs"]
mod names;
#[path = "processes/mod.rs"]
mod processes;
#[path = "multi_host/races.rs"]
mod races;
#[path = "multi_host/real_devices.rs"]
mod real_devices;
#[cfg(feature = "iscsi")]
#[path = "multi_host/reservations.rs"]
mod reservations;
#[path = "multi_host/rules.rs"]
mod rules;
#[path = "multi_host/scrub.rs"]
mod scrub;
#[path = "multi_host/slots.rs"]
mod slots;
#[path = "multi_host/space.rs"]
mod space;
#[cfg(feature = "iscsi")]
#[path = "multi_host/strangers.rs"]
mod strangers;
#[cfg(feature = "iscsi")]
#[path = "multi_host/target.rs"]
mod target;
#[path = "multi_host/turns.rs"]
mod turns;
#[path = "multi_host/workers.rs"]
mod workers;
