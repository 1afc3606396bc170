//! The kernel as this program changes it: one nftables table here, ip rules and routes in `routing`,
//! other programs' sockets in `sockets`. It carries plans out and reports; what should be there is
//! decided elsewhere.

use std::collections::HashMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

use crate::error::{errno, reason, Error, Result};
use crate::host::{self, Host};
use crate::log;
use crate::netlink::fib;
use crate::netlink::link::{self, Link};
use crate::netlink::msg::Batch;
use crate::netlink::netns;
use crate::netlink::parse::{Message, Messages};
use crate::netlink::socket::{Failure, Socket};
use crate::netlink::uapi::*;
use crate::nft::event::Follower;
use crate::nft::lock::{self, Lock};
use crate::nft::marks::{self, Ours};
use crate::nft::message::{self, Contents, Object, Present, Transaction};
use crate::nft::others;
use crate::nft::stmt::cgroup_hash;
use crate::nft::table::{class_name, Deeds, DEEDS, HOLD, OUTPUT, TABLE};
use crate::nft::view;
use crate::route::{self, Needs};
use crate::small::{SmallMap, SmallSet};
use crate::sys;

mod flows;
mod listing;
pub mod routing;
pub mod sockets;

use listing::Listing;

/// `NETLINK_GET_STRICT_CHK` of include/uapi/linux/netlink.h: dumps honour the request's filter.
const NETLINK_GET_STRICT_CHK: i32 = 12;

/// How often a replacement is tried by which packets meet all sets: twice, for their names, and twice more
/// where an answer is lost.
const TRIES: usize = 4;

/// Our sockets to the kernel. The nftables one owns the table, so it lives as long as the daemon.
pub struct Kernel {
    nft: Socket,
    rt: Socket,
    /// What the table is created with; `None` once the kernel has refused it (before Linux 6.9).
    flags: Option<u32>,
    /// False once this host has turned out to have no IPv6.
    ipv6: bool,
    /// Routes over lo were refused, for it is down.
    lo_is_down: bool,
    /// Notifications, for the daemon; those of nftables only where we cannot own the table.
    nft_events: Option<(Socket, Follower)>,
    rt_events: Option<Socket>,
    /// The route tables that those tell of, and whether they tell of interfaces, or of new ones.
    watched: Option<(Vec<u32>, bool, bool)>,
    /// The interfaces that ways out lead to, as they were looked at last.
    links: Vec<Link>,
    /// Notifications of interfaces that lead to other network namespaces, and whether any are let
    /// pass: they are while containers are looked for.
    peer_events: Option<Socket>,
    follows_peers: bool,
    /// The interfaces that are open to loopback addresses, and whether they were closed before.
    opened: SmallMap<String, bool>,
    /// For questions about other programs' sockets; not every kernel answers them.
    diag: Option<Socket>,
    /// The table is not of our making, and to be replaced as a whole.
    pub foreign: bool,
    /// Of the sets that stay over a replacement where they are what is wanted (see
    /// [`Contents::digests`]); none where others may have changed them.
    digests: Vec<u64>,
    /// False once the kernel has refused to end a socket.
    ends_sockets: bool,
    /// Whether conntrack tells of its flows, once that is known.
    tells_flows: Option<bool>,
    /// Its flows, as they are listed by and by; for the daemon.
    flows: Option<Listing<()>>,
    /// The same of sockets, for each who asks.
    sockets: [Option<Listing<sockets::Ask>>; 3],
}

/// What others did to our state since the last look.
#[derive(Debug, Default)]
pub struct Damage {
    /// Who changed the table.
    pub table: Option<String>,
    /// A rule or a route of ours may be gone, or others may be in their way.
    pub routing: bool,
    /// A bridge may have come.
    pub bridge: bool,
    /// What could not be added before may be possible now, or a way out has opened or closed.
    pub revived: bool,
}

impl Kernel {
    pub fn open() -> Result<Kernel> {
        let nft = Socket::open(SockProtocol::NetlinkNetFilter, &[])?;
        let rt = Socket::open(SockProtocol::NetlinkRoute, &[])?;
        let _ = sys::set_option(rt.as_fd(), libc::SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1);
        Ok(Kernel {
            nft,
            rt,
            flags: table_flags(),
            ipv6: true,
            lo_is_down: false,
            nft_events: None,
            rt_events: None,
            peer_events: None,
            follows_peers: false,
            watched: None,
            links: Vec::new(),
            opened: SmallMap::default(),
            diag: Socket::open(SockProtocol::NetlinkSockDiag, &[]).ok(),
            foreign: false,
            digests: Vec::new(),
            ends_sockets: true,
            tells_flows: None,
            flows: None,
            sockets: [None, None, None],
        })
    }

    /// The same, subscribed to what others do to rules and to the routes of our tables. To be called
    /// before anything is put into the kernel, so that no damage goes unseen.
    pub fn open_watching(needs: &Needs) -> Result<Kernel> {
        let mut kernel = Kernel::open()?;
        let groups = [
            RTNLGRP_LINK,
            RTNLGRP_IPV4_RULE,
            RTNLGRP_IPV4_ROUTE,
            RTNLGRP_IPV6_RULE,
            RTNLGRP_IPV6_ROUTE,
            RTNLGRP_IPV4_IFADDR,
            RTNLGRP_IPV6_IFADDR,
        ];
        let rt = Socket::open(SockProtocol::NetlinkRoute, &groups)?;
        kernel.rt_events = Some(rt);
        // later on no socket can be bound any more
        let peers = Socket::open(SockProtocol::NetlinkRoute, &[RTNLGRP_LINK, RTNLGRP_NSID])?;
        let _ = sys::attach_filter(peers.as_fd(), &netns::no_event());
        kernel.peer_events = Some(peers);
        kernel.flows = Some(Listing::open(SockProtocol::NetlinkNetFilter)?);
        kernel.sockets.fill_with(|| Listing::open(SockProtocol::NetlinkSockDiag).ok());
        kernel.watch(needs);
        Ok(kernel)
    }

    /// Has notifications tell of other route tables.
    fn watch(&mut self, needs: &Needs) {
        let links = needs.ways.iter().any(|way| way.interface().is_some());
        let new = !needs.forwarded.interfaces.is_empty();
        let watched = Some((needs.watched(), links, new));
        if let Some(rt) = self.rt_events.as_ref().filter(|_| self.watched != watched) {
            self.watched = watched;
            // without it there are more wake-ups, that is all
            let _ =
                sys::attach_filter(rt.as_fd(), &fib::event_filter(&needs.watched(), links, new));
        }
    }

    /// Subscribes to nftables' notifications too where the table is not ours alone: nobody else can
    /// change one that we own. To be called once the table is there.
    ///
    /// Returns true where the table has to be replaced once more, for what happened to it before.
    /// (Subscribing always and closing afterwards costs 15 ms: the kernel waits for RCU there.)
    pub fn watch_table(&mut self) -> Result<bool> {
        if self.flags.is_some() || self.nft_events.is_some() {
            return Ok(false);
        }
        let socket = Socket::open(SockProtocol::NetlinkNetFilter, &[NFNLGRP_NFTABLES])?;
        self.nft_events = Some((socket, Follower::default()));
        self.digests.clear();
        Ok(true)
    }

    /// The descriptors to poll for [`Kernel::damage`].
    pub fn event_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let nft = self.nft_events.as_ref().map(|(socket, _)| socket.as_fd());
        let rt = self.rt_events.as_ref().map(|socket| socket.as_fd());
        let link = self.peer_events.as_ref().map(|socket| socket.as_fd());
        nft.into_iter().chain(rt).chain(link)
    }

    /// Reads all notifications. Lost ones count as damage to all that they could have told of.
    pub fn damage(&mut self, needs: &Needs) -> Damage {
        let mut damage = Damage::default();
        let own = self.nft.port();
        if let Some((socket, follower)) = &mut self.nft_events {
            let lost = each_notification(socket, |datagram| {
                if let Some(culprit) = follower.take(datagram, own) {
                    damage.table = Some(culprit);
                }
            });
            if lost {
                damage.table = Some("somebody (notifications were lost)".into());
            }
            if damage.table.is_some() {
                self.digests.clear();
            }
        }
        let own = self.rt.port();
        if let Some(socket) = &mut self.rt_events {
            let lost = each_notification(socket, |datagram| {
                for message in Messages::new(datagram).filter(|m| m.pid != own) {
                    damage.routing |= route::is_change(needs, &message);
                    damage.bridge |= link::is_new_bridge(&message);
                    damage.revived |= fib::lo_revives(&message);
                    damage.revived |= route::is_way_change(needs, &self.links, &message);
                }
            });
            damage.routing |= lost;
            damage.bridge |= lost;
            damage.revived |= lost;
        }
        damage
    }

    /// Follows what becomes of interfaces that lead to other network namespaces, or stops that.
    /// Returns whether they have to be listed, for it begins here.
    pub fn follow_peers(&mut self, on: bool) -> bool {
        let begins = on && !self.follows_peers;
        if let Some(peers) = self.peer_events.as_ref().filter(|_| on != self.follows_peers) {
            let filter = if on { &netns::event_filter()[..] } else { &netns::no_event() };
            // without it there are more wake-ups, that is all
            let _ = sys::attach_filter(peers.as_fd(), filter);
        }
        self.follows_peers = on;
        begins
    }

    /// What has become of interfaces since the last call; `None` where some of that was lost.
    pub fn peer_changes(&mut self) -> Option<Vec<netns::PeerChange>> {
        let mut changes = Vec::new();
        let Some(socket) = &mut self.peer_events else {
            return Some(changes);
        };
        let lost = each_notification(socket, |datagram| {
            changes.extend(Messages::new(datagram).flat_map(|message| netns::read(&message)));
        });
        (!lost).then_some(changes)
    }

    /// All interfaces; `None` where the kernel does not tell.
    pub fn interfaces(&mut self) -> Option<Vec<Link>> {
        self.rt.dump(&link::get_all, link::parse).ok()?.ok()
    }

    /// Our ids of the network namespaces that these processes are in; none where one is in this one:
    /// who visits others lives here. And whether that is all: one that ends is in none.
    pub fn namespaces_of(&mut self, pids: &[u32]) -> (SmallSet<u32>, bool) {
        if pids.iter().any(|pid| host::shares_network(&pid.to_string()) == Some(true)) {
            return (SmallSet::default(), true);
        }
        let told: Vec<_> = pids.iter().filter_map(|pid| self.ask_namespace(*pid)).collect();
        (told.iter().flatten().copied().collect(), told.len() == pids.len())
    }

    /// The interfaces that lead to the network namespace of a process.
    pub fn veths_of(&mut self, pid: u32) -> Vec<Link> {
        let net = self.ask_namespace(pid).flatten();
        let leads = |link: &Link| link.is_pair && link.peer.is_some() && link.peer == net;
        self.interfaces().into_iter().flatten().filter(leads).collect()
    }

    /// Our id of the network namespace that a process is in, which may have none; `None` where nobody
    /// can tell.
    fn ask_namespace(&mut self, pid: u32) -> Option<Option<u32>> {
        let ask = |batch: &mut Batch| netns::get_namespace(batch, pid);
        self.rt.ask(&ask, netns::parse_namespace).ok()?.ok()
    }

    /// Whether this kernel can match cgroups. A table without classified cgroups would load on one
    /// that cannot, and never do its work.
    ///
    /// Errors: what the kernel lacks, with the remedy.
    pub fn probe_cgroups(&mut self) -> Result<()> {
        self.change(Transaction::probe_cgroups)
    }

    /// The level of our own cgroup as `socket cgroupv2 level` counts it: which datagrams of ours,
    /// over `lo` to ourselves, have a sender at or below each level. `None` where it is none of the
    /// first `most` ones.
    ///
    /// Errors: it cannot be asked here.
    pub fn own_level(&mut self, most: u32) -> Result<Option<u32>> {
        let refused =
            |e: std::io::Error| Error::system("unable to send to ourselves over lo", errno(&e));
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(refused)?;
        let own = socket.local_addr().map_err(refused)?;
        socket.connect(own).map_err(refused)?;
        socket.send(&[]).map_err(refused)?;
        let transaction = message::ask_levels(own.port(), 0..most, self.nft.batch());
        self.commit(transaction)?;
        let lengths = 1..=most as usize;
        let bytes = vec![0; most as usize];
        // others drop packets over lo, too
        let control = socket.send(&[]);
        let dropped = |length: &usize| {
            let sent = socket.send(&bytes[..*length]);
            sent.is_err_and(|e| e.raw_os_error() == Some(libc::EPERM))
        };
        let found = lengths.take_while(dropped).last();
        self.change(|transaction| transaction.remove_table_of(message::ASKING))?;
        control.map_err(refused)?;
        Ok(found.map(|length| length as u32 - 1))
    }

    /// The deepest level that the kernel takes in a rule.
    pub fn deepest_level(&mut self) -> Result<usize> {
        let probes: Vec<_> = (1..=255).map(message::Probe::cgroup).collect();
        let said = self.probe(&probes)?;
        Ok(said.iter().take_while(|refused| refused.is_none()).count())
    }

    /// Whether it can match removed cgroups too. Said where it cannot.
    pub fn can_keep_dying(&mut self) -> bool {
        let answer = self.change(Transaction::probe_hashes);
        if let Err(error) = &answer {
            log!(
                Notice,
                "what sockets of removed cgroups still send goes the way of the cgroup above them: \
                 this kernel has no nft_hash (CONFIG_NFT_HASH; {error})"
            );
        }
        answer.is_ok()
    }

    /// Replaces what the table holds by this, so that each packet meets what was or what is to be. Where
    /// the kernel, or what others have made of the table, does not allow that, the table as a whole.
    pub fn replace(&mut self, contents: &Contents) -> Result<()> {
        let digests = contents.digests();
        let before = std::mem::take(&mut self.digests);
        let same = before.iter().zip(&digests).take_while(|(old, new)| old == new).count();
        // once it is in force, some sets may still have to be given their own names
        let mut in_force = false;
        for _ in 0..TRIES {
            match self.exchange(contents, same, in_force || contents.moves()) {
                Ok(Some(true)) => {
                    self.digests = digests;
                    return Ok(());
                }
                Ok(Some(false)) => in_force = true,
                Ok(None) => break,
                Err(error) => {
                    log!(Debug, "{error}; replacing the table otherwise");
                    if !in_force && !error.errno().is_some_and(passes) {
                        break;
                    }
                }
            }
        }
        if !in_force {
            self.replace_whole(contents)?;
            self.digests = digests;
        }
        Ok(())
    }

    /// See [`Contents::ahead`] and [`Contents::exchange`]. Whether sets have their own names now, of which
    /// some may have been taken; `None` where that is not the way.
    fn exchange(&mut self, contents: &Contents, same: usize, keep: bool) -> Result<Option<bool>> {
        let there = self.table_flags()?;
        if there == Some(0) && self.flags.is_some() {
            // before Linux 6.9 no table that was left has an owner, nor will one have
            let refused = self.change(Transaction::probe_owner).err();
            self.flags = self.flags.filter(|_| !refused.is_some_and(|error| lacks_flags(&error)));
        }
        let own = self.flags.unwrap_or(0);
        // one that a killed daemon has left behind has no owner
        let ours = there.is_none_or(|there| [there, there | NFT_TABLE_F_OWNER].contains(&own));
        let present = match there {
            Some(_) => self.present()?,
            None => Present::default(),
        };
        let (names, flags) = (contents.names(&present, same), self.flags);
        if std::mem::take(&mut self.foreign) || !ours || there.is_none() && names.is_empty() {
            return Ok(None);
        }
        let is_new = |name: &&String| !present.sets.contains(*name);
        let new: Vec<&String> = names.values().filter(is_new).collect();
        // the kernel hooks nothing in beside the adoption of a table that has lost its owner (EINVAL)
        let adopts = there.is_some_and(|there| there != own);
        if adopts || !new.is_empty() {
            let batch = self.batch();
            self.commit(contents.ahead(&present, &names, flags, batch))?;
        }
        let batch = self.batch();
        self.commit(contents.exchange(&present, &names, keep, flags, batch)).inspect_err(|_| {
            // the next replacement takes them away where this cannot
            let _ = self.change(|undo| match there {
                None => undo.remove_table(),
                Some(_) => new.iter().for_each(|name| undo.delete_set(name)),
            });
        })?;
        Ok(Some(names.iter().all(|(own, name)| own == name)))
    }

    /// What stands in our table.
    fn present(&mut self) -> Result<Present> {
        let counters = self.all(NFT_MSG_GETOBJ, view::parse_counter)?;
        Ok(Present {
            chains: self.all(NFT_MSG_GETCHAIN, view::parse_chain)?,
            sets: self.all(NFT_MSG_GETSET, view::parse_set)?.into_iter().collect(),
            counters: counters.into_iter().map(|(name, _)| name).collect(),
        })
    }

    /// In one transaction.
    fn replace_whole(&mut self, contents: &Contents) -> Result<()> {
        let flags = self.flags;
        let batch = self.batch();
        match self.commit(contents.replacement(flags, batch)) {
            Err(error) if flags.is_some() && lacks_flags(&error) => {
                let batch = self.batch();
                self.commit(contents.replacement(None, batch))?;
                self.flags = None;
                Ok(())
            }
            other => other,
        }
    }

    /// Removes the table; false where there was none.
    pub fn remove_table(&mut self) -> Result<bool> {
        if self.table_owner()?.is_none() {
            return Ok(false);
        }
        // before the rules go that keep others out
        let open = self.rules().map(|rules| view::open_to_loopback(&rules)).unwrap_or_default();
        self.set_localnet(open.iter().map(String::as_str), false);
        self.change(Transaction::remove_table).map(|()| true)
    }

    /// What the lock says; `None` where there is none.
    pub fn lock(&mut self) -> Result<Option<Lock>> {
        Ok(self.tables(lock::parse)?.into_iter().next())
    }

    /// Takes the lock, until this is dropped, or says that nobody has it.
    ///
    /// Errors: EPERM where another process holds it.
    pub fn set_lock(&mut self, lock: Lock) -> Result<()> {
        self.change(|transaction| lock::set(transaction, lock))
    }

    /// Whether the table is there, and the port id that owns it, if any does.
    pub fn table_owner(&mut self) -> Result<Option<Option<u32>>> {
        Ok(self.tables(message::parse_table)?.into_iter().next())
    }

    fn tables<T>(&mut self, each: impl Fn(&Message) -> Option<T>) -> Result<Vec<T>> {
        let what = "unable to list nftables tables";
        let found = self.nft.dump(&message::get_table, each)?;
        found.map_err(|errno| Error::system(what, errno).hint("is nf_tables there?"))
    }

    /// What a transaction for [`Kernel::commit`] is to be built in.
    pub fn batch(&mut self) -> Batch {
        self.nft.batch()
    }

    /// Commits a transaction of that.
    fn change(&mut self, put: impl FnOnce(&mut Transaction)) -> Result<()> {
        let mut transaction = Transaction::new(self.batch());
        put(&mut transaction);
        self.commit(transaction)
    }

    /// Waits until no packet is on its way any more that has met rules of before, some 10 ms: before it
    /// frees what a refused transaction had made, the kernel does (synchronize_rcu(), in all versions).
    pub fn await_packets(&mut self) {
        let _ = self.change(Transaction::await_packets);
    }

    /// Has a transaction take effect, as a whole or not at all.
    ///
    /// Errors: the object that was refused, with a remedy where one is known.
    pub fn commit(&mut self, transaction: Transaction) -> Result<()> {
        let (batch, last) = transaction.finish();
        log!(Debug, "nftables transaction of {} bytes", batch.bytes().len());
        match self.nft.transact(&batch, last)? {
            Ok(()) => {
                self.nft.reuse(batch);
                Ok(())
            }
            Err(Failure::Unknown) => {
                Err(Error::system("unable to learn what became of a transaction", Errno::ENOBUFS))
            }
            Err(Failure::Refused { seq, errno, text }) => {
                let object = Object::of(&batch, seq);
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

    /// The interfaces, and the sockets that are bound to them.
    pub fn glance(&mut self) -> Host {
        Host::glance(Some(&mut self.rt), self.diag.as_mut())
    }
}

/// Whether what failed by that may be done the next moment.
fn passes(errno: Errno) -> bool {
    matches!(errno, Errno::ENOBUFS | Errno::ENOMEM | Errno::EAGAIN)
}

/// What to create the table with. Debug builds can be told to leave it unowned, so that tests can
/// do to it what others can do on kernels before 6.9.
fn table_flags() -> Option<u32> {
    let unowned = cfg!(debug_assertions) && std::env::var_os("CGTPROXY_UNOWNED").is_some();
    (!unowned).then_some(NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST)
}

/// Of a kernel without table flags, or without `persist`.
fn lacks_flags(error: &Error) -> bool {
    matches!(error.errno(), Some(Errno::EOPNOTSUPP | Errno::EINVAL))
}

/// Hands every queued datagram to `each`. Returns whether some were lost before.
fn each_notification(socket: &mut Socket, mut each: impl FnMut(&[u8])) -> bool {
    let mut lost = false;
    loop {
        match socket.notification() {
            Ok(None) => return lost,
            Ok(Some(datagram)) => each(datagram),
            Err(Errno::ENOBUFS) => lost = true,
            Err(errno) => {
                log!(Error, "unable to read notifications: {}", reason(errno));
                return true;
            }
        }
    }
}

/// What our table holds.
pub struct Inventory {
    /// `NFT_TABLE_F_*`
    pub flags: u32,
    pub view: view::View,
    /// By target and class; without the sets that are not there.
    pub cgroups: SmallMap<view::SetKey, Vec<view::ElementView>>,
    /// The same of those that are matched by their hashes.
    pub hashed: SmallMap<view::SetKey, Vec<u32>>,
    /// What the daemon has done; `None` where the table has no counter for it.
    pub deeds: Option<Deeds>,
}

impl Inventory {
    /// The name of the target whose sets hold a cgroup, and the class, by its id.
    pub fn outcomes<'a>(&'a self) -> impl Fn(u64) -> Option<(&'a str, u16)> {
        let ids = self.cgroups.iter().flat_map(|(key, all)| all.iter().map(move |e| (e.id, key)));
        let ids: HashMap<u64, &view::SetKey> = ids.collect();
        let hashes = self.hashed.iter().flat_map(|(key, all)| all.iter().map(move |h| (*h, key)));
        let hashes: HashMap<u32, &view::SetKey> = hashes.collect();
        move |id| {
            let (name, class) = ids.get(&id).or_else(|| hashes.get(&cgroup_hash(id)))?;
            Some((name, *class))
        }
    }

    /// The elements of a target, of all classes.
    pub fn of_target<'a>(&'a self, target: &'a str) -> impl Iterator<Item = &'a view::ElementView> {
        let own = self.cgroups.iter().filter(move |((name, _), _)| name == target);
        own.flat_map(|(_, elements)| elements)
    }

    /// Whether the set that a step looks into holds a cgroup.
    pub fn holds(&self, step: &view::Step, id: u64) -> bool {
        let key = step.key();
        match step.hashed {
            true => self.hashed.get(&key).is_some_and(|all| all.contains(&cgroup_hash(id))),
            false => self.cgroups.get(&key).is_some_and(|all| all.iter().any(|e| e.id == id)),
        }
    }
}

/// Looking: what the kernel holds, ours and others'.
impl Kernel {
    /// What our table holds; `None` where there is no table. Not one moment's picture: see
    /// `Socket::dump`.
    pub fn inventory(&mut self) -> Result<Option<Inventory>> {
        let Some(flags) = self.table_flags()? else {
            return Ok(None);
        };
        let view = view::View::of(&self.rules()?);
        let mut cgroups = SmallMap::default();
        let plain = view.targets.iter().map(|target| (target.name.clone(), 0));
        let plain: SmallSet<view::SetKey> = plain.collect();
        let used = view.steps.iter().filter(|step| !step.hashed).map(view::Step::key);
        for key in plain.into_iter().chain(used) {
            let elements = self.elements(&class_name("cg", &key.0, key.1))?;
            cgroups.insert(key, elements);
        }
        let mut hashed = SmallMap::default();
        for step in view.steps.iter().filter(|step| step.hashed) {
            let set = class_name("dying", &step.set, step.class);
            let request = |batch: &mut Batch| view::get_elements(batch, &set);
            let found = self.nft.dump(&request, view::parse_hashes)?.map_err(nft_refused)?;
            hashed.insert(step.key(), found.into_iter().flatten().collect());
        }
        let counters = self.all(NFT_MSG_GETOBJ, view::parse_counter)?;
        let counters: HashMap<_, _> = counters.into_iter().collect();
        let known = DEEDS.iter().all(|name| counters.contains_key(*name));
        let deeds = known.then(|| DEEDS.map(|name| counters[name]));
        Ok(Some(Inventory { flags, view, cgroups, hashed, deeds }))
    }

    /// The flags of our table; `None` where there is no table.
    pub fn table_flags(&mut self) -> Result<Option<u32>> {
        let found = self.nft.dump(&message::get_table, view::parse_table_flags)?;
        Ok(found.map_err(nft_refused)?.into_iter().next())
    }

    /// The rules of our table; none where there is no table.
    pub fn rules(&mut self) -> Result<Vec<view::RuleView>> {
        self.all(NFT_MSG_GETRULE, view::parse_rule)
    }

    /// See [`view::get_all`]; none where there is no table.
    fn all<T>(&mut self, kind: u16, read: impl Fn(&Message) -> Option<T>) -> Result<Vec<T>> {
        match self.nft.dump(&|batch| view::get_all(batch, kind), read)? {
            Err(Errno::ENOENT) => Ok(Vec::new()),
            found => found.map_err(nft_refused),
        }
    }

    /// A line for each chain of other programs that breaks what goes to a tproxy.
    pub fn others(&mut self, ours: &Ours) -> Result<Vec<String>> {
        let rules = self.nft.dump(&others::get_rules, others::parse)?.map_err(nft_refused)?;
        let bases = self.nft.dump(&others::get_chains, others::parse_base)?.map_err(nft_refused)?;
        let mut found = others::hindrances(&rules);
        found.extend(marks::hindrances(&bases, &rules, ours));
        Ok(found)
    }

    /// The elements of one of our cgroup sets; none where there is no such set.
    pub fn elements(&mut self, set: &str) -> Result<Vec<view::ElementView>> {
        let request = |batch: &mut Batch| view::get_elements(batch, set);
        match self.nft.dump(&request, view::parse_elements)? {
            Err(Errno::ENOENT) => Ok(Vec::new()),
            found => Ok(found.map_err(nft_refused)?.into_iter().flatten().collect()),
        }
    }

    /// Asks the kernel for each of these objects, in a transaction that is made to fail at its end
    /// so that nothing comes of it, and returns what it said about each: `None` for granted.
    pub fn probe(&mut self, probes: &[message::Probe]) -> Result<Vec<Option<Errno>>> {
        let batch = self.nft.batch();
        let (batch, places, end) = message::probe(probes, batch);
        let refused = self.nft.refusals(&batch, end)?;
        let said = |seq: &u32| refused.iter().find(|(at, _)| at == seq).map(|(_, errno)| *errno);
        match said(&end) {
            // the failure that was asked for
            Some(Errno::ENOENT) => Ok(places.iter().map(said).collect()),
            _ => {
                let errno = refused.first().map_or(Errno::EIO, |(_, errno)| *errno);
                Err(Error::system("unable to ask nf_tables what it can do", errno))
            }
        }
    }
}

fn nft_refused(errno: Errno) -> Error {
    let error = Error::system("unable to list what nf_tables holds", errno);
    match errno {
        Errno::EPERM => error.hint("that needs CAP_NET_ADMIN: run as root"),
        _ => error,
    }
}

/// What a user can do about a refused object.
fn remedy(object: &Object, errno: Errno) -> Option<String> {
    let needs = |what: &str, package: &str| {
        Some(format!("the kernel needs {what}; on OpenWrt install {package}"))
    };
    let is_absent = matches!(errno, Errno::ENOENT | Errno::EOPNOTSUPP);
    match object.chain() {
        None if *object == Object::Table && errno == Errno::EPERM => Some(format!(
            "table inet {TABLE} is owned by another process, or CAP_NET_ADMIN is missing"
        )),
        // its flags: of an owner, as the lock has one
        None if *object == Object::Table && errno == Errno::EINVAL => {
            Some("the kernel knows no owners of tables: it has to be Linux 5.13 or later".into())
        }
        Some(chain) if is_absent && (chain == OUTPUT || chain.starts_with(HOLD)) => {
            needs("nft_socket with cgroupv2 (Linux 5.13)", "kmod-nft-socket")
        }
        Some(chain) if is_absent && chain.starts_with("tproxy_") => {
            needs("nft_tproxy", "kmod-nft-tproxy")
        }
        Some(chain) if errno == Errno::ENOENT && chain.starts_with("nat_") => {
            needs("nft_nat", "kmod-nft-nat")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_object_has_its_remedy() {
        let chain = |name: &str| Object::Chain(name.into());
        let has = |object: Object, errno, word: &str| {
            remedy(&object, errno).is_some_and(|text| text.contains(word))
        };
        let absent = Errno::ENOENT;
        assert!(has(Object::Table, Errno::EPERM, "owned by another process"));
        assert!(has(Object::Table, Errno::EINVAL, "Linux 5.13"));
        assert!(has(Object::RuleOf("output".into()), absent, "kmod-nft-socket"));
        assert!(has(chain("output"), Errno::EOPNOTSUPP, "kmod-nft-socket"));
        assert!(has(Object::RuleOf("tproxy_x".into()), absent, "kmod-nft-tproxy"));
        assert!(has(chain("nat_output"), absent, "kmod-nft-nat"));
        assert!(has(chain("nat_postrouting"), absent, "kmod-nft-nat"));
        // others' names hold the same words
        for object in [chain("to_output"), Object::Set("tproxy_x".into()), Object::All] {
            assert_eq!(remedy(&object, absent), None, "{object}");
        }
        assert_eq!(remedy(&Object::Table, absent), None);
        let mut transaction = Transaction::new(Batch::new(0));
        transaction.remove_table();
        transaction.add_hashes("dying_x", [1].into_iter());
        let (batch, last) = transaction.finish();
        let said = |seq| Object::of(&batch, seq).to_string();
        assert_eq!(said(2), "table inet cgtproxy");
        assert_eq!(said(last), "elements of set dying_x");
        assert_eq!([said(1), said(99)], ["a transaction"; 2]);
    }
}
