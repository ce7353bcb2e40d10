//! Measures the cost of a packet at every hook that it passes.

use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};
use aya::programs::ProgramFd;
use serde::Deserialize;
use sluice_common::bench::{DESTINATION_PORT_AT, SOURCE_PORT_AT};

use crate::Options;
use crate::agents::{Bench, FAR, NEAR, PORT, Subject, TARGET};
use crate::driver::{Driver, Kind, Packets};
use crate::frames::{End, Segment, ends, frame};
use crate::report::{self, Row, Unit};

/// Number of repetitions of every measurement.
const ROUNDS: usize = 7;
/// Packets of one measurement of known flows and strangers.
const REPEAT: u32 = 200_000;
/// Connections that are open, and go through a program one after the other.
const FLOWS: u16 = 10_000;
/// Connections that one measurement of new ones opens.
const NEW: u16 = 1000;
/// Client ports: of the connections that are open, and of those that are opened.
const OPEN: u16 = 2000;
const OPENED: u16 = OPEN + FLOWS;
/// ... and of those that are none of a Service.
const DIRECT: u16 = 40_000;

/// A device of a node.
struct Device {
    index: u32,
    mac: [u8; 6],
}

impl Device {
    fn find(subject: &Subject, name: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Link {
            ifindex: u32,
            address: String,
        }
        let text = subject.node.run("ip", ["-json", "link", "show", "dev", name])?;
        let links: Vec<Link> =
            serde_json::from_str(&text).context("cannot read what `ip` prints")?;
        let link = links.first().with_context(|| format!("the node has no device {name}"))?;
        let mut mac = [0; 6];
        for (byte, text) in mac.iter_mut().zip(link.address.split(':')) {
            *byte = u8::from_str_radix(text, 16)?;
        }
        Ok(Self { index: link.ifindex, mac })
    }

    /// Returns the device by which a node reaches an address.
    fn towards(subject: &Subject, address: Ipv4Addr) -> Result<Self> {
        #[derive(Deserialize)]
        struct Route {
            dev: String,
        }
        let text = subject.node.run("ip", ["-json", "route", "get", &address.to_string()])?;
        let routes: Vec<Route> =
            serde_json::from_str(&text).context("cannot read what `ip` prints")?;
        Self::find(subject, &routes.first().context("there is no route")?.dev)
    }
}

/// A hook that packets of a connection meet, and what they look like there.
struct Hop {
    what: String,
    kind: Kind,
    program: ProgramFd,
    device: Device,
    /// The client's packets, or the endpoint's.
    is_reply: bool,
}

impl Hop {
    fn new(
        what: &str,
        subject: &Subject,
        program: &str,
        to: Ipv4Addr,
        is_reply: bool,
    ) -> Result<Self> {
        Ok(Self {
            what: what.to_owned(),
            kind: Kind::Tc,
            program: subject.program(program)?,
            device: Device::towards(subject, to)?,
            is_reply,
        })
    }

    fn port_at(&self) -> usize {
        if self.is_reply { DESTINATION_PORT_AT } else { SOURCE_PORT_AT }
    }
}

/// The hooks that a connection passes on a node, the client's packets' first.
struct Way {
    frontend: Ipv4Addr,
    client: Ipv4Addr,
    hops: Vec<Hop>,
}

impl Way {
    /// To a pod of the same node.
    fn near(subject: &Subject, client: Ipv4Addr) -> Result<Self> {
        let pod = subject.near.ipv4();
        let hops = vec![
            Hop::new(
                "near: to the frontend, uplink ingress",
                subject,
                "tc_ingress_l2",
                client,
                false,
            )?,
            Hop::new("near: to the endpoint, edge egress", subject, "tc_egress_l2", pod, false)?,
            Hop::new("near: the answer, edge ingress", subject, "tc_ingress_l2", pod, true)?,
            Hop::new("near: the answer, uplink egress", subject, "tc_egress_l2", client, true)?,
        ];
        Ok(Self { frontend: NEAR, client, hops })
    }

    /// To a pod of another node: the client is masqueraded.
    fn far(subject: &Subject, client: Ipv4Addr) -> Result<Self> {
        let hops = vec![
            Hop::new(
                "far: to the frontend, uplink ingress",
                subject,
                "tc_ingress_l2",
                client,
                false,
            )?,
            Hop::new(
                "far: to the endpoint, uplink egress",
                subject,
                "tc_egress_l2",
                subject.far,
                false,
            )?,
            Hop::new(
                "far: the answer, uplink ingress",
                subject,
                "tc_ingress_l2",
                subject.far,
                true,
            )?,
            Hop::new("far: the answer, uplink egress", subject, "tc_egress_l2", client, true)?,
        ];
        Ok(Self { frontend: FAR, client, hops })
    }

    /// Sends a segment of a connection through all hooks of its direction; both ends as each hook
    /// sees them, and as they are behind the last one.
    fn send(
        &self,
        driver: &mut Driver,
        (source, destination): (End, End),
        segment: Segment,
        is_reply: bool,
    ) -> Result<Vec<(End, End)>> {
        let mut seen = vec![(source, destination)];
        for hop in self.hops.iter().filter(|hop| hop.is_reply == is_reply) {
            let (source, destination) = *seen.last().context("no ends")?;
            let frame = frame(hop.device.mac, source, destination, segment)?;
            seen.push(ends(&driver.send(hop.kind, &hop.program, hop.device.index, &frame)?)?);
        }
        Ok(seen)
    }

    /// Opens a connection from a port; the ends as each hook sees them.
    fn open(&self, driver: &mut Driver, port: u16) -> Result<Vec<(End, End)>> {
        let ends = ((self.client, port), (self.frontend, PORT));
        let mut to = self.send(driver, ends, Segment::Syn, false)?;
        let (shown, endpoint) = to.pop().context("no hop")?;
        ensure!(endpoint.1 == TARGET, "no frontend took the packet: it went on to {endpoint:?}");
        let mut back = self.send(driver, (endpoint, shown), Segment::SynAck, true)?;
        let last = back.pop().context("no hop")?;
        ensure!(
            last == (ends.1, ends.0),
            "the answer came back as {last:?}, the question was {ends:?}"
        );
        let _ = self.send(driver, ends, Segment::Ack, false)?;
        let _ = self.send(driver, (endpoint, shown), Segment::Ack, true)?;
        to.extend(back);
        Ok(to)
    }

    /// Returns the packets of some flows at each hook.
    fn packets(&self, seen: &[Vec<(End, End)>], segment: Segment) -> Result<Vec<Packets>> {
        let first = seen.first().context("no flow")?;
        self.hops
            .iter()
            .enumerate()
            .map(|(at, hop)| {
                let (source, destination) = first[at];
                let port =
                    |flow: &Vec<(End, End)>| if hop.is_reply { flow[at].1.1 } else { flow[at].0.1 };
                Ok(Packets {
                    frame: frame(hop.device.mac, source, destination, segment)?,
                    port_at: hop.port_at(),
                    ports: seen.iter().map(port).collect(),
                })
            })
            .collect()
    }
}

/// One thing that is measured of one agent: samples in nanoseconds.
struct Samples(Vec<(String, Vec<f64>)>);

impl Samples {
    fn add(&mut self, what: &str, sample: f64) {
        match self.0.iter_mut().find(|(name, _)| name == what) {
            Some((_, samples)) => samples.push(sample),
            None => self.0.push((what.to_owned(), vec![sample])),
        }
    }
}

/// Measures one program with some packets, less what the driver costs by itself.
fn time(driver: &mut Driver, hop: &Hop, packets: &Packets, repeat: u32) -> Result<f64> {
    let nothing = driver.nothing(hop.kind)?;
    let mut mean = |program: &ProgramFd| -> Result<f64> {
        driver.aim(hop.kind, program, packets)?;
        let (time, _) = driver.run(hop.kind, hop.device.index, &packets.frame, repeat)?;
        Ok(time.as_secs_f64() * 1e9)
    };
    let own = mean(&nothing)?;
    Ok(mean(&hop.program)? - own)
}

/// The prepared measurements of one agent.
struct Prepared {
    near: (Way, Vec<Packets>),
    far: (Way, Vec<Packets>),
    /// Packets that belong to no connection.
    others: Vec<(Hop, Packets)>,
}

fn prepare(driver: &mut Driver, subject: &Subject, client: Ipv4Addr) -> Result<Prepared> {
    let mut open = |way: Way| -> Result<(Way, Vec<Packets>)> {
        let flows =
            (OPEN..OPEN + FLOWS).map(|port| way.open(driver, port)).collect::<Result<Vec<_>>>()?;
        let packets = way.packets(&flows, Segment::Ack)?;
        Ok((way, packets))
    };
    let near = open(Way::near(subject, client)?)?;
    let far = open(Way::far(subject, client)?)?;
    let mut others = Vec::new();
    let unknown = (Ipv4Addr::new(10, 9, 8, 7), 443);
    let pod = subject.near.ipv4();
    for (what, program, device, to) in [
        ("a stranger, uplink ingress", "tc_ingress_l2", client, unknown),
        ("a stranger, uplink egress", "tc_egress_l2", client, unknown),
        ("a stranger, XDP", "xdp_uplink", client, unknown),
        ("direct to an endpoint, uplink ingress", "tc_ingress_l2", client, (pod, TARGET)),
        ("direct to an endpoint, edge egress", "tc_egress_l2", pod, (pod, TARGET)),
    ] {
        let kind = if program == "xdp_uplink" { Kind::Xdp } else { Kind::Tc };
        let hop = Hop { kind, ..Hop::new(what, subject, program, device, false)? };
        let frame = frame(hop.device.mac, (client, DIRECT), to, Segment::Ack)?;
        let ports = (DIRECT..DIRECT + FLOWS).collect();
        others.push((hop, Packets { frame, port_at: SOURCE_PORT_AT, ports }));
    }
    let hop = Hop {
        kind: Kind::Xdp,
        ..Hop::new("near: to the frontend, XDP", subject, "xdp_uplink", client, false)?
    };
    others.push((hop, near.1.first().context("no packets")?.clone()));
    Ok(Prepared { near, far, others })
}

fn measure(
    driver: &mut Driver,
    prepared: &Prepared,
    samples: &mut Samples,
    round: usize,
) -> Result<()> {
    for (hop, packets) in &prepared.others {
        samples.add(&hop.what, time(driver, hop, packets, REPEAT)?);
    }
    for (way, all) in [&prepared.near, &prepared.far] {
        for (hop, packets) in way.hops.iter().zip(all) {
            let one = Packets { ports: packets.ports[..1].to_vec(), ..packets.clone() };
            samples.add(&format!("{}, one flow", hop.what), time(driver, hop, &one, REPEAT)?);
            samples.add(
                &format!("{}, {} flows", hop.what, packets.ports.len()),
                time(driver, hop, packets, REPEAT)?,
            );
        }
        // A new flow is new once: its packets go through each hook once, and are looked at one by
        // one in between.
        let ports = OPENED + NEW * round as u16..OPENED + NEW * (round as u16 + 1);
        let mut seen: Vec<_> =
            ports.map(|port| ((way.client, port), (way.frontend, PORT))).collect();
        for hop in way.hops.iter().filter(|hop| !hop.is_reply) {
            let (source, destination) = *seen.first().context("no flow")?;
            let packets = Packets {
                frame: frame(hop.device.mac, source, destination, Segment::Syn)?,
                port_at: hop.port_at(),
                ports: seen.iter().map(|(source, _)| source.1).collect(),
            };
            let sample = time(driver, hop, &packets, NEW.into())?;
            samples.add(&format!("{}, first packets", hop.what), sample);
            for (source, destination) in &mut seen {
                let frame = frame(hop.device.mac, *source, *destination, Segment::Syn)?;
                let out = driver.send(hop.kind, &hop.program, hop.device.index, &frame)?;
                (*source, *destination) = ends(&out)?;
            }
        }
    }
    Ok(())
}

/// Measures all agents by turns, and prints the table.
pub(crate) fn run(options: &Options) -> Result<()> {
    let bench = Bench::start(options.against.as_ref())?;
    let client = bench.client.ipv4();
    let mut driver = Driver::load()?;
    let mut prepared = Vec::new();
    for subject in &bench.subjects {
        let made = subject.node.enter(|| prepare(&mut driver, subject, client))?;
        prepared
            .push(made.with_context(|| format!("cannot open connections by `{}`", subject.name))?);
    }
    let mut samples: Vec<_> = bench.subjects.iter().map(|_| Samples(Vec::new())).collect();
    for round in 0..ROUNDS {
        for ((subject, prepared), samples) in bench.subjects.iter().zip(&prepared).zip(&mut samples)
        {
            subject.node.enter(|| measure(&mut driver, prepared, samples, round))??;
        }
        eprintln!("round {} of {ROUNDS}", round + 1);
    }
    let mut of_agents = samples.into_iter();
    let mut rows: Vec<(String, Vec<Vec<f64>>)> = of_agents
        .next()
        .map(|Samples(all)| all.into_iter().map(|(what, of_one)| (what, vec![of_one])).collect())
        .unwrap_or_default();
    for Samples(all) in of_agents {
        for ((_, row), (_, of_one)) in rows.iter_mut().zip(all) {
            row.push(of_one);
        }
    }
    let rows: Vec<_> =
        rows.into_iter().map(|(what, samples)| Row::new(what, Unit::Time, samples)).collect();
    let names: Vec<_> = bench.subjects.iter().map(|subject| subject.name.as_str()).collect();
    report::print(Unit::Time, &names, &rows, options.json.as_deref())
}
