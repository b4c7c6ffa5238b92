//! Commands on their way: who waits, whose memory is used, and when it is given back.
//!
//! The memory of a caller is lent to libiscsi without a copy. It is used by nobody any more once the caller was
//! answered; that holds on each of the three ways to an answer:
//!
//! * libiscsi called back: it is done with data-in. It may still have unsent data-out of a command that the target
//!   refused early; then the memory was exchanged first, as in the next case ([`Record::detach`]).
//! * The deadline passed: the description of the memory that libiscsi holds is changed to memory of our own, with a
//!   copy of the data if it is data-out. The library reads the description anew at each call.
//! * The context was destroyed: libiscsi holds nothing any more.
//!
//! All of a [`Record`] happens on the thread that owns the connection.

use std::ffi::c_void;
use std::sync::Arc;

use super::ffi::{self, IoVec, Task};
use super::timing;
use crate::device::scsi::cdb::{Cdb, opcode};
use crate::device::scsi::transport::{Data, Limits, Reply, TransportError};
use crate::rt::{Condvar, Instant, Mutex};

pub type Outcome = Result<Reply, TransportError>;

/// Where the thread that asked waits for its answer.
#[derive(Default)]
pub struct Waiter {
    outcome: Mutex<Option<Outcome>>,
    answered: Condvar,
}

impl Waiter {
    pub fn answer(&self, outcome: Outcome) {
        *self.outcome.lock() = Some(outcome);
        self.answered.notify_one();
    }

    /// Waits without a deadline of its own: the connection's thread answers each request in time.
    pub fn wait(&self) -> Outcome {
        let mut outcome = self.outcome.lock();
        loop {
            if let Some(outcome) = outcome.take() {
                return outcome;
            }
            outcome = self.answered.wait(outcome);
        }
    }
}

/// A promise to answer who waits: broken by nobody, for the caller waits without a deadline.
pub struct Asker {
    waiter: Option<Arc<Waiter>>,
    /// What is said if this is dropped.
    lost: fn() -> TransportError,
}

impl Asker {
    pub fn new(waiter: Arc<Waiter>) -> Asker {
        Asker { waiter: Some(waiter), lost: || TransportError::NotSent("the connection ended".into()) }
    }

    pub fn answer(&mut self, outcome: Outcome) {
        if let Some(waiter) = self.waiter.take() {
            waiter.answer(outcome);
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        self.answer(Err((self.lost)()));
    }
}

/// Memory of a caller: two pieces at most.
#[derive(Clone, Copy)]
pub struct Lent {
    pieces: [IoVec; 2],
    count: usize,
    is_in: bool,
}

/// What stands in the place of data-out that nobody needs any more, as long as the longest write.
static NO_DATA: [u8; LONGEST_WRITE_BYTES] = [0; LONGEST_WRITE_BYTES];
const LONGEST_WRITE_BYTES: usize = 1 << 20;

const NOTHING: IoVec = IoVec { base: std::ptr::null_mut(), len: 0 };

impl Lent {
    /// `None`: more pieces than any command here has.
    pub fn from_data(data: &mut Data<'_>) -> Option<Lent> {
        let mut lent = Lent { pieces: [NOTHING; 2], count: 0, is_in: false };
        match data {
            Data::None => {}
            Data::In(buf) => {
                lent.is_in = true;
                lent.pieces[0] = IoVec { base: buf.as_mut_ptr().cast(), len: buf.len() };
                lent.count = 1;
            }
            Data::Out(parts) => {
                for part in parts.iter().filter(|part| !part.is_empty()) {
                    // Data-out is only read; the type of the library has no const.
                    let piece = IoVec { base: part.as_ptr().cast::<c_void>().cast_mut(), len: part.len() };
                    *lent.pieces.get_mut(lent.count)? = piece;
                    lent.count += 1;
                }
            }
        }
        Some(lent)
    }

    pub fn len_bytes(&self) -> usize {
        self.pieces.iter().map(|piece| piece.len).sum()
    }
}

/// A command that a thread wants sent.
pub struct Request {
    pub cdb: Cdb,
    pub lent: Lent,
    pub limits: Limits,
    pub asker: Asker,
}

impl Request {
    /// A change that must not come late. An old compare-and-write does no harm.
    pub fn is_plain_change(&self) -> bool {
        self.cdb.changes_data() && self.cdb.opcode() != opcode::COMPARE_AND_WRITE
    }

    pub fn sends_data(&self) -> bool {
        !self.lent.is_in && self.lent.count > 0
    }
}

// SAFETY: the pointers lead to memory of the thread that waits for the answer, and is not touched by it until then.
unsafe impl Send for Request {}

/// A command that libiscsi has.
pub struct Record {
    task: *mut Task,
    /// What libiscsi reads of the memory; a heap allocation, because it holds a pointer to it.
    pieces: *mut [IoVec; 2],
    count: usize,
    is_in: bool,
    len_bytes: usize,
    /// Memory of our own that took the caller's place.
    own: Option<Vec<u8>>,
    pub limits: Limits,
    /// Without an answer by then the connection ends.
    pub patience: Instant,
    pub changes_data: bool,
    /// A change that must not come late. An old compare-and-write does no harm.
    pub is_plain_change: bool,
    asker: Asker,
}

impl Record {
    /// Makes the task. The request comes back if libiscsi has no memory.
    pub fn new(request: Request, now: Instant) -> Result<Record, Request> {
        let Request { cdb, lent, .. } = &request;
        let len_bytes = lent.len_bytes();
        let direction = match (len_bytes, lent.is_in) {
            (0, _) => ffi::XFER_NONE,
            (_, true) => ffi::XFER_READ,
            (_, false) => ffi::XFER_WRITE,
        };
        let Ok(expected) = i32::try_from(len_bytes) else { return Err(request) };
        let mut bytes = [0; 16];
        bytes[..cdb.bytes().len()].copy_from_slice(cdb.bytes());
        // SAFETY: the library copies as many bytes of the command as are said to be there.
        let task = unsafe {
            ffi::scsi_create_task(cdb.bytes().len() as i32, bytes.as_mut_ptr(), direction, expected)
        };
        if task.is_null() {
            return Err(request);
        }
        let pieces = Box::into_raw(Box::new(lent.pieces));
        // SAFETY: the task was just made; the pieces live until the record is dropped, which frees the task first.
        unsafe {
            match direction {
                ffi::XFER_READ => ffi::scsi_task_set_iov_in(task, pieces.cast(), lent.count as i32),
                ffi::XFER_WRITE => ffi::scsi_task_set_iov_out(task, pieces.cast(), lent.count as i32),
                _ => {}
            }
        }
        let is_plain_change = request.is_plain_change();
        let Request { cdb, lent, limits, mut asker } = request;
        asker.lost = || TransportError::Broken("the connection ended".into());
        // A change that was given up must not come later.
        let patience = match is_plain_change {
            true => limits.answer_until,
            false => limits.answer_until.max(now + timing::ANSWER),
        };
        Ok(Record {
            task,
            pieces,
            count: lent.count,
            is_in: lent.is_in,
            len_bytes,
            own: None,
            limits,
            patience,
            changes_data: cdb.changes_data(),
            is_plain_change,
            asker,
        })
    }

    pub fn task(&self) -> *mut Task {
        self.task
    }

    /// Does somebody wait for the answer?
    pub fn is_awaited(&self) -> bool {
        self.asker.waiter.is_some()
    }

    /// Can libiscsi still hold data-out of it that was not sent?
    pub fn sends_data(&self) -> bool {
        self.len_bytes > 0 && !self.is_in
    }

    /// Gives the caller's memory back and puts our own in its place. Not to be called from within libiscsi.
    pub fn detach(&mut self) {
        if self.own.is_some() || self.len_bytes == 0 {
            return;
        }
        let mut own = vec![0; self.len_bytes];
        let mut at = 0;
        // SAFETY: the pieces are ours, and no call into libiscsi is under way that could use them.
        let pieces = unsafe { &mut *self.pieces };
        for piece in &mut pieces[..self.count] {
            let place = own[at..].as_mut_ptr();
            if !self.is_in {
                // SAFETY: the caller waits, so its memory is there; it has `len` bytes, and so has the place.
                unsafe { std::ptr::copy_nonoverlapping(piece.base.cast(), place, piece.len) };
            }
            piece.base = place.cast();
            at += piece.len;
        }
        self.own = Some(own);
    }

    /// Gives the memory of a command back whose answer says that the target has all of its data. What a senseless target
    /// may still want of it is nothing that anybody wrote.
    pub fn detach_from_done(&mut self) {
        // Each such command would cost as much as its data, if memory were made for it.
        if self.own.is_none() && !self.is_in && self.len_bytes <= NO_DATA.len() {
            // SAFETY: the pieces are ours, and libiscsi does not use them while it calls back.
            let pieces = unsafe { &mut *self.pieces };
            for piece in &mut pieces[..self.count] {
                // No longer than all of it; data-out is only read, the type of the library has no const.
                piece.base = NO_DATA.as_ptr().cast::<c_void>().cast_mut();
            }
            return;
        }
        self.detach();
    }

    /// Answers who waits, if anybody does. The caller's memory must not be used after this.
    pub fn answer(&mut self, outcome: Outcome) {
        self.asker.answer(outcome);
    }

    /// What the target answered, from the task in libiscsi's callback.
    pub fn reply(&self, status: u8) -> Reply {
        // SAFETY: the task lives as long as this record.
        let task = unsafe { &*self.task };
        let missing = match task.residual_status {
            ffi::RESIDUAL_UNDERFLOW => task.residual.min(self.len_bytes),
            _ => 0,
        };
        let mut sense = Vec::new();
        if status == crate::device::scsi::transport::status::CHECK_CONDITION
            && !task.datain.data.is_null()
            && let Ok(size) = usize::try_from(task.datain.size)
        {
            // SAFETY: libiscsi allocated `size` bytes for the answer's data.
            let bytes = unsafe { std::slice::from_raw_parts(task.datain.data, size) };
            // The length of the sense data comes first.
            if let Some((len, body)) = bytes.split_first_chunk::<2>() {
                let len = usize::from(u16::from_be_bytes(*len)).min(body.len());
                sense.extend_from_slice(&body[..len]);
            }
        }
        Reply { status, sense, transferred: self.len_bytes - missing }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // SAFETY: libiscsi has called back or its context is gone (whoever drops a record sees to that); the task was
        // made by `scsi_create_task`, the pieces by a box.
        unsafe {
            ffi::scsi_free_scsi_task(self.task);
            drop(Box::from_raw(self.pieces));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn record(data: &mut Data<'_>) -> Record {
        let request = Request {
            cdb: Cdb::write_16(0, 1),
            lent: Lent::from_data(data).unwrap(),
            limits: Limits::within(Duration::from_secs(1)),
            asker: Asker::new(Arc::default()),
        };
        Record::new(request, Instant::now()).unwrap_or_else(|_| panic!("no memory"))
    }

    #[test]
    fn memory_is_exchanged_with_what_it_holds() {
        let (one, two) = ([1; 512], [2; 512]);
        let parts: [&[u8]; 3] = [&one, &[], &two];
        let mut record = record(&mut Data::Out(&parts));
        assert_eq!(record.len_bytes, 1024);
        record.detach();
        // SAFETY: the pieces live as long as the record.
        let pieces = unsafe { *record.pieces };
        let own = record.own.as_ref().unwrap();
        assert_eq!((pieces[0].base.cast::<u8>().cast_const(), pieces[0].len), (own.as_ptr(), 512));
        assert_eq!(pieces[1].base.cast::<u8>().cast_const(), own[512..].as_ptr());
        assert_eq!((&own[..512], &own[512..]), (&one[..], &two[..]));
        assert!(Lent::from_data(&mut Data::Out(&[&one, &two, &one])).is_none());
    }

    #[test]
    fn memory_of_what_is_done_is_exchanged_without_a_copy() {
        let (one, two) = ([1; 512], [2; 512]);
        let parts: [&[u8]; 2] = [&one, &two];
        let mut record = record(&mut Data::Out(&parts));
        record.detach_from_done();
        // SAFETY: as above.
        let pieces = unsafe { *record.pieces };
        assert!(record.own.is_none(), "no memory is made for it");
        for piece in pieces {
            assert_eq!((piece.base.cast::<u8>().cast_const(), piece.len), (NO_DATA.as_ptr(), 512));
        }
    }

    #[test]
    fn a_longer_write_has_its_memory_exchanged_with_a_copy() {
        let data = vec![3; LONGEST_WRITE_BYTES + 512];
        let parts: [&[u8]; 1] = [&data];
        let mut record = record(&mut Data::Out(&parts));
        record.detach_from_done();
        assert_eq!(record.own.as_deref(), Some(&data[..]));
    }

    #[test]
    fn memory_for_data_in_is_exchanged_too() {
        let mut buf = [7; 512];
        let mut record = record(&mut Data::In(&mut buf));
        record.detach();
        // SAFETY: as above.
        assert_ne!(unsafe { (*record.pieces)[0].base }.cast::<u8>(), buf.as_mut_ptr());
        assert_eq!(buf, [7; 512]);
    }
}
