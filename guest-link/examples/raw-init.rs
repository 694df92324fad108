//! Init of a guest that does nothing but move bytes over the guest link: what everything else on that link is measured against
//! (`deploy/bench guest`). Built static, as envd is.
//!
//! A client sends requests of nine bytes, a letter and a count: `d` is answered by so many bytes, after `u` come so many, which are answered by
//! one; `p` is answered by one at once.
#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use guest_link::guest::{Link, Listener, vport::Vport};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const BUFFER: usize = 64 << 10;
const DEVICES_LIMIT: Duration = Duration::from_secs(10);

fn main() {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        fs::create_dir_all(target).unwrap();
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .unwrap();
    }
    let mut modules: Vec<PathBuf> = fs::read_dir("/modules")
        .unwrap()
        .map(|module| module.unwrap().path())
        .collect();
    modules.sort();
    for module in modules {
        let file = File::open(module).unwrap();
        match finit_module(file.as_fd(), c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => {}
            Err(error) => panic!("{error}"),
        }
    }
    let limit = Instant::now() + DEVICES_LIMIT;
    let port = loop {
        if let Some(port) = port() {
            break port;
        }
        assert!(Instant::now() < limit, "the guest link did not appear");
        thread::sleep(Duration::from_millis(5));
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let mut listener = Listener::new(Vport::open(&port).unwrap());
        loop {
            // One that ends is followed by another.
            let _ = serve(listener.accept().await).await;
        }
    });
}

fn port() -> Option<PathBuf> {
    let mut ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let port = ports.find(|port| {
        fs::read_to_string(port.path().join("name"))
            .is_ok_and(|name| name.trim() == "sandmesh.link")
    })?;
    let path = Path::new("/dev").join(port.file_name());
    path.exists().then_some(path)
}

async fn serve(mut link: Link) -> std::io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let what = link.read_u8().await?;
        let mut left = usize::try_from(link.read_u64().await?).unwrap_or(usize::MAX);
        match what {
            b'd' => {
                while left > 0 {
                    let part = left.min(BUFFER);
                    link.write_all(&buffer[..part]).await?;
                    left -= part;
                }
            }
            b'u' => {
                while left > 0 {
                    let part = left.min(BUFFER);
                    left -= link.read(&mut buffer[..part]).await?;
                }
                link.write_all(b"u").await?;
            }
            _ => link.write_all(b"p").await?,
        }
        link.flush().await?;
    }
}
