//! Work that waits, taken by turns: who makes thousands of cgroups, or cgroups that are dear to
//! classify, must not keep us from others'. Time is shared between accounts (whose cgroups they
//! are), and the turns of one account between its directories. What waits only says where to look,
//! so the order does not matter. Pure: times are arguments, in nanoseconds.

use std::collections::{HashMap, VecDeque};

use crate::small::SmallMap;

/// Work by account and directory, and whose turn it is.
#[derive(Debug)]
pub struct Backlog<T> {
    /// None without work.
    accounts: SmallMap<u32, Account<T>>,
    /// By account and directory, the one that there mostly is: not among those.
    only: Option<(u32, i32, T)>,
    len: usize,
}

#[derive(Debug)]
struct Account<T> {
    /// Time spent on it, from where the others stood when it came.
    used: u64,
    /// By watch descriptor of the directory; never an empty queue.
    queues: HashMap<i32, VecDeque<T>>,
    turns: VecDeque<i32>,
}

impl<T> Default for Account<T> {
    fn default() -> Account<T> {
        Account { used: 0, queues: HashMap::new(), turns: VecDeque::new() }
    }
}

impl<T> Default for Backlog<T> {
    fn default() -> Backlog<T> {
        Backlog { accounts: SmallMap::default(), only: None, len: 0 }
    }
}

impl<T> Backlog<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn push(&mut self, account: u32, dir: i32, work: T) {
        self.len += 1;
        if self.len == 1 {
            self.only = Some((account, dir, work));
            return;
        }
        let before = self.only.take();
        for (account, dir, work) in before.into_iter().chain([(account, dir, work)]) {
            // it has as much to get as who got least
            let used = self.accounts.values().map(|account| account.used).min();
            let account = self.accounts.or_insert_with(account, || Account {
                used: used.unwrap_or_default(),
                ..Account::default()
            });
            let queue = account.queues.entry(dir).or_default();
            if queue.is_empty() {
                account.turns.push_back(dir);
            }
            queue.push_back(work);
        }
    }

    /// The next work of the account that got least, with that account.
    pub fn pop(&mut self) -> Option<(u32, T)> {
        self.len = self.len.saturating_sub(1);
        if let Some((account, _, work)) = self.only.take() {
            return Some((account, work));
        }
        let (&number, account) =
            self.accounts.iter_mut().min_by_key(|(_, account)| account.used)?;
        let dir = account.turns.pop_front()?;
        let queue = account.queues.get_mut(&dir)?;
        let work = queue.pop_front()?;
        match queue.is_empty() {
            false => account.turns.push_back(dir),
            true => drop(account.queues.remove(&dir)),
        }
        if account.turns.is_empty() {
            self.accounts.remove(&number);
        }
        Some((number, work))
    }

    /// So much time went into work of an account.
    pub fn charge(&mut self, account: u32, time: u64) {
        if let Some(account) = self.accounts.get_mut(&account) {
            account.used += time;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn every_directory_has_its_turn() {
        let mut backlog = Backlog::default();
        (0..1000).for_each(|i| backlog.push(0, 1, i));
        backlog.push(0, 2, -1);
        backlog.push(0, 2, -2);
        let mut next = || backlog.pop().map(|(_, work)| work);
        assert_eq!([next(), next(), next(), next()], [Some(0), Some(-1), Some(1), Some(-2)]);
        for i in 2..1000 {
            assert_eq!(next(), Some(i));
        }
        assert_eq!((backlog.pop(), backlog.len()), (None, 0));
        assert!(backlog.accounts.is_empty());
    }

    /// However many directories one account has and however dear its work is, another's waits for
    /// one piece of it at most.
    #[test]
    fn time_is_shared_between_accounts() {
        let mut backlog = Backlog::default();
        (0..10_000).for_each(|i| backlog.push(1000, i, i));
        let (mut mine, mut others) = (0, 0);
        for i in 0..1000 {
            if i % 10 == 0 {
                backlog.push(7, 1, -1);
            }
            let (account, _) = backlog.pop().expect("plenty");
            if account == 7 {
                mine += 1;
                backlog.charge(7, 10_000);
            } else {
                others += 1;
                backlog.charge(1000, 1_000_000);
            }
            // what was pushed one turn ago has had its turn
            assert!(i % 10 != 1 || !backlog.accounts.contains_key(&7));
        }
        assert_eq!((mine, others), (100, 900));
        // cheap work and dear work of two that always have some get the same time
        (0..10_000).for_each(|i| backlog.push(8, i, -1));
        let mut spent = BTreeMap::new();
        for _ in 0..2000 {
            let (account, _) = backlog.pop().expect("plenty");
            let time = if account == 8 { 20_000 } else { 400_000 };
            backlog.charge(account, time);
            *spent.entry(account).or_insert(0) += time;
        }
        assert!(spent[&8].abs_diff(spent[&1000]) <= 400_000, "{spent:?}");
    }
}
