//! Commands from the host over a virtio-serial port, any number at a time: one JSON object a line.
//!
//! Host to guest: `{"id":N,"run":["program","argument"]}`.
//! Guest to host, for command N: `{"id":N,"out":"a line"}`, `{"id":N,"err":"a line"}`, and at the end
//! `{"id":N,"status":0}`, where a program that a signal ended has 128 and the signal's number.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

/// Name of the port, as QEMU was told.
const PORT: &str = "org.lunfs.agent";

struct Server {
    port: Mutex<File>,
}

fn find_port() -> io::Result<PathBuf> {
    for _ in 0..500 {
        for entry in std::fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            let device = PathBuf::from("/dev").join(entry.file_name());
            if name.trim() == PORT && device.exists() {
                return Ok(device);
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Err(io::Error::other("the host gave no port"))
}

/// Serves for ever.
pub fn serve() -> io::Result<()> {
    let port = File::options().read(true).write(true).open(find_port()?)?;
    let server = Arc::new(Server { port: Mutex::new(port.try_clone()?) });
    let mut lines = BufReader::new(port);
    let mut line = String::new();
    loop {
        // The end of the file means that the host has not come yet, or is gone; half a line may be there.
        if lines.read_line(&mut line)? == 0 || !line.ends_with('\n') {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        let request: Value = serde_json::from_str(&line)?;
        line.clear();
        let Some(id) = request["id"].as_u64() else { continue };
        let words = request["run"].as_array().into_iter().flatten();
        let words: Vec<String> = words.filter_map(|word| word.as_str().map(str::to_owned)).collect();
        let server = server.clone();
        std::thread::Builder::new().spawn(move || server.carry_out(id, &words))?;
    }
}

impl Server {
    fn say(&self, message: &Value) {
        // Without a host there is nobody to tell that it failed.
        let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = port.write_all(format!("{message}\n").as_bytes());
    }

    fn carry_out(&self, id: u64, words: &[String]) {
        let status = self.run(id, words).unwrap_or_else(|e| {
            self.say(&json!({"id": id, "err": format!("agent: {words:?}: {e}")}));
            127
        });
        self.say(&json!({"id": id, "status": status}));
    }

    fn run(&self, id: u64, words: &[String]) -> io::Result<i32> {
        let (program, arguments) = words.split_first().ok_or_else(|| io::Error::other("no command"))?;
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            scope.spawn(|| out.map(|out| self.pass_on(id, "out", out)));
            scope.spawn(|| err.map(|err| self.pass_on(id, "err", err)));
        });
        let status = child.wait()?;
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    fn pass_on(&self, id: u64, name: &str, stream: impl Read) {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        while stream.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line);
            self.say(&json!({"id": id, name: text.trim_end_matches('\n')}));
            line.clear();
        }
    }
}
