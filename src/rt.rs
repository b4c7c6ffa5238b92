//! The one door to time, threads, blocking and randomness.
//!
//! Every other room takes its clock, its locks, its threads and its random numbers from here and
//! from nowhere else. On a thread that belongs to a simulation ([`sim`]) these calls are served by
//! the simulation's scheduler: exactly one thread runs at a time, time is virtual, and every choice
//! follows from one seed. On any other thread they are the operating system's.
//!
//! Not for: `std::sync::{Mutex, Condvar, Barrier, mpsc, OnceLock::get_or_init}` around anything that
//! blocks or does device I/O (the simulator can't see such a wait, and hangs in it); nor for
//! `std::panic::catch_unwind`, which would keep a cancelled thread alive: use [`catch_panic`].

pub(crate) mod clock;
pub mod planted;
mod random;
mod rwlock;
pub mod sim;
mod sync;
mod thread;

pub use clock::{Instant, sleep, wall_clock};
pub use random::random_u64;
pub use rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
pub use sync::{Condvar, Mutex, MutexGuard};
pub use thread::{
    HostTag, JoinHandle, catch_panic, current_host, spawn, spawn_urgent, try_spawn, try_spawn_urgent,
    yield_now,
};
