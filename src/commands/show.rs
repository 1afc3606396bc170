//! `show`: what `run` would load, as an nft script. Touches nothing.

use std::process::ExitCode;
use std::rc::Rc;

use crate::cli::{self, Options};
use crate::error::Result;
use crate::plan;

pub fn show(options: &Options) -> Result<ExitCode> {
    let config = options.load(false)?.unwrap_or_else(|| {
        cli::tell_default();
        Default::default()
    });
    let (mut core, root) = super::look(Rc::new(config))?;
    super::print(&plan::script(&mut core, &root))
}
