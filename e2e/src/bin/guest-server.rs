//! What tests run inside sandboxes: one port that speaks HTTP/1.1, HTTP/2, WebSocket, server-sent events and gRPC.
//! usage: guest-server ADDRESS
//!
//! As `guest-server spawn COUNT` it starts `true` so often, and prints how many nanoseconds each took: what a command costs at least.

use std::{
    convert::Infallible,
    process::Command,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::{
        Path,
        ws::{WebSocket, WebSocketUpgrade},
    },
    http::HeaderMap,
    response::{
        Html, Sse,
        sse::{self},
    },
    routing::{any, get, post},
};
use futures::{Stream, StreamExt as _, stream};
use tokio::net::TcpListener;
use tonic::service::Routes;

const BETWEEN_EVENTS: Duration = Duration::from_millis(300);
const ZEROES: &[u8] = &[0; 64 << 10];

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let address = match arguments.as_slice() {
        [address] => address,
        [word, count] if word == "spawn" => return spawn(count.parse()?),
        _ => return Err("usage: guest-server ADDRESS | spawn COUNT".into()),
    };
    let (_reporter, health) = tonic_health::server::health_reporter();
    let router: Router = Routes::new(health).prepare().into_axum_router();
    let router = router
        .route("/", get(async || Html("<h1>in a microVM</h1>")))
        .route("/headers", get(headers))
        .route("/events", get(async || Sse::new(events())))
        .route("/count", post(count))
        .route("/zeroes/{bytes}", get(zeroes))
        .route(
            "/ws",
            any(async |upgrade: WebSocketUpgrade| upgrade.on_upgrade(echo)),
        );
    axum::serve(TcpListener::bind(address).await?, router).await?;
    Ok(())
}

fn spawn(count: usize) -> Result<(), Box<dyn std::error::Error>> {
    for _ in 0..count {
        let began = Instant::now();
        let status = Command::new("true").status()?;
        println!("{}", began.elapsed().as_nanos());
        if !status.success() {
            return Err("true is not".into());
        }
    }
    Ok(())
}

/// The headers as they arrived.
async fn headers(headers: HeaderMap) -> String {
    let lines = headers
        .iter()
        .map(|(name, value)| format!("{name}: {}\n", String::from_utf8_lossy(value.as_bytes())));
    lines.collect()
}

/// Three, slowly.
fn events() -> impl Stream<Item = Result<sse::Event, Infallible>> {
    stream::iter(0..3).then(async |number| {
        if number > 0 {
            tokio::time::sleep(BETWEEN_EVENTS).await;
        }
        Ok(sse::Event::default().data(number.to_string()))
    })
}

/// How long a body is.
async fn count(body: Body) -> String {
    let mut data = body.into_data_stream();
    let mut count = 0;
    while let Some(Ok(part)) = data.next().await {
        count += part.len() as u64;
    }
    count.to_string()
}

/// A body of this many zeroes.
async fn zeroes(Path(bytes): Path<u64>) -> Body {
    Body::from_stream(stream::unfold(bytes, async |left| {
        let part = ZEROES.get(..left.min(ZEROES.len() as u64) as usize)?;
        (!part.is_empty()).then(|| (Ok::<_, Infallible>(part), left - part.len() as u64))
    }))
}

async fn echo(mut socket: WebSocket) {
    while let Some(Ok(message)) = socket.recv().await {
        if socket.send(message).await.is_err() {
            return;
        }
    }
}
