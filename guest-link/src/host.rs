//! The host's side: greets until the guest answers, then is a byte stream.
//!
//! No task of its own: the link reads and writes the channel when it is polled, so backpressure is the channel's. Dropping it
//! closes the channel, which the guest sees as a hang-up.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::{Instant, MissedTickBehavior},
};

use crate::frame::{self, Decoder, Epoch, Frame, Kind};

/// Between two greetings.
pub const GREETING_INTERVAL: Duration = Duration::from_millis(5);

/// Every so many greetings one has padding before it.
const PADDED_EVERY: u32 = 4;

/// Written-but-unsent bytes above this make a writer wait.
const OUT_LIMIT: usize = 2 * frame::MAX_FRAME;

/// Most bytes before the answer to a greeting. What a guest still has to say in an epoch before is far less: buffers on the way are bounded.
pub const MOST_BEFORE_ANSWER: u64 = 64 << 20;

/// Most bytes of frames that are no use to a live link: a late answer to a repeated greeting, what is left of an epoch before.
pub const MOST_USELESS: u64 = 1 << 20;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Nobody answered in time. The guest still boots, hangs, or runs no envd.
    #[error("the guest did not answer {greetings} greetings within {waited:?}")]
    NoAnswer {
        /// How many were sent.
        greetings: u32,
        /// How long that took.
        waited: Duration,
    },
    /// The guest sends and sends, and no answer is among it.
    #[error(
        "the guest sent {bytes} bytes and no answer to {greetings} greetings: it floods its channel"
    )]
    Flooded {
        /// How many greetings were sent.
        greetings: u32,
        /// How many bytes came.
        bytes: u64,
    },
    /// The channel ended: the VMM closed it or is gone.
    #[error("the VMM closed the guest's channel")]
    Closed,
    /// The channel failed.
    #[error("the guest's channel failed: {0}")]
    Channel(#[from] io::Error),
}

/// Starts a new epoch over `channel` and waits for the guest to take it, until `deadline`.
///
/// Whatever the channel still holds of epochs before is dropped.
pub async fn connect<S>(channel: S, deadline: Instant) -> Result<Link<S>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let started = Instant::now();
    let mut greeter = Greeter {
        channel,
        decoder: Decoder::new(),
        epoch: Epoch::random(),
        out: BytesMut::new(),
        greetings: 0,
        received: 0,
    };
    match tokio::time::timeout_at(deadline, greeter.greet()).await {
        Ok(answer) => answer?,
        Err(_) => {
            return Err(ConnectError::NoAnswer {
                greetings: greeter.greetings,
                waited: started.elapsed(),
            });
        }
    }
    Ok(Link {
        channel: greeter.channel,
        skipped: greeter.decoder.skipped(),
        useless: 0,
        decoder: greeter.decoder,
        epoch: greeter.epoch,
        // A greeting cut in half has to be completed, or the first data frame would be taken for its end.
        out: greeter.out,
        reading: Reading::Open(Bytes::new()),
        writing: Writing::Open,
        next_in: 0,
        next_out: 0,
    })
}

struct Greeter<S> {
    channel: S,
    decoder: Decoder,
    epoch: Epoch,
    out: BytesMut,
    greetings: u32,
    received: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Greeter<S> {
    async fn greet(&mut self) -> Result<(), ConnectError> {
        let mut tick = tokio::time::interval(GREETING_INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut reader, mut writer) = tokio::io::split(&mut self.channel);
        loop {
            tokio::select! {
                // Only into an empty buffer: a guest that does not read yet must not make us hoard greetings.
                _ = tick.tick(), if self.out.is_empty() => {
                    if self.greetings % PADDED_EVERY == 1 {
                        frame::put_padding(&mut self.out);
                    }
                    frame::put_control(&mut self.out, Kind::Hello, self.epoch, 0);
                    self.greetings += 1;
                }
                sent = writer.write_buf(&mut self.out), if !self.out.is_empty() => {
                    if sent? == 0 {
                        return Err(ConnectError::Closed);
                    }
                }
                read = reader.read_buf(self.decoder.space()) => {
                    let read = read?;
                    if read == 0 {
                        return Err(ConnectError::Closed);
                    }
                    self.received += read as u64;
                    while let Some(frame) = self.decoder.next_frame() {
                        if frame.epoch == self.epoch && frame.kind == Kind::HelloAck {
                            return Ok(());
                        }
                    }
                    if self.received > MOST_BEFORE_ANSWER {
                        let (greetings, bytes) = (self.greetings, self.received);
                        return Err(ConnectError::Flooded { greetings, bytes });
                    }
                }
            }
        }
    }
}

#[derive(Debug)]
enum Reading {
    /// Bytes of the current frame not yet taken.
    Open(Bytes),
    /// The guest sent END.
    Ended,
    /// Over for a reason, told once more at every read.
    Broken(io::ErrorKind, &'static str),
}

#[derive(Debug, PartialEq, Eq)]
enum Writing {
    Open,
    Ended,
}

/// One epoch, as a byte stream.
#[derive(Debug)]
pub struct Link<S> {
    channel: S,
    decoder: Decoder,
    /// Bytes the decoder had skipped when the guest answered; it never skips another, since the guest cuts no frame.
    skipped: u64,
    /// Bytes of frames nobody wants.
    useless: u64,
    epoch: Epoch,
    out: BytesMut,
    reading: Reading,
    writing: Writing,
    next_in: u32,
    next_out: u32,
}

impl<S> Link<S> {
    /// Which epoch this is, for logs.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    fn fail(&mut self, why: &'static str) {
        self.reading = Reading::Broken(io::ErrorKind::InvalidData, why);
    }

    /// What a frame of the channel does to the reading side.
    fn take(&mut self, frame: Frame) {
        if frame.epoch != self.epoch || matches!(frame.kind, Kind::Hello | Kind::HelloAck) {
            self.useless += (frame::HEADER + frame.payload.len() + frame::TRAILER) as u64;
            if self.useless > MOST_USELESS {
                self.fail("the guest floods its link with frames of another epoch");
            }
            return;
        }
        match frame.kind {
            Kind::Data | Kind::End if frame.sequence != self.next_in => {
                self.fail("the guest link lost a frame");
            }
            Kind::Data => {
                self.next_in = self.next_in.wrapping_add(1);
                self.reading = Reading::Open(frame.payload);
            }
            Kind::End => self.reading = Reading::Ended,
            Kind::Reset => {
                self.reading =
                    Reading::Broken(io::ErrorKind::ConnectionReset, "guest reset the link");
            }
            // Answers to repeated greetings are dropped above; greetings only go the other way.
            Kind::HelloAck | Kind::Hello => {}
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Link<S> {
    fn poll_drain(&mut self, cx: &mut Context<'_>, until: usize) -> Poll<io::Result<()>> {
        while self.out.len() > until {
            let sent = ready!(Pin::new(&mut self.channel).poll_write(cx, &self.out))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(sent);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Link<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            match &mut this.reading {
                Reading::Open(left) if left.has_remaining() => {
                    let taken = left.split_to(left.len().min(into.remaining()));
                    into.put_slice(&taken);
                    return Poll::Ready(Ok(()));
                }
                Reading::Open(_) => {}
                Reading::Ended => return Poll::Ready(Ok(())),
                Reading::Broken(kind, why) => return Poll::Ready(Err(io::Error::new(*kind, *why))),
            }
            let frame = this.decoder.next_frame();
            if this.decoder.skipped() != this.skipped {
                this.fail("the guest sent bytes that are no frame");
                continue;
            }
            if let Some(frame) = frame {
                this.take(frame);
                continue;
            }
            let read = std::pin::pin!(this.channel.read_buf(this.decoder.space()));
            if ready!(read.poll(cx))? == 0 {
                this.reading =
                    Reading::Broken(io::ErrorKind::UnexpectedEof, "the VMM closed the channel");
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Link<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.writing == Writing::Ended {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.poll_drain(cx, OUT_LIMIT))?;
        if slices.iter().all(|slice| slice.is_empty()) {
            return Poll::Ready(Ok(0));
        }
        let taken = frame::put_data(&mut this.out, this.epoch, this.next_out, slices);
        this.next_out = this.next_out.wrapping_add(1);
        // Get going; that the channel has no room now is the next call's matter.
        if let Poll::Ready(Err(error)) = this.poll_drain(cx, 0) {
            return Poll::Ready(Err(error));
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_drain(cx, 0))?;
        Pin::new(&mut this.channel).poll_flush(cx)
    }

    /// Ends this direction only: what the guest still sends can be read.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.writing == Writing::Open {
            frame::put_control(&mut this.out, Kind::End, this.epoch, this.next_out);
            this.writing = Writing::Ended;
        }
        self.poll_flush(cx)
    }
}
