//! Opens a flow as the programs do, and records nothing.

use sluice_common::Tables;
use sluice_common::abi::Flow;
use sluice_common::engine::open::{Refusal, Steps};
use sluice_common::packet::parse::Headers;
use sluice_common::path::{self, Decision, Hook, Step};
use sluice_common::tables::Routes;

use super::record::Recorder;
use super::world::{Routing, Side};

/// The steps of opening a flow that nobody opens.
pub(super) struct Opening<'w, 't, F: Side, T> {
    pub(super) routing: &'w dyn Routing,
    pub(super) hook: Hook,
    pub(super) headers: &'w Headers<F>,
    pub(super) tables: &'w mut Recorder<'t, F, T>,
    pub(super) decision: &'w mut Decision<F>,
}

impl<F: Side, T: Tables<F>> Opening<'_, '_, F, T> {
    fn routes(&self, flow: &Flow<F::Address>) -> Routes {
        let leaves_by = |address| self.routing.leaves_by(F::ip(address)).unwrap_or(0);
        Routes { to_backend: leaves_by(flow.destination), to_client: leaves_by(flow.source) }
    }
}

impl<F: Side, T: Tables<F>> Steps<F> for Opening<'_, '_, F, T> {
    fn decision(&self) -> &Decision<F> {
        self.decision
    }

    fn set_step(&mut self, step: Step) {
        self.decision.step = step;
    }

    fn open(&mut self) {
        path::open_into(self.hook, self.headers, self.tables, self.decision);
    }

    fn ask_routes(&mut self) {
        self.tables.routes = Some(self.routes(&self.decision.flow));
    }

    fn search(&mut self) {
        path::search(self.tables, self.decision);
    }

    /// Nobody looks sockets up for a question.
    fn is_held(&mut self) -> bool {
        false
    }

    fn pass_over_one(&mut self) {
        self.tables.passed_over += 1;
    }

    fn record(&mut self) -> Refusal {
        Refusal::NONE
    }
}
