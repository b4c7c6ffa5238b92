//! The demo as a user runs it: it ends well, says what it should, and leaves nothing behind.
//!
//! Needs root and /dev/fuse; says so and passes where they are missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lunfs::cli::scene::{can_mount, is_running};
use lunfs::fuse::mountinfo;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn may_run() -> bool {
    let may = can_mount();
    if let Err(reason) = &may {
        eprintln!("SKIPPED: {reason}");
    }
    may.is_ok() && nix::unistd::geteuid().is_root()
}

/// A demo with a temporary folder of its own, so that what it leaves is seen.
struct Run {
    temp: tempfile::TempDir,
}

impl Run {
    fn new() -> Run {
        Run { temp: tempfile::tempdir().expect("a temporary folder") }
    }

    fn start(&self, arguments: &[&str]) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lunfs"));
        command.arg("demo").args(arguments).env("TMPDIR", self.temp.path());
        command.env("LUNFS_RUN_DIR", self.temp.path().join("run"));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the demo starts")
    }

    /// Waits for the end; a demo that hangs is told to clean up.
    fn finish(&self, child: Child) -> Output {
        let pid = Pid::from_raw(child.id() as i32);
        let (done, ended) = std::sync::mpsc::channel::<()>();
        let watchdog = std::thread::spawn(move || {
            if ended.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("WATCHDOG: the demo hangs");
                let _ = kill(pid, Signal::SIGTERM);
            }
        });
        let output = child.wait_with_output().expect("the demo's output");
        drop(done);
        watchdog.join().expect("the watchdog");
        output
    }

    fn mounts(&self) -> Vec<PathBuf> {
        let mounts = mountinfo::read().expect("mountinfo").into_iter().map(|m| m.mountpoint);
        mounts.filter(|m| m.starts_with(self.temp.path())).collect()
    }

    fn left(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.temp.path()).expect("the temporary folder").flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|n| n != "run").collect()
    }

    fn expect_nothing_left(&self, output: &str) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new());
        assert_eq!(self.left(), BTreeSet::new());
        for pid in daemons(output) {
            assert!(!is_running(pid), "the daemon {pid} is still there");
        }
    }
}

/// The processes that the demo named.
fn daemons(output: &str) -> Vec<u32> {
    output
        .lines()
        .filter_map(|line| line.split_once("(process ")?.1.strip_suffix(')')?.parse().ok())
        .collect()
}

#[test]
fn it_shows_what_it_claims_and_leaves_nothing() {
    if !may_run() {
        return;
    }
    let run = Run::new();
    let output = run.finish(run.start(&[]));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    for line in [
        "LunFS: two hosts, one disk.",
        "  ok  alpha writes guest.conf; beta reads the same bytes",
        "  ok  beta renames it to web.conf; alpha finds only the new name",
        "none is lost",
        "compare-and-writes",
        "  ok  alpha creates 1,000 files: no compare-and-write",
        "checks are as claimed; unmounted and removed",
    ] {
        assert!(text.contains(line), "{line:?} is missing in:\n{text}");
    }
    assert!(!text.contains('\x1b'), "colour in a pipe");
    assert!(text.lines().all(|line| line.chars().count() <= 130), "too wide:\n{text}");
    assert_eq!(daemons(&text).len(), 2);
    run.expect_nothing_left(&text);
}

#[test]
fn kept_it_goes_on_as_it_says() {
    if !may_run() {
        return;
    }
    let run = Run::new();
    let output = run.finish(run.start(&["--keep"]));
    let text = String::from_utf8(output.stdout).expect("text");
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(run.mounts().len(), 2);
    assert!(daemons(&text).into_iter().all(is_running));
    let shell = |line: &str| {
        let mut command = Command::new("sh");
        command.arg("-c").arg(line).env("LUNFS_RUN_DIR", run.temp.path().join("run"));
        let output = command.output().expect("a shell");
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    };
    let lines_after = |heading: &str| {
        let lines = text.lines().skip_while(|line| *line != heading).skip(1);
        lines.take_while(|line| line.starts_with("  ")).collect::<Vec<_>>()
    };
    let to_try = lines_after("Still mounted. To try:");
    assert!(to_try.len() >= 2, "{text}");
    for line in to_try {
        assert_ne!(shell(line), "", "{line}");
    }
    let to_end = lines_after("To end it:");
    assert_eq!(to_end.len(), 3, "{text}");
    to_end.into_iter().for_each(|line| drop(shell(line)));
    run.expect_nothing_left(&text);
}

#[test]
fn interrupted_at_any_moment_it_cleans_up() {
    if !may_run() {
        return;
    }
    for pause_ms in [30, 150, 400] {
        let run = Run::new();
        let child = run.start(&[]);
        let pid = Pid::from_raw(child.id() as i32);
        // Before there is anything to clean nobody listens, and the signal simply ends it.
        let begun = Instant::now();
        while run.mounts().is_empty() && begun.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(pause_ms));
        kill(pid, Signal::SIGINT).expect("a signal");
        let output = run.finish(child);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // A fast machine may have finished.
        let ended = output.status.code();
        assert!(matches!(ended, Some(130 | 0)), "{ended:?} {text}");
        run.expect_nothing_left(&text);
    }
}

#[test]
fn who_cannot_mount_is_told_so_in_one_line() {
    if !nix::unistd::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    use std::os::unix::process::CommandExt;
    // The program may lie where only root can go: a copy for everybody.
    let temp = tempfile::tempdir().expect("a temporary folder");
    let program = temp.path().join("lunfs");
    std::fs::copy(env!("CARGO_BIN_EXE_lunfs"), &program).expect("a copy");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(temp.path(), mode).expect("a mode");
    let mut command = Command::new(&program);
    let output = command.arg("demo").env("PATH", "/nowhere").uid(65534).gid(65534).output().expect("it runs");
    assert_eq!(output.status.code(), Some(32));
    assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1);
    assert!(output.stdout.is_empty());
}
