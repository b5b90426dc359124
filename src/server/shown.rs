//! What the server's status page shows.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::handle::Half;
use crate::journal::Journal;
use crate::os::workers::Workers;
use crate::server::Shared;
use crate::session::of_server::Session;
use crate::status::port::Shows;
use crate::status::snapshot::{self, Service, Side, Snapshot};
use crate::stop::Phase;

impl Shows for Shared {
    fn snapshot(&self) -> Snapshot {
        let status = self.status();
        let sessions = self.sessions_and_idle();
        let services = self.public.iter().enumerate();
        let services = services.map(|(number, public)| {
            let offered = sessions.iter().any(|(live, _)| live.serves(number));
            let address = public.listener.addr.to_string();
            Service::new(&public.service, address, offered, &status)
        });
        let services: Vec<_> = services.collect();
        let mut snapshot = Snapshot {
            not_ready: self.not_ready(&sessions, &services),
            services,
            sessions: sessions.iter().map(|it| self.session(it)).collect(),
            ..Snapshot::of(Side::Server, &status, &self.pairs)
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

/// A live session, and how many idle tunnels it has.
type Live = (Arc<Session>, usize);

impl Shared {
    fn sessions_and_idle(&self) -> Vec<Live> {
        let state = self.state.lock();
        let live = state.conn_list_map.clients_and_idle();
        live.map(|(live, idle)| (live.clone(), idle)).collect()
    }

    fn session(&self, (session, idle): &Live) -> snapshot::Session {
        let key = session.bond.as_ref().and_then(|it| self.door.key_of(it));
        snapshot::Session {
            peer: session.client.to_string(),
            age: Some(session.began.elapsed()),
            key,
            pool: session.proto.pool(),
            idle: *idle,
            dialled: session.dialled.load(Ordering::Relaxed),
        }
    }

    /// Returns why a visitor who came now would not be served.
    fn not_ready(&self, sessions: &[Live], services: &[Service]) -> Vec<String> {
        if self.stop.reached(Phase::HandingOver) {
            return vec!["the server is about to stop".to_owned()];
        }
        if sessions.is_empty() {
            return vec!["no client is connected".to_owned()];
        }
        let missing = services.iter().filter(|it| !it.offered);
        missing
            .map(|it| match &it.name {
                Some(name) => format!("no client offers {name}"),
                None => format!("no client offers the service of {}", it.address),
            })
            .collect()
    }
}
