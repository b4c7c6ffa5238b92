//! The lock protocol as a bounded model, searched exhaustively for two and three hosts.
//!
//! # What is modelled
//!
//! One lock, the one block that it covers, and hosts that meet only on the LUN.
//!
//! - The lock record with all its counters; acquire, join a share, upgrade, yield, hand over, downgrade for a waiting
//!   sharer, take over from an owner or sharers that left. Locks stay cached until somebody asks.
//! - Request blocks (plain writes) and doorbells (swaps). A configuration has either the doorbells alone, so that
//!   nothing catches a lost ring, or the safety net alone.
//! - Swaps whose answer is lost: executed, executed later, or never. The host reads the block again and decides.
//! - Threads that give up a wait, before or after the lock is handed to their host.
//! - A volatile device cache: a power loss takes the lock block back to what was flushed, or destaged by itself.
//! - Slots left cleanly, with locks still in the leaver's name, and claimed by another host.
//! - Each host's cached copy of the covered block and the change counter it belongs to. Every exclusive want writes a
//!   new version, first in memory only.
//!
//! The properties are in `model/check.rs`: mutual exclusion, cache validity, agreement of belief and disk, fairness,
//! a bound on the swaps, and progress. Progress is checked without any assumption of fairness: the graph of states has
//! no cycle (`has_cycle`), so every run ends, and at its end all wants are served. A run that could end only because of
//! an accident (a late swap, a thread that gives up, a power loss) counts as stuck.
//!
//! # What is not
//!
//! - Death, leases, recovery, journals: a second model beside this one, `model/recovery.rs`.
//! - Time. A host that is not scheduled is a slow host; leases are in the second model.
//! - The rest of the LUN in a power loss: slots, requests and doorbells are durable at once. In-place writes are
//!   durable before the lock leaves, as the rules of the cache demand.
//! - Openers, several locks, lock order, threads inside a host.
//!
//! # How fine a step is
//!
//! One step is one command, with these exceptions.
//!
//! - Reading the lock and swapping it is one step: a swap against an image that has gone changes nothing, and an image
//!   comes back under its nonce only by a power loss, which late swaps and take-overs do see.
//! - Reading the requests belongs to the same step: a request withdrawn after it was read is much like a thread that
//!   gives up after the hand-over. The configurations called "reads apart" do without this one: there a holder reads
//!   the lock, then the requests, and swaps later, against the image that it read first.
//! - Reading several request blocks, or several slots, is one step.
//! - Writing the covered block in place and flushing it is part of the release or of the unmount.
//!
//! # Bounds
//!
//! Each configuration below states them: wants per host, lost answers, power losses, waits given up, slots left and
//! claimed. Within them every state is visited; `--nocapture` prints the counts.
//!
//! # To add a rule
//!
//! Add a variant to `Rule` that says what a host does without it, ask `has(rule)` at the place where it is kept, and
//! name in `broken_without` the configuration and the property that fail when it is gone. Add a configuration if no
//! present one is cruel enough.

mod model {
    pub mod acquire;
    pub mod check;
    pub mod doorbell;
    pub mod pass_on;
    pub mod protocol;
    pub mod recovery;
    pub mod rules;
    pub mod search;
    pub mod state;
}

use model::check::*;
use model::protocol::{Demand, Protocol};
use model::rules::{Rule, Rules};
use model::search::{is_sound, search};
use model::state::Mode;

const S: Mode = Mode::Shared;
const X: Mode = Mode::Exclusive;

fn doorbell(name: &'static str, wants: &[&[Mode]]) -> Protocol {
    Protocol {
        name,
        rules: Rules::all(),
        demand: Demand::Doorbell,
        wants: wants.iter().map(|wants| wants.to_vec()).collect(),
        leaves: Vec::new(),
        enters: Vec::new(),
        lost_answers: 0,
        lost_bell_answers: 0,
        power_losses: 0,
        give_ups: 0,
        reads_apart: false,
        most_swaps: 24,
    }
}

fn net(name: &'static str, wants: &[&[Mode]]) -> Protocol {
    Protocol { demand: Demand::Net, ..doorbell(name, wants) }
}

fn two_hosts() -> Vec<Protocol> {
    vec![
        Protocol {
            give_ups: 1,
            lost_bell_answers: 1,
            reads_apart: true,
            ..doorbell("2, doorbell, reads apart", &[&[S, X], &[X, S]])
        },
        Protocol {
            give_ups: 1,
            lost_answers: 1,
            reads_apart: true,
            ..net("2, net, reads apart", &[&[S, X, S], &[X, S]])
        },
        doorbell("2, doorbell", &[&[S, X, S], &[X, S, X]]),
        Protocol {
            lost_bell_answers: 2,
            give_ups: 1,
            ..doorbell("2, doorbell, late rings", &[&[S, X], &[X, S]])
        },
        Protocol {
            lost_answers: 1,
            give_ups: 1,
            ..doorbell("2, doorbell, late swaps", &[&[S, S, X], &[S, X]])
        },
        Protocol { most_swaps: 16, ..net("2, net", &[&[X, S], &[X, S]]) },
        Protocol { lost_answers: 2, give_ups: 1, ..net("2, net, late swaps", &[&[S, X, S], &[X, S]]) },
        Protocol { lost_answers: 2, ..net("2, net, late swaps, long", &[&[X, S, X], &[X, S, X]]) },
        Protocol { lost_answers: 1, give_ups: 1, ..net("2, net, late swap", &[&[S, S, X], &[X, X]]) },
    ]
}

fn three_hosts() -> Vec<Protocol> {
    vec![
        Protocol {
            give_ups: 1,
            reads_apart: true,
            ..doorbell("3, doorbell, reads apart", &[&[S, X], &[X], &[X]])
        },
        Protocol {
            give_ups: 1,
            lost_answers: 1,
            reads_apart: true,
            ..net("3, net, reads apart", &[&[S, X], &[S], &[X]])
        },
        doorbell("3, doorbell", &[&[S, X], &[X, S], &[X]]),
        Protocol { give_ups: 1, ..doorbell("3, doorbell, give up", &[&[S, X], &[X], &[X]]) },
        Protocol { lost_bell_answers: 1, ..doorbell("3, doorbell, late ring", &[&[S, X], &[S], &[X]]) },
        Protocol { lost_answers: 1, ..doorbell("3, doorbell, late swap", &[&[S, X], &[S], &[X]]) },
        Protocol { lost_answers: 1, ..net("3, net, late swap", &[&[S, X], &[S, X], &[X]]) },
    ]
}

fn volatile_cache() -> Vec<Protocol> {
    vec![
        Protocol { power_losses: 2, ..net("2, power", &[&[S, X, X], &[S, X, X]]) },
        Protocol { power_losses: 1, lost_answers: 1, ..net("2, power, late swap", &[&[S, X], &[S, X, X]]) },
        Protocol { power_losses: 1, give_ups: 2, ..net("2, power, give up", &[&[X, X], &[S, X, S]]) },
        Protocol {
            power_losses: 1,
            give_ups: 1,
            reads_apart: true,
            ..net("2, power, reads apart", &[&[S, X], &[S, X, X]])
        },
        Protocol { power_losses: 1, ..net("3, power", &[&[S, X], &[X], &[X]]) },
    ]
}

/// Host 0 (and 1) unmounts and leaves its locks behind; host 2 claims a slot that was left.
fn slots() -> Vec<Protocol> {
    vec![
        Protocol {
            leaves: vec![0, 1],
            enters: vec![2],
            give_ups: 1,
            reads_apart: true,
            ..net("3, slots, reads apart", &[&[S, X], &[S, X], &[S]])
        },
        Protocol {
            leaves: vec![0],
            enters: vec![2],
            lost_answers: 1,
            ..net("3, slots, late swap", &[&[S, X], &[S, X], &[S, X]])
        },
        Protocol {
            leaves: vec![0, 1],
            enters: vec![2],
            lost_answers: 1,
            give_ups: 1,
            ..net("3, slots, give up", &[&[S, X], &[S, X], &[S]])
        },
        Protocol {
            leaves: vec![0, 1],
            enters: vec![2],
            ..doorbell("3, slots, doorbell", &[&[S, X], &[S, X], &[S, X]])
        },
        Protocol {
            leaves: vec![0, 1],
            enters: vec![2],
            power_losses: 1,
            ..net("3, slots, power", &[&[S, X], &[S], &[X]])
        },
        Protocol {
            leaves: vec![0],
            lost_answers: 1,
            power_losses: 1,
            ..net("2, slots, power, late swap", &[&[S, X], &[S, X, X]])
        },
    ]
}

/// A configuration and a property of it that fails when the rule is gone.
fn broken_without(rule: Rule) -> (&'static str, &'static str) {
    match rule {
        Rule::ReleaseEndsTenureAtIssue => ("2, net, late swap", MUTUAL_EXCLUSION),
        Rule::UndecidedNeedsAnotherSwap => ("2, net, late swap", MUTUAL_EXCLUSION),
        Rule::NonceIsUnique => ("2, doorbell, late rings", PROGRESS),
        Rule::UnknownTenureIsNewGrant => ("2, net, late swaps, long", CACHE_VALIDITY),
        Rule::OldTenuresStayOld => ("2, power, give up", CACHE_VALIDITY),
        Rule::InvalidateUnlessCounterEqual => ("2, doorbell", CACHE_VALIDITY),
        Rule::RaiseCounterOnChange => ("2, doorbell", CACHE_VALIDITY),
        Rule::RaiseCounterOnTakeOver => ("3, slots, doorbell", CACHE_VALIDITY),
        Rule::RaiseCounterOnOwnOldTenure => ("3, power", CACHE_VALIDITY),
        Rule::WriteInPlaceBeforeRelease => ("2, doorbell", CACHE_VALIDITY),
        Rule::FlushBeforeActing => ("3, power", MUTUAL_EXCLUSION),
        Rule::FlushProvesOneResetCount => ("3, power", MUTUAL_EXCLUSION),
        Rule::ShareSwapsEvenIfBitSet => ("3, slots, doorbell", MUTUAL_EXCLUSION),
        Rule::ShareGrantBelongsToThisWait => ("2, net, late swap", MUTUAL_EXCLUSION),
        Rule::ImageBeforeSlot => ("3, slots, doorbell", MUTUAL_EXCLUSION),
        Rule::SharerAlwaysYields => ("2, doorbell", PROGRESS),
        Rule::YieldingUpgraderKeepsItsPlace => ("3, net, late swap", FAIRNESS),
        Rule::OnlyOwnerSwapsExclusive => ("2, doorbell", MUTUAL_EXCLUSION),
        Rule::RequestBeforeRing => ("2, doorbell", PROGRESS),
        Rule::ClearBeforeReading => ("2, doorbell", PROGRESS),
        Rule::DoorbellReadFromDisk => ("2, doorbell", PROGRESS),
        Rule::NewHolderIsRung => ("3, doorbell, give up", PROGRESS),
        Rule::HandOverCarriesWaiters => ("3, doorbell, give up", FAIRNESS),
        Rule::CarriedWaiterRingsToo => ("3, doorbell, give up", PROGRESS),
        Rule::ImageKnowsOlderRequestsOnly => ("3, doorbell, give up", FAIRNESS),
        Rule::WithdrawBeforePassingOn => ("2, net", BOUNDED),
        Rule::NobodyJumpsTheQueue => ("3, doorbell, give up", FAIRNESS),
        Rule::RungHolderReadsTheBlock => ("3, doorbell, give up", PROGRESS),
    }
}

fn assert_sound(configurations: Vec<Protocol>) {
    for model in configurations {
        let name = model.name;
        assert!(is_sound(name, model), "{name}");
    }
}

#[test]
fn two_hosts_share_a_lock() {
    assert_sound(two_hosts());
}

#[test]
fn three_hosts_share_a_lock() {
    assert_sound(three_hosts());
}

#[test]
fn a_power_loss_of_the_lun_breaks_no_lock() {
    assert_sound(volatile_cache());
}

#[test]
fn slots_change_hands() {
    assert_sound(slots());
}

#[test]
fn removing_any_one_rule_breaks_a_property() {
    let all = [two_hosts(), three_hosts(), volatile_cache(), slots()].concat();
    let mut kept = Vec::new();
    for rule in Rule::ALL {
        let (name, property) = broken_without(rule);
        let mut model = all
            .iter()
            .find(|model| model.name == name)
            .unwrap_or_else(|| panic!("{rule:?} names no configuration: {name}"))
            .clone();
        model.rules = model.rules.without(rule);
        let outcome = search(model, Some(&[property]));
        match outcome.violated.iter().find(|(broken, _)| *broken == property) {
            Some((_, run)) => {
                println!("without {rule:?}, {name}, not so: {property}; {} steps:", run.len());
                println!("    {run:?}");
            }
            None => kept.push(rule),
        }
    }
    assert!(kept.is_empty(), "nothing breaks without {kept:?}");
}
