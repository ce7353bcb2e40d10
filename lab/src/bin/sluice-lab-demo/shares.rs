//! Counts which backend answered requests from everywhere.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use sluice_lab::{Namespace, Reply};

use crate::Progress;
use crate::layout::{self, Layout};

/// Number of requests in each of the twelve ways: three clients, two families, two protocols.
const EACH: u32 = 20;

/// Answers by backend, for each way and in all.
pub(crate) struct Shares {
    ways: Vec<(String, BTreeMap<String, usize>)>,
    all: BTreeMap<String, usize>,
}

/// Sends requests in every way. Each has to be answered, from the address that it was sent to.
pub(crate) fn measure(layout: &Layout) -> Result<Shares> {
    let clients: [(&str, &Namespace, [_; 2]); 3] = [
        ("pod", layout.client_pod(), layout::cluster_ips()),
        ("host", &layout.node, layout::cluster_ips()),
        ("outside", layout.outside(), layout::load_balancer_ips()),
    ];
    let mut shares = Shares { ways: Vec::new(), all: BTreeMap::new() };
    for (from, client, vips) in clients {
        for vip in vips {
            let (http, dns) =
                (SocketAddr::new(vip, layout::HTTP), SocketAddr::new(vip, layout::DNS));
            let tcp = client
                .http_get(&format!("http://{http}/"), EACH)
                .with_context(|| format!("TCP from {from} to {http}"))?;
            shares.add(&format!("{from:<8} TCP {http}"), http, &tcp)?;
            let udp =
                client.udp_ask(dns, EACH).with_context(|| format!("UDP from {from} to {dns}"))?;
            shares.add(&format!("{from:<8} UDP {dns}"), dns, &udp)?;
        }
    }
    Ok(shares)
}

impl Shares {
    fn add(&mut self, way: &str, asked: SocketAddr, replies: &[Reply]) -> Result<()> {
        for reply in replies {
            ensure!(
                reply.from == asked,
                "asked {asked}, but the answer of {} came from {}",
                reply.name,
                reply.from
            );
        }
        let counts = Reply::shares(replies);
        for (name, count) in &counts {
            *self.all.entry(name.clone()).or_insert(0) += count;
        }
        self.ways.push((way.to_owned(), counts));
        Ok(())
    }

    pub(crate) fn total(&self) -> usize {
        self.all.values().sum()
    }

    fn of(&self, name: &str) -> usize {
        self.all.get(name).copied().unwrap_or(0)
    }

    /// Checks that each of `present` has at least half its fair share, that none of `absent` has
    /// anything, and that nobody else answered.
    pub(crate) fn check(&self, present: &[&str], absent: &[&str]) -> Result<()> {
        for name in present {
            let (got, least) = (self.of(name), self.total() / present.len() / 2);
            ensure!(
                got >= least,
                "{name} answered {got} of {} requests, less than half its fair share",
                self.total()
            );
        }
        for name in absent {
            ensure!(
                self.of(name) == 0,
                "{name} answered {} requests after it was taken away",
                self.of(name)
            );
        }
        let known: usize = present.iter().map(|name| self.of(name)).sum();
        ensure!(known == self.total(), "somebody else answered: {:?}", self.all);
        Ok(())
    }

    /// Returns a bar for each backend, and a line for each way.
    pub(crate) fn chart(&self, progress: &Progress, names: &[&str]) -> String {
        const WIDTH: usize = 50;
        let mut text = String::from("\n");
        let total = self.total().max(1);
        for (name, colour) in names.iter().zip(["36", "33", "35"]) {
            let count = self.of(name);
            let bar = format!("{:<WIDTH$}", "#".repeat(count * WIDTH / total));
            let _ = writeln!(
                text,
                "    {name:<8} {} {count:>4} {:>3} %",
                progress.paint(colour, &bar),
                (count * 100 + total / 2) / total
            );
        }
        let _ = write!(text, "\n    {:<34} ", "from, protocol, to");
        for name in names {
            let _ = write!(text, "{name:>7}");
        }
        text.push('\n');
        for (way, counts) in &self.ways {
            let _ = write!(text, "    {way:<34} ");
            for name in names {
                let _ = write!(text, "{:>7}", counts.get(*name).copied().unwrap_or(0));
            }
            text.push('\n');
        }
        text.push('\n');
        text
    }
}
