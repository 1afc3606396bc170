//! The program: hands the command line to the library, whose head (lib.rs) tells the way through it.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    cgtproxy::cli::main(std::env::args_os().skip(1).collect())
}
