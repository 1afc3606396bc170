//! Sets and maps of few things, as sorted vectors: a B-tree takes ten times the code, for each type
//! anew, and a router has little room for that. What others can make many of (cgroups, sockets, flows)
//! is to come all at once, since what comes in between moves all that is behind it.

use std::borrow::Borrow;
use std::ops::Deref;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallSet<T>(Vec<T>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SmallMap<K, V>(Vec<(K, V)>);

impl<T: Ord> SmallSet<T> {
    /// True where it was not among them.
    pub fn insert(&mut self, item: T) -> bool {
        let place = self.0.binary_search(&item);
        if let Err(at) = place {
            self.0.insert(at, item);
        }
        place.is_err()
    }

    /// True where it was among them.
    pub fn remove(&mut self, item: &T) -> bool {
        let place = self.0.binary_search(item);
        place.map(|at| self.0.remove(at)).is_ok()
    }

    pub fn contains<Q: Ord + ?Sized>(&self, item: &Q) -> bool
    where
        T: Borrow<Q>,
    {
        self.0.binary_search_by(|own| own.borrow().cmp(item)).is_ok()
    }

    pub fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        self.0.retain(keep);
    }

    pub fn difference<'a>(&'a self, other: &'a SmallSet<T>) -> impl Iterator<Item = &'a T> {
        self.0.iter().filter(|item| !other.contains(*item))
    }

    pub fn is_subset(&self, other: &SmallSet<T>) -> bool {
        self.difference(other).next().is_none()
    }
}

impl<K: Ord, V> SmallMap<K, V> {
    fn place<Q: Ord + ?Sized>(&self, key: &Q) -> Result<usize, usize>
    where
        K: Borrow<Q>,
    {
        self.0.binary_search_by(|(own, _)| own.borrow().cmp(key))
    }

    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.place(key).ok().map(|at| &self.0[at].1)
    }

    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.place(key).is_ok()
    }

    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        self.place(key).ok().map(|at| &mut self.0[at].1)
    }

    /// The value of a key, which is put in where there is none.
    pub fn or_insert_with(&mut self, key: K, value: impl FnOnce() -> V) -> &mut V {
        let at = self.place(&key).unwrap_or_else(|at| {
            self.0.insert(at, (key, value()));
            at
        });
        &mut self.0[at].1
    }

    pub fn or_default(&mut self, key: K) -> &mut V
    where
        V: Default,
    {
        self.or_insert_with(key, V::default)
    }

    /// In place of the value that is there.
    pub fn insert(&mut self, key: K, value: V) {
        match self.place(&key) {
            Ok(at) => self.0[at].1 = value,
            Err(at) => self.0.insert(at, (key, value)),
        }
    }

    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        self.place(key).ok().map(|at| self.0.remove(at).1)
    }

    pub fn retain(&mut self, mut keep: impl FnMut(&K, &mut V) -> bool) {
        self.0.retain_mut(|(key, value)| keep(key, value));
    }

    pub fn keys(&self) -> impl DoubleEndedIterator<Item = &K> + Clone {
        self.0.iter().map(|(key, _)| key)
    }

    pub fn values(&self) -> impl DoubleEndedIterator<Item = &V> {
        self.0.iter().map(|(_, value)| value)
    }

    pub fn into_values(self) -> impl Iterator<Item = V> {
        self.0.into_iter().map(|(_, value)| value)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&K, &mut V)> {
        self.0.iter_mut().map(|(key, value)| (&*key, value))
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.iter_mut().map(|(_, value)| value)
    }
}

/// What both have in common with a vector.
macro_rules! like_a_vector {
    ($type:ident<$($of:ident),+>: $item:ty) => {
        impl<$($of),+> $type<$($of),+> {
            pub fn clear(&mut self) {
                self.0.clear();
            }

            /// Lets go of the last ones.
            pub fn truncate(&mut self, len: usize) {
                self.0.truncate(len);
            }
        }

        impl<$($of),+> Default for $type<$($of),+> {
            fn default() -> Self {
                $type(Vec::new())
            }
        }

        impl<$($of),+> Deref for $type<$($of),+> {
            type Target = [$item];

            fn deref(&self) -> &[$item] {
                &self.0
            }
        }

        impl<$($of),+> IntoIterator for $type<$($of),+> {
            type Item = $item;
            type IntoIter = std::vec::IntoIter<$item>;

            fn into_iter(self) -> Self::IntoIter {
                self.0.into_iter()
            }
        }

        impl<$($of),+> FromIterator<$item> for $type<$($of),+>
        where
            Self: Extend<$item>,
        {
            fn from_iter<I: IntoIterator<Item = $item>>(items: I) -> Self {
                let mut all = Self::default();
                all.extend(items);
                all
            }
        }

        impl<'a, $($of),+> IntoIterator for &'a $type<$($of),+> {
            type Item = &'a $item;
            type IntoIter = std::slice::Iter<'a, $item>;

            fn into_iter(self) -> Self::IntoIter {
                self.0.iter()
            }
        }
    };
}

like_a_vector!(SmallSet<T>: T);
like_a_vector!(SmallMap<K, V>: (K, V));

impl<T: Ord> Extend<T> for SmallSet<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, items: I) {
        self.0.extend(items);
        self.0.sort_unstable();
        self.0.dedup();
    }
}

impl<K: Ord, V> Extend<(K, V)> for SmallMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, items: I) {
        for (key, value) in items {
            self.insert(key, value);
        }
    }
}

impl<T: Ord, const N: usize> From<[T; N]> for SmallSet<T> {
    fn from(items: [T; N]) -> SmallSet<T> {
        items.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn they_are_what_b_trees_are() {
        let mut random = Random::new(1);
        let (mut map, mut large) = (SmallMap::default(), BTreeMap::new());
        let (mut set, mut large_set) = (SmallSet::default(), BTreeSet::new());
        for step in 0..2000 {
            let key = random.below(40);
            match random.below(5) {
                0 => assert_eq!(map.remove(&key), large.remove(&key)),
                1 => drop((map.insert(key, step), large.insert(key, step))),
                2 => {
                    *map.or_default(key) += step;
                    *large.entry(key).or_default() += step;
                }
                3 if step % 2 == 0 => assert_eq!(set.remove(&key), large_set.remove(&key)),
                3 => assert_eq!(set.insert(key), large_set.insert(key)),
                _ if step % 50 == 0 => {
                    map.retain(|key, _| key % 3 > 0);
                    large.retain(|key, _| key % 3 > 0);
                    set.retain(|item| item % 3 > 0);
                    large_set.retain(|item| item % 3 > 0);
                }
                _ => {}
            }
            assert_eq!(
                (map.get(&key), map.contains_key(&key)),
                (large.get(&key), large.contains_key(&key))
            );
            assert_eq!(set.contains(&key), large_set.contains(&key));
            assert!(map.keys().eq(large.keys()) && map.values().eq(large.values()));
            assert!(set.iter().eq(&large_set));
        }
        let [some, all] = [SmallSet::from([3, 1]), [1, 2, 3].into()];
        assert!(some.is_subset(&all) && !all.is_subset(&some));
        assert!(all.difference(&some).eq([&2]));
        let twice: SmallMap<_, _> = [(1, 'a'), (0, 'b'), (1, 'c')].into_iter().collect();
        assert!(twice.into_iter().eq([(0, 'b'), (1, 'c')]));
    }
}
