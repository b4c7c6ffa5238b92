//! The bounded systems, and what breaks in which of them without each rule.

use super::super::search::{is_sound, search};
use super::check::*;
use super::rules::Rule;
use super::state::How::{Crash, Freeze, Withdraw};
use super::{Recovery, Want};

/// A change or a read under lock 0, a change under lock 1, a change under both.
const X: Want = Want { locks: 1, changes: true };
const R: Want = Want { locks: 1, changes: false };
const Y: Want = Want { locks: 2, changes: true };
const XY: Want = Want { locks: 3, changes: true };

/// One host crashes, on a device that keeps its word and has no fence.
fn recovery(name: &'static str, wants: &[&[Want]]) -> Recovery {
    Recovery {
        name,
        without: Vec::new(),
        wants: wants.iter().map(|wants| wants.to_vec()).collect(),
        fails: vec![Crash],
        stops: 1,
        lives: 0,
        power_losses: 0,
        fences: false,
        lies: false,
        most_swaps: 14,
    }
}

fn hosts_die() -> Vec<Recovery> {
    vec![
        recovery("2, crash", &[&[X, R, X], &[X, R, X]]),
        recovery("2, two locks", &[&[XY, X], &[XY, Y]]),
        Recovery { stops: 2, ..recovery("3, crash", &[&[X, R], &[X], &[X]]) },
        Recovery { stops: 2, ..recovery("3, two locks", &[&[XY], &[X], &[Y]]) },
        Recovery {
            stops: 2,
            lives: 1,
            fails: vec![Freeze, Crash],
            ..recovery("2, freeze", &[&[X, R], &[X, X]])
        },
    ]
}

fn hosts_come_back() -> Vec<Recovery> {
    vec![
        Recovery { stops: 2, lives: 2, ..recovery("2, next life", &[&[X, R], &[X, X]]) },
        Recovery { stops: 2, lives: 1, ..recovery("2, two locks, next life", &[&[XY, X], &[X, Y]]) },
        Recovery { stops: 2, lives: 1, ..recovery("3, next life", &[&[X, R], &[X], &[]]) },
    ]
}

fn hosts_withdraw() -> Vec<Recovery> {
    vec![
        Recovery {
            stops: 2,
            lives: 1,
            fails: vec![Withdraw, Crash],
            ..recovery("2, withdraw", &[&[X, R], &[X, X]])
        },
        Recovery { stops: 2, fails: vec![Withdraw], ..recovery("3, withdraw", &[&[X, R], &[X], &[]]) },
    ]
}

fn volatile_cache() -> Vec<Recovery> {
    let power = |name, wants| Recovery { power_losses: 1, ..recovery(name, wants) };
    vec![
        power("2, power", &[&[X, R], &[X, X]]),
        Recovery { lives: 1, ..power("2, power, next life", &[&[X], &[X]]) },
        Recovery { stops: 2, lives: 1, ..power("2, power, two locks", &[&[XY], &[]]) },
        Recovery { fails: vec![Withdraw], ..power("2, power, withdraw", &[&[X], &[X]]) },
        Recovery { stops: 2, ..power("3, power", &[&[X], &[X], &[]]) },
    ]
}

/// Commands come later than the device says, but it shuts out whom it is told to.
fn fences() -> Vec<Recovery> {
    let fence = |name, wants| Recovery { stops: 2, fences: true, lies: true, ..recovery(name, wants) };
    vec![
        Recovery { fails: vec![Freeze], ..fence("3, fence", &[&[X, R], &[X], &[X]]) },
        Recovery {
            lives: 1,
            fails: vec![Crash, Withdraw],
            ..fence("3, fence, next life", &[&[X], &[X], &[]])
        },
    ]
}

fn larger() -> Vec<Recovery> {
    let every = || vec![Crash, Freeze, Withdraw];
    vec![
        Recovery { stops: 2, lives: 1, fails: every(), ..recovery("3, every end", &[&[X, R], &[X], &[]]) },
        Recovery { stops: 3, ..recovery("3, two locks, all die", &[&[XY], &[X], &[Y]]) },
        Recovery { stops: 2, lives: 1, power_losses: 2, ..recovery("2, two power losses", &[&[X, R], &[X]]) },
        Recovery {
            stops: 2,
            power_losses: 1,
            lives: 1,
            fails: vec![Crash, Withdraw],
            ..recovery("3, power, next life", &[&[X], &[X], &[]])
        },
        Recovery {
            stops: 3,
            lives: 1,
            fences: true,
            lies: true,
            ..recovery("3, fence, three ends", &[&[X], &[X], &[]])
        },
    ]
}

fn assert_sound(configurations: Vec<Recovery>) {
    for model in configurations {
        let name = model.name;
        assert!(is_sound(name, model), "{name}");
    }
}

#[test]
fn the_dead_are_recovered() {
    assert_sound(hosts_die());
}

#[test]
fn a_host_that_comes_back_recovers_its_own_last_life() {
    assert_sound(hosts_come_back());
}

#[test]
fn a_host_that_withdraws_is_recovered_at_once() {
    assert_sound(hosts_withdraw());
}

#[test]
fn a_power_loss_of_the_lun_breaks_no_recovery() {
    assert_sound(volatile_cache());
}

#[test]
fn a_fence_stops_what_comes_after_the_hold_time() {
    assert_sound(fences());
}

#[test]
#[ignore = "minutes, and gigabytes of memory: docs/locking.md"]
fn larger_bounds() {
    assert_sound(larger());
}

fn assert_needed(rule: Rule) {
    let (name, property) = broken_without(rule);
    let all = [hosts_die(), hosts_come_back(), hosts_withdraw(), volatile_cache(), fences()].concat();
    let mut model = all.into_iter().find(|model| model.name == name).expect("a configuration of that name");
    model.without = vec![rule];
    let outcome = search(model, Some(&[property]));
    let (_, run) = outcome
        .violated
        .iter()
        .find(|(broken, _)| *broken == property)
        .unwrap_or_else(|| panic!("without {rule:?}, {name}, still so: {property}"));
    println!("without {rule:?}, {name}, not so: {property}; {} steps:\n    {run:?}", run.len());
}

/// Each rule with a configuration and a property of it that fails when the rule is gone; one test each.
macro_rules! each_rule_is_needed {
    ($($test:ident: $rule:ident, $name:literal, $property:ident;)*) => {
        fn broken_without(rule: Rule) -> (&'static str, &'static str) {
            match rule {
                $(Rule::$rule => ($name, $property),)*
            }
        }

        $(
            #[test]
            fn $test() {
                assert_needed(Rule::$rule);
            }
        )*
    };
}

each_rule_is_needed! {
    a_verdict_inside_the_lease_makes_two_owners:
        LeaseEndsBeforeTheVerdict, "2, crash", MUTUAL_EXCLUSION;
    a_frozen_host_that_goes_on_is_a_second_owner:
        DoorChecksTheLease, "2, freeze", MUTUAL_EXCLUSION;
    a_verdict_before_the_hold_time_lets_late_writes_undo:
        VerdictWaitsForTheHoldTime, "2, crash", NOTHING_UNDONE;
    a_withdrawn_host_with_a_write_on_its_way_undoes:
        WithdrawnOnlyWhenItsWritesAreOver, "2, withdraw", NOTHING_UNDONE;
    a_next_life_beside_the_last_ones_commands_undoes:
        NextLifeOnlyWhenTheLastIsGone, "2, next life", NOTHING_UNDONE;
    a_next_life_that_recovers_nothing_loses:
        NextLifeRecoversTheLast, "2, next life", NOTHING_LOST;
    a_dead_owner_is_not_stepped_over:
        SettledBeforeItIsTaken, "2, crash", NEVER_STEPPED_OVER;
    recovery_without_a_mark_undoes:
        MarkBeforeReplay, "3, crash", NOTHING_UNDONE;
    a_mark_that_a_power_loss_takes_back_undoes:
        FlushTheMark, "2, power, next life", NOTHING_UNDONE;
    a_mark_without_the_incarnation_waits_for_ever:
        MarkNamesTheIncarnation, "2, next life", PROGRESS;
    a_mark_taken_from_a_living_recoverer_undoes:
        LivingRecovererKeepsItsMark, "3, crash", NOTHING_UNDONE;
    a_mark_taken_from_an_unfenced_recoverer_undoes:
        RecovererIsSettledBeforeItsMarkIsTaken, "3, fence", NOTHING_UNDONE;
    without_a_fence_a_device_that_lies_undoes:
        FenceBeforeReplay, "3, fence", NOTHING_UNDONE;
    replay_by_owner_undoes:
        ReplayByTenure, "2, crash", NOTHING_UNDONE;
    replay_without_a_swap_undoes:
        PinBeforeReplay, "2, withdraw", NOTHING_UNDONE;
    pins_that_a_power_loss_takes_back_undo:
        FlushBeforePuttingInPlace, "2, power, withdraw", NOTHING_UNDONE;
    publishing_before_the_flush_loses:
        FlushBeforePublishing, "2, power", NOTHING_LOST;
    a_flush_across_a_reset_loses:
        FlushProvesOneResetCount, "2, power", NOTHING_LOST;
    a_take_over_under_the_old_change_counter_serves_old_bytes:
        RaiseCounterOnTakeOver, "2, crash", CACHE_VALIDITY;
    a_lock_that_leaves_before_its_blocks_loses:
        WriteInPlaceBeforeRelease, "2, crash", NOTHING_LOST;
    an_acknowledged_commit_that_is_not_flushed_loses:
        AcknowledgeAfterTheFlush, "2, power", NOTHING_LOST;
}
