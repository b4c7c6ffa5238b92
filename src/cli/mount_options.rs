//! The options of `-o`: ours, the kernel's, and those that are for mount(8) and fstab only.
//!
//! An option that nobody knows is an error that names it, unless mount(8) asked for tolerance (`-s`): a
//! mistyped `ro` must not mount read-write.

use std::path::PathBuf;

use super::Failure;
use crate::fuse::mounting::MountFlags;
use crate::fuse::transport::Choice;
use crate::volume::FencingMode;

const MAX_THREADS: usize = 64;

/// What the options say, later ones winning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    pub flags: MountFlags,
    /// Change flags of a mount that exists.
    pub remount: bool,
    /// Name of this host towards the others; default: the machine's name.
    pub host: Option<String>,
    /// How the kernel's requests come in.
    pub transport: Choice,
    /// Threads that serve the kernel.
    pub threads: usize,
    pub log: Option<PathBuf>,
    /// For image files, which have no logical block size of their own.
    pub logical_block: Option<u32>,
    pub cache_mib: Option<u32>,
    pub fencing: FencingMode,
    pub max_background: u16,
    /// Behave as on a kernel without the newer abilities (for tests).
    pub kernel_old: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        MountOptions {
            flags: MountFlags::default(),
            remount: false,
            host: None,
            transport: Choice::default(),
            threads: 2,
            log: None,
            logical_block: None,
            cache_mib: None,
            fencing: FencingMode::default(),
            max_background: 64,
            kernel_old: false,
        }
    }
}

impl MountOptions {
    /// Parses option strings as given after each `-o`.
    pub fn parse<S: AsRef<str>>(lists: &[S], sloppy: bool) -> Result<MountOptions, Failure> {
        let mut options = MountOptions::default();
        for option in lists.iter().flat_map(|list| list.as_ref().split(',')).map(str::trim) {
            if option.is_empty() {
                continue;
            }
            match options.apply(option) {
                Ok(true) => {}
                Ok(false) if sloppy => {}
                Ok(false) => return Err(Failure::usage(format!("unknown mount option {option:?}"))),
                Err(message) => return Err(Failure::usage(message)),
            }
        }
        Ok(options)
    }

    /// `Ok(false)`: nobody knows it.
    fn apply(&mut self, option: &str) -> Result<bool, String> {
        let (key, value) = match option.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (option, None),
        };
        if key.starts_with("x-") || key.starts_with("X-") {
            return Ok(true);
        }
        match value {
            None => Ok(self.apply_flag(key)),
            Some(value) => self.apply_value(key, value),
        }
    }

    fn apply_flag(&mut self, key: &str) -> bool {
        let flags = &mut self.flags;
        match key {
            "ro" => flags.read_only = true,
            "rw" => flags.read_only = false,
            "dev" => flags.no_dev = false,
            "nodev" => flags.no_dev = true,
            "suid" => flags.no_suid = false,
            "nosuid" => flags.no_suid = true,
            "exec" => flags.no_exec = false,
            "noexec" => flags.no_exec = true,
            "noatime" => flags.no_atime = true,
            "atime" | "relatime" | "norelatime" | "strictatime" | "nostrictatime" => flags.no_atime = false,
            "nodiratime" => flags.no_dir_atime = true,
            "diratime" => flags.no_dir_atime = false,
            "sync" => flags.sync = true,
            "async" => flags.sync = false,
            "dirsync" => flags.dir_sync = true,
            "remount" => self.remount = true,
            // Who may mount: these forbid what a user could misuse, unless a later option allows it.
            "user" | "users" => {
                flags.no_dev = true;
                flags.no_suid = true;
                flags.no_exec = true;
            }
            "owner" | "group" => {
                flags.no_dev = true;
                flags.no_suid = true;
            }
            // Always on.
            "default_permissions" | "allow_other" => {}
            // For mount(8), systemd and fstab.
            "defaults" | "_netdev" | "nofail" | "auto" | "noauto" | "nouser" | "nousers" | "noowner"
            | "nogroup" | "lazytime" | "nolazytime" | "silent" | "loud" | "nomand" | "iversion"
            | "noiversion" => {}
            _ => return false,
        }
        true
    }

    fn apply_value(&mut self, key: &str, value: &str) -> Result<bool, String> {
        let bad = |expected: &str| format!("mount option {key}={value}: expected {expected}");
        match key {
            "host" => {
                if value.is_empty() || value.len() > 64 || value.chars().any(char::is_control) {
                    return Err(bad("a name of 1 to 64 bytes"));
                }
                self.host = Some(value.to_owned());
            }
            "threads" => {
                let most = || bad(&format!("a number from 1 to {MAX_THREADS}"));
                let threads = value.parse().ok().filter(|n| (1..=MAX_THREADS).contains(n));
                self.threads = threads.ok_or_else(most)?;
            }
            "log" => {
                if !value.starts_with('/') {
                    return Err(bad("an absolute path"));
                }
                self.log = Some(PathBuf::from(value));
            }
            "logical_block" => match value {
                "512" => self.logical_block = Some(512),
                "4096" => self.logical_block = Some(4096),
                _ => return Err(bad("512 or 4096")),
            },
            "transport" => self.transport = value.parse().map_err(|expected: String| bad(&expected))?,
            "fencing" => self.fencing = value.parse().map_err(|expected: String| bad(&expected))?,
            "cache_mib" => {
                let mib = value.parse().ok().filter(|n| *n >= 8);
                self.cache_mib = Some(mib.ok_or_else(|| bad("a number of MiB, at least 8"))?);
            }
            "max_background" => {
                let requests = value.parse().ok().filter(|n| *n >= 1);
                self.max_background = requests.ok_or_else(|| bad("a number from 1 to 65535"))?;
            }
            "kernel" => match value {
                "old" => self.kernel_old = true,
                "new" => self.kernel_old = false,
                _ => return Err(bad("old or new")),
            },
            // What libmount repeats from the mount table on a remount, and a comment.
            "user_id" | "group_id" | "rootmode" | "blksize" | "max_read" | "comment" | "user" => {}
            "subtype" if value == "lunfs" => {}
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The flags of a remount as mount(8) wants them; everything else can't change.
    pub fn remount_flags(&self) -> String {
        let flags = &self.flags;
        let choose = |on: bool, yes: &'static str, no: &'static str| if on { yes } else { no };
        [
            "remount",
            choose(flags.read_only, "ro", "rw"),
            choose(flags.no_dev, "nodev", "dev"),
            choose(flags.no_suid, "nosuid", "suid"),
            choose(flags.no_exec, "noexec", "exec"),
            choose(flags.no_atime, "noatime", "relatime"),
        ]
        .join(",")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(lists: &[&str]) -> Result<MountOptions, Failure> {
        MountOptions::parse(lists, false)
    }

    #[test]
    fn what_mount_and_fstab_pass_is_accepted() {
        let flags = parse(&[
            "rw",
            "ro,nosuid,nodev,relatime,user_id=0,group_id=0,_netdev,nofail,noauto,x-systemd.automount,comment=a",
        ])
        .expect("all known")
        .flags;
        assert!(flags.read_only && flags.no_suid && flags.no_dev && !flags.no_exec);
        assert_eq!(parse(&["", ",,", "defaults"]).expect("empty is fine"), MountOptions::default());
    }

    #[test]
    fn later_options_win() {
        assert!(!parse(&["ro", "rw"]).expect("known").flags.read_only);
        let flags = parse(&["users,exec"]).expect("known").flags;
        assert!(flags.no_dev && flags.no_suid && !flags.no_exec);
    }

    #[test]
    fn unknown_and_malformed_options_are_named() {
        for bad in
            ["r0", "hots=a", "threads=0", "threads=x", "logical_block=1024", "host=", "log=relative", "ro=1"]
        {
            let failure = parse(&[bad]).expect_err(bad);
            assert_eq!(failure.status, super::super::EXIT_USAGE);
            assert!(failure.message.contains(bad), "{bad}: {}", failure.message);
        }
        assert!(MountOptions::parse(&["r0,ro"], true).expect("tolerated").flags.read_only);
        assert!(MountOptions::parse(&["threads=x"], true).is_err());
    }

    #[test]
    fn our_own_options() {
        let options =
            parse(&["host=a b,threads=4,log=/var/log/x,logical_block=4096,kernel=old"]).expect("known");
        assert_eq!(options.host.as_deref(), Some("a b"));
        assert_eq!(options.threads, 4);
        assert_eq!(options.logical_block, Some(4096));
        assert!(options.kernel_old);
    }

    #[test]
    fn remount_repeats_only_flags() {
        let options = parse(&["ro,nosuid,remount,user_id=0,host=x"]).expect("known");
        assert!(options.remount);
        assert_eq!(options.remount_flags(), "remount,ro,dev,nosuid,exec,relatime");
    }
}
