//! What a visitor passes before it may wait for a tunnel.

use std::sync::Arc;

use crate::door::{NoHeader, Place, Rule, Unwelcome, hear_addresses};
use crate::os::net;
use crate::server::Shared;
use crate::server::ends::Accept;

impl Shared {
    /// Returns a visitor who has just come if it may wait for a tunnel. Otherwise it is refused, or the
    /// header of its proxy is read first, on a thread of its own.
    pub(super) fn admit(self: &Arc<Self>, accept: Accept) -> Option<Accept> {
        let from = accept.visitor;
        if self.options.accept_proxy.is_empty() {
            return self.let_in(accept);
        }
        if !self.proxies.contain(from.ip()) {
            net::reset_on_close(&accept.socket, true);
            let (address, rule) = (from.ip(), Rule::NotProxy);
            self.journal.refused_visitor(&Unwelcome { address, rule });
            return None;
        }
        let place = self.door.visitors.enter(accept.socket.clone(), from);
        let coming = Coming::new(self);
        self.start("proxy_header", move |server| {
            let _coming = coming;
            let heard = server.hear_header(accept, place);
            if let Some(accept) = heard.and_then(|accept| server.let_in(accept)) {
                server.add_conn_match_accept(accept);
            }
        });
        None
    }

    /// Reads where a visitor comes from, as its proxy says.
    fn hear_header(&self, mut accept: Accept, place: Place) -> Option<Accept> {
        let proxy = accept.visitor;
        let heard = hear_addresses(&accept.socket, proxy);
        let heard = match place.leave() {
            true => heard,
            false => Err(NoHeader::CrowdedOut),
        };
        match heard {
            Ok(addresses) => {
                if let Some(addresses) = addresses {
                    accept.visitor = addresses.source;
                    accept.to = Some(addresses.destination);
                }
                return Some(accept);
            }
            Err(NoHeader::Left) => {}
            Err(why) => {
                net::reset_on_close(&accept.socket, true);
                self.journal.refused_through(proxy, &why);
            }
        }
        None
    }

    fn let_in(&self, accept: Accept) -> Option<Accept> {
        let service = self.service_of(&accept);
        self.journal.visitor_came(accept.visitor, service);
        Some(accept)
    }
}

/// A visitor who is not in the list yet, and for whom a server that stops waits, as long as this lives.
struct Coming(Arc<Shared>);

impl Coming {
    fn new(server: &Arc<Shared>) -> Self {
        server.state.lock().coming += 1;
        Self(server.clone())
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.state.lock().coming -= 1;
        self.0.update();
    }
}
