//! Drives the front side's state machines over a socket: TLS, startup packet, authentication.
//!
//! The caller sets one deadline over all of it. Before authentication a client can make the proxy read at most
//! [`MAX_STARTUP_BYTES`](crate::wire::MAX_STARTUP_BYTES) of startup packets and [`MAX_AUTH_BYTES`] of answers.

use std::sync::Arc;

use bytes::{Buf as _, BytesMut};

use super::auth::{Exchange, Step as AuthStep};
use super::handshake::{Handshake, Step, TlsPolicy};
use super::tls::Accepting;
use crate::error::{PgError, sqlstate};
use crate::stream::Stream;
use crate::wire::frame::{self, HEADER};
use crate::wire::message::{self, SaslInitialResponse};
use crate::wire::startup::{CancelRequest, StartupMessage};
use crate::wire::{Version, frontend};

/// Most bytes of a client's messages during authentication.
pub const MAX_AUTH_BYTES: usize = 8192;

/// As much as is read at once during a login, longer than nearly any of its messages (bytes).
const READ: usize = 1024;

/// What a client wants.
pub enum Opened {
    /// A session.
    Session(Box<Opening>),
    /// Another connection's query cancelled; it takes the end of the stream for the sign that this was done.
    Cancel(Stream, CancelRequest),
    /// Nothing: it went away, or was told why not.
    Nothing,
}

/// A client that has sent its startup packet.
pub struct Opening {
    /// Its socket.
    pub stream: Stream,
    /// Bytes read behind the startup packet.
    pub input: BytesMut,
    /// What it said.
    pub startup: StartupMessage,
    /// The TLS server name that it asked for.
    pub sni: Option<String>,
    /// Channel binding data of the certificate it was shown.
    pub end_point: Option<Vec<u8>>,
}

/// Why a login went no further.
#[derive(Debug)]
pub enum Refused {
    /// The client went away.
    Gone,
    /// The client is to be told this.
    Told(PgError),
}

impl From<std::io::Error> for Refused {
    fn from(_: std::io::Error) -> Self {
        Self::Gone
    }
}

impl From<PgError> for Refused {
    fn from(error: PgError) -> Self {
        Self::Told(error)
    }
}

/// Reads up to the startup packet. Not cancel safe.
pub async fn open(mut stream: Stream, tls: Option<Arc<Accepting>>) -> Opened {
    let policy = match &tls {
        None => TlsPolicy::Unavailable,
        Some(tls) if tls.required => TlsPolicy::Required,
        Some(_) => TlsPolicy::Available,
    };
    let mut handshake = Handshake::new(policy);
    let mut input = BytesMut::new();
    loop {
        let step = handshake.feed(&mut input);
        let refused = match step {
            Step::NeedMore => match read_more(&mut stream, &mut input, handshake.budget()).await {
                Ok(0) | Err(_) => return Opened::Nothing,
                Ok(_) => continue,
            },
            Step::Reply(byte) => match stream.send_all(&[byte]).await {
                Ok(()) => continue,
                Err(_) => return Opened::Nothing,
            },
            Step::StartTls { reply } => {
                let Some(tls) = &tls else { return Opened::Nothing };
                match start_tls(stream, &mut input, reply, tls).await {
                    Some(up) => stream = up,
                    None => return Opened::Nothing,
                }
                let alpn = stream.tls_session().and_then(|session| session.alpn_protocol());
                handshake.tls_established(alpn).err()
            }
            Step::Session(startup) => {
                let sni = stream.tls_session().and_then(|session| session.server_name()).map(str::to_owned);
                let end_point = tls.filter(|_| stream.is_tls()).and_then(|tls| tls.end_point.clone());
                return Opened::Session(Box::new(Opening { stream, input, startup, sni, end_point }));
            }
            Step::Cancel(cancel) => return Opened::Cancel(stream, cancel),
            Step::Leave => return Opened::Nothing,
            Step::Refuse(error) => Some(error),
        };
        if let Some(error) = refused {
            say(&mut stream, &error).await;
            return Opened::Nothing;
        }
    }
}

async fn start_tls(mut stream: Stream, input: &mut BytesMut, reply: Option<u8>, tls: &Accepting) -> Option<Stream> {
    if let Some(byte) = reply {
        stream.send_all(&[byte]).await.ok()?;
    }
    let early = input.split().to_vec();
    match stream.accept_tls(tls.config.clone(), early).await {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::debug!(%error, "TLS handshake with client failed");
            None
        }
    }
}

async fn read_more(stream: &mut Stream, input: &mut BytesMut, limit: usize) -> std::io::Result<usize> {
    stream.read_some(input, limit.saturating_sub(input.len()).min(READ)).await
}

/// Tells a client why it is turned away. Errors are of no interest: it is going anyway.
pub async fn say(stream: &mut Stream, error: &PgError) {
    let mut out = BytesMut::new();
    message::error_response(&mut out, error);
    if stream.send_all(&out).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}

impl Opening {
    /// Tells a client with a newer protocol what we speak, before anything else is said.
    pub fn negotiate(&self, out: &mut BytesMut) {
        if self.startup.needs_negotiation() {
            message::negotiate_protocol_version(out, Version::V3_2, &self.startup.protocol_options);
        }
    }

    /// Has the client prove who it is. What has to be sent before the greeting is appended to `out`. Not cancel safe.
    ///
    /// # Errors
    /// The client went away, or is to be told what was wrong.
    pub async fn authenticate(&mut self, mut exchange: Exchange, out: &mut BytesMut) -> Result<(), Refused> {
        message::authentication_sasl(out, exchange.mechanisms());
        let mut taken = 0;
        let mut first = true;
        loop {
            self.stream.send_all(out).await?;
            out.clear();
            let body = self.password_message(&mut taken).await?;
            let step = if first {
                let response = SaslInitialResponse::read(&body).map_err(PgError::from)?;
                exchange.initial(&response)
            } else {
                exchange.respond(&body)
            };
            first = false;
            match step {
                AuthStep::Continue(data) => message::authentication_sasl_continue(out, &data),
                AuthStep::Done(data) => {
                    message::authentication_sasl_final(out, &data);
                    return Ok(());
                }
                AuthStep::Fail(error) => return Err(Refused::Told(error)),
            }
        }
    }

    /// The body of the next message, which has to be a password message.
    async fn password_message(&mut self, taken: &mut usize) -> Result<BytesMut, Refused> {
        let violation = |text: &str| Refused::Told(PgError::fatal(sqlstate::PROTOCOL_VIOLATION, text));
        loop {
            if let Some(header) = frame::header(&self.input).map_err(|_| violation("invalid message length"))? {
                if header.tag != frontend::PASSWORD {
                    return Err(violation("expected password response"));
                }
                if *taken + header.total > MAX_AUTH_BYTES {
                    return Err(violation("too many bytes before authentication"));
                }
                if self.input.len() >= header.total {
                    *taken += header.total;
                    let mut frame = self.input.split_to(header.total);
                    frame.advance(HEADER);
                    return Ok(frame);
                }
            }
            if read_more(&mut self.stream, &mut self.input, MAX_AUTH_BYTES).await? == 0 {
                return Err(Refused::Gone);
            }
        }
    }
}
