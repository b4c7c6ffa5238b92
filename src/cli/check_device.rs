//! `lunfs check-device`: can a LunFS volume live on this device? Found out by doing, told in words.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use crate::device::check::{
    Finding, Property, Report, SCRATCH_BYTES, Scratch, Verdict, fences, harmless, known_to_suffer,
};
use crate::device::open::{OpenOptions, open_device, shown};
use crate::device::{BlockDevice, iscsi};
use crate::format::preflight::{Previous, Watching, preflight};

/// Shown at the end of the help.
const EXIT_STATUS: &str = "Exit status: 0 good, 3 good without reservations, 4 do not use it, 1 the check could not be \
                           made, 2 wrong usage.";
const EXIT_WITHOUT_RESERVATIONS: u8 = 3;
const EXIT_DO_NOT_USE: u8 = 4;

/// Increments of each racer.
const ROUNDS: u64 = 2000;

/// Find out by doing whether a device can carry a LunFS volume.
///
/// Without --exclusive nothing is changed on a device that carries anything; a device that carries nothing is written
/// to in its last 64 KiB, and they are put back. With --exclusive this is done on any device, after a LunFS volume on
/// it was watched for a full dead time.
#[derive(clap::Args, Debug)]
#[command(after_help = EXIT_STATUS)]
pub struct Args {
    /// A block device, a file, or the address of an iSCSI LUN.
    pub device: String,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Ask about reservations as well. Needs --exclusive: while they are tried, every other host is shut out.
    #[arg(long, requires = "exclusive")]
    with_reservations: bool,
    /// Nobody uses the device. It is written to (its last 64 KiB are put back), and a target that can't bear reservations
    /// may need a restart afterwards.
    #[arg(long)]
    exclusive: bool,
}

/// Asks and tells.
pub fn run(args: Args) -> ExitCode {
    let device = shown(&args.device);
    match check(&args) {
        Ok((about, report)) => {
            let verdict = report.verdict();
            let text = match args.json {
                true => {
                    let about: serde_json::Map<_, _> = about
                        .into_iter()
                        .map(|(name, value)| (name.replace(' ', "_"), json!(value)))
                        .collect();
                    let all = json!({
                        "device": device,
                        "about": about,
                        "properties": report.properties,
                        "reservations": report.reservations,
                        "verdict": verdict,
                        "words": verdict.to_string(),
                    });
                    format!("{all:#}\n")
                }
                false => for_people(&device, &about, &report, &verdict),
            };
            let _ = std::io::stdout().lock().write_all(text.as_bytes());
            match verdict {
                Verdict::Good => ExitCode::SUCCESS,
                Verdict::GoodWithoutReservations(_) => ExitCode::from(EXIT_WITHOUT_RESERVATIONS),
                Verdict::DoNotUse(_) => ExitCode::from(EXIT_DO_NOT_USE),
            }
        }
        Err(why) => {
            eprintln!("lunfs check-device: {device}: {why}");
            ExitCode::FAILURE
        }
    }
}

type About = Vec<(&'static str, String)>;

fn check(args: &Args) -> Result<(About, Report), String> {
    let open = |reservations| {
        let options = OpenOptions { reservations, ..OpenOptions::default() };
        open_device(&args.device, options).map_err(|e| e.to_string())
    };
    let first = open(false)?;
    let about = first.about();
    let empty = match preflight(&*first, args.exclusive, &mut watching) {
        Ok(previous) => {
            if previous.as_ref().is_some_and(|previous: &Previous| previous.changed_slot(&*first).is_some()) {
                return Err("a host has begun to use the volume on it".into());
            }
            true
        }
        Err(error) if args.exclusive => return Err(error.to_string()),
        Err(_) => false,
    };
    if std::io::stderr().is_terminal() {
        eprint!("\r");
    }
    let mut report = Report::default();
    let Some(at) = Scratch::place_at_end(&*first) else {
        return Err(format!("it is smaller than {SCRATCH_BYTES} bytes"));
    };
    if !empty {
        let found = harmless(&*first, 0).map_err(|e| e.to_string());
        let found = found.map(|()| "is there, and fails on what is not expected".to_owned());
        report.properties.push(Property::of("compare-and-write", found));
        let why = "the device carries something; with --exclusive it is asked all the same";
        report.properties.push(Property::not_asked("everything else", why));
        return Ok((about, report));
    }
    // Sessions of their own where the backend has sessions; else handles on the same file.
    let others = if iscsi::Target::is_meant(&args.device) { 3 } else { 1 };
    let mut handles: Vec<Arc<dyn BlockDevice>> = vec![first];
    for _ in 0..others {
        handles.push(open(false)?);
    }
    let scratch = Scratch::take(&handles, at).map_err(|e| e.to_string())?;
    report.properties = scratch.all(ROUNDS);
    if let Some(why) = known_to_suffer(&*handles[0]).filter(|_| args.with_reservations) {
        // The trial would cost every other unit of that target as well, and nothing could come of it.
        report.reservations = vec![Property::of("reservations", Err(format!("not tried: {why}")))];
    } else if args.with_reservations && !handles[0].own_nexus() {
        let why = "to the target this machine is one party, whatever is opened; ask through iscsi://, which opens sessions \
                   of its own";
        report.reservations = vec![Property::not_asked("reservations", why)];
    } else if args.with_reservations {
        report.reservations =
            fences(&open, at, ROUNDS).unwrap_or_else(|why| vec![Property::of("reservations", Err(why))]);
    } else {
        report.reservations = vec![Property::not_asked("reservations", "see --with-reservations")];
    }
    let restored =
        scratch.restore().map_err(|e| format!("what was in the last 64 KiB could not be put back: {e}"));
    match (restored, args.with_reservations) {
        (Ok(()), _) => {}
        // A target that is stuck in a reservation.
        (Err(why), true) => report.reservations.push(Property::of("afterwards", Err(why))),
        (Err(why), false) => return Err(why),
    }
    Ok((about, report))
}

/// Progress of the watch over a volume's heartbeats.
fn watching(at: Watching) {
    if std::io::stderr().is_terminal() {
        let (done, of) = (at.watched.as_secs(), at.of.as_secs());
        eprint!("\rwatching the heartbeats of the volume: {done} of {of} s ");
    }
}

fn for_people(device: &str, about: &About, report: &Report, verdict: &Verdict) -> String {
    let mut text = format!("{device}\n");
    for (name, value) in about.iter().filter(|(_, value)| !value.is_empty()) {
        text.push_str(&format!("  {name:<26}{value}\n"));
    }
    text.push('\n');
    for property in report.properties.iter().chain(&report.reservations) {
        let mark = match property.finding {
            Finding::Good => "good",
            Finding::Weak => "weak",
            Finding::Bad => "BAD",
            Finding::NotAsked => "-",
        };
        text.push_str(&format!("  {mark:<5} {:<38}{}\n", property.name, property.words));
    }
    text.push_str(&format!("\nverdict: {verdict}\n"));
    text
}
