//! What the operating system gives: sockets, pipes, threads, descriptors.

pub mod crowd;
pub mod hand_over;
pub mod limits;
pub mod listener;
pub mod net;
#[cfg(target_os = "linux")]
pub mod sock_diag;
pub mod source;
#[cfg(target_os = "linux")]
pub mod splice;
pub mod workers;
