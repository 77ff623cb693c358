//! What has been said on a server connection since it last owed nothing: read only when the server refuses something,
//! to tell what was refused. No I/O.

/// Kept of one message (bytes), and of all of them.
const MAX_ONE: usize = 16 << 10;
const MAX_ALL: usize = 64 << 10;
/// Kept by a connection that is quiet.
const MAX_QUIET: usize = 4 << 10;

/// The messages with statements and values in them, oldest first; where there are too many, only the last ones.
#[derive(Debug, Default)]
pub struct Recent {
    bytes: Vec<u8>,
    /// Where each message ends, and which group it belongs to.
    ends: Vec<(usize, u32)>,
    group: u32,
}

impl Recent {
    /// Forgets everything.
    #[inline]
    pub fn clear(&mut self) {
        if self.bytes.capacity() > MAX_QUIET {
            *self = Self::default();
        }
        self.bytes.clear();
        self.ends.clear();
    }

    /// Notes a message, as far as it has arrived.
    #[inline]
    pub fn note(&mut self, frame: &[u8]) {
        let frame = &frame[..frame.len().min(MAX_ONE)];
        if self.bytes.len() + frame.len() > MAX_ALL {
            self.bytes.clear();
            self.ends.clear();
        }
        self.bytes.extend_from_slice(frame);
        self.ends.push((self.bytes.len(), self.group));
    }

    /// Forgets the last message: it is said again.
    pub fn forget_last(&mut self) {
        self.ends.pop();
        self.bytes.truncate(self.ends.last().map_or(0, |end| end.0));
    }

    /// What comes now is answered by itself: a Sync, or a Query, has ended what was said before.
    #[inline]
    pub fn end_group(&mut self) {
        self.group = self.group.wrapping_add(1);
    }

    /// The `n`th message from the end and those of its group before it, the last one first.
    pub fn group_of(&self, n: usize) -> impl Iterator<Item = &[u8]> {
        let upto = (self.ends.len() + 1).saturating_sub(n.max(1));
        let group = upto.checked_sub(1).and_then(|at| self.ends.get(at)).map(|end| end.1);
        (0..upto).rev().take_while(move |at| self.ends.get(*at).map(|end| end.1) == group).filter_map(|at| self.get(at))
    }

    /// The `n`th message from the end; 1 is the last one.
    pub fn from_end(&self, n: usize) -> Option<&[u8]> {
        self.get(self.ends.len().checked_sub(n.max(1))?)
    }

    fn get(&self, at: usize) -> Option<&[u8]> {
        let start = at.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).map(|end| end.0))?;
        self.bytes.get(start..self.ends.get(at)?.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_from_the_end() {
        let mut recent = Recent::default();
        assert_eq!(recent.from_end(1), None);
        for frame in ["a", "", "bc"] {
            recent.note(frame.as_bytes());
        }
        assert_eq!(recent.from_end(1), Some(&b"bc"[..]));
        assert_eq!(recent.from_end(2), Some(&b""[..]));
        assert_eq!(recent.from_end(3), Some(&b"a"[..]));
        assert_eq!(recent.from_end(4), None);
        recent.end_group();
        recent.note(b"d");
        recent.note(b"e");
        let group = |n| recent.group_of(n).map(<[u8]>::to_vec).collect::<Vec<_>>();
        assert_eq!(group(1), [b"e".to_vec(), b"d".to_vec()]);
        assert_eq!(group(2), [b"d".to_vec()]);
        assert_eq!(group(3).len(), 3);
        assert_eq!(group(6).len(), 0);
        recent.clear();
        assert_eq!(recent.group_of(1).count(), 0);
    }

    #[test]
    fn it_does_not_grow() {
        let mut recent = Recent::default();
        for _ in 0..100 {
            recent.note(&[b'x'; 1 << 20]);
            assert!(recent.bytes.len() <= MAX_ALL);
        }
        assert_eq!(recent.from_end(1).unwrap().len(), MAX_ONE);
        recent.clear();
        assert!(recent.bytes.capacity() <= MAX_QUIET);
    }
}
