//! What is to be seen of a running program over HTTP: a page for people, metrics, and two paths for
//! health checks. Everything shows a [`Snapshot`], which the server or the client fills in.

mod fill;
pub mod http;
mod metrics;
mod page;
pub mod port;
pub mod process;
pub mod ready;
pub mod snapshot;

use http::{Code, Response};
use snapshot::Snapshot;

/// Returns what is at a path, or None. Takes a snapshot only where the path shows one.
pub fn route(path: &str, snapshot: impl FnOnce() -> Snapshot) -> Option<Response> {
    Some(match path {
        "/" => page::response(&snapshot()),
        "/metrics" => Response::new(Code::Ok, metrics::TYPE, metrics::render(&snapshot())),
        "/healthz" => Response::new(Code::Ok, http::PLAIN, "ok\n".to_owned()),
        ready::PATH => ready::response(&snapshot().not_ready),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_has_its_own_answer() {
        for (path, code, start) in [
            ("/", Code::Ok, "<!DOCTYPE html>"),
            ("/metrics", Code::Ok, "# HELP tunnel_proxy_"),
            ("/readyz", Code::Unavailable, "{\"ready\":false,"),
        ] {
            let response = route(path, Snapshot::invented).unwrap();
            assert_eq!(response.code, code, "{path}");
            assert!(
                response.body.starts_with(start),
                "{path}: {}",
                response.body
            );
        }
        assert!(route("/index.html", || unreachable!("not shown")).is_none());
    }

    #[test]
    fn a_process_is_healthy_without_a_look_at_its_state() {
        let response = route("/healthz", || unreachable!("not shown")).unwrap();
        assert_eq!((response.code, response.body.as_str()), (Code::Ok, "ok\n"));
    }
}
