//! Rules of other programs' tables that break what ours do: pure readers of a dump of all rules, and
//! what is to be said of them. They know the few expressions that it takes, and take the rest for a
//! condition that may hold. Source: include/uapi/linux/netfilter/nf_tables.h, xt_addrtype.h, xt_CT.h, xt_mark.h, xt_connmark.h.

use std::collections::BTreeSet;

use super::marks::{self, Base, Ours};
use super::message::dump;
use super::table::TABLE;
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs, Message};
use crate::netlink::uapi::*;

/// A rule of others, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignRule {
    /// As nft writes it: `ip wg-quick-wg0 preraw`.
    pub place: String,
    pub exprs: Vec<ForeignExpr>,
}

/// What is loaded into a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    Iif,
    Oif,
    /// The type of the source address.
    SaddrType,
    Mark,
    CtMark,
}

/// What iptables has in place of expressions, where it is about marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Xt {
    /// -m mark, -m connmark
    Is {
        ct: bool,
        value: u32,
        mask: u32,
        equal: bool,
    },
    /// -j MARK
    Mark {
        value: u32,
        mask: u32,
    },
    /// -j CONNMARK; `shifted`: by some bits as well
    Set {
        value: u32,
        mask: u32,
    },
    Save {
        ct: u32,
        packet: u32,
        shifted: bool,
    },
    Restore {
        ct: u32,
        packet: u32,
        shifted: bool,
    },
}

/// An expression as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForeignExpr {
    Load {
        what: Load,
        reg: u32,
    },
    Immediate {
        reg: u32,
        value: u32,
    },
    Bitwise {
        from: u32,
        to: u32,
        mask: u32,
        xor: u32,
    },
    Cmp {
        reg: u32,
        equal: bool,
        data: Vec<u8>,
    },
    SetMark {
        reg: u32,
    },
    SetCtMark {
        reg: u32,
    },
    Xt(Xt),
    /// The source is not local: iptables' addrtype.
    ForeignSource,
    Notrack,
    Verdict(i32),
    /// The place of the chain, and whether evaluation comes back.
    Jump {
        to: String,
        back: bool,
    },
    /// Changes nothing about what matches.
    Passes,
    Other,
}

/// Whether what is compared is lo, by number or name.
fn is_lo(data: &[u8]) -> bool {
    match data.len() {
        4 => parse::u32_ne(data) == Some(1),
        _ => parse::str_z(data) == "lo",
    }
}

/// Asks for all chains of all tables.
pub fn get_chains(batch: &mut Batch) {
    let open = dump(batch, NFT_MSG_GETCHAIN, NFPROTO_UNSPEC);
    batch.end(open);
}

/// Reads an answer to [`get_chains`]: the base chains, but for ours.
pub fn parse_base(message: &Message) -> Option<Base> {
    if !message.is_nfnl(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWCHAIN) {
        return None;
    }
    let home = home(message, NFTA_CHAIN_TABLE)?;
    let attrs = Attrs::after(message.body, 4);
    let name = parse::str_z(attrs.clone().get(NFTA_CHAIN_NAME)?);
    let hook = Attrs::new(attrs.get(NFTA_CHAIN_HOOK)?);
    let number = |attr| hook.clone().get(attr).and_then(parse::u32_be);
    Some(Base {
        place: format!("{home} {name}"),
        hook: number(NFTA_HOOK_HOOKNUM)?,
        priority: number(NFTA_HOOK_PRIORITY)? as i32,
    })
}

/// Family and table, as nft writes them; `None` for our own table, and for families that have no
/// part in what is routed.
fn home(message: &Message, table: u16) -> Option<String> {
    let family = match *message.body.first()? {
        NFPROTO_INET => "inet",
        NFPROTO_IPV4 => "ip",
        NFPROTO_IPV6 => "ip6",
        _ => return None,
    };
    let table = parse::str_z(Attrs::after(message.body, 4).get(table)?);
    (family != "inet" || table != TABLE).then(|| format!("{family} {table}"))
}

/// Asks for all rules of all tables.
pub fn get_rules(batch: &mut Batch) {
    let open = dump(batch, NFT_MSG_GETRULE, NFPROTO_UNSPEC);
    batch.end(open);
}

/// Reads an answer to [`get_rules`]; `None` for our own table, and for families that have no part in
/// what is routed.
pub fn parse(message: &Message) -> Option<ForeignRule> {
    if !message.is_nfnl(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWRULE) {
        return None;
    }
    let home = home(message, NFTA_RULE_TABLE)?;
    let attrs = Attrs::after(message.body, 4);
    let chain = attrs.clone().get(NFTA_RULE_CHAIN).map(parse::str_z)?;
    let list = attrs.clone().get(NFTA_RULE_EXPRESSIONS).unwrap_or(&[]);
    let exprs = Attrs::new(list).filter(|(kind, _)| *kind == NFTA_LIST_ELEM);
    Some(ForeignRule {
        place: format!("{home} {chain}"),
        exprs: exprs.map(|(_, bytes)| expr(&home, bytes)).collect(),
    })
}

/// `home` is the table of the rule.
fn expr(home: &str, bytes: &[u8]) -> ForeignExpr {
    understood(home, bytes).unwrap_or(ForeignExpr::Other)
}

fn understood(home: &str, bytes: &[u8]) -> Option<ForeignExpr> {
    let attrs = Attrs::new(bytes);
    let name = attrs.clone().get(NFTA_EXPR_NAME).unwrap_or(&[]);
    let data = Attrs::new(attrs.get(NFTA_EXPR_DATA).unwrap_or(&[]));
    let number = |attr| data.clone().get(attr).and_then(parse::u32_be);
    let bytes = |attr| data.clone().get(attr).unwrap_or(&[]);
    let value = |attr| Attrs::new(bytes(attr)).get(NFTA_DATA_VALUE);
    let host = |attr| value(attr).and_then(parse::u32_ne);
    Some(match &*parse::str_z(name) {
        "meta" => match (number(NFTA_META_KEY)?, number(NFTA_META_SREG)) {
            (NFT_META_MARK, Some(reg)) => ForeignExpr::SetMark { reg },
            (key, None) => {
                let what = match key {
                    NFT_META_IIF | NFT_META_IIFNAME => Load::Iif,
                    NFT_META_OIF | NFT_META_OIFNAME => Load::Oif,
                    NFT_META_MARK => Load::Mark,
                    _ => return None,
                };
                ForeignExpr::Load { what, reg: number(NFTA_META_DREG)? }
            }
            _ => return None,
        },
        "ct" => match (number(NFTA_CT_KEY)?, number(NFTA_CT_SREG)) {
            (NFT_CT_MARK, Some(reg)) => ForeignExpr::SetCtMark { reg },
            (NFT_CT_MARK, None) => {
                ForeignExpr::Load { what: Load::CtMark, reg: number(NFTA_CT_DREG)? }
            }
            _ => return None,
        },
        "fib" => match (number(NFTA_FIB_RESULT)?, number(NFTA_FIB_FLAGS).unwrap_or(0)) {
            (NFT_FIB_RESULT_ADDRTYPE, flags) if flags & NFTA_FIB_F_SADDR != 0 => {
                ForeignExpr::Load { what: Load::SaddrType, reg: number(NFTA_FIB_DREG)? }
            }
            _ => return None,
        },
        "cmp" => {
            let equal = match number(NFTA_CMP_OP)? {
                NFT_CMP_EQ => true,
                NFT_CMP_NEQ => false,
                _ => return None,
            };
            let data = value(NFTA_CMP_DATA)?.to_vec();
            ForeignExpr::Cmp { reg: number(NFTA_CMP_SREG)?, equal, data }
        }
        "bitwise" => ForeignExpr::Bitwise {
            from: number(NFTA_BITWISE_SREG)?,
            to: number(NFTA_BITWISE_DREG)?,
            mask: host(NFTA_BITWISE_MASK)?,
            xor: host(NFTA_BITWISE_XOR)?,
        },
        "match" | "target" => {
            let revision = number(NFTA_XT_REV).unwrap_or(0);
            xt(&parse::str_z(bytes(NFTA_XT_NAME)), revision, bytes(NFTA_XT_INFO))?
        }
        "notrack" => ForeignExpr::Notrack,
        "immediate" => match number(NFTA_IMMEDIATE_DREG)? {
            NFT_REG_VERDICT => {
                let verdict = Attrs::new(bytes(NFTA_IMMEDIATE_DATA)).get(NFTA_DATA_VERDICT)?;
                let verdict = Attrs::new(verdict);
                let chain = verdict.clone().get(NFTA_VERDICT_CHAIN).map(parse::str_z);
                let code = verdict.get(NFTA_VERDICT_CODE).and_then(parse::u32_be)? as i32;
                match chain {
                    Some(chain) => {
                        ForeignExpr::Jump { to: format!("{home} {chain}"), back: code == NFT_JUMP }
                    }
                    None => ForeignExpr::Verdict(code),
                }
            }
            reg => ForeignExpr::Immediate { reg, value: host(NFTA_IMMEDIATE_DATA)? },
        },
        "counter" => ForeignExpr::Passes,
        _ => return None,
    })
}

/// What iptables-nft has not translated: its own structs, in host order.
fn xt(name: &str, revision: u32, info: &[u8]) -> Option<ForeignExpr> {
    let word = |at: usize| info.get(at..).and_then(parse::u32_ne);
    let byte = |at: usize| info.get(at).copied();
    Some(match name {
        // struct xt_addrtype_info: source types at 0, whether they are inverted at 4
        "addrtype" => {
            let inverted = word(4).unwrap_or(0) & 1 != 0;
            let source = info.get(..2).map_or(0, |at| u16::from_ne_bytes([at[0], at[1]]));
            return (inverted && source & 1 << RTN_LOCAL != 0)
                .then_some(ForeignExpr::ForeignSource);
        }
        "NOTRACK" => ForeignExpr::Notrack,
        // struct xt_ct_target_info: flags at 0
        "CT" => return (byte(0)? & 1 != 0).then_some(ForeignExpr::Notrack),
        // struct xt_mark_mtinfo1, xt_connmark_mtinfo1
        "mark" | "connmark" => {
            let (ct, equal) = (name == "connmark", byte(8)? == 0);
            ForeignExpr::Xt(Xt::Is { ct, value: word(0)?, mask: word(4)?, equal })
        }
        // struct xt_mark_tginfo2
        "MARK" => ForeignExpr::Xt(Xt::Mark { value: word(0)?, mask: word(4)? }),
        // struct xt_connmark_tginfo1, and 2 with the bits to shift by before the mode
        "CONNMARK" => {
            let (ct, packet) = (word(4)?, word(8)?);
            let (shifted, mode) = match revision {
                2 => (byte(13)? != 0, byte(14)?),
                _ => (false, byte(12)?),
            };
            ForeignExpr::Xt(match mode {
                0 => Xt::Set { value: word(0)?, mask: ct },
                1 => Xt::Save { ct, packet, shifted },
                2 => Xt::Restore { ct, packet, shifted },
                _ => return None,
            })
        }
        _ => return None,
    })
}

impl ForeignRule {
    /// What of it matters: whether what comes from lo can match it, and does without a condition;
    /// whether only a source that is not local does.
    fn conditions(&self) -> (bool, bool, bool) {
        let (mut from_lo, mut only_lo, mut foreign) = (true, false, false);
        let mut others = false;
        let loaded = |at: usize| match self.exprs.get(at.checked_sub(1)?)? {
            ForeignExpr::Load { what, .. } => Some(*what),
            _ => None,
        };
        for (at, expr) in self.exprs.iter().enumerate() {
            match (expr, loaded(at)) {
                (ForeignExpr::Cmp { equal, data, .. }, Some(Load::Iif)) => {
                    let lo = is_lo(data);
                    from_lo &= *equal == lo;
                    only_lo |= *equal && lo;
                }
                (ForeignExpr::Cmp { equal: false, data, .. }, Some(Load::SaddrType))
                    if parse::u32_ne(data) == Some(u32::from(RTN_LOCAL)) =>
                {
                    foreign = true
                }
                (ForeignExpr::ForeignSource, _) => foreign = true,
                (
                    ForeignExpr::Cmp { .. } | ForeignExpr::Xt(Xt::Is { .. }) | ForeignExpr::Other,
                    _,
                ) => others = true,
                _ => {}
            }
        }
        (from_lo, only_lo && !others && !foreign, foreign)
    }

    fn ends_in(&self, verdict: i32) -> bool {
        self.exprs.last() == Some(&ForeignExpr::Verdict(verdict))
    }
}

/// A line for each chain of others that breaks what goes to a tproxy, with the remedy. `rules` are in
/// the order of the dump, which is that of each chain.
pub fn hindrances(bases: &[Base], rules: &[ForeignRule], ours: &Ours) -> Vec<String> {
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
        } else if rule.exprs.contains(&ForeignExpr::Notrack) {
            found.push(format!(
                "chain {place} of another program keeps conntrack from what it matches (notrack): \
                 there, replies are not told from what this host begins, hijacked DNS does not get \
                 to its resolver or the answer not back, and what the kernel sends for closed \
                 sockets (acknowledgements, resets) goes to the true destination; have it spare \
                 what cgroups with a target and their services send"
            ));
        }
    }
    found.dedup();
    found.extend(marks::hindrances(bases, rules, ours));
    found
}
