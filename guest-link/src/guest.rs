//! The guest's side: answers greetings, gives one link per epoch.
//!
//! ```text
//!            Channel::connected                HELLO with another epoch
//!   [no host] -------------> [connected] ----------------------------------> [epoch]
//!       ^                        |                                              |
//!       +------------------------+--------------- hang-up ----------------------+
//! ```
//! A [`Listener`] owns one task that drives the channel. What arrives for the live epoch goes into its [`Link`], what the link
//! is given goes out in frames; both through a pipe of [`BUFFER`] bytes, so neither side can make the other hoard. A hang-up or
//! a new epoch drops the pipe: the old link reads the end of the stream, and its writes fail.
//!
//! The reader of a link is expected to keep reading, as HTTP/2 does: while its pipe is full, nothing behind it is seen, greetings
//! included. One that stops for [`STALLED`] loses its link.

pub mod unix;
pub mod vport;
pub mod vsock;

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf,
        ReadHalf, WriteHalf,
    },
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use crate::frame::{self, Decoder, Epoch, Frame, Kind};

/// Bytes between the channel and a link, per direction.
pub const BUFFER: usize = 256 * 1024;

/// A link whose reader takes nothing for so long is reset.
pub const STALLED: Duration = Duration::from_secs(30);

/// Between two tries at a channel that fails.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Answers waiting for the channel's writer; more make the reader wait.
const ANSWERS: usize = 16;

/// A byte channel to the host that can be lost and found again.
pub trait Channel: Send + 'static {
    /// The channel as long as the same host may be there: reads end when it may have gone.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send;

    /// The stream, if a host is there right now. The one before has been dropped.
    fn connected(&mut self) -> io::Result<Option<Self::Stream>>;

    /// Waits until a host may be there.
    fn wait(&mut self) -> impl Future<Output = io::Result<()>> + Send;
}

/// Gives a link per epoch.
#[derive(Debug)]
pub struct Listener {
    newest: Arc<Newest>,
    pump: JoinHandle<()>,
}

impl Listener {
    /// Starts driving the channel.
    pub fn new<C: Channel>(channel: C) -> Self {
        Self::after(channel, None)
    }

    /// Starts driving a channel in place of a listener that died, whose last epoch this was: its host is told that it is over.
    pub fn after<C: Channel>(channel: C, last: Option<Epoch>) -> Self {
        let mut unsent = BytesMut::new();
        if let Some(last) = last {
            frame::put_control(&mut unsent, Kind::Reset, last, 0);
        }
        let newest = Arc::new(Newest::default());
        let (answers, asked) = mpsc::channel(ANSWERS);
        let pump = Pump {
            channel,
            inbound: Inbound {
                answers,
                newest: Arc::clone(&newest),
                decoder: Decoder::new(),
                live: None,
                last_epoch: None,
            },
            outbound: Outbound {
                asked,
                bytes: BytesMut::with_capacity(frame::MAX_PAYLOAD),
                unsent,
                live: None,
                next: 0,
            },
        };
        Self {
            newest,
            pump: tokio::spawn(pump.run()),
        }
    }

    /// The next epoch. One that came and went without being accepted is not seen.
    pub async fn accept(&mut self) -> Link {
        loop {
            let woken = self.newest.arrived.notified();
            if let Some(link) = self.newest.take() {
                return link;
            }
            woken.await;
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

/// The link nobody accepted yet; a newer one takes its place.
#[derive(Debug, Default)]
struct Newest {
    link: Mutex<Option<Link>>,
    arrived: Notify,
}

impl Newest {
    fn take(&self) -> Option<Link> {
        self.link
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn put(&self, link: Link) {
        *self.link.lock().unwrap_or_else(PoisonError::into_inner) = Some(link);
        self.arrived.notify_one();
    }
}

/// One epoch, as a byte stream.
#[derive(Debug)]
pub struct Link {
    pipe: DuplexStream,
    epoch: Epoch,
}

impl Link {
    /// Which epoch this is, for logs.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }
}

impl AsyncRead for Link {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_read(cx, into)
    }
}

impl AsyncWrite for Link {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.pipe.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}

/// What the reading half asks of the writing half.
enum Answer {
    /// Tell the host that its epoch is taken, once more.
    Ack(Epoch),
    /// A new epoch: answer, then send what its link is given.
    Begin(Epoch, ReadHalf<DuplexStream>),
    /// The host is told that its epoch is over.
    Reset(Epoch),
}

/// Drives the channel, over all its connections.
struct Pump<C> {
    channel: C,
    inbound: Inbound,
    outbound: Outbound,
}

impl<C: Channel> Pump<C> {
    async fn run(mut self) {
        loop {
            match self.channel.connected() {
                // An epoch outlives its stream if the host is there, since it may be the epoch's and not a later one.
                Ok(Some(stream)) => self.drive(stream).await,
                Ok(None) => {
                    self.hang_up();
                    if self.channel.wait().await.is_err() {
                        tokio::time::sleep(RETRY_INTERVAL).await;
                    }
                }
                // Nobody above can do better than try again.
                Err(_) => {
                    self.hang_up();
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    async fn drive(&mut self, stream: C::Stream) {
        let (from_host, to_host) = tokio::io::split(stream);
        tokio::select! {
            // The usual end, also of a failed read. Nothing is lost in the other half: it keeps its state.
            _ = self.inbound.run(from_host) => {}
            // The channel failed, perhaps in the middle of a delivery.
            _ = self.outbound.run(to_host) => self.hang_up(),
        }
    }

    /// Ends the epoch, if there is one: its link reads the end of the stream.
    fn hang_up(&mut self) {
        self.inbound.live = None;
        self.inbound.decoder = Decoder::new();
        self.outbound.live = None;
    }
}

/// The live epoch, as the reading half sees it.
struct Live {
    /// `None` once the host ended its direction.
    to_link: Option<WriteHalf<DuplexStream>>,
    next: u32,
}

/// Channel to link.
struct Inbound {
    answers: mpsc::Sender<Answer>,
    newest: Arc<Newest>,
    decoder: Decoder,
    live: Option<Live>,
    /// A repeated greeting of an epoch that is over must not begin it anew.
    last_epoch: Option<Epoch>,
}

impl Inbound {
    async fn run(&mut self, mut from_host: impl AsyncRead + Unpin) -> io::Result<()> {
        while from_host.read_buf(self.decoder.space()).await? > 0 {
            while let Some(frame) = self.decoder.next_frame() {
                if let Some(answer) = self.take(frame).await
                    && self.answers.send(answer).await.is_err()
                {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    async fn take(&mut self, frame: Frame) -> Option<Answer> {
        if frame.kind == Kind::Hello && self.last_epoch != Some(frame.epoch) {
            return Some(self.begin(frame.epoch));
        }
        if self.last_epoch != Some(frame.epoch) {
            // Whoever believes in an epoch that began before us must hear that it is over; of others it knows itself.
            let is_before = self.last_epoch.is_none() && frame.kind != Kind::Reset;
            return is_before.then_some(Answer::Reset(frame.epoch));
        }
        let Some(live) = &mut self.live else {
            // Of an epoch that is over, also if a late greeting asks for it again.
            return (frame.kind != Kind::Reset).then_some(Answer::Reset(frame.epoch));
        };
        match frame.kind {
            Kind::Hello => Some(Answer::Ack(frame.epoch)),
            Kind::HelloAck => None,
            // The answer also makes the writing half let go of the link.
            Kind::Reset => {
                self.live = None;
                Some(Answer::Reset(frame.epoch))
            }
            Kind::Data | Kind::End if frame.sequence != live.next => {
                self.live = None;
                Some(Answer::Reset(frame.epoch))
            }
            Kind::End => {
                if let Some(mut pipe) = live.to_link.take() {
                    // Fails only if the link is gone, which is an end as well.
                    let _ = pipe.shutdown().await;
                }
                None
            }
            Kind::Data => {
                live.next = live.next.wrapping_add(1);
                let given = match &mut live.to_link {
                    Some(pipe) => {
                        tokio::time::timeout(STALLED, pipe.write_all(&frame.payload)).await
                    }
                    None => Ok(Err(io::ErrorKind::BrokenPipe.into())),
                };
                if matches!(given, Ok(Ok(()))) {
                    return None;
                }
                self.live = None;
                Some(Answer::Reset(frame.epoch))
            }
        }
    }

    fn begin(&mut self, epoch: Epoch) -> Answer {
        let (ours, pipe) = tokio::io::duplex(BUFFER);
        let (from_link, to_link) = tokio::io::split(ours);
        self.last_epoch = Some(epoch);
        // The half of the epoch before goes with this; the writing half drops the other when it begins.
        self.live = Some(Live {
            to_link: Some(to_link),
            next: 0,
        });
        self.newest.put(Link { pipe, epoch });
        Answer::Begin(epoch, from_link)
    }
}

/// Link to channel.
struct Outbound {
    asked: mpsc::Receiver<Answer>,
    /// Taken from the link, not yet in a frame.
    bytes: BytesMut,
    /// What is left of frames. Kept over a hang-up: frames are never cut, or the next host would take its first ones for payload.
    unsent: BytesMut,
    live: Option<(Epoch, ReadHalf<DuplexStream>)>,
    next: u32,
}

impl Outbound {
    /// May be dropped at any await: what it took from the link is kept.
    async fn run(&mut self, mut to_host: impl AsyncWrite + Unpin) -> io::Result<()> {
        loop {
            while self.unsent.has_remaining() {
                if to_host.write_buf(&mut self.unsent).await? == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
            }
            tokio::select! {
                biased;
                answer = self.asked.recv() => match answer {
                    Some(answer) => self.answer(answer),
                    None => return Ok(()),
                },
                read = read_link(&mut self.live, &mut self.bytes) => self.send(read),
            }
        }
    }

    fn answer(&mut self, answer: Answer) {
        match answer {
            Answer::Ack(epoch) => frame::put_control(&mut self.unsent, Kind::HelloAck, epoch, 0),
            Answer::Begin(epoch, from_link) => {
                self.live = Some((epoch, from_link));
                self.next = 0;
                frame::put_control(&mut self.unsent, Kind::HelloAck, epoch, 0);
            }
            Answer::Reset(epoch) => {
                self.live = None;
                frame::put_control(&mut self.unsent, Kind::Reset, epoch, 0);
            }
        }
    }

    fn send(&mut self, read: io::Result<usize>) {
        let Some((epoch, _)) = &self.live else {
            return;
        };
        if matches!(read, Ok(count) if count > 0) {
            let bytes = [io::IoSlice::new(&self.bytes)];
            frame::put_data(&mut self.unsent, *epoch, self.next, &bytes);
            self.next = self.next.wrapping_add(1);
            self.bytes.clear();
        } else {
            frame::put_control(&mut self.unsent, Kind::End, *epoch, self.next);
            self.live = None;
        }
    }
}

/// Bytes the live link was given; waits for ever while there is none.
async fn read_link(
    live: &mut Option<(Epoch, ReadHalf<DuplexStream>)>,
    bytes: &mut BytesMut,
) -> io::Result<usize> {
    match live {
        Some((_, from_link)) => {
            let room = frame::MAX_PAYLOAD - bytes.len();
            from_link.read_buf(&mut bytes.limit(room)).await
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_unaccepted_link_wins() {
        let newest = Newest::default();
        for number in 1..3 {
            let (pipe, _) = tokio::io::duplex(1);
            let epoch = Epoch::from_number(number);
            newest.put(Link { pipe, epoch });
        }
        assert_eq!(newest.take().map(|l| l.epoch), Some(Epoch::from_number(2)));
        assert!(newest.take().is_none());
    }
}
