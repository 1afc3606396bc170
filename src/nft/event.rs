//! Reading nftables notifications: did another program change our table, and which one was it.
//! Pure. Source: net/netfilter/nf_tables_api.c: a transaction's changes are told one by one, then
//! one NEWGEN names the process.

use crate::netlink::parse::{Attrs, Messages};
use crate::netlink::uapi::*;
use crate::nft::table::TABLE;

/// Follows the notifications of all transactions but our own.
#[derive(Debug, Default)]
pub struct Follower {
    /// The transaction that is being told has changed our table.
    hit: bool,
}

impl Follower {
    /// Takes one datagram. `own` is the port id of our own transactions.
    ///
    /// Returns who changed our table, once such a transaction has been told to its end.
    pub fn take(&mut self, datagram: &[u8], own: u32) -> Option<String> {
        let mut culprit = None;
        for message in Messages::new(datagram).filter(|m| m.pid != own) {
            if message.kind >> 8 != NFNL_SUBSYS_NFTABLES {
                continue;
            }
            let attrs = Attrs::after(message.body, 4);
            if message.kind & 0xff == NFT_MSG_NEWGEN {
                if std::mem::take(&mut self.hit) {
                    let name = attrs.get(NFTA_GEN_PROC_NAME).map(printable);
                    culprit = Some(match (name, attrs.u32_be(NFTA_GEN_PROC_PID)) {
                        (Some(name), Some(pid)) => format!("{name} (pid {pid})"),
                        _ => "another program".into(),
                    });
                }
            } else if message.body.first() == Some(&NFPROTO_INET) {
                self.hit |= attrs.text(NFTA_ANY_TABLE).is_some_and(|name| name == TABLE);
            }
        }
        culprit
    }
}

/// A process picks its own name.
fn printable(name: &[u8]) -> String {
    let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
    name[..end].escape_ascii().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::msg::Batch;

    fn told(kind: u16, table: &str) -> Batch {
        let mut b = Batch::new(0);
        let m = b.begin_nfnl(NFNL_SUBSYS_NFTABLES, kind, 0, NFPROTO_INET);
        match kind {
            NFT_MSG_NEWGEN => {
                b.u32_be(NFTA_GEN_PROC_PID, 7);
                b.str_z(NFTA_GEN_PROC_NAME, "nft\u{1b}[2J");
            }
            _ => b.str_z(NFTA_ANY_TABLE, table),
        }
        b.end(m);
        b
    }

    #[test]
    fn names_who_changed_our_table_and_nobody_else() {
        let gen = told(NFT_MSG_NEWGEN, "");
        let mut follower = Follower::default();
        assert_eq!(follower.take(told(NFT_MSG_DELTABLE, "other").bytes(), 9), None);
        assert_eq!(follower.take(gen.bytes(), 9), None);
        assert_eq!(follower.take(told(NFT_MSG_DELSETELEM, TABLE).bytes(), 9), None);
        let culprit = follower.take(gen.bytes(), 9);
        assert_eq!(culprit.as_deref(), Some("nft\\x1b[2J (pid 7)"));
        assert_eq!(follower.take(gen.bytes(), 9), None);
        // our own transactions (port 0 here)
        assert_eq!(follower.take(told(NFT_MSG_DELTABLE, TABLE).bytes(), 0), None);
        assert_eq!(follower.take(gen.bytes(), 9), None);
    }
}
