//! `sandmesh top`: what a sandbox uses, as its kernel sees it.

use std::{
    fmt::Write as _,
    io::IsTerminal as _,
    time::{Duration, SystemTime},
};

use proto::envd::v1::{NetworkUse, Pressure, StreamMetricsResponse};
use service_kit::config::parse_duration;

use crate::{
    context::Context,
    output::{self, Format},
};

/// To the corner, and nothing below what is written next (ECMA-48: CUP, ED).
const REDRAW: &str = "\x1b[H\x1b[J";
/// What one look at the CPU takes.
const SHORT: Duration = Duration::from_millis(500);

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Which session.
    session: String,
    /// Between two looks, such as 500ms; at least 100ms.
    #[arg(long, value_parser = parse_duration, default_value = "1s")]
    interval: Duration,
}

/// Goes on on a terminal; elsewhere, and as JSON, it is said once.
pub(crate) async fn run(context: &Context, options: &Options) -> anyhow::Result<()> {
    let sandbox = context.sandbox(&options.session).await?;
    let is_live = context.format() == Format::Table && std::io::stdout().is_terminal();
    let interval = if is_live { options.interval } else { SHORT };
    let mut metrics = sandbox.metrics(interval);
    let mut before = metrics.next().await?;
    if context.format() == Format::Json {
        let name = "sandmesh.envd.v1.StreamMetricsResponse";
        return output::print(context.format(), name, before, |_| {});
    }
    loop {
        let now = metrics.next().await?;
        let table = table(&before, &now);
        if !is_live {
            return Ok(output::line(table.trim_end())?);
        }
        output::line(&format!("{REDRAW}{}\n\n{table}", options.session))?;
        before = now;
    }
}

fn table(before: &StreamMetricsResponse, now: &StreamMetricsResponse) -> String {
    let time = |one: &StreamMetricsResponse| SystemTime::try_from(one.time?).ok();
    // A clock that was set meanwhile says nothing.
    let seconds = time(now)
        .zip(time(before))
        .and_then(|(now, before)| now.duration_since(before).ok())
        .unwrap_or_default()
        .as_secs_f64();
    let per_second = |difference: f64| {
        if seconds > 0.0 {
            difference / seconds
        } else {
            0.0
        }
    };
    let cpu = |one: &StreamMetricsResponse| {
        let time = one.cpu_time.and_then(|time| Duration::try_from(time).ok());
        time.unwrap_or_default().as_secs_f64()
    };
    let share = per_second(cpu(now) - cpu(before)).max(0.0) * 100.0;
    let of = |used, total| format!("{} of {}", output::bytes(used), output::bytes(total));
    let mut rows = vec![
        (
            "cpu",
            format!(
                "{share:.0} % of {}, {:.1} s in all",
                now.cpus * 100,
                cpu(now)
            ),
        ),
        ("memory", of(now.memory_used_bytes, now.memory_total_bytes)),
        ("disk", of(now.disk_used_bytes, now.disk_total_bytes)),
    ];
    if let Some(network) = now.network {
        let before = before.network.unwrap_or(network);
        let rate = |of: fn(&NetworkUse) -> u64| {
            let bytes = of(&network).saturating_sub(of(&before));
            output::bytes(per_second(bytes as f64) as u64)
        };
        let (received, sent) = (
            rate(|use_| use_.received_bytes),
            rate(|use_| use_.sent_bytes),
        );
        let total = output::bytes(network.received_bytes);
        rows.push(("received", format!("{received}/s, {total} in all")));
        let total = output::bytes(network.sent_bytes);
        rows.push(("sent", format!("{sent}/s, {total} in all")));
    }
    rows.push(("processes", now.processes.to_string()));
    let waits = [
        ("for cpu", now.cpu_pressure),
        ("for memory", now.memory_pressure),
        ("for disk", now.io_pressure),
    ];
    for (name, pressure) in waits {
        if let Some(Pressure {
            some_avg10,
            full_avg10,
        }) = pressure
        {
            let text = format!("{some_avg10:.0} % of the time some, {full_avg10:.0} % all");
            rows.push((name, text));
        }
    }
    rows.iter().fold(String::new(), |mut table, (name, text)| {
        // Writing to a string does not fail.
        let _ = writeln!(table, "{name:<12}{text}");
        table
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> StreamMetricsResponse {
        StreamMetricsResponse {
            time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
            cpu_time: Some(prost_types::Duration {
                seconds: 10 * seconds,
                nanos: 500_000_000,
            }),
            cpus: 16,
            memory_used_bytes: 128 << 20,
            memory_total_bytes: 512 << 20,
            disk_used_bytes: 1 << 20,
            disk_total_bytes: 4 << 30,
            processes: 7,
            network: Some(NetworkUse {
                received_bytes: seconds as u64 * (3 << 20),
                sent_bytes: seconds as u64 * 1024,
                ..NetworkUse::default()
            }),
            cpu_pressure: Some(Pressure {
                some_avg10: 12.34,
                full_avg10: 0.0,
            }),
            ..StreamMetricsResponse::default()
        }
    }

    #[test]
    fn shares_and_rates_are_of_the_time_between_two_looks() {
        insta::assert_snapshot!(table(&at(100), &at(102)), @r"
        cpu         1000 % of 1600, 1020.5 s in all
        memory      128 MiB of 512 MiB
        disk        1 MiB of 4 GiB
        received    3 MiB/s, 306 MiB in all
        sent        1 KiB/s, 102 KiB in all
        processes   7
        for cpu     12 % of the time some, 0 % all
        ");
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_makes_no_nonsense() {
        for (before, now) in [(100, 100), (100, 50)] {
            let table = table(&at(before), &at(now));
            assert!(table.starts_with("cpu         0 % of 1600"), "{table}");
            assert!(table.contains("0 B/s"), "{table}");
        }
        let nothing = StreamMetricsResponse::default();
        assert!(!table(&nothing, &nothing).contains("received"));
    }
}
