//! Histories of calls of all hosts: is there one order that explains every answer?

use std::collections::HashSet;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lunfs::rt::sim;

/// One call: when it was made and answered, and what it was and said.
#[derive(Clone, Copy, Debug)]
pub struct Call<O> {
    pub begun: Duration,
    pub ended: Duration,
    pub op: O,
}

/// Calls of many threads, in the order of their answers.
pub struct History<O>(Arc<Mutex<Vec<Call<O>>>>);

impl<O> Clone for History<O> {
    fn clone(&self) -> Self {
        History(self.0.clone())
    }
}

impl<O: Copy> History<O> {
    pub fn new() -> Self {
        History(Arc::default())
    }

    /// Makes a call and notes it.
    pub fn call(&self, work: impl FnOnce() -> O) -> O {
        let begun = sim::now().unwrap();
        let op = work();
        let ended = sim::now().unwrap();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Call { begun, ended, op });
        op
    }

    pub fn calls(&self) -> Vec<Call<O>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Is there an order of the calls, each between its begin and its end, in which every one is possible? `apply` says what
/// a call makes of a state, if it can have been answered as it was. (After Wing and Gong, with the states that were
/// tried remembered.)
pub fn is_linearizable<S: Clone + Eq + Hash, O>(
    initial: S,
    calls: &[Call<O>],
    apply: impl Fn(&S, &O) -> Option<S>,
) -> bool {
    assert!((1..=128).contains(&calls.len()), "{} calls", calls.len());
    let all = u128::MAX >> (128 - calls.len());
    let mut tried = HashSet::new();
    let mut todo = vec![(0u128, initial)];
    while let Some((done, state)) = todo.pop() {
        if done == all {
            return true;
        }
        if !tried.insert((done, state.clone())) {
            continue;
        }
        let open = || calls.iter().enumerate().filter(|(i, _)| done & (1 << i) == 0);
        let first_end = open().map(|(_, c)| c.ended).min().unwrap_or_default();
        for (i, call) in open().filter(|(_, c)| c.begun <= first_end) {
            todo.extend(apply(&state, &call.op).map(|next| (done | 1 << i, next)));
        }
    }
    false
}
