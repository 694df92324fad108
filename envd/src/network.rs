//! The guest's network: one address, one gateway. Setting what is there already is a success, so a guest that resumes where it was, or where
//! everything looks as it did, changes nothing.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use futures::TryStreamExt as _;
use proto::envd::v1::GuestNetwork;
use rtnetlink::{
    Handle, LinkUnspec, RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage},
        link::LinkFlags,
    },
};

use crate::identity::write_new;

/// In every network namespace (Linux, include/net/flow.h, `LOOPBACK_IFINDEX`).
const LOOPBACK: u32 = 1;
/// discard(9): nobody has to listen.
const DISCARD: u16 = 9;

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Makes it so.
pub(crate) async fn set(network: &GuestNetwork) -> Result<(), String> {
    let resolv: String = network
        .nameservers
        .iter()
        .fold(String::new(), |lines, server| {
            format!("{lines}nameserver {server}\n")
        });
    write_new("/etc/resolv.conf", &resolv)?;
    let (connection, handle, _) = rtnetlink::new_connection().map_err(text)?;
    let connection = tokio::spawn(connection);
    let outcome = set_links(&handle, network).await;
    connection.abort();
    outcome
}

async fn set_links(handle: &Handle, network: &GuestNetwork) -> Result<(), String> {
    up(handle, LOOPBACK).await?;
    let mut links = handle.link().get().match_name("eth0".to_owned()).execute();
    // A guest without a network device has a loopback and that is all.
    let Some(link) = links.try_next().await.ok().flatten() else {
        return Ok(());
    };
    let eth = link.header.index;
    let (address, prefix) = network
        .address
        .split_once('/')
        .ok_or("address without a prefix")?;
    let address: Ipv4Addr = address.parse().map_err(text)?;
    let prefix: u8 = prefix.parse().map_err(text)?;
    let gateway: Ipv4Addr = network.gateway.parse().map_err(text)?;
    set_address(handle, eth, address, prefix).await?;
    if !link.header.flags.contains(LinkFlags::Up) {
        up(handle, eth).await?;
    }
    let route = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(gateway)
        .build();
    handle
        .route()
        .add(route)
        .replace()
        .execute()
        .await
        .map_err(text)?;
    forget_neighbour(handle, eth, gateway).await?;
    announce(address, gateway);
    Ok(())
}

async fn up(handle: &Handle, link: u32) -> Result<(), String> {
    let up = LinkUnspec::new_with_index(link).up().build();
    handle.link().set(up).execute().await.map_err(text)
}

/// If it is there, whatever else is there stays: that is the user's.
async fn set_address(
    handle: &Handle,
    link: u32,
    address: Ipv4Addr,
    prefix: u8,
) -> Result<(), String> {
    let there: Vec<AddressMessage> = handle
        .address()
        .get()
        .set_link_index_filter(link)
        .execute()
        .try_filter(|there| {
            let fits = there.header.family == AddressFamily::Inet && there.header.index == link;
            std::future::ready(fits)
        })
        .try_collect()
        .await
        .map_err(text)?;
    let wanted = |there: &AddressMessage| {
        there.header.prefix_len == prefix
            && there
                .attributes
                .contains(&AddressAttribute::Local(IpAddr::V4(address)))
    };
    if there.iter().any(wanted) {
        return Ok(());
    }
    for old in there {
        handle.address().del(old).execute().await.map_err(text)?;
    }
    let add = handle.address().add(link, address.into(), prefix);
    add.execute().await.map_err(text)
}

/// What was the gateway's hardware address may be no longer.
async fn forget_neighbour(handle: &Handle, link: u32, gateway: Ipv4Addr) -> Result<(), String> {
    let neighbours = handle.neighbours();
    let gateway = neighbours.add(link, gateway.into()).message_mut().clone();
    match neighbours.del(gateway).execute().await {
        Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -nix::libc::ENOENT => {
            Ok(())
        }
        done => done.map_err(text),
    }
}

/// One datagram to nobody makes the kernel ask for the gateway's hardware address, and with the question everybody on the link learns ours.
/// Without it they learn by asking, so its failure is none.
fn announce(address: Ipv4Addr, gateway: Ipv4Addr) {
    if let Ok(socket) = UdpSocket::bind((address, 0)) {
        let _ = socket.send_to(&[], (gateway, DISCARD));
    }
}
