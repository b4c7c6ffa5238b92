//! The hold time (design: the longest time anything below us can hold a write after its issuer is gone), from the
//! settings of the kernel. The others wait so much longer before they take a silent host for dead.
//!
//! ```text
//! SEND       3 s   it was asked for, and its issuer looked at its lease
//! blocked          its path went away, and the kernel keeps the queue until it gives the path up:
//!                  FC: fast_io_fail_tmo, else dev_loss_tmo; iSCSI: recovery_tmo; others: nothing
//! recovery         the host adapter was just recovering from somebody's time-out (see below)
//! busy       7 s   the target says BUSY, and the kernel asks again
//! on its way 7 s   SG_IO's time-out; then the kernel aborts it
//! recovery         if the abort fails: until a reset has ended it
//! TARGET     2 s   what the target took in
//! ```
//!
//! *Recovery* begins when all commands of the adapter have ended or timed out (`timeout` of the disk), and takes
//! `eh_deadline` if that is set, else four levels of resets, each with a question of `eh_timeout` before and after.
//!
//! Drivers of virtual machines are different: virtio-scsi extends each time-out for ever, and what ends a command is the
//! hypervisor's setting, which nobody here can see. [`timing::HYPERVISOR`] is assumed, and said.
//!
//! `LUNFS_HOLD_SECONDS` replaces the sum by what the administrator knows.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use super::sysfs::{BlockDir, ancestor, text};
use super::timing;

/// Longer than this is said; longer than that is refused at mount.
pub const WARN: Duration = Duration::from_secs(60);
pub const REFUSE: Duration = Duration::from_secs(900);
/// Read by [`Hold::of`]'s caller.
pub const OVERRIDE: &str = "LUNFS_HOLD_SECONDS";

const TIMEOUT_DEFAULT: u64 = 30;
const EH_TIMEOUT_DEFAULT: u64 = 10;
/// Abort or reset of device, target, bus and adapter.
const EH_LEVELS: u32 = 4;

/// What carries the commands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Carrier {
    FibreChannel,
    Iscsi,
    /// A virtual machine's adapter, by its driver: what is below may repeat commands by itself.
    Virtual(String),
    Other(String),
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Carrier::FibreChannel => f.write_str("FC"),
            Carrier::Iscsi => f.write_str("iSCSI"),
            Carrier::Virtual(driver) | Carrier::Other(driver) => f.write_str(driver),
        }
    }
}

/// A setting, where it is, and its value in seconds; `None`: for ever.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Setting {
    pub name: &'static str,
    pub seconds: Option<u64>,
}

/// What one path can hold back, and why.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hold {
    pub carrier: Carrier,
    pub settings: Vec<Setting>,
    /// `None`: for ever.
    pub time: Option<Duration>,
}

/// Seconds of an attribute; `Some(None)`: for ever.
fn seconds(path: &Path) -> Option<Option<u64>> {
    let value = text(path)?;
    match value.parse::<i64>() {
        // The kernel's way to say "never" (multipath-tools write this for dev_loss_tmo).
        Ok(n) if n < 0 || n >= i64::from(i32::MAX) => Some(None),
        Ok(n) => Some(u64::try_from(n).ok()),
        Err(_) => Some(None),
    }
}

/// What carries the disk, and how long the kernel keeps commands while the path is away.
fn carrier(device: &Path) -> (Carrier, Option<Setting>) {
    let transport = |prefix, class: &str, attribute: &str| {
        let at = ancestor(device, prefix)?;
        let directory = at.join(class).join(at.file_name()?);
        directory.exists().then(|| directory.join(attribute))
    };
    if let Some(recovery) = transport("session", "iscsi_session", "recovery_tmo") {
        let seconds = seconds(&recovery).unwrap_or(None);
        return (Carrier::Iscsi, Some(Setting { name: "recovery_tmo", seconds }));
    }
    if let Some(fast) = transport("rport-", "fc_remote_ports", "fast_io_fail_tmo") {
        let setting = match seconds(&fast) {
            Some(Some(n)) => Setting { name: "fast_io_fail_tmo", seconds: Some(n) },
            _ => Setting {
                name: "dev_loss_tmo",
                seconds: seconds(&fast.with_file_name("dev_loss_tmo")).unwrap_or(None),
            },
        };
        return (Carrier::FibreChannel, Some(setting));
    }
    let driver = adapter(device).and_then(|host| text(&host.join("proc_name")));
    let driver = driver.filter(|name| !name.is_empty()).unwrap_or_else(|| "an unknown driver".into());
    match driver.as_str() {
        "virtio_scsi" | "vmw_pvscsi" | "storvsc" | "storvsc_host_t" | "hv_storvsc" | "xen-scsifront"
        | "ibmvscsi" => (Carrier::Virtual(driver), None),
        _ => (Carrier::Other(driver), None),
    }
}

/// The directory of the host adapter's attributes.
fn adapter(device: &Path) -> Option<std::path::PathBuf> {
    let host = ancestor(device, "host")?;
    Some(host.join("scsi_host").join(host.file_name()?))
}

impl Hold {
    /// Of one disk, from the settings as they are now.
    pub fn of(disk: &BlockDir) -> Hold {
        let device = disk.scsi_device().unwrap_or_default();
        let (carrier, blocked) = carrier(&device);
        let of = |name: &'static str, default: u64| Setting {
            name,
            seconds: Some(disk.number_of(&format!("device/{name}")).unwrap_or(default)),
        };
        let (timeout, eh_timeout) = (of("timeout", TIMEOUT_DEFAULT), of("eh_timeout", EH_TIMEOUT_DEFAULT));
        let deadline = adapter(&device).and_then(|host| seconds(&host.join("eh_deadline")).flatten());
        let deadline = Setting { name: "eh_deadline", seconds: deadline };
        let span = |setting: &Setting| setting.seconds.map(Duration::from_secs);
        let way = timing::SEND + timing::COMMAND * 2 + timing::TARGET;
        let time = match (&carrier, &blocked) {
            (Carrier::Virtual(_), _) => Some(way + timing::HYPERVISOR),
            (_, Some(Setting { seconds: None, .. })) => None,
            (_, blocked) => {
                let (timeout, eh_timeout) =
                    (span(&timeout).unwrap_or_default(), span(&eh_timeout).unwrap_or_default());
                let resets = span(&deadline).map_or(eh_timeout * 2 * EH_LEVELS, |d| d + eh_timeout);
                let recovery = timeout.max(timing::COMMAND) + resets;
                Some(way + blocked.as_ref().and_then(span).unwrap_or_default() + recovery * 2)
            }
        };
        let mut settings = vec![timeout, eh_timeout, deadline];
        settings.extend(blocked);
        Hold { carrier, settings, time }
    }

    /// Does what is below repeat commands by itself?
    pub fn replays(&self) -> bool {
        matches!(self.carrier, Carrier::Virtual(_))
    }

    /// SG_IO's time-out for a flush: what the kernel gives its own commands, so that recovery waits no longer for it.
    pub fn flush_timeout(&self) -> Duration {
        let timeout = self.settings.iter().find(|s| s.name == "timeout").and_then(|s| s.seconds);
        Duration::from_secs(timeout.unwrap_or(TIMEOUT_DEFAULT)).max(timing::COMMAND)
    }

    /// The settings for people: "timeout 30 s, eh_deadline off".
    pub fn words(&self) -> String {
        let each = |s: &Setting| match s.seconds {
            Some(n) => format!("{} {n} s", s.name),
            None if s.name == "eh_deadline" => "eh_deadline off".into(),
            None => format!("{} for ever", s.name),
        };
        self.settings.iter().map(each).collect::<Vec<_>>().join(", ")
    }
}

/// What is published for a device with these paths.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Published {
    pub time: Duration,
    /// What is to be said at mount.
    pub warnings: Vec<String>,
    /// Why it must not be mounted.
    pub refusal: Option<String>,
}

/// The longest of all paths. `known`: what the administrator says.
pub fn publish(holds: &[(String, Hold)], known: Option<Duration>) -> Published {
    let mut out = Published { time: Duration::ZERO, warnings: Vec::new(), refusal: None };
    if let Some(time) = known {
        out.time = time;
        let seconds = time.as_secs();
        out.warnings.push(format!("{OVERRIDE} says that nothing holds a write for more than {seconds} s"));
        return out;
    }
    for (path, hold) in holds {
        if let Carrier::Virtual(driver) = &hold.carrier {
            let assumed = timing::HYPERVISOR.as_secs();
            out.warnings.push(format!(
                "{path}: {driver} leaves it to the hypervisor when a command is given up, and {assumed} s are assumed; \
                 set a time-out there, or say what it is by {OVERRIDE}"
            ));
        }
        match hold.time {
            None => {
                let why = format!(
                    "{path}: the kernel would keep writes for ever while the path is away ({}); set it to a few seconds",
                    hold.words()
                );
                out.refusal.get_or_insert(why);
                out.time = out.time.max(REFUSE);
            }
            Some(time) => out.time = out.time.max(time),
        }
    }
    let longest = holds.iter().max_by_key(|(_, hold)| hold.time.unwrap_or(Duration::MAX));
    if let Some((path, hold)) = longest.filter(|_| out.time > WARN && out.refusal.is_none()) {
        let why = format!(
            "{path}: the kernel can hold a write for {} s ({}), and so much longer do other hosts wait for a dead one; \
             see docs/arrays.md for settings",
            out.time.as_secs(),
            hold.words()
        );
        match out.time > REFUSE {
            true => out.refusal = Some(why),
            false => out.warnings.push(why),
        }
    }
    out
}
