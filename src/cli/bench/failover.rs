//! What the death of a host costs the others, and the host itself when it comes back: time from `kill -9` to the first
//! operation that succeeds on what the dead one held, what survivors notice meanwhile who need nothing of it, and the
//! replay of a journal that is as full as it gets.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::report::Report;
use crate::cli::demo::grouped;
use crate::cli::scene::{Host, Scene};
use crate::durations::Profile;

/// Seconds from the death to the first operation on what the dead host held.
const MOST_TAKE_OVER_S: [(Profile, f64); 2] = [(Profile::Normal, 20.0), (Profile::Fast, 6.0)];
/// The same for the host itself, mounted again at once.
const MOST_COME_BACK_S: f64 = 2.0;
/// The slowest operation of a survivor in a directory of its own meanwhile.
const MOST_OWN_S: f64 = 1.0;
const MOST_REPLAY_S: f64 = 1.0;

/// A journal counts as full from here on; the last hundredths are a matter of how transactions fit.
const FULL: f64 = 0.9;
/// More than fit into a journal, each under a lock of its own.
const FILES: usize = 17_000;
const FILES_EACH_DIRECTORY: usize = 1000;
const THREADS: usize = 3;
/// How often it is tried to let the host die with a full journal, and how long a try may take.
const TRIES: usize = 12;
const TRY_TIME: Duration = Duration::from_secs(20);

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Small files, durable.
fn work(directory: &Path, tag: &str, files: usize) -> Result<(), String> {
    for n in 0..files {
        fs::write(directory.join(format!("{tag}-{n}")), [b'x'; 4096]).map_err(text)?;
    }
    File::open(directory).and_then(|d| d.sync_all()).map_err(text)
}

/// Runs `until` while a survivor works in its own directory; the seconds of its slowest operation, and their number.
fn meanwhile<T>(own: &Path, until: impl FnOnce() -> Result<T, String>) -> Result<(T, Duration, u64), String> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let working = scope.spawn(|| {
            let (mut slowest, mut n) = (Duration::ZERO, 0u64);
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                fs::write(own.join(format!("{}", n % 500)), b"still at work").map_err(text)?;
                slowest = slowest.max(begun.elapsed());
                n += 1;
                std::thread::sleep(Duration::from_millis(2));
            }
            Ok::<_, String>((slowest, n))
        });
        let outcome = until();
        stop.store(true, Ordering::Relaxed);
        let (slowest, n) = working.join().map_err(|_| "the survivor's thread failed".to_owned())??;
        Ok((outcome?, slowest, n))
    })
}

/// All of it, on volumes of its own.
pub fn run(scene: &Scene, report: &mut Report, quick: bool, say: &dyn Fn(&str)) -> Result<(), String> {
    let rounds = if quick { 1 } else { 3 };
    for (profile, most) in MOST_TAKE_OVER_S {
        scene.renew(profile)?;
        let (alpha, beta) = (scene.mount("alpha")?, scene.mount("beta")?);
        let alpha = deaths(scene, report, (profile, most), alpha, &beta, rounds, say)?;
        if profile == Profile::Fast {
            say("a full journal");
            full_journal(scene, report, alpha)?;
        } else {
            scene.unmount(&alpha.root)?;
        }
        scene.unmount(&beta.root)?;
    }
    Ok(())
}

/// Alpha dies and is recovered by beta, and dies and comes back at once, some times each. Returns its last life.
fn deaths(
    scene: &Scene,
    report: &mut Report,
    (profile, most): (Profile, f64),
    mut alpha: Host,
    beta: &Host,
    rounds: usize,
    say: &dyn Fn(&str),
) -> Result<Host, String> {
    let (theirs, own) = ("theirs", beta.path("own"));
    fs::create_dir(alpha.path(theirs)).map_err(text)?;
    fs::create_dir(&own).map_err(text)?;
    let (mut taken, mut back): (Vec<Duration>, Vec<Duration>) = (Vec::new(), Vec::new());
    let (mut slowest, mut operations) = (Duration::ZERO, 0u64);
    for round in 0..rounds {
        say(&format!("profile {profile}: death {} of {rounds}", round + 1));
        work(&alpha.path(theirs), &format!("taken{round}"), 50)?;
        // The way is shared: else the survivor would need what the dead one held.
        work(&own, "first", 1)?;
        let died = scene.kill(&alpha)?;
        let ((), slow, n) = meanwhile(&own, || {
            fs::write(beta.path(theirs).join(format!("beta{round}")), b"x").map_err(text)?;
            taken.push(died.elapsed());
            Ok(())
        })?;
        (slowest, operations) = (slowest.max(slow), operations + n);
        for n in 0..50 {
            let name = format!("taken{round}-{n}");
            let bytes = fs::read(beta.path(theirs).join(&name)).map_err(|e| format!("{name}: {e}"))?;
            if bytes != [b'x'; 4096] {
                return Err(format!("{name} was durable and has other bytes"));
            }
        }
        scene.unmount(&alpha.root)?;
        alpha = scene.mount("alpha")?;
        work(&alpha.path(theirs), &format!("back{round}"), 50)?;
        let died = scene.kill(&alpha)?;
        scene.unmount(&alpha.root)?;
        alpha = scene.mount("alpha")?;
        fs::write(alpha.path(theirs).join(format!("again{round}")), b"x").map_err(text)?;
        back.push(died.elapsed());
    }
    let worst = |times: &[Duration]| times.iter().max().map_or(0.0, Duration::as_secs_f64);
    let group = "A host dies by kill -9 with 50 durable files in a directory that it holds; the slowest of all deaths";
    let of = format!("profile {profile}, {rounds} deaths");
    let name = format!("{profile}: another host's first operation there");
    report.figure(group, &name, worst(&taken), "s", format!("{of}; a new file in that directory"));
    report.bar(name, worst(&taken), most, "s");
    let name = format!("{profile}: the host's own first operation, mounted again");
    report.figure(group, &name, worst(&back), "s", of);
    report.bar(name, worst(&back), MOST_COME_BACK_S, "s");
    let name = format!("{profile}: slowest operation meanwhile in another directory");
    let of = format!("{} small files by the survivor until it had taken over", grouped(operations));
    report.figure(group, &name, slowest.as_secs_f64(), "s", of);
    report.bar(name, slowest.as_secs_f64(), MOST_OWN_S, "s");
    Ok(alpha)
}

/// What the log says of a replay.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Replay {
    used: f64,
    blocks: u64,
    ms: f64,
}

impl Replay {
    /// From the line that `Replayed` writes.
    fn parse(log: &str) -> Option<Replay> {
        let line = log.lines().rev().find(|line| line.contains("recovered it: "))?;
        let words: Vec<&str> = line.split([' ', '(', ')', ',']).filter(|word| !word.is_empty()).collect();
        let before = |what: &[&str]| {
            let at = words.windows(what.len()).position(|w| w == what)?;
            words.get(at.checked_sub(1)?)?.parse::<f64>().ok()
        };
        let capacity = before(&["journal", "blocks"])?;
        let at = words.windows(2).position(|w| w == ["journal", "blocks"])?;
        let used: f64 = words.get(at.checked_sub(3)?)?.parse().ok()?;
        Some(Replay {
            used: used / capacity,
            blocks: before(&["blocks", "in", "place"])? as u64,
            ms: before(&["ms"])?,
        })
    }
}

/// Alpha changes inodes until its journal is full, dies, and comes back.
fn full_journal(scene: &Scene, report: &mut Report, mut alpha: Host) -> Result<(), String> {
    let paths: Vec<PathBuf> = (0..FILES)
        .map(|n| format!("full{}/{}", n / FILES_EACH_DIRECTORY, n % FILES_EACH_DIRECTORY))
        .map(|name| alpha.path(&name))
        .collect();
    for (n, path) in paths.iter().enumerate() {
        if n % FILES_EACH_DIRECTORY == 0 {
            let directory = path.parent().ok_or("a path without a directory")?;
            fs::create_dir(directory).map_err(text)?;
        }
        File::create(path).map_err(text)?;
    }
    File::open(&alpha.root).and_then(|d| d.sync_all()).map_err(text)?;
    let mut fullest: Option<Replay> = None;
    for _ in 0..TRIES {
        change_until_full(scene, &alpha, &paths)?;
        scene.unmount(&alpha.root)?;
        alpha = scene.mount("alpha")?;
        let replay = Replay::parse(&alpha.log()?).ok_or("the log does not say what was replayed")?;
        if fullest.is_none_or(|best| replay.used > best.used) {
            fullest = Some(replay);
        }
        if replay.used >= FULL {
            break;
        }
    }
    let best = fullest.ok_or("nothing was replayed")?;
    scene.unmount(&alpha.root)?;
    let group = "Replay of a full journal of 64 MiB, every image under a lock of its own";
    let full = best.used * 100.0;
    report.figure(group, "journal in use at the death", full, "%", "the fullest of up to 12 deaths");
    report.figure(group, "blocks brought into place", best.blocks as f64, "", "");
    report.figure(group, "replay", best.ms / 1e3, "s", "reading, a swap for each lock, writing, flushing");
    if best.used < FULL {
        report
            .skipped
            .push(format!("replay of a full journal: it never was more than {full:.0} % full here"));
    }
    report.bar("replay of a full journal", best.ms / 1e3, MOST_REPLAY_S, "s");
    Ok(())
}

/// Threads change one inode after the other until the journal has no room; then the host dies.
fn change_until_full(scene: &Scene, alpha: &Host, paths: &[PathBuf]) -> Result<(), String> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for part in paths.chunks(paths.len().div_ceil(THREADS)) {
            let stop = &stop;
            scope.spawn(move || {
                for mode in (0o400..0o700).cycle() {
                    for path in part {
                        // The end of the host ends this, too.
                        if stop.load(Ordering::Relaxed)
                            || fs::set_permissions(path, Permissions::from_mode(mode)).is_err()
                        {
                            return;
                        }
                    }
                }
            });
        }
        let begun = Instant::now();
        let mut used = 0.0;
        // While a commit or checkpoint is under way nobody knows; a journal that was nearly full is full then.
        while begun.elapsed() < TRY_TIME {
            match alpha.stats()?.volume.journal {
                Some(journal) => used = 1.0 - journal.free_blocks as f64 / journal.capacity_blocks as f64,
                None if used > 0.7 => break,
                None => {}
            }
            if used > FULL {
                break;
            }
        }
        let killed = scene.kill(alpha);
        stop.store(true, Ordering::Relaxed);
        killed.map(drop)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recovery::Replayed;

    #[test]
    fn the_log_says_what_was_replayed() {
        let replayed = Replayed {
            transactions: 5,
            used_blocks: 300,
            ring_blocks: 400,
            blocks: 250,
            skipped: 3,
            took: Duration::from_millis(70),
            net: None,
        };
        let log = format!("x\nWARN recovered it: {replayed}\nother\n");
        assert_eq!(Replay::parse(&log), Some(Replay { used: 0.75, blocks: 250, ms: 70.0 }));
        assert_eq!(Replay::parse("nothing"), None);
    }
}
