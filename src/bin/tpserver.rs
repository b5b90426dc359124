//! The half of the tunnel that runs on the host with the public address; see `tpserver --help`.

use std::process::ExitCode;

use tunnel_proxy::{Error, Server, options, program};

fn main() -> ExitCode {
    program::exit(options::SERVER, run())
}

fn run() -> Result<(), Error> {
    let command = options::server(std::env::args_os().skip(1))?;
    if let Some((mut options, keys, signals)) = program::start(command)? {
        options.keys = keys;
        let server = Server::bind(options)?;
        signals.obey_for(server.handle());
        server.run()?;
    }
    Ok(())
}
