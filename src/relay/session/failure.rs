//! A server's error: in whose words the client gets it, what the server skips because of it, and what was noted of that and
//! is taken back.

use bytes::BytesMut;

use super::expect::{Expect, Shared, ends_by_itself, is_step_of_ours};
use super::{Session, Verdict};
use crate::error::{PgError, Severity, sqlstate};
use crate::pool::connect::server_error;
use crate::pool::statements::Prepared;
use crate::wire::frame::HEADER;
use crate::wire::message;

impl Session {
    /// An error: the server skips to the next Sync, unless it is in a simple Query, which ends by itself.
    pub(super) fn error(&mut self, frame: &[u8], prepared: &mut Prepared, out: &mut BytesMut) -> Verdict {
        // The SET may be what failed: then the setting was not made, could perhaps not be made elsewhere either, and only
        // the server can tell which of them were.
        self.residue.unknown |= !self.residue.settings.is_empty();
        self.copy_in = false;
        self.in_doubt |= self.copy_began && self.sync_in_copy;
        self.may_advance(prepared);
        let error = server_error(&frame[HEADER..]);
        self.note_unusable(&error, prepared);
        let verdict = match self.expects.front() {
            Some(Expect::RefusedQuery(ours) | Expect::RefusedParse(ours)) => {
                message::error_response(out, ours);
                Verdict::Instead
            }
            // Its farewell is for the client.
            _ if error.severity == Severity::Fatal => Verdict::Forward,
            // What the client said comes behind it, and fails by itself.
            Some(Expect::InjectedQuery) => {
                prepared.doubt_sequences();
                self.note_stream_name(Err(error));
                Verdict::Swallow
            }
            Some(front) if is_step_of_ours(front) && self.is_in_group_of_ours() => {
                self.note_unprepared(error);
                Verdict::Swallow
            }
            _ if self.rename_in_error(frame, out) || explain_denied_lock(frame, out) => Verdict::Instead,
            _ => Verdict::Forward,
        };
        if self.expects.front().is_none_or(ends_by_itself) {
            // With nothing outstanding it can only be the server's farewell.
            self.failed |= self.expects.is_empty() && self.open_group;
            return verdict;
        }
        let mut skipped = Vec::new();
        while !matches!(self.expects.front(), None | Some(Expect::Sync | Expect::InjectedSync)) {
            skipped.extend(self.take());
        }
        if let Some(Expect::ParseUnnamed(failed)) = skipped.first_mut() {
            // Not skipped: a Parse that fails takes away what there was.
            failed.before = None;
        }
        if skipped.iter().any(|skipped| matches!(skipped, Expect::InjectedDiscard)) {
            prepared.doubt_sequences();
        }
        self.failed |= self.expects.is_empty();
        // What was noted last goes first: a name may have been given and taken away.
        for skipped in skipped.into_iter().rev() {
            self.undo(skipped, prepared);
        }
        verdict
    }

    /// A statement of ours that the server no longer runs, or does not have.
    fn note_unusable(&self, error: &PgError, prepared: &mut Prepared) {
        let Some(
            Expect::Bind(Some(Shared { id, .. }))
            | Expect::Describe(Some(Shared { id, .. }))
            | Expect::InjectedDescribe(Shared { id, .. }),
        ) = self.expects.front()
        else {
            return;
        };
        if error.code == sqlstate::FEATURE_NOT_SUPPORTED {
            // "cached plan must not change result type": a table has changed under it. On a server the client would
            // prepare again under another name; that must not bring it back to this one.
            prepared.outdate(*id);
        }
        if error.code == sqlstate::UNKNOWN_STATEMENT && error.message.contains(&format!("\"pgusher_{id}\"")) {
            // A function has taken it away (`EXECUTE 'DEALLOCATE ALL'`).
            prepared.remove(*id);
        }
    }

    /// The server's error with the client's name for a statement in the place of ours.
    fn rename_in_error(&self, frame: &[u8], out: &mut BytesMut) -> bool {
        let (ours, name) = match self.expects.front() {
            Some(Expect::Taken(taken)) => {
                (format!("\"pgusher_{}\"", taken.by.id), String::from_utf8_lossy(&taken.by.name).into_owned())
            }
            Some(Expect::Bind(Some(shared)) | Expect::Describe(Some(shared)) | Expect::InjectedDescribe(shared)) => {
                (format!("\"pgusher_{}\"", shared.id), String::from_utf8_lossy(&shared.name).into_owned())
            }
            Some(Expect::Query(Some(events)) | Expect::Execute(Some(events))) => {
                let mut shared = events.iter().filter_map(|e| Some((e.shared.as_ref()?.id, &e.name)));
                let text = String::from_utf8_lossy(frame);
                let unprepared = self.unprepared.as_ref().map(|unprepared| unprepared.0);
                let found =
                    shared.find(|(id, _)| unprepared == Some(*id) || text.contains(&format!("\"pgusher_{id}\"")));
                let Some((id, name)) = found else { return false };
                (format!("\"pgusher_{id}\""), String::from_utf8_lossy(name).into_owned())
            }
            _ => return false,
        };
        let mut error = server_error(&frame[HEADER..]);
        if let Some(reason) = self.reason_for(&error, &ours) {
            message::error_response(out, reason);
            return true;
        }
        if !error.message.contains(&ours) {
            return false;
        }
        error.message = error.message.replace(&ours, &format!("\"{name}\""));
        message::error_response(out, &error);
        true
    }

    /// Takes back what was noted when a message was sent that the server has not carried out.
    fn undo(&mut self, skipped: Expect, prepared: &mut Prepared) {
        match skipped {
            Expect::Parse(Some(undo)) => {
                prepared.remove(undo.statement.id);
                self.named.remove(&undo.name[..]);
            }
            Expect::ParseUnnamed(turn) | Expect::CloseUnnamed(turn) => self.undo_unnamed(turn, prepared),
            Expect::InjectedUnnamed => prepared.unnamed = prepared.unnamed.filter(|o| *o != self.unnamed_owner()),
            Expect::Injected(id) => prepared.remove(id),
            Expect::InjectedEmpty(id) => drop(prepared.put_right(id)),
            Expect::CloseBySql(name) => drop(self.by_sql.insert(name)),
            Expect::Checked(undo) => drop(self.named.remove(&undo.name[..])),
            Expect::OurParse(name) => {
                self.named.remove(&name[..]);
            }
            Expect::OurClose(Some(closed)) => {
                self.named.insert(closed.0, closed.1);
            }
            // The server still has it, under a name that is to be closed before it is used again.
            Expect::InjectedClose(id) => prepared.squat(id),
            _ => {}
        }
    }
}

/// Advisory locks have a key space per tenant, by functions in the place of PostgreSQL's: under a `search_path` of the
/// client's own these are not found, and PostgreSQL's may not be called.
fn explain_denied_lock(frame: &[u8], out: &mut BytesMut) -> bool {
    let error = server_error(frame.get(HEADER..).unwrap_or_default());
    let denied = error.code == sqlstate::INSUFFICIENT_PRIVILEGE && error.hint.is_none();
    if !denied
        || !error.message.starts_with("permission denied for function pg_")
        || !error.message.contains("advisory")
    {
        return false;
    }
    let hint = "End your search_path with \"tenant_shim, pg_catalog\", or call tenant_shim's function of that name.";
    message::error_response(out, &error.hint(hint));
    true
}
