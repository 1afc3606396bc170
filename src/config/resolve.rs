//! A draft to a configuration: what refers to lines that may stand below, targets and marks, and
//! what is missing. Pure.

use crate::small::SmallMap;
use std::rc::Rc;

use super::keys::{Draft, Kind, Section, Unset};
use super::matches::Match;
use super::model::{Config, HoldLine, Outlet, OwnerRule, PatternRule, Place, Problem, Target};
use super::pattern::{compile_within, MAX_COMPILED};
use super::suggest::{did_you_mean, remark};
use super::value::Result;
use crate::net::{self, Mark, KERNEL_TABLES, LAST_PRIORITY};

/// Each has a chain with all lines for owners before it.
const MOST_CLASSES: u16 = 64;

/// Takes what is wrong, and where.
type Report<'a> = dyn FnMut(&Place, String) + 'a;

/// Resolves what could refer to a later line, and adds what is wrong with it to the problems.
pub(super) fn resolve(draft: Draft, problems: &mut Vec<Problem>) -> Config {
    let Draft { mut config, sections, bypass_marks, holds, rules, .. } = draft;
    config.bypass.merge();
    config.outlets_mut().for_each(Outlet::merge);
    config.gateways.iter_mut().for_each(|gateway| gateway.sources.merge());
    config.bypass_marks = bypass_marks.iter().map(|(mark, _)| *mark).collect();
    let mut problem = |place: &Place, message: String| problems.push(Problem::at(place, &message));
    // in file order, as marks are numbered
    let targets = sections.iter().filter_map(|section| Some((section, section.target()?)));
    let targets: Vec<(&Section, Target)> = targets.collect();
    find_missing(&config, &sections, &targets, &mut problem);
    name_targets(&mut config, &sections, &mut problem);
    check_routes(&config, &sections, &mut problem);
    check_priority(&config, &sections, &mut problem);
    if config.mask != 0 {
        assign_marks(&mut config, &targets, &mut problem);
        check_bypass_marks(&config, &targets, &bypass_marks, &mut problem);
    }
    let mut room = MAX_COMPILED;
    for (pattern, place) in holds {
        match compile_within(&pattern, &mut room) {
            Ok(regex) => config.holds.push(HoldLine { pattern, regex, place }),
            Err(why) => problem(&place, why),
        }
    }
    add_rules(&mut config, rules, &mut room, &mut problem);
    config
}

/// Keys that a section needs, or another key of it does.
fn find_missing(
    config: &Config,
    sections: &[Section],
    targets: &[(&Section, Target)],
    problem: &mut Report,
) {
    for section in sections {
        for key in section.kind.keys().filter(|key| !section.said.contains_key(key.name)) {
            if let Unset::Needs(what) = key.unset {
                problem(&section.place, format!("{section} needs {what}"));
            }
        }
    }
    for (section, target) in targets {
        let Some(outlet) = config.outlet(*target) else { continue };
        let keys = [("dns-hijack-tcp", outlet.dns_tcp), ("dns-hijack-local", outlet.dns_local)];
        for (key, _) in keys.iter().filter(|(_, on)| *on) {
            if let (Some((_, place)), None) =
                (section.said.get(key), section.said.get("dns-hijack"))
            {
                problem(place, format!("\"{key}\" needs \"dns-hijack\""));
            }
        }
    }
}

/// The targets of the default and of gateway sections.
fn name_targets(config: &mut Config, sections: &[Section], problem: &mut Report) {
    for section in sections {
        let key = if section.kind == Kind::Gateway { "target" } else { "default" };
        let Some((name, place)) = section.said.get(key) else { continue };
        match (target(config, name), section.kind) {
            (Ok(target), Kind::Gateway) => config.gateways[section.at].target = target,
            (Ok(target), _) => config.default = target,
            (Err(why), _) => problem(place, why),
        }
    }
}

fn check_routes(config: &Config, sections: &[Section], problem: &mut Report) {
    for section in sections.iter().filter(|section| section.kind == Kind::Route) {
        let (route, place) = (&config.routes[section.at], &section.place);
        let said = |key| section.said.get(key).map(|(_, place)| place);
        match (said("interface"), said("table")) {
            (None, None) => problem(
                place,
                format!("{section} needs an interface, or a table that somebody else keeps"),
            ),
            (Some(_), Some(place)) => {
                problem(place, format!("{section} has an interface: \"table\" stands instead"))
            }
            (None, Some(_)) => {
                if let Some(place) = said("gateway") {
                    problem(place, format!("{section}: \"gateway\" needs \"interface\""));
                }
            }
            _ => {}
        }
        let first = config.route_table;
        let own = u64::from(first) + 1 + section.at as u64;
        let last = config.table_of(config.routes.len().saturating_sub(1));
        if u32::try_from(own).ok().is_none_or(|own| KERNEL_TABLES.contains(&own)) {
            let message = format!(
                "{section} would have table {own} for its own (the routes have those behind \
                 route-table {first}): set another route-table"
            );
            problem(place, message);
        }
        if let Some(place) = said("table").filter(|_| (first..=last).contains(&route.table)) {
            let message = format!(
                "\"table\" {}: cgtproxy keeps tables {first} to {last} itself; name another, or \
                 set another route-table",
                route.table
            );
            problem(place, message);
        }
    }
}

/// What takes several ip rules in a row (route.rs) leaves fewer priorities to begin at.
fn check_priority(config: &Config, sections: &[Section], problem: &mut Report) {
    let wildcard = config.gateways.iter().find(|g| g.interfaces.iter().any(|i| i.prefix));
    let second = (sections.iter())
        .find(|section| section.kind == Kind::Route && section.said.contains_key("table"));
    let most = LAST_PRIORITY + 1 - net::priorities(second.is_some(), wildcard.is_some());
    if config.rule_priority > most {
        match (wildcard, second) {
            (Some(gateway), _) => problem(
                &gateway.place,
                format!("an interface with \"*\" needs a rule-priority up to {most}"),
            ),
            (None, Some(section)) => problem(
                &section.place,
                format!("a route with a table needs a rule-priority up to {most}"),
            ),
            (None, None) => {}
        }
    }
}

/// Our ip rules would send a packet with the mark of a target to that all the same.
fn check_bypass_marks(
    config: &Config,
    targets: &[(&Section, Target)],
    bypass_marks: &[(Mark, Place)],
    problem: &mut Report,
) {
    let mask = config.mask;
    for (bypass, place) in bypass_marks {
        let whole = bypass.mask & mask == mask;
        let same = targets.iter().find(|(_, target)| {
            let outlet = config.outlet(*target).filter(|_| whole);
            outlet.is_some_and(|outlet| bypass.value & mask == outlet.mark)
        });
        if let Some((section, _)) = same {
            problem(place, format!("\"bypass-mark\" {:#x} is the mark of {section}", bypass.value));
        }
    }
}

/// The lines of [rules], up to the first that is one too many.
fn add_rules(
    config: &mut Config,
    rules: Vec<(String, String, Match, Place)>,
    room: &mut usize,
    problem: &mut Report,
) {
    for (name, text, what, place) in rules {
        let target = target(config, &name).map_err(|why| problem(&place, why)).ok();
        let text: Rc<str> = text.into();
        let patterns = match (what, target) {
            (Match::Patterns(patterns), _) => patterns,
            (Match::Owners(owners), Some(target)) => {
                let after = config.rules.len();
                let class = match config.owner_rules.last() {
                    Some(last) if last.after == after => last.class,
                    last => last.map_or(0, |last| last.class) + 1,
                };
                if class > MOST_CLASSES {
                    let message = format!(
                        "users and groups between other rules in more than {MOST_CLASSES} places: \
                         \"{text}\""
                    );
                    problem(&place, message);
                    return;
                }
                config.owner_rules.push(OwnerRule { target, text, owners, place, after, class });
                continue;
            }
            (Match::Owners(_), None) => continue,
        };
        for pattern in patterns {
            let regex = compile_within(&pattern, room).map_err(|why| problem(&place, why));
            if regex.is_err() && *room == 0 {
                // said once is enough
                return;
            }
            if let (Some(target), Ok(regex)) = (target, regex) {
                let (text, place) = (text.clone(), place.clone());
                config.rules.push(PatternRule { target, text, pattern, regex, place });
            }
        }
    }
}

fn target(config: &Config, name: &str) -> Result<Target> {
    config.named(name).ok_or_else(|| {
        let names = config.targets().map(|target| config.target_name(target));
        let hint = did_you_mean(name, names, |n| format!("\"{n}\""));
        format!("undefined target \"{name}\"{hint}{}", remark(name))
    })
}

/// The target at position i gets mark i, shifted into the mask, or the next one that is free. What is
/// routed for others has another mark with each route.
fn assign_marks(config: &mut Config, targets: &[(&Section, Target)], problem: &mut Report) {
    let (mask, spoofed) = (config.mask, config.spoofed_mark());
    let direct = config.marks_direct();
    let reserved = |mark: u32| mark == spoofed || direct && mark == mask;
    let mut taken: SmallMap<u32, &Section> = SmallMap::default();
    if let (0, Some((first, _))) = (spoofed, targets.first()) {
        let kind = first.kind.name();
        let message = format!("a {kind} needs a fwmark-mask of two bits or more, not {mask:#x}");
        return problem(&first.place, message);
    }
    for (section, target) in targets {
        let mark = config.outlet(*target).map_or(0, |outlet| outlet.mark);
        let Some((_, place)) = section.said.get("mark") else {
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
                 default is not direct, or lines for users or groups come first"
            );
            problem(place, message);
        } else if let Some(other) = taken.get(&mark) {
            problem(place, format!("mark {mark:#x} is that of {other} already"));
        } else {
            taken.insert(mark, section);
        }
    }
    let most = u32::MAX >> mask.count_zeros();
    let free = |index: u32, taken: &SmallMap<u32, &Section>| {
        let all = (index..=most).chain(1..=most.min(index - 1)).map(|n| spread(n, mask));
        { all }.find(|mark| !taken.contains_key(mark) && !reserved(*mark))
    };
    let none = |section: &Section| format!("no mark left in fwmark-mask {mask:#x} for {section}");
    for (index, (section, target)) in (1..).zip(targets) {
        let Some(outlet) = config.outlet_mut(*target) else { continue };
        match (outlet.mark, free(index, &taken)) {
            (0, Some(mark)) => outlet.mark = mark,
            (0, None) => {
                problem(&section.place, none(section));
                continue;
            }
            _ => {}
        }
        taken.or_insert_with(outlet.mark, || section);
    }
    let forwards = config.forwards();
    let forwarded = targets.iter().filter(|(section, _)| forwards && section.kind == Kind::Route);
    for (index, (section, _)) in (targets.len() as u32 + 1..).zip(forwarded) {
        let route = &mut config.routes[section.at];
        match free(index.min(most), &taken) {
            Some(mark) => {
                route.forward_mark = mark;
                taken.insert(mark, section);
            }
            // that there is none for itself has been said
            None if route.outlet.mark == 0 => {}
            None => problem(&section.place, none(section)),
        }
    }
}

/// The bits of `n` put one by one into the bits of `mask`, lowest first. For a mask without holes,
/// `n` shifted into it.
fn spread(n: u32, mask: u32) -> u32 {
    let bits = (0..32).filter(|bit| mask >> bit & 1 == 1);
    (bits.enumerate()).fold(0, |mark, (i, bit)| mark | (n >> i & 1) << bit)
}
