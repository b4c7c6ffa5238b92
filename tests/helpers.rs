//! mount(8), umount(8), mkfs(8) and fstab find LunFS where `contrib/install.sh` puts it.
//!
//! Needs root, /dev/fuse and a mount namespace of its own (so that nothing is really installed); says so and
//! passes where they are missing.

use std::path::Path;
use std::process::Command;

#[test]
fn installed_and_mounted_by_the_systems_tools() {
    let root = nix::unistd::geteuid().is_root();
    let device = std::fs::File::options().read(true).write(true).open("/dev/fuse").is_ok();
    if !(root && device) {
        eprintln!("SKIPPED: needs root ({root}) and /dev/fuse ({device})");
        return;
    }
    let private = Command::new("unshare").args(["--mount", "--propagation", "private", "true"]).status();
    if !private.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: no mount namespace of our own here");
        return;
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let temp = tempfile::tempdir().expect("a temporary directory");
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh"])
        .arg(here.join("tests/helpers/install_and_mount.sh"))
        .arg(env!("CARGO_BIN_EXE_lunfs"))
        .arg(here.join("contrib/install.sh"))
        .arg(temp.path())
        .output()
        .expect("unshare runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert!(said.contains("all of it worked"), "{said}");
    let outside = ["mount.lunfs", "umount.fuse.lunfs"].map(|link| Path::new("/sbin").join(link));
    let ours =
        |path: &Path| std::fs::read_link(path).is_ok_and(|to| to == Path::new("/usr/local/sbin/lunfs"));
    assert!(Path::new("/usr/local/sbin/lunfs").exists() || !outside.iter().any(|link| ours(link)));
}
