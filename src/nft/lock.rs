//! The lock of a daemon as an nf_tables object: a table of its own that a netlink socket owns. The
//! kernel gives it to one socket at a time, takes it away with the socket however that ends, and
//! lets nobody make, change or delete it but who has CAP_NET_ADMIN over this network namespace.
//! Pure. Source: net/netfilter/nf_tables_api.c (NFT_TABLE_F_OWNER, since Linux 5.12).

use super::message::{self, Transaction};
use crate::netlink::parse::{self, Message};
use crate::netlink::uapi::*;

/// Beside the table itself, which cannot be owned before Linux 6.9.
pub const TABLE: &str = "cgtproxy-lock";

/// What the lock says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    /// A process holds it; its pid, as that process sees itself.
    Held(i32),
    /// Nobody does: the last one left its table in force, so many seconds after boot.
    Left(u64),
}

impl Lock {
    /// For whoever lists the table with nft: its comment.
    fn comment(self) -> String {
        match self {
            Lock::Held(pid) => format!("held by pid {pid}"),
            Lock::Left(at) => format!("left at {at} s after boot"),
        }
    }

    fn parse(comment: &str) -> Option<Lock> {
        let between = |before, after| comment.strip_prefix(before)?.strip_suffix(after);
        let held = between("held by pid ", "").and_then(|pid| pid.parse().ok()).map(Lock::Held);
        let left = || between("left at ", " s after boot")?.parse().ok().map(Lock::Left);
        held.or_else(left)
    }
}

/// Puts the lock's table there, in place of one that may be there already. The kernel refuses that
/// with EPERM where another socket owns it.
pub fn set(transaction: &mut Transaction, lock: Lock) {
    transaction.remove_table_of(TABLE);
    let flags = matches!(lock, Lock::Held(_)).then_some(NFT_TABLE_F_OWNER);
    transaction.table_of(TABLE, NFT_MSG_NEWTABLE, NLM_F_CREATE, flags, Some(&lock.comment()));
}

/// Reads an answer to [`message::get_table`]: `None` for other tables, and where the lock says
/// nothing. Whoever owns it without saying who it is has pid 0.
pub fn parse(message: &Message) -> Option<Lock> {
    let attrs = message::of_table(TABLE, message)?;
    let comment = attrs.get(NFTA_TABLE_USERDATA).and_then(comment);
    let lock = comment.and_then(|text| Lock::parse(&text));
    let owned = attrs.get(NFTA_TABLE_OWNER).is_some();
    match lock {
        Some(Lock::Held(pid)) if owned => Some(Lock::Held(pid)),
        Some(Lock::Left(at)) if !owned => Some(Lock::Left(at)),
        _ => owned.then_some(Lock::Held(0)),
    }
}

/// The comment among the user data of a table: type, length, text with its NUL.
fn comment(data: &[u8]) -> Option<String> {
    let (kind, rest) = data.split_first()?;
    let (length, rest) = rest.split_first()?;
    let text = rest.get(..usize::from(*length))?;
    (*kind == NFTNL_UDATA_TABLE_COMMENT).then(|| parse::str_z(text).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::msg::Batch;
    use crate::netlink::parse::Messages;

    /// What the kernel tells of a table with this comment, owned or not.
    fn told(name: &str, udata: &[u8], owned: bool) -> Option<Lock> {
        let mut b = Batch::new(0);
        let m = b.begin_nfnl(NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWTABLE, 0, NFPROTO_INET);
        b.str_z(NFTA_TABLE_NAME, name);
        b.raw(NFTA_TABLE_USERDATA, udata);
        if owned {
            b.u32_be(NFTA_TABLE_OWNER, 7);
        }
        b.end(m);
        let lock = Messages::new(b.bytes()).find_map(|message| parse(&message));
        lock
    }

    #[test]
    fn what_the_lock_says() {
        let udata = |text: &str| [&[0, text.len() as u8 + 1], text.as_bytes(), &[0]].concat();
        for lock in [Lock::Held(4711), Lock::Left(86_400)] {
            let (text, owned) = (udata(&lock.comment()), matches!(lock, Lock::Held(_)));
            assert_eq!(told(TABLE, &text, owned), Some(lock));
            assert_eq!(told("cgtproxy", &text, owned), None);
            // what root made by hand is no lock, and who holds it without a word holds it
            let other = if owned { None } else { Some(Lock::Held(0)) };
            assert_eq!(told(TABLE, &text, !owned), other);
        }
        for odd in [&[][..], &[0], &[0, 9, b'x'], &[1, 1, 0], &udata("held by pid x")] {
            assert_eq!(told(TABLE, odd, false), None);
            assert_eq!(told(TABLE, odd, true), Some(Lock::Held(0)));
        }
    }
}
