//! The control socket: one JSON object a line, one JSON object back, on a Unix socket.
//!
//! Each request names its operation in `op`; what each takes is in `Request`, and `stop` ends the program. Answers are
//! `{"ok":...}` or `{"error":"..."}`. The same operations are methods of `Target` for tests in the same process.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use serde::Deserialize;
use serde_json::{Value, json};

use crate::faults::Rule;
use crate::lock;
use crate::login::{hex, unhex};
use crate::target::{LunConfig, Target, UnmappedLun};

fn lun_one() -> u16 {
    1
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
enum Request {
    /// Adds a rule, or puts it in the place of the one with the same id.
    Rule {
        rule: Rule,
    },
    RemoveRule {
        id: String,
    },
    ClearRules,
    /// Rules, and how often each was used.
    Rules,
    LosePower {
        #[serde(default)]
        seed: u64,
    },
    Freeze {
        initiator: Option<String>,
    },
    Thaw {
        initiator: Option<String>,
    },
    Cut {
        initiator: Option<String>,
    },
    Attention {
        #[serde(default = "lun_one")]
        lun: u16,
        initiator: Option<String>,
        asc: u8,
        ascq: u8,
    },
    ClearAttentions,
    Resize {
        #[serde(default = "lun_one")]
        lun: u16,
        blocks: u64,
    },
    AddLun {
        lun: LunConfig,
    },
    UnmapLun {
        lun: u16,
    },
    MapLun {
        lun: u16,
    },
    /// Fields of the personality to change.
    Set {
        #[serde(default = "lun_one")]
        lun: u16,
        fields: Value,
    },
    Personality {
        #[serde(default = "lun_one")]
        lun: u16,
    },
    Read {
        #[serde(default = "lun_one")]
        lun: u16,
        lba: u64,
        #[serde(default = "one")]
        blocks: u64,
    },
    Write {
        #[serde(default = "lun_one")]
        lun: u16,
        lba: u64,
        hex: String,
    },
    /// Sessions, registrations, size.
    Status,
    /// Entries after this number.
    Trace {
        #[serde(default)]
        since: u64,
    },
}

fn one() -> u64 {
    1
}

/// Serves a target until a `stop`; the socket is removed then.
pub fn serve(target: Arc<Target>, path: &Path) -> io::Result<()> {
    let unmapped = Mutex::new(HashMap::new());
    serve_lines(path, move |line| carry_out(&target, &unmapped, serde_json::from_str(line)?))
}

/// Serves until a request is `{"op":"stop"}`.
pub fn serve_lines(
    path: &Path,
    answer: impl Fn(&str) -> io::Result<Value> + Send + Sync + 'static,
) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let answer = Arc::new(answer);
    let stop = Arc::new((Mutex::new(false), Condvar::new()));
    let stopping = stop.clone();
    std::thread::Builder::new().name("control".into()).spawn(move || {
        for stream in listener.incoming().flatten() {
            let (answer, stop) = (answer.clone(), stopping.clone());
            let _ = std::thread::Builder::new().name("control".into()).spawn(move || {
                if talk(&stream, &*answer) {
                    *lock(&stop.0) = true;
                    stop.1.notify_all();
                }
            });
        }
    })?;
    let mut stopped = lock(&stop.0);
    while !*stopped {
        stopped = stop.1.wait(stopped).unwrap_or_else(|poisoned| poisoned.into_inner());
    }
    std::fs::remove_file(path)
}

/// One request to a control socket, one answer.
pub fn ask(path: &Path, request: &Value) -> io::Result<Value> {
    let stream = UnixStream::connect(path)?;
    (&stream).write_all(format!("{request}\n").as_bytes())?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Answers until the other end hangs up; true if it asked to stop.
fn talk(mut stream: &UnixStream, answer: &dyn Fn(&str) -> io::Result<Value>) -> bool {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { return false };
        if line.trim().is_empty() {
            continue;
        }
        let stop = serde_json::from_str::<Value>(&line).is_ok_and(|request| request["op"] == "stop");
        let said = match if stop { Ok(Value::Null) } else { answer(&line) } {
            Ok(value) => json!({ "ok": value }),
            Err(e) => json!({ "error": e.to_string() }),
        };
        if stream.write_all(format!("{said}\n").as_bytes()).is_err() || stop {
            return stop;
        }
    }
    false
}

fn carry_out(
    target: &Target,
    unmapped: &Mutex<HashMap<u16, UnmappedLun>>,
    request: Request,
) -> io::Result<Value> {
    Ok(match request {
        Request::Rule { rule } => json!(target.add_rule(rule)),
        Request::RemoveRule { id } => json!(target.remove_rule(&id)),
        Request::ClearRules => json!(target.clear_rules()),
        Request::Rules => json!(target.rules()),
        Request::LosePower { seed } => {
            let loss = target.lose_power(seed)?;
            json!({ "at_risk": loss.at_risk, "went_back": loss.went_back })
        }
        Request::Freeze { initiator } => json!(target.freeze(initiator.as_deref())),
        Request::Thaw { initiator } => json!(target.thaw(initiator.as_deref())),
        Request::Cut { initiator } => json!(target.cut(initiator.as_deref())),
        Request::Attention { lun, initiator, asc, ascq } => {
            json!(target.raise_attention(lun, initiator.as_deref(), asc, ascq)?)
        }
        Request::ClearAttentions => json!(target.clear_attentions()),
        Request::Resize { lun, blocks } => json!(target.resize(lun, blocks)?),
        Request::AddLun { lun } => json!(target.add_lun(lun)?),
        Request::UnmapLun { lun } => {
            let found = target.unmap_lun(lun);
            let there = found.is_some();
            if let Some(found) = found {
                lock(unmapped).insert(lun, found);
            }
            json!(there)
        }
        Request::MapLun { lun } => {
            let found = lock(unmapped).remove(&lun);
            let there = found.is_some();
            if let Some(found) = found {
                target.map_lun(found);
            }
            json!(there)
        }
        Request::Set { lun, fields } => {
            let personality = target.personality(lun)?.with(&fields)?;
            json!(target.set_personality(lun, personality)?)
        }
        Request::Personality { lun } => json!(target.personality(lun)?),
        Request::Read { lun, lba, blocks } => json!(hex(&target.read(lun, lba, blocks.min(4096))?)),
        Request::Write { lun, lba, hex } => {
            let data = unhex(&hex)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not 0x and digits"))?;
            json!(target.write(lun, lba, &data)?)
        }
        Request::Status => status(target)?,
        Request::Trace { since } => json!(target.trace_since(since)),
    })
}

fn status(target: &Target) -> io::Result<Value> {
    let sessions: Vec<String> = target.sessions().iter().map(ToString::to_string).collect();
    let mut luns = Vec::new();
    for number in target.luns() {
        let all = target.reservations(number)?;
        let registrations: Vec<Value> = all
            .registrations
            .iter()
            .map(|one| json!({ "nexus": one.nexus.to_string(), "key": format!("{:#x}", one.key) }))
            .collect();
        let held = all
            .reservation
            .map(|held| json!({ "type": held.kind as u8, "holder": held.holder.map(|one| one.to_string()) }));
        luns.push(json!({
            "lun": number,
            "url": target.url(number),
            "blocks": target.blocks(number)?,
            "not_durable": target.not_durable(number)?,
            "generation": all.generation,
            "registrations": registrations,
            "reservation": held,
        }));
    }
    Ok(json!({ "sessions": sessions, "luns": luns, "executed": target.trace_last() }))
}
