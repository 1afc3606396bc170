//! Everything that reads what a netlink socket gives, on any bytes: it never panics, and no reader
//! finds more than the bytes can hold.

#![no_main]

use cgtproxy::config::Config;
use cgtproxy::net::Family;
use cgtproxy::netlink::parse::{self, Attrs, Messages};
use cgtproxy::netlink::{conntrack, diag, fib};
use cgtproxy::nft::{event::Follower, marks, message, others, view};
use cgtproxy::plan;
use cgtproxy::route::{self, SeenRouting};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|datagram: &[u8]| {
    let (mut count, mut rules) = (0, Vec::new());
    let (mut bases, mut others_rules) = (Vec::new(), Vec::new());
    let config = Config::default();
    let (needs, mut seen) = (plan::needs(&config), SeenRouting::default());
    for message in Messages::new(datagram) {
        count += 1;
        let _ = (parse::reply(&message), diag::parse(&message, 6));
        let _ = (message::parse_table(&message), view::parse_table_flags(&message));
        rules.extend(view::parse_rule(&message));
        others_rules.extend(others::parse(&message));
        bases.extend(others::parse_base(&message));
        let elements = view::parse_elements(&message).map_or(0, |all| all.len());
        assert!(elements <= message.body.len() / 16);
        let _ = (route::is_change(&needs, &message), fib::lo_revives(&message));
        seen.rules.extend(fib::SeenRule::read(&message));
        seen.routes.extend(fib::SeenRoute::read(&message));
        let _ = (conntrack::parse_entry(&message), fib::parse_way(&message));
        assert!(fib::devices(&message, 77).len() <= message.body.len() / 8);
        // fixed headers: none, nfgenmsg, rtmsg and fib_rule_hdr
        for header in [0, 4, 12] {
            attributes(message.body, header);
        }
    }
    let _ = (seen.ours(), seen.missing(&needs, Family::V4));
    let place = seen.place(&needs, Family::V4);
    let _ = seen.hindrances(&needs, Family::V4, place);
    let _ = others::hindrances(&others_rules);
    let _ = marks::hindrances(&bases, &others_rules, &marks::Ours::default());
    let view = view::View::of(&rules);
    assert!(view.targets.len() <= rules.len() && view.steps.len() <= rules.len());
    let _ = Follower::default().take(datagram, 0);
    assert!(count <= datagram.len() / 16);
});

/// Attributes of all levels, should each of them be a nest.
fn attributes(body: &[u8], header: usize) {
    let attrs = Attrs::after(body, header);
    assert!(attrs.clone().count() <= body.len() / 4);
    for (kind, data) in attrs.clone() {
        assert!(attrs.clone().get(kind).is_some());
        let _ = (parse::u32_be(data), parse::i32_ne(data), parse::str_z(data));
        attributes(data, 0);
    }
}
