//! The guard itself, as a process.

use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::SigSet;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::memory::{Cause, GuardMemory, Order};
use super::{MOST_DESCRIPTORS, ROLE_ABORT, ROLE_DEVICE, ROLE_KEEP, ROLE_MEMORY, WATCHING, sys};
use crate::fuse::fusectl::AbortSwitch;
use crate::fuse::request::NodeId;
use crate::fuse::silence::{Place, Silenced, Silencer};
use crate::rt::Instant;

/// What the guard does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Until the deadline, or until something happens.
    Wait(Option<Instant>),
    End,
    Act(Cause),
}

fn decide(order: Order, daemon_lives: bool, deadline: Option<Instant>, now: Instant) -> Step {
    match order {
        Order::End => Step::End,
        Order::Silence => Step::Act(Cause::Told),
        Order::Watch if !daemon_lives => Step::Act(Cause::DaemonGone),
        Order::Watch if deadline.is_some_and(|deadline| deadline <= now) => Step::Act(Cause::LeaseOver),
        Order::Watch => Step::Wait(deadline),
    }
}

/// What the daemon gave.
struct Given {
    kernel: Silencer,
    memory: GuardMemory,
    /// Closed by the end of this process.
    _keep: Option<OwnedFd>,
}

/// Is a guard until its mount ends. Standard input is the line to the daemon. `set_up_log` is called before it
/// watches; from then on nothing is logged until it has acted.
pub fn run(place: Place, set_up_log: impl FnOnce()) -> io::Result<()> {
    sys::close_inherited()?;
    be_left_alone();
    set_up_log();
    // Before the table is mapped, which is far larger than what will be used of it.
    let locked = mlockall(MlockAllFlags::MCL_CURRENT);
    let line = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let given = receive(&line, place)?;
    let timer = TimerFd::new(ClockId::CLOCK_BOOTTIME, TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK)?;
    line.set_nonblocking(true)?;
    // What was touched since then, and what will be.
    let on_fault = MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    if let Err(errno) = locked.and_then(|()| mlockall(MlockAllFlags::MCL_CURRENT | on_fault)) {
        log::debug!("the guard's memory can be swapped out: {errno}");
    }
    (&line).write_all(&[WATCHING])?;
    let Some(cause) = watch(&line, &timer, &given.memory)? else { return Ok(()) };
    let begun = Instant::now();
    given.memory.acts(cause);
    let nodes = std::iter::once(NodeId::ROOT).chain(given.memory.nodes());
    let done = given.kernel.silence(nodes);
    let took = begun.elapsed();
    let mountpoint = given.kernel.place().mountpoint.display().to_string();
    // The log may be what hangs; nobody is to wait for it.
    drop(given);
    report(&mountpoint, cause, done, took);
    Ok(())
}

/// Signals meant for the daemon's group or session, the search for memory, and waiting for a processor are for others.
/// What is refused makes it no worse than an ordinary process.
fn be_left_alone() {
    let _ = SigSet::all().thread_block();
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"lunfs-guard");
    let _ = std::env::set_current_dir("/");
    let _ = sys::be_urgent();
    // Where each session is a group of its own (autogroup, sched(7)) priorities count only within it.
    let _ = std::fs::write("/proc/self/autogroup", "-20");
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
}

fn receive(line: &UnixStream, place: Place) -> io::Result<Given> {
    let mut roles = [0; MOST_DESCRIPTORS];
    let mut space = cmsg_space!([std::os::fd::RawFd; MOST_DESCRIPTORS]);
    let (count, descriptors) = {
        let mut into = [IoSliceMut::new(&mut roles)];
        let got = recvmsg::<()>(line.as_raw_fd(), &mut into, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
        let mut descriptors = Vec::new();
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = message {
                // SAFETY: the kernel just made these descriptors for us; nobody else owns them.
                descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
            }
        }
        (got.bytes, descriptors)
    };
    let (mut device, mut memory, mut abort, mut keep) = (None, None, None, None);
    for (role, descriptor) in roles.iter().take(count).zip(descriptors) {
        match *role {
            ROLE_DEVICE => device = Some(descriptor),
            ROLE_MEMORY => memory = Some(descriptor),
            ROLE_ABORT => abort = Some(AbortSwitch::from_descriptor(descriptor)),
            ROLE_KEEP => keep = Some(descriptor),
            _ => {}
        }
    }
    let missing = || io::Error::other("the daemon gave no descriptors");
    Ok(Given {
        kernel: Silencer::new(device.ok_or_else(missing)?, abort, place),
        memory: GuardMemory::open(memory.ok_or_else(missing)?)?,
        _keep: keep,
    })
}

/// `None`: nothing is to be done any more.
fn watch(mut line: &UnixStream, timer: &TimerFd, memory: &GuardMemory) -> io::Result<Option<Cause>> {
    let mut daemon_lives = true;
    loop {
        let deadline = match decide(memory.order(), daemon_lives, memory.deadline(), Instant::now()) {
            Step::End => return Ok(None),
            Step::Act(cause) => return Ok(Some(cause)),
            Step::Wait(deadline) => deadline,
        };
        match deadline {
            Some(deadline) => {
                let at = TimeSpec::from_duration(Duration::from_nanos(deadline.as_nanos()));
                timer.set(Expiration::OneShot(at), TimerSetTimeFlags::TFD_TIMER_ABSTIME)?;
            }
            None => timer.unset()?,
        }
        let mut ready =
            [PollFd::new(line.as_fd(), PollFlags::POLLIN), PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut bytes = [0; 64];
        match line.read(&mut bytes) {
            Ok(0) => daemon_lives = false,
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => daemon_lives = false,
            _ => {}
        }
    }
}

fn report(mountpoint: &str, cause: Cause, done: Silenced, took: Duration) {
    let Silenced { nodes, refused, errno, by_force } = done;
    let ms = took.as_millis();
    log::warn!(
        "guard of {mountpoint}: {cause}; the kernel was silenced: {nodes} nodes invalidated in {ms} ms"
    );
    if by_force {
        log::error!("guard of {mountpoint}: no working abort switch; the mount was taken off by force");
    }
    if refused > 0 {
        let error = io::Error::from_raw_os_error(errno);
        log::error!("guard of {mountpoint}: {refused} nodes were not invalidated: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_first_then_death_then_time() {
        let at = Instant::from_nanos;
        let deadline = Some(at(100));
        for (lives, now) in [(true, 5), (false, 5), (true, 500), (false, 500)] {
            assert_eq!(decide(Order::End, lives, deadline, at(now)), Step::End);
            assert_eq!(decide(Order::Silence, lives, deadline, at(now)), Step::Act(Cause::Told));
        }
        assert_eq!(decide(Order::Watch, false, deadline, at(5)), Step::Act(Cause::DaemonGone));
        assert_eq!(decide(Order::Watch, false, None, at(5)), Step::Act(Cause::DaemonGone));
        assert_eq!(decide(Order::Watch, true, deadline, at(99)), Step::Wait(deadline));
        assert_eq!(decide(Order::Watch, true, deadline, at(100)), Step::Act(Cause::LeaseOver));
        assert_eq!(decide(Order::Watch, true, None, at(100)), Step::Wait(None));
    }
}
