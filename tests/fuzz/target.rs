//! Each target, by its name: see `src/fuzz.rs`.
#![no_main]

use tunnel_proxy::fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    match env!("CARGO_BIN_NAME") {
        "line" => fuzz::line(bytes),
        "frame" => fuzz::frame(bytes),
        "tunnel" => drop(fuzz::tunnel(bytes)),
        "proxy_header" => fuzz::proxy_header(bytes),
        "request" => fuzz::request(bytes),
        "config" => fuzz::config(bytes),
        name => panic!("there is no target {name}"),
    }
});
