//! The `sluice` binary.

fn main() -> std::process::ExitCode {
    sluice::tools::cli::main()
}
