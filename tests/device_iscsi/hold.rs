//! The hold time of the backend: how long after it was asked for is a write executed at most, whatever became of its sender?
//! And what a login under a session's old name ends, on our own target and on other people's.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lunfs::device::BlockDevice;
use lunfs_test_target::initiator::{Initiator, Login, cdb_16};
use lunfs_test_target::proxy::Proxy;
use lunfs_test_target::{Config, Fault, Kind, Rule, Select, Target};
use nix::sys::signal::{Signal, kill};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::open;
use super::targets::{Lun, each};

/// Time since the machine started, the same in every process.
fn now() -> Duration {
    Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock"))
}

const MARK: &[u8; 8] = b"asked at";

/// A target that notes how old each write is when it is executed, by the time that stands in its data.
struct Witness {
    target: Target,
    oldest_ms: Arc<AtomicU64>,
    executed: Arc<AtomicU64>,
}

impl Witness {
    fn start() -> Witness {
        let target = Target::start(Config::memory(256 << 20)).expect("the test target starts");
        let (oldest_ms, executed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let (oldest, count) = (oldest_ms.clone(), executed.clone());
        target.set_judge(Some(Box::new(move |entry, data| {
            if entry.opcode == 0x8a && entry.won() && data.starts_with(MARK) {
                let asked = u64::from_le_bytes(data[8..16].try_into().expect("8 bytes"));
                let age = now().saturating_sub(Duration::from_millis(asked));
                oldest.fetch_max(age.as_millis() as u64, Ordering::SeqCst);
                count.fetch_add(1, Ordering::SeqCst);
            }
        })));
        Witness { target, oldest_ms, executed }
    }

    /// Nothing was older than the hold time that the device publishes.
    fn judge(&self, what: &str, hold: Duration) {
        let (oldest, executed) =
            (self.oldest_ms.load(Ordering::SeqCst), self.executed.load(Ordering::SeqCst));
        println!("{what}: {executed} writes executed, the oldest {oldest} ms after it was asked for");
        assert!(executed > 0, "{what}: nothing was tested");
        assert!(u128::from(oldest) < hold.as_millis(), "{what}: one came {oldest} ms after it was asked for");
    }
}

/// Writes of all sizes that carry the time at which each was asked for, until told to stop; errors are no matter.
fn write_stamped(device: &dyn BlockDevice, threads: u64, stop: &AtomicBool) {
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut data = vec![0; 1 << 20];
                data[..8].copy_from_slice(MARK);
                let mut n = thread;
                while !stop.load(Ordering::SeqCst) {
                    n += 1;
                    let len = [4096, 64 << 10, 1 << 20][n as usize % 3];
                    data[8..16].copy_from_slice(&(now().as_millis() as u64).to_le_bytes());
                    if device.write(thread << 20, &data[..len]).is_err() {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
            });
        }
    });
}

const WRITER: &str = "LUNFS_TEST_STAMPED_WRITER";

/// Not a test by itself: the process that the next one starts and stops.
#[test]
fn writer_process() {
    let Ok(url) = std::env::var(WRITER) else { return };
    println!("writing");
    write_stamped(&*open(&url, false), 16, &AtomicBool::new(false));
}

/// A host that is stopped in the middle of what it does, and goes on when it is long dead to the others.
#[test]
fn nothing_late_of_a_process_that_was_stopped() {
    let witness = Witness::start();
    let hold = open(&witness.target.url(1), false).geometry().hold_time;
    let mut child = Command::new(std::env::current_exe().expect("this program"))
        .args(["--exact", "hold::writer_process", "--nocapture"])
        .env(WRITER, witness.target.url(1))
        .stdout(Stdio::null())
        .spawn()
        .expect("a writer");
    let pid = Pid::from_raw(child.id() as i32);
    let since = Instant::now();
    while witness.executed.load(Ordering::SeqCst) < 100 && since.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(10));
    }
    kill(pid, Signal::SIGSTOP).expect("stops");
    std::thread::sleep(hold + Duration::from_secs(1));
    kill(pid, Signal::SIGCONT).expect("goes on");
    std::thread::sleep(Duration::from_secs(3));
    child.kill().expect("ends");
    child.wait().expect("ended");
    witness.judge("stopped and continued", hold);
}

/// A target that stands still for longer than the sender waits, and then goes on with what it was sent.
#[test]
fn nothing_late_of_a_target_that_stood_still() {
    let witness = Witness::start();
    let device = open(&witness.target.url(1), false);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| write_stamped(&*device, 4, &stop));
        std::thread::sleep(Duration::from_millis(500));
        witness.target.freeze(None);
        std::thread::sleep(Duration::from_secs(7));
        witness.target.thaw(None);
        std::thread::sleep(Duration::from_secs(4));
        stop.store(true, Ordering::SeqCst);
    });
    witness.judge("frozen for 7 s", device.geometry().hold_time);
}

/// A network that holds everything back, and commands that the target holds back by itself.
#[test]
fn nothing_late_over_a_network_that_stood_still() {
    let witness = Witness::start();
    let late = Fault::Late {
        ms: 7000,
        past_session: false,
        past_abort: false,
        past_reservation: false,
        answer: true,
    };
    let select = Select::kind(Kind::Write).probability(0.002, 7);
    witness.target.add_rule(Rule::new("late", select, late));
    let proxy =
        Proxy::start("127.0.0.1:0".parse().expect("an address"), witness.target.portal()).expect("a proxy");
    let url = format!("iscsi://{}/{}/1", proxy.portal(), witness.target.name());
    let device = open(&url, false);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| write_stamped(&*device, 4, &stop));
        std::thread::sleep(Duration::from_millis(500));
        proxy.partition(None);
        std::thread::sleep(Duration::from_secs(7));
        proxy.heal(None);
        std::thread::sleep(Duration::from_secs(4));
        stop.store(true, Ordering::SeqCst);
    });
    witness.judge("parted for 7 s", device.geometry().hold_time);
}

/// Writes that a session sends at once before it is gone.
const AT_ONCE: u64 = 24;

fn login(lun: &Lun, name: &str) -> Login {
    match lun {
        Lun::Own { target, .. } => Login::to(target, name),
        Lun::Tgtd(tgtd) => Login::at(tgtd.portal(), tgtd.name(), name),
        Lun::Istgt(istgt) => Login::at(istgt.portal(), &istgt.name(), name).lun(0),
    }
}

/// Stands still as a whole, where that can be done.
fn freeze(lun: &Lun, frozen: bool) -> bool {
    match (lun, frozen) {
        (Lun::Own { target, .. }, true) => target.freeze(None),
        (Lun::Own { target, .. }, false) => target.thaw(None),
        (Lun::Tgtd(tgtd), true) => tgtd.freeze().expect("stops"),
        (Lun::Tgtd(tgtd), false) => tgtd.resume().expect("goes on"),
        (Lun::Istgt(_), _) => return false,
    }
    true
}

/// The first byte of each range that the old session wrote to.
fn seen(observer: &mut Initiator, block_bytes: usize, stride: u64) -> Vec<u8> {
    (0..AT_ONCE).map(|n| observer.read(n * stride, 1, block_bytes).expect("reads").data[0]).collect()
}

/// RFC 7143, 6.3.5: once the login under the old name was answered, nothing of the old session comes any more. The backend
/// makes a write again after that, and a host that comes back goes on at once.
#[test]
fn a_login_under_the_old_name_ends_what_was_sent() {
    each(|lun| {
        let block_bytes = open(&lun.url(), false).geometry().logical_block_bytes as usize;
        let mut observer = login(lun, "observer").ready().expect("a session");
        let rounds = if matches!(lun, Lun::Istgt(_)) { 4 } else { 40 };
        // Writes of the old session by the time of the login, and how many rounds had so many.
        let mut by_then: BTreeMap<usize, u32> = BTreeMap::new();
        for round in 0..rounds {
            let byte = round as u8 + 1;
            let mut old = login(lun, "old").ready().expect("a session");
            let stands_still = round % 2 == 1 && freeze(lun, true);
            // What fits into sockets that nobody reads.
            let bytes = if stands_still { 4096 } else { 64 << 10 };
            let stride = (64 << 10) / block_bytes as u64;
            let data = vec![byte; bytes];
            for n in 0..AT_ONCE {
                let cdb = cdb_16(0x8a, 0, n * stride, (bytes / block_bytes) as u32);
                old.send(&cdb, &data, 0).expect("sends");
            }
            drop(old);
            let again = std::thread::scope(|scope| {
                scope.spawn(|| {
                    std::thread::sleep(Duration::from_millis(30));
                    stands_still && freeze(lun, false)
                });
                login(lun, "old").connect().expect("the old name")
            });
            let at_login = seen(&mut observer, block_bytes, stride);
            std::thread::sleep(Duration::from_millis(150));
            let later = seen(&mut observer, block_bytes, stride);
            assert_eq!(at_login, later, "{}: round {round}: executed after the login", lun.name());
            *by_then.entry(at_login.iter().filter(|b| **b == byte).count()).or_default() += 1;
            drop(again);
        }
        println!("{}: of {AT_ONCE} writes were executed: in rounds {by_then:?}", lun.name());
    });
}

/// Without a login nothing but the target's pace ends them: how long is that?
#[test]
fn how_long_a_target_goes_on_without_a_login() {
    each(|lun| {
        let block_bytes = open(&lun.url(), false).geometry().logical_block_bytes as usize;
        let mut observer = login(lun, "observer").ready().expect("a session");
        let longest = Mutex::new(Duration::ZERO);
        for round in 0..4u8 {
            let mut old = login(lun, &format!("old-{round}")).ready().expect("a session");
            let stride = (64 << 10) / block_bytes as u64;
            for n in 0..AT_ONCE {
                let cdb = cdb_16(0x8a, 0, n * stride, stride as u32);
                old.send(&cdb, &vec![round + 1; 64 << 10], 0).expect("sends");
            }
            drop(old);
            let since = Instant::now();
            let mut last = seen(&mut observer, block_bytes, stride);
            while since.elapsed() < Duration::from_millis(500) {
                let next = seen(&mut observer, block_bytes, stride);
                if next != last {
                    let mut longest = longest.lock().expect("nobody panicked");
                    *longest = (*longest).max(since.elapsed());
                }
                last = next;
            }
        }
        let longest = longest.into_inner().expect("nobody panicked");
        println!("{}: the last write of a session was executed {longest:?} after its end", lun.name());
        assert!(longest < Duration::from_secs(2), "{}: {longest:?}", lun.name());
    });
}
