//! How a service reads its settings: flags, then environment, then a TOML file, then defaults.
//!
//! A service's settings are one struct that derives [`clap::Args`]; each field has a doc comment, a default and an environment
//! name, so `--help` is the reference. Keys of the TOML file are the long flag names with `_` for `-`; an unknown key is an
//! error that names it.

use std::{ffi::OsString, fs, path::PathBuf, time::Duration};

use clap::{Arg, Args, Command, FromArgMatches, error::ErrorKind};

use crate::telemetry::TelemetryConfig;

/// Reads the settings of a service: its own and the telemetry ones every process has.
///
/// `argv` starts with the program's name. Errors print as a usage error that names the setting; the caller exits with
/// [`clap::Error::exit`].
pub fn load<T: Args>(
    service: &'static str,
    argv: impl IntoIterator<Item = OsString>,
) -> Result<(T, TelemetryConfig), clap::Error> {
    let argv: Vec<OsString> = argv.into_iter().collect();
    let mut command = command::<T>(service);
    if let Some(path) = config_path(&command, &argv) {
        command = with_file_defaults(command, &path)?;
    }
    let matches = command.try_get_matches_from(argv)?;
    Ok((
        T::from_arg_matches(&matches)?,
        TelemetryConfig::from_arg_matches(&matches)?,
    ))
}

/// The command line of a service, for `--help` and completions.
pub fn command<T: Args>(service: &'static str) -> Command {
    let command = Command::new(service)
        .about("Settings come from flags, then the environment, then --config, then defaults.")
        .arg(
            Arg::new("config")
                .long("config")
                .env("SANDMESH_CONFIG")
                .value_name("FILE")
                .value_parser(clap::value_parser!(PathBuf))
                .help("TOML file whose keys are the long flags with _ for -"),
        );
    TelemetryConfig::augment_args(T::augment_args(command))
}

fn config_path(command: &Command, argv: &[OsString]) -> Option<PathBuf> {
    // Only --config is wanted here; all else is judged after the file is known.
    let matches = command
        .clone()
        .ignore_errors(true)
        .try_get_matches_from(argv)
        .ok()?;
    matches
        .try_get_one::<PathBuf>("config")
        .ok()
        .flatten()
        .cloned()
}

fn with_file_defaults(mut command: Command, path: &PathBuf) -> Result<Command, clap::Error> {
    let wrong = |message: String| {
        clap::Error::raw(
            ErrorKind::ValueValidation,
            format!("{}: {message}\n", path.display()),
        )
    };
    let text = fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| wrong(error.to_string()))?;
    for (key, value) in table {
        let long = key.replace('_', "-");
        let id = command
            .get_arguments()
            .find(|arg| arg.get_long() == Some(long.as_str()) && arg.get_id() != "config")
            .map(|arg| arg.get_id().clone())
            .ok_or_else(|| wrong(format!("unknown setting `{key}`")))?;
        let values = match value {
            toml::Value::Array(items) => items
                .into_iter()
                .map(|item| plain(&key, item))
                .collect::<Result<Vec<_>, _>>(),
            single => plain(&key, single).map(|text| vec![text]),
        }
        .map_err(wrong)?;
        command = command.mut_arg(id, |arg| arg.required(false).default_values(values));
    }
    Ok(command)
}

fn plain(key: &str, value: toml::Value) -> Result<String, String> {
    match value {
        toml::Value::String(text) => Ok(text),
        toml::Value::Integer(number) => Ok(number.to_string()),
        toml::Value::Float(number) => Ok(number.to_string()),
        toml::Value::Boolean(flag) => Ok(flag.to_string()),
        _ => Err(format!(
            "setting `{key}` must be a string, number, boolean or a list of them"
        )),
    }
}

/// Where tools lie that `deploy/install` fetched; the same rule as in `deploy/paths.sh`.
pub fn tools_folder() -> PathBuf {
    let home =
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache");
    std::env::var_os("SANDMESH_CACHE").map_or_else(
        || {
            std::env::var_os("XDG_CACHE_HOME")
                .map_or_else(home, PathBuf::from)
                .join("sandmesh")
        },
        PathBuf::from,
    )
}

/// Parses a duration such as `250ms`, `30s`, `5m`, `1h30m`; for `#[arg(value_parser = parse_duration)]`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    text.parse::<jiff::SignedDuration>()
        .ok()
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| format!("`{text}` is not a duration such as 250ms, 30s or 5m"))
}

/// Parses a size such as `512MiB` or `4GiB` into bytes; for `#[arg(value_parser = parse_bytes)]`.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    text.parse::<bytesize::ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| format!("`{text}` is not a size such as 512MiB or 4GiB"))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[derive(Debug, clap::Args)]
    struct Settings {
        /// Where to listen.
        #[arg(long, default_value = "127.0.0.1:1")]
        listen: crate::address::Address,
        /// How long.
        #[arg(long, value_parser = parse_duration, default_value = "3s")]
        wait: Duration,
        /// Needed.
        #[arg(long)]
        name: String,
        /// A switch.
        #[arg(long)]
        loud: bool,
        /// Many.
        #[arg(long, value_delimiter = ',')]
        peers: Vec<String>,
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn argv(file: &tempfile::NamedTempFile, more: &[&str]) -> Vec<OsString> {
        let mut argv = vec![
            OsString::from("test"),
            "--config".into(),
            file.path().into(),
        ];
        argv.extend(more.iter().map(OsString::from));
        argv
    }

    #[test]
    fn flags_win_over_file_and_file_over_defaults() {
        let file = file("name = 'from file'\nwait = '9s'\nloud = true\npeers = ['a', 'b']\n");
        let (settings, _) = load::<Settings>("test", argv(&file, &["--wait", "1m"])).unwrap();
        assert_eq!(settings.name, "from file");
        assert_eq!(settings.wait, Duration::from_mins(1));
        assert!(settings.loud);
        assert_eq!(settings.peers, ["a", "b"]);
        assert_eq!(settings.listen.to_string(), "127.0.0.1:1");
    }

    #[test]
    fn wrong_settings_are_named() {
        let unknown = file("name = 'x'\nnmae = 'y'\n");
        assert!(
            load::<Settings>("test", argv(&unknown, &[]))
                .unwrap_err()
                .to_string()
                .contains("nmae")
        );
        let wrong = file("name = 'x'\nwait = 'soon'\n");
        assert!(
            load::<Settings>("test", argv(&wrong, &[]))
                .unwrap_err()
                .to_string()
                .contains("--wait")
        );
        let missing = load::<Settings>("test", ["test".into()])
            .unwrap_err()
            .to_string();
        assert!(missing.contains("--name"), "{missing}");
    }
}
