//! What a good configuration needs of this host and does not find: a listener, a resolver, an
//! interface; and sockets that go past it. Pure; [`Host`] has looked.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use crate::cgroup::core::Core;
use crate::config::{Config, Outlet, Take, Target, Tproxy};
use crate::host::Host;
use crate::listen::{finds, Finds, Origin};
use crate::net::{Family, Ranges, L4};
use crate::netlink::diag;
use crate::netlink::link::Link;
use crate::policy;
use crate::small::SmallSet;

/// What was looked for: `Ok` where it is as it should be, and what is wrong, with the remedy.
pub type Answer = Result<String, String>;

/// Whether this host's own traffic and whether that of gateways may come to a target.
fn uses(config: &Config, target: Target) -> [bool; 2] {
    let is = |other: Target| other == target;
    let own = is(config.default) || config.rule_lines().any(|line| is(line.target()));
    [own, config.gateways.iter().any(|gateway| is(gateway.target))]
}

/// Everything that can be told without the cgroups, each with what it is about.
pub fn of_host(config: &Config, host: &Host) -> Vec<(&'static str, Answer)> {
    let mut all = Vec::new();
    let mut add = |about, findings: Vec<Answer>| {
        all.extend(findings.into_iter().map(|finding| (about, finding)));
    };
    for (index, tproxy) in config.tproxies.iter().enumerate() {
        let (name, port) = (&tproxy.outlet.name, tproxy.port);
        let place = format!("[tproxy {name}]");
        let [own, routed] = uses(config, Target::Tproxy(index as u16));
        if own || routed {
            let (mut listener, mut resolver) = (Vec::new(), Vec::new());
            listens(tproxy, &config.bypass, [own, routed], host, &mut listener);
            resolves(&place, &tproxy.outlet, routed, host, &mut resolver);
            resolver.extend(unanswered(&place, &tproxy.outlet, false, host));
            add("listener", listener);
            add("resolver", resolver);
            let sharing = host.sharing().filter(|l| l.local.port() == port);
            let what = format!("{place}: port {port}");
            add("shared-port", shared(&what, "TPROXY may find the wrong one", "proxy", sharing));
            add("shared-port", shared_resolvers(&place, &tproxy.outlet, routed, host));
            add("limits", limits(&place, &tproxy.outlet));
        } else {
            add("tproxy-unused", vec![Ok(format!("{place}: no rule and no gateway names it"))]);
        }
    }
    for (index, route) in config.routes.iter().enumerate() {
        let place = format!("[route {}]", route.outlet.name);
        let [own, routed] = uses(config, Target::Route(index as u8));
        if own || routed {
            let mut resolver = Vec::new();
            resolves(&place, &route.outlet, routed, host, &mut resolver);
            let answered = route.sends_from_loopback() && route.masquerades();
            resolver.extend(unanswered(&place, &route.outlet, answered, host));
            add("resolver", resolver);
            add("shared-port", shared_resolvers(&place, &route.outlet, routed, host));
        }
        add("limits", limits(&place, &route.outlet));
    }
    add("gateway-interface", absent(config, host).map(Err).collect());
    if !config.tproxies.is_empty() && host.interfaces.iter().flatten().any(is_lo_down) {
        let text =
            "lo is down: what goes to a tproxy is dropped until it is up (ip link set lo up)";
        add("lo", vec![Err(text.into())]);
    }
    all
}

fn is_lo_down(interface: &Link) -> bool {
    interface.name == "lo" && !interface.up
}

/// Name, wildcard address and key.
fn words(family: Family) -> [&'static str; 3] {
    [family.name(), ["0.0.0.0", "[::]"][family as usize], family.word()]
}

/// The names of some families.
fn names(families: impl IntoIterator<Item = Family>) -> String {
    families.into_iter().map(Family::name).collect::<Vec<_>>().join(" and ")
}

/// Whether anybody takes what a tproxy is handed.
fn listens(
    tproxy: &Tproxy,
    bypass: &Ranges,
    [own, routed]: [bool; 2],
    host: &Host,
    findings: &mut Vec<Answer>,
) {
    let (name, port) = (&tproxy.outlet.name, tproxy.port);
    let mut families = Vec::from(Family::BOTH);
    families.retain(|family| tproxy.outlet.family(*family) == Take::Yes);
    families.retain(|family| *family == Family::V4 || host.speaks_ipv6());
    // one of which no destination is named is left alone
    families.retain(|family| tproxy.outlet.only.as_ref().is_none_or(|only| only.has(*family)));
    // and so is one that is bypassed as a whole
    families
        .retain(|family| ![bypass, &tproxy.outlet.bypass].iter().any(|all| all.has_all(*family)));
    for (l4, take) in [(L4::Tcp, tproxy.outlet.tcp), (L4::Udp, tproxy.outlet.udp)] {
        if take != Take::Yes || families.is_empty() {
            continue;
        }
        let what = format!("[tproxy {name}]: {} port {port}", l4.name());
        let (mut wrong, mut nothing, mut opaque) = (Vec::new(), Vec::new(), Vec::new());
        for family in &families {
            let address = tproxy.addresses[*family as usize];
            let look = |from| finds(&host.listeners, (l4, *family), port, address, from);
            let (local, gateway) = (look(Origin::Host), look(Origin::Gateway));
            let best = local.max(gateway);
            match best {
                Finds::Nothing => nothing.push(*family),
                Finds::Opaque => opaque.push(*family),
                Finds::One => {}
            }
            let uses = [(own, local, "this host sends"), (routed, gateway, "gateways hand to it")];
            let missed = uses.iter().filter(|(used, finds, _)| *used && *finds < best);
            wrong.extend(missed.map(|(_, _, whose)| {
                let [family, any, _] = words(*family);
                format!(
                    "{what} is listened on for {family}, but not where TPROXY looks for what \
                     {whose}, so that is refused: let the proxy listen at {any}, or set address \
                     to where it listens"
                )
            }));
        }
        if nothing.len() == families.len() {
            wrong.push(format!(
                "[tproxy {name}]: nothing listens on {} port {port}, so its traffic is refused: \
                 start the proxy with a tproxy inbound on that port",
                l4.name()
            ));
        } else {
            wrong.extend(nothing.iter().map(|family| {
                let [family, any, key] = words(*family);
                format!(
                    "{what} is not listened on for {family}, so {family} traffic is refused: let \
                     the proxy listen at {any} as well, or set {key} = no"
                )
            }));
        }
        if !opaque.is_empty() {
            wrong.push(format!(
                "{what}: what listens there for {} has not set IP_TRANSPARENT, so its traffic is \
                 refused: make it a tproxy inbound, with CAP_NET_ADMIN in effect",
                names(opaque)
            ));
        }
        if wrong.is_empty() {
            findings.push(Ok(format!("{what} is listened on for {}", names(families.clone()))));
        }
        findings.extend(wrong.into_iter().map(Err));
    }
}

/// A line for each target whose lists are empty, so that what was to be its own goes directly.
pub fn idle(config: &Config) -> Vec<String> {
    let tproxies = config.tproxies.iter().map(|tproxy| ("tproxy", &tproxy.outlet));
    let routes = config.routes.iter().map(|route| ("route", &route.outlet));
    let all = tproxies.chain(routes);
    all.filter_map(|(kind, outlet)| takes_nothing(&format!("[{kind} {}]", outlet.name), outlet))
        .collect()
}

fn takes_nothing(place: &str, outlet: &Outlet) -> Option<String> {
    outlet.only.as_ref().is_some_and(Ranges::is_empty).then(|| {
        format!(
            "{place}: only-file names no address, so that everything is left alone: put \
             addresses into the file, or leave out the key"
        )
    })
}

/// What a target does not take, and what is likely not what was meant.
fn limits(place: &str, outlet: &Outlet) -> Vec<Answer> {
    let mut findings = Vec::new();
    let limits = outlet.limits();
    if !limits.is_empty() {
        findings.push(Ok(format!("{place}: {}", limits.join(", "))));
    }
    findings.extend(takes_nothing(place, outlet).map(Err));
    for l4 in [L4::Tcp, L4::Udp] {
        let ((take, ports), key) = (outlet.protocol(l4), l4.nft());
        if take != Take::Yes && !ports.is_empty() {
            findings.push(Err(format!(
                "{place}: {key}-ports says nothing, since {key} is not yes: leave out one \
                 of them"
            )));
        }
    }
    findings
}

/// Whether there are sockets of several users where datagrams are handed over: beside one with
/// SO_REUSEADDR anybody may bind another, which takes all of them, or those of a peer that it is
/// connected with. Of TCP the kernel has no such thing.
fn shared<'a>(
    what: &str,
    why: &str,
    who: &str,
    sockets: impl Iterator<Item = &'a diag::SeenSocket>,
) -> Vec<Answer> {
    let udp = sockets.filter(|socket| socket.protocol == L4::Udp.number());
    let uids: SmallSet<String> = udp.map(|socket| socket.uid.to_string()).collect();
    let several = uids.len() > 1;
    let uids = Vec::from_iter(uids).join(", ");
    let text = || {
        format!(
            "{what} has sockets of several users (uids {uids}), and {why}: end the others, and \
             let the {who} listen on a port that users cannot bind, below the sysctl \
             net.ipv4.ip_unprivileged_port_start"
        )
    };
    Vec::from_iter(several.then(|| Err(text())))
}

/// The same where DNS goes, if that is on this host and users can bind the port.
fn shared_resolvers(place: &str, outlet: &Outlet, routed: bool, host: &Host) -> Vec<Answer> {
    let ends = outlet.dns().filter(|end| host.has(end.ip()) && end.port() >= host.users_from);
    let all = ends.flat_map(|end| {
        let is_at = |l: &diag::SeenSocket, ip| l.is_at(L4::Udp, ip, end.port());
        let of_routed = |l: &diag::SeenSocket| {
            routed && end.ip().is_loopback() && own_wide(host, end).any(|ip| is_at(l, ip))
        };
        let sharing = host.sharing().filter(|l| is_at(l, end.ip()) || of_routed(l));
        let what = format!("{place}: {end}, where its DNS goes,");
        shared(&what, "the wrong one may be asked", "resolver", sharing)
    });
    all.collect()
}

/// Whether anybody answers where a target's DNS goes, if that is on this host.
fn resolves(place: &str, outlet: &Outlet, routed: bool, host: &Host, findings: &mut Vec<Answer>) {
    let takes = |end: &SocketAddr| outlet.family(Family::of(&end.ip())) == Take::Yes;
    let ends = outlet.dns().filter(takes);
    for end in ends.filter(|end| host.has(end.ip())) {
        let (mut silent, mut unreachable) = (Vec::new(), Vec::new());
        for l4 in outlet.dns_protocols() {
            let there = |ip| move |l: &&diag::SeenSocket| l.is_at(l4, ip, end.port());
            let mut listeners = host.listeners.iter().filter(there(end.ip())).peekable();
            if listeners.peek().is_none() {
                silent.push(l4.name());
            } else if routed
                && end.ip().is_loopback()
                && listeners.all(|listener| listener.local.ip().is_loopback())
                && !elsewhere(host, l4, end)
            {
                unreachable.push(l4.name());
            }
        }
        if !silent.is_empty() {
            findings.push(Err(format!(
                "{place}: nothing listens at {end} ({}), where its DNS goes, so it gets no \
                 answer: start the resolver there, or set another dns-hijack",
                silent.join(" and ")
            )));
        }
        if !unreachable.is_empty() {
            findings.push(Err(format!(
                "{place}: what listens at {end} ({}) is not there for gateways, whose DNS \
                 goes to this host's address on their interface: let the resolver listen there too",
                unreachable.join(" and ")
            )));
        }
        if silent.is_empty() && unreachable.is_empty() {
            findings.push(Ok(format!("{place}: {end} is listened on, for its DNS")));
        }
    }
}

/// Whether names are asked of a loopback address, and so from one, while a resolver on another host has
/// these queries: the kernel lets them not out, or no answer in. `answered` is whether IPv4 has its way.
fn unanswered<'a>(
    place: &'a str,
    outlet: &'a Outlet,
    answered: bool,
    host: &'a Host,
) -> impl Iterator<Item = Answer> + 'a {
    let ends = outlet.dns().filter(|end| outlet.dns_local && !host.has(end.ip()));
    ends.filter(move |end| !(answered && end.is_ipv4())).filter_map(move |end| {
        let mut asked = host.nameservers.iter();
        let asked = asked.find(|ip| ip.is_loopback() && ip.is_ipv4() == end.is_ipv4())?;
        Some(Err(format!(
            "{place}: /etc/resolv.conf names {asked}, and what is sent there gets no answer from \
             {end}, since it comes from a loopback address: let dns-hijack name a resolver on this \
             host, or /etc/resolv.conf one elsewhere"
        )))
    })
}

/// Whether some address of this host that is no loopback one is listened on at that port.
fn elsewhere(host: &Host, l4: L4, end: SocketAddr) -> bool {
    own_wide(host, end).any(|ip| host.listeners.iter().any(|l| l.is_at(l4, ip, end.port())))
}

/// The addresses of this host that are no loopback ones, of the family of `end`.
fn own_wide(host: &Host, end: SocketAddr) -> impl Iterator<Item = IpAddr> + '_ {
    let all = host.addresses.iter().copied();
    all.filter(move |ip| !ip.is_loopback() && ip.is_ipv4() == end.is_ipv4())
}

/// Interfaces of gateway sections that are not there.
fn absent<'a>(config: &'a Config, host: &'a Host) -> impl Iterator<Item = String> + 'a {
    let all = config
        .gateways
        .iter()
        .flat_map(|gateway| gateway.interfaces.iter().map(move |interface| (gateway, interface)));
    let known = host.interfaces.is_some();
    let gone = all.filter(move |(_, interface)| {
        known && !interface.prefix && host.interfaces_of(interface).next().is_none()
    });
    gone.map(|(gateway, interface)| {
        let (place, name) = (&gateway.place, &gateway.name);
        format!(
            "{place}: [gateway {name}]: there is no interface {interface} now: nothing comes in by \
             it until there is"
        )
    })
}

/// Most cgroups that are told of by themselves.
const MOST: usize = 10;

/// A line for each cgroup of a tproxy or a route with sockets that are bound to another interface. These
/// leave by it or not at all, so they never come to what they are to go to; the table drops what they
/// send.
pub fn bound(config: &Config, host: &Host, core: &Core) -> Vec<String> {
    let home = core.homes(host.bound.iter().filter_map(|socket| socket.cgroup));
    let mut found: BTreeMap<(String, Target), SmallSet<String>> = BTreeMap::new();
    for socket in &host.bound {
        // 1 is lo
        let away = socket.device > 1;
        let marked = config.bypass_marks.iter().any(|b| socket.mark & b.mask == b.value);
        let Some(cgroup) = socket.cgroup.filter(|_| away && !marked) else {
            continue;
        };
        let default = || policy::likely_target(config, config.default_outcome(), socket.uid);
        let outside = || ("outside the cgroup root".to_string(), default());
        let (path, target) = home(cgroup, socket.uid).unwrap_or_else(outside);
        let device = host.interface_name(socket.device);
        let device = device.unwrap_or_else(|| socket.device.to_string());
        let past = match target {
            Target::Direct | Target::Drop => false,
            Target::Tproxy(_) => true,
            Target::Route(index) => {
                // by which a table of others leads is not for us to know
                let own = &config.routes[usize::from(index)].interface;
                !own.is_empty() && *own != device
            }
        };
        if past {
            found.entry((path, target)).or_default().insert(device);
        }
    }
    let more = found.len().saturating_sub(MOST);
    let mut lines: Vec<String> = (found.iter().take(MOST))
        .map(|((path, target), devices)| {
            let kind = if let Target::Route(_) = target { "route" } else { "tproxy" };
            let name = config.target_name(*target);
            let devices: Vec<&str> = devices.iter().map(String::as_str).collect();
            format!(
                "sockets of cgroup {path} are bound to {}, past [{kind} {name}]: what they send \
                 is dropped; bind the application to no interface, or give it a direct rule",
                devices.join(" and ")
            )
        })
        .collect();
    if more > 0 {
        lines.push(format!("{more} more cgroups have sockets that are bound to an interface"));
    }
    lines
}
