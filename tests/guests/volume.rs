//! LunFS on the kernels' SCSI stacks: a volume on /dev/sda that both guests have mounted on /mnt.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::machine::{Guest, PATIENCE, Running};
use crate::pair::Pair;

/// What a daemon may end with when it slept past its lease: by its own clock, or because its slot says so (docs/recovery.md).
pub const ENDED_IN_TIME: [i32; 2] = [75, 77];

/// What LunFS can't see in a virtual machine: how long QEMU may keep a command. Its initiator gives up after 5 s.
pub const HOLD_SECONDS: u32 = 7;

/// Mounts with reservations or not at all.
pub const REQUIRED: &str = "-o fencing=required";

/// Emulated processors on a busy machine stand still for seconds, so leases are long; on a quiet one `normal` is faster.
pub fn profile() -> String {
    std::env::var("LUNFS_GUESTS_PROFILE").unwrap_or_else(|_| "slow-array".into())
}

/// A bug that the daemons in guests are to have (`lunfs::rt::planted`), to see who notices: words before a command.
pub fn planted() -> String {
    let bug = std::env::var("LUNFS_PLANTED_BUG");
    bug.map(|bug| format!("LUNFS_PLANTED_BUG={bug}")).unwrap_or_default()
}

/// Whether LunFS can use a kernel's disk; `false`, loudly, without.
fn has_backend(pair: &Pair) -> bool {
    // Nothing is on it; the question is who says so.
    let said = pair.guests[0].try_run("lunfs status /dev/sda");
    let refused = said.err.iter().any(|line| line.contains("no SCSI backend"));
    if refused {
        eprintln!("SKIPPED: {:?}", said.err);
    }
    !refused
}

/// Everything is good. One machine is one party to the target, so reservations are not asked for: status 3.
pub fn check_device(pair: &Pair) {
    let said = pair.guests[1].try_run("lunfs check-device --exclusive /dev/sda");
    eprintln!("{}", said.text());
    assert_eq!(said.status, Some(3), "{said:#?}");
    assert!(said.text().contains("verdict: good without reservations"), "{said:#?}");
}

/// From one kernel reservations can't be tried; mounts that want them need a volume that says so.
pub fn mkfs(pair: &Pair, options: &str) {
    let reservations = if options.contains("fencing=required") { "required" } else { "auto" };
    pair.guests[0].run(&format!(
        "lunfs mkfs --quiet --slots 4 --profile {} --reservations {reservations} /dev/sda",
        profile()
    ));
}

/// Mounts in the foreground, so that the end can be seen; the command runs until then.
pub fn mount(guest: &Guest, options: &str) -> Running {
    let name = &guest.name;
    let daemon =
        guest.start_command(&format!("{} LUNFS_HOLD_SECONDS={HOLD_SECONDS} exec lunfs mount --foreground --host {name} {options} /dev/sda /mnt", planted()));
    let tried = Instant::now();
    while guest.try_run("grep -q ' /mnt fuse' /proc/mounts").status != Some(0) {
        let said = daemon.so_far();
        assert!(said.status.is_none() && tried.elapsed() < PATIENCE, "{name} does not mount: {said:#?}");
    }
    daemon
}

fn unmount(guest: &Guest, daemon: Running) {
    guest.run("lunfs umount /mnt");
    daemon.succeed(PATIENCE);
}

/// Both leave, and fsck finds nothing: over a guest's kernel, and on the LUN as the target has it.
pub fn leave(pair: &Pair, daemons: Vec<Running>) {
    pair.guests.iter().zip(daemons).for_each(|(guest, daemon)| unmount(guest, daemon));
    pair.guests[1].run("lunfs fsck -n /dev/sda");
    demand_clean(pair);
}

fn demand_clean(pair: &Pair) {
    let checked = pair.lunfs(&["fsck", "-n"]);
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
}

fn states(guest: &Guest) -> Vec<(String, String)> {
    let report: Value = serde_json::from_str(&guest.run("lunfs status --json /dev/sda")).expect("JSON");
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let hosts = report["hosts"].as_array().expect("hosts");
    hosts.iter().map(|host| (text(&host["host"]), text(&host["state"]))).collect()
}

/// Files, directories, appends, renames and counters under the hands of both; in the end both see the same tree.
pub fn coherent(pair: &Pair, scale: u64) {
    let [one, other] = &pair.guests[..] else { panic!("two guests") };
    let named = |name: &str, rounds: u64| {
        let began = Instant::now();
        let said = pair.both(&format!("agent load {name} /mnt/{name} $n {rounds}"));
        eprintln!("{name}: {:.1} s, {said:?}", began.elapsed().as_secs_f64());
    };
    one.run("cd /mnt && mkdir own0 append replace move move/a move/b raise && echo -n 0 >raise/counter");
    one.run("cd /mnt/move/a && for t in $(seq 0 19); do : >t$t; done");
    // What one made the other finds at once.
    other.run("mkdir /mnt/own1 && ls /mnt/move/a | wc -l | grep -qx 20");

    pair.both(&format!("agent load fill /mnt/own$n 0 {}", 5 * scale));
    pair.both(&format!("agent load verify /mnt/own$((1 - n)) 0 {}", 5 * scale));

    named("append", 20 * scale);
    let lines = 20 * scale;
    let expected = format!("lines {{\"0\": {lines}, \"1\": {lines}}}");
    assert_eq!(pair.both("agent load appended /mnt/append"), [expected.as_str(), expected.as_str()]);

    named("replace", 10 * scale);
    named("move", 10 * scale);
    let tokens = pair.both("cd /mnt/move && ls a b | grep '^t' | sort -u | wc -l; ls a b | grep -c '^t'");
    assert_eq!(tokens, ["20\n20", "20\n20"]);

    named("raise", 5 * scale);
    let raised = (10 * scale).to_string();
    assert_eq!(pair.both("cat /mnt/raise/counter"), [raised.as_str(), raised.as_str()]);

    let trees = pair.both(
        "cd /mnt && find . | sort && find . -type f | sort | xargs sha256sum && \
         find . | sort | xargs stat -c '%n %i %f %s %h %Y'",
    );
    assert_eq!(trees[0], trees[1]);
}

/// One writes, the other reads at once: never what was before.
pub fn turns(pair: &Pair, rounds: u64) {
    for n in 1..=rounds {
        let (writer, reader) = (&pair.guests[n as usize % 2], &pair.guests[(n as usize + 1) % 2]);
        match n % 3 {
            0 => writer.run(&format!("echo {n} >/mnt/turn")),
            1 => writer.run(&format!("echo {n} >/mnt/turn.new && mv /mnt/turn.new /mnt/turn")),
            _ => writer.run(&format!("rm -f /mnt/turn && echo {n} >/mnt/turn")),
        };
        assert_eq!(reader.run("cat /mnt/turn"), n.to_string());
        assert_eq!(reader.run("stat -c %s /mnt/turn"), (n.to_string().len() + 1).to_string());
    }
}

/// A guest dies in the middle of its work; the other has what was durable, goes on, and the dead one comes back.
pub fn killed(pair: &mut Pair, daemons: &mut Vec<Running>, options: &str) {
    let [dying, other] = &pair.guests[..] else { panic!("two guests") };
    other.run("mkdir -p /mnt/killed /mnt/going");
    let load = dying.start_command("agent load fill /mnt/killed 0 100000");
    let mine = other.start_command("agent load fill /mnt/going 0 60");
    load.wait_for("durable 40", PATIENCE);
    pair.guests[0].kill();
    let died = Instant::now();
    let durable = load.so_far().out.len() as u64;
    let other = &pair.guests[1];
    other.run(&format!("agent load verify /mnt/killed 0 {durable}"));
    eprintln!(
        "killed: {durable} durable files are there {:.1} s after the death",
        died.elapsed().as_secs_f64()
    );
    mine.succeed(PATIENCE);
    other.run("agent load verify /mnt/going 0 60 && rm -r /mnt/going && mkdir /mnt/after");
    other.run("agent load fill /mnt/after 0 10");
    assert!(
        states(other).iter().any(|(name, state)| name == "g0" && state == "recovered"),
        "{:?}",
        states(other)
    );
    // Its daemon's last word never came.
    drop(daemons.remove(0));
    pair.boot_again(0);
    daemons.insert(0, mount(&pair.guests[0], options));
    pair.guests[0].run(&format!("agent load verify /mnt/killed 0 {durable}"));
    pair.guests[0].run("agent load verify /mnt/after 0 10");
    pair.guests[0].run("rm -r /mnt/killed /mnt/after");
    pair.guests[1].run("! [ -e /mnt/after ] && ! [ -e /mnt/killed ]");
}

/// A guest stands still past its lease while it writes, with commands on their way. The other takes over; when it goes on, its
/// daemon ends itself by one of the documented statuses, and nothing of it comes through any more.
///
/// With reservations (`fenced`) the target refuses the late ones; else they are only not sent by LunFS.
pub fn frozen(pair: &Pair, daemons: &mut Vec<Running>, options: &str, fenced: bool) {
    let [frozen, other] = &pair.guests[..] else { panic!("two guests") };
    frozen.run("rm -f /mnt/file && echo -n >/mnt/file");
    let load = fenced.then(|| {
        let load = frozen.start_command("agent load overwrite /mnt 1");
        load.wait_for("began", PATIENCE);
        // Commands pile up on their way, then everything stands still.
        pair.target.freeze(Some(&frozen.initiator));
        std::thread::sleep(Duration::from_millis(300));
        load
    });
    if load.is_none() {
        // Not durable yet, and nothing on its way: a command that was would be held longer than anybody can wait for.
        frozen.run("dd if=/dev/zero of=/mnt/file bs=64k count=1 conv=notrunc 2>/dev/null");
    }
    frozen.freeze();
    let stopped = Instant::now();
    other.run("agent load once /mnt 2");
    eprintln!("frozen: taken over after {:.1} s", stopped.elapsed().as_secs_f64());
    let taken = pair.target.trace_last();
    pair.target.thaw(Some(&frozen.initiator));
    std::thread::sleep(Duration::from_millis(300));
    frozen.thaw();
    let ended = daemons.remove(0).end(PATIENCE);
    let status = ended.status.unwrap_or(-1);
    eprintln!("frozen: status {status}, {} late commands refused", pair.refused(0, taken).len());
    assert!(ENDED_IN_TIME.contains(&status), "{ended:#?}");
    if let Some(load) = load {
        let load = load.end(PATIENCE);
        assert_ne!(load.status, Some(0), "{load:#?}");
    }
    let late = frozen.try_run("cat /mnt/file");
    assert_ne!(late.status, Some(0), "a dead mount serves nothing: {late:#?}");
    if fenced {
        assert!(pair.changes_of(0, taken).is_empty(), "{:#?}", pair.changes_of(0, taken));
        // The last page of the LUN, which no volume uses: what the target refuses this host, whoever asks.
        let lba = crate::pair::LUN_BYTES / 512 - 8;
        for command in ["write /dev/sda LBA 9", "swap /dev/sda LBA 0 9", "unmap /dev/sda LBA 8"] {
            let script = format!("agent scsi {}", command.replace("LBA", &lba.to_string()));
            let mut late = frozen.try_run(&script);
            // An attention comes first, once.
            if late.status == Some(5) {
                late = frozen.try_run(&script);
            }
            assert_eq!(late.status, Some(4), "{command}: {late:#?}");
        }
    }
    other.run("agent load is /mnt 2");
    frozen.run("umount -l /mnt");
    daemons.insert(0, mount(frozen, options));
    frozen.run("agent load is /mnt 2 && agent load once /mnt 3");
    other.run("agent load is /mnt 3 && rm /mnt/file");
}

/// Boots, makes a volume, mounts it in both, runs a body, and sees both leave.
pub fn with_volume(options: &str, body: impl FnOnce(&mut Pair, &mut Vec<Running>)) {
    let Some(mut pair) = Pair::boot() else { return };
    if !has_backend(&pair) {
        return;
    }
    on_volume(&mut pair, options, body);
}

pub fn on_volume(pair: &mut Pair, options: &str, body: impl FnOnce(&mut Pair, &mut Vec<Running>)) {
    mkfs(pair, options);
    let mut daemons: Vec<_> = pair.guests.iter().map(|guest| mount(guest, options)).collect();
    body(pair, &mut daemons);
    leave(pair, daemons);
}

/// What `fast` asks of LunFS, in guests that are up.
pub fn brief(pair: &mut Pair) {
    if has_backend(pair) {
        on_volume(pair, "", |pair, _| {
            turns(pair, 6);
            coherent(pair, 1);
        });
    }
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_on_a_device_that_is_good() {
    let Some(pair) = Pair::boot() else { return };
    if has_backend(&pair) {
        check_device(&pair);
    }
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_is_coherent() {
    with_volume("", |pair, _| {
        turns(pair, 60);
        coherent(pair, 10);
    });
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_is_coherent_with_reservations() {
    with_volume(REQUIRED, |pair, _| coherent(pair, 5));
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_survives_a_killed_guest() {
    with_volume("", |pair, daemons| {
        for _ in 0..2 {
            killed(pair, daemons, "");
        }
    });
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_survives_a_killed_guest_with_reservations() {
    let options = REQUIRED;
    with_volume(options, |pair, daemons| killed(pair, daemons, options));
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_survives_a_frozen_guest() {
    with_volume("", |pair, daemons| frozen(pair, daemons, "", false));
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn volume_survives_a_frozen_guest_with_reservations() {
    let options = REQUIRED;
    with_volume(options, |pair, daemons| {
        for _ in 0..2 {
            frozen(pair, daemons, options, true);
        }
    });
}
