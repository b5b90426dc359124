//! The half of the tunnel that runs in the LAN; see `tpclient --help`.

use std::process::ExitCode;

use tunnel_proxy::options::{self, Command};
use tunnel_proxy::{Client, Error, program};

fn main() -> ExitCode {
    program::exit("tpclient", run())
}

fn run() -> Result<(), Error> {
    match options::client(std::env::args_os().skip(1))? {
        Command::Print(text) => program::print(&text)?,
        Command::Run(mut options, common) => {
            options.key = program::prepare(&common)?.pop();
            Client::new(options).run()?;
        }
    }
    Ok(())
}
