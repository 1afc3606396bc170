//! Restarts with `on-exit = keep`, as an upgrade does them: there is no moment without rules.

use crate::client::Client;
use crate::daemon::Daemon;
use crate::ground::{addr, Ground, REMOTE4, REMOTE6};
use crate::kernel::{residue, state};
use crate::sized;
use crate::world::{Server, World};

const CONFIG: &str = "
[global]
on-exit = keep
[tproxy mihomo]
port = 7893
[rules]
drop   = /drop
mihomo = /proxied
";

#[test]
fn a_restart_leaves_no_moment_without_rules() {
    let Some(ground) = Ground::new("restart") else {
        return;
    };
    let mut world = World::new(&ground);
    let _proxy = Server::start("proxy mihomo", &[7893]);
    let direct = ground.cgroup("/direct");
    let cgroups = ["/drop", "/proxied"].map(|path| ground.cgroup(path));
    let mut daemon = Daemon::start(&ground, CONFIG, &[]);
    let before = state();
    let floods = [REMOTE4, REMOTE6].map(|ip| {
        [&cgroups[0], &cgroups[1]].map(|cgroup| Client::udp(cgroup, addr(ip, 7)).flood().spawn())
    });
    world.wire.packets();
    let times = sized(10, 100);
    let mut leaked = Vec::new();
    for i in 0..times {
        match i % 2 {
            0 => assert_eq!(daemon.stop().code(), Some(0)),
            _ => daemon.kill9(),
        }
        leaked.extend(world.wire.to_remote());
        assert_eq!(state(), before, "restart {i}: between the two");
        daemon = Daemon::start(&ground, CONFIG, &[]);
        leaked.extend(world.wire.to_remote());
        assert_eq!(state(), before, "restart {i}");
    }
    println!("{} packets of 4 floods leaked in {times} restarts", leaked.len());
    assert_eq!(leaked, []);
    drop(floods);
    // The floods do reach the wire where nothing holds them back.
    let flood = Client::udp(&direct, addr(REMOTE4, 7)).flood().spawn();
    let passed =
        crate::wait_until(std::time::Duration::from_secs(5), || !world.wire.to_remote().is_empty());
    assert!(passed);
    drop(flood);
    // a stop with another configuration removes all
    daemon.configure(&CONFIG.replace("keep", "remove"));
    daemon.reload();
    assert!(daemon.stop().success());
    assert_eq!(residue(), "");
}
