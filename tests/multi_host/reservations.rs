//! Who uses a LUN's reservations: all hosts of a volume or none, as mkfs found out.

use std::process::Output;

use lunfs_test_target::personality::CompareAndWrite;
use lunfs_test_target::{Config, LunConfig, Target};
use nix::sys::signal::Signal;

use crate::harness::{Backing, Cluster, can_mount, lunfs, until};

fn can() -> bool {
    can_mount() && lunfs::device::iscsi::AVAILABLE
}

fn registered(cluster: &Cluster) -> usize {
    let target = cluster.target();
    target.reservations(target.luns()[0]).expect("its reservations").registrations.len()
}

fn url(cluster: &Cluster) -> String {
    cluster.target().url(1)
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn status(device: &str) -> serde_json::Value {
    let output = lunfs().args(["status", "--json", device]).output().expect("status runs");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// Nobody asked for them: mkfs tried them, and every host uses them.
#[test]
fn what_mkfs_proved_every_host_uses() {
    if !can() {
        return;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::Iscsi(512), 4, "1G");
    assert_eq!(registered(&cluster), 0, "mkfs leaves nothing behind");
    cluster.mount();
    cluster.mount();
    // Two sessions each.
    assert_eq!(registered(&cluster), 4);
    let report = status(&url(&cluster));
    let unit = &report["volume"]["unit"];
    assert_eq!((&unit["verdict"], &unit["reservations"]), (&"good".into(), &true.into()), "{report}");
    assert!(unit["name"].as_str().is_some_and(|name| !name.is_empty()), "{unit}");
    let fencing: Vec<_> = report["hosts"].as_array().expect("hosts").iter().map(|h| &h["fencing"]).collect();
    assert_eq!(fencing, ["device", "device"]);
    let text = lunfs().args(["status", &url(&cluster)]).output().expect("status runs");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("good when the volume was made; hosts mount with reservations"), "{text}");
    // A host without them would be a hole in the fence.
    let (mut command, _) = cluster.mount_command("third", "fencing=lease");
    let refused = command.output().expect("mount runs");
    assert_eq!(refused.status.code(), Some(32), "{refused:?}");
    assert!(said(&refused).contains("mount with fencing=auto"), "{refused:?}");
    // They agree on it: what one writes the other reads.
    std::fs::write(cluster.dir(0).join("file"), "content").expect("writes");
    assert_eq!(std::fs::read_to_string(cluster.dir(1).join("file")).expect("reads"), "content");
    cluster.unmount(0);
    assert_eq!(registered(&cluster), 2);
    cluster.unmount(0);
    assert_eq!(registered(&cluster), 0);
}

/// A target without reservations, or with bad ones: the volume is made, and its hosts do without.
#[test]
fn where_they_can_not_be_trusted_nobody_uses_them() {
    if !can() {
        return;
    }
    for bad in ["none", "open to unmap"] {
        let lun = LunConfig::new(1, 1 << 30);
        let target = Target::start(Config::of(lun)).expect("the test target starts");
        target
            .change_personality(1, |p| match bad {
                "none" => p.reservations = false,
                _ => p.reservations_cover_unmap = false,
            })
            .expect("a personality");
        let device = target.url(1);
        let mkfs = |more: &[&str]| {
            lunfs().args(["mkfs", "--profile", "fast"]).args(more).arg(&device).output().expect("mkfs runs")
        };
        let refused = mkfs(&["--reservations", "required"]);
        assert_eq!(refused.status.code(), Some(1), "{bad}: {refused:?}");
        assert!(said(&refused).contains("no reservations that can be trusted"), "{refused:?}");
        let made = mkfs(&[]);
        assert!(made.status.success(), "{bad}: {made:?}");
        assert!(String::from_utf8_lossy(&made.stdout).contains("without reservations"), "{made:?}");
        let report = status(&device);
        let unit = &report["volume"]["unit"];
        assert_eq!(unit["verdict"], "good without reservations", "{bad}: {report}");
        assert_eq!(unit["reservations"], false);
        let dir = tempfile::tempdir().expect("a directory");
        let mount = |options: &str| {
            let mut command = lunfs();
            command.env("LUNFS_RUN_DIR", dir.path()).args(["mount", "-o", options, &device]);
            command.arg(dir.path().join("mnt")).output().expect("mount runs")
        };
        std::fs::create_dir(dir.path().join("mnt")).expect("a directory");
        let refused = mount("fencing=required");
        assert_eq!(refused.status.code(), Some(32), "{bad}: {refused:?}");
        assert!(said(&refused).contains("mount without reservations"), "{refused:?}");
        let mounted = mount("rw");
        assert!(mounted.status.success(), "{bad}: {mounted:?}");
        std::fs::write(dir.path().join("mnt/file"), "content").expect("writes");
        assert_eq!(status(&device)["hosts"][0]["fencing"], "lease");
        let gone = lunfs()
            .env("LUNFS_RUN_DIR", dir.path())
            .arg("umount")
            .arg(dir.path().join("mnt"))
            .output()
            .expect("umount runs");
        assert!(gone.status.success(), "{gone:?}");
    }
}

/// Hosts that die leave their registrations. fsck works among them, and a new volume is made without them.
#[test]
fn what_the_dead_left_registered() {
    if !can() {
        return;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::Iscsi(512), 4, "1G");
    cluster.mount();
    cluster.mount();
    let device = url(&cluster);
    std::fs::write(cluster.dir(0).join("file"), "content").expect("writes");
    lunfs_sync(&cluster);
    for host in &cluster.hosts {
        host.signal(Signal::SIGKILL);
    }
    until("both are gone", || cluster.hosts.iter().all(|host| !host.is_alive()));
    cluster.take_off(0);
    cluster.take_off(0);
    assert_eq!(registered(&cluster), 4);
    let repaired = lunfs().args(["fsck", "-y", &device]).output().expect("fsck runs");
    assert!(repaired.status.code().is_some_and(|code| code <= 1), "{repaired:?}");
    // The dead were shut out before their journals were replayed, and fsck took its own back.
    assert_eq!(registered(&cluster), 0, "{repaired:?}");
    let name = "again";
    cluster.mount_as(name, "rw");
    assert_eq!(std::fs::read_to_string(cluster.dir(0).join("file")).expect("reads"), "content");
    cluster.hosts[0].signal(Signal::SIGKILL);
    until("it is gone", || !cluster.hosts[0].is_alive());
    cluster.take_off(0);
    assert_eq!(registered(&cluster), 2);
    let made = lunfs().args(["mkfs", "--force", "--profile", "fast", &device]).output().expect("mkfs runs");
    assert!(made.status.success(), "{made:?}");
    assert!(said(&made).contains("registrations that hosts had left"), "{made:?}");
    assert_eq!(registered(&cluster), 0);
    cluster.mount();
    assert!(std::fs::read_dir(cluster.dir(0)).expect("lists").next().is_none());
    cluster.unmount(0);
}

fn lunfs_sync(cluster: &Cluster) {
    for host in 0..cluster.hosts.len() {
        let dir = std::fs::File::open(cluster.dir(host)).expect("opens");
        dir.sync_all().expect("syncs");
    }
}

/// The kernel target's fault: a conflict breaks compare-and-write for good. Nothing is made on a unit that the trial broke.
#[test]
fn a_unit_that_the_trial_breaks_is_refused() {
    if !lunfs::device::iscsi::AVAILABLE {
        return;
    }
    let target = Target::start(Config::of(LunConfig::new(1, 1 << 30))).expect("the test target starts");
    target
        .change_personality(1, |p| {
            p.compare_and_write = CompareAndWrite::AtomicUntilEndedEarly;
            p.race_us = 200;
        })
        .expect("a personality");
    let mkfs = |more: &[&str]| {
        lunfs().args(["mkfs", "--quiet"]).args(more).arg(target.url(1)).output().expect("mkfs runs")
    };
    let refused = mkfs(&[]);
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    assert!(said(&refused).contains("restart the target before anybody uses the unit"), "{refused:?}");
}
