//! Matches that are not a regex: services and applications by their names.

use crate::client::{expect, under};
use crate::daemon::{run_with, Daemon};
use crate::ground::Ground;
use crate::world::{World, PROXY};

const USER: &str = "/user.slice/user-1000.slice/user@1000.service/app.slice";

/// The names that init systems and desktops give a service or an application, made and removed under
/// a running daemon, in order with regexes.
#[test]
fn services_and_applications_by_name() {
    let ground = ground!("byname");
    let (_world, _proxy) = World::with_proxy(&ground);
    let rules = "[tproxy mihomo]\nport = 7893\n[rules]\n\
                 direct = /services/aria2/free\n\
                 mihomo = service:aria2, wg-quick@wg0\n\
                 drop = app:com.a-b.C,firefox\n\
                 mihomo = /user\\.slice/.*/app-firefox-2\\.scope\n";
    let governed = [
        ("/services/aria2/instance1", "mihomo"),
        ("/services/aria2/free", "direct"),
        ("/openrc.aria2", "mihomo"),
        ("/aria2", "mihomo"),
        ("/system.slice/aria2.service/below", "mihomo"),
        ("/system.slice/system-aria2.slice/aria2@x.service", "mihomo"),
        ("/system.slice/a.slice/wg-quick@wg0.service", "mihomo"),
        ("/system.slice/wg-quick@wg1.service", "direct"),
        ("/system.slice/aria2-helper.service", "direct"),
        ("/x/services/aria2", "direct"),
        (&format!("{USER}/app-gnome-firefox-1.scope"), "drop"),
        (&format!("{USER}/app-firefox-2.scope"), "drop"),
        (&format!("{USER}/snap.firefox.firefox-1.scope"), "drop"),
        (&format!(r"{USER}/app-flatpak-com.a\x2db.C-4711.scope"), "drop"),
        (&format!("{USER}/app-firefox2-1.scope"), "direct"),
        ("/system.slice/app-firefox-1.scope", "direct"),
    ];
    // half of them before the daemon, half after
    let (before, after) = governed.split_at(governed.len() / 2);
    let made = |part: &[(&str, &str)]| part.iter().map(|(path, _)| ground.cgroup(path)).collect();
    let mut cgroups: Vec<_> = made(before);
    let daemon = Daemon::start(&ground, rules, &[]);
    cgroups.extend::<Vec<_>>(made(after));
    for (path, target) in &governed {
        let said = run_with(&ground, rules, &["explain", path]);
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        assert!(said.contains(&format!("    target  {target}\n")), "{path}: {said}");
    }
    let name = |target| if target == "mihomo" { PROXY } else { target };
    let wants = cgroups.iter().zip(governed).map(|(at, (_, target))| (&**at, under(name(target))));
    expect(&wants.collect::<Vec<_>>());

    let said = run_with(&ground, rules, &["explain", "/openrc.aria2"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let means = [
        ": mihomo = service:aria2, wg-quick@wg0\n",
        "    means   /(?:services/|openrc\\.)?aria2\n",
        "    means   /system\\.slice/(?:[^/]+/)*wg-quick@wg0\\.service\n",
        "    matches /openrc.aria2\n",
    ];
    for line in means {
        assert!(said.contains(line), "no {line:?} in\n{said}");
    }
    let said = run_with(&ground, rules, &["check"]);
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(
        said.contains(": mihomo = service:aria2, wg-quick@wg0: decides for 8 cgroups"),
        "{said}"
    );
    assert!(said.contains("tproxies: 1, rules: 4"), "{said}");
    assert!(daemon.stop().success());
}
