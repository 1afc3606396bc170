//! One command a file, and what several of them need.

pub mod apps;
pub mod check;
pub mod containers;
pub mod exec;
pub mod explain;
pub mod flush;
mod metrics;
pub mod run;
mod screen;
pub mod show;
pub mod status;
mod table;
pub mod watch;

use std::io::Write;
use std::process::ExitCode;

use crate::cgroup::core::Core;
use crate::config::Config;
use crate::error::{errno, Error, Result};
use crate::host::Host;
use crate::kernel::Kernel;
use crate::loops;
use crate::netlink::diag;
use crate::plan;
use crate::tunnels;

/// Prints to standard output. A reader that has gone (`cgtproxy show | head`) is no error.
pub fn print(text: &str) -> Result<ExitCode> {
    write(text).map(|_| ExitCode::SUCCESS)
}

/// Prints to standard output; false where the reader has gone.
pub fn write(text: &str) -> Result<bool> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::system("unable to write to standard output", errno(&e))),
    }
}

/// A line for each proxy and each tunnel whose own traffic comes back to it.
pub fn loops(
    config: &Config,
    host: &Host,
    core: &Core,
    kernel: Option<&mut Kernel>,
) -> Vec<String> {
    let listeners = |port| {
        let all = host.listeners.iter().filter(move |listener| listener.local.port() == port);
        all.filter_map(|l| Some(diag::PortOwner { uid: l.uid, cgroup: l.cgroup? })).collect()
    };
    let listeners: Vec<Vec<_>> = config.tproxies.iter().map(|t| listeners(t.port)).collect();
    let ids = listeners.iter().flatten().map(|listener| listener.cgroup);
    let mut lines = loops::find(config, &listeners, core.homes(ids));
    if !config.routes.is_empty() {
        let asked = kernel.map(|kernel| {
            let links = kernel.links_of(&plan::needs(config));
            (links, kernel.marked_sockets(&config.bypass_marks))
        });
        let (links, spared) = asked.unwrap_or_default();
        lines.extend(tunnels::of_programs(config, core, &spared));
        lines.extend(tunnels::of_the_kernel(config, &links));
    }
    lines
}
