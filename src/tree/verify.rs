//! A walk over a tree, whole or in parts, for checks and tests: every node, every entry, every place that is damaged.

use super::node::{Expect, Node, check_block, check_root};
use super::{NodeRead, Tree, TreeError, root_address};
use crate::types::BlockNo;

/// What [`Tree::walk`] shows.
pub trait TreeVisitor<E> {
    /// A good node below the root.
    fn node(&mut self, at: BlockNo, level: u8);
    /// The same, for those who want to find the node again: its range of keys begins at `lo`.
    fn node_from(&mut self, at: BlockNo, level: u8, lo: u64) {
        let _ = lo;
        self.node(at, level);
    }
    fn entry(&mut self, key: u64, value: &[u8]);
    /// The keys of this range can't be reached; the walk goes on after them.
    fn damaged(&mut self, at: BlockNo, lo: u64, hi: u64, error: E);
}

/// What a tree consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct TreeSummary {
    pub level: u8,
    /// Nodes below the root.
    pub nodes: u64,
    pub leaves: u64,
    pub entries: u64,
    /// Bytes of slots and values in leaves below the root.
    pub leaf_bytes: u64,
}

/// Keeps the first error.
struct Strict<E>(Option<E>);

impl<E> TreeVisitor<E> for Strict<E> {
    fn node(&mut self, _: BlockNo, _: u8) {}
    fn entry(&mut self, _: u64, _: &[u8]) {}
    fn damaged(&mut self, _: BlockNo, _: u64, _: u64, error: E) {
        self.0.get_or_insert(error);
    }
}

/// Which part of a tree a walk shows.
struct Part {
    from: u64,
    /// Leaves and damaged places that may still be shown.
    left: u32,
    /// Where the next part begins.
    next: Option<u64>,
}

impl Tree {
    /// Shows what there is from a key on, but no more than `most` leaves and damaged places. Returns the key from
    /// which to go on. Of a tree that did not change, the parts together show what [`Tree::walk`] shows: a node belongs to the part in
    /// which its range begins. Nodes on the way to the part are read again.
    pub fn walk_part<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        from: u64,
        most: u32,
        visitor: &mut dyn TreeVisitor<S::Error>,
    ) -> Option<u64> {
        let mut part = Part { from, left: most.max(1), next: None };
        self.walk_root(store, root, &mut part, visitor);
        part.next
    }

    /// Shows everything, by ascending key, and goes on after damage. Errors of the store count as damage
    /// of the node.
    pub fn walk<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        visitor: &mut dyn TreeVisitor<S::Error>,
    ) -> TreeSummary {
        let mut all = Part { from: 0, left: u32::MAX, next: None };
        self.walk_root(store, root, &mut all, visitor)
    }

    fn walk_root<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
        part: &mut Part,
        visitor: &mut dyn TreeVisitor<S::Error>,
    ) -> TreeSummary {
        let mut summary = TreeSummary::default();
        let place = Expect { at: root_address(self.owner), level: 0, lo: 0, hi: u64::MAX };
        match check_root(root, self) {
            Ok(node) => {
                summary.level = node.level();
                self.walk_node(store, &node, place, part, visitor, &mut summary);
            }
            Err(error) => visitor.damaged(place.at, place.lo, place.hi, error.into()),
        }
        summary
    }

    /// Is every node of the tree good? The first fault found, or what the tree consists of.
    pub fn verify_tree<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        root: &[u8],
    ) -> Result<TreeSummary, S::Error> {
        let mut strict = Strict(None);
        let summary = self.walk(store, root, &mut strict);
        strict.0.map_or(Ok(summary), Err)
    }

    /// Recursion is bounded by [`super::MAX_LEVEL`]: a child's level is checked to be one less.
    fn walk_node<S: NodeRead + ?Sized>(
        &self,
        store: &mut S,
        node: &Node,
        place: Expect,
        part: &mut Part,
        visitor: &mut dyn TreeVisitor<S::Error>,
        summary: &mut TreeSummary,
    ) {
        let below_root = place.at != root_address(self.owner);
        if node.overlaps() {
            let error = TreeError::Damaged { owner: self.owner, at: place.at, field: "overlap", value: 0 };
            visitor.damaged(place.at, place.lo, place.hi, error.into());
            return;
        }
        if below_root && place.lo >= part.from {
            visitor.node_from(place.at, node.level(), place.lo);
            summary.nodes += 1;
        }
        if node.level() == 0 {
            part.left = part.left.saturating_sub(1);
            if below_root {
                summary.leaves += 1;
                summary.leaf_bytes += node.used as u64;
            }
            for (key, value) in node.entries().filter(|(key, _)| *key >= part.from) {
                summary.entries += 1;
                visitor.entry(key, value);
            }
            return;
        }
        (0..node.count()).for_each(|index| store.will_load(node.child(index)));
        for index in 0..node.count() {
            let child = node.expect_child(index, place.lo, place.hi);
            if child.hi < part.from || part.next.is_some() {
                continue;
            }
            if part.left == 0 {
                part.next = Some(child.lo.max(part.from));
                return;
            }
            let block = match store.load(child.at) {
                Ok(block) => block,
                Err(error) => {
                    part.left = part.left.saturating_sub(1);
                    visitor.damaged(child.at, child.lo, child.hi, error);
                    continue;
                }
            };
            match check_block(&block, self, child) {
                Ok(node) => self.walk_node(store, &node, child, part, visitor, summary),
                Err(error) => {
                    part.left = part.left.saturating_sub(1);
                    visitor.damaged(child.at, child.lo, child.hi, error.into());
                }
            }
        }
    }
}
