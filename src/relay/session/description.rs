//! What a statement returns, as a fingerprint: whether it is still what a client was told.
//!
//! A server holds a prepared statement to the columns that it had when it was prepared ("cached plan must not change result
//! type"). Where it is prepared again on another server connection, the server cannot know what it was before.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use crate::wire::frame::{HEADER, Header};
use crate::wire::message::Cursor;

/// What stands for columns that could not be read: they are others than any that could.
const UNREADABLE: u64 = u64::MAX;

/// A fingerprint of a RowDescription or of NoData; never 0. Names (as far as they are ASCII), types and modifiers of the
/// columns count, as for the server: not the table that they come from, nor the format in which they are wanted.
pub(super) fn fingerprint(header: Header, frame: &[u8]) -> u64 {
    if header.tag != b'T' {
        return 1;
    }
    let whole = (frame.len() == header.total).then_some(&frame[HEADER..]);
    whole.and_then(columns).unwrap_or(UNREADABLE)
}

fn columns(body: &[u8]) -> Option<u64> {
    let mut cursor = Cursor::new(body);
    let mut hasher = DefaultHasher::new();
    let count = cursor.i16().ok()?;
    count.hash(&mut hasher);
    for _ in 0..count {
        let name = cursor.cstr().ok()?;
        // In the encoding of whoever asked: clients with different ones must not differ in this.
        if name.is_ascii() {
            name.hash(&mut hasher);
        }
        // Table and number of the column there.
        cursor.bytes(6).ok()?;
        // Type, length and modifier.
        cursor.bytes(10).ok()?.hash(&mut hasher);
        // Format.
        cursor.bytes(2).ok()?;
    }
    Some(hasher.finish().clamp(2, UNREADABLE - 1))
}
