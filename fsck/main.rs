//! `fsck.lunfs`: the same as `lunfs fsck`, under the name that fsck(8) looks for.

use std::process::ExitCode;

use clap::Parser;

/// Check, and with -p or -y repair, a LunFS volume that no host uses.
#[derive(Parser)]
#[command(name = "fsck.lunfs", version, after_help = lunfs::cli::fsck::EXIT_STATUS)]
struct Cli {
    #[command(flatten)]
    args: lunfs::cli::fsck::Args,
}

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => lunfs::cli::fsck::run(cli.args),
        Err(error) => {
            // Help and version are no errors.
            let status = if error.use_stderr() { lunfs::cli::fsck::EXIT_USAGE } else { 0 };
            let _ = error.print();
            ExitCode::from(status)
        }
    }
}
