//! The daemon's side: listens, reads one request of each client, and sees when it goes away.

use std::collections::BTreeMap;
use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::Serialize;
use serde_json::Value;

use super::address::in_its_directory;
use super::wire::{Failure, FailureKind, Reply, Request, VERSION, read_line};

/// Clients at the same time.
const MOST_CALLS: usize = 16;
const MOST_REQUEST_BYTES: usize = 64 << 10;
/// How long a client may take to say what it wants, and to take what it is told.
const CLIENT_PATIENCE: Duration = Duration::from_secs(10);
/// After an error of accept(2), such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a daemon does for its clients.
pub trait Service: Send + Sync {
    /// Does one command; on a thread of its own.
    fn serve(&self, command: &str, arguments: Value, call: &Call) -> Result<Value, Failure>;
}

/// One request under way.
pub struct Call {
    stream: Mutex<UnixStream>,
    cancelled: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

impl Call {
    /// Tells the client something. Whoever can't be told is gone.
    pub fn event(&self, event: &impl Serialize) {
        let sent = serde_json::to_value(event).map(Reply::Event).map(|reply| self.send(&reply));
        if !matches!(sent, Ok(Ok(()))) {
            self.cancelled.store(true, Ordering::Relaxed);
        }
    }

    /// Set when nobody wants the answer any more.
    pub fn cancelled(&self) -> Arc<AtomicBool> {
        self.cancelled.clone()
    }

    /// Does the daemon end?
    pub fn is_ending(&self) -> bool {
        self.shared.ending.load(Ordering::Relaxed)
    }

    fn send(&self, reply: &Reply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        locked(&self.stream).write_all(&line)
    }
}

impl Drop for Call {
    /// However it ended: other threads have the connection open as well.
    fn drop(&mut self) {
        let _ = locked(&self.stream).shutdown(Shutdown::Both);
    }
}

#[derive(Default)]
struct Shared {
    ending: AtomicBool,
    calls: Mutex<BTreeMap<u64, Arc<AtomicBool>>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until it is dropped.
pub struct Server {
    path: PathBuf,
    listener: Arc<UnixListener>,
    shared: Arc<Shared>,
}

impl Server {
    /// The caller alone may use this path: what is left there is of a daemon that is gone.
    pub fn start(path: &Path, service: Arc<dyn Service>) -> io::Result<Server> {
        let listener = in_its_directory(path, |path| {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o600))?;
            Ok(Arc::new(listener))
        })?;
        let shared = Arc::new(Shared::default());
        let server = Server { path: path.to_owned(), listener: listener.clone(), shared: shared.clone() };
        crate::rt::try_spawn("lunfs-control", move || accept_all(&listener, &service, &shared))?;
        Ok(server)
    }

    /// Cancels everything and waits until the clients were told; no longer than `most`.
    pub fn stop(&self, most: Duration) {
        self.shared.ending.store(true, Ordering::Relaxed);
        for cancelled in locked(&self.shared.calls).values() {
            cancelled.store(true, Ordering::Relaxed);
        }
        let until = Instant::now() + most;
        while !locked(&self.shared.calls).is_empty() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop(Duration::ZERO);
        let _ = std::fs::remove_file(&self.path);
        // Wakes the thread in accept(2).
        let _ = nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

fn accept_all(listener: &UnixListener, service: &Arc<dyn Service>, shared: &Arc<Shared>) {
    let mut number = 0;
    loop {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            Err(_) if shared.ending.load(Ordering::Relaxed) => return,
            Err(_) => {
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        number += 1;
        let cancelled = Arc::new(AtomicBool::new(false));
        let mut calls = locked(&shared.calls);
        let refusal = if calls.len() >= MOST_CALLS {
            Some(Failure::new(FailureKind::Busy, "the daemon has too many clients"))
        } else {
            None
        };
        if refusal.is_none() {
            calls.insert(number, cancelled.clone());
        }
        drop(calls);
        let (service, shared) = (service.clone(), shared.clone());
        let begun = crate::rt::try_spawn("lunfs-call", move || {
            // A client that went away is no concern of ours, and a panic ends one call only.
            let served = || {
                let call = Call { stream: Mutex::new(client), cancelled, shared: shared.clone() };
                let _ = serve(call, refusal, &*service);
            };
            if crate::rt::catch_panic(served).is_err() {
                log::error!("a command of a client ended by an internal error");
            }
            locked(&shared.calls).remove(&number);
        });
        if begun.is_err() {
            // The client sees its end; there is no thread to tell it more.
            std::thread::sleep(ACCEPT_PAUSE);
        }
    }
}

fn serve(call: Call, refusal: Option<Failure>, service: &dyn Service) -> io::Result<()> {
    let mut reader = {
        let stream = locked(&call.stream);
        stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
        stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
        BufReader::new(stream.try_clone()?)
    };
    let outcome = match refusal.map_or_else(|| request(&mut reader, &call), Err) {
        Ok(request) => {
            let watched = reader.get_ref().try_clone()?;
            watched.set_read_timeout(None)?;
            let cancelled = call.cancelled.clone();
            // Ends with the call, if the client does not end it.
            crate::rt::try_spawn("lunfs-client", move || watch(watched, &cancelled))?;
            service.serve(&request.command, request.arguments, &call)
        }
        Err(failure) => Err(failure),
    };
    call.send(&match outcome {
        Ok(value) => Reply::Done(value),
        Err(failure) => Reply::Failed(failure),
    })
}

fn request(reader: &mut BufReader<UnixStream>, call: &Call) -> Result<Request, Failure> {
    let bad = |text: String| Failure::new(FailureKind::BadArguments, text);
    let peer = getsockopt(reader.get_ref(), PeerCredentials).map_err(|e| bad(e.to_string()))?;
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        return Err(Failure::new(FailureKind::Denied, "only root may ask the daemon"));
    }
    let mut line = Vec::new();
    match read_line(reader, &mut line, MOST_REQUEST_BYTES) {
        Ok(true) => {}
        Ok(false) => return Err(bad("the request ends in the middle".into())),
        Err(e) => return Err(bad(format!("the request can't be read: {e}"))),
    }
    if call.is_ending() {
        return Err(Failure::new(FailureKind::Ended, "the mount is being taken off"));
    }
    let value: Value = serde_json::from_slice(&line).map_err(|e| bad(format!("no JSON: {e}")))?;
    // Looked at first: the rest of a request of another version may be anything.
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        version => {
            let asked = version.map_or("none".to_owned(), |v| v.to_string());
            let text = format!("the daemon speaks version {VERSION} of the protocol, not {asked}");
            return Err(Failure::new(FailureKind::Version, text));
        }
    }
    serde_json::from_value(value).map_err(|e| bad(e.to_string()))
}

/// Until the client closes its side.
fn watch(mut client: UnixStream, cancelled: &AtomicBool) {
    let mut buf = [0; 256];
    loop {
        match client.read(&mut buf) {
            Ok(1..) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return cancelled.store(true, Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::client::{CallError, call};
    use super::*;

    struct Echo;

    impl Service for Echo {
        fn serve(&self, command: &str, arguments: Value, call: &Call) -> Result<Value, Failure> {
            match command {
                "echo" => {
                    for i in 0..3 {
                        call.event(&json!({ "i": i }));
                    }
                    Ok(arguments)
                }
                "until-cancelled" => {
                    call.event(&json!("begun"));
                    while !call.cancelled().load(Ordering::Relaxed) {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    let kind = if call.is_ending() { FailureKind::Ended } else { FailureKind::Cancelled };
                    Err(Failure::new(kind, "it is over"))
                }
                "panic" => panic!("a bad command"),
                _ => Err(Failure::new(FailureKind::UnknownCommand, format!("no command {command}"))),
            }
        }
    }

    fn started(directory: &Path) -> (Server, PathBuf) {
        let deep = directory.join("x".repeat(100));
        std::fs::create_dir_all(&deep).expect("a new directory");
        let path = deep.join("volume@host.control");
        (Server::start(&path, Arc::new(Echo)).expect("a server"), path)
    }

    fn never() -> Arc<AtomicBool> {
        Arc::default()
    }

    fn kind(result: Result<Value, CallError>) -> FailureKind {
        match result {
            Err(CallError::Failed(failure)) => failure.kind,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_request_gets_its_events_and_its_answer() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (server, path) = started(directory.path());
        for _ in 0..3 {
            let mut events = Vec::new();
            let done = call(&path, "echo", json!({ "a": 1 }), &never(), &mut |e| events.push(e));
            assert_eq!(done.expect("an answer"), json!({ "a": 1 }));
            assert_eq!(events, [json!({"i": 0}), json!({"i": 1}), json!({"i": 2})]);
        }
        assert_eq!(
            kind(call(&path, "nothing", Value::Null, &never(), &mut drop)),
            FailureKind::UnknownCommand
        );
        // A command that panics takes nobody with it.
        let gone = call(&path, "panic", Value::Null, &never(), &mut drop);
        assert!(matches!(gone, Err(CallError::Gone)), "{gone:?}");
        drop(server);
        assert!(!path.exists());
        assert!(matches!(call(&path, "echo", Value::Null, &never(), &mut drop), Err(CallError::Connect(_))));
        // What a killed daemon leaves is replaced.
        std::fs::write(&path, "").expect("something left over");
        let (_server, path) = started(directory.path());
        call(&path, "echo", Value::Null, &never(), &mut drop).expect("an answer");
    }

    #[test]
    fn who_goes_away_cancels_and_who_ends_says_so() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (server, path) = started(directory.path());
        let cancel = never();
        let seen = cancel.clone();
        let ended = call(&path, "until-cancelled", Value::Null, &cancel, &mut |_| {
            seen.store(true, Ordering::Relaxed)
        });
        assert_eq!(kind(ended), FailureKind::Cancelled);
        // Gone without a word.
        let request = format!("{{\"version\":{VERSION},\"command\":\"until-cancelled\"}}\n");
        let mut client = in_its_directory(&path, |path| UnixStream::connect(path)).expect("a connection");
        client.write_all(request.as_bytes()).expect("a request");
        client.read_exact(&mut [0; 5]).expect("it began");
        drop(client);
        let start = Instant::now();
        while !locked(&server.shared.calls).is_empty() {
            assert!(start.elapsed() < Duration::from_secs(20), "the call goes on without its client");
            std::thread::sleep(Duration::from_millis(1));
        }
        let asked = path.clone();
        let (begun, begins) = std::sync::mpsc::channel();
        let client = std::thread::spawn(move || {
            call(&asked, "until-cancelled", Value::Null, &never(), &mut |_| {
                let _ = begun.send(());
            })
        });
        begins.recv().expect("it began");
        server.stop(Duration::from_secs(20));
        assert_eq!(kind(client.join().expect("no panic")), FailureKind::Ended);
        assert_eq!(kind(call(&path, "echo", Value::Null, &never(), &mut drop)), FailureKind::Ended);
    }

    #[test]
    fn strange_requests_are_refused_with_a_reason() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (_server, path) = started(directory.path());
        let long = "x".repeat(MOST_REQUEST_BYTES + 10);
        for (request, kind) in [
            ("{\"version\":2,\"command\":7}\n", "\"version\""),
            ("{}\n", "\"version\""),
            ("rubbish\n", "\"bad-arguments\""),
            ("{\"version\":1}\n", "\"bad-arguments\""),
            (long.as_str(), "\"bad-arguments\""),
        ] {
            let mut client = in_its_directory(&path, |path| UnixStream::connect(path)).expect("a connection");
            let _ = client.write_all(request.as_bytes());
            let mut answer = String::new();
            let _ = client.read_to_string(&mut answer);
            assert!(answer.contains(kind), "{request:.40}: {answer}");
        }
    }
}
