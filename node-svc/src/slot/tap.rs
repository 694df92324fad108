//! Tap devices, by ioctl(2) on /dev/net/tun (Documentation/networking/tuntap.rst): netlink cannot make them.
#![allow(unsafe_code)] // ioctl

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
/// The header QEMU's virtio-net negotiates offloads with.
const IFF_VNET_HDR: i16 = 0x4000;

/// `struct ifreq` of netdevice(7), as far as TUNSETIFF reads it.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<nix::libc::c_int>()),
    InterfaceRequest
);
nix::ioctl_write_int_bad!(
    set_persistent,
    nix::request_code_write!(b'T', 203, size_of::<nix::libc::c_int>())
);

/// Opens a tap device in the calling thread's network namespace, made if it is not there. What is read and written are frames, each
/// after a `struct virtio_net_hdr` of 10 bytes; only one may have it open.
pub(super) fn open(name: &str) -> io::Result<OwnedFd> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = InterfaceRequest {
        name: [0; 16],
        flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
        rest: [0; 22],
    };
    let length = name.len().min(15);
    if let (Some(target), Some(source)) = (
        request.name.get_mut(..length),
        name.as_bytes().get(..length),
    ) {
        target.copy_from_slice(source);
    }
    // SAFETY: the descriptor is open for the length of the call; the request is a whole `struct ifreq` that outlives it.
    unsafe { set_interface(tun.as_raw_fd(), &raw const request) }?;
    Ok(tun.into())
}

/// Makes a tap device that stays, in the calling thread's network namespace.
pub(super) fn make(name: &str) -> io::Result<()> {
    let tap = open(name)?;
    // SAFETY: the descriptor is open for the length of the call.
    unsafe { set_persistent(tap.as_raw_fd(), 1) }?;
    Ok(())
}
