//! The half of the tunnel that runs on the host with the public address; see `tpserver --help`.

use std::env;
use std::process::ExitCode;

use tunnel_proxy::cli;

fn main() -> ExitCode {
    let words = env::args_os().skip(1).collect();
    cli::exit("tpserver", cli::run_server(words))
}
