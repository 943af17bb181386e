//! The `segpeft-native` program: see `segpeft-native --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    segpeft_native::cli::main()
}
