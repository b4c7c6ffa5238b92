//! Mounts on an iSCSI target that loses answers, goes away, and comes back.

use std::io::Write;
use std::time::{Duration, Instant};

use lunfs_test_target::{Fault, Kind, Rule, Select};

use crate::harness::{Backing, Cluster, can_mount, until};

fn cluster(profile: &str) -> Option<Cluster> {
    cluster_with(profile, "", false)
}

fn cluster_with(profile: &str, options: &'static str, volatile_cache: bool) -> Option<Cluster> {
    if !can_mount() || !lunfs::device::iscsi::AVAILABLE {
        return None;
    }
    let temp = tempfile::Builder::new().prefix("lunfs-hosts-").tempdir().expect("a directory");
    // This target forgets its registrations when it ends, unlike an array: with them every restart would be a fence.
    let more: &[&str] = if options == "fencing=required" { &[] } else { &["--reservations", "off"] };
    let mut cluster = Cluster::made_with(temp, profile, Backing::Iscsi(512), 4, "1G", more);
    cluster.options = options;
    cluster.target().change_personality(1, |p| p.volatile_cache = volatile_cache).expect("a LUN");
    cluster.mount();
    cluster.mount();
    Some(cluster)
}

struct StopAtEnd<'a>(&'a std::sync::atomic::AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Appends a line and makes it durable.
fn append(path: &std::path::Path, line: &str) -> std::io::Result<()> {
    let mut file = std::fs::File::options().append(true).create(true).open(path)?;
    file.write_all(line.as_bytes())?;
    file.sync_all()
}

/// Both hosts append to one file, make it shorter and take it away while answers are lost, held, refused and cut, also
/// those to what a new session asks: nothing is lost, and no lease.
fn work_among_faults(cluster: Cluster, kinds: &[Kind]) {
    let mut faults = vec![
        (Kind::CompareAndWrite, Fault::AnswerLate { ms: 300 }),
        (Kind::CompareAndWrite, Fault::Drop),
        (Kind::CompareAndWrite, Fault::Twice { gap_ms: 2, answer: lunfs_test_target::Which::Second }),
        (Kind::CompareAndWrite, Fault::Miscompare { executed: true, information: None }),
    ];
    for kind in kinds {
        faults.push((*kind, Fault::Cut { executed: true }));
        faults.push((*kind, Fault::Cut { executed: false }));
        faults.push((*kind, Fault::Status { status: 0x08 }));
        faults.push((*kind, Fault::Status { status: 0x28 }));
        // Others without an answer are waited for, for longer than a lease lasts; see `device_iscsi`.
        if matches!(kind, Kind::CompareAndWrite | Kind::Read) {
            faults.push((*kind, Fault::LoseAnswer));
        }
        faults.push((*kind, Fault::Attention { asc: 0x29, ascq: 0 }));
    }
    for (n, (kind, fault)) in faults.into_iter().enumerate() {
        let select = Select::kind(kind).probability(0.01, n as u64 + 1);
        cluster.target().add_rule(Rule::new(&format!("{kind:?} {n}"), select, fault));
    }
    let lines = 150;
    cluster.each(|host, dir| {
        for n in 0..lines {
            append(&dir.join("log"), &format!("{host} {n}\n")).expect("appends");
            if n % 10 == 0 {
                let scratch = dir.join(format!("scratch-{host}"));
                std::fs::write(&scratch, vec![host as u8; 1 << 20]).expect("writes");
                let file = std::fs::File::options().write(true).open(&scratch).expect("opens");
                file.sync_all().expect("fsync");
                file.set_len(0).expect("cuts");
                std::fs::remove_file(&scratch).expect("removes");
            }
        }
    });
    let standings = cluster.target().rules();
    cluster.target().clear_rules();
    let met: u64 = standings.iter().map(|standing| standing.fired).sum();
    let by_kind: Vec<(Kind, u64)> = kinds
        .iter()
        .map(|kind| {
            let of_kind = standings.iter().filter(|standing| standing.rule.select.kind == Some(*kind));
            (*kind, of_kind.map(|standing| standing.fired).sum())
        })
        .collect();
    eprintln!("{met} commands met a fault: {by_kind:?}");
    assert!(met > 10 && KINDS.iter().all(|kind| by_kind.iter().any(|(one, met)| one == kind && *met > 0)));
    for path in cluster.paths("log") {
        let text = std::fs::read_to_string(&path).expect("the log");
        for host in 0..2 {
            let mine: Vec<&str> = text.lines().filter(|line| line.starts_with(&format!("{host} "))).collect();
            let wanted: Vec<String> = (0..lines).map(|n| format!("{host} {n}")).collect();
            assert_eq!(mine, wanted);
        }
    }
    cluster.end();
}

/// What mounts on this target send; the other kinds are met in `device_iscsi`.
const KINDS: [Kind; 3] = [Kind::CompareAndWrite, Kind::Write, Kind::Read];

#[test]
fn lost_answers_cost_no_lease() {
    cluster("normal").into_iter().for_each(|cluster| work_among_faults(cluster, &KINDS));
}

/// Where each broken connection may have cost what no flush had covered.
#[test]
fn lost_answers_cost_no_lease_with_a_volatile_cache() {
    let mut kinds = KINDS.to_vec();
    kinds.push(Kind::Flush);
    cluster_with("normal", "", true).into_iter().for_each(|cluster| work_among_faults(cluster, &kinds));
}

/// Each new session looks whether its host is still registered, and that is met by faults as well.
#[test]
fn lost_answers_cost_no_lease_and_no_registration() {
    let mut kinds = KINDS.to_vec();
    kinds.extend([Kind::PrIn, Kind::PrOut, Kind::Inquiry, Kind::TestUnitReady, Kind::Capacity]);
    let cluster = cluster_with("normal", "fencing=required", false);
    cluster.into_iter().for_each(|cluster| work_among_faults(cluster, &kinds));
}

/// The target is away for less than the lease: operations wait and go on.
#[test]
fn a_target_that_is_back_within_the_lease() {
    let Some(mut cluster) = cluster("normal") else { return };
    let paths = cluster.paths("file");
    append(&paths[0], "before\n").expect("appends");
    assert_eq!(std::fs::read_to_string(&paths[1]).expect("reads"), "before\n");
    let portal = cluster.stop_target();
    let writer = std::thread::spawn({
        let path = paths[0].clone();
        move || append(&path, "meanwhile\n")
    });
    std::thread::sleep(Duration::from_millis(1500));
    cluster.start_target(portal);
    writer.join().expect("no panic").expect("it waited and went on");
    assert_eq!(std::fs::read_to_string(&paths[1]).expect("reads"), "before\nmeanwhile\n");
    append(&paths[1], "after\n").expect("appends");
    assert_eq!(std::fs::read_to_string(&paths[0]).expect("reads"), "before\nmeanwhile\nafter\n");
    cluster.end();
}

/// The target is away for longer: both hosts stop in time, and what was durable is there for who comes next.
#[test]
fn a_target_that_is_away_for_longer_than_the_lease() {
    let Some(mut cluster) = cluster("fast") else { return };
    let paths = cluster.paths("file");
    append(&paths[0], "durable\n").expect("appends");
    let portal = cluster.stop_target();
    let since = Instant::now();
    until("both mounts end", || paths.iter().all(|path| std::fs::read_to_string(path).is_err()));
    eprintln!("both ended after {:?}", since.elapsed());
    until("the daemons end", || cluster.hosts.iter().all(|host| !host.is_alive()));
    cluster.take_off(0);
    cluster.take_off(0);
    cluster.start_target(portal);
    cluster.mount_as("late", "rw");
    let path = cluster.dir(0).join("file");
    assert_eq!(std::fs::read_to_string(&path).expect("reads"), "durable\n");
    append(&path, "again\n").expect("appends");
    cluster.unmount(0);
}

/// The target loses power again and again, and with it what its cache held of files that nobody made durable. Both hosts write
/// it again and go on.
#[test]
fn a_target_that_forgets_costs_nothing() {
    if !can_mount() || !lunfs::device::iscsi::AVAILABLE {
        return;
    }
    let mut cluster = Cluster::with_profile("normal", Backing::Iscsi(512), 4, "1G");
    let lun = cluster.target().luns()[0];
    cluster.target().change_personality(lun, |p| p.volatile_cache = true).expect("a cache");
    cluster.mount();
    cluster.mount();
    let content = |host: usize, n: usize| vec![(host * 100 + n) as u8 + 1; 10_000 + n * 999];
    let stop = std::sync::atomic::AtomicBool::new(false);
    let lost = std::thread::scope(|scope| {
        let (target, stop) = (cluster.target(), &stop);
        // Also when a writer fails: the scope waits for everybody.
        let ended = StopAtEnd(stop);
        let power = scope.spawn(move || {
            let (mut seed, mut lost) = (0, 0);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(700));
                seed += 1;
                lost += target.lose_power(seed).expect("loses power").went_back;
            }
            lost
        });
        cluster.each(|host, dir| {
            for n in 0..60 {
                std::fs::write(dir.join(format!("{host}-{n}")), content(host, n)).expect("writes");
                // What it wrote a while ago, now on a device that may have forgotten it.
                let old = n / 2;
                let read = std::fs::read(dir.join(format!("{host}-{old}"))).expect("reads");
                assert!(read == content(host, old), "host {host} reads something else in its file {old}");
                std::thread::sleep(Duration::from_millis(60));
            }
        });
        drop(ended);
        power.join().expect("no panic")
    });
    eprintln!("{lost} logical blocks were forgotten");
    assert!(lost > 0);
    cluster.each(|host, dir| {
        for n in 0..60 {
            let other = 1 - host;
            let read = std::fs::read(dir.join(format!("{other}-{n}"))).expect("reads");
            assert!(read == content(other, n), "host {host} reads something else in file {n} of the other");
        }
    });
    cluster.end();
}
