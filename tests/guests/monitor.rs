//! QEMU's monitor (QMP): what is done to a machine from outside without a signal.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

/// Carries out a command that has no arguments.
pub fn carry_out(socket: &Path, command: &str) {
    let mut stream = UnixStream::connect(socket).expect("QEMU's monitor");
    stream.set_read_timeout(Some(Duration::from_secs(30))).expect("a time-out");
    let mut lines = BufReader::new(stream.try_clone().expect("a descriptor")).lines();
    // It greets first, and tells of events at any time.
    for command in ["qmp_capabilities", command] {
        writeln!(stream, "{}", json!({ "execute": command })).expect("QEMU listens");
        loop {
            let line = lines.next().expect("QEMU answers").expect("a line");
            let said: Value = serde_json::from_str(&line).expect("JSON");
            assert!(said.get("error").is_none(), "{command}: {said}");
            if said.get("return").is_some() {
                break;
            }
        }
    }
}
