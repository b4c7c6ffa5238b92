//! The kernel's own initiator (iscsi_tcp, with open-iscsi) in a guest, through a proxy that does mischief, beside a guest whose disk
//! QEMU hands through.
//!
//! Unlike virtio-scsi it gives commands up: its session is lost and made again, and what it held for longer than
//! `replacement_timeout` fails.

use std::time::{Duration, Instant};

use lunfs_test_target::proxy::{Mischief, Proxy};
use lunfs_test_target::{Kind, Rule, Select};

use crate::machine::{Guest, Machine, Network, PATIENCE, Running, initiator};
use crate::pair::Pair;
use crate::volume::{coherent, leave, mkfs, mount, turns};

/// As docs/arrays.md says that it should be.
const REPLACEMENT_SECONDS: u64 = 5;

/// Logs in, and waits for /dev/sda. What runs is iscsid.
fn log_in(guest: &Guest, target: &str, port: u16) -> Running {
    guest.connect_network();
    guest.load("initiator");
    let name = initiator(&guest.name, 0);
    guest.run(&format!(
        "mkdir -p /etc/iscsi /run/lock/iscsi /var && ln -sf /run/lock /var/lock
         echo root:x:0:0:root:/:/bin/sh >/etc/passwd
         echo InitiatorName={name} >/etc/iscsi/initiatorname.iscsi
         cat >/etc/iscsi/iscsid.conf <<END
node.startup = manual
node.leading_login = No
node.session.timeo.replacement_timeout = {REPLACEMENT_SECONDS}
node.conn[0].timeo.login_timeout = 5
node.conn[0].timeo.logout_timeout = 5
node.conn[0].timeo.noop_out_interval = 2
node.conn[0].timeo.noop_out_timeout = 2
node.session.initial_login_retry_max = 8
node.session.err_timeo.abort_timeout = 5
node.session.err_timeo.lu_reset_timeout = 5
node.session.err_timeo.tgt_reset_timeout = 5
node.session.queue_depth = 32
END"
    ));
    let iscsid = guest.start_command("exec iscsid -f");
    let node = format!("iscsiadm -m node -T {target} -p 10.0.2.2:{port}");
    guest.run(&format!("{node} -o new && {node} --login && until [ -b /dev/sda ]; do sleep 0.05; done"));
    // The values of docs/arrays.md; it can't have an eh_deadline.
    guest.run("cd /sys/block/sda/device && echo 10 >timeout && echo 5 >eh_timeout");
    iscsid
}

/// Guest `g0` by its kernel's initiator through the proxy, `g1` by QEMU's.
fn boot() -> Option<(Pair, Proxy, Running)> {
    let pair = Pair::of(&["initiator"], |pair| {
        vec![Machine { network: Network::Reaches, ..pair.machine("g0", 0) }, pair.machine("g1", 1)]
    })?;
    let proxy = Proxy::start("127.0.0.1:0".parse().expect("an address"), pair.portal()).expect("a proxy");
    let iscsid = log_in(&pair.guests[0], pair.target.name(), proxy.portal().port());
    Some((pair, proxy, iscsid))
}

/// The session breaks, and breaks for longer than the kernel waits for it, while files are written; no lease ends, nothing is lost.
fn sessions_break(pair: &Pair, proxy: &Proxy) {
    let [one, other] = &pair.guests[..] else { panic!("two guests") };
    one.run("mkdir /mnt/broken");
    let load = one.start_command("agent load fill /mnt/broken 0 150");
    let mut ended = 0;
    load.wait_for("durable 10", PATIENCE);
    for n in 1..=3 {
        ended += proxy.cut();
        load.wait_for(&format!("durable {}", 10 + 20 * n), PATIENCE);
    }
    assert!(ended >= 3, "{ended} connections ended");
    // The answer to a compare-and-write and to a write is lost with the connection.
    for (kind, path) in [(Kind::CompareAndWrite, "/mnt/late-swap"), (Kind::Write, "/mnt/late-write")] {
        proxy.add_rule(Rule::new("cut", Select::kind(kind).nth(1), Mischief::CutAfter));
        other.run(&format!("echo {kind:?} >{path}"));
        assert_eq!(one.run(&format!("cat {path}; echo seen >{path}; sync {path}")), format!("{kind:?}"));
        assert_eq!(other.run(&format!("cat {path}")), "seen");
        let met: u64 = proxy.rules().iter().map(|standing| standing.fired).sum();
        proxy.clear_rules();
        assert_eq!(met, 1, "{kind:?} met the fault");
    }
    let silent = Instant::now();
    proxy.partition(None);
    std::thread::sleep(Duration::from_secs(REPLACEMENT_SECONDS + 5));
    assert!(load.so_far().status.is_none(), "it wrote although nothing came through: {:#?}", load.so_far());
    proxy.heal(None);
    load.succeed(PATIENCE);
    eprintln!("silent for 10 s; all files written {:.1} s after it began", silent.elapsed().as_secs_f64());
    other.run("agent load verify /mnt/broken 0 150");
    let said = one.run("dmesg");
    assert!(said.contains("session recovery timed out"), "the kernel gave up what it held: {said}");
}

#[test]
#[ignore = "minutes in emulated machines, run by tests/guests/run all"]
fn initiator_of_linux() {
    let Some((pair, proxy, iscsid)) = boot() else { return };
    let about = pair.guests[0].try_run("lunfs check-device --exclusive /dev/sda");
    eprintln!("{}", about.text());
    assert_eq!(about.status, Some(3), "{about:#?}");
    assert!(about.text().contains("recovery_tmo 5 s"), "{about:#?}");
    mkfs(&pair, "");
    let daemons: Vec<_> = pair.guests.iter().map(|guest| mount(guest, "")).collect();
    turns(&pair, 6);
    coherent(&pair, 2);
    sessions_break(&pair, &proxy);
    turns(&pair, 6);
    leave(&pair, daemons);
    assert!(iscsid.so_far().status.is_none(), "{:#?}", iscsid.so_far());
}
