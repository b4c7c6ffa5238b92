//! One random operation, in both worlds.

use super::{LONGEST, MOST_NODES, Model, Node, Open};
use crate::fs::api::{Operations, SetAttributes};
use crate::testing::cluster::cx;

const MODES: [i32; 5] = [
    0,
    libc::FALLOC_FL_KEEP_SIZE,
    libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
    libc::FALLOC_FL_ZERO_RANGE,
    libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
];

impl Model {
    /// Does something through `fs`, which is host `host`'s, and compares.
    pub fn step(&mut self, host: usize, fs: &dyn Operations) {
        let crowded = self.living(|_| true).len() > MOST_NODES;
        match self.rng.below(100) {
            0..20 if crowded => self.unlink(host, fs),
            0..12 => self.create(host, fs),
            12..17 => self.mkdir(host, fs),
            17..20 => self.symlink(host, fs),
            20..24 => self.link(host, fs),
            24..32 => self.unlink(host, fs),
            32..36 => self.rmdir(host, fs),
            36..46 => self.rename(host, fs),
            46..60 => self.write(host, fs),
            60..66 => self.truncate(host, fs),
            66..72 => self.fallocate(host, fs),
            72..80 => self.read(host, fs),
            80..84 => self.lookup(host, fs),
            84..87 => self.chmod(host, fs),
            87..92 => self.open(host, fs),
            92..96 => self.close_one(host, fs),
            96..98 => self.list(host, fs),
            _ => self.sync(host, fs),
        }
        self.done += 1;
    }

    fn create(&mut self, host: usize, fs: &dyn Operations) {
        let (dir, name) = (self.directory(), self.name());
        let flags = libc::O_RDWR | if self.rng.chance(0.5) { libc::O_EXCL } else { 0 };
        let flags = flags | if self.rng.chance(0.2) { libc::O_TRUNC } else { 0 };
        self.note(format!("host {host}: create {} in {dir:?} flags {flags:#o}", show(&name)));
        // What an open of a directory or a symbolic link by that name gives is the kernel's matter.
        let there = self.mem.lookup(&cx(), dir.mem, &name).map(|a| a.value.mode & libc::S_IFMT);
        if flags & libc::O_EXCL == 0 && there.is_ok_and(|kind| kind != libc::S_IFREG) {
            return;
        }
        let real = fs.create(&cx(), dir.real, &name, 0o640, flags).map(|a| a.value);
        let both = self.agree(real, |m| m.create(&cx(), dir.mem, &name, 0o640, flags).map(|a| a.value));
        let Some(((a, real), (b, mem))) = both else { return };
        let known = self.nodes.get(&b.ino).copied();
        let node = match known {
            Some(node) if node.real == a.ino => node,
            _ => self.learn(&a, &b),
        };
        self.opens.push(Open { host, node, real: real.handle, mem: mem.handle, directory: false });
        if self.rng.chance(0.8) {
            self.close_last(fs);
        }
    }

    fn close_last(&mut self, fs: &dyn Operations) {
        if let Some(open) = self.opens.pop() {
            self.close(fs, &open);
        }
    }

    fn mkdir(&mut self, host: usize, fs: &dyn Operations) {
        let (dir, name) = (self.directory(), self.name());
        self.note(format!("host {host}: mkdir {} in {dir:?}", show(&name)));
        let real = fs.mkdir(&cx(), dir.real, &name, 0o755).map(|a| a.value);
        let both = self.agree(real, |m| m.mkdir(&cx(), dir.mem, &name, 0o755).map(|a| a.value));
        if let Some((a, b)) = both {
            self.learn(&a, &b);
        }
    }

    fn symlink(&mut self, host: usize, fs: &dyn Operations) {
        let (dir, name) = (self.directory(), self.name());
        let len = if self.rng.chance(0.3) { 4000 } else { 20 };
        let target = self.data(len);
        self.note(format!("host {host}: symlink {} in {dir:?} to {len} bytes", show(&name)));
        let real = fs.symlink(&cx(), dir.real, &name, &target).map(|a| a.value);
        let both = self.agree(real, |m| m.symlink(&cx(), dir.mem, &name, &target).map(|a| a.value));
        if let Some((a, b)) = both {
            self.learn(&a, &b);
        }
    }

    fn link(&mut self, host: usize, fs: &dyn Operations) {
        let (dir, name) = (self.directory(), self.name());
        let Some(node) = self.pick(|kind| kind != libc::S_IFDIR) else { return };
        // Whether "exists" or "has no name any more" is said first is no promise.
        let unnamed = self.mem.getattr(&cx(), node.mem).is_ok_and(|a| a.value.nlink == 0);
        if unnamed && self.mem.lookup(&cx(), dir.mem, &name).is_ok() {
            return;
        }
        // A directory that was removed and is still open.
        if self.mem.getattr(&cx(), dir.mem).is_ok_and(|a| a.value.nlink == 0) {
            return;
        }
        self.note(format!("host {host}: link {node:?} as {} in {dir:?}", show(&name)));
        let real = fs.link(&cx(), node.real, dir.real, &name).map(|a| a.value);
        self.agree(real, |m| m.link(&cx(), node.mem, dir.mem, &name));
    }

    fn unlink(&mut self, host: usize, fs: &dyn Operations) {
        let dir = self.directory();
        let name = self.name_in(dir);
        self.note(format!("host {host}: unlink {} in {dir:?}", show(&name)));
        let real = fs.unlink(&cx(), dir.real, &name).map(|a| a.value);
        self.agree(real, |m| m.unlink(&cx(), dir.mem, &name));
    }

    fn rmdir(&mut self, host: usize, fs: &dyn Operations) {
        let dir = self.directory();
        let name = self.name_in(dir);
        self.note(format!("host {host}: rmdir {} in {dir:?}", show(&name)));
        let real = fs.rmdir(&cx(), dir.real, &name).map(|a| a.value);
        self.agree(real, |m| m.rmdir(&cx(), dir.mem, &name));
    }

    fn rename(&mut self, host: usize, fs: &dyn Operations) {
        let (from, to) = (self.directory(), self.directory());
        let to = if self.rng.chance(0.4) { from } else { to };
        let (name, new) = (self.name_in(from), self.name_in(to));
        let new = if self.rng.chance(0.5) { self.name() } else { new };
        let flags = [0, 0, libc::RENAME_NOREPLACE, libc::RENAME_EXCHANGE][self.rng.index(4)];
        self.note(format!(
            "host {host}: rename {} in {from:?} to {} in {to:?} flags {flags}",
            show(&name),
            show(&new)
        ));
        if self.ambiguous(from, &name, to, &new, flags) {
            return;
        }
        let real = fs.rename(&cx(), from.real, &name, to.real, &new, flags).map(|a| a.value);
        self.agree(real, |m| m.rename(&cx(), from.mem, &name, to.mem, &new, flags));
    }

    /// More than one error would be right: which is said is no promise.
    fn ambiguous(&self, from: Node, name: &[u8], to: Node, new: &[u8], flags: u32) -> bool {
        let removed = |n: Node| self.mem.getattr(&cx(), n.mem).is_ok_and(|a| a.value.nlink == 0);
        if removed(from) || removed(to) {
            return true;
        }
        let Ok(moved) = self.mem.lookup(&cx(), from.mem, name) else { return false };
        let over = self.mem.lookup(&cx(), to.mem, new).ok();
        // Into itself, or over something: the order in which that is noticed differs.
        let is_dir = |mode: u32| mode & libc::S_IFMT == libc::S_IFDIR;
        let upward = |of: crate::types::InodeNo, at: Node| {
            let mut at = at.mem;
            loop {
                if at == of {
                    return true;
                }
                if at == self.root.mem {
                    return false;
                }
                let listed = self.mem.readdir(&cx(), at, 1, 64, false).map(|a| a.value);
                match listed.ok().and_then(|l| l.first().map(|e| e.ino)) {
                    Some(parent) => at = parent,
                    None => return true,
                }
            }
        };
        let into_itself = is_dir(moved.value.mode) && upward(moved.value.ino, to);
        let other_way = over.as_ref().is_some_and(|o| is_dir(o.value.mode) && upward(o.value.ino, from));
        (into_itself && (over.is_some() || flags & libc::RENAME_EXCHANGE != 0)) || (other_way && flags != 0)
    }

    fn write(&mut self, host: usize, fs: &dyn Operations) {
        let Some(node) = self.file() else { return };
        let (offset, len, append) = (self.offset(), self.length(), self.rng.chance(0.3));
        let data = self.data(len);
        self.note(format!("host {host}: write {node:?} {offset}+{len} append {append}"));
        let real = fs.write(&cx(), node.real, None, offset, &data, append).map(|a| a.value);
        let written = *real.as_ref().unwrap_or(&0) as usize;
        self.agree(real, |m| m.write(&cx(), node.mem, None, offset, &data[..written], append));
    }

    fn truncate(&mut self, host: usize, fs: &dyn Operations) {
        let Some(node) = self.file() else { return };
        let size = if self.rng.chance(0.2) { 0 } else { self.offset().min(LONGEST) };
        self.note(format!("host {host}: truncate {node:?} to {size}"));
        let set = SetAttributes { size: Some(size), ..SetAttributes::default() };
        let real = fs.setattr(&cx(), node.real, &set).map(|a| a.value);
        self.agree(real, |m| m.setattr(&cx(), node.mem, &set));
    }

    fn fallocate(&mut self, host: usize, fs: &dyn Operations) {
        let Some(node) = self.file() else { return };
        let (offset, len, mode) = (self.offset(), self.length().max(1), MODES[self.rng.index(MODES.len())]);
        self.note(format!("host {host}: fallocate {node:?} {offset}+{len} mode {mode:#x}"));
        let real = fs.fallocate(&cx(), node.real, None, offset, len, mode).map(|a| a.value);
        self.agree(real, |m| m.fallocate(&cx(), node.mem, None, offset, len, mode));
    }

    fn read(&mut self, host: usize, fs: &dyn Operations) {
        let Some(node) = self.file() else { return };
        let (offset, len) = (self.offset(), self.length() as u32);
        self.note(format!("host {host}: read {node:?} {offset}+{len}"));
        let real = fs.read(&cx(), node.real, None, offset, len).map(|a| a.value);
        let both = self.agree(real, |m| m.read(&cx(), node.mem, None, offset, len).map(|a| a.value));
        if let Some((a, b)) = both {
            self.same_bytes(&a, &b, offset);
        }
    }

    fn lookup(&mut self, host: usize, fs: &dyn Operations) {
        let dir = self.directory();
        let name = self.name_in(dir);
        self.note(format!("host {host}: lookup {} in {dir:?}", show(&name)));
        let real = fs.lookup(&cx(), dir.real, &name).map(|a| a.value);
        let both = self.agree(real, |m| m.lookup(&cx(), dir.mem, &name).map(|a| a.value));
        if let Some((a, b)) = both {
            self.same_attributes(&a, &b);
        }
    }

    fn chmod(&mut self, host: usize, fs: &dyn Operations) {
        let Some(node) = self.pick(|_| true) else { return };
        let mode = self.rng.below(0o1000) as u32;
        self.note(format!("host {host}: chmod {node:?} {mode:o}"));
        let set = SetAttributes { mode: Some(mode), uid: Some(mode % 7), ..SetAttributes::default() };
        let real = fs.setattr(&cx(), node.real, &set).map(|a| a.value);
        let both = self.agree(real, |m| m.setattr(&cx(), node.mem, &set).map(|a| a.value));
        if let Some((a, b)) = both {
            self.same_attributes(&a, &b);
        }
    }

    fn open(&mut self, host: usize, fs: &dyn Operations) {
        let Some(node) = self.pick(|kind| kind == libc::S_IFREG || kind == libc::S_IFDIR) else { return };
        let directory =
            self.mem.opendir(&cx(), node.mem).map(|a| self.mem.releasedir(node.mem, a.value)).is_ok();
        let flags = [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC][self.rng.index(3)];
        self.note(format!("host {host}: open {node:?} directory {directory} flags {flags:#o}"));
        let both = if directory {
            let real = fs.opendir(&cx(), node.real).map(|a| a.value);
            self.agree(real, |m| m.opendir(&cx(), node.mem).map(|a| a.value))
        } else {
            let real = fs.open(&cx(), node.real, flags).map(|a| a.value.handle);
            self.agree(real, |m| m.open(&cx(), node.mem, flags).map(|a| a.value.handle))
        };
        if let Some((real, mem)) = both {
            self.opens.push(Open { host, node, real, mem, directory });
        }
    }

    fn close_one(&mut self, host: usize, fs: &dyn Operations) {
        let Some(i) = self.opens.iter().position(|o| o.host == host) else { return };
        let open = self.opens.remove(i);
        self.note(format!("host {host}: close {:?}", open.node));
        self.close(fs, &open);
    }

    fn list(&mut self, host: usize, fs: &dyn Operations) {
        let dir = self.directory();
        self.note(format!("host {host}: list {dir:?}"));
        self.same_listing(fs, dir);
    }

    fn sync(&mut self, host: usize, fs: &dyn Operations) {
        self.note(format!("host {host}: sync"));
        if let Err(e) = fs.sync(&cx()) {
            self.fail(&format!("sync failed: {e}"));
        }
    }
}

fn show(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    if text.len() > 40 { format!("{}…{}", &text[..4], &text[text.len() - 6..]) } else { text.into_owned() }
}
