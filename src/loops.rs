//! Whether a proxy's own traffic would come back to it: the cgroup of its listener has the proxy as
//! its target, by itself or by way of other proxies. Pure.

use crate::config::{Config, Target};
use crate::netlink::diag::PortOwner;
use crate::policy;

/// A cgroup's path, fit to print, and the target of its sockets of some owner.
pub type Home = (String, Target);

/// A line for each tproxy whose traffic goes in circles. `listeners` are those of each tproxy's
/// port, in the order of the configuration; `home` knows every cgroup below the cgroup root, by id,
/// and uid.
///
/// It cannot be told from here whether a proxy's packets bear a bypass-mark, or whether it became
/// another user once it was listening.
pub fn find(
    config: &Config,
    listeners: &[Vec<PortOwner>],
    home: impl Fn(u64, u32) -> Option<Home>,
) -> Vec<String> {
    // the tproxies that the traffic of a tproxy goes on to, and from which cgroup below the root
    let next = |index: usize| {
        listeners.get(index).into_iter().flatten().filter_map(|l| {
            let (path, target) = home(l.cgroup, l.uid).unzip();
            let outside = || policy::likely_target(config, config.default_outcome(), l.uid);
            match target.unwrap_or_else(outside) {
                Target::Tproxy(to) => Some((usize::from(to), path)),
                _ => None,
            }
        })
    };
    let mut lines = Vec::new();
    for (start, tproxy) in config.tproxies.iter().enumerate() {
        let mut reached = vec![false; config.tproxies.len()];
        let mut todo = vec![start];
        while let Some(at) = todo.pop() {
            for (to, _) in next(at) {
                if !std::mem::replace(&mut reached[to], true) {
                    todo.push(to);
                }
            }
        }
        let cgroup = next(start).map(|(_, path)| path).next();
        let (true, Some(cgroup)) = (reached[start], cgroup) else {
            continue;
        };
        let (name, port) = (&tproxy.outlet.name, tproxy.port);
        let doubt = match (config.bypass_marks.is_empty(), config.bypass_users.is_empty()) {
            (true, true) => "",
            (false, true) => ", unless its packets bear a bypass-mark",
            (true, false) => ", unless it has become a bypass-user",
            (false, false) => ", unless its packets bear a bypass-mark or a bypass-user's uid",
        };
        // no rule covers the root, nor what is outside
        let remedy = match &cgroup {
            Some(path) if path != "/" => {
                "; begin [rules] with a direct rule for that, or name its user as bypass-user"
            }
            _ => {
                ", which no rule covers: give it a cgroup of its own (start it as a service, or by \
                 cgtproxy exec direct), or name its user as bypass-user, or the mark that it sets \
                 as bypass-mark"
            }
        };
        let place = match cgroup {
            Some(path) => format!("in cgroup {path}"),
            None => "outside the cgroup root".into(),
        };
        lines.push(format!(
            "loop: what [tproxy {name}] sends comes back to it{doubt}: its listener on port {port} \
             is {place}{remedy}"
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Tproxy;
    use crate::testing;

    fn listener(uid: u32, cgroup: u64) -> Vec<PortOwner> {
        vec![PortOwner { uid, cgroup }]
    }

    fn config() -> Config {
        let text = "[tproxy a]\nport = 1\n[tproxy b]\nport = 2\n[tproxy c]\nport = 3\n";
        testing::config(text)
    }

    /// Cgroup n belongs to tproxy n, cgroup 9 to nobody.
    fn home(id: u64, _: u32) -> Option<Home> {
        let target = match id {
            9 => Target::Direct,
            id => Target::Tproxy(id as u16),
        };
        (id < 10).then(|| (format!("/{id}"), target))
    }

    fn looping(config: &Config, listeners: &[Vec<PortOwner>]) -> Vec<String> {
        let names = config.tproxies.iter().map(|t: &Tproxy| t.outlet.name.clone());
        let lines = find(config, listeners, home);
        let said = |name: &String| lines.iter().any(|l| l.contains(&format!("[tproxy {name}]")));
        names.filter(said).collect()
    }

    #[test]
    fn by_itself_and_by_way_of_others() {
        let mut config = config();
        let none = Vec::new;
        let own = [listener(0, 0), none(), none()];
        assert_eq!(looping(&config, &own), ["a"]);
        assert!(find(&config, &own, home)[0].contains("cgroup /0;"));
        assert_eq!(looping(&config, &[listener(0, 9), none(), none()]), [""; 0]);
        // a is chained to b, which goes direct
        assert_eq!(looping(&config, &[listener(0, 1), listener(0, 9), none()]), [""; 0]);
        // a to b and b to a; c only leads there
        let circle = [listener(0, 1), listener(0, 0), listener(0, 1)];
        assert_eq!(looping(&config, &circle), ["a", "b"]);
        // outside the cgroup root, the default decides
        let outside = [listener(0, 77), none(), none()];
        assert_eq!(looping(&config, &outside), [""; 0]);
        config.default = Target::Tproxy(0);
        assert_eq!(looping(&config, &outside), ["a"]);
        config.bypass_users.push(7);
        assert_eq!(looping(&config, &[listener(7, 77), none(), none()]), [""; 0]);
        config.bypass_users.clear();
        let said = |path: &'static str| {
            let home = move |_, _| Some((path.to_string(), Target::Tproxy(0)));
            find(&config, &own, home).remove(0)
        };
        assert!(said("/x").ends_with(
            "is in cgroup /x; begin [rules] with a direct rule for that, or name its user as \
             bypass-user"
        ));
        assert!(said("/").contains("is in cgroup /, which no rule covers: give it a cgroup"));
        assert!(find(&config, &outside, home)[0].contains("is outside the cgroup root, which no"));
    }
}
