//! mkfs and fsck that die at each of their commands.
//!
//! After mkfs there is no volume, the one that was there before, or a whole new one: what mounts is whole. After fsck
//! another fsck finds all that is left to do, does it, and what was good before is still there.

use std::sync::Arc;

use lunfs::device::BlockDevice;
use lunfs::device::sim::{Executed, Keep, LunObserver, SimLun};
use lunfs::format::{FormatOptions, format};
use lunfs::fs::api::Operations;
use lunfs::fsck::finding::{Finding, Kind};
use lunfs::fsck::repair::{Allow, repair};
use lunfs::fsck::{FsckError, check};
use lunfs::layout::cluster::ClusterHeader;
use lunfs::layout::inode::InodeDisk;
use lunfs::layout::seal;
use lunfs::rt::sim::{Failure, SimRng, on_host, seeds, spawn_on};
use lunfs::rt::{self, HostTag};
use lunfs::testing::audit::audit;
use lunfs::testing::cluster::{Cluster, cx, identity};
use lunfs::testing::tripwire::Tripwire;
use lunfs::types::InodeNo;
use lunfs::volume::{FencingMode, MountOptions, Volume};

use super::crash::{Tree, hasty, tree_of};
use super::points::{cut_of, explained};

const TOOL: HostTag = HostTag(5);
const AGAIN: HostTag = HostTag(6);
const LATER: HostTag = HostTag(9);

/// Tools break the rules of hosts by right.
struct Nobody;

impl LunObserver for Nobody {
    fn executed(&self, _: &Executed<'_>) {}
    fn power_cut(&self) {}
}

fn device(lun: &SimLun, tag: HostTag) -> Arc<dyn BlockDevice> {
    lun.attach(tag)
}

/// Runs a tool that dies at its command number `k`; what it returned if it got to the end.
fn dies_at<T: Send + 'static>(
    lun: &SimLun,
    k: u64,
    tool: impl FnOnce(Arc<dyn BlockDevice>) -> T + Send + 'static,
) -> Option<T> {
    let wire = Tripwire::new(Arc::new(Nobody));
    lun.set_observer(wire.clone());
    wire.arm(TOOL, 0..0, k);
    let device = device(lun, TOOL);
    let done = spawn_on(TOOL, "tool", move || tool(device)).join().ok();
    wire.disarm();
    rt::sim::kill_host(TOOL);
    lun.clear_observer();
    done
}

fn mount(lun: &SimLun) -> Result<Arc<Volume>, String> {
    let options =
        MountOptions { host: identity(LATER), read_only: false, cache_mib: 4, fencing: FencingMode::Auto };
    let device = device(lun, LATER);
    on_host(LATER, || Volume::mount(device, options)).map_err(|e| e.to_string())
}

/// What a mount shows; then it leaves.
fn shown(volume: &Arc<Volume>) -> Tree {
    on_host(LATER, || {
        let fs = volume.operations();
        let tree = tree_of(&*fs, fs.root());
        let ino = fs.mknod(&cx(), fs.root(), b"by a mount", libc::S_IFREG | 0o644, 0).unwrap().value.ino;
        fs.write(&cx(), ino, None, 0, &[3; 9000], false).map(drop).unwrap();
        volume.leave().unwrap();
        tree
    })
}

/// Files that were there before.
fn populate(fs: &dyn Operations) {
    let dir = fs.mkdir(&cx(), fs.root(), b"old", 0o755).unwrap().value.ino;
    for n in 0..12u8 {
        let ino = fs.mknod(&cx(), dir, &[b'a' + n], libc::S_IFREG | 0o644, 0).unwrap().value.ino;
        fs.write(&cx(), ino, None, 0, &vec![n + 1; 700 * usize::from(n)], false).map(drop).unwrap();
    }
}

/// Did mkfs get to the end?
fn mkfs_crash(seed: u64, over: bool, k: u64, cut: Option<Keep>) -> Result<bool, Failure> {
    let formatted = &hasty()[(seed % 4) as usize];
    explained(format!("over a volume: {over}, command {k}, {cut:?}"), seed, None, move || {
        let mut old = None;
        let lun = if over {
            let mut cluster = Cluster::start(formatted, 1);
            cluster.on(0, populate);
            old = Some(cluster.on(0, |fs| tree_of(fs, fs.root())));
            cluster.leave();
            cluster.lun.clone()
        } else {
            SimLun::new(formatted.lun.clone())
        };
        let geometry = formatted.superblock.geometry;
        let made = dies_at(&lun, k, move |device| {
            let options = FormatOptions { geometry: Some(geometry), ..FormatOptions::default() };
            format(&*device, &options).expect("formatting").superblock
        });
        if let Some(keep) = cut {
            lun.power_cut(keep);
        }
        match mount(&lun) {
            Err(said) => {
                let clear = said.contains("LunFS") || said.contains("lunfs") || said.contains("superblock");
                assert!(clear, "mount says: {said}");
                assert!(made.is_none(), "a volume that was made does not mount: {said}");
            }
            Ok(volume) => {
                let is_old = over && volume.superblock().volume == formatted.superblock.volume;
                let tree = shown(&volume);
                let mut findings: Vec<Finding> = Vec::new();
                let checked = on_host(LATER, || check(device(&lun, LATER), &mut findings));
                // Without one copy nothing says that the superblock is true.
                let lonely = is_old && matches!(checked, Err(FsckError::Lonely));
                assert!(checked.is_ok() || lonely, "checking what mounts: {checked:?}");
                if is_old {
                    assert!(made.is_none(), "the old volume outlived a mkfs that ended");
                    assert_eq!(Some(tree), old, "the old volume is not whole");
                    // Of a volume that is about to go, the copies of the superblock go first.
                    findings.retain(|f| f.kind != Kind::SuperblockCopy);
                } else {
                    assert!(tree.is_empty(), "a new volume shows {tree:?}");
                }
                assert!(findings.is_empty(), "what mounts is not whole: {findings:?}");
            }
        }
        made.is_some()
    })
}

#[test]
fn a_mkfs_that_dies_leaves_no_half_made_volume() {
    for seed in seeds(0..4) {
        for over in [false, true] {
            let volatile = hasty()[(seed % 4) as usize].lun.volatile_cache;
            let mut rng = SimRng::new(seed, 68);
            let ends = |k: &u64| {
                mkfs_crash(seed, over, *k, cut_of(volatile, &mut rng)).unwrap_or_else(|e| panic!("{e}"))
            };
            let runs = (1..).find(ends);
            println!("seed {seed}, over a volume: {over}: {runs:?} runs");
        }
    }
}

/// A volume with damage of several kinds, whose last host died with a journal that is not in place. Returns what must be
/// there whatever happens: all but the file `victim`.
fn damaged(cluster: &mut Cluster) -> Tree {
    let names = |fs: &dyn Operations| -> [InodeNo; 2] {
        [&b"victim"[..], b"miscounted"]
            .map(|name| fs.mknod(&cx(), fs.root(), name, libc::S_IFREG | 0o644, 0).unwrap().value.ino)
    };
    let [victim, miscounted] = cluster.on(0, |fs| {
        let inos = names(fs);
        populate(fs);
        cluster.hosts[0].volume.store().drain().unwrap();
        let dir = fs.mkdir(&cx(), fs.root(), b"pending", 0o755).unwrap().value.ino;
        for n in 0..6u8 {
            let ino = fs.mknod(&cx(), dir, &[b'a' + n], libc::S_IFREG | 0o644, 0).unwrap().value.ino;
            fs.write(&cx(), ino, None, 0, &[n + 1; 5000], false).map(drop).unwrap();
        }
        fs.sync(&cx()).unwrap();
        inos
    });
    let mut tree = cluster.on(0, |fs| tree_of(fs, fs.root()));
    tree.remove("/victim");
    cluster.kill(0);
    let (g, lun) = (cluster.superblock.geometry, cluster.lun.clone());
    lun.clear_observer();
    lun.overwrite(g.superblock_copies()[0].offset_bytes(), &[0; 4096]);
    lun.overwrite(victim.body().offset_bytes() + 200, &[0xee; 64]);
    let mut block = cluster.block(miscounted.body());
    InodeDisk::of_mut(&mut block).nlink = 7.into();
    seal(&mut block[..]);
    lun.overwrite(miscounted.body().offset_bytes(), &block[..]);
    let at = g.cluster_header(g.clusters() - 1);
    let mut block = cluster.block(at);
    let header: &mut ClusterHeader = zerocopy::FromBytes::mut_from_bytes(&mut block[..]).unwrap();
    header.free_blocks -= 1;
    seal(&mut block[..]);
    lun.overwrite(at.offset_bytes(), &block[..]);
    tree
}

fn repair_on(lun: &SimLun, tag: HostTag) -> Result<(), String> {
    let device = device(lun, tag);
    let done = on_host(tag, || {
        let mut told: Vec<Finding> = Vec::new();
        repair(device, &identity(tag), Allow::Everything, &mut told)
    });
    done.map_err(|e| e.to_string()).map(drop)
}

/// Did fsck get to the end?
fn fsck_crash(seed: u64, k: u64, cut: Option<Keep>) -> Result<bool, Failure> {
    let formatted = &hasty()[(seed % 4) as usize];
    explained(format!("command {k}, {cut:?}"), seed, None, move || {
        let mut cluster = Cluster::start(formatted, 1);
        let expected = damaged(&mut cluster);
        let lun = cluster.lun.clone();
        let done = dies_at(&lun, k, |device| {
            let mut told: Vec<Finding> = Vec::new();
            repair(device, &identity(TOOL), Allow::Everything, &mut told).map(drop).expect("fsck");
        });
        if let Some(keep) = cut {
            lun.power_cut(keep);
        }
        repair_on(&lun, AGAIN).unwrap_or_else(|e| panic!("a second fsck: {e}"));
        let (report, findings) = audit(&lun);
        assert!(findings.is_empty(), "after a second fsck {} are left: {findings:?}", report.errors);
        let volume = mount(&lun).unwrap_or_else(|e| panic!("mounting after it: {e}"));
        let mut tree = shown(&volume);
        tree.remove("/victim");
        tree.retain(|path, _| !path.starts_with("/lost+found"));
        let gone: Vec<_> = expected.iter().filter(|(path, seen)| tree.get(*path) != Some(*seen)).collect();
        assert!(
            gone.is_empty(),
            "gone or changed: {:?}",
            gone.iter().map(|(path, _)| path).collect::<Vec<_>>()
        );
        done.is_some()
    })
}

#[test]
fn a_fsck_that_dies_is_finished_by_another() {
    for seed in seeds(0..2) {
        let volatile = hasty()[(seed % 4) as usize].lun.volatile_cache;
        let mut rng = SimRng::new(seed, 69);
        let ends =
            |k: &u64| fsck_crash(seed, *k, cut_of(volatile, &mut rng)).unwrap_or_else(|e| panic!("{e}"));
        let runs = (1..).find(ends);
        println!("seed {seed}: {runs:?} runs");
    }
}
