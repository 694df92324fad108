//! Dockerfiles and build contexts whose makers mean harm: each ends with a true reason or does what it says, and neither the host nor the next
//! build has anything of it. Hostile layers are in `template-svc/tests/layers/hostile.rs`, hostile registries in `template-svc/tests/registry.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use e2e::{Mesh, builds, leaks, sandmesh};
use nix::{
    ifaddrs::getifaddrs,
    mount::{MntFlags, MsFlags, umount2},
};
use tempfile::TempDir;

/// In seconds: no build of these takes longer, however it ends.
const LIMIT: &str = "200";
/// The same, where nobody waits for the end.
const BOMBED: &str = "25";
/// As timeout(1) says it.
const TIMED_OUT: i32 = 124;
/// Where many clouds tell a machine its credentials.
const METADATA: &str = "169.254.169.254:80";
/// Of a build's log at most, with what it says itself.
const LARGEST_LOG: usize = 9 << 20;
/// Of the object store: with room for a small root and a kernel, and for much more; and what is in a file that has room in the second alone.
const SMALL: &str = "size=128M";
const WIDE: &str = "size=1G";
const NOISE: u64 = 160 << 20;
/// Says which doors take a connection, and leaves a word at all of them.
const KNOCK: &str = "#!/usr/bin/python3
import concurrent.futures, socket
doors = 'DOORS'.split()
def knock(door):
    host, port = door.rsplit(':', 1)
    try:
        socket.socket(type=socket.SOCK_DGRAM).sendto(b'hello', (host, PORT))
    except OSError:
        pass
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        return door
    except OSError:
        return None
with concurrent.futures.ThreadPoolExecutor(32) as threads:
    opened = list(filter(None, threads.map(knock, doors)))
print(len(doors), 'doors, opened:', opened)
raise SystemExit(7)
";
/// A line without an end, then many.
const LOUD: &str =
    r#"head -c 10485760 /dev/zero | tr '\0' x && (yes "$(printf %099d 0)" | head -c 20000000)"#;

/// What is to be left alone.
struct Host {
    folder: TempDir,
    secret: String,
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let secret = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap();
        let secret = secret.trim().to_owned();
        fs::write(folder.path().join("secret"), &secret).unwrap();
        let passwd = format!("someone:x:4242:4242:{secret}:/:/bin/sh\n");
        fs::write(folder.path().join("passwd"), passwd).unwrap();
        let tcp = TcpListener::bind("0.0.0.0:0").unwrap();
        let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
        tcp.set_nonblocking(true).unwrap();
        udp.set_nonblocking(true).unwrap();
        Self {
            folder,
            secret,
            tcp,
            udp,
        }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    /// All places where this host, or a part of the mesh, may be reached from a guest.
    fn doors(&self, mesh: &Mesh) -> Vec<String> {
        let node = mesh.state().join("node").to_string_lossy().into_owned();
        let first = leaks::block_of(&node).unwrap() * 64;
        let is_own = |link: &str| match link.strip_prefix("smh") {
            Some(number) => (first..first + 64).contains(&number.parse::<u32>().unwrap()),
            None => link != "lo",
        };
        let links = getifaddrs().unwrap();
        let addresses = links.filter(|link| is_own(&link.interface_name));
        let mut addresses: Vec<Ipv4Addr> = addresses
            .filter_map(|link| Some(link.address?.as_sockaddr_in()?.ip()))
            .collect();
        // The guest's end of its link to the node, whatever that is, and the node's.
        addresses.extend([[169, 254, 100, 1], [169, 254, 100, 2]].map(Ipv4Addr::from));
        let addresses_of = mesh.parts().into_iter().map(|part| part.address);
        let mut ports: Vec<u16> = addresses_of
            .filter_map(|address| Some(address.parse::<SocketAddr>().ok()?.port()))
            .collect();
        ports.push(self.tcp.local_addr().unwrap().port());
        let doors = addresses
            .iter()
            .flat_map(|address| ports.iter().map(move |port| format!("{address}:{port}")));
        doors.chain([METADATA.to_owned()]).collect()
    }

    fn is_unharmed(&self) {
        let names = fs::read_dir(self.folder.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["passwd", "secret"]);
        let secret = fs::read_to_string(self.path("secret")).unwrap();
        assert_eq!(secret, self.secret);
        let called = self.tcp.accept().unwrap_err();
        assert_eq!(called.kind(), ErrorKind::WouldBlock);
        let told = self.udp.recv(&mut [0; 16]).unwrap_err();
        assert_eq!(told.kind(), ErrorKind::WouldBlock);
    }
}

/// Who builds.
struct Builder<'a> {
    mesh: &'a Mesh,
    host: &'a Host,
    context: TempDir,
}

impl Builder<'_> {
    fn at(&self, name: &str) -> PathBuf {
        self.context.path().join(name)
    }

    /// Whether it was built, and what was said.
    fn build(&self, text: &str) -> (bool, String) {
        let (code, said) = self.build_for(LIMIT, text);
        let end = said.lines().last().unwrap_or_default();
        assert_ne!(code, Some(TIMED_OUT), "has not ended: {end}");
        (code == Some(0), said)
    }

    /// The same, cancelled after so many seconds: how it ended, and what was said.
    fn build_for(&self, limit: &str, text: &str) -> (Option<i32>, String) {
        fs::write(self.at("Dockerfile"), text).unwrap();
        let since = Instant::now();
        let built = self
            .mesh
            .command("timeout")
            .args(["--signal=INT", limit])
            .arg(sandmesh())
            .args(["template", "build", "-t", "hostile"])
            .args(["--memory", "128MiB", "--disk", "256MiB"])
            .arg(self.context.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        let end = said.lines().last().unwrap_or_default();
        println!("{:.1} s: {end}", since.elapsed().as_secs_f64());
        assert!(said.len() < LARGEST_LOG, "{} bytes", said.len());
        assert!(!said.contains(&self.host.secret), "{end}");
        self.host.is_unharmed();
        (built.status.code(), said)
    }

    /// The last step ends with 7 when all is well: nothing is packed then that nobody wants.
    fn ended(&self, text: &str) -> String {
        self.failed(text, "ended with code 7 (STEP_FAILED)")
    }

    fn failed(&self, text: &str, why: &str) -> String {
        let (is_built, said) = self.build(text);
        assert!(!is_built && said.contains(why), "{why:?}: {said}");
        said
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_dockerfile_harms_the_host_or_the_next_build() {
    let host = Host::new();
    let store = SmallStore::new();
    let mesh = Mesh::start(&["--store", store.folder.path().to_str().unwrap()]);
    let pids = || mesh.parts().into_iter().map(|part| (part.name, part.pid));
    let before: Vec<_> = pids().collect();
    let builder = Builder {
        mesh: &mesh,
        host: &host,
        context: tempfile::tempdir().unwrap(),
    };
    fs::write(builder.at(".dockerignore"), "Dockerfile\n").unwrap();
    fs::write(builder.at("payload"), "payload").unwrap();

    told_at_once(&builder);
    links_lead_nowhere(&builder);
    nobody_is_reached(&builder);
    nothing_outlives_its_step(&builder);
    what_is_too_much_is_told(&builder);
    databases_of_users_are_no_traps(&builder);
    nothing_is_left_to_run(&builder);
    what_has_no_room_is_nowhere(&builder, &store);

    // Nobody was restarted, nothing is left, and nobody wrote down what is the host's.
    let healthy = mesh.parts().iter().all(|part| part.healthy);
    assert!(healthy && before.iter().cloned().eq(pids()), "{before:?}");
    builds::leave_nothing(&mesh).await;
    let files_with = |text: &str| {
        let search = ["-rlF", "-D", "skip", "-e", text];
        let found = Command::new("grep").args(search).arg(mesh.state()).output();
        String::from_utf8(found.unwrap().stdout).unwrap()
    };
    assert_eq!(files_with(&host.secret), "");
    // Where links of contexts lead is there.
    assert_ne!(files_with(&host.path("secret")), "");
}

/// An object store that is soon full.
struct SmallStore {
    folder: TempDir,
}

impl SmallStore {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::mount(folder.path(), SMALL, MsFlags::empty());
        Self { folder }
    }

    fn mount(at: &Path, options: &str, flags: MsFlags) {
        let kind = Some("tmpfs");
        nix::mount::mount(kind, at, kind, flags, Some(options)).unwrap();
    }

    fn widen(&self) {
        Self::mount(self.folder.path(), WIDE, MsFlags::MS_REMOUNT);
    }
}

impl Drop for SmallStore {
    fn drop(&mut self) {
        if let Err(error) = umount2(self.folder.path(), MntFlags::MNT_DETACH) {
            eprintln!("the small store stays: {error}");
        }
    }
}

/// A step that removes all there is, the programs and devices of its own guest as well.
fn nothing_is_left_to_run(builder: &Builder<'_>) {
    let remove = "rm -rf --no-preserve-root / 2> /dev/null";
    builder.ended(&format!("FROM base\nRUN {remove}; exit 7\n"));
    builder.failed(
        &format!("FROM base\nRUN {remove} || true\n"),
        "(SOURCE_INVALID)",
    );
}

/// The object store is full: nothing half-made can be started, and once it has room the same is built.
fn what_has_no_room_is_nowhere(builder: &Builder<'_>, store: &SmallStore) {
    let path = builder.context.path().join("root.tar");
    let mut tarball = tar::Builder::new(File::create(&path).unwrap());
    for name in ["bin/", "etc/", "usr/"] {
        let mut header = header(tar::EntryType::Directory, 0);
        tarball.append_data(&mut header, name, &[][..]).unwrap();
    }
    let mut header = header(tar::EntryType::Regular, NOISE);
    let noise = File::open("/dev/urandom").unwrap().take(NOISE);
    tarball
        .append_data(&mut header, "usr/noise", noise)
        .unwrap();
    tarball.into_inner().unwrap().flush().unwrap();
    let path = path.to_str().unwrap();
    let build = || {
        let built = ["template", "build", "-t", "large", "--rootfs", path];
        let built = builder.mesh.run(&built);
        let said = String::from_utf8_lossy(&built.stderr).into_owned();
        (built.status.success(), said)
    };
    let is_there = || builder.mesh.run(&["template", "inspect", "large"]);
    let (is_built, said) = build();
    assert!(!is_built && said.contains("(STORE_FULL)"), "{said}");
    assert!(!is_there().status.success());
    store.widen();
    let (is_built, said) = build();
    assert!(is_built && is_there().status.success(), "{said}");
}

/// Of an entry of a tarball.
fn header(kind: tar::EntryType, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header
}

/// Dockerfiles that no guest is started for.
fn told_at_once(builder: &Builder<'_>) {
    let instructions = format!("FROM base\n{}", "RUN true\n".repeat(10_000));
    let nested = format!("{}{}", "${A:-".repeat(5000), "}".repeat(5000));
    let nested = format!("FROM base\nRUN true\n  ENV B={nested}\n");
    let doubled = format!(
        "FROM base\nENV A=0123456789\n{}",
        "ENV A=$A$A\n".repeat(100)
    );
    let endless = format!("FROM base\nRUN true\nRUN <<EOF\n{}", "x\n".repeat(100_000));
    let large = format!("FROM base\nRUN <<EOF\n{}EOF\n", "x\n".repeat(500_000));
    let huge = format!("FROM base\nRUN <<EOF\n{}EOF\n", "x\n".repeat(6_000_000));
    for (text, why) in [
        (instructions, "line 1001, column 1: it has more than 1000"),
        (nested, "line 3, column 3: variables in each other"),
        (doubled, "line 15, column 1: "),
        (endless, "line 3, column 1: expected a line \"EOF\""),
        (large, "line 1, column 1: a Dockerfile is at most"),
        (huge, "line 1, column 1: a Dockerfile is at most"),
    ] {
        builder.failed(&text, why);
    }
}

/// Links of the context, of a stage, and in the place of what files are copied to.
fn links_lead_nowhere(builder: &Builder<'_>) {
    let (host, folder) = (builder.host, builder.host.folder.path());
    let secret = host.path("secret");
    let up = format!("{}{}", "../".repeat(30), secret.trim_start_matches('/'));
    symlink(&secret, builder.at("absolute")).unwrap();
    symlink(&up, builder.at("upwards")).unwrap();
    symlink(folder, builder.at("folder")).unwrap();
    // They do lead there, for whoever follows them.
    for name in ["absolute", "upwards", "folder/secret"] {
        assert_eq!(fs::read_to_string(builder.at(name)).unwrap(), host.secret);
    }
    // The second entry goes through the first.
    let mut archive = tar::Builder::new(File::create(builder.at("archive.tar")).unwrap());
    let mut link = header(tar::EntryType::Symlink, 0);
    archive.append_link(&mut link, "way", folder).unwrap();
    let mut file = header(tar::EntryType::Regular, 4);
    let made = &b"made"[..];
    archive.append_data(&mut file, "way/made", made).unwrap();
    archive.into_inner().unwrap().flush().unwrap();

    let folder = folder.to_str().unwrap();
    let sibling = format!("../{}/secret", folder.rsplit('/').next().unwrap());
    for source in ["absolute", "upwards", "folder/secret", &sibling] {
        let copy = format!("FROM base\nCOPY {source} /srv/\n");
        builder.failed(&copy, "(COPY_SOURCE_MISSING)");
    }
    let unpacked = builder.failed("FROM base\nADD archive.tar /srv/\n", "(STEP_FAILED)");
    assert!(unpacked.contains("line 2: ADD archive.tar"), "{unpacked}");

    // What may be copied is, links as links, and all that is written is written in the guest. A pattern may mean nothing. The secret is looked
    // for without being said. Both stages say more than is kept, which is told once.
    let (one, two) = host.secret.split_at(10);
    let said = builder.ended(&format!(
        "FROM base AS made\n\
         RUN mkdir /out && cd /out && ln -s {secret} absolute && ln -s {up} upwards && ln -s / root && ln -s {folder} folder && {LOUD}\n\
         FROM base\n\
         COPY . /srv/context/\n\
         COPY absolut[e] upward[s] folder/secre[t] /srv/nothing/\n\
         COPY --from=made /out/absolut[e] /out/upward[s] /out/folder/secre[t] /srv/nothing/\n\
         COPY --from=made /out /srv/out/\n\
         COPY --from=made /out/root/etc/passwd /srv/passwd\n\
         RUN rm -rf /opt && mkdir -p {folder} && ln -s {folder} /opt && ln -s {folder}/new /srv/new && ln -s {folder} /srv/work\n\
         COPY payload /opt/\n\
         COPY payload /srv/new\n\
         COPY <<made /srv/work/\n\
         text\n\
         made\n\
         WORKDIR /srv/work/inner\n\
         RUN cmp /srv/passwd /etc/passwd && cmp {folder}/payload /srv/context/payload && test -e {folder}/made && test -d {folder}/inner\n\
         RUN cd /srv && readlink context/absolute context/upwards context/folder out/absolute > links && test ! -e nothing\n\
         RUN <<EOF\n\
         set -e\n\
         printf '%s\\n' {secret} {up} {folder} {secret} | cmp - /srv/links\n\
         if grep -rs '{one}''{two}' /srv /opt/ /etc /tmp {folder}; then exit 1; fi\n\
         {LOUD}\n\
         exit 7\n\
         EOF\n"
    ));
    assert_eq!(said.matches("is left out").count(), 1);

    // Whose user is whose is looked up in the root that was made, not here.
    let user = format!(
        "FROM base\nRUN ln -sf {} /etc/passwd\nUSER someone\n",
        host.path("passwd")
    );
    builder.failed(&user, "its user \"someone\" is not in its /etc/passwd");
}

/// Neither this host by any of its addresses, nor parts of the mesh, nor the cloud's metadata.
fn nobody_is_reached(builder: &Builder<'_>) {
    let doors = builder.host.doors(builder.mesh);
    let port = builder.host.udp.local_addr().unwrap().port();
    let knock = KNOCK
        .replace("DOORS", &doors.join(" "))
        .replace("PORT", &port.to_string());
    let said = builder.ended(&format!("FROM base\nRUN <<EOF\n{knock}EOF\n"));
    let expected = format!("{} doors, opened: []", doors.len());
    assert!(said.contains(&expected), "{said}");
}

/// Processes that a step leaves behind, whatever they do to stay.
fn nothing_outlives_its_step(builder: &Builder<'_>) {
    let tick = "while :; do echo tick >> /var/ticks; sleep 0.1; done";
    let said = builder.ended(&format!(
        "FROM base\n\
         RUN <<EOF\n\
         #!/bin/bash\n\
         setsid nohup bash -c '{tick}' > /dev/null 2>&1 &\n\
         # Holds the step's output.\n\
         setsid bash -c 'trap \"\" HUP INT TERM; {tick}' &\n\
         (setsid bash -c '({tick}) & exit' &)\n\
         # Is never the same process for long.\n\
         setsid bash -c 'next() {{ echo tick >> /var/ticks; sleep 0.05; next & }}; next' &\n\
         until [ -s /var/ticks ]; do sleep 0.1; done\n\
         EOF\n\
         RUN before=$(wc -c < /var/ticks) && sleep 2 && test $before = $(wc -c < /var/ticks) && echo nothing ticks && exit 7\n"
    ));
    assert!(said.contains("nothing ticks"), "{said}");
    // A fork bomb is of its guest; whoever sees no end of it cancels the build.
    let text =
        "FROM base\nRUN [\"bash\", \"-c\", \"bomb() { bomb | bomb & }; bomb; sleep 1000\"]\n";
    let (code, said) = builder.build_for(BOMBED, text);
    assert!(
        code == Some(TIMED_OUT) && said.contains("line 2: RUN"),
        "{code:?}: {said}"
    );
}

/// Disk, memory, output, arguments.
fn what_is_too_much_is_told(builder: &Builder<'_>) {
    let said = builder.failed(
        "FROM base\nRUN dd if=/dev/zero of=/large bs=1M\n",
        "line 2: RUN dd if=/dev/zero of=/large bs=1M: ended with code 1 (STEP_FAILED)",
    );
    assert!(said.contains("No space left on device"), "{said}");
    // Taken without a byte being written, so that there is none to fetch.
    let filled = "FROM base\nRUN <<EOF\n\
                  n=0\n\
                  for size in 64M 8M 1M 64K 4K; do while fallocate -l $size /taken.$n 2> /dev/null; do n=$((n + 1)); done; done\n\
                  EOF\n\
                  COPY large /srv/\n";
    fs::write(builder.at("large"), vec![b'x'; 4 << 20]).unwrap();
    let said = builder.failed(filled, "line 6: COPY large /srv/: ");
    assert!(said.contains("No space left on device"), "{said}");
    fs::remove_file(builder.at("large")).unwrap();
    let memory = "FROM base\nRUN tail /dev/zero\n";
    builder.failed(memory, "(STEP_OUT_OF_MEMORY)");
    // More than the kernel gives a program to read.
    let mut script = "FROM base\nRUN <<EOF\n".to_owned();
    for number in 0..20_000 {
        writeln!(script, "# {number}").unwrap();
    }
    let said = builder.failed(&format!("{script}EOF\n"), "line 2: RUN here-document: ");
    assert!(said.contains("(STEP_FAILED)"), "{said}");
}

/// What says who is who is no file, or has no end.
fn databases_of_users_are_no_traps(builder: &Builder<'_>) {
    let text = "FROM base\nRUN rm /etc/passwd /etc/group && mkfifo /etc/passwd && ln -s /dev/zero /etc/group\n";
    let said = builder.failed(
        &format!("{text}RUN id -u\nCOPY --chown=someone payload /srv/\n"),
        "line 4: COPY --chown=someone payload /srv/: there is no user \"someone\"",
    );
    assert!(said.contains("line 3: done"), "{said}");
    builder.failed(
        "FROM base\nUSER someone\nRUN id -u\n",
        "line 3: RUN id -u: no user someone (STEP_FAILED)",
    );
}
