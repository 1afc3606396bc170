//! The servers, each as its own documentation has it run behind TPROXY.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::Command;

/// What the remote host sees of a server without a tunnel.
pub const EXIT4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9));
pub const EXIT6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 9));

/// How a server reaches the world.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By ss-server outside, at 192.0.2.2:8388.
    Shadowsocks,
    /// From the addresses [`EXIT4`] and [`EXIT6`].
    Source,
}

pub struct Software {
    pub name: &'static str,
    pub command: &'static str,
    pub exit: Exit,
    pub udp: bool,
    /// Takes any protocol over TCP, not HTTP alone.
    pub raw_tcp: bool,
    /// Has a resolver on 127.0.0.1:1053 that answers with addresses of 198.18.0.0/16.
    pub dns: bool,
    /// The command to run, given a private directory and the program. Listens on port 7893.
    pub launch: fn(&Path, &Path) -> Command,
}

const ANY: Software = Software {
    name: "",
    command: "",
    exit: Exit::Shadowsocks,
    udp: true,
    raw_tcp: true,
    dns: false,
    launch: |_, program| Command::new(program),
};

pub const SERVERS: [Software; 6] = [
    Software { name: "mihomo", command: "mihomo", dns: true, launch: mihomo, ..ANY },
    Software { name: "v2ray", command: "v2ray", launch: v2ray, ..ANY },
    Software { name: "shadowsocks-libev", command: "ss-redir", launch: ss_redir, ..ANY },
    Software { name: "shadowsocks-rust", command: "sslocal", launch: sslocal, ..ANY },
    Software {
        name: "haproxy",
        command: "haproxy",
        exit: Exit::Source,
        udp: false,
        launch: haproxy,
        ..ANY
    },
    Software {
        name: "squid",
        command: "squid",
        exit: Exit::Source,
        udp: false,
        raw_tcp: false,
        launch: squid,
        ..ANY
    },
];

fn file(dir: &Path, name: &str, text: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).expect("write a server's configuration");
    path
}

fn mihomo(dir: &Path, program: &Path) -> Command {
    let text = "tproxy-port: 7893\nallow-lan: true\nbind-address: '*'\nmode: rule\nipv6: true\n\
                log-level: warning\nfind-process-mode: 'off'\n\
                proxies:\n- {name: out, type: ss, server: 192.0.2.2, port: 8388, \
                cipher: aes-128-gcm, password: secret, udp: true}\n\
                rules:\n- MATCH,out\n\
                dns: {enable: true, listen: '0.0.0.0:1053', ipv6: true, enhanced-mode: fake-ip, \
                fake-ip-range: 198.18.0.1/16, nameserver: [203.0.113.7]}\n";
    file(dir, "config.yaml", text);
    let mut command = Command::new(program);
    command.arg("-d").arg(dir);
    command
}

fn v2ray(dir: &Path, program: &Path) -> Command {
    let inbound = |listen: &str| {
        format!(
            r#"{{"listen": "{listen}", "port": 7893, "protocol": "dokodemo-door",
                "settings": {{"network": "tcp,udp", "followRedirect": true}},
                "streamSettings": {{"sockopt": {{"tproxy": "tproxy"}}}}}}"#
        )
    };
    let text = format!(
        r#"{{"log": {{"loglevel": "warning"}}, "inbounds": [{}],
            "outbounds": [{{"protocol": "shadowsocks", "settings": {{"servers": [
              {{"address": "192.0.2.2", "port": 8388, "method": "aes-128-gcm",
                "password": "secret"}}]}}}}]}}"#,
        inbound("::")
    );
    let path = file(dir, "v2ray.json", &text);
    let mut command = Command::new(program);
    command.arg("-config").arg(path);
    command
}

fn ss_redir(dir: &Path, program: &Path) -> Command {
    // its listener on :: takes TCP of both families, but UDP over IPv6 alone
    let one = |more: &str| {
        let program = program.display();
        format!("{program} -s 192.0.2.2 -p 8388 -l 7893 -k secret -m aes-128-gcm -t 300 -T {more}")
    };
    let script = format!("{} &\n{} &\nwait\n", one("-b :: -u"), one("-b 0.0.0.0 -U"));
    let path = file(dir, "ss-redir.sh", &script);
    let mut command = Command::new("sh");
    command.arg(path);
    command
}

fn sslocal(dir: &Path, program: &Path) -> Command {
    let local = |address: &str| {
        format!(
            r#"{{"protocol": "redir", "local_address": "{address}", "local_port": 7893,
                "mode": "tcp_and_udp", "tcp_redir": "tproxy", "udp_redir": "tproxy"}}"#
        )
    };
    let text = format!(
        r#"{{"server": "192.0.2.2", "server_port": 8388, "password": "secret",
            "method": "aes-128-gcm", "ipv6_only": true, "locals": [{}, {}]}}"#,
        local("0.0.0.0"),
        local("::")
    );
    let path = file(dir, "sslocal.json", &text);
    let mut command = Command::new(program);
    command.arg("-c").arg(path);
    command
}

fn haproxy(dir: &Path, program: &Path) -> Command {
    let text =
        "defaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
                frontend four\n bind 0.0.0.0:7893 transparent\n default_backend out4\n\
                frontend six\n bind :::7893 v6only transparent\n default_backend out6\n\
                backend out4\n source 192.0.2.9\n server any 0.0.0.0:0\n\
                backend out6\n source [2001:db8:1::9]\n server any [::]:0\n";
    let path = file(dir, "haproxy.cfg", text);
    let mut command = Command::new(program);
    command.arg("-db").arg("-f").arg(path);
    command
}

fn squid(dir: &Path, program: &Path) -> Command {
    // its user has to be able to write there; /run is this test's own
    let state = Path::new("/run/squid");
    let _ = fs::create_dir(state);
    crate::ground::chmod(state, 0o777);
    let text = format!(
        "http_port 3128\nhttp_port 7893 tproxy\nhttp_access allow all\ncache deny all\n\
         spoof_client_ip deny all\nacl six dst ipv6\ntcp_outgoing_address 2001:db8:1::9 six\n\
         tcp_outgoing_address 192.0.2.9 !six\naccess_log none\ncache_log {0}/cache.log\n\
         pid_filename none\nshutdown_lifetime 0 seconds\n\
         coredump_dir {0}\nicon_directory {0}\nhost_verify_strict off\npinger_enable off\nvisible_hostname x\n",
        state.display()
    );
    let path = file(dir, "squid.conf", &text);
    // its shared memory outlives a kill, so it gets a place of its own for that
    let run = format!(
        "mount -t tmpfs none /dev/shm && exec {} -N -f {}",
        program.display(),
        path.display()
    );
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", &run]);
    command
}
