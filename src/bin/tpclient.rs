//! The half of the tunnel that runs in the LAN; see `tpclient --help`.

use std::process::ExitCode;

use tunnel_proxy::{Client, Error, options, program};

fn main() -> ExitCode {
    program::exit(options::CLIENT, run())
}

fn run() -> Result<(), Error> {
    let command = options::client(std::env::args_os().skip(1))?;
    if let Some((mut options, mut keys, signals)) = program::start(command)? {
        options.key = keys.pop();
        let client = Client::new(options);
        signals.obey_for(client.handle());
        client.run()?;
    }
    Ok(())
}
