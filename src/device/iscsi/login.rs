//! From the name of a portal to a session: what a connection's thread does first.

use std::ffi::{CStr, CString, c_int};
use std::ptr::null_mut;

use super::callbacks::{Inner, on_connect, on_login};
use super::connection::Login;
use super::event_loop::Loop;
use super::{ffi, socket, timing};
use crate::rt::Instant;

impl Loop<'_> {
    /// Connects and logs in.
    pub(super) fn log_in(&mut self, login: &Login) -> Result<(), String> {
        let c = |text: &str| CString::new(text).map_err(|_| "a name with a NUL byte".to_owned());
        let (initiator, target, portal) = (c(&login.initiator)?, c(&login.target)?, c(&login.portal)?);
        // SAFETY: each text is NUL-terminated and copied by the library; the context is this thread's alone.
        unsafe {
            self.context = ffi::iscsi_create_context(initiator.as_ptr());
            if self.context.is_null() {
                return Err("libiscsi has no memory".into());
            }
            ffi::iscsi_set_noautoreconnect(self.context, 1);
            ffi::iscsi_set_session_type(self.context, ffi::SESSION_NORMAL);
            ffi::iscsi_set_header_digest(self.context, ffi::HEADER_DIGEST_NONE_CRC32C);
            ffi::iscsi_set_isid_random(self.context, login.isid.0, login.isid.1.into());
            ffi::iscsi_set_tcp_user_timeout(self.context, timing::KERNEL.as_millis() as c_int);
            if ffi::iscsi_set_targetname(self.context, target.as_ptr()) != 0 {
                return Err(self.error());
            }
            if let (Some(user), Some(password)) = (&login.user, &login.password) {
                ffi::iscsi_set_initiator_username_pwd(self.context, c(user)?.as_ptr(), c(password)?.as_ptr());
            }
            // Looks the name up, and that may block; nobody waits for this thread longer than for a login.
            if ffi::iscsi_connect_async(self.context, portal.as_ptr(), on_connect, null_mut()) != 0 {
                return Err(self.error());
            }
        }
        let until = Instant::now() + timing::LOGIN;
        self.serve_until(until, "connecting", |inner| inner.connected.get())?;
        socket::linger_never(self.context);
        // SAFETY: as above.
        if unsafe { ffi::iscsi_login_async(self.context, on_login, null_mut()) } != 0 {
            return Err(self.error());
        }
        self.serve_until(until, "logging in", |inner| inner.logged_in.get())?;
        Ok(())
    }

    /// Services the connection until a callback said something.
    fn serve_until(
        &mut self,
        until: Instant,
        what: &str,
        said: impl Fn(&Inner) -> Option<c_int>,
    ) -> Result<(), String> {
        loop {
            match said(self.inner) {
                Some(ffi::STATUS_GOOD) => return Ok(()),
                Some(ffi::STATUS_REDIRECT) => {
                    // SAFETY: a NUL-terminated string inside the context, which lives.
                    let address = unsafe { CStr::from_ptr(ffi::iscsi_get_target_address(self.context)) };
                    self.redirected = Some(address.to_string_lossy().into_owned());
                    return Err("the target is elsewhere".into());
                }
                Some(_) => return Err(format!("{what}: {}", self.error())),
                None => {}
            }
            if self.shared.queue.lock().closed {
                return Err("closed".into());
            }
            let now = Instant::now();
            if now >= until {
                return Err(format!("{what}: no answer within {} s", timing::LOGIN.as_secs()));
            }
            let revents = self.poll(Some(until))?;
            self.service(revents).map_err(|why| format!("{what}: {why}"))?;
        }
    }
}
