//! `config::load` on any text, and on any files that include each other: it never panics, ends in
//! time (libFuzzer's -timeout), and what it accepts can be planned and encoded.
//!
//! The input is one or more files: a line `==> NAME` begins the file NAME, what stands before the
//! first such line is the file that is loaded. A file that is not UTF-8 cannot be read, as in
//! `config::file`.

#![no_main]

use std::path::{Path, PathBuf};

use cgtproxy::cgroup::core::Snapshot;
use cgtproxy::config::{self, Source, Target};
use cgtproxy::netlink::msg::Batch;
use cgtproxy::{plan, policy};
use libfuzzer_sys::{fuzz_target, Corpus};

const MAIN: &str = "/etc/cgtproxy.conf";

struct Files<'a>(Vec<(PathBuf, &'a [u8])>);

impl<'a> Files<'a> {
    fn new(input: &'a [u8]) -> Files<'a> {
        let mut files = vec![(MAIN.into(), &input[..0])];
        let mut start = 0;
        for line in input.split_inclusive(|b| *b == b'\n') {
            let at = line.as_ptr() as usize - input.as_ptr() as usize;
            let name = line.trim_ascii().strip_prefix(b"==> ");
            match name.map(std::str::from_utf8) {
                Some(Ok(name)) => {
                    start = at + line.len();
                    files.push((Path::new("/etc").join(name), &input[start..start]));
                }
                _ => files.last_mut().unwrap().1 = &input[start..at + line.len()],
            }
        }
        Files(files)
    }
}

impl Source for Files<'_> {
    fn read(&self, path: &Path) -> Result<String, String> {
        let found = self.0.iter().find(|(name, _)| name == path);
        let (_, bytes) = found.ok_or("no such file or directory")?;
        String::from_utf8(bytes.to_vec()).map_err(|_| "is not UTF-8".into())
    }

    /// A pattern stands for all files whose name begins with what precedes its first `*`.
    fn glob(&self, pattern: &Path) -> Result<Vec<PathBuf>, String> {
        let pattern = pattern.to_str().ok_or("no file name")?;
        let names = self.0.iter().map(|(name, _)| name);
        let found = names.filter(|name| match pattern.split_once('*') {
            Some((begin, _)) => name.to_string_lossy().starts_with(begin),
            None => *name == Path::new(pattern),
        });
        Ok(found.cloned().collect())
    }

    fn uid(&self, name: &str) -> Option<u32> {
        (name.len() < 8).then_some(name.len() as u32)
    }

    fn gid(&self, name: &str) -> Option<u32> {
        self.uid(name)
    }
}

fuzz_target!(|input: &[u8]| -> Corpus {
    let config = match config::load(&Files::new(input), Path::new(MAIN)) {
        Ok(config) => config,
        Err(problems) => {
            assert!(!problems.is_empty());
            problems.iter().for_each(|problem| {
                let _ = problem.to_string();
            });
            return Corpus::Keep;
        }
    };
    for (i, tproxy) in config.tproxies.iter().enumerate() {
        assert!(
            tproxy.port != 0 && tproxy.outlet.mark != 0 && tproxy.outlet.mark & !config.mask == 0
        );
        assert!(config.tproxies[..i]
            .iter()
            .all(|t| t.outlet.mark != tproxy.outlet.mark && t.outlet.name != tproxy.outlet.name));
    }
    for rule in &config.rules {
        assert!(!matches!(rule.target, Target::Tproxy(i) if config.tproxies.len() <= i.into()));
    }
    let _ = policy::Memo::default().rank(
        &config,
        policy::root_rank(&config),
        b"/services/a/instance1",
        false,
    );
    let contents = plan::contents(
        &config,
        Snapshot::default(),
        &Default::default(),
        &Default::default(),
        [0; 4],
        true,
    );
    let _ = contents.replacement(None, Batch::new(0)).finish();
    let _ = plan::routing(&config);
    Corpus::Keep
});
