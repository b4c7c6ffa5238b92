//! SCSI without a transport: what a logical unit does with a command.

pub mod cdb;
pub mod pages;
pub mod reservation;
mod transfer;
pub mod unit;

pub use transfer::TRANSFER_BYTES_MAX;
