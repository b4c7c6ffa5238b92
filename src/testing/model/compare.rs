//! Are the two worlds the same? One answer, one directory, the whole tree.

use std::collections::BTreeMap;

use super::{Model, Node};
use crate::fs::api::{Attributes, DirEntry, Operations};
use crate::testing::cluster::cx;

/// A listing is read in pieces this long, so that cookies are used.
const PAGE: usize = 700;

/// All entries of a directory, page by page.
pub fn list_all(
    fs: &dyn Operations,
    dir: crate::types::InodeNo,
    page: usize,
) -> Result<Vec<DirEntry>, String> {
    let mut all: Vec<DirEntry> = Vec::new();
    let mut cookie = 0;
    loop {
        let some = fs.readdir(&cx(), dir, cookie, page, true).map_err(|e| e.to_string())?.value;
        let Some(last) = some.last() else { return Ok(all) };
        if some.iter().any(|e| e.cookie <= cookie) {
            return Err(format!("a cookie after {cookie:#x} is not above it"));
        }
        cookie = last.cookie;
        all.extend(some);
    }
}

impl Model {
    pub(super) fn same_bytes(&self, real: &[u8], mem: &[u8], offset: u64) {
        if real.len() != mem.len() {
            self.fail(&format!("{} bytes read, expected {}", real.len(), mem.len()));
        }
        if let Some(i) = real.iter().zip(mem).position(|(a, b)| a != b) {
            let (at, a, b) = (offset + i as u64, real[i], mem[i]);
            self.fail(&format!("byte {at} of the file is {a:#x}, expected {b:#x}"));
        }
    }

    pub(super) fn same_attributes(&self, real: &Attributes, mem: &Attributes) {
        let shown = |a: &Attributes| (a.mode, a.uid, a.gid, a.nlink, a.size, a.rdev);
        if shown(real) != shown(mem) {
            self.fail(&format!(
                "attributes (mode, uid, gid, nlink, size, rdev) {:?}, expected {:?}",
                shown(real),
                shown(mem)
            ));
        }
        match self.nodes.get(&mem.ino) {
            Some(node) if node.real == real.ino => {}
            other => self.fail(&format!("inode {} shown, expected {other:?}", real.ino)),
        }
    }

    /// A directory has the same names for the same inodes.
    pub(super) fn same_listing(&self, fs: &dyn Operations, dir: Node) -> Vec<(Vec<u8>, Node, u8)> {
        let listed = |fs: &dyn Operations, ino| match list_all(fs, ino, PAGE) {
            Ok(list) => list,
            Err(e) => self.fail(&format!("listing {ino}: {e}")),
        };
        let (real, mem) = (listed(fs, dir.real), listed(&self.mem, dir.mem));
        let names = |list: &[DirEntry]| {
            list.iter().map(|e| (e.name.clone(), (e.ino, e.kind))).collect::<BTreeMap<_, _>>()
        };
        let (real_names, mem_names) = (names(&real), names(&mem));
        if real.len() != real_names.len() {
            self.fail(&format!("a name appears twice in the listing of {dir:?}"));
        }
        if !real_names.keys().eq(mem_names.keys()) {
            let show = |m: &BTreeMap<Vec<u8>, _>| {
                m.keys().map(|n| String::from_utf8_lossy(n).into_owned()).collect::<Vec<_>>()
            };
            self.fail(&format!("{dir:?} lists {:?}, expected {:?}", show(&real_names), show(&mem_names)));
        }
        let mut found = Vec::new();
        // Where a removed directory says that it was is nobody's matter.
        let removed = self.mem.getattr(&cx(), dir.mem).is_ok_and(|a| a.value.nlink == 0);
        for ((name, (real, kind)), (mem, mem_kind)) in real_names.into_iter().zip(mem_names.into_values()) {
            let node = self.nodes.get(&mem).copied();
            let known = node.is_some_and(|n| n.real == real);
            if (!known || kind != mem_kind) && !(removed && name == b"..") {
                let name = String::from_utf8_lossy(&name).into_owned();
                self.fail(&format!(
                    "\"{name}\" in {dir:?} is {real} of kind {kind}, expected {node:?}, {mem_kind}"
                ));
            }
            if let Some(node) = node.filter(|_| name != b"." && name != b"..") {
                found.push((name, node, kind));
            }
        }
        found
    }

    /// Everything, as one host sees it, is as it should be.
    pub fn same_tree(&mut self, host: usize, fs: &dyn Operations) {
        self.note(format!("host {host}: compares the tree"));
        let mut todo = vec![self.root];
        while let Some(dir) = todo.pop() {
            for (name, node, kind) in self.same_listing(fs, dir) {
                self.same_node(fs, dir, &name, node);
                if u32::from(kind) << 12 == libc::S_IFDIR {
                    todo.push(node);
                }
            }
        }
    }

    fn same_node(&self, fs: &dyn Operations, dir: Node, name: &[u8], node: Node) {
        let must = |what: &str, e| -> ! { self.fail(&format!("{what} of {node:?}: {e}")) };
        let real = fs.lookup(&cx(), dir.real, name).unwrap_or_else(|e| must("lookup", e)).value;
        let mem = self.mem.lookup(&cx(), dir.mem, name).unwrap_or_else(|e| must("model lookup", e)).value;
        self.same_attributes(&real, &mem);
        match mem.mode & libc::S_IFMT {
            libc::S_IFREG => {
                let len = mem.size as u32 + 100;
                let a = fs.read(&cx(), node.real, None, 0, len).unwrap_or_else(|e| must("read", e)).value;
                let b =
                    self.mem.read(&cx(), node.mem, None, 0, len).unwrap_or_else(|e| must("model read", e));
                self.same_bytes(&a, &b.value, 0);
            }
            libc::S_IFLNK => {
                let a = fs.readlink(&cx(), node.real).unwrap_or_else(|e| must("readlink", e)).value;
                let b =
                    self.mem.readlink(&cx(), node.mem).unwrap_or_else(|e| must("model readlink", e)).value;
                self.same_bytes(&a, &b, 0);
            }
            _ => {}
        }
    }
}
