//! Tables that record lookups and their results.

use std::cell::RefCell;

use sluice_common::abi::{
    Affinity, AffinityKey, Backend, Class, Datagram, DatagramPorts, Device, Flow, Networks,
    OriginKey, Origins, Range, Service, ServiceKey, ServicePort, Settings, Ticks, Tuple,
};
use sluice_common::tables::Routes;
use sluice_common::{Family, Tables};

/// A lookup of the path and its result, if it makes a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked<F: Family> {
    /// Whether there is a flow.
    Flow { found: Option<Flow<F::Address>>, embryonic: bool },
    /// Whether there is a frontend.
    Service { found: Option<Service> },
    /// The slots of the service port for clients of a class.
    Range { class: Class, found: Range },
    /// The backend in a slot.
    Slot { slot: u32 },
    /// The data of a backend.
    Backend { found: Backend<F::Address> },
    /// The client's earlier backend.
    Affinity { found: Option<Affinity> },
    /// Whether the client may use the address.
    SourceRanges { within: bool },
    /// Whether node ports are served at the address.
    NodeAddress { serves: bool },
    /// The devices by which packets leave.
    Routes(Routes),
}

/// Tables that are recorded.
pub(super) struct Recorder<'t, F: Family, T> {
    tables: &'t T,
    /// The packet's tuple. Flows of other tuples only show which source ports are taken.
    tuple: Tuple<F::Address>,
    /// The result of the FIB lookup, if the path has asked for it.
    pub(super) routes: Option<Routes>,
    /// The number of ports to skip.
    pub(super) ports_to_skip: u32,
    asked: RefCell<Vec<Asked<F>>>,
}

impl<'t, F: Family, T> Recorder<'t, F, T> {
    /// Makes a recorder.
    pub(super) fn new(tables: &'t T, tuple: Tuple<F::Address>) -> Self {
        Self { tables, tuple, routes: None, ports_to_skip: 0, asked: RefCell::new(Vec::new()) }
    }

    /// Returns all lookups, in order.
    pub(super) fn asked(self) -> Vec<Asked<F>> {
        self.asked.into_inner()
    }

    /// Records a lookup. One that is repeated (the path starts over after the FIB lookup) counts
    /// once.
    fn note(&self, asked: Asked<F>) {
        let mut all = self.asked.borrow_mut();
        if !all.contains(&asked) {
            all.push(asked);
        }
    }
}

impl<F: Family, T: Tables<F>> Tables<F> for Recorder<'_, F, T> {
    fn listing(&self, address: &F::Address) -> u8 {
        self.tables.listing(address)
    }

    fn flow(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        let found = self.tables.flow(tuple);
        if *tuple == self.tuple {
            self.note(Asked::Flow { found: found.copied(), embryonic: false });
        }
        found
    }

    fn embryonic(&self, tuple: &Tuple<F::Address>) -> Option<&Flow<F::Address>> {
        let found = self.tables.embryonic(tuple);
        if *tuple == self.tuple {
            self.note(Asked::Flow { found: found.copied(), embryonic: true });
        }
        found
    }

    fn imported(&self, tuple: &Tuple<F::Address>) -> Option<u32> {
        self.tables.imported(tuple)
    }

    fn datagram(&self, key: &Datagram<F::Address>) -> Option<&DatagramPorts> {
        self.tables.datagram(key)
    }

    fn service(&self, key: &ServiceKey<F::Address>) -> Option<&Service> {
        let found = self.tables.service(key);
        self.note(Asked::Service { found: found.copied() });
        found
    }

    fn port(&self, service_port: u32) -> Option<&ServicePort> {
        self.tables.port(service_port)
    }

    fn range(&self, service_port: u32, class: Class) -> Option<Range> {
        let found = self.tables.range(service_port, class)?;
        self.note(Asked::Range { class, found });
        Some(found)
    }

    fn slot(&self, slot: u32) -> Option<u32> {
        self.note(Asked::Slot { slot });
        self.tables.slot(slot)
    }

    fn backend(&self, id: u32) -> Option<&Backend<F::Address>> {
        let found = self.tables.backend(id)?;
        self.note(Asked::Backend { found: *found });
        Some(found)
    }

    fn affinity(&self, key: &AffinityKey<F::Address>) -> Option<&Affinity> {
        let found = self.tables.affinity(key);
        self.note(Asked::Affinity { found: found.copied() });
        found
    }

    fn in_source_ranges(&self, service_port: u32, address: &F::Address) -> bool {
        let within = self.tables.in_source_ranges(service_port, address);
        self.note(Asked::SourceRanges { within });
        within
    }

    fn is_node_port(&self, port: u16) -> bool {
        self.tables.is_node_port(port)
    }

    fn is_node_address(&self, address: &F::Address) -> bool {
        self.tables.is_node_address(address)
    }

    fn serves_node_ports(&self, address: &F::Address) -> bool {
        let serves = self.tables.serves_node_ports(address);
        self.note(Asked::NodeAddress { serves });
        serves
    }

    fn origins(&self, key: &OriginKey<F::Address>) -> Option<&Origins<F::Address>> {
        self.tables.origins(key)
    }

    fn marks(&self) -> u32 {
        self.tables.marks()
    }

    fn settings(&self) -> Option<&Settings> {
        self.tables.settings()
    }

    fn networks(&self) -> Option<&Networks<F::Address>> {
        self.tables.networks()
    }

    fn device(&self, ifindex: u32) -> Option<&Device> {
        self.tables.device(ifindex)
    }

    fn hook_device(&self) -> Option<&Device> {
        self.tables.hook_device()
    }

    fn ifindex(&self) -> u32 {
        self.tables.ifindex()
    }

    fn routes(&self) -> Option<Routes> {
        let routes = self.routes?;
        self.note(Asked::Routes(routes));
        Some(routes)
    }

    fn ports_to_skip(&self) -> u32 {
        self.ports_to_skip
    }

    fn translated_at_socket(&self) -> bool {
        self.tables.translated_at_socket()
    }

    fn now(&self) -> Ticks {
        self.tables.now()
    }
}
