//! How a bounded system is searched; the same for every model.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

/// What a search found.
pub struct Outcome<A> {
    pub states: usize,
    pub depth: usize,
    pub took: Duration,
    /// Each property that does not hold, with a run that shows it (not always the shortest).
    pub violated: Vec<(&'static str, Vec<A>)>,
}

/// Searches every state, or stops when one of `wanted` is violated.
pub fn search<M>(model: M, wanted: Option<&[&'static str]>) -> Outcome<M::Action>
where
    M: Model + Send + Sync + 'static,
    M::State: Hash + Send + Sync + Clone + PartialEq + 'static,
    M::Action: Clone + PartialEq,
{
    let began = Instant::now();
    let finish = match wanted {
        Some(names) => HasDiscoveries::AnyOf(BTreeSet::from_iter(names.iter().copied())),
        None => HasDiscoveries::All,
    };
    let checker = model.checker().finish_when(finish).spawn_bfs().join();
    let violated =
        checker.discoveries().into_iter().map(|(name, path)| (name, path.into_actions())).collect();
    Outcome {
        states: checker.unique_state_count(),
        depth: checker.max_depth(),
        took: began.elapsed(),
        violated,
    }
}

/// Does every property hold in every state, and does every run end? Says what it found.
pub fn is_sound<M>(name: &str, model: M) -> bool
where
    M: Model + Clone + Send + Sync + 'static,
    M::State: Hash + Send + Sync + Clone + PartialEq + 'static,
    M::Action: Clone + PartialEq + Debug,
{
    let outcome = search(model.clone(), None);
    println!(
        "{name:30} {:>8} states, depth {:>2}, {:>8.3} s",
        outcome.states,
        outcome.depth,
        outcome.took.as_secs_f64()
    );
    for (property, run) in &outcome.violated {
        println!("    not so: {property}\n    {run:?}");
    }
    let ends = !has_cycle(&model);
    if !ends {
        println!("    some run never ends");
    }
    outcome.violated.is_empty() && ends
}

/// Whether some run goes on for ever, by coming back to a state it was in.
pub fn has_cycle<M>(model: &M) -> bool
where
    M: Model,
    M::State: Hash,
{
    #[derive(Clone, Copy, PartialEq)]
    enum Mark {
        OnPath,
        Done,
    }
    fn print<S: Hash>(state: &S) -> u64 {
        let mut hasher = DefaultHasher::new();
        state.hash(&mut hasher);
        hasher.finish()
    }
    let next = |state: &M::State| {
        let mut actions = Vec::new();
        model.actions(state, &mut actions);
        let next: Vec<_> = actions.into_iter().filter_map(|action| model.next_state(state, action)).collect();
        next
    };
    let mut marks = HashMap::new();
    let mut path = Vec::new();
    for initial in model.init_states() {
        marks.insert(print(&initial), Mark::OnPath);
        path.push((print(&initial), next(&initial)));
    }
    while let Some((at, successors)) = path.last_mut() {
        let Some(state) = successors.pop() else {
            marks.insert(*at, Mark::Done);
            path.pop();
            continue;
        };
        match marks.get(&print(&state)) {
            Some(Mark::OnPath) => return true,
            Some(Mark::Done) => {}
            None => {
                marks.insert(print(&state), Mark::OnPath);
                path.push((print(&state), next(&state)));
            }
        }
    }
    false
}
