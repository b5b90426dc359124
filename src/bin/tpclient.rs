//! The half of the tunnel that runs in the LAN; see `tpclient --help`.

use std::env;
use std::process::ExitCode;

use tunnel_proxy::cli;

fn main() -> ExitCode {
    let words = env::args_os().skip(1).collect();
    cli::exit("tpclient", cli::run_client(words))
}
