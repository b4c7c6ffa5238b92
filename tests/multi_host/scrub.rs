//! `lunfs scrub` on real mounts: beside load, on damage, cancelled, refused, and when its daemon ends.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::harness::{Backing, Cluster, can_mount, lunfs, two_hosts, until};

fn scrub(cluster: &Cluster, host: usize, args: &[&str]) -> Output {
    cluster.tool("scrub").args(args).arg(cluster.dir(host)).output().expect("scrub runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Wants this status; gives what was said.
fn says(output: &Output, status: i32) -> String {
    assert_eq!(output.status.code(), Some(status), "{}", text(output));
    text(output)
}

fn json(output: &Output, status: i32) -> Value {
    says(output, status);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", text(output)))
}

/// One that takes long, and is under way.
fn slow(cluster: &Cluster, host: usize) -> Child {
    let name = &cluster.hosts[host].name;
    let begun = || cluster.log(name).matches("scrub begins").count();
    let before = begun();
    let mut command = cluster.tool("scrub");
    command.args(["--json", "--rate", "8K"]).arg(cluster.dir(host));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("scrub starts");
    until("the daemon begins", || begun() > before);
    child
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).expect("it runs");
}

/// Makes, grows, shrinks, moves and removes files, in a directory of all hosts and in one of its own.
fn load(host: usize, dir: &Path, stop: &AtomicBool) {
    let own = dir.join(format!("own-{host}"));
    fs::create_dir_all(&own).expect("a directory");
    let mut round = 0;
    while !stop.load(Ordering::Relaxed) {
        round += 1;
        for (i, place) in [&own, &own, &dir.join("shared")].into_iter().enumerate() {
            let path = place.join(format!("f{}", (round + i * 7) % 40));
            let other = place.join(format!("g{host}-{}", round % 40));
            let appended = fs::OpenOptions::new().create(true).append(true).open(&path);
            if let Ok(mut file) = appended {
                let _ = file.write_all(&vec![7; 3000 * (1 + round % 5)]);
                if round % 3 == 0 {
                    let _ = file.set_len(100);
                }
            }
            match round % 4 {
                0 => drop(fs::rename(&path, &other)),
                1 => drop(fs::remove_file(&other)),
                2 => drop(fs::hard_link(&path, &other)),
                _ => drop(fs::create_dir(place.join(format!("d{}", round % 9)))),
            }
            let _ = fs::remove_dir(place.join(format!("d{}", (round + 4) % 9)));
        }
    }
}

#[test]
fn beside_load_on_both_hosts_nothing_is_found() {
    let Some(cluster) = two_hosts(Backing::File(512)) else { return };
    fs::create_dir(cluster.dir(0).join("shared")).expect("a directory");
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for host in 0..2 {
            let (dir, stop) = (cluster.dir(host), &stop);
            scope.spawn(move || load(host, dir, stop));
        }
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            std::thread::sleep(Duration::from_secs(2));
            let report = json(&scrub(&cluster, 0, &["--json", "--rate", "0"]), 0);
            assert_eq!(report["findings"], Value::Array(Vec::new()), "{report}");
            assert!(report["report"]["inodes"].as_u64() > Some(20), "{report}");
            assert_eq!((&report["status"], &report["error"]), (&0.into(), &Value::Null));
            let said = says(&scrub(&cluster, 1, &["--rate", "0"]), 0);
            assert!(said.contains(": nothing wrong; "), "{said}");
            eprintln!("{report}\n{said}");
        }));
        stop.store(true, Ordering::Relaxed);
        checked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    cluster.end();
}

#[test]
fn damage_is_found_and_told_by_the_exit_status() {
    let Some(cluster) = two_hosts(Backing::File(4096)) else { return };
    let path = cluster.dir(0).join("file");
    fs::write(&path, "contents").expect("a file");
    fs::File::open(&path).and_then(|file| file.sync_all()).expect("durable");
    let ino = fs::metadata(&path).expect("attributes").ino();
    // So that it is in place, and another host has it: the other looks at it.
    fs::read(cluster.dir(1).join("file")).expect("readable there");
    let image = fs::File::options().read(true).write(true).open(cluster.image()).expect("the image");
    let mut good = [0; 4096];
    image.read_exact_at(&mut good, ino * 4096).expect("a block");
    image.write_all_at(&[0x5a; 4096], ino * 4096).expect("a block");
    for host in 0..2 {
        let said = says(&scrub(&cluster, host, &[]), 4);
        let line = format!("inode {ino:#x} [inode-unreadable]: ");
        assert!(said.contains(&line) && said.contains(": 1 error; "), "{said}");
        let report = json(&scrub(&cluster, host, &["--json"]), 4);
        let finding = &report["findings"][0];
        assert_eq!((&finding["name"], &finding["place"]["inode"]), (&"inode-unreadable".into(), &ino.into()));
        assert_eq!((&finding["severity"], &report["report"]["errors"]), (&"loss".into(), &1.into()));
        assert_eq!(finding.get("at"), None);
    }
    assert!(cluster.log("h0").contains("scrub found: inode"), "{}", cluster.log("h0"));
    image.write_all_at(&good, ino * 4096).expect("a block");
    says(&scrub(&cluster, 1, &[]), 0);
    cluster.end();
}

#[test]
fn it_is_cancelled_refused_and_done_again() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::new(Backing::File(512), 3, "1G");
    cluster.mount();
    let running = slow(&cluster, 0);
    let said = says(&scrub(&cluster, 0, &[]), 8);
    assert!(said.contains("is being scrubbed already"), "{said}");
    let start = Instant::now();
    signal(&running, Signal::SIGINT);
    let ended = running.wait_with_output().expect("it ends");
    assert!(start.elapsed() < Duration::from_secs(10));
    let report = json(&ended, 32);
    assert_eq!((&report["error"], &report["status"]), (&"cancelled".into(), &32.into()));
    // The daemon is free for the next one as soon as the client was told.
    let mut running = slow(&cluster, 0);
    signal(&running, Signal::SIGKILL);
    running.wait().expect("it ends");
    until("the daemon sees that its client is gone", || {
        scrub(&cluster, 0, &["--rate", "0"]).status.code() == Some(0)
    });
    assert!(cluster.log("h0").contains("scrub ended: cancelled"));
    cluster.end();
}

#[test]
fn a_mount_that_ends_ends_it() {
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::with_profile("fast", Backing::File(512), 4, "1G");
    for _ in 0..3 {
        cluster.mount();
    }
    let running = slow(&cluster, 2);
    cluster.unmount(2);
    let said = json(&running.wait_with_output().expect("it ends"), 8);
    assert_eq!(said["error"], "the mount ended before the check did");

    let running = slow(&cluster, 1);
    cluster.kill(1);
    let said = json(&running.wait_with_output().expect("it ends"), 8);
    assert_eq!(said["error"], "the daemon ended in the middle");

    // Stopped until the others declared it dead.
    let running = slow(&cluster, 0);
    cluster.hosts[0].signal(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(8));
    cluster.hosts[0].signal(Signal::SIGCONT);
    let said = json(&running.wait_with_output().expect("it ends"), 8);
    let error = said["error"].as_str().expect("a reason").to_owned();
    assert!(error.contains("may not use the volume any more"), "{error}");
    until("the daemon ends", || !cluster.hosts[0].is_alive());
    cluster.take_off(0);
}

/// The protocol by itself, as later tools will use it.
#[test]
fn a_daemon_says_who_it_is() {
    let Some(mut cluster) = two_hosts(Backing::File(512)) else { return };
    let run_dir = cluster.run_dir();
    let sockets = || -> Vec<_> {
        let files = fs::read_dir(&run_dir).expect("the runtime directory").flatten();
        files
            .map(|file| file.path())
            .filter(|path| path.extension().is_some_and(|e| e == "control"))
            .collect()
    };
    assert_eq!(sockets().len(), 2);
    for socket in sockets() {
        assert_eq!(fs::metadata(&socket).expect("attributes").mode() & 0o777, 0o600);
        let ask = |command: &str, arguments: Value| {
            lunfs::control::call(&socket, command, arguments, &AtomicBool::new(false), &mut drop)
        };
        let info = ask("info", Value::Null).expect("an answer");
        let host = cluster.hosts.iter().find(|h| h.name.as_str() == info["host"]).expect("a host");
        assert_eq!(info["pid"], host.pid);
        assert_eq!(info["mountpoint"].as_str(), host.dir.to_str());
        let said = |result: Result<Value, _>| format!("{:?}", result.expect_err("a refusal"));
        assert!(said(ask("nonsense", Value::Null)).contains("UnknownCommand"));
        assert!(said(ask("scrub", serde_json::json!({ "bytes_per_s": "x" }))).contains("BadArguments"));
    }
    cluster.unmount(0);
    assert_eq!(sockets().len(), 1);
    cluster.end();
}

#[test]
fn what_is_no_mount_is_refused() {
    let fails = |args: &[&str], status: i32| {
        let output = lunfs().arg("scrub").args(args).output().expect("scrub runs");
        says(&output, status)
    };
    let temp = tempfile::tempdir().expect("a temporary directory");
    let directory = temp.path().to_str().expect("a plain path");
    assert!(fails(&[directory], 8).contains("nothing is mounted there"));
    assert!(fails(&["/nonexistent/x"], 8).contains("No such file"));
    assert!(fails(&["/proc"], 8).contains("no LunFS volume is mounted there, but a proc"));
    fails(&[], 16);
    fails(&["--rate", "rubbish", directory], 16);
    fails(&["--ask-rate", "0", directory], 16);
    fails(&["--help"], 0);
    if !can_mount() {
        return;
    }
    let mut cluster = Cluster::new(Backing::File(512), 2, "1G");
    let dir = cluster.mount().dir.clone();
    let elsewhere =
        lunfs().env("LUNFS_RUN_DIR", directory).arg("scrub").arg(&dir).output().expect("scrub runs");
    assert!(says(&elsewhere, 8).contains("no daemon of this mount is known in"), "{}", text(&elsewhere));
    cluster.end();
}
