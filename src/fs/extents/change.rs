//! Putting some extents in the place of others with the fewest changes of the tree.

use zerocopy::IntoBytes;

use super::{Extent, ExtentTree};
use crate::tree::{NodeStore, Overlay, atomically};

/// One change of the tree.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Remove(u64),
    Replace(Extent),
    Rekey(u64, Extent),
    Insert(Extent),
}

impl ExtentTree {
    /// Replaces the extents `old`, which are in the tree, by `new`, joined where they can be.
    pub(super) fn change<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        old: &[Extent],
        new: Vec<Extent>,
    ) -> Result<(), S::Error> {
        let steps = plan(old, new);
        match &steps[..] {
            [] => Ok(()),
            // One operation of the tree is whole or absent by itself.
            [step] if !matches!(step, Step::Rekey(..)) => self.apply(store, root, step),
            steps => atomically(store, root, |store, root| {
                steps.iter().try_for_each(|step| self.apply(store, root, step))
            }),
        }
    }

    /// The same for a caller who is inside an overlay already.
    pub(super) fn change_inside<S: NodeStore + ?Sized>(
        &self,
        store: &mut Overlay<'_, S>,
        root: &mut [u8],
        old: &[Extent],
        new: Vec<Extent>,
    ) -> Result<(), S::Error> {
        plan(old, new).iter().try_for_each(|step| self.apply(store, root, step))
    }

    fn apply<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        step: &Step,
    ) -> Result<(), S::Error> {
        match step {
            Step::Remove(key) => self.tree.remove(store, root, *key).map(|_| ()),
            Step::Replace(e) => self.tree.replace(store, root, e.logical, e.encode().as_bytes()),
            Step::Rekey(key, e) => self.tree.rekey(store, root, *key, e.logical, e.encode().as_bytes()),
            Step::Insert(e) => self.tree.insert(store, root, e.logical, e.encode().as_bytes()),
        }
    }
}

/// Joins what can be joined.
fn join(mut extents: Vec<Extent>) -> Vec<Extent> {
    extents.sort_unstable_by_key(|e| e.logical);
    let mut joined: Vec<Extent> = Vec::with_capacity(extents.len());
    for extent in extents {
        match joined.last_mut() {
            Some(last) if last.joins(&extent) => last.blocks += extent.blocks,
            _ => joined.push(extent),
        }
    }
    joined
}

/// The steps from `old` to `new`. A key that goes and one that comes become one step: an unwritten run
/// that is written from its start would otherwise leave and enter its leaf with each write.
fn plan(old: &[Extent], new: Vec<Extent>) -> Vec<Step> {
    let new = join(new);
    let mut gone: Vec<u64> =
        old.iter().map(|o| o.logical).filter(|key| new.iter().all(|n| n.logical != *key)).collect();
    let mut steps = Vec::new();
    for extent in new {
        match old.iter().find(|o| o.logical == extent.logical) {
            Some(before) if *before == extent => {}
            Some(_) => steps.push(Step::Replace(extent)),
            None => match gone.pop() {
                Some(key) => steps.push(Step::Rekey(key, extent)),
                None => steps.push(Step::Insert(extent)),
            },
        }
    }
    // Removing first makes room, and no step meets an extent that overlaps its own.
    let removes = gone.into_iter().map(Step::Remove);
    removes.chain(steps).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::BlockNo;

    fn extent(logical: u64, physical: u64, blocks: u64, unwritten: bool) -> Extent {
        Extent { logical, physical: BlockNo(physical), blocks, unwritten }
    }

    #[test]
    fn writing_into_an_unwritten_run_moves_its_start() {
        let old = [extent(10, 110, 90, true), extent(0, 100, 10, false)];
        let new = vec![extent(10, 110, 5, false), extent(15, 115, 85, true), old[1]];
        let steps = plan(&old, new);
        assert_eq!(
            steps,
            [Step::Replace(extent(0, 100, 15, false)), Step::Rekey(10, extent(15, 115, 85, true))]
        );
    }

    #[test]
    fn an_append_replaces_one_value() {
        let old = [extent(0, 100, 10, false)];
        assert_eq!(
            plan(&old, vec![old[0], extent(10, 110, 1, false)]),
            [Step::Replace(extent(0, 100, 11, false))]
        );
    }
}
