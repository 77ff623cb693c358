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
    ends: Vec<usize>,
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
        self.ends.push(self.bytes.len());
    }

    /// The `n`th message from the end; 1 is the last one.
    pub fn from_end(&self, n: usize) -> Option<&[u8]> {
        self.get(self.ends.len().checked_sub(n.max(1))?)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0..self.ends.len()).filter_map(|at| self.get(at))
    }

    fn get(&self, at: usize) -> Option<&[u8]> {
        let start = at.checked_sub(1).map_or(Some(0), |before| self.ends.get(before).copied())?;
        self.bytes.get(start..*self.ends.get(at)?)
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
        assert_eq!(recent.iter().count(), 3);
        recent.clear();
        assert_eq!(recent.iter().count(), 0);
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
