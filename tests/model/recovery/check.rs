//! The properties of death and recovery.

use stateright::{Model, Property};

use super::state::*;
use super::{Action, Recovery};

pub const MUTUAL_EXCLUSION: &str = "whoever believes in exclusive inside its lease is alone";
pub const CACHE_VALIDITY: &str = "what is served from a cache is what is in place, or newer and its own";
pub const TENURE_AGREEMENT: &str = "what a host believes to hold, the disk says too, with the same tenure";
pub const NOTHING_LOST: &str = "what was acknowledged is in place, or in a journal that will be replayed";
pub const NOTHING_UNDONE: &str = "no image comes over a newer one";
pub const WHOLE: &str = "what a settled life changed in one transaction is in all its places or in none";
pub const NEVER_STEPPED_OVER: &str = "nobody acts on what a dead one held before it is settled";
pub const PROGRESS: &str = "while a host lives, every dead one is settled and every want served in the end";

impl Model for Recovery {
    type State = System;
    type Action = Action;

    fn init_states(&self) -> Vec<System> {
        vec![self.initial()]
    }

    fn actions(&self, state: &System, actions: &mut Vec<Action>) {
        self.possible(state, actions);
    }

    fn next_state(&self, last: &System, action: Action) -> Option<System> {
        let mut state = last.clone();
        self.apply(&mut state, action);
        Some(state)
    }

    /// Where a rule is gone a run may never end.
    fn within_boundary(&self, s: &System) -> bool {
        s.lun.now.locks.iter().all(|lock| lock.swap_counter <= self.most_swaps)
            && s.lun.now.slots.iter().all(|slot| slot.beat <= self.most_swaps)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(MUTUAL_EXCLUSION, |_, s| {
                (0..MAX_LOCKS).all(|lock| holders(s, lock).count() <= 1)
            }),
            Property::<Self>::always(CACHE_VALIDITY, |_, s| {
                (0..MAX_LOCKS).all(|lock| holders(s, lock).all(|host| is_valid(s, host, lock)))
            }),
            Property::<Self>::always(TENURE_AGREEMENT, |_, s| {
                (0..MAX_LOCKS).all(|lock| holders(s, lock).all(|host| agrees(s, host, lock)))
            }),
            Property::<Self>::always(NOTHING_LOST, |_, s| (0..MAX_LOCKS).all(|lock| is_kept(s, lock))),
            Property::<Self>::always(NOTHING_UNDONE, |_, s| !s.undone),
            Property::<Self>::always(WHOLE, |_, s| {
                s.made.iter().enumerate().all(|(change, made)| {
                    let contains = |lock: usize| s.lun.now.blocks[lock] & 1 << change != 0;
                    let places = locks_in(made.locks).filter(|lock| contains(*lock)).count();
                    !s.lun.now.settled(made.by) || places == 0 || places == locks_in(made.locks).count()
                })
            }),
            Property::<Self>::always(NEVER_STEPPED_OVER, |_, s| !s.stepped_over),
            // Nothing but an accident (a death, a late command, a new life) could go on from here.
            Property::<Self>::always(PROGRESS, |model, s| {
                let mut actions = Vec::new();
                model.possible(s, &mut actions);
                actions.iter().any(Action::is_work) || model.is_finished(s)
            }),
        ]
    }
}

/// The hosts inside their lease that believe to hold the lock.
fn holders(s: &System, lock: usize) -> impl Iterator<Item = &Host> {
    s.hosts.iter().filter(move |host| host.life == Life::Running && host.locks[lock].held != Held::Nothing)
}

fn is_valid(s: &System, host: &Host, lock: usize) -> bool {
    let holding = &host.locks[lock];
    let in_place = s.lun.now.blocks[lock];
    holding.cache.is_none_or(|content| match holding.way {
        Way::InPlace | Way::Written => content == in_place,
        Way::Changed | Way::Logged | Way::Committed => in_place & !content == 0,
    })
}

fn agrees(s: &System, host: &Host, lock: usize) -> bool {
    let says = |media: &Media| media.locks[lock].names(host.me) == host.locks[lock].held;
    says(&s.lun.now) && s.lun.durable.as_ref().is_none_or(says)
}

fn is_kept(s: &System, lock: usize) -> bool {
    let now = &s.lun.now;
    let kept_in = |content: Changes| s.acknowledged[lock] & !content == 0;
    kept_in(now.blocks[lock])
        || now.journals.iter().zip(0..).any(|(journal, slot)| {
            let logger = Name { slot, incarnation: journal.incarnation };
            let held = now.locks[lock].names(logger);
            let valid = |image: &&Logged| image.lock == lock && held == Held::Exclusive(image.tenure);
            !now.settled(logger) && journal.images.iter().filter(valid).any(|image| kept_in(image.content))
        })
}
