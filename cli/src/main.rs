//! `sandmesh`: the command line, and the program every service is started by.
//!
//! [`commands`] holds what clients and operators do, [`serve`] starts one service, [`up`] a whole deployment on one machine,
//! [`output`] prints tables and JSON, [`context`] knows which deployment is meant, [`terminal`] is the user's own.

mod commands;
mod context;
mod output;
mod serve;
mod terminal;
mod up;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use context::Context;

/// Exit code of sandmesh's own failures, apart from what a command in a sandbox may return.
const OWN_FAILURE: u8 = 125;

/// Sandboxes for untrusted code in microVMs.
#[derive(Debug, Parser)]
#[command(name = "sandmesh", version, disable_help_subcommand = true)]
struct Cli {
    #[command(flatten)]
    context: context::Options,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a whole deployment on this machine
    Up(up::Options),
    /// Stop it; nothing of it is left running
    Down(up::down::Options),
    /// Say which parts run and are healthy
    Status,
    /// API keys (operators)
    #[command(subcommand)]
    Key(commands::key::Command),
    /// Sessions
    #[command(subcommand)]
    Session(commands::session::Command),
    /// Kept states of a session, to go back to
    #[command(subcommand)]
    Checkpoint(commands::checkpoint::Command),
    /// Run a command in a session; its exit code is the command's
    Exec(commands::exec::Options),
    /// Open a login shell in a session, with a terminal; ~. at the beginning of a line leaves it running
    Shell(commands::exec::ShellOptions),
    /// Go on with the output of a command in a session, or with its terminal
    Attach(commands::exec::AttachOptions),
    /// List the commands of a session
    Ps(commands::process::PsOptions),
    /// Send a signal to a command of a session
    Kill(commands::process::KillOptions),
    /// Copy a file into or out of a session: ID:path names the sandbox side, - stdin or stdout
    Cp(commands::cp::Options),
    /// List a folder of a session
    Ls(commands::files::LsOptions),
    /// Print what changes at a path of a session
    Watch(commands::files::WatchOptions),
    /// Print the address of a port of a session
    Url(commands::url::Options),
    /// Say who listens on which port of a session, or wait for one
    Ports(commands::ports::Options),
    /// Make a port of a session one of this machine, for any protocol over TCP
    PortForward(commands::ports::Forward),
    /// Print what the kernel of a session and its daemon have said
    Logs(commands::logs::Options),
    /// Show what a session uses, as it sees it itself
    Top(commands::top::Options),
    /// Templates
    #[command(subcommand)]
    Template(commands::template::Command),
    /// Kernels that templates can be built with (operators)
    #[command(subcommand)]
    Kernel(commands::kernel::Command),
    /// Nodes (operators)
    #[command(subcommand)]
    Node(commands::node::Command),
    /// Run one service: gateway, session, template, node or envoy (serve NAME --help lists its settings)
    #[command(disable_help_flag = true)]
    Serve {
        /// Which service.
        service: String,
        /// Its settings.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Print the completions of a shell
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
    /// Print the version
    Version,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::from(OWN_FAILURE);
        }
    };
    let outcome = runtime.block_on(run(cli));
    // Reads of a terminal cannot be cancelled and must not hold the end up.
    runtime.shutdown_background();
    match outcome {
        Ok(code) => ExitCode::from(code),
        // As a program that SIGPIPE has ended.
        Err(error) if output::is_unread(&error) => ExitCode::from(141),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(OWN_FAILURE)
        }
    }
}

async fn run(cli: Cli) -> anyhow::Result<u8> {
    let context = Context::new(cli.context);
    match cli.command {
        Command::Up(options) => up::run(&context, options).await?,
        Command::Down(options) => up::down::run(&context, &options).await?,
        Command::Status => return up::status::run(&context).await,
        Command::Key(command) => commands::key::run(&context, command).await?,
        Command::Session(command) => commands::session::run(&context, command).await?,
        Command::Checkpoint(command) => commands::checkpoint::run(&context, command).await?,
        Command::Exec(options) => return commands::exec::run(&context, options).await,
        Command::Shell(options) => return commands::exec::shell(&context, options).await,
        Command::Attach(options) => return commands::exec::attach(&context, options).await,
        Command::Ps(options) => commands::process::ps(&context, &options).await?,
        Command::Kill(options) => commands::process::kill(&context, &options).await?,
        Command::Cp(options) => commands::cp::run(&context, &options).await?,
        Command::Ls(options) => commands::files::ls(&context, &options).await?,
        Command::Watch(options) => commands::files::watch(&context, options).await?,
        Command::Url(options) => commands::url::run(&context, &options).await?,
        Command::Ports(options) => commands::ports::run(&context, options).await?,
        Command::PortForward(options) => commands::ports::forward(&context, options).await?,
        Command::Logs(options) => commands::logs::run(&context, &options).await?,
        Command::Top(options) => commands::top::run(&context, &options).await?,
        Command::Template(command) => commands::template::run(&context, command).await?,
        Command::Kernel(command) => commands::kernel::run(&context, command).await?,
        Command::Node(command) => commands::node::run(&context, command).await?,
        Command::Serve { service, arguments } => serve::run(&service, arguments).await?,
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "sandmesh",
                &mut std::io::stdout(),
            );
        }
        Command::Version => println!("sandmesh {}", env!("CARGO_PKG_VERSION")),
    }
    Ok(0)
}
