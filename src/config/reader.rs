//! Files to sections and entries, and by the table of keys to what they set. Pure: its [`Source`]
//! does the reading.

use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::ini::{self, Line};
use super::keys::{Draft, Key, Kind};
use super::matches::{self, Match};
use super::model::{Place, Problem, Source};
use super::suggest::{did_you_mean, remark};
use super::value::{Result, Setting};

/// Includes may nest this deep.
const MAX_DEPTH: usize = 8;
/// Most files in all, so that files that include each other many times over come to an end.
const MAX_FILES: usize = 1000;
/// Most tproxies: each is two chains, a set and two ip rules that packets pass.
const MAX_TPROXIES: usize = 1000;
/// Most routes: each has a route table.
const MAX_ROUTES: usize = 200;
/// Longest name of a section.
const MAX_NAME: usize = 15;

/// Reads `path` and what it includes. What may refer to a later line is not resolved.
pub(super) fn read(source: &dyn Source, path: &Path) -> (Draft, Vec<Problem>) {
    let mut reader = Reader { source, draft: Draft::new(), stack: Vec::new() };
    reader.file(path, None);
    let problems = std::mem::take(&mut reader.draft.problems);
    (reader.draft, problems)
}

/// Where entries stand.
#[derive(Clone, Copy)]
enum Below {
    /// Before the first header.
    Nothing,
    /// A header that is wrong: its entries are not judged.
    Unknown,
    Section(usize),
}

struct Reader<'a> {
    source: &'a dyn Source,
    draft: Draft,
    /// Files being read, outermost first.
    stack: Vec<PathBuf>,
}

impl Reader<'_> {
    fn problem(&mut self, place: &Place, message: String) {
        self.draft.problems.push(Problem::at(place, &message));
    }

    /// Reads a file; `from` is the line that includes it.
    fn file(&mut self, path: &Path, from: Option<&Place>) {
        let file = Rc::new(path.to_path_buf());
        let text = match self.may_include(path).and_then(|()| self.source.read(path)) {
            Ok(text) => text,
            Err(why) => {
                return match from {
                    Some(place) => {
                        let path = path.display().to_string();
                        let hint = remark(&path);
                        self.problem(place, format!("unable to include {path}: {why}{hint}"))
                    }
                    None => self.problem(&Place { file, line: 0 }, why),
                }
            }
        };
        self.draft.config.files.push(path.to_path_buf());
        if let Some((line, language)) = ini::foreign(&text) {
            let message = format!(
                "this is {language}, not KEY = VALUE: COMING FROM ELSEWHERE in \
                 cgtproxy-recipes(7) has each key's place here"
            );
            return self.problem(&Place { file, line }, message);
        }
        self.stack.push(path.to_path_buf());
        let mut below = Below::Nothing;
        let mut hollow = true;
        for (line, item) in ini::lines(&text) {
            let place = Place { file: file.clone(), line };
            let result = match item {
                Err(why) => Err(why),
                Ok(Line::Header { kind, name }) => {
                    hollow = false;
                    let section = self.header(&place, kind, name);
                    below = section.as_ref().map_or(Below::Unknown, |at| Below::Section(*at));
                    section.map(|_| ())
                }
                Ok(Line::Entry { key, value }) => {
                    self.entry(&place, below, key, value).map_err(|why| why + remark(value))
                }
            };
            if let Err(why) = result {
                self.problem(&place, why);
            }
        }
        self.stack.pop();
        self.draft.config.hollow.extend(hollow.then(|| path.to_path_buf()));
    }

    fn may_include(&self, path: &Path) -> Result<()> {
        let files = &self.draft.config.files;
        if self.stack.iter().any(|p| p == path) {
            Err("it includes itself".into())
        } else if files.iter().any(|p| p == path) {
            Err("it was included before".into())
        } else if self.stack.len() >= MAX_DEPTH {
            Err(format!("nested over {MAX_DEPTH} deep"))
        } else if files.len() >= MAX_FILES {
            Err(format!("more than {MAX_FILES} files"))
        } else {
            Ok(())
        }
    }

    /// The section that a header begins, or goes on with.
    fn header(&mut self, place: &Place, word: &str, name: Option<&str>) -> Result<usize> {
        let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == word) else {
            let hint = did_you_mean(word, Kind::ALL.map(Kind::name), |s| format!("[{s}]"));
            return Err(format!("unknown section [{word}]{hint}"));
        };
        let name = match (kind.has_names(), name) {
            (true, Some(name)) => name,
            (true, None) => return Err(format!("section [{word}] needs a name: [{word} NAME]")),
            (false, Some(name)) => {
                return Err(format!("section [{word}] takes no name: \"{name}\""))
            }
            (false, None) => "",
        };
        if kind.has_names() {
            check_name(kind, name)?;
        }
        let sections = &self.draft.sections;
        let same = |other: Kind| other == kind || other.is_target() && kind.is_target();
        match sections.iter().position(|s| same(s.kind) && s.name == name) {
            Some(at) if !kind.has_names() => Ok(at),
            Some(at) => {
                let (first, other) = (&sections[at].place, sections[at].kind.name());
                match sections[at].kind == kind {
                    true => Err(format!("duplicate section [{word} {name}], first at {first}")),
                    false => {
                        Err(format!("[{word} {name}] has the name of [{other} {name}] at {first}"))
                    }
                }
            }
            None if kind == Kind::Tproxy && self.draft.config.tproxies.len() == MAX_TPROXIES => {
                Err(format!("more than {MAX_TPROXIES} tproxies: \"{name}\""))
            }
            None if kind == Kind::Route && self.draft.config.routes.len() == MAX_ROUTES => {
                Err(format!("more than {MAX_ROUTES} routes: \"{name}\""))
            }
            None => {
                self.draft.open(kind, name, place);
                Ok(self.draft.sections.len() - 1)
            }
        }
    }

    fn entry(&mut self, place: &Place, below: Below, name: &str, value: &str) -> Result<()> {
        let section = match below {
            Below::Unknown => return Ok(()),
            Below::Nothing => return Err(format!("\"{name}\" stands before any section header")),
            Below::Section(at) => &mut self.draft.sections[at],
        };
        if section.kind == Kind::Rules {
            let (what, read) = match matches::read(value, self.source) {
                Ok(what) => (what, Ok(())),
                // its target may be wrong as well
                Err(why) => (Match::Patterns(Vec::new()), Err(why)),
            };
            self.draft.rules.push((name.to_string(), value.to_string(), what, place.clone()));
            return read;
        }
        let Some(key) = section.kind.keys().find(|key| key.name == name) else {
            let names = section.kind.keys().map(|key| key.name);
            let hint = did_you_mean(name, names, |name| format!("\"{name}\""));
            return Err(format!("unknown key \"{name}\" in [{}]{hint}", section.kind.name()));
        };
        match section.said.get(key.name) {
            Some((_, first)) if !key.repeatable => {
                return Err(format!("duplicate key \"{name}\", first set at {first}"))
            }
            Some(_) => {}
            None => {
                section.said.insert(key.name, (value.to_string(), place.clone()));
            }
        }
        if key.name == "include" {
            self.include(place, value);
        }
        let &Key { name: key, takes, set, .. } = key;
        set(&mut self.draft, &Setting { key, takes, value, place, source: self.source })
    }

    fn include(&mut self, place: &Place, value: &str) {
        let found = self.source.glob(&place.beside(value));
        let why = match found {
            // which would be missing in silence
            Ok(files) if files.is_empty() && !remark(value).is_empty() => {
                "no such file".to_string()
            }
            Ok(files) => return files.iter().for_each(|file| self.file(file, Some(place))),
            Err(why) => why,
        };
        self.problem(place, format!("unable to include \"{value}\": {why}{}", remark(value)));
    }
}

fn check_name(kind: Kind, name: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    let first = name.starts_with(|c: char| c.is_ascii_alphabetic());
    let word = kind.name();
    if kind.is_target() && matches!(name, "direct" | "drop") {
        Err(format!("a {word} cannot be named \"{name}\""))
    } else if name.len() <= MAX_NAME && first && name.chars().all(legal) {
        Ok(())
    } else {
        Err(format!(
            "bad {word} name \"{name}\": a letter, then up to 14 letters, digits, \"_\" or \"-\""
        ))
    }
}
