//! The kernel as this program changes it: one nftables table, ip rules, routes. It carries plans
//! out and reports; what should be there is decided elsewhere.

use std::collections::BTreeSet;

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use crate::config::Config;
use crate::core::{Delta, Snapshot};
use crate::error::{reason, Error, Result};
use crate::log;
use crate::netlink::msg::Batch;
use crate::netlink::socket::{Failure, Socket};
use crate::netlink::uapi::*;
use crate::nft::encode::{self, Transaction};
use crate::nft::expr::Family;
use crate::nft::ruleset::TABLE;
use crate::plan;
use crate::route::{self, Entry};
use crate::sys;

/// `NETLINK_GET_STRICT_CHK` of include/uapi/linux/netlink.h: dumps honour the request's filter.
const NETLINK_GET_STRICT_CHK: i32 = 12;

/// Our sockets to the kernel. The nftables one owns the table, so it lives as long as the daemon.
pub struct Kernel {
    nft: Socket,
    rt: Socket,
    /// What the table is created with; `None` once the kernel has refused it (before Linux 6.9).
    flags: Option<u32>,
    /// Families that can be routed here.
    families: Vec<Family>,
}

impl Kernel {
    pub fn open() -> Result<Kernel> {
        let nft = Socket::open(SockProtocol::NetlinkNetFilter, &[])?;
        let rt = Socket::open(SockProtocol::NetlinkRoute, &[])?;
        use std::os::fd::AsFd;
        let _ = sys::set_option(rt.as_fd(), libc::SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1);
        Ok(Kernel {
            nft,
            rt,
            flags: Some(NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST),
            families: Family::BOTH.to_vec(),
        })
    }

    /// Replaces the table by what the plan says, in one transaction.
    pub fn replace(&mut self, config: &Config, snapshot: &Snapshot) -> Result<()> {
        let flags = self.flags;
        let batch = self.nft.batch();
        let transaction = plan::replacement(config, snapshot, flags, batch);
        match self.commit(transaction) {
            // a kernel without table flags, or without `persist`
            Err(error)
                if flags.is_some()
                    && matches!(error.errno(), Some(Errno::EOPNOTSUPP | Errno::EINVAL)) =>
            {
                let batch = self.nft.batch();
                self.commit(plan::replacement(config, snapshot, None, batch))?;
                self.flags = None;
                Ok(())
            }
            other => other,
        }
    }

    /// Applies a difference in one transaction.
    pub fn change(&mut self, config: &Config, delta: &Delta) -> Result<()> {
        let batch = self.nft.batch();
        self.commit(plan::change(config, delta, batch))
    }

    /// Removes the table; false where there was none.
    pub fn remove_table(&mut self) -> Result<bool> {
        if self.table_owner()?.is_none() {
            return Ok(false);
        }
        let mut transaction = Transaction::new(self.nft.batch());
        transaction.remove_table();
        self.commit(transaction).map(|()| true)
    }

    /// Whether the table is there, and the port id that owns it, if any does.
    pub fn table_owner(&mut self) -> Result<Option<Option<u32>>> {
        let found = self.nft.dump(&encode::get_table, encode::parse_table)?;
        let what = "unable to list nftables tables";
        let found =
            found.map_err(|errno| Error::system(what, errno).hint("is nf_tables there?"))?;
        Ok(found.into_iter().next())
    }

    fn commit(&mut self, transaction: Transaction) -> Result<()> {
        let (batch, last) = transaction.finish();
        log!(Debug, "nftables transaction of {} bytes", batch.len());
        match self.nft.transact(&batch, last)? {
            Ok(()) => Ok(()),
            Err(Failure::Unknown) => Err(Error::system(
                "unable to learn what became of a transaction",
                Errno::ENOBUFS,
            )),
            Err(Failure::Refused { seq, errno, text }) => {
                let object = encode::describe(&batch, seq);
                let mut what = format!("unable to change {object}");
                if let Some(text) = text {
                    what.push_str(&format!(" ({text})"));
                }
                let error = Error::system(what, errno);
                Err(match remedy(&object, errno) {
                    Some(remedy) => error.hint(remedy),
                    None => error,
                })
            }
        }
    }

    /// Adds what is wanted and missing of the ip rules and routes, and keeps the rest: make before
    /// break. A family that this host does not have is told once and left out from then on.
    pub fn add_routing(&mut self, config: &Config) -> Result<()> {
        for family in self.families.clone() {
            if let Err(error) = self.add_family(config, family) {
                let absent = matches!(
                    error.errno(),
                    Some(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::EACCES | Errno::ENODEV)
                );
                if family != Family::V6 || !absent {
                    return Err(error);
                }
                log!(
                    Notice,
                    "IPv6 is off on this host, going on with IPv4 alone: {error}"
                );
                self.families.retain(|f| *f != family);
            }
        }
        Ok(())
    }

    fn add_family(&mut self, config: &Config, family: Family) -> Result<()> {
        let have = self.routing(family)?;
        for entry in plan::routing(config, &[family]).difference(&have) {
            match self.route_request(entry, true) {
                // somebody else's entry of the same effect
                Ok(()) | Err(Errno::EEXIST) => {}
                Err(errno) => {
                    let what = format!("unable to do `{}`", entry.command("add"));
                    let error = Error::system(what, errno);
                    return Err(match errno {
                        Errno::ENETDOWN => error.hint("bring lo up: ip link set lo up"),
                        _ => error,
                    });
                }
            }
        }
        Ok(())
    }

    /// Deletes rules and routes of ours that are not wanted (all, without a configuration), and
    /// returns them.
    pub fn trim_routing(&mut self, config: Option<&Config>) -> Result<Vec<Entry>> {
        let mut deleted = Vec::new();
        for family in Family::BOTH {
            let wanted = config.map_or_else(BTreeSet::new, |c| plan::routing(c, &[family]));
            // rules before the routes that they lead to
            for entry in self
                .routing(family)?
                .iter()
                .rev()
                .filter(|e| !wanted.contains(e))
            {
                match self.route_request(entry, false) {
                    Ok(()) => deleted.push(entry.clone()),
                    // gone meanwhile
                    Err(Errno::ENOENT | Errno::ESRCH) => {}
                    Err(errno) => {
                        let what = format!("unable to do `{}`", entry.command("del"));
                        return Err(Error::system(what, errno));
                    }
                }
            }
        }
        Ok(deleted)
    }

    /// The rules and routes of one family that carry our protocol number; none for a family that
    /// the kernel does not have.
    pub fn routing(&mut self, family: Family) -> Result<BTreeSet<Entry>> {
        let mut all = BTreeSet::new();
        type Request = fn(&mut Batch, Family);
        for request in [route::get_rules as Request, route::get_routes as Request] {
            match self
                .rt
                .dump(&|batch| request(batch, family), route::parse)?
            {
                Ok(found) => all.extend(found.into_iter().filter(|e| e.family() == family)),
                Err(Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::ENOENT) => {}
                Err(errno) => {
                    return Err(Error::system("unable to list ip rules or routes", errno))
                }
            }
        }
        Ok(all)
    }

    fn route_request(&mut self, entry: &Entry, add: bool) -> std::result::Result<(), Errno> {
        let mut batch = self.rt.batch();
        entry.encode(&mut batch, add);
        let last = batch.last_seq();
        match self.rt.transact(&batch, last) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Failure::Refused { errno, text, .. })) => {
                log!(
                    Debug,
                    "{}: {}",
                    entry.command("…"),
                    text.unwrap_or_else(|| reason(errno))
                );
                Err(errno)
            }
            Ok(Err(Failure::Unknown)) => Err(Errno::ENOBUFS),
            Err(error) => Err(error.errno().unwrap_or(Errno::EIO)),
        }
    }
}

/// What a user can do about a refused object.
fn remedy(object: &str, errno: Errno) -> Option<String> {
    let needs = |what: &str, package: &str| {
        Some(format!(
            "the kernel needs {what}; on OpenWrt install {package}"
        ))
    };
    match errno {
        Errno::EPERM if object.starts_with("table") => Some(format!(
            "table inet {TABLE} is owned by another process, or CAP_NET_ADMIN is missing"
        )),
        Errno::ENOENT | Errno::EOPNOTSUPP if object.ends_with("chain output") => {
            needs("nft_socket with cgroupv2 (Linux 5.13)", "kmod-nft-socket")
        }
        Errno::ENOENT | Errno::EOPNOTSUPP if object.contains("chain tproxy_") => {
            needs("nft_tproxy", "kmod-nft-tproxy")
        }
        Errno::ENOENT if object.contains("nat_output") => needs("nft_nat", "kmod-nft-nat"),
        _ => None,
    }
}
