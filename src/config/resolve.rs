//! A draft to a configuration: what refers to lines that may stand below, targets and marks, and
//! what is missing. Pure.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::keys::{Draft, Kind, Section, Unset};
use super::matches;
use super::model::{Config, Outlet, Place, Problem, Rule, Target};
use super::pattern::{compile_within, MAX_COMPILED};
use super::suggest::did_you_mean;
use super::value::Result;

/// Such interfaces are told by three ip rules in a row (route.rs).
const MOST_WITH_WILDCARD: u32 = 32765 - 2;

/// Resolves what could refer to a later line, and adds what is wrong with it to the problems.
pub(super) fn resolve(draft: Draft, problems: &mut Vec<Problem>) -> Config {
    let Draft { mut config, sections, bypass_marks, rules, .. } = draft;
    config.bypass.merge();
    config.outlets_mut().for_each(Outlet::merge);
    config.bypass_marks = bypass_marks.iter().map(|(mark, _)| *mark).collect();
    let mut problem = |place: &Place, message: String| problems.push(Problem::at(place, &message));

    let of = |kind| sections.iter().filter(move |section| section.kind == kind);
    let targets = sections.iter().filter(|section| section.kind.is_target());
    for section in &sections {
        let (kind, name) = (section.kind.name(), &section.name);
        for key in section.kind.keys().filter(|key| !section.said.contains_key(key.name)) {
            if let Unset::Needs(what) = key.unset {
                problem(&section.place, format!("[{kind} {name}] needs {what}"));
            }
        }
    }
    for (section, outlet) in targets.clone().zip(config.outlets()) {
        let keys = [("dns-hijack-tcp", outlet.dns_tcp), ("dns-hijack-local", outlet.dns_local)];
        for (key, _) in keys.iter().filter(|(_, on)| *on) {
            if let (Some((_, place)), None) =
                (section.said.get(key), section.said.get("dns-hijack"))
            {
                problem(place, format!("\"{key}\" needs \"dns-hijack\""));
            }
        }
    }

    for section in of(Kind::Global) {
        if let Some((name, place)) = section.said.get("default") {
            match target(&config, name) {
                Ok(target) => config.default = target,
                Err(why) => problem(place, why),
            }
        }
    }
    for (index, section) in of(Kind::Gateway).enumerate() {
        if let Some((name, place)) = section.said.get("target") {
            match target(&config, name) {
                Ok(target) => config.gateways[index].target = target,
                Err(why) => problem(place, why),
            }
        }
    }
    let wildcard = config.gateways.iter().find(|g| g.interfaces.iter().any(|i| i.prefix));
    if let (Some(gateway), true) = (wildcard, config.rule_priority > MOST_WITH_WILDCARD) {
        let most = MOST_WITH_WILDCARD;
        let message = format!("an interface with \"*\" needs a rule-priority up to {most}");
        problem(&gateway.place, message);
    }

    if config.mask != 0 {
        assign_marks(&mut config, targets, &mut problem);
        // our ip rules would send a packet with such a mark to the proxy all the same
        let mask = config.mask;
        for (bypass, place) in &bypass_marks {
            let whole = bypass.mask & mask == mask;
            let same = config.outlets().find(|o| whole && bypass.value & mask == o.mark);
            if let Some(outlet) = same {
                let (value, name) = (bypass.value, &outlet.name);
                problem(
                    place,
                    format!("\"bypass-mark\" {value:#x} is the mark of [tproxy {name}]"),
                );
            }
        }
    }

    let mut room = MAX_COMPILED;
    for (name, text, place) in rules {
        let target = target(&config, &name).map_err(|why| problem(&place, why));
        let patterns = matches::patterns(&text).map_err(|why| problem(&place, why));
        let text: Rc<str> = text.into();
        for pattern in patterns.into_iter().flatten() {
            let regex = compile_within(&pattern, &mut room).map_err(|why| problem(&place, why));
            if regex.is_err() && room == 0 {
                // said once is enough
                return config;
            }
            if let (Ok(target), Ok(regex)) = (target, regex) {
                let (text, place) = (text.clone(), place.clone());
                config.rules.push(Rule { target, text, pattern, regex, place });
            }
        }
    }
    config
}

fn target(config: &Config, name: &str) -> Result<Target> {
    config.named(name).ok_or_else(|| {
        let names = config.targets().map(|target| config.target_name(target));
        let hint = did_you_mean(name, names, |n| format!("\"{n}\""));
        format!("undefined target \"{name}\"{hint}")
    })
}

/// The target at position i gets mark i, shifted into the mask, or the next one that is free.
fn assign_marks<'a>(
    config: &mut Config,
    sections: impl Iterator<Item = &'a Section> + Clone,
    problem: &mut impl FnMut(&Place, String),
) {
    let (mask, spoofed) = (config.mask, config.spoofed_mark());
    let direct = config.default != Target::Direct;
    let reserved = |mark: u32| mark == spoofed || direct && mark == mask;
    let mut taken: BTreeMap<u32, &str> = BTreeMap::new();
    if let (0, Some(first)) = (spoofed, sections.clone().next()) {
        let message = format!("a tproxy needs a fwmark-mask of two bits or more, not {mask:#x}");
        return problem(&first.place, message);
    }
    for (section, outlet) in sections.clone().zip(config.outlets()) {
        let (mark, Some((_, place))) = (outlet.mark, section.said.get("mark")) else {
            continue;
        };
        if mark == 0 {
            // it could not be read
        } else if mark & !mask != 0 {
            problem(place, format!("mark {mark:#x} is not within fwmark-mask {mask:#x}"));
        } else if mark == spoofed {
            let message = format!(
                "mark {mark:#x} is fwmark-mask without its lowest bit, which stands for flows that \
                 a proxy begins"
            );
            problem(place, message);
        } else if reserved(mark) {
            let message = format!(
                "mark {mark:#x} is the whole fwmark-mask, which stands for direct flows where the \
                 default is not direct"
            );
            problem(place, message);
        } else if let Some(other) = taken.get(&mark) {
            problem(place, format!("mark {mark:#x} is that of [tproxy {other}] already"));
        } else {
            taken.insert(mark, &section.name);
        }
    }
    for ((index, section), outlet) in (1..).zip(sections).zip(config.outlets_mut()) {
        let most = u32::MAX >> mask.count_zeros();
        let mut free = (index..=most)
            .chain(1..=most.min(index - 1))
            .map(|n| spread(n, mask))
            .filter(|mark| !taken.contains_key(mark) && !reserved(*mark));
        match (outlet.mark, free.next()) {
            (0, Some(mark)) => outlet.mark = mark,
            (0, None) => {
                let name = &section.name;
                let message = format!("no mark left in fwmark-mask {mask:#x} for [tproxy {name}]");
                problem(&section.place, message);
                continue;
            }
            _ => {}
        }
        taken.entry(outlet.mark).or_insert(&section.name);
    }
}

/// The bits of `n` put one by one into the bits of `mask`, lowest first. For a mask without holes,
/// `n` shifted into it.
fn spread(n: u32, mask: u32) -> u32 {
    let bits = (0..32).filter(|bit| mask >> bit & 1 == 1);
    (bits.enumerate()).fold(0, |mark, (i, bit)| mark | (n >> i & 1) << bit)
}
