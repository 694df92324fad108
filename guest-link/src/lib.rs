//! The guest link: connections over a byte channel that has none.
//!
//! Node and guest talk HTTP/2. Where the host has no vsock, the channel below is one virtio-serial port: bytes go in at one
//! end and out at the other, for as long as the VM lives. It has no connections, so nobody tells the guest that another node
//! process took over, that the VM was restored from a snapshot, or that the bytes in its buffers were meant for somebody who
//! is gone. This crate puts that knowledge under HTTP/2: *frames* that carry an *epoch*.
//!
//! # Roles
//! The host starts an epoch by choosing a random 64-bit number and greeting with it, the guest answers. From then on both send
//! data frames that carry the epoch. A greeting with another epoch ends the one before: its [`guest::Link`] sees the end of
//! the stream, and every frame that still carries the old number is dropped, on both sides. There is at most one live epoch.
//!
//! # Frames
//! All numbers are little endian.
//!
//! | offset | size | field |
//! | --- | --- | --- |
//! | 0 | 4 | magic `89 53 4D 0A` |
//! | 4 | 1 | version, 1 |
//! | 5 | 1 | kind |
//! | 6 | 2 | zero |
//! | 8 | 8 | epoch, never zero |
//! | 16 | 4 | sequence: counts the data and end frames of this epoch and direction from 0, zero in others |
//! | 20 | 4 | payload length, at most 65,536; zero in all but data frames |
//! | 24 | 4 | CRC-32C of bytes 0-23 |
//! | 28 | n | payload |
//! | 28+n | 4 | trailer: the complement of the CRC |
//!
//! | kind | name | from | meaning |
//! | --- | --- | --- | --- |
//! | 1 | HELLO | host | take this epoch |
//! | 2 | HELLO_ACK | guest | taken; sent again for every repeated HELLO of the epoch |
//! | 3 | DATA | both | bytes |
//! | 4 | END | both | no more bytes from this side (half-close) |
//! | 5 | RESET | both | the epoch is over, now |
//!
//! # Resynchronising
//! A reader takes a frame only if magic, version, kind, length and CRC all hold; else it drops one byte and looks again, so
//! garbage costs nothing but its own bytes. A length beyond the bound never passes, so no claim makes a reader wait for
//! gigabytes or set memory aside for them.
//!
//! A frame cut in half is worse: its header is right, and what follows it is taken for its payload. Two rules handle it:
//! - The *trailer* tells a whole frame from one completed by foreign bytes. If it is wrong, the reader goes back to the byte
//!   after the false header and scans from there, so that even a greeting swallowed as payload is found.
//! - The host, greeting, follows up with *padding*: as many zero bytes as the longest frame has. Whatever half frame the
//!   guest sits on is completed by it, fails its trailer, and the next greeting is read. The guest, in turn, never cuts a
//!   frame: what is left of one is written before anything else, also to the next connection.
//!
//! Missing bytes inside a live epoch cannot happen while its host is connected; if they do, the sequence number shows it and
//! the epoch is reset, rather than the stream silently going wrong. For the same reason the host takes nothing but frames once its
//! greeting is answered: anything else, a length of 4 GiB included, ends the link with an error, as do more than
//! [`host::MOST_USELESS`] bytes of frames of other epochs. Before the answer a guest may send [`host::MOST_BEFORE_ANSWER`] bytes of
//! what is left of an epoch before.
//!
//! # Greeting
//! HELLO, then every [`host::GREETING_INTERVAL`] another one (every fourth with padding before it), until the answer or the
//! deadline. Repeating costs 32 bytes; waiting is what a user would feel. Repeats are harmless: the guest answers each and
//! keeps the epoch.
//!
//! # Snapshots
//! A guest restored from a snapshot believes in the epoch it was taken in, with half a frame in its reader, half a frame in its
//! writer and bytes of both in the device's queues. Its new host greets as ever. The rest of the guest's half frame is garbage before
//! the answer; the guest's reader is brought out of its half frame by padding; everything else carries the old epoch. No hang-up
//! of the port is needed for any of it, and one that comes late costs the epoch a reset, so the host connects again.
//! `docs/guest-link.md` follows one restore step by step.
//!
//! # Backpressure
//! Nothing queues without bound. A link's writer waits for the channel, the channel for its reader. The guest holds at most
//! one frame and [`guest::BUFFER`] bytes per direction. HTTP/2 has its own windows on top, and always reads, so
//! a slow stream does not hold up a greeting behind it.
//!
//! # Where things are
//! [`frame`] is the codec, pure. [`host`] greets and gives an [`AsyncRead`](tokio::io::AsyncRead) +
//! [`AsyncWrite`](tokio::io::AsyncWrite); [`guest`] answers and gives one such link per epoch. A guest's byte channel is a
//! [`guest::Channel`]: the virtio port in [`guest::vport`], a vsock in [`guest::vsock`], a unix socket in [`guest::unix`].
#![warn(missing_docs)]

pub mod body;
pub mod frame;
pub mod guest;
pub mod host;

pub use frame::Epoch;

/// Where a guest listens that has a vsock.
pub const VSOCK_PORT: u32 = 10_000;
