//! Many small files in a directory of one's own: created, looked at, deleted; alone and in company.
//!
//! Commands are counted from before the first file until the host has left the volume, so that commits,
//! checkpoints and everything else that was put off is in: that is what a create really costs.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::cli::scene::{Host, Scene};
use crate::durations::Profile;
use crate::lease::CommandCounts;

/// What the second host does meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Company {
    Alone,
    Idle,
    /// Creates files in a directory of its own.
    Working,
}

impl Company {
    pub const ALL: [Company; 3] = [Company::Alone, Company::Idle, Company::Working];

    pub fn name(self) -> &'static str {
        match self {
            Company::Alone => "alone",
            Company::Idle => "second host idle",
            Company::Working => "second host works",
        }
    }
}

/// One kind of work: how long it took, and what it asked of the disk.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    pub took: Duration,
    pub spent: CommandCounts,
}

/// What was done to `files` files.
#[derive(Clone, Copy, Debug, Default)]
pub struct Creates {
    pub files: u32,
    /// Creates, with the fsync of the directory at the end.
    pub create: Work,
    /// Again by the host that made them.
    pub stat_warm: Work,
    /// By a host that just mounted.
    pub stat_cold: Work,
    pub unlink: Work,
    /// Creates in a later life of the host, which has only inodes to reuse that were freed just now.
    pub reuse: Work,
    /// Files that the second host made during the creates.
    pub others: u64,
}

/// Rounds of stats until they are warm, and the most of which one must cost nothing.
const WARM_ROUNDS: u32 = 3;
const MOST_ROUNDS: u32 = 6;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

fn create(directory: &Path, files: u32) -> Result<Duration, String> {
    let begun = Instant::now();
    for n in 0..files {
        File::create_new(directory.join(format!("f{n}"))).map_err(text)?;
    }
    File::open(directory).and_then(|d| d.sync_all()).map_err(text)?;
    Ok(begun.elapsed())
}

fn stat(directory: &Path, files: u32) -> Result<Duration, String> {
    let begun = Instant::now();
    for n in 0..files {
        fs::metadata(directory.join(format!("f{n}"))).map_err(text)?;
    }
    Ok(begun.elapsed())
}

fn unlink(directory: &Path, files: u32) -> Result<Duration, String> {
    let begun = Instant::now();
    for n in 0..files {
        fs::remove_file(directory.join(format!("f{n}"))).map_err(text)?;
    }
    File::open(directory).and_then(|d| d.sync_all()).map_err(text)?;
    Ok(begun.elapsed())
}

fn operations(host: &Host) -> Result<CommandCounts, String> {
    Ok(host.stats()?.volume.commands.operations())
}

/// Counts to the end of the mount.
fn leave(scene: &Scene, host: &Host) -> Result<CommandCounts, String> {
    scene.unmount(&host.root)?;
    Ok(host.last_stats()?.volume.commands.operations())
}

/// Runs the whole life of `files` files on a new volume. No host has it mounted before or after.
pub fn run(scene: &Scene, company: Company, files: u32) -> Result<Creates, String> {
    scene.renew(Profile::default())?;
    let me = scene.mount("alpha")?;
    let other = match company {
        Company::Alone => None,
        Company::Idle | Company::Working => Some(scene.mount("beta")?),
    };
    let directory = me.path(&format!("own-{}", company.name().replace(' ', "-")));
    fs::create_dir(&directory).map_err(text)?;
    // A host's first file brings it its cluster; that is once in a mount's life.
    File::create_new(directory.join("first")).map_err(text)?;
    let mut result = Creates { files, ..Creates::default() };
    let (stop, others) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        if company == Company::Working
            && let Some(other) = &other
        {
            let root = other.path(&format!("work-{}", std::process::id()));
            let (stop, others) = (&stop, &others);
            scope.spawn(move || work(&root, stop, others));
            // It has found its cluster before anything is counted.
            while others.load(Ordering::Relaxed) < 10 && !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        let measured = measure_warm(scene, &me, &directory, files, &mut result);
        stop.store(true, Ordering::Relaxed);
        measured
    })?;
    result.others = others.load(Ordering::Relaxed);
    let me = scene.mount("alpha")?;
    let before = operations(&me)?;
    result.stat_cold.took = stat(&directory, files)?;
    let between = operations(&me)?;
    result.stat_cold.spent = between.since(&before);
    result.unlink.took = unlink(&directory, files)?;
    result.unlink.spent = leave(scene, &me)?.since(&between);
    let me = scene.mount("alpha")?;
    let before = operations(&me)?;
    result.reuse.took = create(&directory, files)?;
    result.reuse.spent = leave(scene, &me)?.since(&before);
    if let Some(other) = other {
        scene.unmount(&other.root)?;
    }
    Ok(result)
}

fn measure_warm(
    scene: &Scene,
    me: &Host,
    directory: &Path,
    files: u32,
    result: &mut Creates,
) -> Result<(), String> {
    // The second host made a directory beside ours: its name in the root has to be looked up once more.
    fs::metadata(directory).map_err(text)?;
    let before = operations(me)?;
    result.create.took = create(directory, files)?;
    // The kernel keeps attributes after it was told them two times. Then, a wish that the second host has not taken
    // back yet may be looked at meanwhile, by a read of its lock, once a second at the most; the looks themselves
    // are free if one round is.
    for round in 1..=MOST_ROUNDS {
        let before = operations(me)?;
        result.stat_warm.took = stat(directory, files)?;
        result.stat_warm.spent = operations(me)?.since(&before);
        if round >= WARM_ROUNDS && result.stat_warm.spent.reads + result.stat_warm.spent.swaps == 0 {
            break;
        }
    }
    // Reads of the warm stats, if any, would be counted here; they have their own figure.
    result.create.spent = leave(scene, me)?.since(&before);
    Ok(())
}

/// Creates until told to stop.
fn work(root: &Path, stop: &AtomicBool, made: &AtomicU64) {
    let mut directory = root.to_owned();
    while !stop.load(Ordering::Relaxed) {
        let n = made.load(Ordering::Relaxed);
        if n.is_multiple_of(100_000) {
            directory = root.with_extension(format!("{n}"));
            if fs::create_dir(&directory).is_err() {
                break;
            }
        }
        if File::create_new(directory.join(format!("{n}"))).is_err() {
            break;
        }
        made.fetch_add(1, Ordering::Relaxed);
    }
    stop.store(true, Ordering::Relaxed);
}

/// Creates a second on ext4 in a file through a loop device, as [`Creates::create`] does it.
pub fn on_ext4(scene: &Scene, files: u32) -> Result<Work, String> {
    let disk = scene.directory().join("ext4.img");
    File::create(&disk).and_then(|f| f.set_len(4 << 30)).map_err(text)?;
    let mut format = std::process::Command::new("mkfs.ext4");
    format.arg("-q").arg(&disk);
    crate::cli::scene::run(format)?;
    let at = scene.mount_other("ext4", |at| {
        let mut mount = std::process::Command::new("mount");
        mount.args(["-o", "loop"]).arg(&disk).arg(at);
        mount
    })?;
    let directory = at.join("own");
    fs::create_dir(&directory).map_err(text)?;
    let took = create(&directory, files)?;
    scene.unmount(&at)?;
    Ok(Work { took, ..Work::default() })
}
