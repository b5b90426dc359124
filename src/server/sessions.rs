//! The sessions with the clients: how they begin, and how they end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use crate::door::{Link, Refusal};
use crate::os::net;
use crate::server::Shared;
use crate::server::ends::Public;
use crate::session::of_server::Session;
use crate::session::{Ended, Proto};
use crate::stop::Phase;
use crate::wire::handshake::Bond;
use crate::wire::line::{Line, NEW, PROTO, SessionId, Welcome};

impl Shared {
    /// The sessions that a tunnel may belong to, and with a key what their tunnels are tied to.
    pub(super) fn live(&self) -> Vec<(SessionId, Option<Bond>)> {
        let state = self.state.lock();
        let live = state.conn_list_map.clients();
        live.filter_map(|live| Some((live.proto.id()?, live.bond.clone())))
            .collect()
    }

    /// True if the tunnels that come are those of an original client, which name no session.
    pub(super) fn has_original_client(&self) -> bool {
        let state = self.state.lock();
        let mut live = state.conn_list_map.clients();
        live.any(|live| live.proto == Proto::Original)
    }

    /// Makes a link's client one of those that are live, if there is room. One that said hello takes the
    /// place of one that did not. Also returns what is to be written to it.
    pub(super) fn begin_session(
        &self,
        link: &Link,
        client: SocketAddr,
    ) -> Result<(Arc<Session>, Receiver<Line>), Refusal> {
        let serves = self.public.iter();
        let serves = serves.map(|public| link.offers.contains_key(&public.service));
        let (session, to_write) = Session::new(link, client, serves, self.options.max_conns);
        for line in self.first_lines(link.proto, client) {
            session.send(line);
        }
        self.forget_hung_up();
        let mut state = self.state.lock();
        if self.stop.reached(Phase::Leaving) {
            return Err(Refusal::Stopping);
        }
        let list = &mut state.conn_list_map;
        let live: Vec<_> = list.clients().cloned().collect();
        let mut replaced = None;
        if live.len() >= self.options.clients {
            let original = live.iter().find(|live| live.proto == Proto::Original);
            replaced = original.filter(|_| link.proto != Proto::Original);
            let Some(before) = replaced else {
                return Err(Refusal::Busy(live.iter().map(|live| live.client).collect()));
            };
            list.take_client(before);
        }
        for _ in 0..list.add_client(session.clone()) {
            session.send(NEW);
        }
        drop(state);
        if let Some(before) = replaced {
            before.end();
        }
        let key = link.bond.as_ref().and_then(|bond| self.door.key_of(bond));
        let replaced = replaced.map(|before| before.client);
        self.journal.client_came(client, link.proto, key, replaced);
        self.say_unserved(&session);
        self.stop.notify();
        Ok((session, to_write))
    }

    /// Names the services that no client offers, now that this one has come.
    fn say_unserved(&self, session: &Session) {
        let live = self.sessions();
        for (number, public) in self.public.iter().enumerate() {
            if !live.iter().any(|live| live.serves(number)) {
                self.journal.unserved(session.client, &public.service);
            }
        }
    }

    /// The server's first lines to a client.
    fn first_lines(&self, proto: Proto, client: SocketAddr) -> Vec<Line> {
        let Proto::Tp2 { id, pool, .. } = proto else {
            return vec![Line::Hi];
        };
        let port = |public: &Public| public.listener.addr.port();
        let unnamed = self.public.iter().find(|it| !it.service.has_name());
        let has_names = self.public.iter().any(|it| it.service.has_name());
        let hello = Line::Hello {
            proto: PROTO,
            pool,
            linger: Some(self.options.linger),
            offers: has_names.then_some(self.public.len()),
            wants_to: false,
            welcome: Some(Welcome {
                session: id,
                tunnel: Some(self.tunnel_addr().port()),
                public: unnamed.map(port),
                client: Some(client),
            }),
        };
        let offers = self.public.iter().filter(|_| has_names);
        let offers = offers.map(|public| Line::Offer {
            service: public.service.clone(),
            port: Some(port(public)),
        });
        std::iter::once(hello).chain(offers).collect()
    }

    /// Ends the sessions whose client has gone and whose own thread has not noticed yet: the next client
    /// may be quicker, above all when this program slept and finds all at once what came meanwhile.
    fn forget_hung_up(&self) {
        for gone in self.sessions().iter().filter(|live| live.has_hung_up()) {
            self.end_session(gone, &Ended::HungUp);
        }
    }

    /// The sessions that are live.
    fn sessions(&self) -> Vec<Arc<Session>> {
        let state = self.state.lock();
        state.conn_list_map.clients().cloned().collect()
    }

    /// Ends a session, if it is still live, closes its idle tunnels, and lets other clients dial tunnels
    /// for those who wait. A client that has not said bye may answer no more: whoever waits for that is
    /// given to another one.
    pub(super) fn end_session(&self, session: &Arc<Session>, ended: &Ended) {
        session.end();
        let mut state = self.state.lock();
        let list = &mut state.conn_list_map;
        let Some(idle) = list.take_client(session) else {
            return;
        };
        let asked = list.ask_again(Instant::now(), Duration::ZERO, usize::MAX);
        let unanswered = state.asked.iter().filter(|it| it.client == *session);
        let unanswered = unanswered.filter(|_| !matches!(ended, Ended::Bye(_)));
        let unanswered: Vec<_> = unanswered.map(|it| it.tunnel.clone()).collect();
        drop(state);
        drop(idle);
        unanswered.iter().for_each(|tunnel| net::abort(tunnel));
        self.journal.client_left(session.client, ended);
        for client in asked {
            client.send(NEW);
        }
    }
}
