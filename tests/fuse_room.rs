//! The kernel's door, tested through the kernel with the in-memory filesystem behind it.
//!
//! Needs root and /dev/fuse; says so and passes where they are missing. What each part shows:
//!
//! * `ordinary`: programs get what they expect, in both columns of the capability table
//! * `caches`: the kernel caches as long as it is allowed, and forgets when it is told
//! * `waiting`: a request that waits for another host holds up nobody else
//! * `guard`: a daemon that is killed or stopped leaves a kernel that shows nothing
//! * `lifetime`: mounting tells the truth, ending leaves nothing behind, a lost lease silences the kernel

#[path = "fuse_room/caches.rs"]
mod caches;
#[path = "fuse_room/guard.rs"]
mod guard;
#[path = "fuse_room/harness.rs"]
mod harness;
#[path = "fuse_room/lifetime.rs"]
mod lifetime;
#[path = "mounts/mod.rs"]
mod mounts;
#[path = "fuse_room/ordinary.rs"]
mod ordinary;
#[path = "processes/mod.rs"]
mod processes;
#[path = "fuse_room/waiting.rs"]
mod waiting;
