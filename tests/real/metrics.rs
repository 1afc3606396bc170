//! What `status --prometheus` prints, as the reader of Prometheus' own Python client takes it.

use std::io::Write;
use std::process::{Command, Stdio};

use super::{fetched, report, try_all, Verdict};
use crate::daemon::Daemon;
use crate::ground::Ground;

const CONFIG: &str = "[tproxy p]\nport = 7893\n[route out]\ninterface = in0\n\
                      [gateway lan]\ninterface = br-lan\ntarget = p\n[rules]\np = /a\n";

/// Prints each family's type and name, and how many samples it has.
const READER: &str = "
import sys
from prometheus_client.parser import text_string_to_metric_families as read
for family in read(sys.stdin.read()):
    print(family.type, family.name, len(family.samples))
";

fn read(text: &str) -> Verdict {
    let packages = fetched();
    if !packages.join("prometheus_client").exists() {
        return Err("SKIP: no prometheus_client of Python".into());
    }
    let mut python = Command::new("python3");
    python.args(["-c", READER]).env("PYTHONPATH", packages);
    python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = python.spawn().map_err(|e| format!("unable to start python3: {e}"))?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(text.as_bytes()).map_err(|e| e.to_string())?;
    drop(stdin);
    let out = child.wait_with_output().map_err(|e| e.to_string())?;
    if !out.status.success() {
        return Err(String::from_utf8_lossy(&out.stderr).into_owned());
    }
    let families = String::from_utf8_lossy(&out.stdout).into_owned();
    for want in [
        "gauge cgtproxy_in_force 1",
        "counter cgtproxy_target_packets 3",
        "gauge cgtproxy_target_listener_up 4",
        "counter cgtproxy_gateway_bytes 1",
        "counter cgtproxy_repairs 2",
        "counter cgtproxy_reloads 2",
    ] {
        if !families.lines().any(|line| line == want) {
            return Err(format!("no {want} among {families}"));
        }
    }
    Ok(())
}

fn reads(who: &'static &'static str, ground: &Ground) -> Result<bool, String> {
    let daemon = Daemon::start(ground, CONFIG, &[]);
    let said = daemon.ask(&["status", "--prometheus"]);
    let well = report(who, "reads the metrics", read(&said.out));
    daemon.stop_clean();
    Ok(well)
}

#[test]
#[ignore = "make real-test runs it"]
fn metrics() {
    try_all(&["prometheus"], |who| who, reads);
}
