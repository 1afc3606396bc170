//! Rules of other programs' tables that break what ours do: pure readers of a dump of all rules, and
//! what is to be said of them. They know the few expressions that it takes, and take the rest for a
//! condition that may hold. Source: include/uapi/linux/netfilter/nf_tables.h, xt_addrtype.h, xt_CT.h.

use std::collections::BTreeSet;

use super::encode::nfgenmsg;
use super::ruleset::TABLE;
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs, Message};
use crate::netlink::uapi::*;

/// A rule of others, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// As nft writes it: `ip wg-quick-wg0 preraw`.
    place: String,
    exprs: Vec<Expr>,
}

/// An expression as far as it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expr {
    /// Loads the interface that a packet came in by.
    Iif,
    /// Loads the type of its source address.
    SaddrType,
    /// Compares what was loaded: whether it is lo, or local.
    Cmp {
        equal: bool,
        lo: bool,
        local: bool,
    },
    /// The source is not local: iptables' addrtype.
    ForeignSource,
    Notrack,
    Verdict(i32),
    /// Changes nothing about what matches.
    Passes,
    Other,
}

/// Asks for all rules of all tables.
pub fn get_rules(batch: &mut Batch) {
    let open = batch.begin(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE, NLM_F_REQUEST | NLM_F_DUMP);
    batch.header(&nfgenmsg(NFPROTO_UNSPEC, 0));
    batch.end(open);
}

/// Reads an answer to [`get_rules`]; `None` for our own table, and for families that have no part in
/// what is routed.
pub fn parse(message: &Message) -> Option<Rule> {
    if message.kind != NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE {
        return None;
    }
    let family = match *message.body.first()? {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        _ => return None,
    };
    let attrs = Attrs::after(message.body, 4);
    let text = |attr| attrs.clone().get(attr).map(parse::str_z);
    let (table, chain) = (text(NFTA_RULE_TABLE)?, text(NFTA_RULE_CHAIN)?);
    let list = attrs.clone().get(NFTA_RULE_EXPRESSIONS).unwrap_or(&[]);
    let exprs = Attrs::new(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM);
    (family != "inet" || table != TABLE).then(|| Rule {
        place: format!("{family} {table} {chain}"),
        exprs: exprs.map(|(_, bytes)| expr(bytes)).collect(),
    })
}

fn expr(bytes: &[u8]) -> Expr {
    let attrs = Attrs::new(bytes);
    let name = attrs.clone().get(NFTA_EXPR_NAME).unwrap_or(&[]);
    let data = Attrs::new(attrs.get(NFTA_EXPR_DATA).unwrap_or(&[]));
    let number = |attr| data.clone().get(attr).and_then(parse::u32_be);
    let bytes = |attr| data.clone().get(attr).unwrap_or(&[]);
    match &*parse::str_z(name) {
        "meta" => match number(NFTA_META_KEY) {
            Some(NFT_META_IIF | NFT_META_IIFNAME) => Expr::Iif,
            _ => Expr::Other,
        },
        "fib" => match (number(NFTA_FIB_RESULT), number(NFTA_FIB_FLAGS).unwrap_or(0)) {
            (Some(NFT_FIB_RESULT_ADDRTYPE), flags) if flags & NFTA_FIB_F_SADDR != 0 => {
                Expr::SaddrType
            }
            _ => Expr::Other,
        },
        "cmp" => {
            let value = Attrs::new(bytes(NFTA_CMP_DATA)).get(NFTA_DATA_VALUE).unwrap_or(&[]);
            let word = (value.len() == 4).then(|| parse::u32_ne(value)).flatten();
            let equal = match number(NFTA_CMP_OP) {
                Some(NFT_CMP_EQ) => true,
                Some(NFT_CMP_NEQ) => false,
                _ => return Expr::Other,
            };
            let lo = word == Some(1) || value.len() > 4 && parse::str_z(value) == "lo";
            Expr::Cmp { equal, lo, local: word == Some(u32::from(RTN_LOCAL)) }
        }
        // struct xt_addrtype_info: source types at 0, whether they are inverted at 4
        "match" if &*parse::str_z(bytes(NFTA_XT_NAME)) == "addrtype" => {
            let info = bytes(NFTA_XT_INFO);
            let inverted = info.get(4..).and_then(parse::u32_ne).unwrap_or(0) & 1 != 0;
            let source = info.get(..2).map_or(0, |at| u16::from_ne_bytes([at[0], at[1]]));
            match inverted && source & 1 << RTN_LOCAL != 0 {
                true => Expr::ForeignSource,
                false => Expr::Other,
            }
        }
        "target" => match &*parse::str_z(bytes(NFTA_XT_NAME)) {
            "NOTRACK" => Expr::Notrack,
            // struct xt_ct_target_info: flags at 0
            "CT" if bytes(NFTA_XT_INFO).first().is_some_and(|low| low & 1 != 0) => Expr::Notrack,
            _ => Expr::Other,
        },
        "notrack" => Expr::Notrack,
        "immediate" => {
            let verdict = Attrs::new(bytes(NFTA_IMMEDIATE_DATA)).get(NFTA_DATA_VERDICT);
            let code = verdict.and_then(|v| Attrs::new(v).get(NFTA_VERDICT_CODE));
            code.and_then(parse::u32_be).map_or(Expr::Other, |code| Expr::Verdict(code as i32))
        }
        "counter" => Expr::Passes,
        _ => Expr::Other,
    }
}

impl Rule {
    /// What of it matters: whether what comes from lo can match it, and does without a condition;
    /// whether only a source that is not local does.
    fn conditions(&self) -> (bool, bool, bool) {
        let (mut from_lo, mut only_lo, mut foreign) = (true, false, false);
        let mut others = false;
        for (at, expr) in self.exprs.iter().enumerate() {
            let loaded = at.checked_sub(1).map(|before| self.exprs[before]);
            match (expr, loaded) {
                (Expr::Cmp { equal, lo, .. }, Some(Expr::Iif)) => {
                    from_lo &= equal == lo;
                    only_lo |= *equal && *lo;
                }
                (Expr::Cmp { equal: false, local: true, .. }, Some(Expr::SaddrType))
                | (Expr::ForeignSource, _) => foreign = true,
                (Expr::Cmp { .. } | Expr::Other, _) => others = true,
                _ => {}
            }
        }
        (from_lo, only_lo && !others && !foreign, foreign)
    }

    fn ends_in(&self, verdict: i32) -> bool {
        self.exprs.last() == Some(&Expr::Verdict(verdict))
    }
}

/// A line for each chain of others that breaks what goes to a tproxy, with the remedy. `rules` are in
/// the order of the dump, which is that of each chain.
pub fn hindrances(rules: &[Rule]) -> Vec<String> {
    let mut spared = BTreeSet::new();
    let mut found = Vec::new();
    for rule in rules {
        let place = &*rule.place;
        let (from_lo, is_lo, foreign) = rule.conditions();
        if is_lo && rule.ends_in(NF_ACCEPT) {
            spared.insert(place);
        } else if foreign && from_lo && rule.ends_in(NF_DROP) && !spared.contains(place) {
            found.push(format!(
                "chain {place} of another program drops what has a source that is not this host's, \
                 and so what a tproxy answers: `nft insert rule {place} iif lo accept` lets it pass \
                 (for wg-quick, as PostUp)"
            ));
        } else if rule.exprs.contains(&Expr::Notrack) {
            found.push(format!(
                "chain {place} of another program keeps conntrack from what it matches (notrack): \
                 there, replies are not told from what this host begins; have it spare what \
                 cgroups with a target and their services send"
            ));
        }
    }
    found.dedup();
    found
}
