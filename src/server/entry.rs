//! What a visitor passes before it may wait for a tunnel.

use std::sync::Arc;

use crate::cidr::Cidr;
use crate::door::{Lists, Networks, NoHeader, Place, Rule, Unwelcome, hear_addresses};
use crate::options::ServerOptions;
use crate::os::crowd::{Counted, Crowd};
use crate::os::net;
use crate::server::Shared;
use crate::server::ends::Accept;
use crate::service::Service;

impl Shared {
    /// Returns a visitor who has just come if it may wait for a tunnel. Otherwise it is refused, or the
    /// header of its proxy is read first, on a thread of its own.
    pub(super) fn admit(self: &Arc<Self>, accept: Accept) -> Option<Accept> {
        let from = accept.visitor;
        if self.options.accept_proxy.is_empty() {
            return self.let_in(accept);
        }
        if !self.entry.proxies.contain(from.ip()) {
            let (address, rule) = (from.ip(), Rule::NotProxy);
            self.refuse(&accept, &Unwelcome { address, rule });
            return None;
        }
        let place = self.door.visitors.enter(accept.socket.clone(), from);
        let coming = Coming::new(self, accept.service);
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
        match place.leave().map_err(NoHeader::from).and(heard) {
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

    /// Returns the visitor if it may come in, by the address that is known now.
    fn let_in(&self, mut accept: Accept) -> Option<Accept> {
        match self.entry.check(&accept) {
            Ok(counted) => accept.counted = counted,
            Err(unwelcome) => {
                self.refuse(&accept, &unwelcome);
                return None;
            }
        }
        let (service, is_news) = (self.service_of(&accept), self.options.log_visits);
        self.journal.visitor_came(accept.visitor, service, is_news);
        Some(accept)
    }

    fn refuse(&self, accept: &Accept, unwelcome: &Unwelcome) {
        net::reset_on_close(&accept.socket, true);
        self.journal.refused_visitor(unwelcome);
    }
}

/// Who may come in.
pub struct Entry {
    /// Who says first where visitors come from, if anybody is to.
    proxies: Networks,
    /// One for each service.
    lists: Vec<Lists>,
    /// None if a source may have any number of visitors.
    crowd: Option<Arc<Crowd>>,
}

impl Entry {
    pub fn new(options: &ServerOptions) -> Self {
        let of = |rules: &[(Option<Service>, Cidr)], service| {
            let rules = rules.iter();
            let its = rules.filter(|(name, _)| name.as_ref().is_none_or(|name| name == service));
            its.map(|(_, network)| *network).collect()
        };
        let services = options.public.keys();
        let lists = services
            .map(|service| Lists::new(of(&options.allow, service), of(&options.deny, service)));
        Self {
            proxies: Networks::new(options.accept_proxy.clone()),
            lists: lists.collect(),
            crowd: options.max_per_source.map(Crowd::new),
        }
    }

    fn check(&self, accept: &Accept) -> Result<Option<Counted>, Unwelcome> {
        let from = accept.visitor;
        self.lists[accept.service].check(from.ip())?;
        let Some(crowd) = &self.crowd else {
            return Ok(None);
        };
        crowd.enter(from).map(Some).ok_or(Unwelcome {
            address: from.ip(),
            rule: Rule::TooMany(crowd.most),
        })
    }
}

/// A visitor of this service who is not in the list yet, and for whom a server that stops waits, as long
/// as this lives.
struct Coming(Arc<Shared>, usize);

impl Coming {
    fn new(server: &Arc<Shared>, service: usize) -> Self {
        server.state.lock().coming[service] += 1;
        Self(server.clone(), service)
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        let Self(server, service) = self;
        server.state.lock().coming[*service] -= 1;
        server.update();
    }
}
