//! Rules and routes as iproute2 6.1 sends them: the bytes of each sendmsg(2) of `ip` on Linux 6.18,
//! as `strace -e write=all` shows them, grouped into header, fixed header and attributes. Only the
//! sequence number is blanked.

use std::collections::BTreeSet;

use cgtproxy::net::{Family, Mark};
use cgtproxy::netlink::fib::{self, FibAction, IpRoute, IpRule, Verb};
use cgtproxy::netlink::msg::Batch;
use cgtproxy::route::Entry;

use crate::hex;

const REQUESTS: [(&str, &str); 28] = [
    (
        "ip rule add pref 32000 iif lo fwmark 0xff000000/0xff000000 goto 32002 protocol 99",
        "4c000000200005060000000000000000 020000000000000200000000 \
         08000600007d0000 070003006c6f0000 08000a00000000ff 08001000000000ff 08000400027d0000 0500150063000000",
    ),
    (
        "ip rule add pref 32001 fwmark 0xff000000/0xff000000 lookup 200 protocol 99",
        "3c000000200005060000000000000000 02000000c800000100000000 \
         08000600017d0000 08000a00000000ff 08001000000000ff 0500150063000000",
    ),
    (
        "ip rule add pref 32002 nop protocol 99",
        "2c000000200005060000000000000000 020000000000000300000000 \
         08000600027d0000 0500150063000000",
    ),
    (
        "ip rule del pref 32000 iif lo fwmark 0xff000000/0xff000000 goto 32002 protocol 99",
        "4c000000210005000000000000000000 020000000000000200000000 \
         08000600007d0000 070003006c6f0000 08000a00000000ff 08001000000000ff 08000400027d0000 0500150063000000",
    ),
    (
        "ip rule del pref 32001 fwmark 0xff000000/0xff000000 lookup 200 protocol 99",
        "3c000000210005000000000000000000 02000000c800000000000000 \
         08000600017d0000 08000a00000000ff 08001000000000ff 0500150063000000",
    ),
    (
        "ip rule del pref 32002 nop protocol 99",
        "2c000000210005000000000000000000 020000000000000300000000 \
         08000600027d0000 0500150063000000",
    ),
    (
        "ip -6 rule add pref 32000 iif lo fwmark 0xff000000/0xff000000 goto 32002 protocol 99",
        "4c000000200005060000000000000000 0a0000000000000200000000 \
         08000600007d0000 070003006c6f0000 08000a00000000ff 08001000000000ff 08000400027d0000 0500150063000000",
    ),
    (
        "ip -6 rule add pref 32001 fwmark 0xff000000/0xff000000 lookup 200 protocol 99",
        "3c000000200005060000000000000000 0a000000c800000100000000 \
         08000600017d0000 08000a00000000ff 08001000000000ff 0500150063000000",
    ),
    (
        "ip -6 rule add pref 32002 nop protocol 99",
        "2c000000200005060000000000000000 0a0000000000000300000000 \
         08000600027d0000 0500150063000000",
    ),
    (
        "ip -6 rule del pref 32000 iif lo fwmark 0xff000000/0xff000000 goto 32002 protocol 99",
        "4c000000210005000000000000000000 0a0000000000000200000000 \
         08000600007d0000 070003006c6f0000 08000a00000000ff 08001000000000ff 08000400027d0000 0500150063000000",
    ),
    (
        "ip -6 rule del pref 32001 fwmark 0xff000000/0xff000000 lookup 200 protocol 99",
        "3c000000210005000000000000000000 0a000000c800000000000000 \
         08000600017d0000 08000a00000000ff 08001000000000ff 0500150063000000",
    ),
    (
        "ip -6 rule del pref 32002 nop protocol 99",
        "2c000000210005000000000000000000 0a0000000000000300000000 \
         08000600027d0000 0500150063000000",
    ),
    (
        "ip rule add pref 32000 iif lo fwmark 0x01000000/0xff000000 lookup 200 protocol 99",
        "44000000200005060000000000000000 02000000c800000100000000 08000600007d0000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 0500150063000000",
    ),
    (
        "ip rule del pref 32000 iif lo fwmark 0x01000000/0xff000000 lookup 200 protocol 99",
        "44000000210005000000000000000000 02000000c800000000000000 08000600007d0000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 0500150063000000",
    ),
    (
        "ip rule add pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300 protocol 99",
        "4c000000200005060000000000000000 020000000000000100000000 0800060064000000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 08000f002c010000 0500150063000000",
    ),
    (
        "ip rule del pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300 protocol 99",
        "4c000000210005000000000000000000 020000000000000000000000 0800060064000000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 08000f002c010000 0500150063000000",
    ),
    (
        "ip -6 rule add pref 32000 iif lo fwmark 0x01000000/0xff000000 lookup 200 protocol 99",
        "44000000200005060000000000000000 0a000000c800000100000000 08000600007d0000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 0500150063000000",
    ),
    (
        "ip -6 rule del pref 32000 iif lo fwmark 0x01000000/0xff000000 lookup 200 protocol 99",
        "44000000210005000000000000000000 0a000000c800000000000000 08000600007d0000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 0500150063000000",
    ),
    (
        "ip -6 rule add pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300 protocol 99",
        "4c000000200005060000000000000000 0a0000000000000100000000 0800060064000000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 08000f002c010000 0500150063000000",
    ),
    (
        "ip -6 rule del pref 100 iif lo fwmark 0x01000000/0xff000000 lookup 300 protocol 99",
        "4c000000210005000000000000000000 0a0000000000000000000000 0800060064000000 \
         070003006c6f0000 08000a0000000001 08001000000000ff 08000f002c010000 0500150063000000",
    ),
    (
        "ip route prepend local default dev lo table 200 proto 99",
        "24000000180005040000000000000000 02000000c863fe0200000000 0800040001000000",
    ),
    (
        "ip route del local default dev lo table 200 proto 99",
        "24000000190005000000000000000000 02000000c863fe0200000000 0800040001000000",
    ),
    (
        "ip route prepend local default dev lo table 300 proto 99",
        "2c000000180005040000000000000000 020000000063fe0200000000 08000f002c010000 \
         0800040001000000",
    ),
    (
        "ip route del local default dev lo table 300 proto 99",
        "2c000000190005000000000000000000 020000000063fe0200000000 08000f002c010000 \
         0800040001000000",
    ),
    (
        "ip -6 route add local default dev lo table 200 proto 99 metric 1",
        "40000000180005060000000000000000 0a000000c863000200000000 \
         1400010000000000000000000000000000000000 0800060001000000 0800040001000000",
    ),
    (
        "ip -6 route del local default dev lo table 200 proto 99 metric 1",
        "40000000190005000000000000000000 0a000000c863000200000000 \
         1400010000000000000000000000000000000000 0800060001000000 0800040001000000",
    ),
    (
        "ip -6 route add local default dev lo table 300 proto 99 metric 1",
        "48000000180005060000000000000000 0a0000000063000200000000 \
         1400010000000000000000000000000000000000 08000f002c010000 0800060001000000 0800040001000000",
    ),
    (
        "ip -6 route del local default dev lo table 300 proto 99 metric 1",
        "48000000190005000000000000000000 0a0000000063000200000000 \
         1400010000000000000000000000000000000000 08000f002c010000 0800060001000000 0800040001000000",
    ),
];

type Dump = fn(&mut Batch, Family);

/// `ip` sends zeros behind the request for routes; the kernel stops at the message's length.
const DUMPS: [(&str, Dump, Family, &str); 5] = [
    (
        "ip -4 rule show",
        fib::get_rules,
        Family::V4,
        "1c000000220001030000000000000000 020000000000000000000000",
    ),
    (
        "ip -6 rule show",
        fib::get_rules,
        Family::V6,
        "1c000000220001030000000000000000 0a0000000000000000000000",
    ),
    (
        "ip -4 route show table all proto 99",
        fib::get_routes,
        Family::V4,
        "1c0000001a0001030000000000000000 020000000063000000000000",
    ),
    (
        "ip -6 route show table all proto 99",
        fib::get_routes,
        Family::V6,
        "1c0000001a0001030000000000000000 0a0000000063000000000000",
    ),
    (
        "ip -4 route show table 300",
        |batch, family| fib::get_table(batch, family, 300),
        Family::V4,
        "240000001a0001030000000000000000 020000000000000000000000 08000f002c010000",
    ),
];

/// The bytes of a batch of one message, with its sequence number blanked.
fn bytes(batch: &Batch) -> String {
    let mut bytes = batch.bytes().to_vec();
    bytes[8..12].fill(0);
    hex(&bytes)
}

/// Our ip rules and routes, as iproute2 sends them.
#[test]
fn rules_and_routes_are_what_iproute2_sends() {
    let mark = Mark { value: 0x0100_0000, mask: 0xff00_0000 };
    let routed = Mark { value: 0xff00_0000, mask: 0xff00_0000 };
    let none = Mark { value: 0, mask: 0 };
    let mut sent = BTreeSet::new();
    for family in Family::BOTH {
        let rule = |priority, iif: &str, mark, action| {
            Entry::Rule(IpRule { family, priority, iif: iif.into(), mark, action })
        };
        let prefix = [
            rule(32000, "lo", routed, FibAction::Goto(32002)),
            rule(32001, "", routed, FibAction::Lookup(200)),
            rule(32002, "", none, FibAction::Nop),
        ];
        let mut entries = prefix.to_vec();
        for (priority, table) in [(32000, 200), (100, 300)] {
            entries.push(rule(priority, "lo", mark, FibAction::Lookup(table)));
            entries.push(Entry::Route(IpRoute::new(family, table)));
        }
        for entry in entries {
            for (word, verb) in [("add", Verb::Add), ("del", Verb::Delete)] {
                // the command that we print is the one whose bytes we send, but that a route of
                // IPv4 is put before those of others
                let command = entry.command(word).replace("ip route add", "ip route prepend");
                let golden = REQUESTS.iter().find(|(golden, _)| *golden == command);
                let (_, golden) = golden.expect(&command);
                let mut batch = Batch::new(0);
                entry.encode(&mut batch, verb);
                assert_eq!(bytes(&batch), golden.replace(' ', ""), "{command}");
                sent.insert(command);
            }
        }
    }
    assert_eq!(sent.len(), REQUESTS.len());
}

/// The requests for what there is, as iproute2 sends them.
#[test]
fn dump_requests_are_what_iproute2_sends() {
    for (command, dump, family, golden) in DUMPS {
        let mut batch = Batch::new(0);
        dump(&mut batch, family);
        assert_eq!(bytes(&batch), golden.replace(' ', ""), "{command}");
    }
}
