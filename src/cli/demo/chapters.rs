//! What the demo shows. Every claim is checked by what the two hosts really answer.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::story::{Story, duration, grouped};
use crate::cli::scene::Host;
use crate::cli::stats_socket::DaemonStats;
use crate::inspect::table::bytes;

const TURNS: u32 = 20;
const FILES: u32 = 100;
const DISK_BYTES: usize = 16 << 20;
const TOGETHER: u32 = 200;
const HAND_OVERS: u32 = 100;
const CREATES: u32 = 1000;
/// Rounds of looks, of which one must cost nothing.
const LOOKS: u32 = 4;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn names(directory: &Path) -> Result<BTreeSet<String>, String> {
    let entries = fs::read_dir(directory).map_err(text)?;
    entries.map(|e| Ok(e.map_err(text)?.file_name().to_string_lossy().into_owned())).collect()
}

fn numbered(numbers: impl Iterator<Item = u32>) -> BTreeSet<String> {
    numbers.map(|n| format!("file-{n:03}")).collect()
}

fn expect<T: PartialEq>(found: T, expected: T, otherwise: impl FnOnce(T, T) -> String) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(otherwise(found, expected)) }
}

fn expect_names(found: &BTreeSet<String>, expected: &BTreeSet<String>) -> Result<(), String> {
    let missing: Vec<_> = expected.difference(found).take(3).collect();
    let extra: Vec<_> = found.difference(expected).take(3).collect();
    if missing.is_empty() && extra.is_empty() {
        return Ok(());
    }
    Err(format!("{} of {} names; missing {missing:?}, too many {extra:?}", found.len(), expected.len()))
}

/// What one host does is there for the other as soon as the call has returned.
pub fn one_filesystem(story: &mut Story, alpha: &Host, beta: &Host) {
    story.chapter("One filesystem: what a host has done, the other sees at once");
    story.check("alpha writes guest.conf; beta reads the same bytes", || {
        let said = b"memory=4096\ncpus=2\n";
        fs::write(alpha.path("guest.conf"), said).map_err(text)?;
        let begun = Instant::now();
        let found = fs::read(beta.path("guest.conf")).map_err(text)?;
        let took = begun.elapsed();
        expect(found, said.to_vec(), |f, _| format!("beta read {:?}", String::from_utf8_lossy(&f)))?;
        Ok(format!("first read {}", duration(took)))
    });
    story.check("beta has it cached; alpha changes it; beta reads the new bytes", || {
        let path = beta.path("guest.conf");
        for _ in 0..3 {
            fs::read(&path).map_err(text)?;
        }
        let file = OpenOptions::new().write(true).open(alpha.path("guest.conf")).map_err(text)?;
        file.write_all_at(b"memory=8192", 0).map_err(text)?;
        let found = fs::read_to_string(&path).map_err(text)?;
        expect(found, "memory=8192\ncpus=2\n".to_owned(), |f, _| format!("beta read {f:?}"))?;
        Ok(String::new())
    });
    story.check("beta renames it to web.conf; alpha finds only the new name", || {
        fs::rename(beta.path("guest.conf"), beta.path("web.conf")).map_err(text)?;
        let (old, new) = (alpha.path("guest.conf").exists(), alpha.path("web.conf").exists());
        expect((old, new), (false, true), |f, _| format!("old name there: {}, new name: {}", f.0, f.1))?;
        Ok(String::new())
    });
    story.check(&format!("both append to one log in turn, {TURNS} lines each; none is lost"), || {
        let log = |host: &Host| {
            OpenOptions::new().append(true).create(true).open(host.path("both.log")).map_err(text)
        };
        let (mut a, mut b) = (log(alpha)?, log(beta)?);
        let begun = Instant::now();
        let mut expected = String::new();
        for turn in 0..TURNS {
            for (file, name) in [(&mut a, "alpha"), (&mut b, "beta")] {
                let line = format!("{turn} {name}\n");
                file.write_all(line.as_bytes()).map_err(text)?;
                expected.push_str(&line);
            }
        }
        let turn = begun.elapsed() / (2 * TURNS);
        for host in [alpha, beta] {
            let found = fs::read_to_string(host.path("both.log")).map_err(text)?;
            expect(found, expected.clone(), |f, _| {
                format!("{} sees {} of {} lines", host.name, f.lines().count(), 2 * TURNS)
            })?;
        }
        Ok(format!("{} a turn", duration(turn)))
    });
    story.check(&format!("alpha makes {FILES} files; beta lists exactly these"), || {
        fs::create_dir(alpha.path("files")).map_err(text)?;
        for name in numbered(0..FILES) {
            File::create_new(alpha.path("files").join(name)).map_err(text)?;
        }
        expect_names(&names(&beta.path("files"))?, &numbered(0..FILES))?;
        Ok(String::new())
    });
    story.check("beta deletes every second one; alpha lists the other half", || {
        for name in numbered((0..FILES).step_by(2)) {
            fs::remove_file(beta.path("files").join(name)).map_err(text)?;
        }
        expect_names(&names(&alpha.path("files"))?, &numbered((1..FILES).step_by(2)))?;
        Ok(String::new())
    });
    story.check(&format!("alpha writes a disk of {}; beta reads it", bytes(DISK_BYTES as u64)), || {
        let disk: Vec<u8> =
            (0..DISK_BYTES as u32).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).collect();
        let begun = Instant::now();
        fs::write(alpha.path("web.img"), &disk).map_err(text)?;
        let written = begun.elapsed();
        let begun = Instant::now();
        let found = fs::read(beta.path("web.img")).map_err(text)?;
        let read = begun.elapsed();
        let same = found.iter().zip(&disk).take_while(|(a, b)| a == b).count();
        expect((found.len(), same), (DISK_BYTES, DISK_BYTES), |f, _| {
            format!("beta read {} bytes, the first difference is at {}", f.0, f.1)
        })?;
        let rate = |took: Duration| DISK_BYTES as f64 / 1e6 / took.as_secs_f64();
        Ok(format!("{:.0} and {:.0} MB/s", rate(written), rate(read)))
    });
    story.check(&format!("both create in one directory at the same time, {TOGETHER} each"), || {
        fs::create_dir(beta.path("shared")).map_err(text)?;
        let begun = Instant::now();
        let create = |host: &Host| -> Result<(), String> {
            (0..TOGETHER).try_for_each(|n| {
                File::create_new(host.path("shared").join(format!("{}-{n}", host.name)))
                    .map(drop)
                    .map_err(text)
            })
        };
        std::thread::scope(|scope| {
            let other = scope.spawn(|| create(beta));
            create(alpha)?;
            other.join().map_err(|_| "a thread panicked".to_owned())?
        })?;
        let took = begun.elapsed();
        let of = |host: &Host| (0..TOGETHER).map(|n| format!("{}-{n}", host.name)).collect::<BTreeSet<_>>();
        let expected: BTreeSet<_> = of(alpha).union(&of(beta)).cloned().collect();
        for host in [alpha, beta] {
            expect_names(&names(&host.path("shared"))?, &expected)?;
        }
        Ok(format!("{} files in {}", grouped(expected.len() as u64), duration(took)))
    });
}

fn both(alpha: &Host, beta: &Host) -> Result<[DaemonStats; 2], String> {
    Ok([alpha.stats()?, beta.stats()?])
}

/// Compare-and-writes for locks and doorbells, and locks given, of both hosts.
fn moves(stats: &[DaemonStats; 2]) -> (u64, u64) {
    stats.iter().fold((0, 0), |(swaps, given), s| {
        let c = &s.volume.commands;
        (swaps + c.lock.swaps + c.demand.swaps, given + s.volume.locks.given)
    })
}

/// A lock moves from host to host, and what that costs.
pub fn a_lock_moves(story: &mut Story, alpha: &Host, beta: &Host) {
    story.chapter("A lock moves: both write one file in strict turns, by compare-and-write on the disk");
    story.check(
        &format!("{HAND_OVERS} turns, {HAND_OVERS} hand-overs, the last write is what both read"),
        || {
            let open = |host: &Host| {
                OpenOptions::new()
                    .read(true)
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .open(host.path("turns"))
            };
            let files = [open(alpha).map_err(text)?, open(beta).map_err(text)?];
            for file in &files {
                file.write_all_at(&[0], 0).map_err(text)?;
            }
            let before = moves(&both(alpha, beta)?);
            let mut times = Vec::new();
            for turn in 0..HAND_OVERS {
                let [a, b] = &files;
                let file = if turn % 2 == 0 { a } else { b };
                let begun = Instant::now();
                file.write_all_at(&turn.to_le_bytes(), 0).map_err(text)?;
                times.push(begun.elapsed());
            }
            let after = moves(&both(alpha, beta)?);
            for (host, file) in [alpha, beta].iter().zip(&files) {
                let mut last = [0; 4];
                file.read_exact_at(&mut last, 0).map_err(text)?;
                expect(u32::from_le_bytes(last), HAND_OVERS - 1, |f, e| {
                    format!("{} reads turn {f}, not {e}", host.name)
                })?;
            }
            times.sort_unstable();
            let (swaps, given) = (after.0 - before.0, after.1 - before.1);
            let median = times.get(times.len() / 2).copied().unwrap_or_default();
            if given < u64::from(HAND_OVERS) {
                return Err(format!("{given} hand-overs were counted"));
            }
            let each = swaps as f64 / given as f64;
            if each > 3.0 {
                return Err(format!("{each:.1} compare-and-writes for each hand-over; at most 3 are needed"));
            }
            Ok(format!("{} each, {each:.1} compare-and-writes", duration(median)))
        },
    );
}

/// Who works alone pays nothing for sharing.
pub fn alone(story: &mut Story, alpha: &Host) {
    story.chapter("A host that works in a directory of its own needs no lock traffic at all");
    let directory = alpha.path("own");
    let path = |n: u32| directory.join(format!("{n}"));
    let files = grouped(CREATES.into());
    story.check(&format!("alpha creates {files} files: no compare-and-write"), || {
        fs::create_dir(&directory).map_err(text)?;
        File::create_new(directory.join("first")).map_err(text)?;
        let before = alpha.stats()?;
        let begun = Instant::now();
        for n in 0..CREATES {
            File::create_new(path(n)).map_err(text)?;
        }
        let took = begun.elapsed();
        File::open(&directory).and_then(|d| d.sync_all()).map_err(text)?;
        let spent = alpha.stats()?.volume.commands.since(&before.volume.commands).operations();
        expect(spent.swaps, 0, |f, _| format!("{f} compare-and-writes"))?;
        let each = spent.commands() as f64 / f64::from(CREATES);
        let rate = f64::from(CREATES) / took.as_secs_f64();
        Ok(format!("{} a second, {each:.2} commands each", grouped(rate as u64)))
    });
    story.check(&format!("alpha looks at these {files} files again: no command to the disk"), || {
        // What was done before goes to its place in the background, now and then; looks cause nothing of that.
        let mut spent = 0;
        for _ in 0..LOOKS {
            let before = alpha.stats()?;
            let begun = Instant::now();
            for n in 0..CREATES {
                fs::metadata(path(n)).map_err(text)?;
            }
            let took = begun.elapsed();
            spent = alpha.stats()?.volume.commands.since(&before.volume.commands).operations().commands();
            if spent == 0 {
                return Ok(format!("{} each", duration(took / CREATES)));
            }
        }
        Err(format!("{spent} commands, and some in each of {LOOKS} rounds"))
    });
}

/// The counters of both hosts since they mounted.
pub fn counters(story: &mut Story, alpha: &Host, beta: &Host) {
    story.chapter("What the two hosts asked of the disk in all");
    let [a, b] = match both(alpha, beta) {
        Ok(both) => both,
        Err(e) => return story.check("the daemons tell their counters", || Err(e)),
    };
    let row = |name: &str, of: &dyn Fn(&DaemonStats) -> String| {
        story.say(&format!("  {name:<46}{:>12}{:>12}", of(&a), of(&b)));
    };
    let total = |s: &DaemonStats| {
        let c = &s.volume.commands;
        c.operations().plus(&c.idle()).plus(&c.setup)
    };
    row("", &|s| s.host.clone());
    row("compare-and-writes: locks and doorbells", &|s| {
        grouped(s.volume.commands.lock.swaps + s.volume.commands.demand.swaps)
    });
    row("compare-and-writes: heartbeats", &|s| grouped(s.volume.commands.beat.swaps));
    row("reads", &|s| grouped(total(s).reads));
    row("writes", &|s| grouped(total(s).writes));
    row("locks held", &|s| grouped(s.volume.locks.held_exclusive + s.volume.locks.held_shared));
    row("waits for the other host", &|s| grouped(s.volume.locks.waits));
    row("  on average", &|s| {
        duration(Duration::from_nanos(s.volume.locks.wait_ns / s.volume.locks.waits.max(1)))
    });
}
