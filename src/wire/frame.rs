//! Where a message begins and ends: the declared length is the only authority.

/// Bytes of a message's header: tag and length.
pub const HEADER: usize = 5;

/// No message is longer (PostgreSQL's `MaxAllocSize`).
pub const MAX_LENGTH: usize = 0x3fff_ffff;

/// The header of a message after startup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// What kind of message it is.
    pub tag: u8,
    /// Bytes of the whole message, tag and length included.
    pub total: usize,
}

/// A length that no message can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid message length")]
pub struct InvalidLength;

/// Reads the header at the front of `bytes`; `None` if it is not there in full.
///
/// # Errors
/// A length below 4 or above [`MAX_LENGTH`].
#[inline]
pub fn header(bytes: &[u8]) -> Result<Option<Header>, InvalidLength> {
    let [tag, a, b, c, d, ..] = *bytes else { return Ok(None) };
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if !(4..=MAX_LENGTH).contains(&length) {
        return Err(InvalidLength);
    }
    Ok(Some(Header { tag, total: length + 1 }))
}

/// The text up to the first NUL and what comes after it.
#[inline]
pub fn cstr(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = memchr::memchr(0, bytes)?;
    Some((&bytes[..end], &bytes[end + 1..]))
}

/// The text up to the first NUL, or all of it.
#[inline]
pub fn until_nul(bytes: &[u8]) -> &[u8] {
    memchr::memchr(0, bytes).map_or(bytes, |end| &bytes[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declared_length_is_the_only_authority() {
        assert_eq!(header(b"Q\0\0\0"), Ok(None));
        assert_eq!(header(b"Q\0\0\0\x08abcd"), Ok(Some(Header { tag: b'Q', total: 9 })));
        assert_eq!(header(b"Q\0\0\0\x04"), Ok(Some(Header { tag: b'Q', total: 5 })));
        assert_eq!(header(b"Q\0\0\0\x03"), Err(InvalidLength));
        assert_eq!(header(b"Q\xff\xff\xff\xff"), Err(InvalidLength));
    }
}
