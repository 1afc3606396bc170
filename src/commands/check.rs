//! `check`: every finding about the configuration, one a line.

use std::path::PathBuf;
use std::process::ExitCode;

use nix::errno::Errno;

use crate::cli::{Options, DEFAULT_CONFIG};
use crate::config::file;
use crate::error::{Error, Result};
use crate::kernel::Kernel;

pub fn check(options: &Options) -> Result<ExitCode> {
    let mut findings = String::new();
    let mut finding = |kind: &str, text: &str| findings.push_str(&format!("{kind}: {text}\n"));
    let mut wrong = false;
    match options.load(false) {
        Ok(None) => {
            let what = "is absent: the built-in default is used, everything direct";
            finding("ok", &format!("{DEFAULT_CONFIG} {what}"));
        }
        Ok(Some(config)) => {
            wrong = untrusted_files(&config.files, &mut finding);
            let (tproxies, rules) = (config.tproxies.len(), config.rules.len());
            if !wrong {
                let name = options.config_file().display();
                finding(
                    "ok",
                    &format!("{name}: tproxies: {tproxies}, rules: {rules}"),
                );
            }
        }
        Err(Error::Usage(problems)) => {
            wrong = true;
            problems
                .iter()
                .for_each(|problem| finding("error", problem));
            // the files that were read are not known here; the first one is
            untrusted_files(&[options.config_file().to_path_buf()], &mut finding);
        }
        Err(error) => return Err(error),
    }
    // for want of the privilege nothing can be said
    if let Err(error) = Kernel::open().and_then(|mut kernel| kernel.probe()) {
        if error.errno() != Some(Errno::EPERM) {
            finding("error", &error.to_string());
        }
    }
    super::print(&findings)?;
    Ok(ExitCode::from(if wrong { 2 } else { 0 }))
}

/// Names the files that `run` would refuse because others could change them.
fn untrusted_files(files: &[PathBuf], finding: &mut impl FnMut(&str, &str)) -> bool {
    let mut any = false;
    for path in files {
        if let Ok(Some(why)) = file::untrusted(path) {
            any = true;
            finding(
                "error",
                &format!("{}: {why}; run refuses it", path.display()),
            );
        }
    }
    any
}
