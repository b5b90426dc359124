//! The half of the tunnel that runs on the host with the public address; see `tpserver --help`.

use std::env;
use std::process::ExitCode;

use tunnel_proxy::{Server, cli};

fn main() -> ExitCode {
    cli::exit("tpserver", run())
}

fn run() -> Result<(), cli::Error> {
    if let Some((options, signals)) = cli::server(env::args_os().skip(1))? {
        let server = Server::bind(options)?;
        signals.obey_for(server.handle());
        server.run()?;
    }
    Ok(())
}
