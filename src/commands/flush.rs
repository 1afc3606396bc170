//! `flush`: removes everything of ours from the kernel and says what it removed.

use std::process::ExitCode;

use crate::cgroup::mount;
use crate::confine;
use crate::error::{Error, Result};
use crate::instance;
use crate::kernel::Kernel;
use crate::nft::table::TABLE;
use crate::policy;
use crate::small::SmallSet;

pub fn flush() -> Result<ExitCode> {
    confine::require_net_admin("flush")?;
    let mut kernel = Kernel::open()?;
    let mut text = String::new();
    // it would put everything back; and none starts meanwhile
    if let Some(pid) = instance::try_claim(&mut kernel)? {
        let pid = instance::with_pid(pid);
        let why = format!("unable to flush while cgtproxy is running{pid}: stop it first");
        return Err(Error::State(why));
    }
    if let Some(Some(owner)) = kernel.table_owner()? {
        let why = format!(
            "unable to flush: another process (netlink port {owner}) owns table inet {TABLE}"
        );
        return Err(Error::State(why));
    }
    let inventory = kernel.inventory().ok().flatten();
    if kernel.remove_table()? {
        // nothing tells the next one of them
        kernel.forget_flows(&inventory.map_or_else(Vec::new, |i| i.view.taken_marks()));
        text.push_str(&format!("removed table inet {TABLE}\n"));
    }
    for entry in kernel.trim_routing(&SmallSet::default())? {
        text.push_str(&format!("did {}\n", entry.command("del")));
    }
    // of the usual cgroup root: no configuration is read here
    if let Ok(root) = mount::find(None) {
        if super::exec::tidy(&root.dir) {
            text.push_str(&format!("removed cgroup {}\n", policy::EXEC));
        }
    }
    if text.is_empty() {
        text.push_str("nothing to remove\n");
    }
    super::print(&text)
}
