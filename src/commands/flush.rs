//! `flush`: removes everything of ours from the kernel and says what it removed.

use std::process::ExitCode;

use crate::error::{Error, Result};
use crate::instance;
use crate::kernel::Kernel;
use crate::nft::ruleset::TABLE;

pub fn flush() -> Result<ExitCode> {
    super::require_net_admin("flush")?;
    let mut kernel = Kernel::open()?;
    let mut text = String::new();
    if let Some(Some(owner)) = kernel.table_owner()? {
        let who = match instance::holder() {
            Some((pid, _)) => format!("pid {pid}"),
            None => format!("netlink port {owner}"),
        };
        let why = format!(
            "unable to flush: a running cgtproxy ({who}) owns table inet {TABLE}; stop it first"
        );
        return Err(Error::State(why));
    }
    if kernel.remove_table()? {
        text.push_str(&format!("removed table inet {TABLE}\n"));
    }
    for entry in kernel.trim_routing(None)? {
        text.push_str(&format!("did {}\n", entry.command("del")));
    }
    if text.is_empty() {
        text.push_str("nothing to remove\n");
    }
    super::print(&text)
}
