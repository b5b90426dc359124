//! Visitors who wait: for a tunnel, or for a client's answer. A tunnel that dies, and a client that cannot
//! reach its local service, let them wait again.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::conn_match::Added;
use crate::os::net;
use crate::server::Shared;
use crate::server::ends::{Accept, Answer, Asked, Tunnel};
use crate::service::Service;
use crate::session::of_server::Session;
use crate::stop::Phase;
use crate::wire::line::{Arrival, Failure, MAX_POOL, NEW};

/// A visitor that has waited this long, many round trips, has lost its tunnel on the way.
const LOST_AFTER: Duration = Duration::from_secs(1);

/// An idle tunnel beyond the pool that no visitor has needed for this long is closed.
const UNUSED: Duration = Duration::from_secs(10);

/// So many lost tunnels are asked for again at a time: if all are lost, more would not help.
const MOST_ASKED_AGAIN: usize = MAX_POOL;

/// A visitor waits for a client's answer on this tunnel as long as this lives.
struct WaitsForAnswer(Arc<Shared>, Arc<TcpStream>);

impl Drop for WaitsForAnswer {
    fn drop(&mut self) {
        let Self(server, tunnel) = self;
        let asked = &mut server.state.lock().asked;
        asked.retain(|it| !Arc::ptr_eq(&it.tunnel, tunnel));
        if server.stop.reached(Phase::HandingOver) {
            // A stop waits for those that wait.
            server.update();
        }
    }
}

impl Shared {
    /// What a client is told of a visitor.
    pub(super) fn arrival(&self, accept: &Accept, client: &Session) -> Arrival {
        Arrival {
            visitor: accept.visitor,
            // A visitor who is given to another tunnel begins another visit: the first client may not have
            // noticed yet that the first one is over.
            visit: Some(self.next_visit.fetch_add(1, Ordering::Relaxed)),
            // To ask the system costs a call.
            to: if client.wants_to { accept.to() } else { None },
            service: self.service_of(accept).clone(),
            answer: self.asks(accept),
        }
    }

    /// True if a client is to say whether it has reached the local service, before anything of a visitor
    /// is sent to it: there is another one that the visitor can be given to, once.
    fn asks(&self, accept: &Accept) -> bool {
        if self.options.clients == 1 {
            return false;
        }
        let state = self.state.lock();
        let others = state.conn_list_map.who_serves(accept).nth(1);
        others.is_some() && accept.failed_by.is_none()
    }

    /// Joins a visitor with its tunnel once the client has answered that it has reached the local
    /// service. If it has not, or its tunnel has died, another client gets the visitor.
    pub(super) fn join_when_ready(
        self: &Arc<Self>,
        accept: Accept,
        accept_add_time: Instant,
        tunnel: Tunnel,
        client: Arc<Session>,
    ) {
        let (asked_at, expected) = (Instant::now(), self.pairs.expect());
        // Who waits here counts: a client that answers late would get all visitors otherwise.
        let place = client.place();
        client.tries(accept.service);
        let waits = self.wait_for_answer(&client, &tunnel, accept.service);
        self.start("ready", move |server| {
            let answer = tunnel.wait_until_ready();
            // Meanwhile the visitor has not waited for a tunnel.
            let put_back_time = accept_add_time + asked_at.elapsed();
            match answer {
                Answer::Ready(tunnel) => {
                    drop(waits);
                    client.has_reached(accept.service, true);
                    server.join_conn2(accept, tunnel, &client, place);
                }
                Answer::Failed(reason, tunnel) => {
                    client.has_reached(accept.service, false);
                    if let Some(tunnel) = tunnel {
                        server.config_conn_list_tunnel(tunnel);
                    }
                    server.give_to_another(accept, put_back_time, client, &reason);
                }
                Answer::Dead => server.put_back(accept, put_back_time),
            }
            drop(expected);
        });
    }

    /// A visitor waits for a client's answer as long as what this returns lives.
    fn wait_for_answer(
        self: &Arc<Self>,
        client: &Arc<Session>,
        tunnel: &Tunnel,
        service: usize,
    ) -> WaitsForAnswer {
        let (client, tunnel) = (client.clone(), tunnel.conn.socket().clone());
        let waits = WaitsForAnswer(self.clone(), tunnel.clone());
        self.state.lock().asked.push(Asked {
            client,
            tunnel,
            service,
        });
        waits
    }

    /// Gives a visitor to another client than this one, which has failed for this reason, if there is
    /// one. Otherwise resets it.
    fn give_to_another(
        &self,
        mut accept: Accept,
        accept_add_time: Instant,
        client: Arc<Session>,
        reason: &Failure,
    ) {
        accept.failed_by = Some(client);
        let state = self.state.lock();
        let is_served = state.conn_list_map.who_serves(&accept).next().is_some();
        drop(state);
        match is_served {
            true => {
                self.journal.given_to_another(accept.visitor, reason);
                self.wait_again(accept, accept_add_time);
            }
            false => self.journal.client_failed(accept.visitor, reason),
        }
    }

    /// Lets a visitor whose tunnel was dead wait for another one, in its turn.
    pub(super) fn put_back(&self, accept: Accept, accept_add_time: Instant) {
        self.journal.dead_tunnel(accept.visitor);
        self.wait_again(accept, accept_add_time);
    }

    fn wait_again(&self, accept: Accept, accept_add_time: Instant) {
        // The visitor waits on, and may be closed without a word.
        net::reset_on_close(&accept.socket, false);
        let mut state = self.state.lock();
        if self.stop.reached(Phase::Leaving) {
            return;
        }
        let added = state.conn_list_map.put_back(accept, accept_add_time);
        drop(state);
        match added {
            Added::Matched => self.update(),
            Added::Waits(client) => self.send_message(NEW, client.as_ref()),
        }
    }

    /// Tells who got no tunnel in time, and why.
    pub(super) fn say_expired(&self, accept: &Accept) {
        if accept.is_client() {
            return self.journal.client_at_public_port(accept.visitor);
        }
        let state = self.state.lock();
        let list = &state.conn_list_map;
        let serve = list.clients().filter(|live| live.serves(accept.service));
        let serve: Vec<_> = serve.map(|live| live.client).collect();
        let connected = list.clients().count();
        drop(state);
        let (service, timeout) = (self.service_of(accept), self.options.pair_timeout);
        self.journal
            .timed_out(accept.visitor, service, timeout, connected, &serve);
    }

    /// Ends pairs that nobody waits for any more, asks again for tunnels that were lost, and closes those
    /// that nobody needs.
    pub(super) fn look_after_pairs_and_tunnels(&self) {
        self.pairs.sweep();
        let now = Instant::now();
        let mut state = self.state.lock();
        let asked = state
            .conn_list_map
            .ask_again(now, LOST_AFTER, MOST_ASKED_AGAIN);
        let unused = state.conn_list_map.take_unused(now, UNUSED);
        drop(state);
        drop(unused);
        for client in asked {
            client.send(NEW);
        }
    }

    /// The service that a visitor came for.
    pub(super) fn service_of(&self, accept: &Accept) -> &Service {
        &self.public[accept.service].service
    }
}
