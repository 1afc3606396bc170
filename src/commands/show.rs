//! `show`: what `run` would load, as an nft script. Touches nothing.

use std::process::ExitCode;
use std::rc::Rc;

use crate::cgroup::follow::Cgroups;
use crate::error::Result;
use crate::options::Options;
use crate::plan;

pub fn show(options: &Options) -> Result<ExitCode> {
    let config = options.load_or_default(false)?;
    let mut cgroups = Cgroups::look(Rc::new(config))?;
    super::print(&plan::script(&mut cgroups.core, &cgroups.root))
}
