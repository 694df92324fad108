//! What the mesh costs, as ratios against floors measured in the same run. Run by `./deploy/bench`, with release builds.
//!
//! Absolute figures are the machine's; the ratios are what is looked at. Rounds of all variants take turns, so that whatever else
//! the machine does falls on all of them, and medians are shown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use e2e::{
    Mesh,
    bench::{arguments, is_wanted, milliseconds, percentile},
    guest, http, small,
};
use http_body_util::{BodyExt as _, Empty};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use proto::session::v1::Session;
use serde_json::{Value, json};
use service_kit::config::tools_folder;

const ROUNDS: usize = 5;
const ROUND: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 16;
const CREATES: usize = 200;
const CREATES_AT_ONCE: usize = 16;
const EXECS: usize = 40;
const PORT: u16 = 8000;

/// All of it, or what is named: `ports`, `creates`.
fn main() {
    let named = arguments();
    let wanted = |part: &str| is_wanted(&named, part);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        if wanted("ports") {
            ports_and_execs().await;
        }
        if wanted("creates") {
            creates().await;
        }
    });
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

// ---- HTTP to a port, and exec ----

/// A way to the port: where to connect, and under which name.
#[derive(Debug, Clone)]
struct Way {
    name: &'static str,
    to: String,
    host: String,
    session: Option<String>,
}

async fn ports_and_execs() {
    let mesh = Mesh::start(&["--separate"]);
    let session = mesh.session().await;
    let sandbox = mesh.client().sandbox(&session).unwrap();
    guest::upload(&sandbox, &guest_server()).await;
    guest::serve(&sandbox, &format!("0.0.0.0:{PORT}")).await;
    let host = session.host.replace("{port}", &PORT.to_string());
    http::get_when_open(mesh.edge(), &host, "/").await;
    let guest = format!("{}:{PORT}", slot_address(&mesh, &session));
    let envoy = BenchEnvoy::start(&mesh, &guest).await;
    let way = |name, to: &str, host: &str| Way {
        name,
        to: to.into(),
        host: host.into(),
        session: None,
    };
    let ways = [
        way("Envoy, home tag, node", &envoy.address, &host),
        way(
            "the same Envoy, static route",
            &envoy.address,
            "static.bench",
        ),
        Way {
            session: Some(session.session_id.clone()),
            ..way(
                "no Envoy, node alone",
                &mesh.part("node").address,
                "anything",
            )
        },
        way("no Envoy, no node", &guest, "anything"),
    ];
    for way in &ways {
        // Connections, caches and the emulator's translations are warm before anything counts.
        load(way, Duration::from_millis(500)).await;
    }
    let mut rates = vec![Vec::new(); ways.len()];
    let mut latencies = vec![Vec::new(); ways.len()];
    for _ in 0..ROUNDS {
        for (index, way) in ways.iter().enumerate() {
            rates[index].push(load(way, ROUND).await);
            latencies[index].append(&mut alone(way, 100).await);
        }
    }
    println!("\nHTTP to port {PORT} of a sandbox ({CONNECTIONS} connections; latency on one)");
    let rates: Vec<f64> = rates.into_iter().map(median).collect();
    for (index, way) in ways.iter().enumerate() {
        let p50 = milliseconds(percentile(&mut latencies[index], 50));
        println!(
            "  {:<32}{:>9.0} requests/s  p50 {p50:>6.2} ms",
            way.name, rates[index]
        );
    }
    for floor in 1..ways.len() {
        println!(
            "  ratio to {:<37}{:>5.2}",
            ways[floor].name,
            rates[0] / rates[floor]
        );
    }

    let (mut pings, mut execs) = (Vec::new(), Vec::new());
    for _ in 0..EXECS {
        let began = Instant::now();
        sandbox.info().await.unwrap();
        pings.push(began.elapsed());
        let began = Instant::now();
        assert_eq!(sandbox.run(["true"]).await.unwrap().exit.code(), 0);
        execs.push(began.elapsed());
    }
    let (ping, exec) = (percentile(&mut pings, 50), percentile(&mut execs, 50));
    println!("\nexec through Envoy, node and guest link (p50 of {EXECS})");
    println!(
        "  gRPC ping to envd               {:>9.2} ms",
        milliseconds(ping)
    );
    println!(
        "  exec of `true`, start to exit   {:>9.2} ms",
        milliseconds(exec)
    );
    println!(
        "  ratio                           {:>9.2}",
        exec.as_secs_f64() / ping.as_secs_f64()
    );
}

fn guest_server() -> String {
    env!("CARGO_BIN_EXE_guest-server").into()
}

/// Where the node reaches the guest: it follows from the number of the slot, which the session's journal has.
fn slot_address(mesh: &Mesh, session: &Session) -> Ipv4Addr {
    let path = mesh
        .state()
        .join("node/s")
        .join(&session.session_id)
        .join("journal.json");
    let journal: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let slot = u32::try_from(journal["entry"]["slot"].as_u64().unwrap()).unwrap();
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 213, 0, 0).to_bits() + 2 * slot + 1)
}

fn client() -> Client<HttpConnector, Empty<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new())
        .set_host(false)
        .build(connector)
}

async fn request(client: &Client<HttpConnector, Empty<Bytes>>, way: &Way) {
    let mut request = ::http::Request::get(format!("http://{}/", way.to)).header("host", &way.host);
    if let Some(session) = &way.session {
        request = request
            .header("x-session-id", session)
            .header("x-session-port", PORT);
    }
    let answer = client
        .request(request.body(Empty::new()).unwrap())
        .await
        .unwrap();
    assert_eq!(answer.status(), 200, "{}", way.name);
    answer.into_body().collect().await.unwrap();
}

/// Requests a second on all connections.
async fn load(way: &Way, time: Duration) -> f64 {
    let way = Arc::new(way.clone());
    let end = Instant::now() + time;
    let workers = (0..CONNECTIONS).map(|_| {
        let way = Arc::clone(&way);
        tokio::spawn(async move {
            let (client, mut count) = (client(), 0_u32);
            while Instant::now() < end {
                request(&client, &way).await;
                count += 1;
            }
            count
        })
    });
    let began = Instant::now();
    let counts = futures::future::join_all(workers).await;
    let total: u32 = counts.into_iter().map(Result::unwrap).sum();
    f64::from(total) / began.elapsed().as_secs_f64()
}

/// One request after the other.
async fn alone(way: &Way, count: usize) -> Vec<Duration> {
    let client = client();
    let mut taken = Vec::with_capacity(count);
    for _ in 0..count {
        let began = Instant::now();
        request(&client, way).await;
        taken.push(began.elapsed());
    }
    taken
}

/// A second Envoy with the mesh's own configuration and one more virtual host: a static route to the guest's port.
struct BenchEnvoy {
    process: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl BenchEnvoy {
    async fn start(mesh: &Mesh, guest: &str) -> Self {
        let free = || {
            TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
        };
        let (edge, admin) = (free(), free());
        let bytes = fs::read(mesh.state().join("run/envoy.json")).unwrap();
        let mut config: Value = serde_json::from_slice(&bytes).unwrap();
        let socket = |address: SocketAddr| json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
        config["node"]["id"] = "bench".into();
        config["admin"]["address"] = socket(admin);
        let listener = &mut config["static_resources"]["listeners"][0];
        listener["address"] = socket(edge);
        let hosts = &mut listener["filter_chains"][0]["filters"][0]["typed_config"]["route_config"]
            ["virtual_hosts"];
        hosts.as_array_mut().unwrap().push(json!({
            "name": "static",
            "domains": ["static.bench"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "static", "timeout": "0s"}}],
        }));
        let clusters = config["static_resources"]["clusters"]
            .as_array_mut()
            .unwrap();
        let endpoint = json!({"endpoint": {"address": socket(guest.parse().unwrap())}});
        clusters.push(json!({
            "name": "static",
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_assignment": {"cluster_name": "static", "endpoints": [{"lb_endpoints": [endpoint]}]},
        }));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("envoy.json");
        fs::write(&path, config.to_string()).unwrap();
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(tools_folder().join("bin/envoy"))
            .arg("-c")
            .arg(&path)
            .args(["--disable-hot-restart", "--log-level", "error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let address = edge.to_string();
        let end = Instant::now() + Duration::from_secs(20);
        while tokio::net::TcpStream::connect(&address).await.is_err() {
            assert!(Instant::now() < end, "Envoy does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Self {
            process,
            address,
            _folder: folder,
        }
    }
}

impl Drop for BenchEnvoy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ---- creates ----

async fn creates() {
    let mesh = Mesh::start(&[
        "--separate",
        "--vmm",
        "fake",
        "--max-sessions",
        "100000",
        "--memory",
        "64TiB",
        "--vcpus",
        "1000000",
    ]);
    mesh.postgres("psql", &["-qXc", "create database bench", "postgres"]);
    mesh.postgres("pgbench", &["-i", "-q", "-s", "10", "bench"]);
    create(&mesh, 50).await;
    let (mut rates, mut transactions) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        transactions.push(pgbench(&mesh));
        rates.push(create(&mesh, CREATES).await);
    }
    let (rate, floor) = (median(rates), median(transactions));
    println!("\n{CREATES} creates with simulated guests, {CREATES_AT_ONCE} at once, through Envoy");
    println!("  pgbench -N -c {CREATES_AT_ONCE}                 {floor:>9.0} transactions/s");
    println!("  creates                         {rate:>9.0} sessions/s");
    println!("  ratio                           {:>9.2}", rate / floor);
}

/// Sessions a second.
async fn create(mesh: &Mesh, count: usize) -> f64 {
    let began = Instant::now();
    let workers = (0..CREATES_AT_ONCE).map(|worker| {
        let client = mesh.client().clone();
        let mine = (worker..count).step_by(CREATES_AT_ONCE).count();
        tokio::spawn(async move {
            for _ in 0..mine {
                client.create(small()).await.unwrap();
            }
        })
    });
    for worker in futures::future::join_all(workers).await {
        worker.unwrap();
    }
    count as f64 / began.elapsed().as_secs_f64()
}

/// Transactions a second on the mesh's own Postgres, as many clients as creates at once.
fn pgbench(mesh: &Mesh) -> f64 {
    let clients = CREATES_AT_ONCE.to_string();
    let said = mesh.postgres(
        "pgbench",
        &["-N", "-c", &clients, "-j", "2", "-T", "3", "bench"],
    );
    let line = said.lines().find(|line| line.starts_with("tps")).unwrap();
    line.split_whitespace().nth(2).unwrap().parse().unwrap()
}
