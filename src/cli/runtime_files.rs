//! Who has what mounted on this machine: one locked file for each volume and host name.
//!
//! The daemon locks its file before it touches the volume and keeps it locked until the process is gone,
//! whatever way it goes, and so does its guard, until the kernel is silent. So a second mount of the volume under the same host name is refused at once, and
//! the umount helper can wait for the daemon: the kernel itself does not wait for it on type `fuse`.
//!
//! Not for other machines, and not a lock of the volume: the heartbeat slot is that.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::Failure;
use crate::device::iscsi;
use crate::device::open::{DeviceIdentity, device_identity};
use crate::fuse::mountinfo;
use crate::volume::is_process_gone;

/// How long a mount waits for a daemon whose mount is gone already.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(15);
/// How long an ending process may take to close what it has open.
const EXIT_PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

/// Where these files are: of the machine for root, of the session for others, or where `LUNFS_RUN_DIR` says.
pub(super) fn directory() -> PathBuf {
    if let Some(path) = std::env::var_os("LUNFS_RUN_DIR") {
        return PathBuf::from(path);
    }
    if nix::unistd::geteuid().is_root() {
        return PathBuf::from("/run/lunfs");
    }
    let user = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    user.join("lunfs")
}

/// What a volume is called here, whatever path or loop device leads to it.
pub(super) fn identity(device: &OsStr) -> String {
    if let Some(target) = device.to_str().and_then(|spec| iscsi::Target::parse(spec).ok()) {
        let hash = siphasher::sip::SipHasher24::new_with_key(&[5; 16]).hash(target.to_string().as_bytes());
        return format!("iscsi-{hash:016x}");
    }
    match device.to_str().map(device_identity) {
        Some(Ok(DeviceIdentity { device, inode, base_bytes, .. })) => {
            format!("device-{device}-{inode}-{base_bytes}")
        }
        _ => encode(device.as_bytes()),
    }
}

/// Letters and digits stay, other bytes become %xx.
fn encode(text: &[u8]) -> String {
    let mut out = String::new();
    for byte in text {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => out.push(char::from(*byte)),
            _ => out.push_str(&format!("%{byte:02x}")),
        }
    }
    out.truncate(120);
    out
}

/// The name of a file of one mount.
pub(super) fn file_name(identity: &str, host: &str, extension: &str) -> String {
    format!("{identity}@{}.{extension}", encode(host.as_bytes()))
}

/// The locked file of this mount.
pub(super) struct Claim {
    file: Flock<File>,
}

impl Claim {
    /// Claims the volume under this host name, or says who has it.
    pub(super) fn take(identity: &str, host: &str) -> Result<Claim, Failure> {
        let directory = directory();
        let system = |e: io::Error| Failure::system(format!("{}: {e}", directory.display()));
        DirBuilder::new().recursive(true).mode(0o755).create(&directory).map_err(system)?;
        let path = directory.join(file_name(identity, host, "lock"));
        let deadline = Instant::now() + PREDECESSOR_PATIENCE;
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(system)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(file) => {
                    // What it says is of an earlier mount.
                    file.set_len(0).map_err(system)?;
                    return Ok(Claim { file });
                }
                Err((file, nix::errno::Errno::EWOULDBLOCK)) => {
                    let holder = Holder::read(file);
                    // A daemon that was killed is still mounted, and its guard soon gone.
                    let serves = holder.is_mounted() && !holder.is_gone();
                    if serves || Instant::now() > deadline {
                        return Err(Failure::mount(holder.explain(host)));
                    }
                }
                Err((_, errno)) => return Err(Failure::system(format!("{}: {errno}", path.display()))),
            }
            std::thread::sleep(POLL);
        }
    }

    /// A descriptor that keeps the file locked when this process dies.
    pub(super) fn duplicate(&self) -> io::Result<OwnedFd> {
        Ok(self.file.try_clone()?.into())
    }

    /// Notes where it is mounted, for others to read.
    pub(super) fn record(&mut self, device: (u32, u32), mountpoint: &Path) -> io::Result<()> {
        let mut text = format!("{} {}:{} ", std::process::id(), device.0, device.1).into_bytes();
        text.extend_from_slice(mountpoint.as_os_str().as_bytes());
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&text)
    }
}

/// What a claim's file says.
struct Holder {
    pid: String,
    device: Option<(u32, u32)>,
    mountpoint: String,
}

impl Holder {
    fn read(mut file: File) -> Holder {
        let mut bytes = Vec::new();
        let _ = file.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let mut fields = text.splitn(3, ' ');
        let pid = fields.next().unwrap_or_default().to_owned();
        let device = fields
            .next()
            .and_then(|d| d.split_once(':'))
            .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        Holder { pid, device, mountpoint: fields.next().unwrap_or_default().to_owned() }
    }

    fn is_mounted(&self) -> bool {
        self.device.is_some_and(|device| mountinfo::is_mounted(device).unwrap_or(true))
    }

    fn is_gone(&self) -> bool {
        self.pid.parse().is_ok_and(is_process_gone)
    }

    fn explain(&self, host: &str) -> String {
        let (at, pid) = (&self.mountpoint, &self.pid);
        if self.is_gone() {
            format!(
                "host name {host:?} still has the volume on {at}: process {pid} is gone, its guard is not"
            )
        } else if self.device.is_some() {
            format!("the volume is already mounted by host name {host:?} on {at} (process {pid})")
        } else {
            format!("the volume is just being mounted by host name {host:?}")
        }
    }
}

/// The sockets on which the daemons of this mount take commands, as far as their files say; some may be of daemons that
/// are gone.
pub(super) fn control_sockets_of(device: (u32, u32)) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory()).into_iter().flatten().flatten();
    let of_mount = entries.map(|entry| entry.path()).filter(|path| {
        path.extension() == Some(OsStr::new("lock"))
            && File::open(path).is_ok_and(|file| Holder::read(file).device == Some(device))
    });
    of_mount.map(|path| path.with_extension("control")).collect()
}

/// A daemon that serves a mount.
pub(super) struct Daemon {
    file: File,
    pid: String,
}

/// The daemons that serve this mount; to be called before it is unmounted.
pub(super) fn daemons_of_mount(device: (u32, u32)) -> Vec<Daemon> {
    let Ok(entries) = std::fs::read_dir(directory()) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.path().extension() == Some(OsStr::new("lock")))
        .filter_map(|entry| {
            let file = File::open(entry.path()).ok()?;
            let holder = Holder::read(file.try_clone().ok()?);
            (holder.device == Some(device)).then_some(Daemon { file, pid: holder.pid })
        })
        .collect()
}

impl Daemon {
    /// Waits until it is gone. `false`: not in time.
    pub(super) fn wait_until_gone(self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut file = self.file;
        loop {
            match Flock::lock(file, FlockArg::LockSharedNonblock) {
                Ok(_) => break,
                Err((back, _)) if Instant::now() < deadline => file = back,
                Err(_) => return false,
            }
            std::thread::sleep(POLL);
        }
        // A process that ends closes its files one by one: this one may be free while the device is still
        // open. The number may mean nothing here (a PID namespace), so its end is not insisted on.
        let deadline = deadline.min(Instant::now() + EXIT_PATIENCE);
        let running = || self.pid.parse().is_ok_and(|pid| !is_process_gone(pid));
        while running() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_fit_for_files() {
        assert_eq!(encode(b"esx-7.lab/a b"), "esx-7%2elab%2fa%20b");
        let iscsi = |spec: &str| identity(OsStr::new(spec));
        assert_eq!(iscsi("iscsi://anna%secret@p/t/0"), iscsi("iscsi://p:3260/t/0"));
        assert_ne!(iscsi("iscsi://p/t/0"), iscsi("iscsi://p/t/1"));
    }
}
