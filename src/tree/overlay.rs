//! Several tree operations as one: changes wait in memory until all of them succeeded.
//!
//! One operation of the tree reads all it needs before it changes anything. Two in a row don't: the
//! second may meet damage after the first was done. Through an [`Overlay`] only the store itself can fail
//! in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{NodeRead, NodeStore};
use crate::layout::Block;
use crate::types::BlockNo;

/// A store whose changes reach the one below it at the end.
pub struct Overlay<'s, S: NodeStore + ?Sized> {
    below: &'s mut S,
    changed: BTreeMap<BlockNo, Arc<Block>>,
    allocated: Vec<BlockNo>,
    freed: Vec<BlockNo>,
}

/// Runs `work` on an overlay and a copy of the root; on success both reach `store` and `root`, on failure
/// nothing does and the blocks allocated go back.
pub fn atomically<S: NodeStore + ?Sized, T>(
    store: &mut S,
    root: &mut [u8],
    work: impl FnOnce(&mut Overlay<'_, S>, &mut [u8]) -> Result<T, S::Error>,
) -> Result<T, S::Error> {
    let mut overlay =
        Overlay { below: store, changed: BTreeMap::new(), allocated: Vec::new(), freed: Vec::new() };
    let mut copy = root.to_vec();
    match work(&mut overlay, &mut copy) {
        Ok(value) => {
            overlay.commit()?;
            root.copy_from_slice(&copy);
            Ok(value)
        }
        Err(e) => {
            let Overlay { below, allocated, .. } = overlay;
            allocated.into_iter().try_for_each(|at| below.free(at))?;
            Err(e)
        }
    }
}

impl<S: NodeStore + ?Sized> Overlay<'_, S> {
    fn commit(self) -> Result<(), S::Error> {
        for (at, block) in self.changed {
            let block = Arc::try_unwrap(block).unwrap_or_else(|shared| *shared);
            self.below.put(at, Box::new(block))?;
        }
        self.freed.into_iter().try_for_each(|at| self.below.free(at))
    }
}

impl<S: NodeStore + ?Sized> NodeRead for Overlay<'_, S> {
    type Error = S::Error;

    fn load(&mut self, at: BlockNo) -> Result<Arc<Block>, Self::Error> {
        match self.changed.get(&at) {
            Some(block) => Ok(Arc::clone(block)),
            None => self.below.load(at),
        }
    }
}

impl<S: NodeStore + ?Sized> NodeStore for Overlay<'_, S> {
    fn modify(&mut self, at: BlockNo, change: &mut dyn FnMut(&mut Block)) -> Result<(), Self::Error> {
        let mut block = match self.changed.remove(&at) {
            Some(block) => block,
            None => self.below.load(at)?,
        };
        change(Arc::make_mut(&mut block));
        self.changed.insert(at, block);
        Ok(())
    }

    fn put(&mut self, at: BlockNo, block: Box<Block>) -> Result<(), Self::Error> {
        self.changed.insert(at, Arc::from(block));
        Ok(())
    }

    fn allocate(&mut self) -> Result<BlockNo, Self::Error> {
        let at = self.below.allocate()?;
        self.allocated.push(at);
        Ok(at)
    }

    fn free(&mut self, at: BlockNo) -> Result<(), Self::Error> {
        self.changed.remove(&at);
        self.freed.push(at);
        Ok(())
    }
}
