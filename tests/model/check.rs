//! The properties of the lock protocol.

use stateright::{Model, Property};

use super::protocol::{Action, Protocol};
use super::state::*;

pub const MUTUAL_EXCLUSION: &str = "whoever believes in exclusive is alone";
pub const CACHE_VALIDITY: &str = "what is served from a cache is the newest version";
pub const TENURE_AGREEMENT: &str = "what a host believes to hold, the disk says too, with the same tenure";
pub const FAIRNESS: &str = "nobody who began later passes a queued waiter";
pub const BOUNDED: &str = "hosts do not swap for ever";
pub const PROGRESS: &str = "every wait ends";

impl Model for Protocol {
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

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::<Self>::always(MUTUAL_EXCLUSION, |_, s| {
                let holders = s.hosts.iter().filter(|host| host.held != Held::Nothing).count();
                let exclusive = s.hosts.iter().any(|host| matches!(host.held, Held::Exclusive(_)));
                !exclusive || holders == 1
            }),
            Property::<Self>::always(CACHE_VALIDITY, |_, s| {
                s.hosts
                    .iter()
                    .filter(|host| host.held != Held::Nothing)
                    .all(|host| host.cache.is_none_or(|version| version == s.newest))
            }),
            Property::<Self>::always(TENURE_AGREEMENT, |_, s| s.hosts.iter().all(|host| agrees(s, host))),
            // A power loss takes the queue away with the image that carried it.
            Property::<Self>::always(FAIRNESS, |model, s| model.power_losses > 0 || !s.overtaken),
            Property::<Self>::always(BOUNDED, |model, s| s.lun.lock.swap_counter <= model.most_swaps),
            // Once true it stays true, so it is decided by the last state of a run alone: the checker's known
            // weakness with paths that join does not matter.
            Property::<Self>::eventually(PROGRESS, |model, s| model.all_served(s)),
        ]
    }

    fn within_boundary(&self, s: &System) -> bool {
        s.lun.lock.swap_counter <= self.most_swaps + 1
    }
}

fn agrees(s: &System, host: &Host) -> bool {
    let Some(me) = host.name else { return true };
    let says = |image: &Record| match (host.held, image.names(me)) {
        (Held::Nothing, _) => true,
        (Held::Shared, named) => named != Held::Nothing,
        (Held::Exclusive(tenure), named) => named == Held::Exclusive(tenure),
    };
    says(&s.lun.lock) && says(&s.lun.durable)
}
