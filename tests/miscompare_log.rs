//! What the log says of compare-and-writes that did not simply succeed. A process has one logger, so this is a
//! program of its own with one test.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use lunfs::device::sim::{CommandKind, Fault, FaultRule};
use lunfs::layout::geometry::lock_of_inode;
use lunfs::rt;
use lunfs::rt::sim::Simulation;
use lunfs::testing::cluster::{Cluster, Formatted, cx, joined};
use lunfs::types::{BLOCK_BYTES_U64, BlockNo, Slot};

struct Lines(Mutex<Vec<(Level, String)>>);

static LINES: Lines = Lines(Mutex::new(Vec::new()));

impl Log for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "lunfs::ats" || metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            println!("{} {}", record.level(), record.args());
            if record.target() == "lunfs::heartbeat" && record.args().to_string().contains("a beat took") {
                return;
            }
            let line = (record.level(), record.args().to_string());
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        }
    }

    fn flush(&self) {}
}

/// The lines since the last call.
fn lines() -> Vec<(Level, String)> {
    std::mem::take(&mut LINES.0.lock().unwrap_or_else(PoisonError::into_inner))
}

const MS: Duration = Duration::from_millis(1);

fn plan(cluster: &Cluster, host: usize, at: BlockNo, fault: Fault, count: u32) {
    let bytes = Some(at.offset_bytes()..at.offset_bytes() + BLOCK_BYTES_U64);
    let rule = FaultRule::next_of(fault, cluster.hosts[host].tag, CommandKind::CompareAndWrite);
    cluster.lun.inject(FaultRule { bytes, count, ..rule });
}

#[track_caller]
fn only_line(level: Level, parts: &[&str]) {
    only_line_of(lines(), level, parts);
}

#[track_caller]
fn only_line_of(lines: Vec<(Level, String)>, level: Level, parts: &[&str]) {
    let [(found, line)] = &lines[..] else { panic!("not one line but {lines:#?}") };
    assert_eq!(*found, level, "{line}");
    let mut rest = line.as_str();
    for part in parts {
        let at = rest.find(part).unwrap_or_else(|| panic!("no {part:?} in its place: {line}"));
        rest = &rest[at + part.len()..];
    }
}

#[test]
fn one_line_an_event_with_both_images_and_no_flood() {
    log::set_logger(&LINES).expect("the only logger");
    log::set_max_level(LevelFilter::Debug);
    let formatted = Formatted::tiny(4);
    Simulation::new(1).run(move || {
        let cluster = Cluster::start(&formatted, 3);
        let (a, b) = (cluster.directory(0, b"a"), cluster.directory(0, b"b"));
        let c = cluster.directory(0, b"c");
        let at = lock_of_inode(a);
        rt::sleep(1000 * MS);
        lines();

        // A hand-over that was repeated below the host and has already been built upon.
        plan(&cluster, 0, at, Fault::RetriedBelow(400 * MS), 1);
        cluster.on(1, |fs| fs.mknod(&cx(), a, b"f", 0o644, 0).map(drop)).unwrap();
        cluster.on(2, |fs| fs.mknod(&cx(), a, b"g", 0o644, 0).map(drop)).unwrap();
        rt::sleep(1000 * MS);
        let place = format!("compare-and-write of the inode lock at block {at} (byte {})", at.offset_bytes());
        only_line(
            Level::Warn,
            &[
                "false miscompare: our own write had landed: ",
                &place,
                ", held by host \"host2\" (slot ",
                "; took 40",
                " (usually ",
                "; expected: kind=inode mode=exclusive *owner=slot:",
                "; found: kind=inode mode=exclusive *owner=slot:",
            ],
        );

        plan(&cluster, 0, lock_of_inode(b), Fault::FalseMiscompare, 1);
        cluster.on(1, |fs| fs.mknod(&cx(), b, b"f", 0o644, 0).map(drop)).unwrap();
        let same = "false miscompare: the block is what it was compared with: ";
        only_line(
            Level::Warn,
            &[same, ", held by host \"host0\" (slot ", "; expected: ", "; found: the same"],
        );

        plan(&cluster, 0, lock_of_inode(c), Fault::NeverExecuted, 1);
        cluster.on(1, |fs| fs.mknod(&cx(), c, b"f", 0o644, 0).map(drop)).unwrap();
        let unanswered = "; 1 without an answer, known after 2.0 s; ";
        only_line(Level::Warn, &["no answer, and the write did not land: ", unanswered]);

        // Ordinary: nothing that an administrator has to see. A bell that somebody else rings in between; whether that
        // is so, depends on when the holder looks at it.
        let bell = cluster.superblock.geometry.doorbell(cluster.hosts[1].volume.heartbeat().me().slot);
        let mut met = Vec::new();
        for n in 0..20 {
            let name = move |host: u8| format!("{host}-{n}").into_bytes();
            for dir in [b, c] {
                cluster.on(1, |fs| fs.mknod(&cx(), dir, &name(1), 0o644, 0).map(drop)).unwrap();
            }
            rt::sleep(300 * MS);
            lines();
            plan(&cluster, 0, bell, Fault::Late(40 * MS), 1);
            let late = cluster.spawn(0, "late", move |fs| fs.mknod(&cx(), b, &name(0), 0o644, 0).map(drop));
            cluster.on(2, |fs| fs.mknod(&cx(), c, &name(2), 0o644, 0).map(drop)).unwrap();
            joined(late).unwrap();
            cluster.lun.clear_faults();
            met = lines();
            if !met.is_empty() {
                break;
            }
        }
        let doorbell = format!("another host was faster: compare-and-write of the doorbell at block {bell} ");
        only_line_of(
            met,
            Level::Debug,
            &[&doorbell, "; took 4", "; expected: ", " *swap_counter=", "; found: ", " *swap_counter="],
        );

        // A device that does it all the time.
        let slot = cluster.hosts[0].volume.heartbeat().record().address;
        plan(&cluster, 0, slot, Fault::LostAnswer, 1);
        rt::sleep(4000 * MS);
        only_line(
            Level::Warn,
            &["no answer, but the write had landed: ", "heartbeat slot at block ", "of host \"host0\""],
        );
        plan(&cluster, 0, slot, Fault::AnsweredFalse, 30);
        rt::sleep(45_000 * MS);
        assert_eq!(cluster.hosts[0].volume.stats().swaps.causes.heartbeat.own_write_landed, 30);
        // The hand-over above has spent one of the five a minute.
        let in_the_minute = lines().len();
        assert!((4..=5).contains(&in_the_minute), "{in_the_minute}");
        rt::sleep(60_000 * MS);
        plan(&cluster, 0, slot, Fault::AnsweredFalse, 1);
        rt::sleep(2000 * MS);
        only_line(
            Level::Warn,
            &["false miscompare: our own write had landed: ", "more like this were not logged"],
        );

        // Bad bytes that are looked at again and again: no more than that from anybody.
        let bell = cluster.superblock.geometry.doorbell(cluster.hosts[0].volume.heartbeat().me().slot);
        let free = cluster.superblock.geometry.slot(Slot(3));
        for at in [bell, free] {
            cluster.lun.overwrite(at.offset_bytes() + 200, b"?");
        }
        rt::sleep(20_000 * MS);
        let lines = lines();
        assert!((5..=15).contains(&lines.len()), "{} lines: {lines:#?}", lines.len());
        let damage =
            format!("damaged block: doorbell at block {bell} (byte {}); found: ", bell.offset_bytes());
        assert!(lines.iter().any(|(level, line)| *level == Level::Error && line.starts_with(&damage)));
        assert!(lines.iter().all(|(_, line)| line.starts_with("damaged block: ")), "{lines:#?}");
    });
}
