//! The one door to time, threads, blocking and randomness.
//!
//! Every other room takes its clock, its locks, its threads and its random numbers from here and
//! from nowhere else. On a thread that belongs to a simulation ([`sim`]) these calls are served by
//! the simulation's scheduler: exactly one thread runs at a time, time is virtual, and every choice
//! follows from one seed. On any other thread they are the operating system's.
