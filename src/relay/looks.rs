//! What a look at a text has shown, kept for the next time that somebody says the same: applications say the same few
//! hundred things all day. A look is cheap for a short text; at the lengths that frameworks write it is most of what a
//! statement costs the proxy.

use std::cell::RefCell;

use thread_local::ThreadLocal;

use super::lex::Lex;
use super::scan::Seen;

/// Texts of which each thread keeps one in each place.
const PLACES: usize = 256;

/// Longest text that is kept (bytes).
const MAX_TEXT: usize = 4096;

/// The looks of each thread, found by the text.
#[derive(Debug, Default)]
pub struct Looks {
    places: ThreadLocal<RefCell<Vec<Place>>>,
    hasher: ahash::RandomState,
}

/// One text, and the next one that came by: a text is kept when it comes again, so that those that come once, with
/// their values in them, drive nothing out.
#[derive(Debug, Clone, Default)]
struct Place {
    came_by: u64,
    kept: Option<Box<Kept>>,
}

#[derive(Debug, Clone)]
struct Kept {
    text: Box<[u8]>,
    lex: Lex,
    version: u64,
    seen: Seen,
}

impl Looks {
    /// What `look` says of a text, or has said before. It depends on the text, on how that is read, and on which tenants there
    /// are (the `version` of the directory); beside it `look` tells whether it is the same for everybody.
    #[inline]
    pub fn at(&self, text: &[u8], lex: Lex, version: u64, look: impl FnOnce() -> (Seen, bool)) -> Seen {
        if text.len() > MAX_TEXT {
            return look().0;
        }
        let hash = self.hasher.hash_one(text);
        let mut places = self.places.get_or_default().borrow_mut();
        if places.is_empty() {
            places.resize(PLACES, Place::default());
        }
        let place = &mut places[hash as usize % PLACES];
        if let Some(kept) = &place.kept
            && *kept.text == *text
            && (kept.version, kept.lex) == (version, lex)
        {
            return kept.seen;
        }
        let (seen, for_all) = look();
        if std::mem::replace(&mut place.came_by, hash) == hash && for_all {
            place.kept = Some(Box::new(Kept { text: text.into(), lex, version, seen }));
        }
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"SELECT 1";

    /// How often a look is taken when a text comes `times` times.
    fn looks(looks: &Looks, text: &[u8], version: u64, lex: Lex, times: usize, for_all: bool) -> usize {
        let mut taken = 0;
        for _ in 0..times {
            let seen = looks.at(text, lex, version, || {
                taken += 1;
                (Seen { lists: true, ..Seen::default() }, for_all)
            });
            assert!(seen.lists);
        }
        taken
    }

    #[test]
    fn what_comes_again_is_kept() {
        let kept = Looks::default();
        assert_eq!(looks(&kept, TEXT, 1, Lex::default(), 5, true), 2);
        assert_eq!(looks(&kept, b"SELECT 2", 1, Lex::default(), 1, true), 1);
        assert_eq!(looks(&kept, TEXT, 1, Lex::default(), 5, true), 0);
    }

    #[test]
    fn tenants_that_came_since_and_another_way_of_reading_ask_for_a_new_look() {
        let kept = Looks::default();
        let backslashes = Lex { backslashes: true, ..Lex::default() };
        assert_eq!(looks(&kept, TEXT, 1, Lex::default(), 3, true), 2);
        assert_eq!(looks(&kept, TEXT, 2, Lex::default(), 3, true), 1);
        assert_eq!(looks(&kept, TEXT, 2, backslashes, 3, true), 1);
    }

    #[test]
    fn what_is_one_clients_own_and_what_is_long_is_looked_at_each_time() {
        let kept = Looks::default();
        assert_eq!(looks(&kept, TEXT, 1, Lex::default(), 5, false), 5);
        assert_eq!(looks(&kept, &[b' '; MAX_TEXT + 1], 1, Lex::default(), 5, true), 5);
    }

    #[test]
    fn what_comes_once_drives_nothing_out() {
        let kept = Looks::default();
        looks(&kept, TEXT, 1, Lex::default(), 2, true);
        for n in 0..10 * PLACES {
            looks(&kept, format!("SELECT {n}, 1").as_bytes(), 1, Lex::default(), 1, true);
        }
        assert_eq!(looks(&kept, TEXT, 1, Lex::default(), 1, true), 0);
    }
}
