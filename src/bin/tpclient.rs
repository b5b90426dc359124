//! The half of the tunnel that runs in the LAN; see `tpclient --help`.

use std::env;
use std::process::ExitCode;

use tunnel_proxy::{Client, cli};

fn main() -> ExitCode {
    cli::exit("tpclient", run())
}

fn run() -> Result<(), cli::Error> {
    if let Some((options, signals)) = cli::client(env::args_os().skip(1))? {
        let client = Client::new(options);
        signals.obey_for(client.handle());
        client.run()?;
    }
    Ok(())
}
