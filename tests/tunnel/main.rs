//! The tunnel from outside: through the library's API, through the two programs, and through peers
//! made by hand that speak the protocol's bytes.
//!
//! Read `traffic.rs` first: it shows a whole test in a few lines. A test is a function of a
//! `Protection` in the file of its subject, and its name says what must hold. `plain_and_sealed!`
//! makes two tests of it, so that `cargo test traffic::one_byte_each_way::sealed` runs one of them.
//! It starts a `Service` and a `Tunnel` to it (both halves in this process, in `support/mod.rs`),
//! or `Both` programs (`support/programs.rs`) where it needs signals, logs or `/proc`, and then
//! visits. Everything listens on port 0, every wait has a deadline, and whatever a test starts ends
//! when it is dropped. Hand-made peers are in `support/peer.rs`; `support/between.rs` and
//! `support/faulty_relay.rs` stand between the two halves and change what passes. A test that needs
//! root or a tool is marked with `#[ignore = "needs ..."]`, and one that measures rates or a crowd
//! begins with `take_turn()`.

mod balanced;
mod bounds;
mod check;
mod clients;
mod command_line;
mod crowds;
mod door;
mod exhaustion;
mod faulty;
mod floods;
mod half_close_and_abort;
mod helpers;
mod interleavings;
mod key;
mod local_service;
mod log;
mod namespaces;
mod one_port;
mod original;
mod package;
mod protocol;
mod reload;
mod restarts;
mod reuse;
mod sealed;
mod servers;
mod services;
mod sessions;
mod soak;
mod soak_everything;
mod status;
mod stop;
mod support;
mod traffic;
mod visitor_address;
mod wrong_ports;
