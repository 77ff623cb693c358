use std::sync::Arc;

use bytes::BytesMut;

use super::*;
use crate::error::sqlstate;
use crate::pool::keepers::Claim;
use crate::pool::statements::Stay;
use crate::wire::frame::{self, HEADER};

/// Takes SET ROLE for suspicious and refuses it.
struct Guard;

impl Ward for Guard {
    fn looks(&self) -> bool {
        true
    }

    fn lex(&self) -> Lex {
        Lex::default()
    }

    fn look(&self, text: &[u8], lex: Lex, _: bool) -> Seen {
        crate::relay::scan::look(&lex.narrow(text), lex, |_| false)
    }

    fn judge(&self, text: &[u8], _: Lex) -> Option<PgError> {
        text.starts_with(b"SET ROLE").then(|| PgError::error(sqlstate::INSUFFICIENT_PRIVILEGE, "no"))
    }

    fn remember(&self, _: &[u8], _: Lex) {}

    fn function_call_refused(&self) {}

    fn replication_refused(&self, _: &str) {}
}

/// A session and the server connection that it uses, as far as there is one.
struct Both {
    session: Session,
    prepared: Prepared,
    registry: Registry,
}

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag][..], &length.to_be_bytes(), body].concat()
}

impl Both {
    fn new(pool_mode: PoolMode) -> Self {
        let session = Session::new(1, pool_mode, 2);
        Self { session, prepared: Prepared::default(), registry: Registry::new(Arc::default()) }
    }

    /// What goes to the server for this frame of the client, and what the client is answered at once.
    fn client(&mut self, tag: u8, body: &[u8]) -> (String, String) {
        let frame = message(tag, body);
        let header = frame::header(&frame).unwrap().unwrap();
        let (mut out, mut answers) = (BytesMut::new(), BytesMut::new());
        let mut link = Link { prepared: &mut self.prepared, registry: &self.registry, ward: &Guard };
        let verdict = self.session.on_client(header, &frame, &mut link, &mut out).unwrap();
        self.session.flush_ours(&mut answers);
        let sent = match verdict {
            Verdict::Forward => frame,
            Verdict::Swallow | Verdict::Later => Vec::new(),
            Verdict::Replace | Verdict::Instead | Verdict::Ahead => out.to_vec(),
        };
        (tags(&sent), tags(&answers))
    }

    /// What the client gets for this frame of the server.
    fn server(&mut self, tag: u8, body: &[u8]) -> Result<String, Desync> {
        let frame = message(tag, body);
        let header = frame::header(&frame).unwrap().unwrap();
        let mut out = BytesMut::new();
        let mut got = match self.session.on_server(header, &frame, &mut self.prepared, &mut out)? {
            Verdict::Forward => frame,
            Verdict::Swallow | Verdict::Later | Verdict::Ahead => Vec::new(),
            Verdict::Replace | Verdict::Instead => out.to_vec(),
        };
        let mut answers = BytesMut::new();
        self.session.flush_ours(&mut answers);
        got.extend_from_slice(&answers);
        Ok(tags(&got))
    }

    fn servers(&mut self, frames: &[(u8, &[u8])]) -> String {
        frames.iter().map(|(tag, body)| self.server(*tag, body).unwrap()).collect()
    }
}

/// The tags of a run of messages.
fn tags(mut bytes: &[u8]) -> String {
    let mut tags = String::new();
    while let Some(header) = frame::header(bytes).unwrap() {
        tags.push(char::from(header.tag));
        bytes = &bytes[header.total..];
    }
    assert!(bytes.is_empty(), "half a message");
    tags
}

const SOMEBODY_ELSE: Option<Stay> = Some(Stay { client: 2, number: 1 });

const READY: (u8, &[u8]) = (b'Z', b"I");
const IN_TX: (u8, &[u8]) = (b'Z', b"T");
const ERROR: (u8, &[u8]) = (b'E', b"SERROR\0C42601\0Mno\0\0");

#[test]
fn a_connection_is_free_when_all_is_answered_and_no_transaction_open() {
    let mut both = Both::new(PoolMode::Transaction);
    both.client(b'Q', b"BEGIN\0");
    assert!(!both.session.is_idle());
    both.servers(&[(b'C', b"BEGIN\0"), IN_TX]);
    assert!(!both.session.is_idle() && both.session.is_idle_in_transaction());
    // Two at once: the first answer is not the last.
    both.client(b'Q', b"COMMIT\0");
    both.client(b'Q', b"SELECT 1\0");
    both.servers(&[(b'C', b"COMMIT\0"), READY]);
    assert!(!both.session.is_idle());
    both.servers(&[(b'C', b"SELECT 1\0"), READY]);
    assert!(both.session.is_idle());
    assert_eq!(both.session.take_queries(), 3);
}

#[test]
fn without_a_sync_the_connection_is_kept() {
    let mut both = Both::new(PoolMode::Transaction);
    both.client(b'P', b"\0SELECT 1\0\0\0");
    both.client(b'H', b"");
    both.servers(&[(b'1', b"")]);
    assert!(!both.session.is_idle(), "the implicit transaction is open until Sync");
    both.client(b'S', b"");
    both.servers(&[READY]);
    assert!(both.session.is_idle());
}

#[test]
fn an_answer_that_nobody_waits_for_is_out_of_step() {
    for frame in [READY, (b'1', b""), (b'2', b""), (b'3', b""), (b'R', b"\0\0\0\0"), (b'Z', b"?")] {
        assert!(Both::new(PoolMode::Session).server(frame.0, frame.1).is_err(), "{}", char::from(frame.0));
    }
}

#[test]
fn names_are_ours_and_answers_keep_their_order() {
    let mut both = Both::new(PoolMode::Transaction);
    assert_eq!(both.client(b'P', b"a\0SELECT 1\0\0\0"), ("P".into(), String::new()));
    both.client(b'S', b"");
    assert_eq!(both.servers(&[(b'1', b""), READY]), "1Z");
    // The same text under another name is known; its answer waits behind the Bind before it.
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "B");
    assert_eq!(both.client(b'P', b"b\0SELECT 1\0\0\0"), (String::new(), String::new()));
    assert_eq!(both.client(b'C', b"Sb\0"), (String::new(), String::new()));
    both.client(b'S', b"");
    assert_eq!(both.servers(&[(b'2', b""), READY]), "213Z");
}

#[test]
fn a_statement_is_parsed_again_where_it_is_missing() {
    let mut both = Both::new(PoolMode::Transaction);
    both.client(b'P', b"a\0SELECT 1\0\0\0");
    both.client(b'P', b"\0SELECT 2\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b'1', b""), READY]);
    both.prepared = Prepared::default();
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "PB");
    assert_eq!(both.client(b'D', b"S\0").0, "PD");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[(b'1', b""), (b'2', b""), (b'1', b""), (b't', b""), (b'n', b""), READY]), "2tnZ");
    assert!(both.session.is_idle());
}

#[test]
fn what_was_skipped_after_an_error_did_not_happen() {
    let mut both = Both::new(PoolMode::Transaction);
    both.client(b'P', b"known\0SELECT 1\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), READY]);
    both.client(b'P', b"bad\0nonsense\0\0\0");
    both.client(b'P', b"new\0SELECT 1\0\0\0");
    both.client(b'C', b"Sknown\0");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    assert!(both.session.is_idle());
    assert!(both.session.named.contains_key(b"known") && both.session.named.values().count() == 1);
    assert_eq!(both.prepared.count(), 1);
    // An error before the Sync was sent: what comes up to it goes nowhere.
    both.client(b'P', b"\0nonsense\0\0\0");
    both.server(ERROR.0, ERROR.1).unwrap();
    assert_eq!(both.client(b'B', b"\0\0\0\0\0\0\0\0").0, "");
    assert_eq!(both.client(b'S', b"").0, "S");
    assert_eq!(both.servers(&[READY]), "Z");
    assert!(both.session.is_idle());
}

#[test]
fn refusals_are_the_servers_errors_in_our_words() {
    let mut both = Both::new(PoolMode::Transaction);
    assert_eq!(both.client(b'Q', b"LISTEN a\0").0, "Q");
    assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    assert_eq!(both.client(b'F', &[0, 0, 8, 30]).0, "Q");
    assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    // A name that only the server may know is its business.
    assert_eq!(both.client(b'B', b"\0nobody\0\0\0\0\0\0\0").0, "B");
    both.client(b'E', b"\0\0\0\0\0");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    assert!(both.session.is_idle());
    // So are those of the guard, which also sees what is prepared.
    assert_eq!(both.client(b'Q', b"SET ROLE x\0").0, "Q");
    assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    for name in [&b"\0SET ROLE x\0\0\0"[..], b"a\0SET ROLE x\0\0\0"] {
        assert_eq!(both.client(b'P', name).0, "P");
        both.client(b'S', b"");
        assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    }
    assert!(both.session.is_idle() && both.session.named.values().next().is_none());
    // In session mode LISTEN is the server's business.
    let mut both = Both::new(PoolMode::Session);
    both.client(b'Q', b"LISTEN a\0");
    assert_eq!(both.servers(&[(b'C', b"LISTEN\0"), READY]), "CZ");
}

#[test]
fn a_refused_message_that_is_longer_than_what_was_seen_goes_nowhere() {
    let mut both = Both::new(PoolMode::Transaction);
    let frame = message(b'B', &[&b"\0\0"[..], &[b'X'; 100]].concat());
    let header = frame::header(&frame).unwrap().unwrap();
    let mut out = BytesMut::new();
    let mut link = Link { prepared: &mut both.prepared, registry: &both.registry, ward: &Guard };
    let verdict = both.session.on_client(header, &frame[..40], &mut link, &mut out).unwrap();
    assert_eq!(verdict, Verdict::Instead, "the unseen rest must not follow as messages of its own");
}

#[test]
fn a_sync_that_arrives_in_copy_is_not_answered() {
    let mut both = Both::new(PoolMode::Transaction);
    for (tag, body) in
        [(b'P', &b"\0COPY t FROM STDIN\0\0\0"[..]), (b'B', b"\0\0\0\0\0\0\0\0"), (b'E', b"\0\0\0\0\0"), (b'S', b"")]
    {
        both.client(tag, body);
    }
    both.servers(&[(b'1', b""), (b'2', b""), (b'G', b"\0\0\0")]);
    assert!(!both.session.is_idle());
    both.client(b'd', b"1\n");
    both.client(b'c', b"");
    both.client(b'S', b"");
    both.servers(&[(b'C', b"COPY 1\0"), READY]);
    assert!(both.session.is_idle());
    // CopyDone and both Syncs sent before the server said that it is in COPY.
    for (tag, body) in [
        (b'P', &b"\0COPY t FROM STDIN\0\0\0"[..]),
        (b'B', b"\0\0\0\0\0\0\0\0"),
        (b'E', b"\0\0\0\0\0"),
        (b'S', b""),
        (b'd', b"1\n"),
        (b'c', b""),
        (b'S', b""),
    ] {
        both.client(tag, body);
    }
    both.servers(&[(b'1', b""), (b'2', b""), (b'G', b"\0\0\0"), (b'C', b"COPY 1\0"), READY]);
    assert!(both.session.is_idle());
}

#[test]
fn too_many_statements_close_the_one_used_least() {
    let mut both = Both::new(PoolMode::Transaction);
    for name in [&b"a\0SELECT 1\0\0\0"[..], b"b\0SELECT 2\0\0\0"] {
        both.client(b'P', name);
    }
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b'1', b""), READY]);
    assert_eq!(both.client(b'P', b"c\0SELECT 3\0\0\0").0, "CP");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[(b'3', b""), (b'1', b""), READY]), "1Z");
}

#[test]
fn after_an_error_nobody_knows_which_settings_were_made() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"SET a = 1\0");
    both.servers(&[(b'C', b"SET\0"), READY]);
    let residue = both.session.take_residue();
    assert!(!residue.unknown && residue.settings.len() == 1);
    both.client(b'Q', b"SET temp_file_limit = 1\0");
    both.servers(&[ERROR, READY]);
    assert!(both.session.take_residue().unknown);
}

#[test]
fn what_follows_in_a_pipeline_waits_until_names_mean_what_they_then_mean() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"a\0SELECT 1\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), READY]);
    // Elsewhere, where it has not been prepared.
    both.prepared = Prepared::default();
    both.client(b'P', b"\0DISCARD ALL\0\0\0");
    both.client(b'B', b"\0\0\0\0\0\0\0\0");
    let frame = message(b'P', b"a\0SELECT 2\0\0\0");
    let next = frame::header(&frame).unwrap().unwrap();
    assert!(!both.session.must_wait(next, &frame));
    // A Flush makes the server answer.
    assert_eq!(both.client(b'E', b"\0\0\0\0\0").0, "EH");
    assert!(both.session.must_wait(next, &frame));
    assert_eq!(both.servers(&[(b'1', b""), (b'2', b""), (b'C', b"DISCARD ALL\0")]), "12C");
    assert!(!both.session.must_wait(next, &frame) && both.session.named.values().next().is_none());
    assert_eq!(both.client(b'P', b"a\0SELECT 2\0\0\0").0, "P");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[(b'1', b""), READY]), "1Z");
    // An error ends the wait as well.
    both.client(b'P', b"\0DEALLOCATE a\0\0\0");
    both.client(b'B', b"\0\0\0\0\0\0\0\0");
    both.client(b'E', b"\0\0\0\0\0");
    assert_eq!(both.servers(&[(b'1', b""), (b'2', b""), ERROR]), "12E");
    assert!(!both.session.must_wait(next, &frame) && both.session.named.contains_key(&b"a"[..]));
}

#[test]
fn what_is_said_of_a_text_is_said_each_time_the_client_prepares_it() {
    let mut both = Both::new(PoolMode::Auto);
    let notice = (b'N', &b"SWARNING\0C22P06\0Mno\0\0"[..]);
    both.client(b'P', b"a\0SELECT '\\'\0\0\0");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[notice, (b'1', b""), READY]), "N1Z");
    assert_eq!(both.client(b'P', b"b\0SELECT '\\'\0\0\0").0, "CP", "not answered by ourselves");
    both.client(b'S', b"");
    assert_eq!(both.servers(&[(b'3', b""), notice, (b'1', b""), READY]), "N1Z");
    both.prepared = Prepared::default();
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "PB");
    assert_eq!(both.servers(&[notice, (b'1', b""), (b'2', b"")]), "2");
    both.client(b'S', b"");
    both.servers(&[READY]);
    // And if the name is taken, which is found out later.
    both.prepared = Prepared::default();
    assert_eq!(both.client(b'P', b"a\0SELECT '\\'\0\0\0").0, "CPP");
    assert_eq!(both.servers(&[(b'3', b""), notice, (b'1', b""), ERROR]), "NE");
}

#[test]
fn a_name_that_only_has_to_be_there_is_given_to_anything() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"a\0SELECT * FROM t\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), READY]);
    both.prepared = Prepared::default();
    assert_eq!(both.client(b'Q', b"DEALLOCATE a; PREPARE a AS SELECT 1\0").0, "PSQ");
    let (deallocated, prepared) = ((b'C', &b"DEALLOCATE\0"[..]), (b'C', &b"PREPARE\0"[..]));
    assert_eq!(both.servers(&[(b'1', b""), READY, deallocated, prepared, READY]), "CCZ");
    // The second one is SQL's own.
    assert!(both.session.named.values().next().is_none() && both.session.by_sql.contains(&b"a"[..]));
    assert_eq!(both.client(b'Q', b"EXECUTE a\0").0, "Q");
}

#[test]
fn two_names_of_one_statement_are_taken_away_one_by_one() {
    let mut both = Both::new(PoolMode::Auto);
    for name in [&b"a\0SELECT 1\0\0\0"[..], b"b\0SELECT 1\0\0\0"] {
        both.client(b'P', name);
        both.client(b'S', b"");
        both.servers(if name[0] == b'a' { &[(b'1', b""), READY] } else { &[READY] });
    }
    // Two names that are there, and the statement itself stays.
    assert_eq!(both.client(b'Q', b"DEALLOCATE a; DEALLOCATE b\0").0, "PPSQ");
    let deallocated = (b'C', &b"DEALLOCATE\0"[..]);
    assert_eq!(both.servers(&[(b'1', b""), (b'1', b""), READY, deallocated, deallocated, READY]), "CCZ");
    assert!(both.session.named.values().next().is_none() && both.prepared.count() == 1);
}

#[test]
fn a_statement_is_parsed_again_where_it_was_parsed() {
    let mut both = Both::new(PoolMode::Auto);
    both.session.set_scope("search_path\0\0".to_owned(), &both.registry);
    both.client(b'P', b"a\0SELECT * FROM t\0\0\0");
    both.client(b'P', b"b\0COMMIT\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b'1', b""), READY]);
    both.prepared = Prepared::default();
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "PB", "under the same search_path");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b'2', b""), READY]);
    both.prepared = Prepared::default();
    both.session.set_scope(String::new(), &both.registry);
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "CPBECCPCPBECCSB", "there, and back");
    both.client(b'S', b"");
    let step = [(b'3', &b""[..]), (b'1', b""), (b'2', b""), (b'C', b"SELECT 0\0"), (b'3', b""), (b'3', b"")];
    assert_eq!(both.servers(&step), "");
    assert_eq!(both.servers(&[(b'1', b"")]), "");
    assert_eq!(both.servers(&step), "");
    assert_eq!(both.servers(&[READY, (b'2', b""), READY]), "2Z");
    assert_eq!(both.client(b'B', b"\0b\0\0\0\0\0\0\0").0, "PB", "what has no names needs no search_path");
    // A statement that cannot be prepared any more: the reason is told, not that it is not there.
    both.servers(&[(b'1', b""), (b'2', b"")]);
    both.client(b'S', b"");
    both.servers(&[READY]);
    both.prepared = Prepared::default();
    both.client(b'B', b"\0a\0\0\0\0\0\0\0");
    both.client(b'S', b"");
    both.servers(&step);
    assert_eq!(both.servers(&[ERROR, READY]), "");
    let mut out = BytesMut::new();
    let absent = message(b'E', b"SERROR\0C26000\0Mprepared statement \"pgusher_0\" does not exist\0\0");
    let header = frame::header(&absent).unwrap().unwrap();
    both.session.on_server(header, &absent, &mut both.prepared, &mut out).unwrap();
    assert!(out.windows(5).any(|text| text == b"42601"), "{out:?}");
}

#[test]
fn too_few_values_are_found_before_a_statement_is_parsed_again() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"a\0SELECT $2::int, $1, '$3'\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), IN_TX]);
    both.client(b'Q', b"SELECT 1/0\0");
    both.servers(&[ERROR, (b'Z', b"E")]);
    both.prepared = Prepared::default();
    let bind = message(b'B', b"\0a\0\0\0\0\x01\xff\xff\xff\xff\0\0");
    assert_eq!(both.client(b'B', &bind[HEADER..]).0, "P");
    let mut out = BytesMut::new();
    let error = message(ERROR.0, ERROR.1);
    let header = frame::header(&error).unwrap().unwrap();
    both.session.on_server(header, &error, &mut both.prepared, &mut out).unwrap();
    let said = String::from_utf8_lossy(&out).into_owned();
    assert!(said.contains("08P01") && said.contains("supplies 1 parameters, but prepared statement \"a\" requires 2"));
}

#[test]
fn a_prepared_execute_runs_what_its_name_means_now() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"a\0SELECT 1\0\0\0");
    both.client(b'P', b"x\0EXECUTE a\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b'1', b""), READY]);
    let frame = message(b'B', b"\0x\0\0\0\0\0\0\0");
    let header = frame::header(&frame).unwrap().unwrap();
    let mut link = Link { prepared: &mut both.prepared, registry: &both.registry, ward: &Guard };
    let mut out = BytesMut::new();
    both.session.on_client(header, &frame, &mut link, &mut out).unwrap();
    // One of three statements has to go, there is room for two.
    assert_eq!(tags(&out), "CPB");
    assert!(out.windows(17).any(|text| text == b"EXECUTE pgusher_0"), "{out:?}");
    both.client(b'E', b"\0\0\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'3', b""), (b'1', b""), (b'2', b""), (b'C', b"SELECT 1\0"), READY]);
    assert!(both.session.is_idle());
}

#[test]
fn sequences_advanced_behind_a_discard_in_the_same_pipeline_are_ones_own() {
    let mut both = Both::new(PoolMode::Auto);
    for text in [&b"\0DISCARD ALL\0\0\0"[..], b"\0INSERT INTO t VALUES (1)\0\0\0"] {
        both.client(b'P', text);
        both.client(b'B', b"\0\0\0\0\0\0\0\0");
        both.client(b'E', b"\0\0\0\0\0");
    }
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b'2', b""), (b'C', b"DISCARD ALL\0")]);
    assert_eq!(both.prepared.sequences_of, Some(both.session.stay()));
    both.servers(&[(b'1', b""), (b'2', b""), (b'C', b"INSERT 0 1\0"), READY]);
    both.client(b'Q', b"DISCARD ALL\0");
    both.servers(&[(b'C', b"DISCARD ALL\0"), READY]);
    assert_eq!(both.prepared.sequences_of, None);
    // Also in the same Query, and if that fails in the end.
    for last in [(b'C', &b"INSERT 0 1\0"[..]), ERROR] {
        both.client(b'Q', b"DISCARD SEQUENCES; INSERT INTO t VALUES (1)\0");
        both.servers(&[(b'C', b"DISCARD SEQUENCES\0")]);
        assert_eq!(both.prepared.sequences_of, None);
        both.servers(&[last, READY]);
        assert_eq!(both.prepared.sequences_of.take(), Some(both.session.stay()));
    }
}

/// As soon as one client of a tenant has asked for the state of sequences, all that advance any keep their connection.
#[test]
fn what_one_client_asks_for_others_are_kept_for() {
    let mut both = Both::new(PoolMode::Auto);
    let insert = |both: &mut Both| {
        let sent = both.client(b'Q', b"INSERT INTO t VALUES (1)\0").0;
        // DISCARD SEQUENCES has its own.
        let answers = [(b'C', &b"INSERT 0 1\0"[..]), READY].repeat(sent.len());
        both.servers(&answers);
        sent
    };
    insert(&mut both);
    assert!(!both.session.has_residue() && !both.session.keeps_sequences(&both.prepared));
    both.registry.note_asks();
    both.client(b'Q', b"SELECT 1\0");
    both.servers(&[(b'C', b"SELECT 1\0"), READY]);
    assert!(!both.session.has_residue(), "who only reads is left alone");
    assert_eq!(insert(&mut both), "Q");
    assert!(both.session.has_residue() && both.session.keeps_sequences(&both.prepared));
    assert_eq!(both.session.claim(), Claim::Unused, "it has not asked the first time");
    // What is somebody else's is not there any more when it asks.
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert!(!both.session.keeps_sequences(&both.prepared));
    assert_eq!(insert(&mut both), "QQ");
    assert!(both.session.keeps_sequences(&both.prepared) && !both.prepared.sequences_mixed);
    assert_eq!(both.session.claim(), Claim::New);
    // Whoever asks says so to the others.
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"SELECT lastval()\0");
    both.servers(&[ERROR, READY]);
    assert!(both.registry.asks());
    assert_eq!(both.session.claim(), Claim::Asked);
    insert(&mut both);
    assert_eq!(both.session.claim(), Claim::Due);
    for mode in [PoolMode::Transaction, PoolMode::Session] {
        let mut both = Both::new(mode);
        both.client(b'Q', b"SELECT lastval()\0");
        assert!(!both.registry.asks());
    }
}

/// Nobody knows whether an INSERT has drawn from a sequence: what comes out may be somebody else's.
#[test]
fn a_late_question_is_not_answered_with_what_others_have_left() {
    let said = |both: &mut Both, text: &[u8], status: &[u8]| {
        let sent = both.client(b'Q', text).0;
        both.servers(&[(b'C', &b"SELECT 1\0"[..]), (b'Z', status)].repeat(sent.len()));
        sent
    };
    let others = || {
        let mut both = Both::new(PoolMode::Auto);
        both.prepared.sequences_of = SOMEBODY_ELSE;
        both
    };
    let mut both = others();
    assert_eq!(said(&mut both, b"INSERT INTO t VALUES (1)\0", b"I"), "Q", "costs nothing where nobody asks");
    assert_eq!(said(&mut both, b"SELECT lastval()\0", b"I"), "QQ");
    assert_eq!(said(&mut both, b"INSERT INTO t VALUES (1)\0", b"I"), "Q", "from now on it is its own");
    assert_eq!(said(&mut both, b"SELECT lastval()\0", b"I"), "Q");
    // In the same transaction it is most likely about that.
    let mut both = others();
    assert_eq!(said(&mut both, b"BEGIN\0", b"T"), "Q");
    assert_eq!(said(&mut both, b"INSERT INTO t VALUES (1)\0", b"T"), "Q");
    assert_eq!(said(&mut both, b"SELECT lastval()\0", b"T"), "Q");
    assert_eq!(said(&mut both, b"COMMIT\0", b"I"), "Q");
    assert_eq!(said(&mut both, b"SELECT lastval()\0", b"I"), "QQ");
}

/// What a client did before on another server connection is not what it did last.
#[test]
fn what_a_client_left_where_it_was_before_is_not_its_last() {
    let mut both = Both::new(PoolMode::Auto);
    let insert = |both: &mut Both| {
        both.client(b'Q', b"INSERT INTO t VALUES (1)\0");
        both.servers(&[(b'C', b"INSERT 0 1\0"), READY]);
    };
    insert(&mut both);
    let first = std::mem::take(&mut both.prepared);
    insert(&mut both);
    assert_eq!(both.prepared.sequences_of, Some(both.session.stay()));
    both.prepared = first;
    assert_ne!(both.prepared.sequences_of, Some(both.session.stay()));
    assert_eq!(both.client(b'Q', b"SELECT lastval()\0").0, "QQ");
}

/// A server that still reads the data ignores the Sync; one whose COPY has failed by then answers it.
#[test]
fn a_copy_that_fails_with_a_sync_on_its_way_is_in_doubt() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"COPY t FROM STDIN\0");
    both.servers(&[(b'G', b"\0\0\0")]);
    both.client(b'd', b"bad\n");
    both.client(b'S', b"");
    both.servers(&[ERROR, READY]);
    assert!(both.session.is_in_doubt());
    // A cancel may end it before any data.
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"COPY t FROM STDIN\0");
    both.servers(&[(b'G', b"\0\0\0")]);
    both.client(b'S', b"");
    both.servers(&[ERROR, READY]);
    assert!(both.session.is_in_doubt());
}

#[test]
fn no_other_copy_is_in_doubt() {
    // It ends well.
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"COPY t FROM STDIN\0");
    both.servers(&[(b'G', b"\0\0\0")]);
    for (tag, body) in [(b'd', &b"1\n"[..]), (b'S', b""), (b'd', b"2\n"), (b'c', b"")] {
        both.client(tag, body);
    }
    both.servers(&[(b'C', b"COPY 2\0"), READY]);
    assert!(!both.session.is_in_doubt() && both.session.is_idle());
    // It fails, and nothing was on its way; what fails behind it is another matter.
    both.client(b'Q', b"COPY t FROM STDIN\0");
    both.servers(&[(b'G', b"\0\0\0")]);
    both.client(b'd', b"bad\n");
    both.servers(&[ERROR, READY]);
    both.client(b'c', b"");
    assert!(!both.session.is_in_doubt() && both.session.is_idle());
    // It never begins: both are answered.
    both.client(b'Q', b"COPY no_such_table FROM STDIN\0");
    both.client(b'd', b"1\n");
    both.client(b'S', b"");
    both.servers(&[ERROR, READY, READY]);
    assert!(!both.session.is_in_doubt() && both.session.is_idle());
}

/// Whoever sends messages that are answered here, behind a statement that takes long, would fill the memory.
#[test]
fn a_client_waits_while_too_much_is_owed_to_it() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"SELECT pg_sleep(3600)\0");
    let close = message(b'C', b"Sx\0");
    let header = frame::header(&close).unwrap().unwrap();
    let mut sent = 0;
    while !both.session.must_wait(header, &close) {
        assert_eq!(both.client(b'C', b"Sx\0"), (String::new(), String::new()));
        sent += 1;
        assert!(sent < 100_000);
    }
    // The server may keep its answers until it is asked for them, once.
    assert!(both.session.must_flush() && !both.session.must_flush());
    let answers = both.servers(&[(b'C', b"SELECT 1\0"), READY]);
    assert_eq!(answers, format!("CZ{}", "3".repeat(sent)));
    assert!(!both.session.must_wait(header, &close));
}

/// EXECUTE is answered by the tag of what it has run.
#[test]
fn what_follows_an_execute_is_carried_out() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"a\0SELECT 1\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), READY]);
    both.client(b'Q', b"EXECUTE a; DEALLOCATE a\0");
    both.servers(&[(b'C', b"SELECT 1\0"), (b'C', b"DEALLOCATE\0"), READY]);
    assert!(both.session.named.values().next().is_none() && both.prepared.count() == 0);
    both.client(b'Q', b"PREPARE q AS SELECT 1; EXECUTE q; DEALLOCATE q\0");
    both.servers(&[(b'C', b"PREPARE\0"), (b'C', b"SELECT 1\0"), (b'C', b"DEALLOCATE\0"), READY]);
    assert!(both.session.by_sql.is_empty());
}

#[test]
fn a_farewell_is_for_the_client_whatever_it_interrupts() {
    let mut both = Both::new(PoolMode::Auto);
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert_eq!(both.client(b'Q', b"SELECT lastval()\0").0, "QQ");
    let farewell = (b'E', &b"SFATAL\0VFATAL\0C57P01\0Mterminating connection\0\0"[..]);
    assert_eq!(both.servers(&[farewell]), "E");
}

/// What a transaction is has to be said before anything else is done in it, also by us.
#[test]
fn nothing_of_ours_goes_before_what_has_to_come_first_in_a_transaction() {
    let mut both = Both::new(PoolMode::Auto);
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert_eq!(both.client(b'Q', b"START TRANSACTION ISOLATION LEVEL SERIALIZABLE; DO ''\0").0, "Q");
    let mut both = Both::new(PoolMode::Auto);
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert_eq!(both.client(b'Q', b"START TRANSACTION; DO ''\0").0, "QQ");
}

/// In the client's own group a statement of ours would be one beside which `CREATE INDEX CONCURRENTLY` is refused.
#[test]
fn what_others_did_to_sequences_is_forgotten_before_the_group_begins() {
    let create = b"\0CREATE INDEX CONCURRENTLY i ON t (f(x))\0\0\0";
    let named = [&b"a"[..], create].concat();
    let mut both = Both::new(PoolMode::Auto);
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert_eq!(both.client(b'P', create).0, "CPBECCS");
    assert_eq!(both.client(b'P', create).0, "P");
    assert_eq!(both.client(b'B', b"\0\0\0\0\0\0\0\0").0, "B");
    both.client(b'S', b"");
    let step = [(b'3', &b""[..]), (b'1', b""), (b'2', b""), (b'C', b"DISCARD SEQUENCES\0"), (b'3', b""), (b'3', b"")];
    assert_eq!(both.servers(&step), "");
    assert_eq!(both.servers(&[READY, (b'1', b""), (b'2', b""), READY]), "12Z");
    assert_eq!(both.prepared.sequences_of, Some(both.session.stay()));
    // Prepared before.
    both.client(b'P', &named);
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), READY]);
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "CPBECCS");
    assert_eq!(both.client(b'B', b"\0a\0\0\0\0\0\0\0").0, "B");
}

/// A Close does not count, whether it is for the server or not, and whatever is closed.
#[test]
fn a_group_that_begins_with_a_close_has_not_begun() {
    let create = b"\0CREATE INDEX CONCURRENTLY i ON t (f(x))\0\0\0";
    let step = [(b'3', &b""[..]), (b'1', b""), (b'2', b""), (b'C', b"DISCARD SEQUENCES\0"), (b'3', b""), (b'3', b"")];
    for (close, to_server, answer) in [(&b"Sa\0"[..], "", "3"), (b"S\0", "C", ""), (b"P\0", "C", "")] {
        let mut both = Both::new(PoolMode::Auto);
        both.client(b'P', b"a\0SELECT 1\0\0\0");
        both.client(b'S', b"");
        both.servers(&[(b'1', b""), READY]);
        both.prepared.sequences_of = SOMEBODY_ELSE;
        assert_eq!(both.client(b'C', close), (to_server.into(), answer.into()));
        assert_eq!(both.client(b'P', create).0, "CPBECCS");
        if !to_server.is_empty() {
            assert_eq!(both.server(b'3', b""), Ok("3".into()));
        }
        assert_eq!(both.servers(&step) + &both.servers(&[READY]), "");
        assert_eq!(both.client(b'P', create).0, "P");
        both.client(b'S', b"");
        assert_eq!(both.servers(&[(b'1', b""), READY]), "1Z");
        // Behind anything else it is too late.
        both.prepared.sequences_of = SOMEBODY_ELSE;
        both.client(b'P', b"\0SELECT 1\0\0\0");
        both.client(b'C', b"P\0");
        assert_eq!(both.client(b'P', create).0, "P");
    }
}

/// RowDescription of columns with these names and types.
fn columns(of: &[(&str, u8)], table: u8) -> Vec<u8> {
    let mut body = vec![0, u8::try_from(of.len()).unwrap()];
    for (name, kind) in of {
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&[0, 0, 0, 0, table, 0, 1, 0, 0, 0, *kind, 0, 4, 255, 255, 255, 255, 0, 0]);
    }
    body
}

#[test]
fn what_a_statement_returns_is_asked_where_it_is_prepared_anew() {
    let told = columns(&[("a", 23)], 1);
    for (there, expected) in [
        (columns(&[("a", 23)], 2), "BES"),
        (columns(&[("a", 23), ("b", 23)], 1), "PES"),
        (columns(&[("a", 25)], 1), "PES"),
        (columns(&[("b", 23)], 1), "PES"),
        (vec![0, 9, b'x'], "PES"),
    ] {
        let mut both = Both::new(PoolMode::Auto);
        both.client(b'P', b"s\0SELECT * FROM t\0\0\0");
        both.client(b'D', b"Ss\0");
        both.client(b'S', b"");
        assert_eq!(both.servers(&[(b'1', b""), (b't', b"\0\0"), (b'T', &told), READY]), "1tTZ");
        // Where it is known to be what it was nothing is asked.
        both.client(b'B', b"\0s\0\0\0\0\0\0\0");
        assert_eq!(both.client(b'E', b"\0\0\0\0\0").0, "E");
        both.client(b'S', b"");
        assert_eq!(both.servers(&[(b'2', b""), (b'D', b"\0\0"), (b'C', b"SELECT 1\0"), READY]), "2DCZ");
        // Another server connection.
        both.prepared = Prepared::default();
        let bind = b"\0s\0\0\0\0\0\0\0";
        assert_eq!(both.client(b'B', bind).0, "PDH");
        assert_eq!(both.client(b'B', bind).0, "", "it waits");
        assert_eq!(both.servers(&[(b'1', b""), (b't', b"\0\0"), (b'T', &there)]), "");
        let sent: String = [(b'B', &bind[..]), (b'E', b"\0\0\0\0\0"), (b'S', b"")]
            .into_iter()
            .map(|(tag, body)| both.client(tag, body).0)
            .collect();
        assert_eq!(sent, expected);
        let answers: &[(u8, &[u8])] =
            if expected == "BES" { &[(b'2', b""), (b'C', b"SELECT 0\0"), READY] } else { &[ERROR, READY] };
        let got = both.servers(answers);
        assert_eq!(got, if expected == "BES" { "2CZ" } else { "EZ" });
        assert!(both.session.is_idle());
    }
}

#[test]
fn what_cannot_be_prepared_anew_fails_the_bind_that_waits_for_it() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"s\0SELECT * FROM t\0\0\0");
    both.client(b'D', b"Ss\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), (b't', b"\0\0"), (b'n', b""), READY]);
    both.prepared = Prepared::default();
    let bind = b"\0s\0\0\0\0\0\0\0";
    assert_eq!(both.client(b'B', bind).0, "PDH");
    assert_eq!(both.server(b'E', ERROR.1).unwrap(), "E");
    assert_eq!(both.client(b'B', bind).0, "");
    assert_eq!(both.client(b'E', b"\0\0\0\0\0").0, "");
    assert_eq!(both.client(b'S', b"").0, "S");
    assert_eq!(both.servers(&[READY]), "Z");
    assert!(both.session.is_idle());
}

#[test]
fn a_stream_beside_others_begins_under_a_name_of_ours() {
    let mut both = Both::new(PoolMode::Session);
    both.session = Session::new(1, PoolMode::Session, 2).with_replication(Some("ours".into()));
    let start = b"START_REPLICATION SLOT s LOGICAL 0/0\0";
    let query = |tag| frame::header(&message(tag, b"x\0")).unwrap().unwrap();
    for (answers, sent) in [(&[(b'C', &b"SET\0"[..]), READY][..], "Q"), (&[ERROR, READY], "Q")] {
        // The name goes ahead, and everything waits for what comes of it.
        assert_eq!(both.client(b'Q', start), ("Q".into(), String::new()));
        assert!(both.session.must_wait(query(b'Q'), b"") && both.session.must_wait(query(b'd'), b""));
        assert_eq!(both.servers(answers), "");
        assert_eq!(both.client(b'Q', start), (sent.into(), String::new()));
        // The second time it was refused, with the server's words.
        let end: &[(u8, &[u8])] = if answers[0].0 == b'E' { &[ERROR, READY] } else { &[(b'W', b""), ERROR, READY] };
        assert!(both.servers(end).ends_with("EZ"));
        assert!(both.session.is_idle());
    }
    assert_eq!(both.client(b'Q', b"BASE_BACKUP\0").0, "Q");
    assert_eq!(both.servers(&[ERROR, READY]), "EZ");
    assert_eq!(both.client(b'Q', b"DROP_REPLICATION_SLOT s\0").0, "Q");
    assert_eq!(both.servers(&[(b'C', b"CALL\0"), READY]), "CZ");
    assert!(both.session.is_idle());
}

#[test]
fn a_stream_beside_others_takes_status_updates_only() {
    let mut both = Both::new(PoolMode::Session);
    both.session = Session::new(1, PoolMode::Session, 2).with_replication(Some("ours".into()));
    let says = |both: &mut Both, body: &[u8]| {
        let frame = message(b'd', body);
        let header = frame::header(&frame).unwrap().unwrap();
        let needed = both.session.needs(header, &frame, 8192, 8192).unwrap();
        let mut link = Link { prepared: &mut both.prepared, registry: &both.registry, ward: &Guard };
        both.session.on_client(header, &frame[..needed], &mut link, &mut BytesMut::new()).map_err(|e| e.code)
    };
    assert_eq!(says(&mut both, b"h"), Ok(Verdict::Forward), "nobody listens");
    both.client(b'Q', b"COPY t FROM STDIN\0");
    both.servers(&[(b'G', b"")]);
    assert_eq!(says(&mut both, b"h"), Ok(Verdict::Forward), "data");
    both.client(b'c', b"");
    both.servers(&[(b'C', b"COPY 1\0"), READY]);
    both.client(b'Q', b"START_REPLICATION SLOT s LOGICAL 0/0\0");
    both.servers(&[(b'C', b"SET\0"), READY]);
    both.client(b'Q', b"START_REPLICATION SLOT s LOGICAL 0/0\0");
    for begun in [false, true] {
        if begun {
            both.servers(&[(b'W', b"")]);
        }
        assert_eq!(says(&mut both, b"r1"), Ok(Verdict::Forward));
        assert_eq!(says(&mut both, b"h1").unwrap_err(), "42501");
        assert_eq!(says(&mut both, b"").unwrap_err(), "42501");
    }
}

#[test]
fn the_unnamed_statement_outlives_a_refused_function_call() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'P', b"\0SELECT 1\0\0\0");
    both.client(b'S', b"");
    both.servers(&[(b'1', b""), READY]);
    // The Query that the server is given to refuse takes away what it has.
    assert_eq!(both.client(b'F', b"\0\0\0\x01\0\0\0\0\0\0"), ("Q".to_owned(), String::new()));
    both.servers(&[ERROR, READY]);
    assert_eq!(both.client(b'B', b"\0\0\0\0\0\0\0\0").0, "PB");
}

#[test]
fn a_discard_of_ours_that_failed_is_not_taken_for_done() {
    let mut both = Both::new(PoolMode::Auto);
    both.client(b'Q', b"SELECT currval('s')\0");
    both.servers(&[(b'C', b"SELECT 1\0"), READY]);
    both.prepared.sequences_of = SOMEBODY_ELSE;
    assert_eq!(both.client(b'P', b"\0SELECT nextval('s')\0\0\0").0, "CPBECCS");
    assert!(!both.session.owes_ready_to_client() && both.session.owes_ready());
    both.client(b'P', b"\0SELECT nextval('s')\0\0\0");
    both.client(b'B', b"\0\0\0\0\0\0\0\0");
    both.client(b'S', b"");
    // Cancelled, by somebody who meant the statement before.
    assert_eq!(both.servers(&[(b'3', b""), ERROR, READY]), "");
    both.servers(&[(b'1', b""), (b'2', b""), READY]);
    assert_eq!(both.client(b'Q', b"SELECT currval('s')\0").0, "QQ", "it is done now");
    assert_eq!(both.servers(&[ERROR, READY]), "");
    both.servers(&[(b'C', b"SELECT 1\0"), READY]);
    assert_eq!(both.client(b'Q', b"SELECT currval('s')\0").0, "QQ");
    both.servers(&[(b'C', b"DISCARD SEQUENCES\0"), READY, (b'C', b"SELECT 1\0"), READY]);
    assert_eq!(both.client(b'Q', b"SELECT currval('s')\0").0, "Q");
}
