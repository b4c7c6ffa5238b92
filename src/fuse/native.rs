//! A transport of our own: /dev/fuse, read and written by ourselves.
//!
//! It carries what the `fuser` library can't: INTERRUPT (who waits for another host can be killed), SYNCFS, the size of
//! a listing, one time for a name and another for its attributes, and the data of writes at a page, where O_DIRECT takes
//! it. Needs to mount by itself, so it is for root; others go by the library.
//!
//! * Every request is answered once: its [`encode::Ticket`] answers EIO if it is dropped.
//! * A request that makes us panic costs its asker an error, not the thread that serves it.
//!
//! Not for: deciding anything. Both transports call the same [`Handlers`].

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::capabilities::Capabilities;
use super::handlers::Handlers;
use super::request::{Call, Request};
use crate::rt::JoinHandle;

pub(crate) mod abi;
mod channel;
mod decode;
mod encode;
mod init;

use abi::opcode;
use channel::{Channel, Inbox};
use decode::{Asked, Message};
use encode::Ticket;
pub(crate) use init::Wishes;

/// A mounted connection whose INIT was answered.
pub(crate) struct Connection {
    channel: Arc<Channel>,
    handlers: Arc<Handlers>,
    max_write_bytes: usize,
}

/// A connection that is served.
pub(crate) struct Serving {
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Connection {
    /// `device` is /dev/fuse, just mounted.
    pub(crate) fn open(
        device: OwnedFd,
        handlers: Arc<Handlers>,
        wishes: &Wishes,
    ) -> io::Result<(Connection, Capabilities)> {
        let channel = Arc::new(Channel::new(device));
        let max_write_bytes = wishes.max_write_bytes as usize;
        let capabilities = init::agree(&channel, &mut Inbox::new(max_write_bytes), wishes)?;
        Ok((Connection { channel, handlers, max_write_bytes }, capabilities))
    }

    /// Serves with so many threads, from now on.
    pub(crate) fn serve(self, threads: usize) -> io::Result<Serving> {
        let me = Arc::new(self);
        let start = |_| {
            let me = me.clone();
            crate::rt::try_spawn("lunfs-kernel", move || me.run())
        };
        Ok(Serving { threads: (0..threads.max(1)).map(start).collect::<io::Result<_>>()? })
    }

    fn run(&self) -> io::Result<()> {
        let mut inbox = Inbox::new(self.max_write_bytes);
        while let Some(bytes) = self.channel.receive(&mut inbox)? {
            // What the ticket didn't answer is answered by its end.
            if crate::rt::catch_panic(|| self.serve_one(bytes)).is_err() {
                log::error!("a request made its thread panic");
            }
        }
        Ok(())
    }

    fn serve_one(&self, bytes: &[u8]) {
        let Ok(message) = Message::read(bytes) else {
            log::error!("the kernel sent {} bytes that are no request", bytes.len());
            return;
        };
        let (unique, caller) = (message.unique, message.caller);
        let ticket = |listing_bytes| Ticket::new(self.channel.clone(), unique, listing_bytes);
        match message.asked() {
            Ok(Asked::Call(call)) => {
                let room = if let Call::ReadDirectory { max_bytes, .. } = &call { *max_bytes } else { 0 };
                let ticket = ticket(room as usize);
                self.handlers.serve(Request { unique, caller, call }, ticket);
            }
            Ok(Asked::Forget(nodes)) => {
                nodes.into_iter().for_each(|(node, count)| self.handlers.forget(node, count))
            }
            Ok(Asked::Interrupt(unique)) => self.handlers.signalled(unique),
            Ok(Asked::Destroy) => ticket(0).refuse(0),
            // Never answered, and never asked for.
            Ok(Asked::Unknown) if message.opcode == opcode::NOTIFY_REPLY => {}
            Ok(Asked::Unknown) => ticket(0).refuse(libc::ENOSYS),
            Err(decode::Malformed) => {
                log::error!("a request of kind {} is not what it says", message.opcode);
                ticket(0).refuse(libc::EIO);
            }
        }
    }
}

impl Serving {
    /// Returns when the connection has ended.
    pub(crate) fn join(self) -> io::Result<()> {
        let mut outcome = Ok(());
        for thread in self.threads {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => outcome = Err(error),
                Err(_) => outcome = Err(io::Error::other("a thread that serves the kernel panicked")),
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests;
