//! A private tgtd (Debian package tgt), with one disk as LUN 1.
//!
//! Its compare-and-write exists and isn't entered in its table; `tgt_caw.c` enters it. It is exclusive only with one I/O
//! thread and with the backing store `rdwr`, so these are the defaults; the others are for tests that must notice.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::{Supervised, Unavailable, free_port, require, wait_for_port};

#[derive(Clone, Debug)]
pub struct TgtdOptions {
    pub bytes: u64,
    pub block_bytes: u32,
    /// Switch its compare-and-write on.
    pub compare_and_write: bool,
    /// Let reservations cover UNMAP and WRITE SAME, which tgtd by itself doesn't.
    pub cover_unmap: bool,
    /// More than one: compare-and-writes are not exclusive.
    pub threads: u32,
    /// `rdwr`, or `aio`, with which compare-and-write answers GOOD and does nothing.
    pub backing: &'static str,
}

impl Default for TgtdOptions {
    fn default() -> Self {
        TgtdOptions {
            bytes: 1 << 30,
            block_bytes: 512,
            compare_and_write: true,
            cover_unmap: false,
            threads: 1,
            backing: "rdwr",
        }
    }
}

pub struct Tgtd {
    options: TgtdOptions,
    directory: TempDir,
    port: u16,
    process: Option<Supervised>,
}

const NAME: &str = "iqn.2026-01.org.lunfs.test:tgtd";

impl Tgtd {
    pub fn start(options: TgtdOptions) -> Result<Tgtd, Unavailable> {
        require("tgtd", "tgt")?;
        require("tgtadm", "tgt")?;
        if !nix::unistd::geteuid().is_root() {
            return Err(Unavailable::NotRoot("tgtd"));
        }
        let directory = super::directory("lunfs-tgtd.")?;
        if options.compare_and_write {
            compile_shim(directory.path())?;
        }
        let image = std::fs::File::create(directory.path().join("lun"))?;
        image.set_len(options.bytes)?;
        let mut tgtd = Tgtd { options, directory, port: free_port()?, process: None };
        tgtd.launch()?;
        Ok(tgtd)
    }

    pub fn portal(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub fn name(&self) -> &'static str {
        NAME
    }

    pub fn url(&self) -> String {
        format!("iscsi://{}/{NAME}/1", self.portal())
    }

    pub fn image(&self) -> PathBuf {
        self.directory.path().join("lun")
    }

    /// As a crash of the array: sessions and registrations are gone, what was written is there.
    pub fn crash(&mut self) {
        self.process = None;
    }

    /// After a crash, on the same port with the same bytes.
    pub fn restart(&mut self) -> Result<(), Unavailable> {
        self.process = None;
        self.launch()
    }

    /// Stops executing and answering; connections stay, and what they brought is executed after `resume`.
    pub fn freeze(&self) -> io::Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(Signal::SIGSTOP))
    }

    pub fn resume(&self) -> io::Result<()> {
        self.process.as_ref().map_or(Ok(()), |process| process.signal(Signal::SIGCONT))
    }

    fn control(&self) -> String {
        // A number of its own for each instance; the socket is private already.
        (self.port & 0x7fff).to_string()
    }

    fn launch(&mut self) -> Result<(), Unavailable> {
        let path = self.directory.path();
        let log = path.join("log");
        let (control, threads) = (self.control(), self.options.threads.to_string());
        let portal = format!("portal=127.0.0.1:{}", self.port);
        let (socket, shim) = (path.join("ipc"), path.join("tgt_caw.so"));
        // What a crash left would keep the next one from starting.
        for old in std::fs::read_dir(path)?.flatten() {
            if old.file_name().to_string_lossy().starts_with("ipc") {
                std::fs::remove_file(old.path())?;
            }
        }
        let mut environment = vec![("TGT_IPC_SOCKET", socket.to_string_lossy())];
        if self.options.compare_and_write {
            environment.push(("LD_PRELOAD", shim.to_string_lossy()));
        }
        if self.options.cover_unmap {
            environment.push(("TGT_COVER_UNMAP", "1".into()));
        }
        let environment: Vec<(&str, &str)> =
            environment.iter().map(|(name, value)| (*name, &**value)).collect();
        let arguments = ["-f", "-C", &control, "-t", &threads, "--iscsi", &portal];
        let program = require("tgtd", "tgt")?;
        self.process = Some(Supervised::start(&program, &arguments, &environment, &log)?);
        wait_for_port(self.portal(), &log)?;
        self.configure()?;
        if self.options.compare_and_write {
            let said = std::fs::read_to_string(&log)?;
            if !said.contains("compare-and-write entered") {
                return Err(io::Error::other(format!("compare-and-write was not switched on: {said}")).into());
            }
        }
        Ok(())
    }

    fn configure(&self) -> io::Result<()> {
        let image = self.image();
        let block_bytes = self.options.block_bytes.to_string();
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.admin("sys", "show", &[]).is_err() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.admin("target", "new", &["--tid", "1", "--targetname", NAME])?;
        self.admin(
            "logicalunit",
            "new",
            &[
                "--tid",
                "1",
                "--lun",
                "1",
                "--backing-store",
                &image.to_string_lossy(),
                "--bstype",
                self.options.backing,
                "--blocksize",
                &block_bytes,
            ],
        )?;
        let parameters = "thin_provisioning=1,vendor_id=TGT,product_id=SHARED";
        self.admin("logicalunit", "update", &["--tid", "1", "--lun", "1", "--params", parameters])?;
        self.admin("target", "bind", &["--tid", "1", "--initiator-address", "ALL"])
    }

    fn admin(&self, mode: &str, operation: &str, more: &[&str]) -> io::Result<()> {
        let output = Command::new(require("tgtadm", "tgt").map_err(|e| io::Error::other(e.to_string()))?)
            .env("TGT_IPC_SOCKET", self.directory.path().join("ipc"))
            .args(["-C", &self.control(), "--lld", "iscsi", "--mode", mode, "--op", operation])
            .args(more)
            .output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(io::Error::other(format!("tgtadm {mode} {operation}: {said}")))
    }
}

fn compile_shim(directory: &Path) -> Result<(), Unavailable> {
    let compiler = require("cc", "gcc")?;
    let source = directory.join("tgt_caw.c");
    std::fs::write(&source, include_str!("tgt_caw.c"))?;
    let output = Command::new(compiler)
        .args(["-shared", "-fPIC", "-O2", "-Wall", "-o"])
        .arg(directory.join("tgt_caw.so"))
        .arg(&source)
        .arg("-ldl")
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()).into())
}
