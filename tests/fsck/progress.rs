//! The progress bar: on a terminal it moves, is honest about the rest, and leaves nothing behind; elsewhere there is none.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Output, Stdio};

use lunfs::layout::slot::SlotState;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::command::{PATIENT, patient};
use super::volumes::{err, out};

/// Standard error is a terminal of 100 columns; what was written to it.
fn on_terminal(args: &[&str]) -> (Output, String) {
    let master: OwnedFd = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let terminal = File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(name).unwrap();
    tcsetwinsize(&terminal, Winsize { ws_row: 25, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let reader = std::thread::spawn(move || {
        let (mut master, mut all, mut some) = (File::from(master), Vec::new(), [0; 4096]);
        // EIO: nobody has the terminal open any more.
        while let Ok(count) = master.read(&mut some) {
            if count == 0 {
                break;
            }
            all.extend_from_slice(&some[..count]);
        }
        String::from_utf8_lossy(&all).into_owned()
    });
    let output = Command::new(env!("CARGO_BIN_EXE_fsck-lunfs"))
        .args(args)
        .env("TERM", "xterm")
        .env_remove("NO_COLOR")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(terminal)
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    (output, reader.join().unwrap())
}

/// What the bar showed of one pass: per cent, and seconds left.
fn shown(text: &str, pass: &str) -> Vec<(u64, u64)> {
    let of_line = |line: &str| {
        let rest = line.split_once(pass)?.1;
        let (before, eta) = rest.split_once('%')?;
        let percent = before.split_whitespace().last()?.parse().ok()?;
        let seconds = eta.split_whitespace().next()?.trim_end_matches('s').parse().ok()?;
        Some((percent, seconds))
    };
    text.split(['\r', '\n']).filter_map(of_line).collect()
}

#[test]
fn a_bar_moves_on_a_terminal_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let volume = patient(dir.path());
    // A host that is silent is watched for the volume's dead time.
    volume.put_slot(&volume.slot_record(1, SlotState::Live, "gone"));
    let (output, text) = on_terminal(&["-n", volume.spec()]);
    assert_eq!(output.status.code(), Some(0), "{}", out(&output));
    assert!(out(&output).contains("[journal-pending]") && out(&output).contains("clean, 1 note;"), "{text}");
    let seen = shown(&text, "watching for other hosts");
    assert!(seen.len() >= 8, "{seen:?}: {text:?}");
    assert!(seen.is_sorted_by_key(|(percent, _)| *percent), "{seen:?}");
    let (first, last) = (seen[0].0, seen[seen.len() - 1].0);
    assert!(first <= 15 && last >= 85, "{seen:?}");
    // The rest is what is left of that, to what a busy machine adds.
    for (percent, left) in seen.iter().filter(|(percent, _)| (20..100).contains(percent)) {
        let real = (100 - percent) * u64::from(PATIENT.dead_ms) / 100_000;
        assert!(left.abs_diff(real) <= 1 + real, "{percent} %: {left} s, really {real} s");
    }
    // The last thing is an empty line, with the cursor at its start.
    let end = text.rsplit(['\r', '\n']).find(|piece| !piece.is_empty()).unwrap_or_default();
    assert_eq!(end, "\u{1b}[2K", "{text:?}");
}

#[test]
fn there_is_no_bar_elsewhere_or_with_json() {
    let dir = tempfile::tempdir().unwrap();
    let volume = patient(dir.path());
    let (output, text) = on_terminal(&["-n", "--json", volume.spec()]);
    assert_eq!((output.status.code(), text.as_str()), (Some(0), ""));
    assert!(serde_json::from_slice::<serde_json::Value>(&output.stdout).is_ok());
    let output = Command::new(env!("CARGO_BIN_EXE_fsck-lunfs")).args(["-n", volume.spec()]).output().unwrap();
    assert_eq!((output.status.code(), err(&output).as_str()), (Some(0), ""));
}
