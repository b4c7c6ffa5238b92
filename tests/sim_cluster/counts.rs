//! Exact counts: how many commands things cost. Counted at the LUN, so that nothing is left out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use lunfs::device::sim::{CommandCounts, SimLunOptions};
use lunfs::fs::api::Operations;
use lunfs::lease::IoClass;
use lunfs::rt;
use lunfs::rt::sim::Simulation;
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::InodeNo;

use super::model::LONG;

/// A volume of 1 GiB as mkfs plans it.
fn gibibyte() -> &'static Formatted {
    static VOLUME: std::sync::OnceLock<Formatted> = std::sync::OnceLock::new();
    VOLUME.get_or_init(|| {
        let lun = SimLunOptions { size_bytes: 1 << 30, ..SimLunOptions::default() };
        Formatted::new(lun, None)
    })
}

fn on_volume<T: Send + 'static>(hosts: u16, work: impl FnOnce(&Cluster) -> T + Send + 'static) -> T {
    let volume = gibibyte();
    Simulation::new(1).max_time(LONG).run(move || {
        let cluster = Cluster::start(volume, hosts);
        let value = work(&cluster);
        cluster.finish();
        value
    })
}

fn create(fs: &dyn Operations, dir: InodeNo, name: &str) -> InodeNo {
    let (attributes, opened) = fs.create(&cx(), dir, name.as_bytes(), 0o644, libc::O_RDWR).unwrap().value;
    fs.release(attributes.ino, opened.handle);
    attributes.ino
}

/// Commands for operations by one host, and swaps by all classes but beats.
fn spent(cluster: &Cluster, host: usize) -> (u64, u64) {
    let door = cluster.hosts[host].volume.door();
    let counts = door.operation_counts();
    (counts.commands(), counts.swaps + door.counts(IoClass::Demand).swaps)
}

/// What 10,000 creates in a directory of its own cost host 0, to the last block in place: on fresh space, and
/// in steady state, where files come and go. Commands and swaps of both; the latter's include the unlinks.
fn ten_thousand_creates(cluster: &Cluster, before: impl FnOnce(&Cluster)) -> [(u64, u64); 2] {
    let root = cluster.root();
    let dir = cluster.on(0, |fs| fs.mkdir(&cx(), root, b"private", 0o755).unwrap().value.ino);
    cluster.on(0, |fs| warm(fs, dir));
    before(cluster);
    let drain = || cluster.hosts[0].volume.store().drain().unwrap();
    let round = |fs: &dyn Operations| {
        for i in 0..100 {
            create(fs, dir, &format!("passing-{i}"));
        }
        for i in 0..100 {
            fs.unlink(&cx(), dir, format!("passing-{i}").as_bytes()).map(drop).unwrap();
        }
        fs.sync(&cx()).unwrap();
    };
    let steady = measured(cluster, || {
        cluster.on(0, |fs| (0..100).for_each(|_| round(fs)));
        cluster.on(0, |_| drain());
    });
    let fresh = measured(cluster, || {
        cluster.on(0, |fs| {
            for i in 0..10_000 {
                create(fs, dir, &format!("file-{i}"));
            }
            fs.sync(&cx()).unwrap();
            drain();
        });
    });
    [fresh, steady]
}

/// Commands and swaps that `work` costs host 0.
fn measured(cluster: &Cluster, work: impl FnOnce()) -> (u64, u64) {
    cluster.on(0, |_| cluster.hosts[0].volume.store().drain().unwrap());
    let (commands, swaps) = spent(cluster, 0);
    work();
    let (after, swaps_after) = spent(cluster, 0);
    (after - commands, swaps_after - swaps)
}

/// Makes a directory's first inode groups.
fn warm(fs: &dyn Operations, dir: InodeNo) {
    for i in 0..100 {
        create(fs, dir, &format!("warm{i}"));
    }
}

fn assert_cheap(what: &str, [fresh, steady]: [(u64, u64); 2]) {
    println!(
        "{what}: 10000 creates took {fresh:?} commands and swaps on fresh space, {steady:?} in steady state"
    );
    // Fresh space costs one swap for each cluster that is taken: 4 MiB, 500 inodes here.
    assert!(fresh.1 <= 10_000 / 400, "{what}: {fresh:?}");
    assert_eq!(steady.1, 0, "{what}: swaps in steady state");
    assert!(fresh.0 <= 5_000 && steady.0 <= 5_000, "{what}: {fresh:?} {steady:?}");
}

#[test]
fn creates_in_a_private_directory_swap_nothing() {
    assert_cheap("alone", on_volume(1, |cluster| ten_thousand_creates(cluster, |_| {})));
    assert_cheap("beside an idle host", on_volume(2, |cluster| ten_thousand_creates(cluster, |_| {})));
    let busy = on_volume(2, |cluster| {
        let over = Arc::new(AtomicBool::new(false));
        let root = cluster.root();
        let seen = over.clone();
        let mut other = None;
        let spent = ten_thousand_creates(cluster, |cluster| {
            let dir = cluster.on(1, |fs| fs.mkdir(&cx(), root, b"theirs", 0o755).unwrap().value.ino);
            cluster.on(1, |fs| warm(fs, dir));
            other = Some(cluster.spawn(1, "busy", move |fs| {
                let mut made = 0u64;
                while !seen.load(Relaxed) {
                    create(&*fs, dir, &format!("file-{made}"));
                    made += 1;
                    rt::sleep(Duration::from_micros(50));
                }
                made
            }));
        });
        over.store(true, Relaxed);
        let made = joined(other.unwrap());
        println!("meanwhile the other host made {made} files");
        assert!(made > 50, "the other host was to be busy; it made {made} files");
        spent
    });
    assert_cheap("beside a busy host", busy);
}

fn per_second(counts: CommandCounts, seconds: u64) -> f64 {
    counts.total() as f64 / seconds as f64
}

#[test]
fn an_idle_host_is_quiet() {
    for hosts in [1, 2, 4] {
        let rates = on_volume(hosts, |cluster| {
            let root = cluster.root();
            for host in 0..cluster.hosts.len() {
                let name = format!("dir{host}");
                cluster.on(host, |fs| fs.mkdir(&cx(), root, name.as_bytes(), 0o755).map(drop)).unwrap();
            }
            rt::sleep(Duration::from_secs(20));
            let before: Vec<_> = cluster.hosts.iter().map(|h| cluster.lun.counts(h.tag)).collect();
            rt::sleep(Duration::from_secs(300));
            let after = cluster.hosts.iter().map(|h| cluster.lun.counts(h.tag));
            after.zip(before).map(|(a, b)| per_second(a.since(&b), 300)).collect::<Vec<_>>()
        });
        println!("{hosts} idle hosts: {rates:.1?} commands per second");
        assert!(rates.iter().all(|r| *r <= 15.0), "{hosts} idle hosts: {rates:?} commands per second");
    }
}

#[test]
fn what_is_held_is_read_for_nothing() {
    let spent_by = on_volume(2, |cluster| {
        let root = cluster.root();
        let ino = cluster.on(0, |fs| create(fs, root, "small"));
        cluster.on(0, |fs| fs.write(&cx(), ino, None, 0, b"in the inode", false).map(drop)).unwrap();
        // Both share it from here on.
        let mut results = Vec::new();
        for host in 0..2 {
            cluster.on(host, |fs| fs.lookup(&cx(), root, b"small").map(drop)).unwrap();
        }
        for host in 0..2 {
            let before = spent(cluster, host);
            cluster.on(host, |fs| {
                for _ in 0..500 {
                    fs.getattr(&cx(), ino).map(drop).unwrap();
                    fs.lookup(&cx(), root, b"small").map(drop).unwrap();
                    fs.read(&cx(), ino, None, 0, 100).map(drop).unwrap();
                    fs.readdir(&cx(), root, 0, 4096, true).map(drop).unwrap();
                }
            });
            let after = spent(cluster, host);
            results.push((after.0 - before.0, after.1 - before.1));
        }
        results
    });
    assert_eq!(spent_by, [(0, 0), (0, 0)], "commands and swaps of 2000 reads of what is held");
}

#[test]
fn a_contended_lock_moves_with_few_swaps() {
    const ROUNDS: u64 = 200;
    let (swaps, given, waits, took) = on_volume(2, |cluster| {
        let root = cluster.root();
        let ino = cluster.on(0, |fs| create(fs, root, "contended"));
        let turn = |host: usize, value: u64| {
            let worker = cluster.spawn(host, "writer", move |fs| {
                fs.write(&cx(), ino, None, 0, &value.to_le_bytes(), false).map(drop).unwrap();
            });
            joined(worker);
        };
        (0..10).for_each(|i| turn(i as usize % 2, i));
        let total = |cluster: &Cluster| {
            let of = |host: usize| {
                let volume = &cluster.hosts[host].volume;
                let stats = &volume.locks().stats;
                let swaps = spent(cluster, host).1;
                (swaps, stats.given.load(Relaxed), stats.waits.load(Relaxed))
            };
            let (a, b) = (of(0), of(1));
            (a.0 + b.0, a.1 + b.1, a.2 + b.2)
        };
        let (before, begun) = (total(cluster), rt::sim::now().unwrap());
        (0..ROUNDS).for_each(|i| turn(i as usize % 2, i));
        let (after, ended) = (total(cluster), rt::sim::now().unwrap());
        (after.0 - before.0, after.1 - before.1, after.2 - before.2, ended - begun)
    });
    println!("{ROUNDS} alternating writes: {given} hand-overs, {swaps} swaps, {waits} waits, {took:?}");
    assert!(given >= ROUNDS, "{given} hand-overs in {ROUNDS} alternating writes");
    assert!(swaps <= 3 * given, "{swaps} swaps for {given} hand-overs");
}

#[test]
fn a_directory_changed_in_turns_moves_once_a_turn() {
    // As open(2) with O_CREAT does it through the kernel, whose names and attributes were taken away.
    const ROUNDS: u64 = 100;
    let (swaps, given) = on_volume(2, |cluster| {
        let root = cluster.root();
        let dir = cluster.on(0, |fs| fs.mkdir(&cx(), root, b"d", 0o755).unwrap().value.ino);
        let turns = |from: u64, to: u64| {
            for round in from..to {
                let worker = cluster.spawn((round % 2) as usize, "worker", move |fs| {
                    let name = format!("n{round}");
                    fs.lookup(&cx(), root, b"d").map(drop).unwrap();
                    fs.getattr(&cx(), dir).map(drop).unwrap();
                    assert!(fs.lookup(&cx(), dir, name.as_bytes()).is_err());
                    create(&*fs, dir, &name);
                });
                joined(worker);
            }
        };
        let total = || {
            let given = |host: usize| cluster.hosts[host].volume.locks().stats.given.load(Relaxed);
            (spent(cluster, 0).1 + spent(cluster, 1).1, given(0) + given(1))
        };
        turns(0, 8);
        let before = total();
        turns(8, 8 + ROUNDS);
        let after = total();
        (after.0 - before.0, after.1 - before.1)
    });
    println!("{ROUNDS} creates in turns: {given} hand-overs, {swaps} swaps");
    assert!(given <= ROUNDS + ROUNDS / 10, "{given} hand-overs in {ROUNDS} turns");
    assert!(swaps <= 3 * given, "{swaps} swaps for {given} hand-overs");
}

#[test]
fn freed_space_is_used_again_before_more_is_taken() {
    let (first, second) = on_volume(1, |cluster| {
        let root = cluster.root();
        let data = vec![1; 1 << 20];
        let write = |name: &str| {
            measured(cluster, || {
                cluster.on(0, |fs| {
                    let ino = create(fs, root, name);
                    for i in 0..64 {
                        fs.write(&cx(), ino, None, i << 20, &data, false).map(drop).unwrap();
                    }
                });
            })
        };
        let first = write("first");
        cluster.on(0, |fs| fs.unlink(&cx(), root, b"first").map(drop)).unwrap();
        // A large file is freed in the background.
        rt::sleep(Duration::from_secs(20));
        (first, write("second"))
    });
    println!("64 MiB took {first:?} commands and swaps, and {second:?} where a file of that size had been");
    assert!(second.1 == 0 && first.1 > 0, "swaps for space that was held: {second:?} after {first:?}");
}
