//! HAProxy and nginx, in front of a server or behind a client.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
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
        Self::nginx_with(host, |address| {
            let http = configuration(address);
            format!(
                "http {{ client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fcgi;\n\
                 uwsgi_temp_path uwsgi; scgi_temp_path scgi; {http} }}\n"
            )
        })
    }

    /// nginx with this configuration for TCP, on a port of this loopback host.
    pub fn nginx_for_tcp(host: &str, configuration: impl Fn(SocketAddr) -> String) -> Self {
        let module = Path::new("/usr/lib/nginx/modules/ngx_stream_module.so");
        let load = match module.exists() {
            true => format!("load_module {};\n", module.display()),
            false => String::new(),
        };
        Self::nginx_with(host, |address| {
            format!("{load}stream {{ {} }}\n", configuration(address))
        })
    }

    fn nginx_with(host: &str, configuration: impl Fn(SocketAddr) -> String) -> Self {
        let words = ["-q", "-p", ".", "-e", "stderr", "-c"];
        Self::start("nginx", &words, host, |address| {
            let first = "daemon off; master_process off; pid nginx.pid; error_log stderr;\n";
            format!("{first}{}events {{}}\n", configuration(address))
        })
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
