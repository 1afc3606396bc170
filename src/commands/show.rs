//! `show`: what `run` would load, as an nft script. Touches nothing.

use std::process::ExitCode;
use std::rc::Rc;

use crate::cgroup::follow::Cgroups;
use crate::error::Result;
use crate::host;
use crate::kernel::Kernel;
use crate::options::Options;
use crate::plan;

pub fn show(options: &Options) -> Result<ExitCode> {
    let config = options.load_or_default(false)?;
    let mut cgroups = Cgroups::look(Rc::new(config))?;
    let needs = plan::needs(cgroups.core.config());
    let devices = match needs.tables_of_others().is_empty() {
        true => Default::default(),
        false => Kernel::open()?.devices_of(&needs).unwrap_or_default(),
    };
    super::print(&plan::script(&mut cgroups.core, &cgroups.root, &devices, host::filters_bridges()))
}
