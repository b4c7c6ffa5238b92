//! Who this host is, as the machine says.

use crate::heartbeat::HostIdentity;
use crate::rt;

/// The identity of host `name` on this machine: stable over restarts, different for each name.
pub fn local_identity(name: Option<&str>) -> HostIdentity {
    let read = |path: &str| std::fs::read_to_string(path).map(|s| s.trim().to_owned()).ok();
    let name = name
        .map(str::to_owned)
        .or_else(|| nix::unistd::gethostname().ok()?.into_string().ok())
        .unwrap_or_else(|| "localhost".to_owned());
    let machine = read("/etc/machine-id").unwrap_or_default();
    let boot_id = read("/proc/sys/kernel/random/boot_id")
        .and_then(|s| uuid::Uuid::parse_str(&s).ok())
        .map_or_else(random_id, uuid::Uuid::into_bytes);
    let uuid = if machine.is_empty() {
        random_id()
    } else {
        // Two independent hashes of machine and name make sixteen bytes.
        let half = |key: u8| {
            let hasher = siphasher::sip::SipHasher24::new_with_key(&[key; 16]);
            hasher.hash(format!("{machine}\n{name}").as_bytes()).to_le_bytes()
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&half(1));
        bytes[8..].copy_from_slice(&half(2));
        bytes
    };
    let pid_namespace = std::fs::read_link("/proc/self/ns/pid")
        .ok()
        .and_then(|link| link.to_str()?.trim_start_matches("pid:[").trim_end_matches(']').parse().ok())
        .unwrap_or(0);
    HostIdentity { name, uuid, boot_id, pid: std::process::id(), pid_namespace, is_gone: is_process_gone }
}

/// Has the process closed everything it had open? So it has when each of its threads has ended, also before
/// its parent looked. What can't be read counts as running.
pub fn is_process_gone(pid: u32) -> bool {
    let threads = match std::fs::read_dir(format!("/proc/{pid}/task")) {
        Ok(threads) => threads,
        // Without /proc nothing is known.
        Err(e) => {
            return e.kind() == std::io::ErrorKind::NotFound && std::path::Path::new("/proc/self").exists();
        }
    };
    threads.flatten().all(|thread| {
        let Ok(stat) = std::fs::read_to_string(thread.path().join("stat")) else { return true };
        // PID (NAME) STATE ..., proc(5).
        let state = stat.rsplit(')').next().and_then(|rest| rest.trim_start().chars().next());
        matches!(state, None | Some('Z' | 'X'))
    })
}

fn random_id() -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&rt::random_u64().to_le_bytes());
    bytes[8..].copy_from_slice(&rt::random_u64().to_le_bytes());
    bytes
}
