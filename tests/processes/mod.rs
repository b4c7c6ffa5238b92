//! Daemons and their guards, as the process table shows them.

/// A process that is more than an exit status.
pub fn lives(pid: i32) -> bool {
    stat(pid).is_some_and(|(_, state, _)| state != 'Z')
}

/// The guard of a daemon, while both live.
pub fn guard_of(daemon: i32) -> Option<i32> {
    std::fs::read_dir("/proc").expect("/proc").flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let (name, state, parent) = stat(pid)?;
        (name == "lunfs-guard" && state != 'Z' && parent == daemon).then_some(pid)
    })
}

/// Name, state and parent: PID (NAME) STATE PARENT ..., proc(5).
fn stat(pid: i32) -> Option<(String, char, i32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (start, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((start.split_once('(')?.1.to_owned(), state, fields.next()?.parse().ok()?))
}
