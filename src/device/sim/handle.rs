//! One host's handle on the simulated LUN.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::command::{Command, CommandKind, Payload, Reply};
use super::lun::Inner;
use crate::device::{
    BlockDevice, CompareOutcome, DeviceError, DeviceGeometry, Executed, Fencing, FencingKey,
};
use crate::rt::sim::{self, Completion};
use crate::rt::{Condvar, HostTag, Mutex};

/// The LUN as one host sees it; attached by `SimLun::attach`.
pub struct SimDevice {
    lun: Arc<Inner>,
    host: HostTag,
    /// Resets the host has learned of: with each answer that comes after one.
    resets: AtomicU64,
    attached_at: u64,
    key: Mutex<Option<FencingKey>>,
    outstanding: Mutex<u32>,
    freed: Condvar,
}

impl SimDevice {
    pub(super) fn new(lun: Arc<Inner>, host: HostTag, resets: u64) -> Self {
        SimDevice {
            lun,
            host,
            resets: AtomicU64::new(resets),
            attached_at: resets,
            key: Mutex::new(None),
            outstanding: Mutex::new(0),
            freed: Condvar::new(),
        }
    }

    /// The host this handle belongs to.
    pub fn host(&self) -> HostTag {
        self.host
    }

    fn run(&self, kind: CommandKind, offset: u64, len: u64, payload: Payload) -> Result<Reply, DeviceError> {
        self.check(kind, offset, len, &payload)?;
        let _place = self.lun.options.queue_depth.map(|depth| self.take_place(depth));
        let key = *self.key.lock();
        let command = {
            let mut state = self.lun.lock();
            Command {
                id: state.next_id(),
                host: self.host,
                kind,
                offset,
                len,
                payload,
                issued: sim::now().unwrap_or_default(),
                issue_order: state.executions,
                issuer: sim::this_thread(),
                key,
                resets: state.resets,
                completion: Completion::new(),
            }
        };
        let answer = self.lun.submit(command);
        self.resets.fetch_max(answer.resets, Relaxed);
        answer.result
    }

    fn check(&self, kind: CommandKind, offset: u64, len: u64, payload: &Payload) -> Result<(), DeviceError> {
        let geometry = self.geometry();
        if let Payload::Compare { expected, new } = payload {
            geometry.check_images(kind.name(), offset, expected, new)?;
        }
        geometry.check_range(kind.name(), offset, len)
    }

    fn take_place(&self, depth: u32) -> Place<'_> {
        let mut outstanding = self.outstanding.lock();
        while *outstanding >= depth.max(1) {
            outstanding = self.freed.wait(outstanding);
        }
        *outstanding += 1;
        Place(self)
    }
}

/// A place in the host's queue of commands.
struct Place<'a>(&'a SimDevice);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.0.outstanding.lock() -= 1;
        self.0.freed.notify_one();
    }
}

impl BlockDevice for SimDevice {
    fn geometry(&self) -> DeviceGeometry {
        let options = &self.lun.options;
        DeviceGeometry {
            logical_block_bytes: options.logical_block_bytes,
            size_bytes: options.size_bytes,
            volatile_cache: options.volatile_cache,
            hold_time: options.hold_time,
        }
    }

    fn read(&self, offset_bytes: u64, buf: &mut [u8]) -> Result<(), DeviceError> {
        let reply = self.run(CommandKind::Read, offset_bytes, buf.len() as u64, Payload::Nothing)?;
        if reply.data.len() == buf.len() {
            buf.copy_from_slice(&reply.data);
        }
        Ok(())
    }

    fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<(), DeviceError> {
        let payload = Payload::Data(data.to_vec());
        self.run(CommandKind::Write, offset_bytes, data.len() as u64, payload).map(drop)
    }

    fn compare_and_write(
        &self,
        offset_bytes: u64,
        expected: &[u8],
        new: &[u8],
    ) -> Result<CompareOutcome, DeviceError> {
        let payload = Payload::Compare { expected: expected.to_vec(), new: new.to_vec() };
        let reply = self.run(CommandKind::CompareAndWrite, offset_bytes, expected.len() as u64, payload)?;
        reply.compared.ok_or(DeviceError::Unsupported { op: CommandKind::CompareAndWrite.name() })
    }

    fn flush(&self) -> Result<(), DeviceError> {
        self.run(CommandKind::Flush, 0, 0, Payload::Nothing).map(drop)
    }

    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.run(CommandKind::Discard, offset_bytes, len_bytes, Payload::Nothing).map(drop)
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64) -> Result<(), DeviceError> {
        self.run(CommandKind::WriteZeroes, offset_bytes, len_bytes, Payload::Nothing).map(drop)
    }

    fn resets(&self) -> u64 {
        self.resets.load(Relaxed) - self.attached_at
    }

    fn fencing(&self) -> Option<&dyn Fencing> {
        self.lun.options.fencing.then_some(self as &dyn Fencing)
    }
}

/// Without latency: what matters of a reservation is its order among executions.
impl Fencing for SimDevice {
    fn register(&self, key: FencingKey) -> Result<(), DeviceError> {
        self.reach("register")?;
        self.lun.lock().fenced_keys.remove(&key);
        *self.key.lock() = Some(key);
        Ok(())
    }

    fn fence(&self, key: FencingKey) -> Result<(), DeviceError> {
        self.reach("preempt and abort")?;
        self.lun.lock().fenced_keys.insert(key);
        Ok(())
    }

    fn unregister(&self) -> Result<(), DeviceError> {
        self.reach("unregister")?;
        *self.key.lock() = None;
        Ok(())
    }
}

impl SimDevice {
    /// Reservation commands get through, or not at all.
    fn reach(&self, op: &'static str) -> Result<(), DeviceError> {
        let mut state = self.lun.lock();
        if state.powered && state.host(self.host).partition.is_none() {
            return Ok(());
        }
        Err(DeviceError::io(op, 0, Executed::No, std::io::Error::from_raw_os_error(libc::EIO)))
    }
}
