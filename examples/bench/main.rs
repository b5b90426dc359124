//! Measures the two programs against a direct connection, and against other tunnels if they are
//! installed.
//!
//! `cargo run --release --example bench` prints a table and ends by itself; `-- --help` lists its
//! options. Visitors and the local service are threads of this process. Each system under test
//! runs in processes of its own, on the loopback address, and shares the cores with them.
//!
//! To read: `rows.rs` says what is measured, `systems.rs` on what, `load.rs` what visitors do and
//! `service.rs` what they reach, `run.rs` in which order, `report.rs` how the results are shown.

#[cfg(target_os = "linux")]
mod load;
#[cfg(target_os = "linux")]
mod report;
#[cfg(target_os = "linux")]
mod rows;
#[cfg(target_os = "linux")]
mod run;
#[cfg(target_os = "linux")]
mod service;
#[cfg(target_os = "linux")]
mod systems;

#[cfg(not(target_os = "linux"))]
fn main() {
    eprintln!("bench: it measures through /proc and epoll, which only Linux has");
}

#[cfg(target_os = "linux")]
fn main() {
    if let Err(error) = run::bench() {
        eprintln!("bench: {error}");
        std::process::exit(1);
    }
}
