//! The command line: options to a command, its errors to messages and the exit status.

use std::ffi::OsString;
use std::io::Write;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::commands;
use crate::config::{self, file::Files, Config};
use crate::error::{Error, Result};
use crate::log;
use crate::log::Level;

pub const DEFAULT_CONFIG: &str = "/etc/cgtproxy/cgtproxy.conf";

const COMMANDS: [(&str, &str); 4] = [
    (
        "run",
        "program the kernel and keep it in step, in the foreground (the default)",
    ),
    (
        "check",
        "validate the configuration, then look at this host",
    ),
    (
        "show",
        "print the table that run would load, as an nft script",
    ),
    (
        "flush",
        "remove everything that cgtproxy ever put into the kernel",
    ),
];

/// The options that any command may get.
pub struct Options {
    /// As given; `None` for the default.
    pub config: Option<PathBuf>,
    pub pidfile: Option<PathBuf>,
    pub syslog: bool,
    pub verbose: usize,
    pub ready_fd: Option<RawFd>,
    pub seccomp: bool,
}

impl Options {
    pub fn config_file(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(DEFAULT_CONFIG))
    }

    /// Reads the configuration. The built-in one, everything direct, stands in for the default file
    /// where that is absent; `None` then tells so.
    ///
    /// Errors: every problem of every file, each on its line.
    pub fn load(&self, trusted_only: bool) -> Result<Option<Config>> {
        load_config(self.config_file(), self.config.is_none(), trusted_only)
    }
}

pub fn load_config(file: &Path, is_default: bool, trusted_only: bool) -> Result<Option<Config>> {
    let absent = || matches!(std::fs::symlink_metadata(file), Err(e) if e.kind() == std::io::ErrorKind::NotFound);
    if is_default && absent() {
        return Ok(None);
    }
    match config::load(&Files { trusted_only }, file) {
        Ok(config) => Ok(Some(config)),
        Err(problems) => Err(Error::Usage(
            problems.iter().map(|p| p.to_string()).collect(),
        )),
    }
}

/// Says that the built-in default is used.
pub fn tell_default() {
    log!(
        Notice,
        "{DEFAULT_CONFIG} is absent: using the built-in default, everything direct"
    );
}

fn options() -> getopts::Options {
    let mut options = getopts::Options::new();
    options.parsing_style(getopts::ParsingStyle::FloatingFrees);
    options.optopt("c", "config", "configuration", "FILE");
    options.optopt(
        "p",
        "pidfile",
        "written once the kernel is programmed",
        "FILE",
    );
    options.optflag("s", "syslog", "log to syslog instead of standard error");
    options.optflagmulti("v", "verbose", "one level more talkative; may be repeated");
    options.optopt(
        "",
        "ready-fd",
        "write a newline there when all is in force",
        "N",
    );
    options.optflag("", "no-seccomp", "run without the system call filter");
    options.optflag("h", "help", "print this help");
    options.optflag("V", "version", "print the version");
    options
}

fn usage() -> String {
    let mut text = String::from("Usage: cgtproxy [OPTIONS] [COMMAND [ARGS]]\n\nCommands:\n");
    for (name, does) in COMMANDS {
        text.push_str(&format!("    {name:<9} {does}\n"));
    }
    text.push_str(&format!(
        "\nThe configuration is {DEFAULT_CONFIG} unless -c names another."
    ));
    options().usage(&text)
}

/// Runs the program; the arguments are without its name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    match dispatch(args) {
        Ok(code) => code,
        Err(error) => {
            // a command line's reader gets every line, whatever the log does
            for line in error.to_string().lines() {
                let _ = writeln!(std::io::stderr(), "error: {line}");
                if log::to_syslog() {
                    log!(Error, "{line}");
                }
            }
            ExitCode::from(error.exit_status())
        }
    }
}

/// Its first letter in lower case, for what stands after a colon; option names stay as they are.
fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_ascii_lowercase());
    first.into_iter().chain(chars).collect()
}

fn wrong(text: String) -> Error {
    Error::Usage(vec![format!("{text} (try cgtproxy --help)")])
}

fn dispatch(args: Vec<OsString>) -> Result<ExitCode> {
    let matches = options()
        .parse(args)
        .map_err(|fail| wrong(lower_first(&fail.to_string())))?;
    if matches.opt_present("help") {
        return commands::print(&usage());
    }
    if matches.opt_present("version") {
        return commands::print(&format!("cgtproxy {}\n", env!("CARGO_PKG_VERSION")));
    }
    let ready_fd = match matches.opt_str("ready-fd") {
        None => None,
        Some(text) => match text.parse() {
            Ok(fd) => Some(fd),
            Err(_) => {
                return Err(wrong(format!(
                    "--ready-fd expects a number, not \"{text}\""
                )))
            }
        },
    };
    let options = Options {
        config: matches.opt_str("config").map(PathBuf::from),
        pidfile: matches.opt_str("pidfile").map(PathBuf::from),
        syslog: matches.opt_present("syslog"),
        verbose: matches.opt_count("verbose"),
        ready_fd,
        seccomp: !matches.opt_present("no-seccomp"),
    };
    log::configure(Level::Notice.louder(options.verbose), false);
    let mut free = matches.free.iter().map(String::as_str);
    let command = free.next().unwrap_or("run");
    if !COMMANDS.iter().any(|(name, _)| *name == command) {
        return Err(wrong(format!("unknown command \"{command}\"")));
    }
    if let Some(extra) = free.next() {
        return Err(wrong(format!("{command} takes no argument: \"{extra}\"")));
    }
    match command {
        "run" => commands::run::run(options),
        "check" => commands::check::check(&options),
        "show" => commands::show::show(&options),
        "flush" => commands::flush::flush(),
        _ => unreachable!("{command} is in COMMANDS"),
    }
}
