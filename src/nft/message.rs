//! The table and its changes as nf_tables messages. Pure bytes; attribute order follows libnftnl,
//! so that tests can hold each message against that library's.
//! Source: include/uapi/linux/netfilter/nf_tables.h, libnftnl, nfnetlink's batches.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::expr::{value, Anonymous, Expr, SetRef, Verdict};
use super::stmt::{eq, meta, neq, payload, Stmt};
use super::table::{
    veth_name, Base, Chain, Content, Deeds, Rule, Set, Table, DEEDS, MOVED, OUTPUT, TABLE,
};
use crate::net::{Address, Range};
use crate::netlink::msg::{Batch, Open};
use crate::netlink::parse::{self, Attrs, Messages};
use crate::netlink::uapi::*;
use crate::small::{SmallMap, SmallSet};

/// An element list is split when its message grows past this; attribute lengths are 16 bits wide.
const SPLIT: usize = 32 * 1024;

/// A table that is never there for others to see.
const PROBE: &str = "cgtproxy-probe";

/// The table with all that its cgroup sets hold, by name of the set.
#[derive(Debug)]
pub struct Contents {
    pub table: Table,
    pub cgroups: Vec<(String, Vec<u64>)>,
    /// Removed cgroups, by their hashes.
    pub dying: Vec<(String, Vec<u32>)>,
    pub veths: Vec<Veth>,
    /// Chains that depend on where containers come in and on tables of others, with their rules.
    pub chains: Vec<(String, Vec<Rule>)>,
    pub deeds: Deeds,
}

/// A chain where the packets of a veth come in, and its rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Veth {
    pub index: u32,
    pub name: String,
    pub rule: Rule,
}

/// What stands in a table: the names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Present {
    pub chains: Vec<(String, Option<Hook>)>,
    pub sets: SmallSet<String>,
    pub counters: SmallSet<String>,
}

/// Where a base chain stands: the hook, and the priority.
pub type Hook = (u32, i32);

/// What sets are called in the kernel whose names in a [`Table`] are taken there.
pub type Names = SmallMap<String, String>;

impl Contents {
    /// One transaction that replaces the table. `flags`: see [`Transaction::replace`].
    pub fn replacement(&self, flags: Option<u32>, batch: Batch) -> Transaction {
        let mut transaction = Transaction::new(batch);
        transaction.replace(&self.table, flags);
        self.fill(&mut transaction);
        DEEDS.iter().zip(self.deeds).for_each(|(name, count)| transaction.add_counter(name, count));
        transaction
    }

    /// The sets that have to be there before a rule looks into them.
    ///
    /// The kernel shows the rules of a transaction first, and what its new interval sets hold only when it
    /// is done with all the rest of it (measured on Linux 6.18.44). To a packet in between such a set is
    /// empty, which would have it proxied, or left alone, whatever the policies of before and after say.
    fn ranges(&self) -> impl Iterator<Item = &Set> {
        self.table.sets.iter().filter(|set| set.content.is_ranges())
    }

    /// Their names and what they hold, a hash each.
    pub fn digests(&self) -> Vec<u64> {
        let digest = |set| {
            let mut hasher = DefaultHasher::new();
            Set::hash(set, &mut hasher);
            hasher.finish()
        };
        self.ranges().map(digest).collect()
    }

    /// What they are to be called: the first `same` of them, which are there and stay, by their own names,
    /// and the others by their own ones too, unless some of these are taken. A listing has sets in the order
    /// in which they came, so none that came later may stay.
    pub fn names(&self, present: &Present, same: usize) -> Names {
        let is_free = |suffix: &String| {
            let mut names = self.ranges().skip(same).map(|set| format!("{}{suffix}", set.name));
            !names.any(|name| present.sets.contains(&name))
        };
        let more = (2..).map(|number| format!(".{number}"));
        // one for all, so that all own names are free next time
        let free = std::iter::once(String::new()).chain(more).find(is_free).unwrap_or_default();
        let name = |(place, set): (usize, &Set)| {
            let suffix = if place < same { "" } else { &free };
            (set.name.clone(), format!("{}{suffix}", set.name))
        };
        self.ranges().enumerate().map(name).collect()
    }

    /// The first of two transactions that replace what a table holds: those of these sets that are not
    /// present. The table is made where there is none, or adopted where it has lost its owner.
    pub fn ahead(
        &self,
        present: &Present,
        names: &Names,
        flags: Option<u32>,
        batch: Batch,
    ) -> Transaction {
        let mut transaction = Transaction { names: names.clone(), ..Transaction::new(batch) };
        transaction.table_of(TABLE, NFT_MSG_NEWTABLE, NLM_F_CREATE, flags, None);
        let stays = |set: &Set| names.get(&set.name).is_some_and(|own| present.sets.contains(own));
        self.ranges().filter(|set| !stays(set)).for_each(|set| transaction.set(set));
        transaction
    }

    /// The second one, by which they are looked into. All chains are new, and stand among others of their
    /// priority as those of a table that is loaded now; or, to `keep` those that are hooked in, they are
    /// left where they are, with other rules or none.
    ///
    /// For a moment packets meet new chains and then those that are deleted, with the rules of these: the
    /// kernel shows the former at once, and unhooks the latter one by one (seen on Linux 6.18.44).
    ///
    /// Linux 6.1.0-50 of Debian 12 takes it. Kernels of before June 2023 count until the end of it what
    /// the verdict maps of deleted rules lead to, and refuse to delete those chains (not tried).
    pub fn exchange(
        &self,
        present: &Present,
        names: &Names,
        keep: bool,
        flags: Option<u32>,
        batch: Batch,
    ) -> Transaction {
        let mut transaction = Transaction { names: names.clone(), ..Transaction::new(batch) };
        transaction.table_of(TABLE, NFT_MSG_NEWTABLE, NLM_F_CREATE, flags, None);
        transaction.delete_rules(None);
        let stays = |name: &str, hook: Option<Hook>| {
            let hook_of = |base: Base| (base.hook, base.priority);
            let new = self.table.chains.iter().find(|chain| chain.name == name);
            let is_veth = |(hook, _): Hook| hook == NF_INET_INGRESS;
            let empty = hook.is_some_and(|hook| !is_veth(hook));
            keep && new.map_or(empty, |chain| chain.base.map(hook_of) == hook)
        };
        let gone = present.chains.iter().filter(|(name, hook)| !stays(name, *hook));
        gone.for_each(|(name, _)| transaction.delete_chain(name));
        let unused = present.sets.iter().filter(|set| names.values().all(|name| name != *set));
        unused.for_each(|set| transaction.delete_set(set));
        transaction.put(&self.table);
        self.fill(&mut transaction);
        for (name, count) in DEEDS.iter().zip(self.deeds) {
            match present.counters.contains(*name) {
                true => transaction.replace_counter(name, count),
                false => transaction.add_counter(name, count),
            }
        }
        transaction
    }

    /// Whether marks mean something else in it than in the one of before.
    pub fn moves(&self) -> bool {
        self.table.chains.iter().any(|chain| chain.name == MOVED)
    }

    /// What the sets of cgroups hold, and the chains that depend on more than the configuration.
    fn fill(&self, transaction: &mut Transaction) {
        for (set, ids) in &self.cgroups {
            transaction.add_cgroups(set, ids.iter().copied());
        }
        for (set, hashes) in &self.dying {
            transaction.add_hashes(set, hashes.iter().copied());
        }
        self.veths.iter().for_each(|veth| transaction.add_veth(veth));
        for (chain, rules) in &self.chains {
            rules.iter().for_each(|rule| transaction.rule(chain, rule));
        }
    }
}

/// One nf_tables transaction under construction. All of it takes effect at once or not at all.
pub struct Transaction {
    batch: Batch,
    /// Where the last message begins: the one that asks for an acknowledgement.
    last: usize,
    next_set_id: u32,
    names: Names,
}

impl Transaction {
    pub fn new(batch: Batch) -> Transaction {
        let mut t = Transaction { batch, last: 0, next_set_id: 0, names: Names::default() };
        t.bound(NFNL_MSG_BATCH_BEGIN);
        t
    }

    /// True while nothing has been put in.
    pub fn is_empty(&self) -> bool {
        self.last == 0
    }

    /// The finished batch; its last message but the end mark asks for an acknowledgement. Kernels
    /// before 6.10 do not acknowledge the end mark itself.
    pub fn finish(mut self) -> (Batch, u32) {
        self.batch.want_ack(self.last);
        let answer = self.batch.last_seq();
        self.bound(NFNL_MSG_BATCH_END);
        (self.batch, answer)
    }

    /// Replaces the whole table, whether it is there or not. `flags` go to the new one.
    pub fn replace(&mut self, table: &Table, flags: Option<u32>) {
        self.remove_table();
        self.table_of(TABLE, NFT_MSG_NEWTABLE, NLM_F_CREATE, flags, None);
        self.put(table);
    }

    /// All that a table has, but for sets that are there under other names.
    fn put(&mut self, table: &Table) {
        for chain in &table.chains {
            self.chain(chain);
        }
        for set in &table.sets {
            if !self.names.contains_key(&set.name) {
                self.set(set);
            }
        }
        for chain in &table.chains {
            for rule in &chain.rules {
                self.rule(&chain.name, rule);
            }
        }
    }

    /// Removes the table, also where there is none (deleting alone would fail then, and
    /// NFT_MSG_DESTROYTABLE came with Linux 6.3 only).
    pub fn remove_table(&mut self) {
        self.remove_table_of(TABLE);
    }

    pub fn remove_table_of(&mut self, name: &str) {
        self.table_of(name, NFT_MSG_NEWTABLE, NLM_F_CREATE, None, None);
        self.table_of(name, NFT_MSG_DELTABLE, 0, None, None);
    }

    /// Makes and unmakes a table of another name with a rule of `socket cgroupv2`, which leaves
    /// nothing behind: the kernel takes it if it can match cgroups.
    pub fn probe_cgroups(&mut self) {
        self.probe_rule(&[Expr::SocketCgroup { level: 1, dreg: NFT_REG_1 }]);
    }

    /// The same for hashes of cgroup ids.
    pub fn probe_hashes(&mut self) {
        self.probe_rule(&[
            Expr::SocketCgroup { level: 1, dreg: NFT_REG_2 },
            Expr::Jhash { sreg: NFT_REG_2, dreg: NFT_REG_1, len: 8, modulus: u32::MAX, seed: 1 },
        ]);
    }

    /// The same for a table that stays when its owner goes.
    pub fn probe_owner(&mut self) {
        let flags = NFT_TABLE_F_OWNER | NFT_TABLE_F_PERSIST;
        self.table_of(PROBE, NFT_MSG_NEWTABLE, NLM_F_CREATE, Some(flags), None);
        self.table_of(PROBE, NFT_MSG_DELTABLE, 0, None, None);
    }

    /// One that the kernel refuses, and takes back: until then no packet is on its way any more that
    /// was before.
    pub fn await_packets(&mut self) {
        self.table_of(PROBE, NFT_MSG_DELTABLE, 0, None, None);
    }

    fn probe_rule(&mut self, exprs: &[Expr]) {
        self.table_of(PROBE, NFT_MSG_NEWTABLE, NLM_F_CREATE, None, None);
        self.chain_of(PROBE, OUTPUT, None);
        self.rule_of(PROBE, NLM_F_APPEND, OUTPUT, exprs);
        self.table_of(PROBE, NFT_MSG_DELTABLE, 0, None, None);
    }

    /// Replaces the rules of a chain.
    pub fn replace_rules(&mut self, chain: &str, rules: &[Rule]) {
        self.delete_rules(Some(chain));
        for rule in rules {
            self.rule(chain, rule);
        }
    }

    /// Those of a chain, or of all chains.
    fn delete_rules(&mut self, chain: Option<&str>) {
        let open = self.begin(NFT_MSG_DELRULE, 0);
        self.batch.str_z(NFTA_RULE_TABLE, TABLE);
        if let Some(chain) = chain {
            self.batch.str_z(NFTA_RULE_CHAIN, chain);
        }
        self.batch.end(open);
    }

    /// Hooks a chain in where a veth's packets come in.
    pub fn add_veth(&mut self, veth: &Veth) {
        let chain = veth_name(veth.index);
        let base = Base { kind: "filter", hook: NF_INET_INGRESS, priority: NF_IP_PRI_MANGLE };
        self.chain_at(TABLE, &chain, Some(base), Some(&veth.name));
        self.rule(&chain, &veth.rule);
    }

    /// Unhooks it. Older kernels delete the chain themselves when the veth goes: so it is made first,
    /// without a hook, which does nothing to one that is there.
    pub fn delete_veth(&mut self, index: u32) {
        self.delete_chain(&veth_name(index));
    }

    /// Hooks a chain in anew, whether it is there or not: ahead of all others of its priority.
    pub fn hook_anew(&mut self, chain: &Chain) {
        self.delete_chain(&chain.name);
        self.chain(chain);
        chain.rules.iter().for_each(|rule| self.rule(&chain.name, rule));
    }

    /// A chain that no packet comes to by itself.
    pub fn plain_chain(&mut self, chain: &str) {
        self.chain_of(TABLE, chain, None);
    }

    pub fn delete_chain(&mut self, chain: &str) {
        self.plain_chain(chain);
        let open = self.begin(NFT_MSG_DELCHAIN, 0);
        self.batch.str_z(NFTA_CHAIN_TABLE, TABLE);
        self.batch.str_z(NFTA_CHAIN_NAME, chain);
        self.batch.end(open);
    }

    /// Adds cgroup ids to a set.
    pub fn add_cgroups(&mut self, set: &str, ids: impl Iterator<Item = u64>) {
        self.keys(NFT_MSG_NEWSETELEM, NLM_F_CREATE, set, &mut ids.map(u64::to_ne_bytes));
    }

    /// Deletes cgroup ids from a set; one that is not there fails the transaction.
    pub fn delete_cgroups(&mut self, set: &str, ids: impl Iterator<Item = u64>) {
        self.keys(NFT_MSG_DELSETELEM, 0, set, &mut ids.map(u64::to_ne_bytes));
    }

    /// Adds hashes of cgroup ids to a set.
    pub fn add_hashes(&mut self, set: &str, hashes: impl Iterator<Item = u32>) {
        self.keys(NFT_MSG_NEWSETELEM, NLM_F_CREATE, set, &mut hashes.map(u32::to_ne_bytes));
    }

    pub fn delete_hashes(&mut self, set: &str, hashes: impl Iterator<Item = u32>) {
        self.keys(NFT_MSG_DELSETELEM, 0, set, &mut hashes.map(u32::to_ne_bytes));
    }

    fn keys<const BYTES: usize>(
        &mut self,
        kind: u16,
        flags: u16,
        set: &str,
        keys: &mut dyn Iterator<Item = [u8; BYTES]>,
    ) {
        let write = |batch: &mut Batch, key: [u8; BYTES]| value(batch, NFTA_SET_ELEM_KEY, &key);
        self.elements(kind, flags, set, None, keys, write);
    }

    /// Adds a named counter that has counted so many packets.
    pub fn add_counter(&mut self, name: &str, packets: u64) {
        let open = self.counter(NFT_MSG_NEWOBJ, NLM_F_CREATE, name);
        let data = self.batch.nest(NFTA_OBJ_DATA);
        self.batch.u64_be(NFTA_COUNTER_BYTES, 0);
        self.batch.u64_be(NFTA_COUNTER_PACKETS, packets);
        self.batch.end_nest(data);
        self.batch.end(open);
    }

    /// The same for one that is there: the kernel changes none.
    pub fn replace_counter(&mut self, name: &str, packets: u64) {
        let open = self.counter(NFT_MSG_DELOBJ, 0, name);
        self.batch.end(open);
        self.add_counter(name, packets);
    }

    fn counter(&mut self, kind: u16, flags: u16, name: &str) -> Open {
        let open = self.begin(kind, flags);
        self.batch.str_z(NFTA_OBJ_TABLE, TABLE);
        self.batch.str_z(NFTA_OBJ_NAME, name);
        self.batch.u32_be(NFTA_OBJ_TYPE, NFT_OBJECT_COUNTER);
        open
    }

    /// `table_flags`: what the table is created with, or none at all (kernels without table flags).
    pub fn table_of(
        &mut self,
        name: &str,
        kind: u16,
        flags: u16,
        table_flags: Option<u32>,
        comment: Option<&str>,
    ) {
        let open = self.begin(kind, flags);
        self.batch.str_z(NFTA_TABLE_NAME, name);
        if let Some(flags) = table_flags {
            self.batch.u32_be(NFTA_TABLE_FLAGS, flags);
        }
        if let Some(comment) = comment {
            let length = comment.len() as u8 + 1;
            let udata = [&[NFTNL_UDATA_TABLE_COMMENT, length], comment.as_bytes(), &[0]].concat();
            self.batch.raw(NFTA_TABLE_USERDATA, &udata);
        }
        self.batch.end(open);
    }

    pub fn chain(&mut self, chain: &Chain) {
        self.chain_of(TABLE, &chain.name, chain.base);
    }

    fn chain_of(&mut self, table: &str, name: &str, base: Option<Base>) {
        self.chain_at(table, name, base, None);
    }

    /// `device`: the interface whose hook it is, of those of the host.
    fn chain_at(&mut self, table: &str, name: &str, base: Option<Base>, device: Option<&str>) {
        let open = self.begin(NFT_MSG_NEWCHAIN, NLM_F_CREATE);
        self.batch.str_z(NFTA_CHAIN_TABLE, table);
        self.batch.str_z(NFTA_CHAIN_NAME, name);
        if let Some(Base { kind, hook, priority }) = base {
            let nest = self.batch.nest(NFTA_CHAIN_HOOK);
            self.batch.u32_be(NFTA_HOOK_HOOKNUM, hook);
            self.batch.u32_be(NFTA_HOOK_PRIORITY, priority as u32);
            if let Some(device) = device {
                self.batch.str_z(NFTA_HOOK_DEV, device);
            }
            self.batch.end_nest(nest);
            self.batch.u32_be(NFTA_CHAIN_POLICY, NF_ACCEPT as u32);
            self.batch.str_z(NFTA_CHAIN_TYPE, kind);
        }
        self.batch.end(open);
    }

    pub fn set(&mut self, set: &Set) {
        let (key_type, key_len, flags) = match set.content {
            Content::V4(_) => (TYPE_IPADDR, 4, NFT_SET_INTERVAL),
            Content::V6(_) => (TYPE_IP6ADDR, 16, NFT_SET_INTERVAL),
            Content::Ports(_) => (TYPE_INET_SERVICE, 2, NFT_SET_INTERVAL),
            Content::Cgroups { .. } => (TYPE_CGROUPV2, 8, 0),
            Content::Hashes => (TYPE_INTEGER, 4, 0),
        };
        let id = self.set_id();
        let name = &self.names.get(&set.name).unwrap_or(&set.name).clone();
        let open = self.begin(NFT_MSG_NEWSET, NLM_F_CREATE);
        self.set_head(name, flags, (key_type, key_len), None, id);
        if let Content::Cgroups { counters: true } = set.content {
            let nest = self.batch.nest(NFTA_SET_EXPR);
            Expr::Counter.write(&mut self.batch);
            self.batch.end_nest(nest);
        }
        self.batch.end(open);
        match &set.content {
            Content::V4(ranges) => self.intervals(name, id, ranges),
            Content::V6(ranges) => self.intervals(name, id, ranges),
            Content::Ports(ranges) => self.intervals(name, id, ranges),
            Content::Cgroups { .. } | Content::Hashes => {}
        }
    }

    /// Deletes a set that no rule looks into.
    pub fn delete_set(&mut self, name: &str) {
        let open = self.begin(NFT_MSG_DELSET, 0);
        self.batch.str_z(NFTA_SET_TABLE, TABLE);
        self.batch.str_z(NFTA_SET_NAME, name);
        self.batch.end(open);
    }

    /// Adds a rule behind those that its chain has.
    pub fn rule(&mut self, chain: &str, rule: &Rule) {
        self.rule_at(NLM_F_APPEND, chain, rule);
    }

    /// And one before these.
    pub fn rule_ahead(&mut self, chain: &str, rule: &Rule) {
        self.rule_at(0, chain, rule);
    }

    fn rule_at(&mut self, place: u16, chain: &str, rule: &Rule) {
        let mut exprs = Vec::new();
        rule.iter().for_each(|stmt| stmt.lower(&mut exprs));
        // the set of a look-up must come before the rule that binds it
        for expr in &mut exprs {
            if let Expr::Lookup { set, .. } | Expr::LookupVerdict { set, .. } = expr {
                match set {
                    SetRef::Anonymous(set) => set.id = Some(self.anonymous(set)),
                    SetRef::Named(set) => *set = self.names.get(set).unwrap_or(set).clone(),
                }
            }
        }
        self.rule_of(TABLE, place, chain, &exprs);
    }

    /// The rule alone, without the sets that it may need.
    fn rule_of(&mut self, table: &str, place: u16, chain: &str, exprs: &[Expr]) {
        let open = self.begin(NFT_MSG_NEWRULE, NLM_F_CREATE | place);
        self.batch.str_z(NFTA_RULE_TABLE, table);
        self.batch.str_z(NFTA_RULE_CHAIN, chain);
        let list = self.batch.nest(NFTA_RULE_EXPRESSIONS);
        for expr in exprs {
            let element = self.batch.nest(NFTA_LIST_ELEM);
            expr.write(&mut self.batch);
            self.batch.end_nest(element);
        }
        self.batch.end_nest(list);
        self.batch.end(open);
    }

    fn bound(&mut self, kind: u16) {
        // the resource, in network order, is the subsystem
        let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
        let nfgenmsg = [NFPROTO_UNSPEC, 0, high, low];
        let open = self.batch.begin_with(kind, NLM_F_REQUEST, nfgenmsg);
        self.batch.end(open);
    }

    fn begin(&mut self, kind: u16, flags: u16) -> Open {
        self.last = self.batch.bytes().len();
        self.batch.begin_nfnl(NFNL_SUBSYS_NFTABLES, kind, NLM_F_REQUEST | flags, NFPROTO_INET)
    }

    fn set_id(&mut self) -> u32 {
        self.next_set_id += 1;
        self.next_set_id
    }

    fn set_head(
        &mut self,
        name: &str,
        flags: u32,
        (key_type, key_len): (u32, u32),
        data: Option<u32>,
        id: u32,
    ) {
        self.batch.str_z(NFTA_SET_TABLE, TABLE);
        self.batch.str_z(NFTA_SET_NAME, name);
        self.batch.u32_be(NFTA_SET_FLAGS, flags);
        self.batch.u32_be(NFTA_SET_KEY_TYPE, key_type);
        self.batch.u32_be(NFTA_SET_KEY_LEN, key_len);
        if let Some(data_type) = data {
            self.batch.u32_be(NFTA_SET_DATA_TYPE, data_type);
            self.batch.u32_be(NFTA_SET_DATA_LEN, 0);
        }
        self.batch.u32_be(NFTA_SET_ID, id);
        let order = match key_type {
            TYPE_MARK | TYPE_CGROUPV2 | TYPE_INTEGER => BYTEORDER_HOST_ENDIAN,
            _ => BYTEORDER_BIG_ENDIAN,
        };
        let mut udata = vec![NFTNL_UDATA_SET_KEYBYTEORDER, 4];
        udata.extend(order.to_ne_bytes());
        if key_type == TYPE_INTEGER {
            udata.extend(typeof_numgen());
        }
        self.batch.raw(NFTA_SET_USERDATA, &udata);
    }

    /// Sends an anonymous set or map with its elements; returns its id within the transaction.
    fn anonymous(&mut self, set: &Anonymous) -> u32 {
        let (name, id) = (set.name(), self.set_id());
        let (map, data) = match set.is_map() {
            true => (NFT_SET_MAP, Some(NFT_DATA_VERDICT)),
            false => (0, None),
        };
        let flags = NFT_SET_ANONYMOUS | NFT_SET_CONSTANT | map;
        let open = self.begin(NFT_MSG_NEWSET, NLM_F_CREATE);
        self.set_head(name, flags, (set.key_type, set.key_len), data, id);
        self.batch.end(open);
        let (message, elements) = (NFT_MSG_NEWSETELEM, set.elements.iter());
        self.elements(message, NLM_F_CREATE, name, Some(id), elements, |b, element| {
            value(b, NFTA_SET_ELEM_KEY, &element.0);
            if let Some(verdict) = &element.1 {
                verdict.write(b, NFTA_SET_ELEM_DATA);
            }
        });
        id
    }

    /// The two ends of each interval: the first address, and the one after the last.
    fn intervals<A: Address>(&mut self, set: &str, id: u32, ranges: &[Range<A>]) {
        let ends = ranges.iter().flat_map(|range| {
            [Some((range.first, 0)), range.end().map(|end| (end, NFT_SET_ELEM_INTERVAL_END))]
        });
        let ends = ends.flatten();
        // Lists are long, and their elements alike but for the key at the end.
        let [mut first, mut last] = [0, NFT_SET_ELEM_INTERVAL_END].map(|flags| {
            let mut batch = Batch::new(0);
            if flags != 0 {
                batch.u32_be(NFTA_SET_ELEM_FLAGS, flags);
            }
            value(&mut batch, NFTA_SET_ELEM_KEY, &vec![0; A::BYTES]);
            batch.into_memory()
        });
        self.elements(NFT_MSG_NEWSETELEM, NLM_F_CREATE, set, Some(id), ends, |b, (end, flags)| {
            let element = if flags == 0 { &mut first } else { &mut last };
            let bytes = element.as_flattened_mut();
            // what is shorter has been filled up
            let key = bytes.len() - A::BYTES.next_multiple_of(4);
            bytes[key..key + A::BYTES]
                .copy_from_slice(&end.to_bits().to_be_bytes()[16 - A::BYTES..]);
            b.attributes(element);
        });
    }

    /// One message for each `SPLIT` bytes of elements; none at all for no elements.
    fn elements<T>(
        &mut self,
        kind: u16,
        flags: u16,
        set: &str,
        id: Option<u32>,
        elements: impl Iterator<Item = T>,
        mut write: impl FnMut(&mut Batch, T),
    ) {
        let mut elements = elements.peekable();
        while elements.peek().is_some() {
            let open = self.begin(kind, flags);
            self.batch.str_z(NFTA_SET_ELEM_LIST_SET, set);
            if let Some(id) = id {
                self.batch.u32_be(NFTA_SET_ELEM_LIST_SET_ID, id);
            }
            self.batch.str_z(NFTA_SET_ELEM_LIST_TABLE, TABLE);
            let list = self.batch.nest(NFTA_SET_ELEM_LIST_ELEMENTS);
            // libnftnl counts list elements; the kernel does not look at the number
            for number in 1.. {
                if self.batch.len_since(&open) >= SPLIT {
                    break;
                }
                let Some(element) = elements.next() else {
                    break;
                };
                let nest = self.batch.nest(number);
                write(&mut self.batch, element);
                self.batch.end_nest(nest);
            }
            self.batch.end_nest(list);
            self.batch.end(open);
        }
    }
}

/// Begins a request for all objects of a kind (`NFT_MSG_GET*`), of one family or of all.
pub fn dump(batch: &mut Batch, kind: u16, family: u8) -> Open {
    batch.begin_nfnl(NFNL_SUBSYS_NFTABLES, kind, NLM_F_REQUEST | NLM_F_DUMP, family)
}

/// What tells nft that a key is a number of 32 bits, which has no type of its own: `typeof numgen
/// inc mod 2`, an expression of that kind.
fn typeof_numgen() -> Vec<u8> {
    let tlv = |kind: u8, data: &[u8]| [&[kind, data.len() as u8], data].concat();
    let number = |kind, value: u32| tlv(kind, &value.to_ne_bytes());
    let numgen = [
        number(NFTNL_UDATA_NUMGEN_TYPE, 0),
        number(NFTNL_UDATA_NUMGEN_MOD, 2),
        number(NFTNL_UDATA_NUMGEN_OFFSET, 0),
    ];
    let kind = number(NFTNL_UDATA_SET_TYPEOF_EXPR, EXPR_NUMGEN);
    let data = tlv(NFTNL_UDATA_SET_TYPEOF_DATA, &numgen.concat());
    tlv(NFTNL_UDATA_SET_KEY_TYPEOF, &[kind, data].concat())
}

/// What a message of ours is about; of chains and sets, the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Table,
    Chain(String),
    RuleOf(String),
    Set(String),
    ElementsOf(String),
    Counter(String),
    /// The transaction as a whole.
    All,
}

impl Object {
    /// Of message `seq` of a batch of ours.
    pub fn of(batch: &Batch, seq: u32) -> Object {
        let Some(message) = Messages::new(batch.bytes()).find(|m| m.seq == seq) else {
            return Object::All;
        };
        let name = |attr| Attrs::after(message.body, 4).text(attr).unwrap_or_default().into_owned();
        match message.kind & 0xff {
            NFT_MSG_NEWTABLE | NFT_MSG_DELTABLE => Object::Table,
            NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => Object::Chain(name(NFTA_CHAIN_NAME)),
            NFT_MSG_NEWRULE | NFT_MSG_DELRULE => Object::RuleOf(name(NFTA_RULE_CHAIN)),
            NFT_MSG_NEWSET | NFT_MSG_DELSET => Object::Set(name(NFTA_SET_NAME)),
            NFT_MSG_NEWSETELEM | NFT_MSG_DELSETELEM => {
                Object::ElementsOf(name(NFTA_SET_ELEM_LIST_SET))
            }
            NFT_MSG_NEWOBJ | NFT_MSG_DELOBJ => Object::Counter(name(NFTA_OBJ_NAME)),
            _ => Object::All,
        }
    }

    /// The chain that it is, or is in.
    pub fn chain(&self) -> Option<&str> {
        match self {
            Object::Chain(name) | Object::RuleOf(name) => Some(name),
            _ => None,
        }
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Table => write!(f, "table inet {TABLE}"),
            Object::Chain(name) => write!(f, "chain {name}"),
            Object::RuleOf(chain) => write!(f, "a rule of chain {chain}"),
            Object::Set(name) => write!(f, "set {name}"),
            Object::ElementsOf(set) => write!(f, "elements of set {set}"),
            Object::Counter(name) => write!(f, "counter {name}"),
            Object::All => f.write_str("a transaction"),
        }
    }
}

/// Something that a kernel may lack.
#[derive(Debug, Clone)]
pub enum Probe {
    /// The expressions of a rule.
    Rule(Vec<Expr>),
    /// The type of a base chain.
    Chain(Base),
}

impl Probe {
    /// One that looks into no set.
    pub fn of(stmt: &Stmt) -> Probe {
        let mut exprs = Vec::new();
        stmt.lower(&mut exprs);
        Probe::Rule(exprs)
    }

    /// A look-up of the cgroup at that level.
    pub fn cgroup(level: u32) -> Probe {
        Probe::Rule(vec![Expr::SocketCgroup { level, dreg: NFT_REG_1 }])
    }
}

/// A transaction that asks for each of these and fails at its last message, which deletes a table
/// that does not exist, so that nothing comes of it; but each message is judged before that. Gives
/// the batch, the message of each probe, and the last one.
pub fn probe(probes: &[Probe], batch: Batch) -> (Batch, Vec<u32>, u32) {
    // dormant: nothing is hooked in, not even for the moment until the failure
    const SCRATCH: &str = "cgtproxy_probe";
    let mut t = Transaction::new(batch);
    let dormant = Some(NFT_TABLE_F_DORMANT);
    t.table_of(SCRATCH, NFT_MSG_NEWTABLE, NLM_F_CREATE, dormant, None);
    let mut places = Vec::new();
    for (index, probe) in probes.iter().enumerate() {
        let chain = format!("probe{index}");
        match probe {
            Probe::Chain(base) => t.chain_of(SCRATCH, &chain, Some(*base)),
            Probe::Rule(exprs) => {
                t.chain_of(SCRATCH, &chain, None);
                t.rule_of(SCRATCH, NLM_F_APPEND, &chain, exprs);
            }
        }
        places.push(t.batch.last_seq());
    }
    t.table_of("cgtproxy_none", NFT_MSG_DELTABLE, 0, None, None);
    let (batch, end) = t.finish();
    (batch, places, end)
}

/// Name of a table that is there for the moment of a question.
pub const ASKING: &str = "cgtproxy-asking";

/// Lays out the question how deep our own cgroup is: of the datagrams over `lo` from and to UDP port
/// `port`, that with `1 + level` bytes is dropped if the sender's cgroup has an ancestor of that
/// level, or is one. Others' packets pass. The table goes with the socket that made it.
pub fn ask_levels(port: u16, levels: std::ops::Range<u32>, batch: Batch) -> Transaction {
    let mut t = Transaction::new(batch);
    let owned = Some(NFT_TABLE_F_OWNER);
    t.table_of(ASKING, NFT_MSG_NEWTABLE, NLM_F_CREATE, owned, None);
    // ahead of all others'
    let base = Base { kind: "filter", hook: NF_INET_LOCAL_OUT, priority: -500 };
    t.chain_of(ASKING, OUTPUT, Some(base));
    let field = |offset| payload(NFT_PAYLOAD_TRANSPORT_HEADER, offset, 2);
    const LO: u32 = 1;
    let others = [
        [meta(NFT_META_OIF), neq(&LO.to_ne_bytes())],
        [meta(NFT_META_L4PROTO), neq(&[IPPROTO_UDP])],
        [field(0), neq(&port.to_be_bytes())],
        [field(2), neq(&port.to_be_bytes())],
    ];
    for [load, compare] in others {
        t.rule_of(ASKING, NLM_F_APPEND, OUTPUT, &[load, compare, Expr::Verdict(Verdict::Accept)]);
    }
    for level in levels {
        // with the header
        let length = 8 + 1 + level as u16;
        let cgroup = Expr::SocketCgroup { level, dreg: NFT_REG_1 };
        let length = eq(&length.to_be_bytes());
        let drop = Expr::Verdict(Verdict::Drop);
        t.rule_of(ASKING, NLM_F_APPEND, OUTPUT, &[field(4), length, cgroup, drop]);
    }
    t
}

/// A request for all tables: ours, to see whether it is there and who owns it, and the lock.
pub fn get_table(batch: &mut Batch) {
    let open = dump(batch, NFT_MSG_GETTABLE, NFPROTO_INET);
    batch.end(open);
}

/// Reads an answer to [`get_table`]: `None` for other tables, else the owner's port id, if any.
pub fn parse_table(message: &parse::Message) -> Option<Option<u32>> {
    let attrs = of_table(TABLE, message)?;
    Some(attrs.u32_be(NFTA_TABLE_OWNER))
}

/// Where a chain with these attributes stands, if it is a base chain.
pub fn hook(chain: &Attrs) -> Option<Hook> {
    let hook = chain.nest(NFTA_CHAIN_HOOK);
    Some((hook.u32_be(NFTA_HOOK_HOOKNUM)?, hook.u32_be(NFTA_HOOK_PRIORITY)? as i32))
}

/// The attributes of a table, or of what is in it; `None` for tables of other names.
pub fn of_table<'a>(name: &str, message: &parse::Message<'a>) -> Option<Attrs<'a>> {
    let attrs = Attrs::after(message.body, 4);
    let same = message.body.first() == Some(&NFPROTO_INET) && attrs.text(NFTA_ANY_TABLE)? == name;
    same.then_some(attrs)
}
