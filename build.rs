//! Looks for libiscsi, by building a small program against it. Sets `cfg(libiscsi)` where that works; without it
//! the build is pure Rust and says so when somebody names an iSCSI target.
//!
//! The program also proves, at compile time, that the one structure that is read directly has the layout that
//! `device/iscsi/ffi.rs` repeats.

use std::path::Path;
use std::process::Command;

const PROBE: &str = r#"
#include <stddef.h>
#include <iscsi/iscsi.h>
#include <iscsi/scsi-lowlevel.h>
#define AT(field, offset) _Static_assert(offsetof(struct scsi_task, field) == (offset), #field)
AT(status, 0);
AT(xfer_dir, 8);
AT(expxferlen, 12);
AT(cdb, 16);
AT(residual_status, 32);
AT(residual, 40);
AT(sense, 48);
AT(datain, 64);
_Static_assert(offsetof(struct scsi_data, data) == 8, "scsi_data");
_Static_assert(sizeof(struct scsi_iovec) == 16, "scsi_iovec");
int main(void)
{
    struct iscsi_context *context = iscsi_create_context("iqn.2026-01.org.lunfs:probe");
    iscsi_set_noautoreconnect(context, 1);
    return iscsi_destroy_context(context);
}
"#;

/// Versions that may send from within any call that queues something (from 1.20.3) all have threads of their own (from 1.20.1,
/// under the same name of the library).
const THREADS: &str = r#"
#include <iscsi/iscsi.h>
int main(void)
{
    return iscsi_mt_service_thread_start(0);
}
"#;

fn main() {
    println!("cargo:rustc-check-cfg=cfg(libiscsi)");
    println!("cargo:rustc-check-cfg=cfg(libiscsi_sends_at_once)");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CC");
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_PATH");
    if std::env::var_os("CARGO_FEATURE_ISCSI").is_none() {
        return;
    }
    match find() {
        Ok(()) => println!("cargo:rustc-cfg=libiscsi"),
        Err(why) => println!("cargo:warning=built without iSCSI: {why}"),
    }
}

fn find() -> Result<(), String> {
    let out = std::env::var("OUT_DIR").map_err(|e| e.to_string())?;
    let flags = pkg_config().unwrap_or_else(|| vec!["-liscsi".into()]);
    builds(Path::new(&out), PROBE, &flags).map_err(|why| {
        format!("no usable libiscsi ({why}); the package is libiscsi-dev or libiscsi-devel")
    })?;
    if builds(Path::new(&out), THREADS, &flags).is_ok() {
        println!("cargo:rustc-cfg=libiscsi_sends_at_once");
    }
    for flag in flags {
        if let Some(dir) = flag.strip_prefix("-L") {
            println!("cargo:rustc-link-search=native={dir}");
        } else if let Some(library) = flag.strip_prefix("-l") {
            println!("cargo:rustc-link-lib={library}");
        }
    }
    Ok(())
}

/// Can this program be built against the library? If not: what the compiler said first.
fn builds(out: &Path, program: &str, flags: &[String]) -> Result<(), String> {
    let source = out.join("probe.c");
    std::fs::write(&source, program).map_err(|e| e.to_string())?;
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut command = Command::new(&compiler);
    // A function that isn't declared is an error, also for older compilers.
    command.arg("-Werror=implicit-function-declaration");
    command.arg("-o").arg(out.join("probe")).arg(&source).args(flags);
    // The program would be linked statically: then the library must be there as an archive.
    let static_crt =
        std::env::var("CARGO_CFG_TARGET_FEATURE").is_ok_and(|f| f.split(',').any(|f| f == "crt-static"));
    if static_crt {
        command.arg("-static");
    }
    let done = command.output().map_err(|e| format!("{compiler}: {e}"))?;
    if done.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&done.stderr);
    Err(text.lines().find(|line| line.contains("error")).unwrap_or("it can't be linked").to_owned())
}

fn pkg_config() -> Option<Vec<String>> {
    let done = Command::new("pkg-config").args(["--cflags", "--libs", "libiscsi"]).output().ok()?;
    let text = String::from_utf8(done.stdout).ok()?;
    done.status.success().then(|| text.split_whitespace().map(str::to_owned).collect())
}
