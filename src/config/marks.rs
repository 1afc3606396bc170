//! Sections keep their marks while others come, go and move: flows are known by these, also where no
//! rule decides for them any more. Pure.

use super::model::{Config, Route};
use crate::net::{way_name, Bearer, Mark, Marked};
use crate::small::SmallSet;

/// So many marks of sections that are no more are remembered.
const MOST_RETIRED: usize = 256;

fn way(route: &Route) -> String {
    way_name(&route.outlet.name, &route.interface, route.masquerades())
}

impl Config {
    /// The marks that flows bear, those of sections that are no more behind them.
    pub fn marked(&self) -> Vec<Marked> {
        let marked = |(of, name, value)| {
            let mark = Mark { value, mask: self.mask };
            Marked { of, name, mark }
        };
        let tproxies =
            self.tproxies.iter().map(|t| (Bearer::Tproxy, t.outlet.name.clone(), t.outlet.mark));
        let routes = self.routes.iter().flat_map(|route| {
            let own = (Bearer::Route, way(route), route.outlet.mark);
            [own, (Bearer::Forwarded, way(route), route.forward_mark)]
        });
        tproxies.chain(routes).map(marked).chain(self.retired.iter().cloned()).collect()
    }

    /// What has no mark has 0.
    fn marks_mut(&mut self) -> impl Iterator<Item = (Bearer, String, &mut u32)> {
        let tproxies = self.tproxies.iter_mut().map(|tproxy| &mut tproxy.outlet);
        let tproxies = tproxies.map(|o| (Bearer::Tproxy, o.name.clone(), &mut o.mark));
        let routes = self.routes.iter_mut().flat_map(|route| {
            let (own, forwarded) = (way(route), way(route));
            let Route { outlet, forward_mark, .. } = route;
            [(Bearer::Route, own, &mut outlet.mark), (Bearer::Forwarded, forwarded, forward_mark)]
        });
        tproxies.chain(routes)
    }

    /// Whether a flow's mark is that of a section that is no more.
    pub fn is_retired(&self, ct_mark: u32) -> bool {
        self.retired.iter().any(|had| had.mark.value == ct_mark & self.mask)
    }

    /// Has sections keep the marks that they had before, and new ones have such as nobody had, as long
    /// as there are any. What the file says comes first.
    pub fn keep_marks(&mut self, mut before: Vec<Marked>) {
        let mask = self.mask;
        before.retain(|had| had.mark.mask == mask && had.mark.value != 0);
        let said = std::mem::take(&mut self.said_marks);
        let mut taken = said.clone();
        taken.extend([0, self.spoofed_mark()]);
        taken.extend(self.marks_direct().then(|| self.direct_mark()));
        let mut new = Vec::new();
        for (of, name, mark) in self.marks_mut().filter(|(_, _, mark)| !said.contains(&**mark)) {
            let had = before.iter().find(|had| had.of == of && had.name == name);
            match had.map(|had| had.mark.value).filter(|had| taken.insert(*had)) {
                Some(had) => *mark = had,
                None if *mark == 0 => {}
                None => new.push(mark),
            }
        }
        let known: SmallSet<u32> = before.iter().map(|had| had.mark.value).collect();
        for mark in new {
            let first = *mark;
            // the next value of the mask's bits, and round again
            let next = |mark: &u32| {
                Some((mark | !mask).wrapping_add(1) & mask).filter(|next| *next != first)
            };
            let all = || std::iter::successors(Some(first), next);
            let unknown = all().find(|mark| !taken.contains(mark) && !known.contains(mark));
            *mark = unknown.or_else(|| all().find(|mark| !taken.contains(mark))).unwrap_or(first);
            taken.insert(*mark);
        }
        self.said_marks = said;
        before.retain(|had| taken.insert(had.mark.value));
        before.truncate(MOST_RETIRED);
        self.retired = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    /// The marks after each of these files, as `NAME VALUE` with the first value of the mask as 1, those
    /// of what is routed for others aside.
    fn after(mask: &str, files: &[&str]) -> Vec<String> {
        let mut before = Vec::new();
        let mut told = Vec::new();
        for file in files {
            let sections = file.split_whitespace().map(|section| {
                let (name, mark) = section.split_once('=').unwrap_or((section, ""));
                let kind = match name.chars().next() {
                    Some('v') => format!("[route {name}]\ninterface = {name}\n"),
                    _ => format!("[tproxy {name}]\nport = 1\n"),
                };
                if mark.is_empty() {
                    kind
                } else {
                    format!("{kind}mark = {mark}000000\n")
                }
            });
            let sections: String = sections.collect();
            let text = format!(
                "[global]\nfwmark-mask = {mask}\n{sections}[gateway g]\ninterface = lan\n\
                 target = direct\n"
            );
            let mut config = testing::config(text.leak());
            config.keep_marks(before);
            before = config.marked();
            let own = config.outlets().map(|o| format!("{} {}", o.name, o.mark >> 24));
            told.push(own.collect::<Vec<_>>().join(", "));
            let all: SmallSet<u32> = before.iter().map(|marked| marked.mark.value).collect();
            assert_eq!(all.len(), before.len(), "{before:?}");
        }
        told
    }

    #[test]
    fn sections_keep_their_marks() {
        let wide = "0xff000000";
        // put in ahead, taken out, put in again, moved
        let files = ["m v", "n m v", "w m v", "v w n m", "v2 m"];
        let want =
            ["m 1, v 2", "n 4, m 1, v 2", "w 5, m 1, v 2", "w 5, n 4, m 1, v 2", "m 1, v2 6"];
        assert_eq!(after(wide, &files), want);
        // another kind of section is another section, and a mark that is said comes first
        assert_eq!(
            after(wide, &["v1", "m=0x1 v1", "n m v1"]),
            ["v1 1", "m 1, v1 3", "n 4, m 1, v1 3"]
        );
        assert_eq!(after(wide, &["a=0x1 b=0x2", "a=0x2 b=0x1"]), ["a 1, b 2", "a 2, b 1"]);
    }

    /// With few values, those of sections that are no more are used again.
    #[test]
    fn marks_are_used_again_where_there_are_no_others() {
        let narrow = "0x07000000";
        let files = ["a b c d e", "b c d e f", "x"];
        let want = ["a 1, b 2, c 3, d 4, e 5", "b 2, c 3, d 4, e 5, f 7", "x 1"];
        assert_eq!(after(narrow, &files), want);
    }
}
