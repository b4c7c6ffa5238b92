//! Every fault of the target and of the way to it, at every kind of command. What was answered is true, what was not is
//! said to be unknown and never comes late, and no fault that passes ends the host: the device goes on, unfenced.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use lunfs::device::{AlignedBuf, BlockDevice, CompareOutcome, DeviceError, Executed};
use lunfs_test_target::proxy::{Mischief, Proxy};
use lunfs_test_target::{Config, Fault, Kind, Rule, Select, Target, Which};

use super::devices::{key, read_block};
use super::open;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Command {
    Read,
    Write,
    /// With data that does not come with the command.
    LargeWrite,
    Swap,
    Flush,
    Discard,
    Zeroes,
    Register,
    Unregister,
}

use Command::*;

const ALL: [Command; 9] = [Read, Write, LargeWrite, Swap, Flush, Discard, Zeroes, Register, Unregister];

impl Command {
    fn kind(self) -> Kind {
        match self {
            Read => Kind::Read,
            Write | LargeWrite => Kind::Write,
            Swap => Kind::CompareAndWrite,
            Flush => Kind::Flush,
            Discard => Kind::Unmap,
            Zeroes => Kind::WriteSame,
            Register | Unregister => Kind::PrOut,
        }
    }

    /// How long it may take whatever happens: to a new session, or until it is given up.
    fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Swap => 2,
            Flush => 33,
            Register | Unregister => 12,
            _ => 9,
        })
    }
}

const PLACE: u64 = 1 << 20;
const BYTES: usize = 8192;
/// More than any target takes before it asks for the rest.
const LARGE_BYTES: usize = 1 << 20;

/// Executed as was said, and what it did is there.
fn content(device: &dyn BlockDevice, len: usize) -> Vec<u8> {
    let mut buf = AlignedBuf::zeroed(len);
    device.read(PLACE, &mut buf).expect("reads again");
    buf.to_vec()
}

/// Makes the command and says what is wrong with what came of it.
fn perform(device: &dyn BlockDevice, command: Command) -> Result<(), DeviceError> {
    let full = |byte: u8, len: usize| vec![byte; len];
    match command {
        Read => {
            let mut buf = full(9, BYTES);
            device.read(PLACE, &mut buf)?;
            assert_eq!(buf, full(1, BYTES), "read something else");
        }
        Write | LargeWrite => {
            let len = if command == Write { BYTES } else { LARGE_BYTES };
            device.write(PLACE, &full(2, len))?;
            assert_eq!(content(device, len), full(2, len), "answered and not there");
        }
        Swap => {
            let outcome = device.compare_and_write(PLACE, &full(1, 512), &full(2, 512))?;
            assert_eq!(outcome, CompareOutcome::Swapped);
            assert_eq!(content(device, 512), full(2, 512));
        }
        Flush => device.flush()?,
        Discard => device.discard(PLACE, BYTES as u64)?,
        Zeroes => {
            device.write_zeroes(PLACE, BYTES as u64)?;
            assert_eq!(content(device, BYTES), full(0, BYTES), "answered and not there");
        }
        Register => {
            device.fencing().expect("reservations").register(key(1))?;
            device.write(PLACE, &full(1, BYTES))?;
        }
        Unregister => device.fencing().expect("reservations").unregister()?,
    }
    Ok(())
}

/// One command that meets one fault, on a device of its own.
fn meet(what: &str, target: &Target, url: &str, command: Command, add_rule: impl FnOnce()) {
    let device = open(url, true);
    if command != Register {
        device.fencing().expect("reservations").register(key(1)).expect("registers");
    }
    device.write(PLACE, &[1; LARGE_BYTES]).expect("writes");
    add_rule();
    let since = Instant::now();
    let outcome = perform(&*device, command);
    let took = since.elapsed();
    assert!(took < command.patience(), "{what}: {took:?}: {outcome:?}");
    let before = [1; 512];
    match &outcome {
        Ok(()) => {}
        Err(DeviceError::TimedOut { .. }) => assert!(
            matches!(command, Write | LargeWrite | Swap | Discard | Zeroes),
            "{what}: {outcome:?}: may be asked again and was not"
        ),
        Err(error @ DeviceError::Io { .. }) if error.executed() == Executed::No => {
            assert_eq!(content(&*device, 512), before, "{what}: {error}");
        }
        Err(error) => {
            let decided_by_content = command == Swap && error.executed() == Executed::Maybe;
            assert!(decided_by_content, "{what}: {error}");
        }
    }
    // It goes on, under its registration, and what was given up does not come any more.
    let found = read_block(&*device, PLACE);
    if command == Swap {
        assert!(found[..] == before || found[..] == [2; 512], "{what}: half of a block");
        let next = [7; 512];
        let again = device.compare_and_write(PLACE, &found, &next);
        assert_eq!(again.unwrap_or_else(|e| panic!("{what}: {e}")), CompareOutcome::Swapped, "{what}");
    }
    if command == Unregister {
        assert_eq!(target.reservations(1).expect("a LUN").registrations.len(), 0, "{what}: still registered");
        return;
    }
    let write = |byte: u8| {
        device.write(PLACE, &vec![byte; BYTES]).unwrap_or_else(|e| panic!("{what}: then: {e}"));
    };
    write(5);
    device.flush().unwrap_or_else(|e| panic!("{what}: then: {e}"));
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(content(&*device, BYTES), vec![5; BYTES], "{what}: came late");
}

fn faults() -> Vec<Fault> {
    let late = |ms| Fault::Late {
        ms,
        past_session: false,
        past_abort: false,
        past_reservation: false,
        answer: true,
    };
    let check = |key, executed| Fault::Check { key, asc: 0, ascq: 0, executed, only_blocks: None };
    vec![
        Fault::LoseAnswer,
        Fault::Drop,
        late(700),
        late(6200),
        Fault::AnswerLate { ms: 700 },
        Fault::Twice { gap_ms: 0, answer: Which::First },
        Fault::Attention { asc: 0x29, ascq: 0 },
        Fault::Attention { asc: 0x2a, ascq: 0x09 },
        Fault::Attention { asc: 0x3f, ascq: 0x0e },
        Fault::Status { status: 0x08 },
        Fault::Status { status: 0x28 },
        Fault::Status { status: 0x40 },
        check(0xb, true),
        check(0xb, false),
        Fault::Cut { executed: true },
        Fault::Cut { executed: false },
    ]
}

fn mischiefs() -> Vec<Mischief> {
    vec![
        Mischief::CutBefore,
        Mischief::CutAfter,
        Mischief::Drop,
        Mischief::LoseAnswer,
        Mischief::Delay { ms: 700 },
        Mischief::AnswerLate { ms: 700 },
        Mischief::Double { gap_ms: 0, answer: Which::First },
    ]
}

/// Works through the cases with many threads, which mostly wait; all that fail are told.
fn all<T: Send + Clone + std::fmt::Debug>(faults: Vec<T>, meet: impl Fn(&str, Command, T) + Sync) {
    let mut cases: Vec<(Command, T)> =
        ALL.iter().flat_map(|command| faults.iter().map(|fault| (*command, fault.clone()))).collect();
    // Taken from the end: those that wait longest first.
    cases.sort_by_key(|(command, _)| command.patience());
    let (cases, failed) = (Mutex::new(cases), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                loop {
                    let Some((command, fault)) = cases.lock().expect("nobody panics here").pop() else {
                        return;
                    };
                    let what = format!("{command:?} meets {fault:?}");
                    let met = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        meet(&what, command, fault)
                    }));
                    if met.is_err() {
                        failed.lock().expect("nobody panics here").push(what);
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().expect("nobody panics here");
    assert!(failed.is_empty(), "{} cases failed: {failed:#?}", failed.len());
}

fn target() -> Target {
    Target::start(Config::memory(64 << 20)).expect("the test target starts")
}

#[test]
fn every_fault_of_the_target_at_every_command() {
    all(faults(), |what, command, fault| {
        let target = target();
        meet(what, &target, &target.url(1), command, || {
            target.add_rule(Rule::new("it", Select::kind(command.kind()).nth(1), fault));
        });
        assert_eq!(target.fired("it"), 1, "{what}: it did not meet it");
    });
}

#[test]
fn every_mischief_of_the_network_at_every_command() {
    all(mischiefs(), |what, command, mischief| {
        // The proxy can't double what does not come with the command.
        if command == LargeWrite && matches!(mischief, Mischief::Double { .. }) {
            return;
        }
        let target = target();
        let listen = "127.0.0.1:0".parse().expect("an address");
        let proxy = Proxy::start(listen, target.portal()).expect("a proxy");
        let url = format!("iscsi://{}/{}/1", proxy.portal(), target.name());
        meet(what, &target, &url, command, || {
            proxy.add_rule(Rule::new("it", Select::kind(command.kind()).nth(1), mischief));
        });
        assert_eq!(proxy.rules()[0].fired, 1, "{what}: it did not meet it");
    });
}

/// What does not pass is an error, and ends nobody either.
#[test]
fn what_the_medium_refuses_is_an_error_at_every_command() {
    let check = |key, executed| Fault::Check { key, asc: 0x11, ascq: 0, executed, only_blocks: None };
    for command in ALL {
        for fault in [check(3, false), check(4, false)] {
            let target = target();
            let device = open(&target.url(1), true);
            let fencing = device.fencing().expect("reservations");
            if command != Register {
                fencing.register(key(1)).expect("registers");
            }
            device.write(PLACE, &[1; BYTES]).expect("writes");
            target.add_rule(Rule::new("it", Select::kind(command.kind()), fault.clone()));
            let error = perform(&*device, command).expect_err("the medium refuses");
            assert!(matches!(error, DeviceError::Io { .. }), "{command:?} meets {fault:?}: {error}");
            target.clear_rules();
            fencing.register(key(2)).expect("registers again");
            device.write(PLACE, &[1; BYTES]).expect("writes again");
        }
    }
}
