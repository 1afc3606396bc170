//! The configuration: sections and keys to a validated [`Config`], with every error at once.
//! Pure: files, directories and user names come from a [`Source`].

mod automaton;
pub mod file;
pub mod ini;
pub mod keys;
pub mod lint;
mod matches;
mod model;
pub mod pattern;
pub mod propose;
mod reader;
mod resolve;
pub mod suggest;
mod syntax;
mod value;

use std::path::Path;

pub use model::*;

/// Reads `path` and what it includes.
///
/// Errors: every problem of every file, in the order of the files and lines.
pub fn load(source: &dyn Source, path: &Path) -> Result<Config, Vec<Problem>> {
    let (draft, mut problems) = reader::read(source, path);
    let config = resolve::resolve(draft, &mut problems);
    if problems.is_empty() {
        return Ok(config);
    }
    // what the end of the files showed belongs to its line all the same
    let files = &config.files;
    // lists stand behind the files that name them
    let order = |p: &Problem| files.iter().position(|file| *file == p.file).unwrap_or(files.len());
    problems.sort_by(|a, b| (order(a), &a.file, a.line).cmp(&(order(b), &b.file, b.line)));
    // a list that two keys name is read for each
    problems.dedup();
    Err(problems)
}
