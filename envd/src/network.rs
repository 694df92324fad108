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
        link::{LinkFlags, LinkMessage},
    },
};

use crate::identity::write_or_tell;

const RESOLV: &str = "/etc/resolv.conf";
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
    write_or_tell(RESOLV, &resolv);
    let (connection, handle, _) = rtnetlink::new_connection().map_err(text)?;
    let connection = tokio::spawn(connection);
    let outcome = set_links(&handle, network).await;
    connection.abort();
    outcome
}

/// Does what needs no address, so that only that is left to do when there is one.
pub(crate) async fn warm() -> Result<(), String> {
    write_or_tell(RESOLV, "");
    let (connection, handle, _) = rtnetlink::new_connection().map_err(text)?;
    let connection = tokio::spawn(connection);
    let outcome = async {
        up(&handle, LOOPBACK).await?;
        match eth0(&handle).await {
            Some(link) => up(&handle, link.header.index).await,
            None => Ok(()),
        }
    };
    let outcome = outcome.await;
    connection.abort();
    outcome
}

/// A guest without a network device has a loopback and that is all.
async fn eth0(handle: &Handle) -> Option<LinkMessage> {
    let mut links = handle.link().get().match_name("eth0".to_owned()).execute();
    links.try_next().await.ok().flatten()
}

async fn set_links(handle: &Handle, network: &GuestNetwork) -> Result<(), String> {
    up(handle, LOOPBACK).await?;
    let Some(link) = eth0(handle).await else {
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

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv6Addr;

    use nix::sched::{CloneFlags, unshare};
    use rtnetlink::{
        LinkVeth,
        packet_route::{neighbour::NeighbourAttribute, route},
    };

    use super::*;

    /// Runs a test in a network namespace with a loopback that is up, and nothing else.
    pub(crate) fn in_own_network(test: impl AsyncFnOnce(&Handle) + Send + 'static) {
        // The namespace is the thread's, and of the threads it starts.
        let ran = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                tokio::spawn(connection);
                up(&handle, LOOPBACK).await.unwrap();
                test(&handle).await;
            });
        });
        ran.join().unwrap();
    }

    fn network(address: &str, gateway: &str) -> GuestNetwork {
        GuestNetwork {
            address: address.into(),
            gateway: gateway.into(),
            nameservers: vec![],
        }
    }

    async fn addresses(handle: &Handle, link: u32) -> Vec<String> {
        let get = handle.address().get().set_link_index_filter(link);
        let found: Vec<_> = get.execute().try_collect().await.unwrap();
        let mut addresses: Vec<String> = found
            .iter()
            .flat_map(|found| {
                found
                    .attributes
                    .iter()
                    .filter_map(|attribute| match attribute {
                        AddressAttribute::Local(IpAddr::V4(address)) => {
                            Some(format!("{address}/{}", found.header.prefix_len))
                        }
                        _ => None,
                    })
            })
            .collect();
        addresses.sort();
        addresses
    }

    async fn gateways(handle: &Handle) -> Vec<String> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let found: Vec<_> = handle
            .route()
            .get(all)
            .execute()
            .try_collect()
            .await
            .unwrap();
        found
            .iter()
            .flat_map(|found| &found.attributes)
            .filter_map(|attribute| match attribute {
                route::RouteAttribute::Gateway(route::RouteAddress::Inet(gateway)) => {
                    Some(gateway.to_string())
                }
                _ => None,
            })
            .collect()
    }

    async fn knows(handle: &Handle, link: u32, hardware: &[u8]) -> bool {
        let all: Vec<_> = handle
            .neighbours()
            .get()
            .execute()
            .try_collect()
            .await
            .unwrap();
        all.iter().any(|found| {
            found.header.ifindex == link
                && found.attributes.iter().any(|attribute| {
                    matches!(attribute, NeighbourAttribute::LinkLayerAddress(there) if there == hardware)
                })
        })
    }

    #[test]
    fn a_network_is_set_again_or_anew_and_the_gateway_found_afresh() {
        in_own_network(async |handle| {
            let pair = LinkVeth::new("eth0", "tap").build();
            handle.link().add(pair).execute().await.unwrap();
            let mut links = handle.link().get().match_name("tap").execute();
            let tap = links.try_next().await.unwrap().unwrap().header.index;
            up(handle, tap).await.unwrap();
            let mut links = handle.link().get().match_name("eth0").execute();
            let eth = links.try_next().await.unwrap().unwrap().header.index;

            let first = network("169.254.100.2/30", "169.254.100.1");
            set_links(handle, &first).await.unwrap();
            assert_eq!(addresses(handle, eth).await, ["169.254.100.2/30"]);
            assert_eq!(gateways(handle).await, ["169.254.100.1"]);

            let users = Ipv4Addr::new(192, 0, 2, 9).into();
            handle
                .address()
                .add(eth, users, 24)
                .execute()
                .await
                .unwrap();
            let old = [2, 0, 0, 0, 0, 9];
            handle
                .neighbours()
                .add(eth, Ipv4Addr::new(169, 254, 100, 1).into())
                .link_layer_address(&old)
                .replace()
                .execute()
                .await
                .unwrap();
            assert!(knows(handle, eth, &old).await);
            set_links(handle, &first).await.unwrap();
            assert_eq!(
                addresses(handle, eth).await,
                ["169.254.100.2/30", "192.0.2.9/24"],
                "what is right already stays, and what is the user's"
            );
            assert!(!knows(handle, eth, &old).await);

            set_links(handle, &network("10.1.2.3/24", "10.1.2.1"))
                .await
                .unwrap();
            assert_eq!(addresses(handle, eth).await, ["10.1.2.3/24"]);
            assert_eq!(gateways(handle).await, ["10.1.2.1"]);
            for bad in ["10.1.2.3", "10.1.2.3/99", "here/24"] {
                let refused = set_links(handle, &network(bad, "10.1.2.1")).await;
                assert!(refused.is_err(), "{bad}");
            }
        });
    }

    #[test]
    fn a_guest_without_a_device_has_its_loopback() {
        in_own_network(async |handle| {
            let any = network("169.254.100.2/30", "169.254.100.1");
            set_links(handle, &any).await.unwrap();
            assert!(UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).is_ok());
        });
    }
}
