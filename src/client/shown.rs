//! What the client's status page shows.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::client::Shared;
use crate::client::run::Upstream;
use crate::handle::Half;
use crate::journal::Journal;
use crate::os::workers::Workers;
use crate::relay::Visitor;
use crate::service::Service;
use crate::session::of_client::{LocalError, Session};
use crate::status::port::Shows;
use crate::status::snapshot::{self, Side, Snapshot};
use crate::stop::Phase;

/// Of each local service, whether its last dial failed.
pub struct Unreached(BTreeMap<Service, AtomicBool>);

impl Unreached {
    /// Nothing has failed yet.
    pub fn new<'a>(services: impl Iterator<Item = &'a Service>) -> Self {
        Self(
            services
                .map(|it| (it.clone(), AtomicBool::new(false)))
                .collect(),
        )
    }
}

impl Shared {
    /// Takes note of a dial of the local service, and of the error that it ended with, if it did.
    pub(super) fn take_note(&self, visitor: &Visitor, failed: Option<&LocalError>) {
        if let Some(unreached) = self.unreached.0.get(visitor.service()) {
            unreached.store(failed.is_some(), Ordering::Relaxed);
        }
        if let Some(error) = failed {
            self.journal.local_failed(visitor, error);
        }
    }

    /// Returns why a visitor who came to a server now would not be served.
    fn not_ready(&self, live: &[Option<Arc<Session>>]) -> Vec<String> {
        if self.stop.reached(Phase::Draining) {
            return vec!["the client is about to stop".to_owned()];
        }
        let mut why = Vec::new();
        if live.iter().all(Option::is_none) {
            why.push("no server is connected".to_owned());
        } else if live.iter().flatten().all(|session| session.is_barred()) {
            why.push("no tunnel can be dialled".to_owned());
        }
        let unreached = self.unreached.0.iter();
        for (service, _) in unreached.filter(|(_, it)| it.load(Ordering::Relaxed)) {
            let address = &self.options.local[service];
            let of = service.of();
            why.push(format!(
                "the last dial of {address} for a visitor{of} failed"
            ));
        }
        why
    }
}

fn session(server: &Upstream, live: Option<&Session>) -> snapshot::Session {
    snapshot::Session {
        peer: server.address.to_string(),
        age: live.map(|live| live.began.elapsed()),
        key: live.and_then(|live| live.bond.as_ref().map(|_| (1, 1))),
        pool: live.map_or(0, |live| live.proto.pool()),
        idle: live.map_or(0, |live| live.tunnels().1),
        dialled: live.map_or(0, |live| live.dialled.load(Ordering::Relaxed)),
    }
}

impl Shows for Shared {
    fn snapshot(&self) -> Snapshot {
        let status = self.status();
        let live: Vec<_> = self.servers.iter().map(Upstream::live).collect();
        let services = self.options.local.iter().map(|(service, local)| {
            let mut sessions = live.iter().flatten();
            let offered = sessions.any(|it| it.public.contains_key(service));
            snapshot::Service {
                waiting: None,
                ..snapshot::Service::new(service, local.to_string(), offered, &status)
            }
        });
        let sessions = self.servers.iter().zip(&live);
        let mut snapshot = Snapshot {
            not_ready: self.not_ready(&live),
            services: services.collect(),
            sessions: sessions
                .map(|(it, live)| session(it, live.as_deref()))
                .collect(),
            ..Snapshot::of(Side::Client, &status, &self.pairs)
        };
        self.journal.fill(&mut snapshot);
        snapshot
    }

    fn workers(&self) -> &Workers {
        &self.workers
    }

    fn journal(&self) -> &Journal {
        &self.journal
    }
}
