//! `agent scsi COMMAND DEVICE ...`: one command each, or many in a row; answers as text and as exit status.

use std::io;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::number;
use crate::scsi::{Answer, Data, Disk, Page};

const MISCOMPARE: u8 = 3;
const CONFLICT: u8 = 4;
const ATTENTION: u8 = 5;

pub fn run(words: &[&str]) -> io::Result<ExitCode> {
    let &[command, device, ref rest @ ..] = words else {
        return Err(io::Error::other("scsi COMMAND DEVICE ..."));
    };
    let disk = Disk::open(device)?;
    let answer = match command {
        "count" => return count(&disk, number(rest, 0, "block")?, number(rest, 1, "number")?, rest),
        "read" => return read(&disk, number(rest, 0, "block")?),
        "write" => write(&disk, number(rest, 0, "block")?, number(rest, 1, "byte")?)?,
        "swap" => {
            let image = |byte| vec![byte; disk.block_bytes];
            let (old, new) = (number(rest, 1, "byte")?, number(rest, 2, "byte")?);
            disk.compare_and_write(number(rest, 0, "block")?, &image(old), &image(new))?
        }
        "unmap" => disk.unmap(number(rest, 0, "block")?, number(rest, 1, "number of blocks")?)?,
        // Whatever was registered before.
        "register" => disk.reserve_out(6, 0, number(rest, 0, "key")?)?,
        "reserve" => disk.reserve_out(1, number(rest, 0, "key")?, 0)?,
        "clear" => disk.reserve_out(3, number(rest, 0, "key")?, 0)?,
        "preempt" => disk.reserve_out(5, number(rest, 0, "key")?, number(rest, 1, "key")?)?,
        "keys" => {
            println!("{:?}", disk.keys()?);
            return Ok(ExitCode::SUCCESS);
        }
        "latency" => return latency(&disk, number(rest, 0, "block")?, number(rest, 1, "seconds")?),
        "change" => return change(&disk, number(rest, 0, "block")?),
        other => return Err(io::Error::other(format!("no command {other:?}"))),
    };
    println!("{answer:?}");
    Ok(match answer {
        Answer::Good => ExitCode::SUCCESS,
        Answer::Miscompare => MISCOMPARE.into(),
        Answer::Conflict => CONFLICT.into(),
        Answer::Attention(..) => ATTENTION.into(),
        Answer::Other(_) => ExitCode::FAILURE,
    })
}

/// A page of this byte, by the kernel's ordinary direct write.
fn write(disk: &Disk, lba: u64, byte: u8) -> io::Result<Answer> {
    match disk.file().write_all_at(&Page([byte; 4096]).0, lba * disk.block_bytes as u64) {
        Ok(()) => Ok(Answer::Good),
        // A command that ended in a reservation conflict.
        Err(e) if e.raw_os_error() == Some(libc::EBADE) => Ok(Answer::Conflict),
        Err(e) => Err(e),
    }
}

fn read_page(disk: &Disk, lba: u64) -> io::Result<Page> {
    let mut page = Page([0; 4096]);
    disk.file().read_exact_at(&mut page.0, lba * disk.block_bytes as u64)?;
    Ok(page)
}

fn read(disk: &Disk, lba: u64) -> io::Result<ExitCode> {
    let page = read_page(disk, lba)?;
    match page.0.iter().all(|byte| *byte == page.0[0]) {
        true => println!("{}", page.0[0]),
        false => println!("mixed {:?}", &page.0[..16]),
    }
    Ok(ExitCode::SUCCESS)
}

/// Counts the number at the head of a block up by compare-and-write, against whoever does the same.
fn count(disk: &Disk, lba: u64, times: u64, rest: &[&str]) -> io::Result<ExitCode> {
    let writer: u64 = number(rest, 2, "writer")?;
    let block = |page: &Page| page.0[..disk.block_bytes].to_vec();
    let value = |block: &[u8]| block[..8].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let mut known = block(&read_page(disk, lba)?);
    let (mut done, mut miscompares) = (0u64, 0u64);
    while done < times {
        let mut next = known.clone();
        next[..8].copy_from_slice(&(value(&known) + 1).to_le_bytes());
        // No image is ever written twice.
        next[8..16].copy_from_slice(&writer.to_le_bytes());
        next[16..24].copy_from_slice(&done.to_le_bytes());
        match disk.compare_and_write(lba, &known, &next)? {
            Answer::Good => {
                done += 1;
                known = next;
            }
            Answer::Miscompare => {
                miscompares += 1;
                known = block(&read_page(disk, lba)?);
            }
            other => return Err(io::Error::other(format!("after {done}: {other:?}"))),
        }
    }
    println!("done {done} miscompares {miscompares}");
    Ok(ExitCode::SUCCESS)
}

/// Changes three pages without end, one by writes, one by compare-and-writes, one by UNMAP, until each of the three
/// was refused; says so each time. Unit attentions change nothing.
fn change(disk: &Disk, lba: u64) -> io::Result<ExitCode> {
    let blocks = (4096 / disk.block_bytes) as u64;
    let swapped = lba + blocks;
    let one = |page: &Page| page.0[..disk.block_bytes].to_vec();
    let until_refused = |name: &str, change: &mut dyn FnMut(u64) -> io::Result<Answer>| {
        for n in 0.. {
            if n == 1 {
                println!("{name} began");
            }
            match change(n)? {
                Answer::Good => {}
                Answer::Attention(asc, ascq) => println!("{name} attention {asc:02x}/{ascq:02x}"),
                Answer::Conflict => {
                    println!("{name} refused after {n}");
                    break;
                }
                other => return Err(io::Error::other(format!("{name}: {other:?}"))),
            }
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads = [
            scope.spawn(|| until_refused("write", &mut |n| write(disk, lba, n as u8))),
            scope.spawn(|| {
                let mut known = one(&read_page(disk, swapped)?);
                until_refused("swap", &mut |n| {
                    let mut next = known.clone();
                    next[..8].copy_from_slice(&n.to_le_bytes());
                    let answer = disk.compare_and_write(swapped, &known, &next)?;
                    if answer == Answer::Good {
                        known = next;
                    }
                    Ok(answer)
                })
            }),
            scope.spawn(|| until_refused("unmap", &mut |_| disk.unmap(lba + 2 * blocks, blocks as u32))),
        ];
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| io::Error::other("a panic"))?)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The slowest read by SG_IO in so many seconds, and the latest that a thread woke up which only sleeps: whether the disk
/// is slow or the machine.
fn latency(disk: &Disk, lba: u64, seconds: u64) -> io::Result<ExitCode> {
    let end = Instant::now() + Duration::from_secs(seconds);
    let slowest = |step: &dyn Fn() -> io::Result<()>| {
        let mut slowest = Duration::ZERO;
        while Instant::now() < end {
            let began = Instant::now();
            step()?;
            slowest = slowest.max(began.elapsed());
        }
        io::Result::Ok(slowest)
    };
    let pause = || {
        std::thread::sleep(Duration::from_millis(10));
        Ok(())
    };
    let read = || {
        let mut cdb = [0; 16];
        (cdb[0], cdb[13]) = (0x88, 1);
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        disk.command(&cdb, Data::In(&mut vec![0; disk.block_bytes]))?;
        pause()
    };
    let (asleep, reading) = std::thread::scope(|scope| {
        let sleeper = scope.spawn(|| slowest(&pause));
        let reading = slowest(&read);
        (sleeper.join().map_err(|_| io::Error::other("a panic")), reading)
    });
    println!("read {} ms, asleep {} ms", reading?.as_millis(), asleep??.as_millis());
    Ok(ExitCode::SUCCESS)
}
