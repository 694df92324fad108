//! Network namespaces of slots: made, wired and removed through netlink, on a thread that enters them.

use std::{
    fs::{self, File},
    io,
    net::Ipv4Addr,
    os::fd::AsRawFd as _,
    path::Path,
    thread,
};

use futures::TryStreamExt as _;
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};

use super::{SlotError, SlotIndex, TAP, firewall, tap};

const NAMESPACES: &str = "/run/netns";

fn netlink(step: &'static str) -> impl Fn(rtnetlink::Error) -> SlotError {
    move |error| SlotError::System {
        step,
        cause: error.to_string(),
    }
}

fn system(step: &'static str) -> impl Fn(nix::Error) -> SlotError {
    move |error| SlotError::System {
        step,
        cause: error.to_string(),
    }
}

/// Runs work on a thread of its own, which may change its namespace and then ends.
fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SlotError> + Send + 'static,
) -> Result<T, SlotError> {
    let thread = thread::Builder::new()
        .name("slot".into())
        .spawn(work)
        .map_err(SlotError::system("thread"))?;
    thread.join().map_err(|_| SlotError::System {
        step: "thread",
        cause: "it panicked".into(),
    })?
}

/// Makes a slot.
pub(super) async fn make(index: SlotIndex) -> Result<(), SlotError> {
    super::blocking(move || on_own_thread(move || make_here(index))).await?;
    // The host's end is in this process's namespace again.
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(SlotError::system("netlink"))?;
    let connection = tokio::spawn(connection);
    let wired = async {
        let link = find(&handle, &index.host_link()).await?;
        handle
            .address()
            .add(link, index.host_address().into(), 31)
            .execute()
            .await
            .map_err(netlink("host address"))?;
        up(&handle, link).await
    };
    let wired = wired.await;
    connection.abort();
    wired
}

fn make_here(index: SlotIndex) -> Result<(), SlotError> {
    let host =
        File::open("/proc/thread-self/ns/net").map_err(SlotError::system("host namespace"))?;
    fs::create_dir_all(NAMESPACES).map_err(SlotError::system("namespace folder"))?;
    let path = index.namespace_path();
    File::create(&path).map_err(SlotError::system("namespace file"))?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(system("unshare"))?;
    mount(
        Some("/proc/thread-self/ns/net"),
        &path,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .map_err(system("mount namespace"))?;
    tap::make(TAP).map_err(SlotError::system("tap"))?;
    // These files show the namespace of the thread that opens them.
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").map_err(SlotError::system("ip_forward"))?;
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").or_else(|error| {
        // A host without IPv6 has nothing to switch off.
        if error.kind() == io::ErrorKind::NotFound {
            Ok(())
        } else {
            Err(SlotError::system("ipv6")(error))
        }
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(SlotError::system("runtime"))?;
    runtime.block_on(wire(index, &host))?;
    firewall::lay_slot()
}

async fn wire(index: SlotIndex, host: &File) -> Result<(), SlotError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(SlotError::system("netlink"))?;
    let connection = tokio::spawn(connection);
    let wired = async {
        let host_link = index.host_link();
        handle
            .link()
            .add(LinkVeth::new("eth0", &host_link).build())
            .execute()
            .await
            .map_err(netlink("veth"))?;
        let theirs = find(&handle, &host_link).await?;
        handle
            .link()
            .set(
                LinkUnspec::new_with_index(theirs)
                    .setns_by_fd(host.as_raw_fd())
                    .build(),
            )
            .execute()
            .await
            .map_err(netlink("veth to the host"))?;
        let (lo, eth, tap) = (
            find(&handle, "lo").await?,
            find(&handle, "eth0").await?,
            find(&handle, TAP).await?,
        );
        let address = |link, address: Ipv4Addr, prefix| {
            handle.address().add(link, address.into(), prefix).execute()
        };
        address(eth, index.slot_address(), 31)
            .await
            .map_err(netlink("slot address"))?;
        address(tap, Ipv4Addr::new(169, 254, 100, 1), 30)
            .await
            .map_err(netlink("gateway address"))?;
        for link in [lo, eth, tap] {
            up(&handle, link).await?;
        }
        let route = RouteMessageBuilder::<Ipv4Addr>::new()
            .gateway(index.host_address())
            .build();
        handle
            .route()
            .add(route)
            .execute()
            .await
            .map_err(netlink("default route"))
    };
    let wired = wired.await;
    connection.abort();
    wired
}

async fn find(handle: &Handle, name: &str) -> Result<u32, SlotError> {
    let mut links = handle.link().get().match_name(name.to_owned()).execute();
    let link = links.try_next().await.map_err(netlink("find link"))?;
    link.map(|link| link.header.index)
        .ok_or_else(|| SlotError::System {
            step: "find link",
            cause: format!("no {name}"),
        })
}

async fn up(handle: &Handle, link: u32) -> Result<(), SlotError> {
    handle
        .link()
        .set(LinkUnspec::new_with_index(link).up().build())
        .execute()
        .await
        .map_err(netlink("link up"))
}

/// Runs work inside a slot's namespace.
pub(super) fn enter<T: Send + 'static>(
    index: SlotIndex,
    work: impl FnOnce() -> Result<T, SlotError> + Send + 'static,
) -> Result<T, SlotError> {
    on_own_thread(move || {
        let namespace =
            File::open(index.namespace_path()).map_err(SlotError::system("open namespace"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET).map_err(system("setns"))?;
        work()
    })
}

/// Removes a slot; what is not there is removed already. The pair of links goes with its namespace.
pub(super) fn remove(index: SlotIndex) -> Result<(), SlotError> {
    let path = index.namespace_path();
    if !path.exists() {
        return Ok(());
    }
    match umount2(&path, MntFlags::MNT_DETACH) {
        // Not a mount: its maker died in between.
        Ok(()) | Err(nix::errno::Errno::EINVAL) => {}
        Err(error) => return Err(system("unmount namespace")(error)),
    }
    fs::remove_file(&path).map_err(SlotError::system("remove namespace"))?;
    wait_for_link_to_go(&index.host_link());
    Ok(())
}

/// The kernel takes a namespace apart after its last user is gone; the name of its link is free only then.
fn wait_for_link_to_go(name: &str) {
    let path = Path::new("/sys/class/net").join(name);
    for _ in 0..1000 {
        if !path.exists() {
            return;
        }
        thread::sleep(std::time::Duration::from_millis(2));
    }
    tracing::warn!(link = name, "the link of a removed slot is still there");
}
