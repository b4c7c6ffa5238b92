//! libiscsi, by hand: the few functions that are used, and the beginning of the one structure that is read.
//!
//! `build.rs` proves the offsets against the header at hand. A context belongs to one thread; nothing here is safe to
//! call from two.

use std::ffi::{c_char, c_int, c_uchar, c_uint, c_void};

/// `struct iscsi_context`, never looked into.
#[repr(C)]
pub struct Context {
    _opaque: [u8; 0],
}

/// `struct scsi_iovec`; its members may change for the time of a call into the library.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IoVec {
    pub base: *mut c_void,
    pub len: usize,
}

/// The beginning of `struct scsi_task`.
#[repr(C)]
pub struct Task {
    pub status: c_int,
    cdb_size: c_int,
    xfer_dir: c_int,
    pub expxferlen: c_int,
    cdb: [c_uchar; 16],
    pub residual_status: c_uint,
    pub residual: usize,
    sense: [u32; 4],
    pub datain: TaskData,
}

/// `struct scsi_data`.
#[repr(C)]
pub struct TaskData {
    pub size: c_int,
    pub data: *mut c_uchar,
}

const _: () = assert!(std::mem::offset_of!(Task, residual) == 40 && std::mem::offset_of!(Task, datain) == 64);

pub type Callback = extern "C" fn(*mut Context, c_int, *mut c_void, *mut c_void);

pub const SESSION_NORMAL: c_int = 2;
pub const HEADER_DIGEST_NONE_CRC32C: c_int = 1;
pub const XFER_NONE: c_int = 0;
pub const XFER_READ: c_int = 1;
pub const XFER_WRITE: c_int = 2;
pub const RESIDUAL_UNDERFLOW: c_uint = 1;
pub const STATUS_GOOD: c_int = 0;
pub const STATUS_REDIRECT: c_int = 0x101;
pub const STATUS_CANCELLED: c_int = 0x0F00_0000;

// The library itself is named by build.rs.
unsafe extern "C" {
    pub fn iscsi_create_context(initiator_name: *const c_char) -> *mut Context;
    pub fn iscsi_destroy_context(context: *mut Context) -> c_int;
    pub fn iscsi_set_targetname(context: *mut Context, name: *const c_char) -> c_int;
    pub fn iscsi_set_session_type(context: *mut Context, kind: c_int) -> c_int;
    pub fn iscsi_set_header_digest(context: *mut Context, digest: c_int) -> c_int;
    pub fn iscsi_set_initiator_username_pwd(
        context: *mut Context,
        user: *const c_char,
        password: *const c_char,
    ) -> c_int;
    pub fn iscsi_set_noautoreconnect(context: *mut Context, state: c_int);
    pub fn iscsi_set_isid_random(context: *mut Context, random: u32, qualifier: u32) -> c_int;
    pub fn iscsi_set_tcp_user_timeout(context: *mut Context, timeout_ms: c_int);
    pub fn iscsi_connect_async(
        context: *mut Context,
        portal: *const c_char,
        callback: Callback,
        private: *mut c_void,
    ) -> c_int;
    pub fn iscsi_login_async(context: *mut Context, callback: Callback, private: *mut c_void) -> c_int;
    pub fn iscsi_get_fd(context: *mut Context) -> c_int;
    pub fn iscsi_which_events(context: *mut Context) -> c_int;
    pub fn iscsi_service(context: *mut Context, revents: c_int) -> c_int;
    pub fn iscsi_out_queue_length(context: *mut Context) -> c_int;
    pub fn iscsi_get_error(context: *mut Context) -> *const c_char;
    pub fn iscsi_get_target_address(context: *mut Context) -> *const c_char;
    pub fn iscsi_scsi_command_async(
        context: *mut Context,
        lun: c_int,
        task: *mut Task,
        callback: Callback,
        data: *mut c_void,
        private: *mut c_void,
    ) -> c_int;
    pub fn scsi_create_task(
        cdb_size: c_int,
        cdb: *mut c_uchar,
        xfer_dir: c_int,
        expxferlen: c_int,
    ) -> *mut Task;
    pub fn scsi_free_scsi_task(task: *mut Task);
    pub fn scsi_task_set_iov_out(task: *mut Task, iov: *mut IoVec, count: c_int);
    pub fn scsi_task_set_iov_in(task: *mut Task, iov: *mut IoVec, count: c_int);
}
