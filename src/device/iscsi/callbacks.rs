//! What libiscsi calls back, and what it finds then: the commands that it has. A callback has no other way to its
//! connection's loop than by the thread that it runs on.
//!
//! A target may answer before it took all of a command's data. Then libiscsi's queue still names the command and its
//! memory; such a record is kept, without the caller's memory, until that queue was empty once ([`Inner::retired`]).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::ptr::null;

use super::ffi::{self, Context};
use super::pending::Record;
use crate::device::scsi::transport::TransportError;

/// What libiscsi's callbacks reach.
#[derive(Default)]
pub struct Inner {
    pub records: RefCell<HashMap<u64, Record>>,
    /// Records whose data-out libiscsi may still have in its queue although they were answered.
    pub retired: RefCell<Vec<Record>>,
    pub connected: Cell<Option<c_int>>,
    pub logged_in: Cell<Option<c_int>>,
    pub broken: Cell<bool>,
}

impl Inner {
    /// Callbacks on this thread find this from now on. It must live until [`Inner::withdraw`].
    pub fn install(&self) {
        INNER.set(self);
    }

    /// No callback finds anything any more.
    pub fn withdraw() {
        INNER.set(null());
    }
}

/// Has libiscsi anything that is not sent yet?
pub fn is_sending(context: *mut Context) -> bool {
    // SAFETY: the context lives and belongs to the calling thread.
    unsafe {
        ffi::iscsi_which_events(context) & c_int::from(libc::POLLOUT) != 0
            || ffi::iscsi_out_queue_length(context) > 0
    }
}

thread_local! {
    static INNER: Cell<*const Inner> = const { Cell::new(null()) };
}

/// The loop of this thread, if it has one.
fn with_inner(f: impl FnOnce(&Inner)) {
    let inner = INNER.get();
    if !inner.is_null() {
        // SAFETY: set by the loop of this thread to a value that outlives every call into libiscsi, and only ever
        // borrowed shared.
        f(unsafe { &*inner });
    }
}

pub extern "C" fn on_connect(_: *mut Context, status: c_int, _: *mut c_void, _: *mut c_void) {
    with_inner(|inner| inner.connected.set(Some(status)));
}

pub extern "C" fn on_login(_: *mut Context, status: c_int, _: *mut c_void, _: *mut c_void) {
    with_inner(|inner| inner.logged_in.set(Some(status)));
}

pub extern "C" fn on_command(context: *mut Context, status: c_int, _: *mut c_void, private: *mut c_void) {
    with_inner(|inner| {
        let Some(mut record) = inner.records.borrow_mut().remove(&(private as u64)) else { return };
        let outcome = match u8::try_from(status) {
            Ok(status) => Ok(record.reply(status)),
            Err(_) if status == ffi::STATUS_CANCELLED => {
                inner.broken.set(true);
                Err(TransportError::Broken("the connection ended".into()))
            }
            Err(_) => Err(TransportError::Garbled("rejected".into())),
        };
        // Here, inside the library, memory is only exchanged; nobody reads a piece before the next call.
        if record.sends_data() && status != ffi::STATUS_GOOD {
            // Refused before all of its data was sent, perhaps.
            record.detach();
        } else if record.sends_data() && is_sending(context) {
            // Done; what of it still stands in the queue only a senseless target can want.
            record.detach_from_done();
        } else {
            return record.answer(outcome);
        }
        record.answer(outcome);
        inner.retired.borrow_mut().push(record);
    });
}
