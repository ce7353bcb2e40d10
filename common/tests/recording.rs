//! Two CPUs that prove two flows of one tuple at the same time.

use std::collections::BTreeMap;

use sluice_common::abi::{Affinity, AffinityKey, Flow, Ipv4Address, Tuple};
use sluice_common::engine::record::{FlowMap, FlowTable, InsertError, Partner, Renewal, record};
use sluice_common::path::{Decision, Record, partner, partner_key};
use sluice_common::{Failure, V4};

type Entries = BTreeMap<Tuple<Ipv4Address>, Flow<Ipv4Address>>;

/// Both tables, and what another CPU writes to `flows` just before an entry of one of its
/// keys is inserted there.
#[derive(Default)]
struct Raced {
    flows: Entries,
    embryonic: Entries,
    other_cpu: Entries,
}

impl Raced {
    fn map(&mut self, map: FlowMap) -> &mut Entries {
        match map {
            FlowMap::Flows => &mut self.flows,
            FlowMap::Embryonic => &mut self.embryonic,
        }
    }
}

impl FlowTable<V4> for Raced {
    fn get(&self, map: FlowMap, key: &Tuple<Ipv4Address>) -> Option<&Flow<Ipv4Address>> {
        match map {
            FlowMap::Flows => self.flows.get(key),
            FlowMap::Embryonic => self.embryonic.get(key),
        }
    }

    fn insert(
        &mut self,
        map: FlowMap,
        key: &Tuple<Ipv4Address>,
        flow: &Flow<Ipv4Address>,
        only_new: bool,
    ) -> Result<(), InsertError> {
        if self.other_cpu.contains_key(key) {
            self.flows.append(&mut self.other_cpu);
        }
        let entries = self.map(map);
        if only_new && entries.contains_key(key) {
            return Err(InsertError::Exists);
        }
        let _ = entries.insert(*key, *flow);
        Ok(())
    }

    fn remove(&mut self, map: FlowMap, key: &Tuple<Ipv4Address>) {
        let _ = self.map(map).remove(key);
    }

    fn refresh(
        &mut self,
        _: FlowMap,
        _: &Tuple<Ipv4Address>,
        _: &Flow<Ipv4Address>,
        _: Renewal,
    ) -> bool {
        false
    }

    fn record_affinity(&mut self, _: &AffinityKey<Ipv4Address>, _: &Affinity) {}

    fn set_marks(&mut self, _: u32) {}

    fn count_failure(&mut self, _: u32, _: Failure) {}
}

fn address(last: u8) -> Ipv4Address {
    Ipv4Address { octets: [10, 0, 0, last] }
}

/// The flow of one client's tuple to an endpoint.
fn flow(endpoint: u8) -> (Tuple<Ipv4Address>, Flow<Ipv4Address>) {
    let key = Tuple {
        source: address(1),
        destination: address(2),
        source_port: 40_000,
        destination_port: 80,
        protocol: 6,
        ..Tuple::default()
    };
    let flow = Flow {
        source: address(1),
        destination: address(endpoint),
        source_port: 40_000,
        destination_port: 8080,
        ..Flow::default()
    };
    (key, flow)
}

#[test]
fn a_flow_that_is_proven_never_replaces_another_that_was_proven_meanwhile() {
    let (key, first) = flow(3);
    let (_, second) = flow(4);
    let first_entries = [(key, first), (partner_key::<V4>(&first, 6), partner::<V4>(&key, &first))];
    let second_entries =
        [(key, second), (partner_key::<V4>(&second, 6), partner::<V4>(&key, &second))];
    let mut tables = Raced {
        embryonic: second_entries.into(),
        other_cpu: first_entries.into(),
        ..Raced::default()
    };
    let mut decision = Decision::<V4>::pass(&key);
    (decision.record, decision.flow) = (Record::Promote, second);
    assert_eq!(record(&mut decision, &mut Partner::default(), &mut tables), Ok(()));
    assert_eq!(tables.flows.get(&key), Some(&first), "the other CPU's entry stays");
}

#[test]
fn a_flow_that_two_cpus_prove_is_recorded_once() {
    let (key, flow) = flow(3);
    let entries = [(key, flow), (partner_key::<V4>(&flow, 6), partner::<V4>(&key, &flow))];
    let mut tables =
        Raced { embryonic: entries.into(), other_cpu: entries.into(), ..Raced::default() };
    let mut decision = Decision::<V4>::pass(&key);
    (decision.record, decision.flow) = (Record::Promote, flow);
    assert_eq!(record(&mut decision, &mut Partner::default(), &mut tables), Ok(()));
    assert_eq!(tables.flows, entries.into());
}
