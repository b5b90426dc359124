//! Measures the two programs against a direct connection, and against other tunnels if they are
//! here.
//!
//! `cargo run --release --example bench` prints a table and ends by itself; `-- --help` lists its
//! options. Load and local service are part of this process; each system under test runs in
//! processes of its own, on the loopback address, and shares the cores with them.

#[cfg(target_os = "linux")]
mod chart;
#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod options;
#[cfg(target_os = "linux")]
mod report;
#[cfg(target_os = "linux")]
mod rounds;
#[cfg(target_os = "linux")]
mod rows;
#[cfg(target_os = "linux")]
mod service;
#[cfg(target_os = "linux")]
mod soak;
#[cfg(target_os = "linux")]
mod stop;
#[cfg(target_os = "linux")]
mod systems;
#[cfg(target_os = "linux")]
mod tunnel;
#[cfg(target_os = "linux")]
mod wan;

use std::process::ExitCode;

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("bench: it measures through /proc and epoll, which only Linux has");
    ExitCode::FAILURE
}

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    let options = match options::read(std::env::args().skip(1)) {
        Ok(options::Command::Run(options)) => options,
        Ok(options::Command::Print(text)) => {
            print!("{text}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("bench: {why} (see --help)");
            return ExitCode::from(2);
        }
    };
    match rounds::bench(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}
