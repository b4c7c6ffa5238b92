//! The one program. Under the names of mount helpers it behaves as them.

use std::process::ExitCode;

fn main() -> ExitCode {
    lunfs::cli::main(std::env::args_os().collect())
}
