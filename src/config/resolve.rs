//! What entries refer to, which may stand below them: targets and marks. Pure.

use std::collections::BTreeMap;

use super::model::{Config, Problem, Rule, Target, Tproxy};
use super::pattern::{compile_within, MAX_COMPILED};
use super::reader::Reader;
use super::suggest::did_you_mean;

impl Reader<'_> {
    /// Resolves what could refer to a later line: targets and marks.
    pub(super) fn finish(mut self) -> Result<Config, Vec<Problem>> {
        for draft in std::mem::take(&mut self.tproxies) {
            if !draft.has_port {
                let name = &draft.tproxy.name;
                self.problem(&draft.place, format!("[tproxy {name}] needs a port"));
            }
            let dns = [
                ("dns-hijack-tcp", draft.tproxy.dns_tcp),
                ("dns-hijack-local", draft.tproxy.dns_local),
            ];
            for (key, on) in dns {
                if on && !draft.has_dns {
                    let place = draft.keys.get(key).unwrap_or(&draft.place).clone();
                    self.problem(&place, format!("\"{key}\" needs \"dns-hijack\""));
                }
            }
            self.config.tproxies.push(draft.tproxy.clone());
            self.tproxies.push(draft);
        }
        if let Some((name, place)) = self.default.take() {
            match self.target(&name) {
                Ok(target) => self.config.default = target,
                Err(why) => self.problem(&place, why),
            }
        }
        self.finish_gateways();
        if !self.mask_is_bad {
            self.assign_marks();
            self.check_bypass_marks();
        }
        let mut room = MAX_COMPILED;
        for (target, pattern, place) in std::mem::take(&mut self.rules) {
            let target = self.target(&target).map_err(|why| self.problem(&place, why));
            let regex = compile_within(&pattern, &mut room);
            let regex = regex.map_err(|why| self.problem(&place, why));
            let full = regex.is_err() && room == 0;
            if let (Ok(target), Ok(regex)) = (target, regex) {
                self.config.rules.push(Rule { target, pattern, regex, place });
            }
            if full {
                // said once is enough
                break;
            }
        }
        if self.problems.is_empty() {
            return Ok(self.config);
        }
        // what the end of the files showed belongs to its line all the same
        let files: BTreeMap<_, _> = self.config.files.iter().zip(0..).collect();
        self.problems.sort_by_key(|p| (files.get(&p.file).copied(), p.line));
        Err(self.problems)
    }

    fn finish_gateways(&mut self) {
        let mut wildcard = None;
        for draft in std::mem::take(&mut self.gateways) {
            let mut gateway = draft.gateway;
            let name = &gateway.name;
            if !draft.has_interface {
                let message = format!("[gateway {name}] needs an interface");
                self.problem(&gateway.place, message);
            }
            match &draft.target {
                Some((target, place)) => match self.target(target) {
                    Ok(target) => gateway.target = target,
                    Err(why) => self.problem(place, why),
                },
                None if !draft.keys.contains_key("target") => {
                    let message = format!("[gateway {name}] needs a target");
                    self.problem(&gateway.place, message);
                }
                None => {}
            }
            if gateway.interfaces.iter().any(|i| i.prefix) {
                wildcard = wildcard.or(Some(gateway.place.clone()));
            }
            self.config.gateways.push(gateway);
        }
        // such interfaces are told by three ip rules in a row (route.rs)
        let most = 32765 - 2;
        if let (Some(place), true) = (wildcard, self.config.rule_priority > most) {
            let message = format!("an interface with \"*\" needs a rule-priority up to {most}");
            self.problem(&place, message);
        }
    }

    fn target(&self, name: &str) -> Result<Target, String> {
        match name {
            "direct" => Ok(Target::Direct),
            "drop" => Ok(Target::Drop),
            _ => match self.config.tproxies.iter().position(|t| t.name == name) {
                Some(index) => Ok(Target::Tproxy(index as u16)),
                None => {
                    let names = self.config.tproxies.iter().map(|t| t.name.as_str());
                    let names = names.chain(["direct", "drop"]);
                    let hint = did_you_mean(name, names, |n| format!("\"{n}\""));
                    Err(format!("undefined target \"{name}\"{hint}"))
                }
            },
        }
    }

    /// The tproxy at position i gets mark i, shifted into the mask, or the next one that is free.
    fn assign_marks(&mut self) {
        let mask = self.config.mask;
        let spoofed = self.config.spoofed_mark();
        let direct = self.config.default != Target::Direct;
        let reserved = |mark: u32| mark == spoofed || direct && mark == mask;
        let mut taken: BTreeMap<u32, String> = BTreeMap::new();
        let drafts = std::mem::take(&mut self.tproxies);
        if let (0, Some(first)) = (spoofed, drafts.first()) {
            let message =
                format!("a tproxy needs a fwmark-mask of two bits or more, not {mask:#x}");
            self.problem(&first.place, message);
            return;
        }
        for draft in &drafts {
            let Some((mark, place)) = &draft.mark else {
                continue;
            };
            let (mark, name) = (*mark, &draft.tproxy.name);
            if mark & !mask != 0 {
                self.problem(place, format!("mark {mark:#x} is not within fwmark-mask {mask:#x}"));
            } else if mark == spoofed {
                let message = format!(
                    "mark {mark:#x} is fwmark-mask without its lowest bit, which stands for flows \
                     that a proxy begins"
                );
                self.problem(place, message);
            } else if reserved(mark) {
                let message = format!(
                    "mark {mark:#x} is the whole fwmark-mask, which stands for direct flows where \
                     the default is not direct"
                );
                self.problem(place, message);
            } else if let Some(other) = taken.get(&mark) {
                self.problem(place, format!("mark {mark:#x} is that of [tproxy {other}] already"));
            } else {
                taken.insert(mark, name.clone());
            }
        }
        for (index, draft) in drafts.iter().enumerate() {
            let free = || {
                let (first, most) = (1 + index as u32, u32::MAX >> mask.count_zeros());
                (first..=most)
                    .chain(1..=most.min(index as u32))
                    .map(|n| spread(n, mask))
                    .find(|m| !taken.contains_key(m) && !reserved(*m))
            };
            let name = &draft.tproxy.name;
            let mark = match &draft.mark {
                Some((mark, _)) => *mark,
                None => match free() {
                    Some(mark) => mark,
                    None => {
                        let message =
                            format!("no mark left in fwmark-mask {mask:#x} for [tproxy {name}]");
                        self.problem(&draft.place, message);
                        continue;
                    }
                },
            };
            taken.entry(mark).or_insert_with(|| name.clone());
            self.config.tproxies[index].mark = mark;
        }
    }

    /// Our ip rules would send a packet with such a mark to the proxy all the same.
    fn check_bypass_marks(&mut self) {
        let mask = self.config.mask;
        for (bypass, place) in std::mem::take(&mut self.bypass_marks) {
            let is = |t: &&Tproxy| bypass.mask & mask == mask && bypass.value & mask == t.mark;
            if let Some(tproxy) = self.config.tproxies.iter().find(is) {
                let (value, name) = (bypass.value, &tproxy.name);
                let message = format!("\"bypass-mark\" {value:#x} is the mark of [tproxy {name}]");
                self.problem(&place, message);
            }
        }
    }
}

/// The bits of `n` put one by one into the bits of `mask`, lowest first. For a mask without holes,
/// `n` shifted into it.
fn spread(n: u32, mask: u32) -> u32 {
    let bits = (0..32).filter(|bit| mask >> bit & 1 == 1);
    (bits.enumerate()).fold(0, |mark, (i, bit)| mark | (n >> i & 1) << bit)
}
