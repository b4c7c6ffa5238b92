//! `agent load NAME DIRECTORY ...`: what programs do to a directory that another guest uses as well.
//!
//! Every content follows from its name or its writer, so that whoever reads knows what must be there, and a file
//! that is half of one thing and half of another is found out. Lines on standard output:
//! `durable N` once file N and its name are, `round N`, and a summary at the end.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::number;

/// How long anything may take before a load says that it hangs: more than a dead time with a recovery.
const PATIENCE: Duration = Duration::from_secs(90);

pub fn run(words: &[&str]) -> io::Result<()> {
    let &[name, directory, ref rest @ ..] = words else {
        return Err(io::Error::other("load NAME DIRECTORY ..."));
    };
    let directory = Path::new(directory);
    match name {
        "fill" => fill(directory, number(rest, 0, "first")?, number(rest, 1, "last")?),
        "verify" => verify(directory, number(rest, 0, "first")?, number(rest, 1, "last")?),
        "append" => append(directory, number(rest, 0, "writer")?, number(rest, 1, "number")?),
        "appended" => appended(directory),
        "replace" => replace(directory, number(rest, 0, "writer")?, number(rest, 1, "number")?),
        "move" => move_tokens(directory, number(rest, 0, "writer")?, number(rest, 1, "number")?),
        "raise" => raise(directory, number(rest, 0, "writer")?, number(rest, 1, "number")?),
        "overwrite" => overwrite(directory, number(rest, 0, "byte")?, u64::MAX),
        "once" => overwrite(directory, number(rest, 0, "byte")?, 1),
        "is" => is_all(directory, number(rest, 0, "byte")?),
        other => Err(io::Error::other(format!("no load {other:?}"))),
    }
}

fn wrong<T>(what: String) -> io::Result<T> {
    Err(io::Error::other(what))
}

/// Bytes that name their file at every place; inline, small, and of several extents by turns.
fn content(n: u64) -> Vec<u8> {
    let len = [30, 5000, 200_000][n as usize % 3];
    format!("file {n} ").bytes().cycle().take(len).collect()
}

/// Makes files, each durable before it is told.
fn fill(directory: &Path, first: u64, last: u64) -> io::Result<()> {
    for n in first..last {
        let mut file = File::create_new(directory.join(format!("f{n}")))?;
        file.write_all(&content(n))?;
        file.sync_all()?;
        File::open(directory)?.sync_all()?;
        println!("durable {n}");
    }
    Ok(())
}

fn verify(directory: &Path, first: u64, last: u64) -> io::Result<()> {
    for n in first..last {
        let path = directory.join(format!("f{n}"));
        let bytes = fs::read(&path).map_err(|e| io::Error::other(format!("{}: {e}", path.display())))?;
        if bytes != content(n) {
            return wrong(format!("{} has {} other bytes", path.display(), bytes.len()));
        }
    }
    println!("verified {}", last - first);
    Ok(())
}

/// Appends lines to one file that others append to as well.
fn append(directory: &Path, writer: u64, lines: u64) -> io::Result<()> {
    for n in 0..lines {
        let mut file = OpenOptions::new().append(true).create(true).open(directory.join("log"))?;
        file.write_all(format!("{writer} {n}\n").as_bytes())?;
    }
    println!("appended {lines}");
    Ok(())
}

/// Each writer's lines are there, once and in order.
fn appended(directory: &Path) -> io::Result<()> {
    let text = fs::read_to_string(directory.join("log"))?;
    let mut next = BTreeMap::<&str, u64>::new();
    for line in text.lines() {
        let (writer, n) = line.split_once(' ').ok_or_else(|| io::Error::other(format!("torn: {line:?}")))?;
        let expected = next.entry(writer).or_default();
        if n.parse() != Ok(*expected) {
            return wrong(format!("writer {writer}: line {n} where {expected} was due"));
        }
        *expected += 1;
    }
    println!("lines {next:?}");
    Ok(())
}

/// Writes a file of its own and renames it over one that all fight for; whatever is read there is whole, and no
/// writer's number goes back.
fn replace(directory: &Path, writer: u64, times: u64) -> io::Result<()> {
    let image = |writer: u64, n: u64| format!("{writer} {n} ").repeat(700);
    let (mine, shared) = (directory.join(format!("new-{writer}")), directory.join("shared"));
    let mut seen = BTreeMap::<u64, u64>::new();
    for n in 0..times {
        fs::write(&mine, image(writer, n))?;
        fs::rename(&mine, &shared)?;
        let text = fs::read_to_string(&shared)?;
        let mut words = text.split(' ').map(str::parse::<u64>);
        let (Some(Ok(other)), Some(Ok(number))) = (words.next(), words.next()) else {
            return wrong(format!("nothing whole: {:?}", text.get(..20)));
        };
        if text != image(other, number) {
            return wrong(format!("neither one thing nor another: {other} {number}"));
        }
        if let Some(before) = seen.insert(other, number)
            && before > number
        {
            return wrong(format!("writer {other} went back from {before} to {number}"));
        }
    }
    println!("replaced {times}, saw {seen:?}");
    Ok(())
}

/// Moves 20 tokens between two directories; each move has one winner, and no token is lost or doubled.
fn move_tokens(directory: &Path, writer: u64, wins: u64) -> io::Result<()> {
    let (start, mut won, mut lost) = (Instant::now(), 0, 0);
    let mut n = writer * 7;
    while won < wins {
        n += 1;
        let (from, to) = if n.is_multiple_of(2) { ("a", "b") } else { ("b", "a") };
        let token = format!("t{}", (n / 2) % 20);
        match fs::rename(directory.join(from).join(&token), directory.join(to).join(&token)) {
            Ok(()) => won += 1,
            Err(e) if e.kind() == ErrorKind::NotFound => lost += 1,
            Err(e) => return Err(e),
        }
        if start.elapsed() > PATIENCE {
            return wrong(format!("{won} moves only"));
        }
    }
    println!("moved {won}, lost {lost}");
    Ok(())
}

/// Reads a number, raises it and writes it back, under a lock file made with O_EXCL.
fn raise(directory: &Path, writer: u64, times: u64) -> io::Result<()> {
    let (lock, counter) = (directory.join("lock"), directory.join("counter"));
    let (mut raised, mut start) = (0, Instant::now());
    while raised < times {
        match OpenOptions::new().write(true).create_new(true).open(&lock) {
            Ok(_) => {
                let text = fs::read_to_string(&counter)?;
                let value: u64 =
                    text.parse().map_err(|_| io::Error::other(format!("no number: {text:?}")))?;
                // In place and anew, by turns.
                if value.is_multiple_of(2) {
                    let new = directory.join(format!("counter-{writer}"));
                    fs::write(&new, (value + 1).to_string())?;
                    fs::rename(&new, &counter)?;
                } else {
                    fs::write(&counter, (value + 1).to_string())?;
                }
                fs::remove_file(&lock)?;
                raised += 1;
                start = Instant::now();
            }
            Err(e) if e.kind() == ErrorKind::AlreadyExists => std::thread::sleep(Duration::from_micros(500)),
            Err(e) => return Err(e),
        }
        if start.elapsed() > PATIENCE {
            return wrong(format!("the lock file can't be had; {raised} times"));
        }
    }
    println!("raised {raised}");
    Ok(())
}

/// Writes 64 KiB of this byte over one file, durably, so many times; tells that it is under way.
fn overwrite(directory: &Path, byte: u8, times: u64) -> io::Result<()> {
    let path = directory.join("file");
    for n in 0..times {
        let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
        file.write_all(&[byte; 64 << 10])?;
        file.sync_data()?;
        if n == 2 {
            println!("began");
        }
    }
    Ok(())
}

/// The file is all of this byte.
fn is_all(directory: &Path, byte: u8) -> io::Result<()> {
    let bytes = fs::read(directory.join("file"))?;
    match bytes.len() == 64 << 10 && bytes.iter().all(|b| *b == byte) {
        true => Ok(()),
        false => wrong(format!("{} bytes, {:?} and so on", bytes.len(), bytes.get(..8))),
    }
}
