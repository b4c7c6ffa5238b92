//! Reservations by doing: is a host that was fenced really refused, by each kind of command; and is compare-and-write
//! still exclusive afterwards?

use std::sync::Arc;

use super::Scratch;
use super::report::Property;
use crate::device::{BlockDevice, DeviceError, Fencing, FencingKey};
use crate::rt::random_u64;
use crate::types::{Incarnation, Owner, Slot};

/// What is asked last: conflicts and unit attentions have met compare-and-writes by then. Where it is bad the device must not
/// be used at all until it has been restarted, and never with reservations.
pub const AFTER_A_CONFLICT: &str = "compare-and-writes after a conflict";

/// Is the device known to lose data by the mere trial? Why, then; it is not to be tried where somebody relies on it.
pub fn known_to_suffer(device: &dyn BlockDevice) -> Option<&'static str> {
    let lio = device.about().iter().any(|(name, value)| *name == "vendor" && value == "LIO-ORG");
    lio.then_some(
        "it is a Linux kernel target (LIO), whose compare-and-write is not exclusive any more after a reservation conflict",
    )
}

/// Opens the device once more, as another host would; true: with its reservations.
pub type Open<'a> = &'a dyn Fn(bool) -> Result<Arc<dyn BlockDevice>, String>;

/// Keys of hosts that no volume has: the slots are far beyond, the lives are random.
fn key(host: u16) -> FencingKey {
    FencingKey::of(Owner { slot: Slot(0x80 + host), incarnation: Incarnation(random_u64() >> 17) })
}

/// Reserves the device, fences hosts, and looks what they can still do. Nobody else may use it. Ends without any
/// registration of its own. `rounds`: increments of each racer after the conflicts.
pub fn fences(open: Open<'_>, scratch_at: u64, rounds: u64) -> Result<Vec<Property>, String> {
    let survivor = open(true)?;
    let Some(fencing) = survivor.fencing() else {
        return Ok(vec![Property::of("reservations", Err("the device has none".into()))]);
    };
    if let Err(e) = fencing.register(key(0)) {
        return Ok(vec![Property::of("reservations", Err(format!("this host could not register: {e}")))]);
    }
    let mut found =
        vec![Property::of("reservations", Ok("registered, write exclusive for all registrants".into()))];
    let at = scratch_at + 32768;
    /// Name, command, and whether a device may leave it undone.
    type Change = fn(&dyn BlockDevice, u64) -> Result<(), DeviceError>;
    let kinds: [(&'static str, Change, bool); 4] = [
        ("write of a fenced host", |d, at| d.write(at, &[0xEE; 4096]), false),
        ("compare-and-write of a fenced host", same_again, false),
        ("discard of a fenced host", |d, at| d.discard(at, 4096), true),
        ("write zeroes of a fenced host", |d, at| d.write_zeroes(at, 4096), false),
    ];
    for (n, (name, change, may_do_nothing)) in kinds.into_iter().enumerate() {
        // The fenced host may be told before it sends the command; a stranger is told by nobody but the command.
        let fenced = refused(open, &*survivor, n as u16 + 1, at, change, may_do_nothing);
        found.push(Property::of(
            name,
            fenced.and_then(|_| stranger(open, &*survivor, at, change, may_do_nothing)),
        ));
    }
    found.push(Property::of(
        "others go on",
        survivor.write(at, &[1; 4096]).map(|()| "yes".into()).map_err(|e| e.to_string()),
    ));
    found.push(Property::of("the first who registered is fenced", first_is_fenced(open, fencing, at)));
    let left = fencing.unregister().map(|()| "given back".into()).map_err(|e| e.to_string());
    found.push(Property::of("registration", left));
    // A conflict and a unit attention have met compare-and-writes by now.
    let handles = [open(false)?, open(false)?, open(false)?, open(false)?];
    let raced = Scratch::take(&handles, scratch_at)
        .map_err(|e| e.to_string())
        .and_then(|scratch| scratch.race(rounds));
    found.push(Property::of(AFTER_A_CONFLICT, raced));
    Ok(found)
}

/// Some targets remember who made the reservation, and forget the reservation with that one.
fn first_is_fenced(open: Open<'_>, first: &dyn Fencing, at: u64) -> Result<String, String> {
    let fail = |e: DeviceError| e.to_string();
    let no_fence = "the device has no reservations";
    let (second, third, newcomer) = (open(true)?, open(true)?, open(false)?);
    let (seconds, thirds) = (second.fencing().ok_or(no_fence)?, third.fencing().ok_or(no_fence)?);
    seconds.register(key(11)).map_err(fail)?;
    // The survivor made the reservation; the second takes it out, and a third comes.
    let of_first = key(10);
    first.register(of_first).map_err(fail)?;
    seconds.fence(of_first).map_err(fail)?;
    let found = (|| {
        thirds.register(key(12)).map_err(|e| format!("nobody can register afterwards: {e}"))?;
        for (who, device) in [("who fenced it", &second), ("a newcomer", &third)] {
            device.write(at, &[5; 4096]).map_err(|e| format!("{who} is refused: {e}"))?;
        }
        match newcomer.write(at, &[6; 4096]) {
            Err(DeviceError::Fenced { .. }) => Ok("the reservation stays".into()),
            Ok(()) => Err("the reservation is gone: a host without a registration may write".into()),
            Err(e) => Err(e.to_string()),
        }
    })();
    for fencing in [thirds, seconds] {
        fencing.unregister().map_err(fail)?;
    }
    found
}

/// Swaps what `refused` has put there for itself: it changes nothing, but says whether it was allowed. Nothing goes
/// before it, so that it is the compare-and-write that meets the conflict, or the unit attention.
fn same_again(device: &dyn BlockDevice, at: u64) -> Result<(), DeviceError> {
    let block = vec![0x22; device.geometry().logical_block_bytes as usize];
    device.compare_and_write(at, &block, &block).map(drop)
}

/// A host that is not registered, as one is that was fenced: the target itself must refuse it.
fn stranger(
    open: Open<'_>,
    survivor: &dyn BlockDevice,
    at: u64,
    change: impl Fn(&dyn BlockDevice, u64) -> Result<(), DeviceError>,
    may_do_nothing: bool,
) -> Result<String, String> {
    survivor.write(at, &[0x22; 4096]).map_err(|e| e.to_string())?;
    judge(change(&*open(false)?, at), survivor, at, may_do_nothing)
}

/// What became of a change that had to be refused.
fn judge(
    outcome: Result<(), DeviceError>,
    survivor: &dyn BlockDevice,
    at: u64,
    may_do_nothing: bool,
) -> Result<String, String> {
    let mut found = vec![0; 4096];
    survivor.read(at, &mut found).map_err(|e| e.to_string())?;
    let kept = found.iter().all(|byte| *byte == 0x22);
    match (outcome, kept) {
        (Err(DeviceError::Fenced { .. }), true) => Ok("refused".into()),
        (Err(DeviceError::Fenced { .. }), false) => Err("refused, and executed all the same".into()),
        (Ok(()), true) if may_do_nothing => Ok("does nothing".into()),
        (Ok(()), true) => Err("accepted, although it changed nothing this time".into()),
        (Ok(()), false) => Err("executed".into()),
        (Err(e), true) => Err(format!("neither refused nor executed: {e}")),
        (Err(e), false) => Err(format!("executed, and an error: {e}")),
    }
}

/// Registers a host, lets it change something, fences it; then it must be refused, and what the device holds stay.
fn refused(
    open: Open<'_>,
    survivor: &dyn BlockDevice,
    host: u16,
    at: u64,
    change: impl Fn(&dyn BlockDevice, u64) -> Result<(), DeviceError>,
    may_do_nothing: bool,
) -> Result<String, String> {
    let fail = |e: DeviceError| e.to_string();
    let victim = open(true)?;
    let victims = victim.fencing().ok_or("the device has no reservations")?;
    let key = key(host);
    victims.register(key).map_err(fail)?;
    victim.write(at, &[0x11; 4096]).map_err(|e| format!("refused before it was fenced: {e}"))?;
    survivor.fencing().ok_or("the device has no reservations")?.fence(key).map_err(fail)?;
    survivor.write(at, &[0x22; 4096]).map_err(|e| format!("the one who fenced is refused: {e}"))?;
    let outcome = change(&*victim, at);
    let mut read = vec![0; 4096];
    victim.read(at, &mut read).map_err(|e| format!("a fenced host can't read: {e}"))?;
    judge(outcome, survivor, at, may_do_nothing)
}
