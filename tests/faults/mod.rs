//! A device that fails on command, for one daemon at a time: `faults.c`, preloaded into it.
//!
//! The daemon is the ordinary program; what it meets is what a failing path shows it at the system call. Whether the
//! fault was met at all is counted ([`Faults::hits`]): a fault that nobody met tested nothing.

use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Kinds of commands, to be added up.
pub const READ: u64 = 1;
pub const WRITE: u64 = 2;
pub const FLUSH: u64 = 4;
/// Shared byte-range locks; "bytes" are theirs.
pub const SHARED_LOCK: u64 = 8;

/// What becomes of a command. The numbers are those of `faults.c`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Fails and was not executed.
    Eio = 1,
    /// Fails and was executed.
    DoneThenEio = 2,
    /// Half of it is executed, as the count says.
    Short = 3,
    /// No answer until the rule is taken away; executed then.
    Hang = 4,
    /// Fails and half of it was executed.
    TornThenEio = 5,
}

const RULES: usize = 4;
const WORDS: usize = 8;
const HITS: usize = 6;
pub const FOR_EVER: u64 = u64::MAX;

/// The rules of one daemon.
pub struct Faults {
    control: PathBuf,
    library: PathBuf,
    image: PathBuf,
}

impl Faults {
    /// Everything in `directory`. Needs a C compiler, as Rust itself does.
    pub fn new(directory: &Path, image: &Path) -> Faults {
        let (control, library) = (directory.join("faults"), directory.join("faults.so"));
        let empty = File::create(&control).expect("a new file");
        empty.set_len((RULES * WORDS * 8) as u64).expect("a size");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults/faults.c");
        let mut cc = Command::new("cc");
        let built = cc.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).output();
        let built = built.expect("a C compiler");
        assert!(built.status.success(), "{built:?}");
        Faults { control, library, image: image.to_owned() }
    }

    /// The environment of the daemon.
    pub fn environment(&self) -> Vec<(String, OsString)> {
        [("LD_PRELOAD", &self.library), ("LUNFS_FAULTS", &self.control), ("LUNFS_FAULTS_IMAGE", &self.image)]
            .map(|(name, path)| (name.to_owned(), path.clone().into_os_string()))
            .into()
    }

    fn words(&self, rule: usize, first: usize, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let file = File::options().write(true).open(&self.control).expect("the rules");
        file.write_all_at(&bytes, ((rule * WORDS + first) * 8) as u64).expect("written");
    }

    /// The next `count` commands of these kinds in these bytes; rules of lower numbers come first.
    pub fn inject(&self, rule: usize, action: Action, kinds: u64, bytes: Range<u64>, count: u64) {
        self.words(rule, 0, &[0, kinds, bytes.start, bytes.end, action as u64, count, 0, 0]);
        self.words(rule, 0, &[1]);
    }

    /// The device is well again.
    pub fn clear(&self) {
        (0..RULES).for_each(|rule| self.words(rule, 0, &[0]));
    }

    /// How many commands met a rule.
    pub fn hits(&self, rule: usize) -> u64 {
        let mut word = [0; 8];
        let file = File::open(&self.control).expect("the rules");
        file.read_exact_at(&mut word, ((rule * WORDS + HITS) * 8) as u64).expect("read");
        u64::from_le_bytes(word)
    }
}
