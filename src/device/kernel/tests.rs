//! The backend on a kernel of its own (`script`): what is refused, what is sent where, and what becomes of it when a path
//! fails at the worst moment.

mod commands;
mod opening;
mod paths;
mod reservations;

use std::sync::Arc;
use std::time::Duration;

use super::script::Fake;
use super::{KernelDevice, KernelOptions};
use crate::device::{BlockDevice, CompareOutcome, DeviceError, FencingKey, OpenError};
use crate::rt::{Instant, sleep};
use crate::types::{Incarnation, Owner, Slot};

const TUR: u8 = 0x00;
const SWAP: u8 = 0x89;
const WRITE: u8 = 0x8A;
const READ: u8 = 0x88;
const FLUSH: u8 = 0x91;
const PR_OUT: u8 = 0x5F;
const SDA: &str = "/dev/sda";
const MPATHA: &str = "/dev/mapper/mpatha";

fn open_with(fake: &Arc<Fake>, spec: &str, options: KernelOptions) -> Result<KernelDevice, OpenError> {
    KernelDevice::open(fake.clone(), spec, &options)
}

fn open(fake: &Arc<Fake>, spec: &str) -> KernelDevice {
    open_with(fake, spec, KernelOptions::default()).unwrap()
}

fn reserving(fake: &Arc<Fake>, spec: &str) -> KernelDevice {
    open_with(fake, spec, KernelOptions { reservations: true, ..KernelOptions::default() }).unwrap()
}

fn refusal(fake: &Arc<Fake>, spec: &str) -> String {
    match open_with(fake, spec, KernelOptions { mount: true, ..KernelOptions::default() }) {
        Ok(_) => panic!("{spec} was opened"),
        Err(e) => e.to_string(),
    }
}

fn block(n: u8) -> Vec<u8> {
    vec![n; 512]
}

fn swap(device: &KernelDevice, from: u8, to: u8) -> Result<CompareOutcome, DeviceError> {
    device.compare_and_write(0, &block(from), &block(to))
}

fn key(life: u64) -> FencingKey {
    FencingKey::of(Owner { slot: Slot(3), incarnation: Incarnation(life) })
}

/// The paths over which this command went.
fn sent(fake: &Fake, opcode: u8) -> Vec<String> {
    fake.take_log().into_iter().filter(|(_, code)| *code == opcode).map(|(path, _)| path).collect()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let since = Instant::now();
    while !done() {
        assert!(since.elapsed() < Duration::from_secs(20), "never: {what}");
        sleep(Duration::from_millis(5));
    }
}

fn said(device: &KernelDevice, what: &str) -> String {
    device.about().into_iter().find(|(name, _)| *name == what).unwrap().1
}
