//! `show`: what `run` would load, as an nft script. Touches nothing.

use std::process::ExitCode;
use std::rc::Rc;

use crate::error::Result;
use crate::options::Options;
use crate::plan;

pub fn show(options: &Options) -> Result<ExitCode> {
    let config = options.load_or_default(false)?;
    let (mut core, root) = super::look(Rc::new(config))?;
    super::print(&plan::script(&mut core, &root))
}
