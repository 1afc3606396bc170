//! The manual page against what `--json` prints: every member of every object is documented, and
//! nothing else is.

use std::collections::BTreeSet;
use std::fs;

use crate::tools::query;

/// Words that the page writes as it writes members.
const COMMANDS: [&str; 4] = ["check", "run", "exec", "status"];

/// The members that cgtproxy(8) gives to a command's object, as paths of names.
fn documented(command: &str) -> BTreeSet<String> {
    let page = fs::read_to_string("conf/man/cgtproxy.8").expect("read the manual page");
    let section = page.split("\n.Sh JSON\n").nth(1).expect("a section on JSON");
    let section = section.split("\n.Sh ").next().expect("its end");
    let part = section.split(&format!(".Ss {command} --json\n")).nth(1);
    let part = part.unwrap_or_else(|| panic!("nothing on {command} --json"));
    let part = part.split("\n.Ss ").next().expect("its end");
    let mut all = BTreeSet::new();
    // the items of each list that is open
    let mut open: Vec<Vec<String>> = vec![vec![String::new()]];
    for line in part.lines() {
        let mut words = line.split(' ').filter(|word| word.chars().any(char::is_alphanumeric));
        match words.next() {
            Some(".Bl") => open.push(Vec::new()),
            Some(".El") => drop(open.pop()),
            Some(".It") => {
                let above = &open[open.len() - 2];
                let names = words.filter(|word| *word != "Cm");
                let items =
                    names.flat_map(|name| above.iter().map(move |at| format!("{at}/{name}")));
                let items: Vec<String> = items.collect();
                all.extend(items.clone());
                *open.last_mut().expect("an open list") = items;
            }
            Some(".Cm") => {
                let names: Vec<&str> = words.filter(|word| !COMMANDS.contains(word)).collect();
                let here = open.last().expect("an item");
                all.extend(
                    here.iter().flat_map(|at| names.iter().map(move |n| format!("{at}/{n}"))),
                );
            }
            _ => {}
        }
    }
    all
}

/// Holds what a command has printed, which must have at least one of every object, to the page.
#[track_caller]
pub fn is_documented(command: &str, json: &str) {
    let paths = "(lambda f: ' '.join(sorted(set(f(f, d, '')))))(lambda f, x, at: \
                 [p for k, v in x.items() for p in [at + '/' + k] + f(f, v, at + '/' + k)] \
                 if isinstance(x, dict) else [p for v in x for p in f(f, v, at)] \
                 if isinstance(x, list) else [])";
    let printed: BTreeSet<String> = query(json, paths).split(' ').map(String::from).collect();
    assert_eq!(printed, documented(command), "{command} --json (left) and its manual page (right)");
}
