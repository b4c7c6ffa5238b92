//! The test target as a program: `serve`, the fault proxy `proxy`, and `ctl` to talk to either.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};
use lunfs_test_target::proxy::{self, Proxy};
use lunfs_test_target::{Chap, Config, LunConfig, Personality, Target, control};
use serde_json::Value;

#[derive(Parser)]
#[command(about = "An iSCSI target with faults inside, for tests; no target for data")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until `stop` comes over the control socket, or for ever; prints one line `ready URL`
    Serve(Serve),
    /// Stand between an initiator and any target; prints one line `ready ADDRESS`
    Proxy {
        /// The target's portal
        #[arg(long)]
        to: SocketAddr,
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// As {"select":{"kind":"compare_and_write","nth":3},"fault":{"do":"cut_after"}}; several are possible
        #[arg(long)]
        rule: Vec<String>,
        #[arg(long)]
        control: Option<PathBuf>,
    },
    /// Send one JSON request to a control socket and print the answer
    Ctl {
        socket: PathBuf,
        /// As {"op":"status"}
        request: String,
    },
}

#[derive(Args)]
struct Serve {
    /// Port 0: any that is free
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    #[arg(long, default_value = lunfs_test_target::DEFAULT_NAME)]
    name: String,
    /// Bytes of each LUN; K, M, G, T
    #[arg(long, default_value = "1G", value_parser = size)]
    size: u64,
    #[arg(long, default_value_t = 512)]
    block_bytes: u32,
    /// Number of LUNs, from 1 on
    #[arg(long, default_value_t = 1)]
    luns: u16,
    /// Backing file of LUN 1 (others: FILE.2 and so on); memory without
    #[arg(long)]
    file: Option<PathBuf>,
    /// Fields of the personality as a JSON object, as {"volatile_cache":true}
    #[arg(long, default_value = "{}")]
    personality: String,
    /// USER%SECRET
    #[arg(long)]
    chap: Option<String>,
    /// Control socket
    #[arg(long)]
    control: Option<PathBuf>,
    #[arg(long)]
    ping_ms: Option<u64>,
    /// Entries that the trace keeps
    #[arg(long, default_value_t = 100_000)]
    trace: usize,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn size(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
        Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
        Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
        Some((at, 'T' | 't')) => (&text[..at], 1 << 40),
        _ => (text, 1),
    };
    let number = digits.parse::<u64>().map_err(|e| e.to_string())?;
    number.checked_mul(factor).filter(|bytes| *bytes > 0).ok_or_else(|| "no such size".to_owned())
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(serve) => run(serve),
        Command::Proxy { to, listen, rule, control } => stand_between(to, listen, &rule, control.as_deref()),
        Command::Ctl { socket, request } => ask(&socket, &request),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("lunfs-test-target: {e}");
            ExitCode::FAILURE
        }
    }
}

fn stand_between(
    to: SocketAddr,
    listen: SocketAddr,
    rules: &[String],
    control: Option<&std::path::Path>,
) -> io::Result<()> {
    let proxy = Proxy::start(listen, to)?;
    for rule in rules {
        proxy.add_rule(serde_json::from_str(rule)?);
    }
    println!("ready {}", proxy.portal());
    match control {
        Some(path) => proxy::serve(proxy, path),
        None => loop {
            std::thread::park();
        },
    }
}

fn ask(socket: &std::path::Path, request: &str) -> io::Result<()> {
    let answer = control::ask(socket, &serde_json::from_str::<Value>(request)?)?;
    println!("{answer}");
    match answer.get("error") {
        Some(error) => Err(io::Error::other(error.to_string())),
        None => Ok(()),
    }
}

fn run(serve: Serve) -> io::Result<()> {
    let personality = Personality::default().with(&serde_json::from_str(&serve.personality)?)?;
    let luns = (1..=serve.luns)
        .map(|number| {
            let lun = LunConfig::new(number, serve.size).block_bytes(serve.block_bytes);
            let lun = lun.personality(personality.clone());
            match &serve.file {
                None => lun,
                Some(path) if number == 1 => lun.file(path),
                Some(path) => lun.file(format!("{}.{number}", path.display())),
            }
        })
        .collect();
    let chap = match &serve.chap {
        None => None,
        Some(text) => {
            let (user, secret) =
                text.split_once('%').ok_or_else(|| io::Error::other("--chap USER%SECRET"))?;
            Some(Chap {
                user: user.to_owned(),
                secret: secret.to_owned(),
                target_user: String::new(),
                target_secret: String::new(),
            })
        }
    };
    let config = Config {
        listen: serve.listen,
        name: serve.name,
        luns,
        chap,
        ping_ms: serve.ping_ms,
        trace: serve.trace,
        seed: serve.seed,
    };
    let target = Arc::new(Target::start(config)?);
    println!("ready {}", target.url(1));
    match &serve.control {
        Some(path) => control::serve(target, path),
        None => loop {
            std::thread::park();
        },
    }
}
