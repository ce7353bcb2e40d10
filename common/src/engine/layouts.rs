//! Tables whose layout changes: both layouts are read, and one is written (see
//! [`previous`](crate::abi::previous)).

use core::ptr;

use crate::abi::Flow;
use crate::abi::previous::Moved;
use crate::path::leads_to;

use super::record::{InsertError, Renewal};

/// A table of one layout, as programs use it.
pub trait Store<K, V> {
    /// Returns the value of a key.
    fn get(&self, key: &K) -> Option<&V>;

    /// Writes a value. With `only_new` it replaces no other value of its key.
    ///
    /// # Errors
    ///
    /// Returns why the value was not written.
    fn insert(&self, key: &K, value: &V, only_new: bool) -> Result<(), InsertError>;

    /// Removes a key, if it is there.
    fn remove(&self, key: &K);

    /// Changes the value of a key in place. Returns false if there is none.
    fn update(&self, key: &K, change: impl FnOnce(&mut V)) -> bool;
}

/// The layout that a program writes. It is requested where it is needed: a value that is kept
/// across lookups takes room on the kernel's stack.
pub trait Written {
    /// Whether this layout is the one that is written.
    fn is_current(&self) -> bool;
}

impl Written for bool {
    fn is_current(&self) -> bool {
        *self
    }
}

/// A table in both layouts, for programs that read both and write one.
#[derive(Clone, Copy, Debug)]
pub struct Both<N, B, W> {
    /// The table of this layout.
    pub now: N,
    /// The table of the previous layout.
    pub before: B,
    /// The layout that is written.
    pub written: W,
}

impl<N, B, W: Written> Both<N, B, W> {
    /// Copies the value of a key from whichever layout has it; if both have, from the one that is
    /// written. Returns false if neither has it.
    #[inline(always)]
    pub fn find<K, V: Moved>(&self, key: &K, value: &mut V) -> bool
    where
        N: Store<K, V>,
        B: Store<K, V::Before>,
    {
        let now = match (self.now.get(key), self.before.get(key)) {
            (Some(now), None) => now,
            (Some(now), Some(_)) if self.written.is_current() => now,
            (_, Some(before)) => {
                *value = V::after(before);
                return true;
            }
            (None, None) => return false,
        };
        // SAFETY: two references, one of them exclusive, so they do not overlap. An assignment
        // would call `memmove`, whose stack frame 6.1 has no room for.
        unsafe { ptr::copy_nonoverlapping(now, value, 1) };
        true
    }

    /// Writes a value in the layout of this round, and removes it from the other. `before` is room
    /// for its previous form.
    ///
    /// # Errors
    ///
    /// Returns why the value was not written.
    #[inline(always)]
    pub fn put<K, V: Moved>(
        &self,
        key: &K,
        value: &V,
        before: &mut V::Before,
        only_new: bool,
    ) -> Result<(), InsertError>
    where
        N: Store<K, V>,
        B: Store<K, V::Before>,
    {
        let is_elsewhere = if self.written.is_current() {
            self.before.get(key).is_some()
        } else {
            self.now.get(key).is_some()
        };
        if is_elsewhere && only_new {
            return Err(InsertError::Exists);
        }
        if self.written.is_current() {
            self.now.insert(key, value, only_new)?;
            self.before.remove(key);
        } else {
            *before = value.before();
            self.before.insert(key, before, only_new)?;
            self.now.remove(key);
        }
        Ok(())
    }

    /// Removes a key from both layouts.
    #[inline(always)]
    pub fn take<K, V: Moved>(&self, key: &K)
    where
        N: Store<K, V>,
        B: Store<K, V::Before>,
    {
        self.before.remove(key);
        self.now.remove(key);
    }

    /// Updates a flow's entry in place where it leads the same way. Returns false if neither layout
    /// has one.
    #[inline(always)]
    pub fn renew<K, A: Copy + Eq>(&self, key: &K, to: &Flow<A>, renewal: Renewal) -> bool
    where
        Flow<A>: Moved,
        N: Store<K, Flow<A>>,
        B: Store<K, <Flow<A> as Moved>::Before>,
    {
        let is_now = self.now.update(key, |entry| {
            if leads_to(entry, to) {
                renewal.apply(entry, to);
            }
        });
        let was_before = self.before.update(key, |entry| {
            let mut after = Flow::after(entry);
            if leads_to(&after, to) {
                renewal.apply(&mut after, to);
                *entry = after.before();
            }
        });
        is_now || was_before
    }
}

/// A table of one layout, as the agent uses it while programs do.
pub trait SharedStore<K, V> {
    /// The reason for which an operation failed.
    type Error;

    /// Returns the value of a key.
    ///
    /// # Errors
    ///
    /// Returns why the table could not be read.
    fn get(&self, key: &K) -> Result<Option<V>, Self::Error>;

    /// Writes a value unless its key exists, and returns whether it was written.
    ///
    /// # Errors
    ///
    /// Returns why the table could not be written.
    fn insert_new(&self, key: &K, value: &V) -> Result<bool, Self::Error>;

    /// Removes a key, and returns whether it existed.
    ///
    /// # Errors
    ///
    /// Returns why the table could not be written.
    fn take(&self, key: &K) -> Result<bool, Self::Error>;
}

/// Moves an entry while programs read both tables, write `to`, and remove from both. Returns
/// whether there was one.
///
/// # Errors
///
/// Returns why a table could not be read or written.
pub fn move_entry<K, A, B: PartialEq, T: SharedStore<K, B>>(
    from: &impl SharedStore<K, A, Error = T::Error>,
    to: &T,
    key: &K,
    convert: impl Fn(&A) -> B,
) -> Result<bool, T::Error> {
    let Some(value) = from.get(key)? else { return Ok(false) };
    let value = convert(&value);
    // An entry that a program has written there meanwhile is newer.
    let is_new = to.insert_new(key, &value)?;
    if !from.take(key)? && is_new && to.get(key)?.is_some_and(|now| now == value) {
        // A program has removed the entry from both tables and not written it again.
        let _ = to.take(key)?;
    }
    Ok(true)
}
