//! Freeing a whole tree in bounded steps, for the end of a directory or of attributes.

use super::node::{remove_at, root_head};
use super::{NodeStore, Tree};

impl Tree {
    /// Frees up to `max_nodes` leaves from the end, with the nodes above that become empty, and says
    /// whether the tree is empty now. Between two calls it is a good tree with fewer entries, so each
    /// call can be a transaction of its own. See [`super::Cost::free_step`].
    pub fn free_all<S: NodeStore + ?Sized>(
        &self,
        store: &mut S,
        root: &mut [u8],
        max_nodes: u32,
    ) -> Result<bool, S::Error> {
        for _ in 0..max_nodes {
            let path = self.descend(store, root, u64::MAX)?;
            if path.level == 0 {
                break;
            }
            // Nodes with nothing else in them leave; the first that has more loses one child.
            let mut doomed = Vec::new();
            let mut keeper = None;
            for (depth, step) in path.steps.iter().enumerate().rev() {
                if depth == 0 || (depth < usize::from(path.level) && step.count > 1) {
                    keeper = Some((step.at, step.index));
                    break;
                }
                doomed.push(step.at);
            }
            drop(path);
            if let Some((at, index)) = keeper {
                self.modify_at(store, root, at, |area| remove_at(area, index))?;
            }
            for at in doomed {
                store.free(at)?;
            }
            if root_head(root).is_some_and(|(_, count)| count == 0) {
                self.init_root(root)?;
            }
        }
        if self.root_level(root)? == 0 {
            self.init_root(root)?;
            return Ok(true);
        }
        Ok(false)
    }
}
