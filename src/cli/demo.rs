//! `lunfs demo`: two hosts share one volume, on this machine, in a few seconds.
//!
//! A sparse image in a temporary folder is formatted and mounted twice, by two daemons that share nothing
//! but the image. What is claimed is checked; what was made is taken away again, also on Ctrl-C.
//!
//! Exit status: 0 everything was as claimed, 1 something was not, 2 wrong usage, 32 nobody can mount here.

mod chapters;
mod story;

use std::process::ExitCode;
use std::time::Instant;

use self::story::{Story, duration};
pub use self::story::{duration as duration_text, grouped};
use super::EXIT_MOUNT;
use super::scene::{Host, Scene, SceneOptions, can_mount};
use crate::inspect::table::bytes;

/// Sparse; large enough that a thousand files fit into one cluster, as on a real LUN.
const SIZE_BYTES: u64 = 64 << 30;

/// Two hosts share one volume on this machine: see it work, in a few seconds.
#[derive(clap::Args, Debug)]
#[command(after_help = "Exit status: 0 everything was as claimed, 1 something was not, 2 wrong usage, 32 \
                        this machine or user can't mount.")]
pub struct Args {
    /// Leave it mounted afterwards, and say how to go on.
    #[arg(long)]
    keep: bool,
}

pub fn run(args: Args) -> ExitCode {
    if let Err(reason) = can_mount() {
        eprintln!("lunfs demo: {reason}");
        return ExitCode::from(EXIT_MOUNT);
    }
    match play(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lunfs demo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `Ok(false)`: something was not as claimed. On an error the scene is cleared when it is dropped.
fn play(args: &Args) -> Result<bool, String> {
    let begun = Instant::now();
    let program = std::env::current_exe().map_err(|e| format!("cannot find the program's own file: {e}"))?;
    let options = SceneOptions { program, name: "demo", size_bytes: SIZE_BYTES, keep: args.keep };
    let scene = Scene::set(options)?;
    scene.clear_on_signal().map_err(|e| format!("cannot listen to signals: {e}"))?;
    let mounted = scene.mount("alpha").and_then(|alpha| Ok((alpha, scene.mount("beta")?)));
    let (alpha, beta) = match mounted {
        Ok(hosts) => hosts,
        Err(error) => {
            scene.clear();
            return Err(error);
        }
    };
    let mut story = Story::begin(scene.clone());
    story.say("LunFS: two hosts, one disk. They share nothing else: no lock server, no network.");
    story.say("");
    let host = |host: &Host| format!("{}  (process {})", host.root.display(), host.pid);
    let disk = scene.image();
    let size = format!("{}  ({}, sparse)", disk.display(), bytes(SIZE_BYTES));
    story.facts(&[("disk", size), ("alpha", host(&alpha)), ("beta", host(&beta))]);
    chapters::one_filesystem(&mut story, &alpha, &beta);
    chapters::a_lock_moves(&mut story, &alpha, &beta);
    chapters::alone(&mut story, &alpha);
    chapters::counters(&mut story, &alpha, &beta);
    if args.keep {
        how_to_go_on(&story, &scene, &alpha, &beta);
    } else {
        let problems = scene.clear();
        for problem in &problems {
            story.say(problem);
        }
        if !problems.is_empty() {
            story.failed += 1;
        }
    }
    story.say("");
    let left = if args.keep { "left mounted" } else { "unmounted and removed" };
    let took = duration(begun.elapsed());
    match story.failed {
        0 => story.say(&format!("All {} checks are as claimed; {left}; {took}.", story.checked)),
        n => story.say(&format!("{n} of {} checks are NOT as claimed; {left}; {took}.", story.checked)),
    }
    Ok(story.failed == 0)
}

fn how_to_go_on(story: &Story, scene: &Scene, alpha: &Host, beta: &Host) {
    let program = std::env::current_exe().map_or_else(|_| "lunfs".into(), |p| p.display().to_string());
    let (disk, directory) = (scene.image(), scene.directory().display());
    let (disk, a, b) = (disk.display(), alpha.root.display(), beta.root.display());
    story.chapter("Still mounted. To try:");
    story.say(&format!("  echo hello > {a}/note; cat {b}/note"));
    story.say(&format!("  {program} status {disk}"));
    story.say(&format!("  {program} locks {disk}"));
    story.chapter("To end it:");
    story.say(&format!("  {program} umount {a}"));
    story.say(&format!("  {program} umount {b}"));
    story.say(&format!("  rm -r {directory}"));
}
