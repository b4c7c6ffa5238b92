//! Which attributes the kernel has surely taken in: only those may it keep.
//!
//! Linux takes an answer's attributes into its inode in this order: first "these are valid, until then", then
//! mode, owner, times and last the size (`fuse_change_attributes_common` and its caller, fs/fuse/inode.c, seen
//! in 6.18), and a stat that needs no request looks at the validity without the inode's lock. So a stat in
//! between shows the values of before, however old and however thoroughly invalidated, as valid ones. A server
//! of fifty lines with one file shows it: 11 stale sizes in 19,500 changes on two processors.
//!
//! The way out: attributes are answered with no validity until the kernel has the very same ones. Then a stat
//! that falls into the gap shows values that don't differ. How we know that the kernel has them:
//!
//! * A thread sends its next request after it took in the answer to the one before (requests of the kind that
//!   a thread waits for; FUSE names the thread).
//! * The kernel drops an answer whose request is older than the last invalidation. What a thread asks after it
//!   was answered since then is not dropped.
//!
//! Both together: a thread was answered at or after the first answer with these attributes, then asked and
//! was given them, then asked for anything. On the way a loop of stats costs two requests for each change.
//!
//! A narrower gap stays. "Valid until then" is two fields, written one after the other and read one after the
//! other: whoever reads one of them before the first answer is taken in and the other just then pairs the old
//! time with the new validity. That takes a stat within nanoseconds of the first one after a change, in a file
//! whose attributes were kept before the change. So attributes that change quickly are never kept
//! ([`STEADY`]), which leaves one such moment in a while instead of one for each hand-over.
//!
//! Changes by this host's own programs are not covered: the kernel shows their sizes by itself, and their
//! times with the order above.
//!
//! An entry (LOOKUP, CREATE, ...) never says that its attributes may be kept: it may make the kernel's inode
//! anew, and an invalidation that finds no inode leaves no trace for the answer that comes in after it.
//!
//! What is forgotten here costs a request, nothing else. Not for: names and pages.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;

use super::request::NodeId;
use crate::fs::api::Attributes;
use crate::rt::Instant;

const SHARDS: usize = 16;
/// Threads remembered, in each shard: those that talked last.
const THREADS: NonZeroUsize = NonZeroUsize::new(512).expect("not zero");

/// Attributes that were first answered less than this ago are not kept. Long beside a hand-over (some
/// milliseconds), short beside the time between two looks of a person.
const STEADY: Duration = Duration::from_millis(50);

/// A moment in this mount's life: answers and requests in the order in which we handled them.
type Moment = u64;
/// Stands for the values of an inode's attributes.
type Digest = u64;

struct Node {
    digest: Digest,
    /// When these attributes were first answered.
    since: Moment,
    since_time: Instant,
    taken_in: bool,
}

#[derive(Default)]
struct Thread {
    /// A moment by which it had been answered, before it sent what it sends next.
    answered: Moment,
    /// What it was given and takes in for sure before it sends what it sends next.
    given: Option<(NodeId, Digest)>,
}

pub struct TakenIn {
    steady: Duration,
    clock: AtomicU64,
    nodes: [Mutex<HashMap<NodeId, Node>>; SHARDS],
    threads: [Mutex<LruCache<u32, Thread>>; SHARDS],
}

fn digest(attributes: &Attributes) -> Digest {
    let mut hasher = DefaultHasher::new();
    attributes.hash(&mut hasher);
    hasher.finish()
}

fn lock<T>(shard: &Mutex<T>) -> MutexGuard<'_, T> {
    shard.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for TakenIn {
    fn default() -> Self {
        TakenIn {
            steady: STEADY,
            clock: AtomicU64::new(1),
            nodes: Default::default(),
            threads: std::array::from_fn(|_| Mutex::new(LruCache::new(THREADS))),
        }
    }
}

impl TakenIn {
    fn nodes_of(&self, node: NodeId) -> MutexGuard<'_, HashMap<NodeId, Node>> {
        lock(&self.nodes[(node.0 ^ (node.0 >> 4)) as usize % SHARDS])
    }

    fn threads_of(&self, thread: u32) -> MutexGuard<'_, LruCache<u32, Thread>> {
        lock(&self.threads[thread as usize % SHARDS])
    }

    fn now(&self) -> Moment {
        self.clock.fetch_add(1, Ordering::AcqRel)
    }

    /// A thread sent a request and waits for its answer; `thread` is its number, 0 if we can't know it. To be
    /// called once for each request, before [`answered`](Self::answered).
    pub fn arrived(&self, thread: u32) -> Arrival {
        if thread == 0 {
            return Arrival { thread, answered: 0 };
        }
        let mut threads = self.threads_of(thread);
        let state = threads.get_or_insert_mut(thread, Thread::default);
        let answered = state.answered;
        // Whatever it asks after this, it asks after this.
        state.answered = self.now();
        let given = state.given.take();
        drop(threads);
        if let Some((node, digest)) = given
            && let Some(state) = self.nodes_of(node).get_mut(&node)
            && state.digest == digest
        {
            state.taken_in = true;
        }
        Arrival { thread, answered }
    }

    /// These attributes of the node are about to be answered. May the kernel keep them?
    pub fn answered(&self, arrival: Arrival, node: NodeId, attributes: &Attributes) -> bool {
        let digest = digest(attributes);
        let mut nodes = self.nodes_of(node);
        let begin = || Node { digest, since: self.now(), since_time: Instant::now(), taken_in: false };
        let state = nodes.entry(node).or_insert_with(begin);
        if state.digest != digest {
            *state = begin();
        }
        let Node { since, since_time, taken_in, .. } = *state;
        drop(nodes);
        if taken_in {
            return since_time.elapsed() >= self.steady;
        }
        if arrival.thread != 0
            && let Some(thread) = self.threads_of(arrival.thread).get_mut(&arrival.thread)
        {
            thread.answered = self.now();
            if arrival.answered > since {
                thread.given = Some((node, digest));
            }
        }
        false
    }

    /// The kernel was made to forget the node's attributes, or has no reference to it any more.
    pub fn forgotten(&self, node: NodeId) {
        self.nodes_of(node).remove(&node);
    }
}

/// A request that a thread waits for.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    thread: u32,
    /// The thread had been answered by then.
    answered: Moment,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::InodeNo;

    const FILE: NodeId = NodeId(70);

    fn of_size(size: u64) -> Attributes {
        Attributes { ino: InodeNo(70), size, ..Attributes::default() }
    }

    fn at_once() -> TakenIn {
        TakenIn { steady: Duration::ZERO, ..TakenIn::default() }
    }

    fn ask(taken: &TakenIn, thread: u32, size: u64) -> bool {
        taken.answered(taken.arrived(thread), FILE, &of_size(size))
    }

    fn settle(taken: &TakenIn) {
        assert_eq!([1, 1, 1].map(|thread| ask(taken, thread, 5)), [false, false, true]);
    }

    #[test]
    fn a_thread_that_asks_on_and_on_is_believed_the_third_time() {
        let taken = at_once();
        for size in [5, 6, 5] {
            assert_eq!([1, 2, 3, 4].map(|_| ask(&taken, 9, size)), [false, false, true, true], "{size}");
        }
    }

    #[test]
    fn the_first_answer_to_a_thread_proves_nothing() {
        let taken = at_once();
        // Each of them may have asked before the invalidation, so its answer may be dropped.
        for thread in 1..100 {
            assert!(!ask(&taken, thread, 5));
        }
        for thread in 1..100 {
            taken.arrived(thread);
        }
        assert!(!ask(&taken, 100, 5));
    }

    #[test]
    fn any_request_tells_that_the_answer_before_was_taken_in() {
        let taken = at_once();
        ask(&taken, 1, 5);
        // Thread 2 was told something else after that, so it asks after that.
        taken.arrived(2);
        taken.arrived(2);
        assert!(!ask(&taken, 2, 5));
        assert!(!ask(&taken, 3, 5), "thread 2 may not have run since");
        taken.arrived(2);
        assert!(ask(&taken, 3, 5));
    }

    #[test]
    fn an_answer_of_before_the_change_proves_nothing_about_what_is_answered_after_it() {
        let taken = at_once();
        let asked_early = taken.arrived(1);
        ask(&taken, 2, 5);
        assert!(!taken.answered(asked_early, FILE, &of_size(5)));
        // Thread 1's answer may have been dropped: what it asks next was asked late enough, and is the first.
        assert!(!ask(&taken, 1, 5));
        assert!(ask(&taken, 1, 5));
    }

    #[test]
    fn changed_attributes_begin_anew() {
        let taken = at_once();
        settle(&taken);
        ask(&taken, 2, 5);
        let given_old = taken.arrived(2);
        assert!(taken.answered(given_old, FILE, &of_size(5)));
        assert!(!ask(&taken, 1, 6));
        taken.arrived(2);
        assert!(!ask(&taken, 2, 6));
    }

    #[test]
    fn threads_without_a_number_are_never_believed() {
        let taken = at_once();
        assert!((0..10).all(|_| !ask(&taken, 0, 5)));
    }

    #[test]
    fn what_changed_a_moment_ago_is_not_kept() {
        let taken = TakenIn { steady: Duration::from_millis(300), ..TakenIn::default() };
        let start = Instant::now();
        while !ask(&taken, 1, 5) {}
        assert!(start.elapsed() >= taken.steady);
        assert!(!ask(&taken, 1, 6));
    }

    #[test]
    fn a_forgotten_node_begins_anew() {
        let taken = at_once();
        settle(&taken);
        taken.forgotten(FILE);
        assert!(!ask(&taken, 1, 5));
    }
}
