//! Volumes of each format version, kept as files: does today's code still read them, all of them, to the last field?
//!
//! `tests/golden/vN` has for each logical block size a volume as a crash left it (`scene.rs` tells what is in it), and what
//! was recorded when it was made: `.image.gz` the bytes, `.structures` every structure decoded, `.tree` what hosts see once the
//! journal is replayed. `tests/golden/make` makes them; `docs/format.md` says when.

#[path = "golden/dump.rs"]
mod dump;
#[path = "golden/listing.rs"]
mod listing;
#[path = "golden/reserved.rs"]
mod reserved;
#[path = "golden/scene.rs"]
mod scene;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use lunfs::layout::slot::Durations;
use lunfs::layout::superblock::Superblock;
use lunfs::layout::{FORMAT_VERSION, zero_block};
use lunfs::types::{BLOCK_BYTES, BlockNo};

use self::dump::structures;
use self::listing::{of_directory, of_image};

const LOGICAL_BLOCKS: [u32; 2] = [512, 4096];

const WHAT_TO_DO: &str = "The format changed. If volumes made by older programs are read differently now, either keep reading them as \
                          before, or raise FORMAT_VERSION in src/layout.rs, write docs/format.md anew and run tests/golden/make \
                          (docs/format.md, \"Changing the format\"). A recorded file is never edited by hand.";

fn home(version: u16) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/v{version}"))
}

fn recorded(version: u16, logical_block: u32, what: &str) -> String {
    let path = home(version).join(format!("{logical_block}.{what}"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}\n{WHAT_TO_DO}", path.display()))
}

fn image(version: u16, logical_block: u32) -> Vec<u8> {
    let path = home(version).join(format!("{logical_block}.image.gz"));
    let file = std::fs::File::open(&path).unwrap_or_else(|e| {
        panic!("{}: {e}\nFormat version {version} has no golden image. {WHAT_TO_DO}", path.display())
    });
    let mut bytes = Vec::new();
    GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    bytes
}

fn same(what: &str, logical_block: u32, now: &str, then: &str) {
    if now == then {
        return;
    }
    let differs = then.lines().zip(now.lines()).find(|(then, now)| then != now);
    let (then, now) = differs.unwrap_or(("(the end)", "(more or fewer lines)"));
    panic!("{what}, {logical_block}-byte blocks:\n  recorded: {then}\n  today:    {now}\n{WHAT_TO_DO}");
}

/// The image as a file of its own, with terms that leave a loaded machine time to beat.
fn written(bytes: &[u8], dir: &Path) -> String {
    let mut bytes = bytes.to_vec();
    let block = |bytes: &[u8], at: BlockNo| {
        let mut block = zero_block();
        block.copy_from_slice(&bytes[at.offset_bytes() as usize..][..BLOCK_BYTES]);
        block
    };
    let mut superblock = Superblock::decode(&block(&bytes, BlockNo(0)), BlockNo(0), false).unwrap();
    superblock.durations = Durations { beat_ms: 250, lease_ms: 6000, dead_ms: 6500, hold_ms: 0 };
    for at in superblock.geometry.superblock_copies().into_iter().chain([BlockNo(0)]) {
        let mut copy = block(&bytes, at);
        superblock.encode(at, &mut copy);
        bytes[at.offset_bytes() as usize..][..BLOCK_BYTES].copy_from_slice(&copy[..]);
    }
    let path = dir.join("volume");
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).output().unwrap()
}

fn fsck(option: &str, logical_block: u32, volume: &str, status: i32) -> String {
    let bytes = logical_block.to_string();
    let output = run(env!("CARGO_BIN_EXE_fsck-lunfs"), &[option, "--logical-block", &bytes, volume]);
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "fsck {option}: {said}");
    said
}

#[test]
fn every_structure_is_decoded_as_it_was_and_encodes_to_the_same_bytes() {
    for logical_block in LOGICAL_BLOCKS {
        let now = structures(&image(FORMAT_VERSION, logical_block));
        same("structures", logical_block, &now, &recorded(FORMAT_VERSION, logical_block, "structures"));
    }
}

#[test]
fn the_tree_is_what_it_was_and_the_journal_is_replayed() {
    for logical_block in LOGICAL_BLOCKS {
        let (now, after) = of_image(&image(FORMAT_VERSION, logical_block), logical_block);
        same("tree", logical_block, &now, &recorded(FORMAT_VERSION, logical_block, "tree"));
        assert_eq!((after.orphans, after.errors, after.notes), (0, 0, 0), "{after:?}");
    }
}

#[test]
fn fsck_finds_a_journal_to_replay_and_nothing_else() {
    std::thread::scope(|scope| {
        for logical_block in LOGICAL_BLOCKS {
            scope.spawn(move || {
                let dir = tempfile::tempdir().unwrap();
                let volume = written(&image(FORMAT_VERSION, logical_block), dir.path());
                let said = fsck("-n", logical_block, &volume, 0);
                assert!(said.contains("[journal-pending]") && said.contains("clean, 1 note;"), "{said}");
                fsck("-p", logical_block, &volume, 0);
                let said = fsck("-n", logical_block, &volume, 0);
                assert!(said.contains(": clean;"), "{said}");
                let bytes = std::fs::read(&volume).unwrap();
                let (now, _) = of_image(&bytes, logical_block);
                same(
                    "tree after fsck",
                    logical_block,
                    &now,
                    &recorded(FORMAT_VERSION, logical_block, "tree"),
                );
            });
        }
    });
}

#[test]
fn a_mount_shows_the_recorded_tree() {
    let root = nix::unistd::geteuid().is_root();
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").is_ok();
    if !(root && device) {
        eprintln!("SKIPPED: needs root ({root}) and /dev/fuse ({device})");
        return;
    }
    for logical_block in LOGICAL_BLOCKS {
        let dir = tempfile::Builder::new().prefix("lunfs-golden-").tempdir().unwrap();
        let volume = written(&image(FORMAT_VERSION, logical_block), dir.path());
        let (mount, run_dir) = (dir.path().join("mount"), dir.path().join("run"));
        std::fs::create_dir(&mount).unwrap();
        std::fs::create_dir(&run_dir).unwrap();
        let lunfs = |args: &[&str]| {
            let program = env!("CARGO_BIN_EXE_lunfs");
            let output = Command::new(program).env("LUNFS_RUN_DIR", &run_dir).args(args).output().unwrap();
            assert!(output.status.success(), "{args:?}: {output:?}");
        };
        let options = format!("logical_block={logical_block},log={}", dir.path().join("log").display());
        let at = mount.to_str().unwrap();
        lunfs(&["mount", "--host", "golden", "-o", &options, &volume, at]);
        let shown = std::panic::catch_unwind(|| of_directory(&mount));
        lunfs(&["umount", at]);
        let shown = shown.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        same("mounted tree", logical_block, &shown, &recorded(FORMAT_VERSION, logical_block, "tree"));
        let said = fsck("-n", logical_block, &volume, 0);
        assert!(said.contains(": clean;"), "{said}");
    }
}

/// Reading old volumes right is one half; the other is that what is written today is read right by older programs.
#[test]
fn what_is_written_today_uses_no_byte_that_has_no_meaning_yet() {
    for logical_block in LOGICAL_BLOCKS {
        let made = scene::make(logical_block);
        let wrong = reserved::used(&made);
        assert!(wrong.is_empty(), "{}\n{WHAT_TO_DO}", wrong.join("\n"));
        // All that the format has is there: else the comparison says less than it seems to.
        let text = structures(&made);
        for kind in dump::EVERYTHING {
            assert!(text.contains(kind), "{logical_block}: nothing of '{kind}' in the scene");
        }
    }
}

/// What the files are made by; `tests/golden/make` calls it.
#[test]
#[ignore = "makes the golden images: tests/golden/make"]
fn makes_the_images() {
    let home = home(FORMAT_VERSION);
    let replace = std::env::var("LUNFS_GOLDEN_REPLACE").is_ok_and(|wish| wish == "yes");
    assert!(replace || !home.exists(), "{} is there: raise FORMAT_VERSION, or say --replace", home.display());
    std::fs::create_dir_all(&home).unwrap();
    for logical_block in LOGICAL_BLOCKS {
        let bytes = scene::make(logical_block);
        assert_eq!(bytes.len() % BLOCK_BYTES, 0);
        let mut packed = GzEncoder::new(Vec::new(), Compression::best());
        packed.write_all(&bytes).unwrap();
        let packed = packed.finish().unwrap();
        let put = |what: &str, bytes: &[u8]| {
            std::fs::write(home.join(format!("{logical_block}.{what}")), bytes).unwrap();
            println!("{} {logical_block}.{what}: {} bytes", home.display(), bytes.len());
        };
        put("image.gz", &packed);
        put("structures", structures(&bytes).as_bytes());
        put("tree", of_image(&bytes, logical_block).0.as_bytes());
    }
}
