//! Rates: a token bucket (tc-tbf(8)) on the link a packet leaves by, so what comes too fast waits a moment and is then dropped.

use std::io;

use nix::{libc, net::if_::if_nametoindex, sys::socket::SockProtocol};
use rtnetlink::{
    packet_core::DefaultNla,
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle, TcMessage, TcOption},
    },
};

use super::{
    SlotError, TAP, namespace,
    netlink::{CREATE, Message, Netlink, REPLACE},
    rules::NetworkRules,
};

// linux/pkt_sched.h
const TBF_PARAMETERS: u16 = 1;
const TBF_RATE64: u16 = 4;
const TBF_BURST: u16 = 6;
const LINK_LAYER_ETHERNET: u8 = 1;

/// A bucket for this rate in bytes per second.
#[derive(Debug, PartialEq, Eq)]
struct Bucket {
    rate: u64,
    /// What may pass at once after a pause: 50 ms' worth, a few frames at least.
    burst: u32,
    /// What may wait: 200 ms' worth, a few more frames at least.
    limit: u32,
}

impl Bucket {
    fn of(rate: u64) -> Self {
        let at_least = |bytes: u64, least: u32| u32::try_from(bytes).unwrap_or(u32::MAX).max(least);
        Self {
            rate,
            burst: at_least(rate / 20, 8 << 10),
            limit: at_least(rate / 5, 32 << 10),
        }
    }

    /// `struct tc_tbf_qopt`: rate, peak rate, limit, buffer, mtu; the attributes beside it hold what does not fit.
    fn parameters(&self) -> Vec<u8> {
        // struct tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate.
        let mut rate = vec![0, LINK_LAYER_ETHERNET, 0, 0, 0, 0, 0, 0];
        rate.extend(u32::try_from(self.rate).unwrap_or(u32::MAX).to_ne_bytes());
        [
            rate.as_slice(),
            &[0; 12],
            &self.limit.to_ne_bytes(),
            &[0; 8],
        ]
        .concat()
    }

    fn options(&self) -> Vec<TcOption> {
        let mut options = vec![
            (TBF_PARAMETERS, self.parameters()),
            (TBF_BURST, self.burst.to_ne_bytes().to_vec()),
        ];
        if self.rate >= u64::from(u32::MAX) {
            options.push((TBF_RATE64, self.rate.to_ne_bytes().to_vec()));
        }
        options
            .into_iter()
            .map(|(kind, value)| TcOption::Other(DefaultNla::new(kind, value)))
            .collect()
    }
}

/// Sets both rates; for a thread that is in the slot's namespace.
pub(super) fn apply(rules: &NetworkRules) -> Result<(), SlotError> {
    let failed = SlotError::system("rate of the slot");
    let mut socket = Netlink::open(SockProtocol::NetlinkRoute).map_err(&failed)?;
    let tap = if_nametoindex(TAP).map_err(|error| failed(error.into()))?;
    for (link, rate) in [
        (namespace::ETH, rules.egress_bytes_per_second),
        (tap, rules.ingress_bytes_per_second),
    ] {
        set(&mut socket, link, rate).map_err(&failed)?;
    }
    Ok(())
}

fn set(socket: &mut Netlink, link: u32, rate: u64) -> io::Result<()> {
    let mut message = TcMessage::default();
    message.header.index = link.cast_signed();
    message.header.parent = TcHandle::ROOT;
    if rate == 0 {
        let delete = Message::route(&RouteNetlinkMessage::DelQueueDiscipline(message), 0);
        return match socket.send_all(&[delete]) {
            // None that was set by anybody.
            Err((_, error))
                if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) =>
            {
                Ok(())
            }
            other => other.map_err(|(_, error)| error),
        };
    }
    message.header.handle = TcHandle { major: 1, minor: 0 };
    message.attributes = vec![
        TcAttribute::Kind("tbf".into()),
        TcAttribute::Options(Bucket::of(rate).options()),
    ];
    let new = Message::route(
        &RouteNetlinkMessage::NewQueueDiscipline(message),
        CREATE | REPLACE,
    );
    socket.send_all(&[new]).map_err(|(_, error)| error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_frames_at_any_rate() {
        let slow = Bucket::of(1024);
        assert!(slow.burst >= 1514 && slow.limit > slow.burst, "{slow:?}");
        let fast = Bucket::of(100 << 30);
        assert_eq!((fast.burst, fast.limit), (u32::MAX, u32::MAX));
        assert_eq!(slow.parameters().len(), 36, "struct tc_tbf_qopt");
    }
}
