//! The tunnel from outside: through the library's API, through the two programs, and through peers
//! made by hand that speak the protocol's bytes.

mod bounds;
mod command_line;
mod crowds;
mod exhaustion;
mod faulty;
mod floods;
mod half_close_and_abort;
mod helpers;
mod key;
mod local_service;
mod log;
mod namespaces;
mod original;
mod protocol;
mod restarts;
mod sealed;
mod sessions;
mod soak;
mod stop;
mod support;
mod traffic;
mod wrong_ports;
