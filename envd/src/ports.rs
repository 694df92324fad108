//! Who listens: /proc/net/tcp and tcp6 (proc(5)), with the process that has the socket.

use std::{
    collections::HashMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use proto::envd::v1::Listener;

const LISTEN: &str = "0A";

/// All TCP listeners, by port.
pub(crate) fn listeners() -> Vec<Listener> {
    let owners = owners();
    let mut found: Vec<Listener> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .into_iter()
        .flat_map(|path| parse(&fs::read_to_string(path).unwrap_or_default()))
        .map(|(address, port, inode)| {
            let (pid, command) = owners.get(&inode).cloned().unwrap_or_default();
            Listener {
                address: address.to_string(),
                port: port.into(),
                pid,
                command,
            }
        })
        .collect();
    found.sort_by_key(|listener| listener.port);
    found
}

fn parse(table: &str) -> Vec<(IpAddr, u16, u64)> {
    table
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
            if *state != LISTEN {
                return None;
            }
            let (address, port) = local.split_once(':')?;
            Some((
                parse_address(address)?,
                u16::from_str_radix(port, 16).ok()?,
                inode.parse().ok()?,
            ))
        })
        .collect()
}

/// Each group of eight digits is a 32-bit word in the host's byte order.
fn parse_address(text: &str) -> Option<IpAddr> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some((word, more)) = rest.split_at_checked(8) {
        words.push(u32::from_str_radix(word, 16).ok()?.to_ne_bytes());
        rest = more;
    }
    match words.as_slice() {
        [word] => Some(Ipv4Addr::from(*word).into()),
        [a, b, c, d] => {
            let mut bytes = [0; 16];
            for (target, source) in bytes.iter_mut().zip([a, b, c, d].into_iter().flatten()) {
                *target = *source;
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// Socket inode to process: a walk over every process' descriptors.
fn owners() -> HashMap<u64, (u32, String)> {
    let mut owners = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        for descriptor in fs::read_dir(entry.path().join("fd"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let target = fs::read_link(descriptor.path()).unwrap_or_default();
            let inode = target.to_str().and_then(|text| {
                text.strip_prefix("socket:[")?
                    .strip_suffix(']')?
                    .parse()
                    .ok()
            });
            if let Some(inode) = inode {
                let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                owners
                    .entry(inode)
                    .or_insert_with(|| (pid, command.trim().to_owned()));
            }
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address   st ...\n   \
            0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4242 1\n   \
            1: 0100007F:1F91 0100007F:0016 01 00000000:00000000 00:00000000 00000000  1000        0 4243 1\n";
        assert_eq!(parse(table), [(IpAddr::from([127, 0, 0, 1]), 8080, 4242)]);
        assert_eq!(
            parse_address("00000000000000000000000001000000"),
            Some(Ipv6Addr::LOCALHOST.into())
        );
        assert_eq!(parse_address("xyz"), None);
    }

    #[test]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = u32::from(listener.local_addr().unwrap().port());
        let found = listeners()
            .into_iter()
            .find(|listener| listener.port == port)
            .unwrap();
        assert_eq!(
            (found.address.as_str(), found.pid),
            ("127.0.0.1", std::process::id())
        );
    }
}
