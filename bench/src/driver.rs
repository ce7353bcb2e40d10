//! The driver in the kernel: it makes each packet anew and tail-calls a program.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::{Array, ProgramArray};
use aya::programs::{ProgramFd, SchedClassifier, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, Pod};
use sluice_common::bench::{HEADERS, PORTS, Template};

/// Bytes of `struct __sk_buff`, and where its `ifindex` is.
const SKB: (usize, usize) = (192, 40);
/// No port changes.
const NOWHERE: u32 = u32::MAX;

/// The kind of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tc,
    Xdp,
}

impl Kind {
    fn of(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Tc => ("drive_tc", "tc_target", "nothing_tc"),
            Self::Xdp => ("drive_xdp", "xdp_target", "nothing_xdp"),
        }
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Raw(Template);

// SAFETY: integers alone, without padding.
unsafe impl Pod for Raw {}

/// Packets of one kind: a frame, and the ports that it goes through at one place.
#[derive(Clone)]
pub(crate) struct Packets {
    pub(crate) frame: Vec<u8>,
    pub(crate) port_at: usize,
    pub(crate) ports: Vec<u16>,
}

/// The loaded driver.
pub(crate) struct Driver {
    ebpf: Ebpf,
}

impl Driver {
    /// Loads what `$SLUICE_BENCH_OBJECT` holds.
    pub(crate) fn load() -> Result<Self> {
        let path = std::env::var_os("SLUICE_BENCH_OBJECT").context(
            "SLUICE_BENCH_OBJECT does not say where the driver is: run `cargo xtask bench`",
        )?;
        let mut ebpf =
            Ebpf::load_file(&path).with_context(|| format!("cannot load {}", path.display()))?;
        for name in ["drive_tc", "nothing_tc"] {
            tc(&mut ebpf, name)?.load().with_context(|| format!("cannot load {name}"))?;
        }
        for name in ["drive_xdp", "nothing_xdp"] {
            xdp(&mut ebpf, name)?.load().with_context(|| format!("cannot load {name}"))?;
        }
        Ok(Self { ebpf })
    }

    /// Returns the program that does nothing.
    pub(crate) fn nothing(&mut self, kind: Kind) -> Result<ProgramFd> {
        let (_, _, nothing) = kind.of();
        Ok(match kind {
            Kind::Tc => tc(&mut self.ebpf, nothing)?.fd()?.try_clone()?,
            Kind::Xdp => xdp(&mut self.ebpf, nothing)?.fd()?.try_clone()?,
        })
    }

    /// Chooses the program, and the packets that are made for it.
    pub(crate) fn aim(&mut self, kind: Kind, program: &ProgramFd, packets: &Packets) -> Result<()> {
        let (_, target, _) = kind.of();
        let map =
            self.ebpf.map_mut(target).with_context(|| format!("the driver has no map {target}"))?;
        ProgramArray::try_from(map)?
            .set(0, program, 0)
            .context("cannot aim the driver at a program")?;
        self.packets(&packets.frame, packets.port_at as u32, &packets.ports)
    }

    fn packets(&mut self, frame: &[u8], port_at: u32, ports: &[u16]) -> Result<()> {
        ensure!(
            frame.len() >= HEADERS,
            "a frame of {} bytes is too short for the driver",
            frame.len()
        );
        ensure!(
            !ports.is_empty() && ports.len() <= PORTS as usize,
            "the driver goes through 1 to {PORTS} ports, not {}",
            ports.len()
        );
        let mut headers = [0; HEADERS / 8];
        for (word, bytes) in headers.iter_mut().zip(frame.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into()?);
        }
        let mut table: Array<_, u16> =
            self.ebpf.map_mut("ports").context("the driver has no map `ports`")?.try_into()?;
        for (index, port) in (0..).zip(ports) {
            table.set(index, port.to_be(), 0)?;
        }
        let template =
            Template { headers, port_at, flows: ports.len() as u32, next: 0, reserved: 0 };
        let mut templates: Array<_, Raw> = self
            .ebpf
            .map_mut("template")
            .context("the driver has no map `template`")?
            .try_into()?;
        Ok(templates.set(0, Raw(template), 0)?)
    }

    /// Runs what is aimed at; the mean time of one run, and the last packet as it came out.
    pub(crate) fn run(
        &mut self,
        kind: Kind,
        ifindex: u32,
        frame: &[u8],
        repeat: u32,
    ) -> Result<(Duration, Vec<u8>)> {
        let context = match kind {
            // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
            // egress_ifindex.
            Kind::Xdp => [0, frame.len() as u32, 0, ifindex, 0, 0].map(u32::to_ne_bytes).concat(),
            Kind::Tc => {
                let (length, at) = SKB;
                let mut context = vec![0; length];
                context[at..at + 4].copy_from_slice(&ifindex.to_ne_bytes());
                context
            }
        };
        let mut out = vec![0; frame.len() + 256];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            repeat,
            ..TestRunOptions::default()
        };
        let (driver, ..) = kind.of();
        let result = match kind {
            Kind::Tc => tc(&mut self.ebpf, driver)?.test_run(options),
            Kind::Xdp => xdp(&mut self.ebpf, driver)?.test_run(options),
        }
        .with_context(|| format!("the kernel refuses to run {driver}"))?;
        out.truncate(result.data_size_out as usize);
        Ok((result.duration, out))
    }

    /// Sends one packet through a program; the packet as it came out.
    pub(crate) fn send(
        &mut self,
        kind: Kind,
        program: &ProgramFd,
        ifindex: u32,
        frame: &[u8],
    ) -> Result<Vec<u8>> {
        let (_, target, _) = kind.of();
        let map =
            self.ebpf.map_mut(target).with_context(|| format!("the driver has no map {target}"))?;
        ProgramArray::try_from(map)?
            .set(0, program, 0)
            .context("cannot aim the driver at a program")?;
        self.packets(frame, NOWHERE, &[0])?;
        self.run(kind, ifindex, frame, 1).map(|(_, out)| out)
    }
}

fn tc<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program =
        ebpf.program_mut(name).with_context(|| format!("the driver has no program {name}"))?;
    Ok(program.try_into()?)
}

fn xdp<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program =
        ebpf.program_mut(name).with_context(|| format!("the driver has no program {name}"))?;
    Ok(program.try_into()?)
}
