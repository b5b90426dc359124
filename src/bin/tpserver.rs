//! The half of the tunnel that runs on the host with the public address; see `tpserver --help`.

use std::process::ExitCode;

use tunnel_proxy::options::{self, Command};
use tunnel_proxy::{Error, Server, program};

fn main() -> ExitCode {
    program::exit("tpserver", run())
}

fn run() -> Result<(), Error> {
    match options::server(std::env::args_os().skip(1))? {
        Command::Print(text) => program::print(&text)?,
        Command::Run(mut options, common) => {
            options.keys = program::prepare(&common)?;
            Server::bind(options)?.run()?;
        }
    }
    Ok(())
}
