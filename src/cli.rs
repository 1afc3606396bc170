//! The command line: options to a command, its errors to messages and the exit status.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::process::ExitCode;

use crate::commands::{self, apps, status, watch};
use crate::config::suggest::did_you_mean;
use crate::error::Result;
use crate::log;
use crate::log::Level;
use crate::options::{wrong, Options, DEFAULT_CONFIG};

/// Name, arguments, what it does.
pub const COMMANDS: [(&str, &str, &str); 8] = [
    ("run", "", "program the kernel and keep it in step, in the foreground (the default)"),
    ("check", "[--json]", "validate the configuration, then look at this host"),
    ("explain", "PATH… | --pid PID…", "say which rule decides for a cgroup, and why"),
    ("show", "", "print the table that run would load, as an nft script"),
    (
        "status",
        "[--json | --prometheus | --watch]",
        "print what the kernel holds now, with packets and bytes",
    ),
    ("apps", "[--json | --suggest]", "print who talks now, and which rule decides"),
    ("flush", "", "remove everything that cgtproxy ever put into the kernel"),
    ("exec", "[-u USER] TARGET [--] CMD [ARG…]", "run CMD under TARGET"),
];

/// Options of one command alone: which, name, what it does.
const FLAGS: [(&str, &str, &str); 7] = [
    ("explain", "pid", "the arguments are process ids"),
    ("check", "json", "print JSON"),
    ("status", "json", "print JSON"),
    ("status", "prometheus", "print metrics in the text format of Prometheus"),
    ("status", "watch", "print again every second, with rates"),
    ("apps", "json", "print JSON"),
    ("apps", "suggest", "print lines for [rules] alone"),
];

/// The options of every command, and those of `command` alone.
fn options(command: &str) -> getopts::Options {
    let mut options = getopts::Options::new();
    options.optopt("c", "config", "configuration", "FILE");
    options.optopt("p", "pidfile", "written once the kernel is programmed", "FILE");
    options.optflag("s", "syslog", "log to syslog instead of standard error");
    options.optflagmulti("v", "verbose", "one level more talkative; may be repeated");
    options.optopt("", "ready-fd", "write a newline there when all is in force", "N");
    options.optflag("", "no-seccomp", "run without the system call filter");
    options.optflag("w", "wait", "where run cannot start, try again instead of exiting");
    options.optflag("h", "help", "print this help");
    options.optflag("V", "version", "print the version");
    for (_, name, does) in FLAGS.iter().filter(|(of, ..)| *of == command) {
        options.optflag("", name, does);
    }
    if command == "exec" {
        options.optopt("u", "user", "run CMD as that user", "USER");
    }
    options
}

fn usage() -> String {
    let mut text = String::from("Usage: cgtproxy [OPTIONS] [COMMAND [ARGS]]\n\nCommands:\n");
    for (name, args, does) in COMMANDS {
        match args {
            "" => text.push_str(&format!("    {name:<8} {does}\n")),
            args => text.push_str(&format!("    {name} {args}\n{:13}{does}\n", "")),
        }
    }
    text.push_str(&format!("\nThe configuration is {DEFAULT_CONFIG} unless -c names another."));
    options("").usage(&text)
}

/// Runs the program; the arguments are without its name.
pub fn main(args: Vec<OsString>) -> ExitCode {
    match dispatch(args) {
        Ok(code) => code,
        Err(error) => {
            // a command line's reader gets every line, whatever the log does
            error.to_string().lines().for_each(log::last_words);
            ExitCode::from(error.exit_status())
        }
    }
}

/// Reads options in front of the first argument that is none, or with `floating` among all; gives
/// the other arguments as well. Where the command itself takes options, those behind it are its own.
fn parse(
    options: &mut getopts::Options,
    args: &[OsString],
    floating: bool,
) -> Result<(getopts::Matches, Vec<OsString>)> {
    options.parsing_style(match floating {
        true => getopts::ParsingStyle::FloatingFrees,
        false => getopts::ParsingStyle::StopAtFirstFree,
    });
    let matches = options.parse(args.iter().map(|arg| to_text(arg))).map_err(|fail| {
        let text = of_text(&fail.to_string()).to_string_lossy().into_owned();
        let (first, rest) = text.split_at(1);
        wrong(format!("{}{rest}", first.to_lowercase()))
    })?;
    let free = match floating {
        true => matches.free.iter().map(|text| of_text(text)).collect(),
        // those of CMD as they are
        false => args[args.len() - matches.free.len()..].to_vec(),
    };
    Ok((matches, free))
}

/// In what getopts reads, which is UTF-8 only, the characters from here on stand for bytes of names that
/// are not. They are the last ones of the last private plane.
const BYTES: u32 = 0x10_ff00;

fn to_text(arg: &OsStr) -> String {
    let mut text = String::new();
    for chunk in arg.as_bytes().utf8_chunks() {
        text += chunk.valid();
        text.extend(chunk.invalid().iter().filter_map(|b| char::from_u32(BYTES + u32::from(*b))));
    }
    text
}

/// What was an argument before [`to_text`].
fn of_text(text: &str) -> OsString {
    let mut bytes = Vec::new();
    for c in text.chars() {
        match u32::from(c).checked_sub(BYTES) {
            Some(byte @ 0x80..=0xff) => bytes.push(byte as u8),
            _ => bytes.extend(c.encode_utf8(&mut [0; 4]).bytes()),
        }
    }
    OsString::from_vec(bytes)
}

/// Takes the options of every command; those that were taken before stay unless named again.
fn take(given: &mut Options, matches: &getopts::Matches) -> Result<()> {
    if let Some(text) = matches.opt_str("ready-fd") {
        // 0 to 2 stay in use
        let number = text.parse().ok().filter(|fd| *fd > 2);
        let why = || wrong(format!("--ready-fd expects a number from 3 on, not \"{text}\""));
        given.ready_fd = Some(number.ok_or_else(why)?);
    }
    let file = |name| matches.opt_str(name).map(|text| PathBuf::from(of_text(&text)));
    given.config = file("config").or(given.config.take());
    given.pidfile = file("pidfile").or(given.pidfile.take());
    given.syslog |= matches.opt_present("syslog");
    given.verbose += matches.opt_count("verbose");
    given.no_seccomp |= matches.opt_present("no-seccomp");
    given.wait |= matches.opt_present("wait");
    Ok(())
}

fn dispatch(args: Vec<OsString>) -> Result<ExitCode> {
    let mut given = Options::default();
    let (before, rest) = parse(&mut options(""), &args, false)?;
    take(&mut given, &before)?;
    let (command, rest) = match rest.split_first() {
        Some((command, rest)) => (command.to_string_lossy().into_owned(), rest),
        None => ("run".to_string(), &[][..]),
    };
    // the arguments of CMD are none of our business
    let floating = command != "exec";
    let (mut matches, mut rest) = match known(&command) {
        true => parse(&mut options(&command), rest, floating)?,
        false => (before.clone(), Vec::new()),
    };
    let mut user = None;
    let mut target = None;
    let mut asked = vec![before];
    if command == "exec" && !rest.is_empty() {
        take(&mut given, &matches)?;
        user = matches.opt_str("user");
        target = Some(rest.remove(0).to_string_lossy().into_owned());
        asked.push(matches);
        (matches, rest) = parse(&mut options(&command), &rest, false)?;
        user = matches.opt_str("user").or(user);
    }
    for matches in asked.iter().chain([&matches]) {
        if matches.opt_present("help") {
            return commands::print(&usage());
        }
        if matches.opt_present("version") {
            return commands::print(&format!("cgtproxy {}\n", env!("CARGO_PKG_VERSION")));
        }
    }
    if !known(&command) {
        let names = COMMANDS.iter().map(|(name, _, _)| *name);
        let hint = did_you_mean(&command, names, |name| format!("\"{name}\""));
        return Err(wrong(format!("unknown command \"{command}\"{hint}")));
    }
    take(&mut given, &matches)?;
    log::configure(Level::Notice.louder(given.verbose), false);
    if let (false, Some(extra)) = (["exec", "explain"].contains(&&*command), rest.first()) {
        let extra = extra.to_string_lossy();
        return Err(wrong(format!("{command} takes no argument: \"{extra}\"")));
    }
    match &*command {
        "check" => commands::check::check(&given, matches.opt_present("json")),
        "explain" => match (matches.opt_present("pid"), rest.is_empty()) {
            (true, true) => Err(wrong("explain --pid needs a PID")),
            (false, true) => Err(wrong("explain needs a PATH, or --pid and a PID")),
            (by_pid, false) => commands::explain::explain(&given, by_pid, &rest),
        },
        "show" => commands::show::show(&given),
        "status" => {
            let forms: Forms<3> =
                [("json", status::json), ("prometheus", status::metrics), ("watch", watch::watch)];
            one_of(&matches, "status", forms, status::text)?(&given)
        }
        "apps" => {
            let forms: Forms<2> = [("json", apps::json), ("suggest", apps::lines)];
            one_of(&matches, "apps", forms, apps::text)?(&given)
        }
        "flush" => commands::flush::flush(),
        "exec" => match (target, rest.is_empty()) {
            (None, _) => Err(wrong("exec needs a TARGET and a CMD")),
            (Some(_), true) => Err(wrong("exec needs a CMD behind its TARGET")),
            (Some(target), false) => commands::exec::exec(&given, &target, user.as_deref(), &rest),
        },
        _ => commands::run::run(given),
    }
}

/// How a command prints what it has found.
type Form = fn(&Options) -> Result<ExitCode>;
type Forms<const N: usize> = [(&'static str, Form); N];

/// The form that one of these options asks for, or the `usual` one.
///
/// Errors: there is more than one.
fn one_of<const N: usize>(
    matches: &getopts::Matches,
    command: &str,
    forms: Forms<N>,
    usual: Form,
) -> Result<Form> {
    let mut given = forms.into_iter().filter(|(name, _)| matches.opt_present(name));
    match (given.next(), given.next()) {
        (Some((one, _)), Some((other, _))) => {
            Err(wrong(format!("{command} takes --{one} or --{other}, not both")))
        }
        (form, _) => Ok(form.map_or(usual, |(_, form)| form)),
    }
}

fn known(command: &str) -> bool {
    COMMANDS.iter().any(|(name, _, _)| *name == command)
}
