//! What fills in the parts of a [`Snapshot`] that are the same for both programs.

use std::collections::BTreeMap;

use super::process::Process;
use super::snapshot::{Service, Side, Snapshot};
use crate::journal::Status;
use crate::relay::Pairs;

impl Service {
    /// A service at this address, and what it does now and has done.
    pub fn new(
        service: &crate::service::Service,
        address: String,
        offered: bool,
        status: &Status,
    ) -> Self {
        // A service that nobody has come for yet may not be there.
        let its = status.services.get(service).cloned().unwrap_or_default();
        Self {
            name: service.name(),
            address,
            offered,
            joined: its.joined,
            waiting: Some(its.waiting),
            visits: its.joined_total,
            moved: [its.bytes_up, its.bytes_down],
        }
    }
}

impl Snapshot {
    /// What both programs know of themselves in the same way. All else is empty.
    pub fn of(side: Side, status: &Status, pairs: &Pairs) -> Self {
        Self {
            side,
            version: env!("CARGO_PKG_VERSION"),
            uptime: status.uptime,
            not_ready: Vec::new(),
            services: Vec::new(),
            sessions: Vec::new(),
            visitors: pairs.visitors(),
            max_visitors: status.max,
            refused: BTreeMap::new(),
            timed_out: status.timed_out,
            dialled: 0,
            join_times: pairs.join_times(),
            process: Process::read(),
            log: Vec::new(),
            log_left_out: 0,
        }
    }
}
