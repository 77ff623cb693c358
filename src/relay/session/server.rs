//! What becomes of a server's frame, and what its answers say of the session. Errors are in `failure`.

use std::sync::atomic::Ordering;

use bytes::BytesMut;

use super::events::is_about_names;
use super::expect::{Expect, ends_by_itself};
use super::{Desync, Session, Verdict};
use crate::pool::statements::Prepared;
use crate::relay::names::Verb;
use crate::wire::frame::{HEADER, Header, cstr};
use crate::wire::message;

/// Longest setting, and longest error, that is looked at whole (bytes).
const MAX_SAID: usize = 1 << 20;

/// Longer than any notification (bytes).
const MAX_NOTIFICATION: usize = 16 << 10;

impl Session {
    /// How much of a server's frame has to be at hand for [`Session::on_server`].
    #[inline]
    pub fn needs_of_server(&self, header: Header, limit: usize) -> usize {
        match header.tag {
            b'T' if matches!(self.expects.front(), Some(Expect::Describe(Some(_)) | Expect::InjectedDescribe(_))) => {
                header.total.min(MAX_SAID)
            }
            b'Z' | b'C' => header.total.min(limit),
            // A value, or what the server says of it, may be as long as a statement.
            b'E' | b'S' => header.total.min(MAX_SAID),
            // Bounded by the server: 8,000 bytes and a name.
            b'A' => header.total.min(MAX_NOTIFICATION),
            _ => HEADER,
        }
    }

    /// Decides about a server's frame. Answers of ours that follow it are for the caller to fetch by
    /// [`Session::flush_ours`].
    ///
    /// # Errors
    /// The server is out of step: the connection must be closed.
    #[inline]
    pub fn on_server(
        &mut self,
        header: Header,
        frame: &[u8],
        prepared: &mut Prepared,
        out: &mut BytesMut,
    ) -> Result<Verdict, Desync> {
        match header.tag {
            b'N' => Ok(self.notice()),
            b'T' | b't' | b'n' => Ok(self.described(header, frame, prepared)),
            b'D' | b'd' | b'A' | b'S' | b'H' | b'c' | b'V' => Ok(Verdict::Forward),
            b'Z' => self.ready(frame),
            b'C' => Ok(self.complete(frame, prepared, out)),
            b'I' | b's' => {
                if matches!(self.expects.front(), Some(Expect::Execute(_))) {
                    self.take();
                }
                Ok(Verdict::Forward)
            }
            b'1' | b'2' | b'3' if matches!(self.expects.front(), Some(Expect::InjectedStep(tag)) if *tag == header.tag) =>
            {
                self.take();
                Ok(Verdict::Swallow)
            }
            b'1' => match self.take() {
                Some(Expect::Parse(None)) => Ok(Verdict::Forward),
                Some(Expect::Parse(Some(parsed)) | Expect::Checked(parsed)) => {
                    parsed.statement.accepted.fetch_or(parsed.in_scope, Ordering::Relaxed);
                    Ok(Verdict::Forward)
                }
                Some(Expect::ParseUnnamed(_)) => Ok(Verdict::Forward),
                Some(Expect::ParseBySql) => {
                    // It was gone. Now there is one under the client's own name, for nobody else to find.
                    self.untidy = true;
                    Ok(Verdict::Forward)
                }
                Some(Expect::Taken(taken)) => {
                    // The name became free in the same group of messages. What follows uses it as it is now on the server.
                    prepared.squat(taken.by.id);
                    self.named.insert(taken.by.name, taken.statement);
                    Ok(Verdict::Forward)
                }
                Some(Expect::Injected(_) | Expect::InjectedUnnamed | Expect::InjectedEmpty(_)) => Ok(Verdict::Swallow),
                _ => Err(Desync(b'1')),
            },
            b'2' => self.pop(|e| matches!(e, Expect::Bind(_)), b'2'),
            b'3' => match self.take() {
                Some(Expect::Close | Expect::CloseUnnamed(_)) => Ok(Verdict::Forward),
                Some(Expect::CloseBySql(_)) => Ok(Verdict::Forward),
                Some(Expect::InjectedClose(_)) => Ok(Verdict::Swallow),
                _ => Err(Desync(b'3')),
            },
            b'E' => Ok(self.error(frame, prepared, out)),
            // CopyBothResponse: a replication stream, which goes both ways.
            b'G' | b'W' => {
                self.begin_copy_in();
                Ok(Verdict::Forward)
            }
            tag => Err(Desync(tag)),
        }
    }

    /// What a server has to say of a text it says each time it is parsed, and not when we do that again.
    fn notice(&mut self) -> Verdict {
        match self.expects.front_mut() {
            Some(Expect::Injected(_) | Expect::InjectedUnnamed) => Verdict::Swallow,
            Some(Expect::Parse(Some(parsed)) | Expect::Checked(parsed)) => {
                parsed.in_scope = false;
                Verdict::Forward
            }
            _ => Verdict::Forward,
        }
    }

    fn pop(&mut self, expected: impl Fn(&Expect) -> bool, tag: u8) -> Result<Verdict, Desync> {
        match self.take() {
            Some(expect) if expected(&expect) => Ok(Verdict::Forward),
            _ => Err(Desync(tag)),
        }
    }

    fn ready(&mut self, frame: &[u8]) -> Result<Verdict, Desync> {
        let Some(&status @ (b'I' | b'T' | b'E')) = frame.get(HEADER) else { return Err(Desync(b'Z')) };
        self.status = status;
        if self.expects.len() <= 1 {
            self.renames = false;
            self.rescopes &= status != b'I';
            self.rereads &= status != b'I';
            self.advanced &= status != b'I';
            self.forgot_sequences = false;
        }
        (self.copy_in, self.copy_data, self.sync_in_copy, self.copy_began) = (false, false, false, false);
        match self.take() {
            Some(Expect::InjectedSync | Expect::InjectedQuery) => Ok(Verdict::Swallow),
            Some(expect) if ends_by_itself(&expect) => {
                self.unprepared = None;
                Ok(Verdict::Forward)
            }
            _ => Err(Desync(b'Z')),
        }
    }

    fn complete(&mut self, frame: &[u8], prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        let tag = cstr(&frame[HEADER..]).map_or(&frame[HEADER..], |(tag, _)| tag);
        match self.expects.front_mut() {
            Some(Expect::InjectedQuery) => {
                self.note_stream_name(Ok(()));
                return Verdict::Swallow;
            }
            Some(Expect::InjectedStep(_) | Expect::InjectedDiscard) => {
                self.take();
                return Verdict::Swallow;
            }
            Some(Expect::DropSlot) => {
                message::command_complete(out, "DROP_REPLICATION_SLOT");
                return Verdict::Instead;
            }
            Some(Expect::Query(Some(events)) | Expect::Execute(Some(events))) if is_about_names(tag) => {
                // What EXECUTE has run says its own name.
                while let Some(event) = events.pop_front() {
                    if event.verb != Verb::Execute {
                        self.carry_out(event, prepared);
                        break;
                    }
                }
            }
            _ => {}
        }
        self.altered |=
            tag.starts_with(b"ALTER ") || tag.starts_with(b"DROP ") || matches!(tag, b"CREATE VIEW" | b"DO");
        match tag {
            b"ALTER ROLE" | b"ALTER DATABASE" => self.changes_logins = true,
            b"DISCARD ALL" | b"DEALLOCATE ALL" => self.forget_all(prepared),
            _ => {}
        }
        // What comes behind it in the same pipeline counts again.
        let last = !self.expects.iter().skip(1).any(|e| matches!(e, Expect::Query(_) | Expect::Execute(_)));
        let discarded = matches!(tag, b"DISCARD ALL" | b"DISCARD SEQUENCES") && last;
        if discarded && prepared.sequences_of == Some(self.stay()) {
            prepared.forget_sequences();
            self.forgot_sequences = matches!(self.expects.front(), Some(Expect::Query(_)));
            self.residue.asks |= self.asks;
        } else {
            self.may_advance(prepared);
        }
        if matches!(self.expects.front(), Some(Expect::Execute(_))) {
            self.take();
        }
        Verdict::Forward
    }

    /// The server reads nothing but COPY messages now: a Sync that is already on its way is ignored there.
    fn begin_copy_in(&mut self) {
        let end = self.expects.iter().position(|e| matches!(e, Expect::CopyEnd));
        (self.copy_in, self.copy_began) = (end.is_none(), true);
        let upto = end.unwrap_or(self.expects.len());
        let mut at = 0;
        let mut ends_later = false;
        self.expects.retain(|expect| {
            let sync = at < upto && matches!(expect, Expect::Sync);
            let ignored = sync || Some(at) == end;
            (at, ends_later) = (at + 1, ends_later || sync);
            !ignored
        });
        // The group ends with the next one, behind the COPY.
        self.open_group |= ends_later && end.is_none();
    }
}
