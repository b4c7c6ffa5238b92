//! Several hosts want the same: exactly one gets it.
//!
//! Every phase counts its winners per host, and demands that each host won: where one host always loses (or
//! all fail, in silence) nothing was tested.

use std::fs::{self, OpenOptions};
use std::path::Path;
use std::time::Duration;

use super::harness::{Cluster, Gate, demand_success, errno, rounds};

on_every_device! {
    4 hosts: one_creates;
    4 hosts: one_unlinks;
    4 hosts: one_renames;
    4 hosts: one_makes_the_directory;
}

/// Who comes first changes from round to round; without that the host that holds the lock would win them all.
fn head_start(host: usize, round: u64, hosts: usize) {
    let place = (host as u64 + round) % hosts as u64;
    if !round.is_multiple_of(3) && place > 0 {
        std::thread::sleep(Duration::from_micros(1500 * place));
    }
}

/// Runs rounds in which every host tries at once; gives the wins of each.
fn race(
    cluster: &Cluster,
    count: u64,
    prepare: impl Fn(u64) + Sync,
    attempt: impl Fn(usize, &Path, u64) -> bool + Sync,
) -> Vec<u64> {
    let hosts = cluster.hosts.len();
    let gate = Gate::new(hosts);
    let wins: Vec<Vec<bool>> = cluster.each(|host, root| {
        let mut wins = Vec::new();
        for round in 0..count {
            if round % hosts as u64 == host as u64 {
                prepare(round);
            }
            gate.meet();
            head_start(host, round, hosts);
            wins.push(attempt(host, root, round));
            gate.meet();
        }
        wins
    });
    for round in 0..count as usize {
        let won = |host: &usize| wins.get(*host).and_then(|w| w.get(round)) == Some(&true);
        let winners: Vec<usize> = (0..hosts).filter(won).collect();
        assert_eq!(winners.len(), 1, "round {round}: won by {winners:?}");
    }
    wins.iter().map(|wins| wins.iter().filter(|won| **won).count() as u64).collect()
}

fn one_creates(cluster: &Cluster) {
    let wins = race(
        cluster,
        rounds(60),
        |_| {},
        |host, root, round| {
            let path = root.join(format!("created-{round}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    use std::os::unix::fs::FileExt;
                    file.write_all_at(host.to_string().as_bytes(), 0).expect("write");
                    true
                }
                other => {
                    assert_eq!(errno(other), libc::EEXIST);
                    false
                }
            }
        },
    );
    println!("wins {wins:?}");
    demand_success("create", &wins);
    // Everybody agrees on who it was.
    let told = cluster.each(|_, root| {
        let text = |n| fs::read_to_string(root.join(format!("created-{n}"))).expect("read");
        (0..rounds(60)).map(text).collect::<Vec<_>>()
    });
    assert!(told.iter().all(|t| *t == told[0]));
    for (host, wins) in wins.iter().enumerate() {
        assert_eq!(told[0].iter().filter(|t| **t == host.to_string()).count() as u64, *wins);
    }
}

fn one_unlinks(cluster: &Cluster) {
    let wins = race(
        cluster,
        rounds(60),
        |round| fs::write(cluster.dir(round as usize / 2 % 4).join("victim"), b"x").expect("create"),
        |_, root, _| match fs::remove_file(root.join("victim")) {
            Ok(()) => true,
            other => {
                assert_eq!(errno(other), libc::ENOENT);
                false
            }
        },
    );
    println!("wins {wins:?}");
    demand_success("unlink", &wins);
}

fn one_renames(cluster: &Cluster) {
    let count = rounds(60);
    let wins = race(
        cluster,
        count,
        |round| {
            fs::write(cluster.dir(round as usize / 2 % 4).join("moving"), round.to_string()).expect("create")
        },
        |host, root, round| match fs::rename(root.join("moving"), root.join(format!("moved-{round}-{host}")))
        {
            Ok(()) => true,
            other => {
                assert_eq!(errno(other), libc::ENOENT);
                false
            }
        },
    );
    println!("wins {wins:?}");
    demand_success("rename", &wins);
    let lists = cluster.each(|_, root| super::names::names_in(root));
    assert!(lists.iter().all(|l| *l == lists[0] && l.len() as u64 == count), "one name for each round");
    for name in &lists[0] {
        let round = name.split('-').nth(1).expect("moved-N-H");
        assert_eq!(fs::read_to_string(cluster.dir(3).join(name)).expect("read"), round);
    }
}

fn one_makes_the_directory(cluster: &Cluster) {
    let attempt = |make: bool| {
        move |_: usize, root: &Path, round: u64| {
            let path = root.join(format!("dir-{round}"));
            let (done, lost) = match make {
                true => (fs::create_dir(path), libc::EEXIST),
                false => (fs::remove_dir(path), libc::ENOENT),
            };
            match done {
                Ok(()) => true,
                other => {
                    assert_eq!(errno(other), lost);
                    false
                }
            }
        }
    };
    let made = race(cluster, rounds(40), |_| {}, attempt(true));
    let removed = race(cluster, rounds(40), |_| {}, attempt(false));
    println!("made {made:?}, removed {removed:?}");
    demand_success("mkdir", &made);
    demand_success("rmdir", &removed);
    for host in &cluster.hosts {
        assert_eq!(super::names::listing(&host.dir), Vec::<String>::new());
    }
}
