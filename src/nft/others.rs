//! Rules of other programs' tables that break what ours do: pure readers of a dump of all rules, and
//! what is to be said of them. They know the expressions that ours use too, and what iptables has in
//! their place; the rest they take for a condition that may hold.
//! Source: include/uapi/linux/netfilter/nf_tables.h, xt_addrtype.h, xt_CT.h, xt_mark.h, xt_connmark.h.

use super::expr::{listed, parts, Expr, Verdict};
use super::message::{dump, hook};
use super::table::TABLE;
use crate::netlink::msg::Batch;
use crate::netlink::parse::{self, Attrs, Message};
use crate::netlink::uapi::*;
use crate::small::SmallSet;

/// A rule of others, and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignRule {
    /// As nft writes it: `ip wg-quick-wg0 preraw`.
    pub place: String,
    pub exprs: Vec<ForeignExpr>,
}

/// A chain of others that packets meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignBase {
    /// As nft writes it: `ip mangle OUTPUT`.
    pub place: String,
    pub hook: u32,
    pub priority: i32,
}

/// What iptables has in place of expressions, where it is about marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XtMark {
    /// -m mark, -m connmark
    Is { ct: bool, value: u32, mask: u32, equal: bool },
    /// -j MARK, -j CONNMARK --set-xmark
    Set { ct: bool, value: u32, mask: u32 },
    /// -j CONNMARK --save-mark, or to the packet --restore-mark; `shifted`: by some bits as well.
    Copy { to_ct: bool, ct: u32, packet: u32, shifted: bool },
}

/// An expression as far as it matters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForeignExpr {
    /// One that ours use too. A chain that it leads to is named by its place.
    Nft(Expr),
    Xt(XtMark),
    /// The source is not local: iptables' addrtype.
    ForeignSource,
    Notrack,
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
pub fn parse_base(message: &Message) -> Option<ForeignBase> {
    if !message.is_nfnl(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWCHAIN) {
        return None;
    }
    let home = home(message, NFTA_CHAIN_TABLE)?;
    let attrs = Attrs::after(message.body, 4);
    let (hook, priority) = hook(&attrs)?;
    Some(ForeignBase { place: format!("{home} {}", attrs.text(NFTA_CHAIN_NAME)?), hook, priority })
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
    let table = Attrs::after(message.body, 4).text(table)?;
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
    let understood = |bytes| expr(&home, bytes).unwrap_or(ForeignExpr::Other);
    Some(ForeignRule {
        place: format!("{home} {}", attrs.text(NFTA_RULE_CHAIN)?),
        exprs: listed(&attrs.nest(NFTA_RULE_EXPRESSIONS)).map(understood).collect(),
    })
}

/// `home` is the table of the rule.
fn expr(home: &str, bytes: &[u8]) -> Option<ForeignExpr> {
    let (name, data) = parts(bytes);
    match &*name {
        "match" | "target" => {
            let revision = data.u32_be(NFTA_XT_REV).unwrap_or(0);
            let info = data.get(NFTA_XT_INFO).unwrap_or(&[]);
            return xt(&data.text(NFTA_XT_NAME).unwrap_or_default(), revision, info);
        }
        "notrack" => return Some(ForeignExpr::Notrack),
        _ => {}
    }
    let place = |chain| format!("{home} {chain}");
    Some(ForeignExpr::Nft(match Expr::read(bytes)? {
        Expr::Verdict(Verdict::Jump(chain)) => Expr::Verdict(Verdict::Jump(place(chain))),
        Expr::Verdict(Verdict::Goto(chain)) => Expr::Verdict(Verdict::Goto(place(chain))),
        other => other,
    }))
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
            ForeignExpr::Xt(XtMark::Is { ct, value: word(0)?, mask: word(4)?, equal })
        }
        // struct xt_mark_tginfo2
        "MARK" => ForeignExpr::Xt(XtMark::Set { ct: false, value: word(0)?, mask: word(4)? }),
        // struct xt_connmark_tginfo1, and 2 with the bits to shift by before the mode
        "CONNMARK" => {
            let (ct, packet) = (word(4)?, word(8)?);
            let (shifted, mode) = match revision {
                2 => (byte(13)? != 0, byte(14)?),
                _ => (false, byte(12)?),
            };
            ForeignExpr::Xt(match mode {
                0 => XtMark::Set { ct: true, value: word(0)?, mask: ct },
                1 | 2 => XtMark::Copy { to_ct: mode == 1, ct, packet, shifted },
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
        use ForeignExpr::Nft;
        let (mut from_lo, mut only_lo, mut foreign) = (true, false, false);
        let mut others = false;
        let mut loaded: Option<&Expr> = None;
        for expr in &self.exprs {
            match (expr, loaded) {
                (
                    Nft(Expr::Cmp { op: op @ (NFT_CMP_EQ | NFT_CMP_NEQ), data, .. }),
                    Some(Expr::MetaLoad { key: NFT_META_IIF | NFT_META_IIFNAME, .. }),
                ) => {
                    let (equal, lo) = (*op == NFT_CMP_EQ, is_lo(data));
                    from_lo &= equal == lo;
                    only_lo |= equal && lo;
                }
                (
                    Nft(Expr::Cmp { op: NFT_CMP_NEQ, data, .. }),
                    Some(Expr::FibAddrtype { of, .. }),
                ) if of & NFTA_FIB_F_SADDR != 0
                    && parse::u32_ne(data) == Some(u32::from(RTN_LOCAL)) =>
                {
                    foreign = true
                }
                (ForeignExpr::ForeignSource, _) => foreign = true,
                (
                    Nft(
                        Expr::MetaLoad { .. }
                        | Expr::CtLoad { .. }
                        | Expr::FibAddrtype { .. }
                        | Expr::Immediate { .. }
                        | Expr::Bitwise { .. }
                        | Expr::MetaSet { .. }
                        | Expr::CtSet { .. }
                        | Expr::Verdict(_)
                        | Expr::Counter,
                    ),
                    _,
                ) => {}
                (ForeignExpr::Xt(xt), _) if !matches!(xt, XtMark::Is { .. }) => {}
                (ForeignExpr::Notrack, _) => {}
                _ => others = true,
            }
            loaded = match expr {
                Nft(expr) => Some(expr),
                _ => None,
            };
        }
        (from_lo, only_lo && !others && !foreign, foreign)
    }

    fn ends_in(&self, verdict: Verdict) -> bool {
        self.exprs.last() == Some(&ForeignExpr::Nft(Expr::Verdict(verdict)))
    }
}

/// A line for each chain of others that breaks what goes to a tproxy, with the remedy, but for what
/// they do to marks. `rules` are in the order of the dump, which is that of each chain.
pub fn hindrances(rules: &[ForeignRule]) -> Vec<String> {
    let mut spared = SmallSet::default();
    let mut found = Vec::new();
    for rule in rules {
        let place = &*rule.place;
        let (from_lo, is_lo, foreign) = rule.conditions();
        if is_lo && rule.ends_in(Verdict::Accept) {
            spared.insert(place);
        } else if foreign && from_lo && rule.ends_in(Verdict::Drop) && !spared.contains(place) {
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
    found
}
