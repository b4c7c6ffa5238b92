//! The Linux kernel's own target (LIO) in a guest, reached by hosts of this machine from user space.
//!
//! Its compare-and-write is not exclusive any more once one ended in a reservation conflict, so LunFS uses it without reservations
//! and never tries them by itself.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::machine::{Guest, Machine, Network, PATIENCE};
use crate::pair::{Pair, free_port};
use crate::volume::profile;

const IQN: &str = "iqn.2026-01.org.lunfs.test:lio";
const BYTES: u64 = 768 << 20;

/// What an administrator would type into targetcli.
fn export(guest: &Guest) {
    guest.connect_network();
    // Where it keeps registrations; it looks for the directory when it is loaded.
    guest.run("mkdir -p /etc/target/pr /etc/target/alua");
    guest.load("target");
    guest.run("mount -t configfs none /sys/kernel/config 2>/dev/null || mountpoint -q /sys/kernel/config");
    guest.run(&format!(
        "set -e; cd /sys/kernel/config/target; mkdir -p core/fileio_0/vol; truncate -s {BYTES} /run/lun
         echo fd_dev_name=/run/lun,fd_dev_size={BYTES} >core/fileio_0/vol/control
         echo 6c756e66-7331-4c49-af00-000000000001 >core/fileio_0/vol/wwn/vpd_unit_serial
         echo 1 >core/fileio_0/vol/enable
         echo 1 >core/fileio_0/vol/attrib/emulate_tpu
         mkdir -p iscsi/{IQN}/tpgt_1/lun/lun_1 iscsi/{IQN}/tpgt_1/np/10.0.2.15:3260
         ln -s /sys/kernel/config/target/core/fileio_0/vol iscsi/{IQN}/tpgt_1/lun/lun_1/vol
         cd iscsi/{IQN}/tpgt_1
         echo 0 >attrib/authentication
         echo 1 >attrib/generate_node_acls
         echo 1 >attrib/cache_dynamic_acls
         echo 0 >attrib/demo_mode_write_protect
         echo 1 >enable"
    ));
}

/// A guest that is a target, and hosts on this machine.
struct Lio {
    pair: Pair,
    url: String,
}

impl Lio {
    fn boot() -> Option<Lio> {
        if !(nix::unistd::geteuid().is_root() && Path::new("/dev/fuse").exists()) {
            eprintln!("SKIPPED: needs root and /dev/fuse");
            return None;
        }
        let port = free_port();
        let pair = Pair::of(&[], |pair| {
            let network = Network::IsReached(port);
            vec![Machine { network, memory_mib: 1024, ..pair.machine("lio", 0) }]
        })?;
        export(&pair.guests[0]);
        Some(Lio { pair, url: format!("iscsi://127.0.0.1:{port}/{IQN}/1") })
    }

    /// `lunfs` of this machine.
    fn tool(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lunfs"));
        command.env("LUNFS_RUN_DIR", self.pair.directory()).args(words);
        command
    }

    fn on_unit(&self, words: &[&str]) -> Output {
        let output = self.tool(words).arg(&self.url).output().expect("it runs");
        eprintln!("{words:?}: {:?}\n{}", output.status.code(), text(&output));
        output
    }

    fn mount(&self, name: &str) -> Host {
        let dir = self.pair.directory().join(format!("mnt-{name}"));
        std::fs::create_dir(&dir).expect("a new directory");
        let mut command = self.tool(&["mount", "--foreground", "--host", name, &self.url]);
        let daemon = command.arg(&dir).stderr(Stdio::inherit()).spawn().expect("mount starts");
        let mut host = Host { dir, daemon };
        let tried = Instant::now();
        while lunfs::fuse::mountinfo::at(&host.dir).expect("mountinfo").is_none() {
            let ended = host.daemon.try_wait().expect("a child");
            assert!(ended.is_none() && tried.elapsed() < PATIENCE, "{name} does not mount: {ended:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        host
    }

    fn unmount(&self, mut host: Host) {
        let output = self.tool(&["umount"]).arg(&host.dir).output().expect("umount runs");
        assert!(output.status.success(), "{output:?}");
        assert!(host.daemon.wait().expect("a child").success());
    }
}

/// A daemon of this machine and its mount, which do not outlive the test.
struct Host {
    dir: PathBuf,
    daemon: Child,
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = umount2(&self.dir, MntFlags::MNT_DETACH);
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The agent that guests have runs here as well.
fn load(name: &str, dir: &Path, words: &[String]) -> Child {
    let agent = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target/guest/build/x86_64-unknown-linux-gnu/debug/lunfs-guest-agent");
    let mut command = Command::new(agent);
    command.args(["load", name]).arg(dir).args(words).stdout(Stdio::piped()).spawn().expect("the agent runs")
}

/// Both hosts at the same time; what each said.
fn both(hosts: &[Host], name: &str, below: &str, words: impl Fn(usize) -> Vec<String>) -> Vec<String> {
    let began = Instant::now();
    let running: Vec<_> =
        hosts.iter().enumerate().map(|(n, host)| load(name, &host.dir.join(below), &words(n))).collect();
    let said: Vec<String> = running
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().expect("a child");
            assert!(output.status.success(), "{name}: {output:?}");
            String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
        })
        .collect();
    eprintln!("{name}: {:.1} s, {:?}", began.elapsed().as_secs_f64(), said.iter().map(|s| s.lines().last()));
    said
}

fn coherent(hosts: &[Host], scale: u64) {
    let first = &hosts[0].dir;
    for name in ["own0", "own1", "append", "replace", "raise", "move", "move/a", "move/b"] {
        std::fs::create_dir(first.join(name)).expect("mkdir");
    }
    std::fs::write(first.join("raise/counter"), "0").expect("write");
    (0..20).for_each(|t| std::fs::write(first.join(format!("move/a/t{t}")), "").expect("write"));
    let numbers = |n: usize, times: u64| vec![n.to_string(), times.to_string()];
    both(&hosts[..1], "fill", "own0", |_| numbers(0, 5 * scale));
    both(&hosts[1..], "verify", "own0", |_| numbers(0, 5 * scale));
    let lines = 20 * scale;
    both(hosts, "append", "append", |n| numbers(n, lines));
    let expected = format!("lines {{\"0\": {lines}, \"1\": {lines}}}");
    assert_eq!(both(hosts, "appended", "append", |_| vec![]), [expected.as_str(), expected.as_str()]);
    both(hosts, "replace", "replace", |n| numbers(n, 10 * scale));
    both(hosts, "move", "move", |n| numbers(n, 10 * scale));
    both(hosts, "raise", "raise", |n| numbers(n, 5 * scale));
    for host in hosts {
        let counter = std::fs::read_to_string(host.dir.join("raise/counter")).expect("read");
        assert_eq!(counter, (10 * scale).to_string());
    }
}

/// What LunFS says of this target, and two hosts on it.
#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn target_of_linux() {
    let Some(lio) = Lio::boot() else { return };
    let asked = lio.on_unit(&["check-device", "--exclusive"]);
    assert_eq!(asked.status.code(), Some(3), "{}", text(&asked));
    // Known by name: not tried, and not promised.
    let refused = lio.on_unit(&["mkfs", "--reservations", "required", "--profile", &profile()]);
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("LIO"), "{}", text(&refused));
    let made = lio.on_unit(&["mkfs", "--slots", "4", "--profile", &profile()]);
    assert!(made.status.success(), "{}", text(&made));
    assert!(text(&lio.on_unit(&["status"])).contains("hosts mount without reservations"), "status says so");
    let hosts = [lio.mount("h0"), lio.mount("h1")];
    coherent(&hosts, 3);
    hosts.into_iter().for_each(|host| lio.unmount(host));
    assert!(lio.on_unit(&["fsck", "-n"]).status.success());
}
