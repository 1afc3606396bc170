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
    let mut config = options.load_or_default(false)?;
    // as `run` would; where the table cannot be read, as if there was none
    config.keep_marks(Kernel::open().map(|mut kernel| kernel.marked()).unwrap_or_default());
    let mut cgroups = Cgroups::look(Rc::new(config))?;
    let needs = plan::needs(cgroups.core.config());
    let devices = match needs.tables_of_others().is_empty() {
        true => Default::default(),
        false => Kernel::open()?.devices_of(&needs).unwrap_or_default(),
    };
    super::print(&plan::script(&mut cgroups.core, &cgroups.root, &devices, host::filters_bridges()))
}
