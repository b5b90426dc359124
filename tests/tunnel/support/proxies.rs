//! HAProxy and nginx, in front of a server or behind a client.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use super::programs::ports_of;
use super::{eventually, try_connect};

/// One of them, killed when dropped.
pub struct Proxy {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
    directory: tempfile::TempDir,
}

impl Proxy {
    /// HAProxy with this configuration behind its time limits, on a port of this loopback host.
    pub fn haproxy(host: &str, configuration: impl Fn(SocketAddr) -> String) -> Self {
        let time_limits =
            "defaults\n timeout connect 20s\n timeout client 60s\n timeout server 60s\n";
        Self::haproxy_with(host, |address| {
            time_limits.to_owned() + &configuration(address)
        })
    }

    /// HAProxy with this whole configuration, on a port of this loopback host.
    pub fn haproxy_with(host: &str, configuration: impl Fn(SocketAddr) -> String) -> Self {
        Self::start("haproxy", &["-q", "-db", "-f"], host, configuration)
    }

    /// nginx with this configuration for HTTP, on a port of this loopback host.
    pub fn nginx(host: &str, configuration: impl Fn(SocketAddr) -> String) -> Self {
        let text = |address| {
            let http = configuration(address);
            format!(
                "daemon off; master_process off; pid nginx.pid; error_log stderr;\n\
                 events {{}}\n\
                 http {{ client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fcgi;\n\
                 uwsgi_temp_path uwsgi; scgi_temp_path scgi; {http} }}\n"
            )
        };
        Self::start(
            "nginx",
            &["-q", "-p", ".", "-e", "stderr", "-c"],
            host,
            text,
        )
    }

    fn start(
        program: &str,
        words: &[&str],
        host: &str,
        configuration: impl Fn(SocketAddr) -> String,
    ) -> Self {
        let [address, ..] = ports_of(host);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("configuration");
        std::fs::write(&file, configuration(address)).unwrap();
        let child = Command::new(program)
            .args(words)
            .arg(file)
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let proxy = Self {
            child,
            address,
            directory,
        };
        eventually("the proxy listens", || try_connect(address).is_ok());
        proxy
    }

    /// A file in its own directory, such as a log.
    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
