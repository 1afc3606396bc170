//! `show`: what `run` would load, as an nft script. Touches nothing.

use std::process::ExitCode;
use std::rc::Rc;

use crate::cgroup::mount;
use crate::cgroup::watch::Watcher;
use crate::cli::{self, Options};
use crate::core::{Action, Core};
use crate::error::Result;
use crate::plan;

pub fn show(options: &Options) -> Result<ExitCode> {
    let config = options.load(false)?.unwrap_or_else(|| {
        cli::tell_default();
        Default::default()
    });
    let root = mount::find(config.cgroup_root.as_deref())?;
    let mut core = Core::new(Rc::new(config), root.level);
    let mut watcher = Watcher::look_only(&root.dir);
    let mut actions = vec![core.start()];
    while let Some(action) = actions.pop() {
        if let Action::Scan(scan) = action {
            let event = watcher.scan(&scan);
            core.step(event, &mut actions);
        }
    }
    super::print(&plan::script(&mut core, &root))
}
