//! Moving in beside a running kube-proxy, and out again, without a broken connection.
//!
//! # In
//!
//! 1. *Passive.* The programs are attached and leave everything to netfilter. Its connections are
//!    listed, and each that is translated goes into `imported`: both tuples as packets come in.
//!    Clients of Services with affinity are noted where kube-proxy has sent them.
//! 2. *Importing.* What opens a TCP connection is ours from now on. What is mid-stream, and UDP,
//!    passes: it may be a connection that was opened after its piece of the listing. So the
//!    connections are listed once more.
//! 3. *Serving.* Everything is ours but what is in `imported`, which is listed again and again
//!    until its last connection has ended. kube-proxy's rules go when it runs no more; connections
//!    that live by them are held by a table of our own (see `rules`).
//!
//! # Out
//!
//! *Draining* is passive with flows of ours: they are served, everything else passes to netfilter.
//! When the last has ended, or at the deadline, the agent ends and removes every trace; it is
//! *released*, and stays so until it is told to take over.
//!
//! A thread does all this beside the agent's loop: listings block. It asks the loop to tell the
//! programs each phase, and waits for that.

mod affinity;
mod flows;
pub mod wish;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, bail};
use sluice_common::abi::{ServiceKey, Tuple, imported, phase};
use sluice_common::packet::header::protocol;
use sluice_common::{V4, V6};
use sluice_core::image::{Dataplane, Stack};
use sluice_core::model::object::IpFamily;
use tokio::sync::watch;

use crate::node::conntrack::{self, End, Translated, translated};
use crate::node::dataplane::{Access, Kernel, KernelStack, Maps};
use crate::node::fragments::ticks as now;
use crate::node::kube_proxy;
use crate::node::kube_proxy::rules::{self, Found};
use crate::node::publish::publish_part;
use crate::node::status::{TakeoverStatus, unix_seconds};
use wish::Wish;

/// The phase of a node that is released.
pub(crate) const RELEASED: &str = "released";
/// How often the thread looks whether something is wanted.
const LOOK: Duration = Duration::from_millis(250);
/// The shortest time between two listings; one is followed by so many times as long as it took
/// without.
const PERIOD: Duration = Duration::from_secs(2);
const REST: u32 = 20;
/// A flow of datagrams that conntrack would forget before the next listing, and so long after, is
/// netfilter's no more: its next datagram would find neither an entry nor a rule.
const MARGIN: Duration = Duration::from_secs(3);
/// How long packets that met a program in the last phase may be on their way to netfilter.
const GRACE: Duration = Duration::from_millis(100);
/// Listings until one is whole: the kernel interrupts those during which the table is resized.
const LISTINGS: u32 = 10;
/// How long conntrack keeps an idle connection that was entered, as it does by itself.
const TRACKED: Duration = Duration::from_hours(120);
/// How long kube-proxy must be away to be taken for stopped, and not for one that starts anew.
const AWAY: Duration = Duration::from_secs(10);
/// What the thread tells the agent's loop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Told {
    /// What the programs are to be told: [`phase`].
    pub(crate) phase: u32,
    /// For people.
    pub(crate) status: TakeoverStatus,
    /// Whether the agent is to end and to remove every trace.
    pub(crate) released: bool,
}

/// The loop's ends of the channels; the thread ends with them.
#[derive(Debug)]
pub(crate) struct Takeover {
    /// What the thread tells.
    pub(crate) told: watch::Receiver<Told>,
    /// The phase that the programs have been told.
    pub(crate) written: watch::Sender<u32>,
    /// Whether the maps hold what the sources say and the programs are attached.
    pub(crate) ready: watch::Sender<bool>,
}

/// What an agent begins with, by what it finds and was told.
///
/// A takeover that was interrupted is begun again: only an agent that serves everything has nothing
/// to take over.
#[must_use]
pub(crate) fn beginning(adopted: Option<u32>, flag: bool, wish: Option<Wish>) -> u32 {
    match (adopted, wish) {
        (Some(word), Some(Wish::Release { .. })) => word & !phase::MASK | phase::PASSIVE,
        (Some(word), _) if word & phase::MASK == phase::SERVE => word,
        (Some(word), _) => word & !phase::MASK | phase::PASSIVE,
        (None, Some(Wish::Takeover | Wish::Release { .. })) => phase::PASSIVE,
        (None, _) if flag => phase::PASSIVE,
        (None, _) => phase::SERVE,
    }
}

/// Starts the thread with the phase that the programs have been told.
///
/// # Errors
///
/// When there can be no thread.
pub(crate) fn start(word: u32, maps: PathBuf, state_dir: PathBuf) -> anyhow::Result<Takeover> {
    // A kernel that cannot be asked for tables has none of ours.
    let holding = rules::find().is_ok_and(|found| found.holding);
    if !holding {
        // Of what a preparation had done, nothing is left by the machine's restart.
        wish::replace(&state_dir, Wish::Prepared, Wish::Prepare)
            .context("cannot note that the node is not prepared")?;
    }
    let (takeover, walker) = begin(word, holding, maps, state_dir);
    let _thread = std::thread::Builder::new()
        .name("takeover".to_owned())
        .spawn(move || walker.run())
        .context("cannot start a thread")?;
    Ok(takeover)
}

/// Both ends of the channels, where the last agent has left, with our own table there or not.
fn begin(word: u32, holding: bool, maps: PathBuf, state_dir: PathBuf) -> (Takeover, Walker) {
    let first = Told { phase: word, status: TakeoverStatus::default(), released: false };
    let (told_sender, told) = watch::channel(first);
    let (written, written_of_thread) = watch::channel(word);
    let (ready, ready_of_thread) = watch::channel(false);
    let walker = Walker {
        told: told_sender,
        written: written_of_thread,
        ready: ready_of_thread,
        folder: maps,
        state_dir,
        maps: None,
        is_settled: false,
        v4: BTreeMap::new(),
        v6: BTreeMap::new(),
        known: false,
        // Our own table tells that kube-proxy's rules are still to go. They alone do not: they may
        // be there to stay, for an agent that serves beside it.
        is_idle: word == phase::SERVE && !holding,
        interval: PERIOD,
        seen_running: None,
    };
    (Takeover { told, written, ready }, walker)
}

/// What is netfilter's, as the maps have it.
type Imported<F> = BTreeMap<Tuple<<F as sluice_common::Family>::Address>, u32>;

/// How much a listing has found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Listed {
    /// Connections that live: TCP's and SCTP's.
    connections: u64,
    /// Flows of datagrams.
    datagram_flows: u64,
    /// Entries in the maps, of what has ended as well.
    entries: usize,
}

impl Listed {
    fn bits(self) -> u32 {
        let any = if self.entries != 0 { phase::IMPORTED } else { 0 };
        let udp = if self.datagram_flows != 0 { phase::IMPORTED_UDP } else { 0 };
        any | udp
    }

    fn lives(self) -> bool {
        self.connections + self.datagram_flows != 0
    }
}

/// Which connections a listing takes up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// All that are translated: whoever has translated them, they are not ours.
    All,
    /// Those that are known, and those to our frontends: opened by packets that the maps have left
    /// to netfilter. Idle flows of datagrams are forgotten.
    KnownAndOurs,
    /// Those that are known: while all that is new is netfilter's.
    Known,
}

struct Walker {
    told: watch::Sender<Told>,
    written: watch::Receiver<u32>,
    ready: watch::Receiver<bool>,
    /// Where the maps are pinned.
    folder: PathBuf,
    state_dir: PathBuf,
    maps: Option<Maps>,
    /// Whether those are the ones that the agent stays with: before it is ready, others may take
    /// their place.
    is_settled: bool,
    v4: Imported<V4>,
    v6: Imported<V6>,
    /// Whether the two above are what the maps have.
    known: bool,
    /// Whether nothing is left to do until somebody wants something.
    is_idle: bool,
    /// The time from one listing to the next.
    interval: Duration,
    /// When kube-proxy was last seen to run.
    seen_running: Option<Instant>,
}

impl Walker {
    fn run(mut self) {
        while !self.told.is_closed() {
            match self.step() {
                Ok(true) => return,
                Ok(false) => self.tell(|status| status.problem = None),
                Err(error) if self.told.is_closed() => {
                    tracing::debug!("{error:#}");
                    return;
                }
                Err(error) => {
                    let text = format!("{error:#}");
                    if self.told.borrow().status.problem.as_ref() != Some(&text) {
                        tracing::warn!("{text}; trying again");
                    }
                    self.tell(|status| status.problem = Some(text));
                }
            }
            self.rest(if self.is_idle { LOOK } else { self.interval });
        }
    }

    /// Does what is due; true when the agent is released.
    fn step(&mut self) -> anyhow::Result<bool> {
        let mut wish = wish::read(&self.state_dir);
        let now = self.phase() & phase::MASK;
        if let Some(Wish::Release { deadline }) = wish {
            return self.drain(deadline);
        }
        if now != phase::SERVE {
            self.take_over()?;
            if self.phase() & phase::MASK != phase::SERVE {
                return Ok(false);
            }
        }
        if wish == Some(Wish::Takeover) {
            self.is_idle = false;
            wish::done(&self.state_dir, Wish::Takeover)
                .context("cannot remove the wish that is done")?;
        }
        if wish == Some(Wish::Prepare) {
            self.prepare()?;
            wish = Some(Wish::Prepared);
        }
        if !self.is_idle || wish == Some(Wish::Finish) {
            self.keep(wish)?;
        }
        self.tell(|status| "serving".clone_into(&mut status.phase));
        Ok(false)
    }

    /// Sleeps, unless somebody wants something.
    fn rest(&self, rest: Duration) {
        let (until, before) = (Instant::now() + rest, wish::read(&self.state_dir));
        while Instant::now() < until
            && !self.told.is_closed()
            && wish::read(&self.state_dir) == before
        {
            std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
        }
    }

    fn tell(&self, change: impl FnOnce(&mut TakeoverStatus)) {
        let mut status = self.told.borrow().status.clone();
        change(&mut status);
        let _ = publish_part(&self.told, |told| &mut told.status, status);
    }

    fn phase(&self) -> u32 {
        self.told.borrow().phase
    }

    /// Has the programs told a phase, and waits until they are.
    fn enter(&self, word: u32) -> anyhow::Result<()> {
        let _ = publish_part(&self.told, |told| &mut told.phase, word);
        self.wait("the programs to be told", || *self.written.borrow() == word)
    }

    fn wait(&self, what: &str, is_done: impl Fn() -> bool) -> anyhow::Result<()> {
        while !is_done() {
            if self.told.is_closed() {
                bail!("the agent ends while waiting for {what}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn open(&mut self) -> anyhow::Result<()> {
        if !self.is_settled {
            // Asked before: what is opened while the agent becomes ready may be what it has just
            // left.
            let is_ready = *self.ready.borrow();
            self.known = false;
            self.maps = Some(Maps::open(&self.folder, Access::Read)?);
            self.is_settled = is_ready;
        }
        Ok(())
    }

    fn take_over(&mut self) -> anyhow::Result<()> {
        self.is_idle = false;
        let bits = self.phase() & !phase::MASK;
        self.enter(phase::PASSIVE | bits)?;
        self.tell(|status| {
            "passive".clone_into(&mut status.phase);
            status.waiting_for = Some("the programs to be attached to a whole image".to_owned());
            status.flows = None;
        });
        // Whoever wants a release meanwhile gets it.
        let ready = self.ready.clone();
        let state_dir = self.state_dir.clone();
        self.wait("the programs", || {
            *ready.borrow() || matches!(wish::read(&state_dir), Some(Wish::Release { .. }))
        })?;
        if !*self.ready.borrow() {
            return Ok(());
        }
        let started = Instant::now();
        self.open()?;
        hold()?;
        let listed = self.list(Which::All)?;
        self.enter(phase::PASSIVE | listed.bits())?;
        let clients = self.import_affinity()?;
        self.enter(phase::IMPORT | listed.bits())?;
        self.tell(|status| {
            "importing".clone_into(&mut status.phase);
            status.waiting_for = None;
        });
        let flipped = started.elapsed();
        std::thread::sleep(GRACE);
        let listed = self.list(Which::All)?;
        let more = self.import_affinity()?;
        self.report(listed, None);
        // Whoever hears that the node is ready hears this too.
        self.tell(|status| "serving".clone_into(&mut status.phase));
        self.enter(phase::SERVE | listed.bits())?;
        tracing::info!(
            connections = listed.connections,
            datagram_flows = listed.datagram_flows,
            affinity_clients = clients + more,
            new_connections_after_ms = flipped.as_millis(),
            serving_after_ms = started.elapsed().as_millis(),
            "took over; netfilter keeps the connections that it has translated"
        );
        Ok(())
    }

    fn import_affinity(&self) -> anyhow::Result<usize> {
        let maps = Maps::open(&self.folder, Access::Read)?;
        let kernel = Kernel::new(maps);
        let image = kernel.read().context("cannot read the maps")?;
        affinity::import(kernel.maps(), &image, now()).context("cannot take over session affinity")
    }

    /// Lists netfilter's connections and brings the maps in step with them.
    fn list(&mut self, which: Which) -> anyhow::Result<Listed> {
        let listed = self.list_both(which);
        // A part may have been written: it would stay for ever if nobody read it.
        self.known &= listed.is_ok();
        listed
    }

    fn list_both(&mut self, which: Which) -> anyhow::Result<Listed> {
        self.open()?;
        let Some(maps) = &self.maps else { bail!("the maps are not open") };
        if !self.known {
            self.v4 = V4::imported(maps)?.into_iter().collect();
            self.v6 = V6::imported(maps)?.into_iter().collect();
            self.known = true;
        }
        let mut listed = Listed::default();
        let started = Instant::now();
        let how = (which, self.interval + MARGIN);
        self.v4 = list::<V4>(maps, IpFamily::V4, &self.v4, how, &mut listed)?;
        self.v6 = list::<V6>(maps, IpFamily::V6, &self.v6, how, &mut listed)?;
        self.interval = PERIOD.max(started.elapsed() * REST);
        listed.entries = self.v4.len() + self.v6.len();
        Ok(listed)
    }

    fn report(&self, listed: Listed, found: Option<&Found>) {
        self.tell(|status| {
            status.connections = listed.connections;
            status.datagram_flows = listed.datagram_flows;
            if let Some(found) = found {
                status.kube_proxy = found.words();
                status.holding = found.holding;
            }
        });
    }

    /// Whether kube-proxy is known to run no more: told so, or because its process was seen and is
    /// there no more; processes of the whole machine are in view of some agents alone.
    fn is_gone(&mut self, wish: Option<Wish>) -> bool {
        if wish == Some(Wish::Finish) {
            return true;
        }
        if !sees_all_processes() {
            return false;
        }
        if kube_proxy::running().is_some() {
            self.seen_running = Some(Instant::now());
        }
        // One that was never seen may be part of another process: whoever stops that has to say so.
        let is_gone = self.seen_running.is_some_and(|seen| seen.elapsed() >= AWAY);
        if is_gone {
            self.seen_running = None;
        }
        is_gone
    }

    /// Lets go what has ended: netfilter's connections, then kube-proxy's rules, at last the table
    /// that holds them.
    fn keep(&mut self, wish: Option<Wish>) -> anyhow::Result<()> {
        // What is begun here is seen through, by whomever it was asked for.
        self.is_idle = false;
        let which = if wish == Some(Wish::Finish) { Which::All } else { Which::KnownAndOurs };
        let listed = self.list(which)?;
        self.enter(phase::SERVE | listed.bits())?;
        let mut found = rules::listed()?;
        if found.balances() && self.is_gone(wish) {
            hold()?;
            rules::remove(&found, false).context("cannot remove kube-proxy's rules")?;
            if let Some(words) = found.words() {
                tracing::info!("removed {words}; what lives by them is held");
            }
            found = rules::listed()?;
        }
        if wish == Some(Wish::Finish) {
            wish::done(&self.state_dir, Wish::Finish)
                .context("cannot remove the wish that is done")?;
        }
        let mut waiting = None;
        if found.is_legacy() {
            waiting = Some(LEGACY.to_owned());
        } else if found.balances() {
            waiting = Some(STOP.to_owned());
        } else if wish == Some(Wish::Prepared) {
            waiting = Some("kube-proxy to be started, and for `sluice release`".to_owned());
        } else if listed.lives() {
            waiting = Some("netfilter's last connections to end".to_owned());
        } else {
            rules::remove(&found, true).context("cannot remove kube-proxy's last rules")?;
            if rules::let_go()
                .context("cannot remove the table that held netfilter's connections")?
            {
                tracing::info!("netfilter's last connection has ended: the takeover is done");
            }
            found = rules::listed()?;
            // What has just ended may send a last packet, which is left alone for as long as
            // conntrack knows it.
            self.is_idle = listed.entries == 0;
        }
        self.report(listed, Some(&found));
        self.tell(|status| status.waiting_for = waiting);
        Ok(())
    }

    /// Lets conntrack know the connections of this host's own sockets before kube-proxy has it
    /// translate new ones: those that it has not tracked so far would be new to it.
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.open()?;
        let Some(maps) = &self.maps else { bail!("the maps are not open") };
        forget_ended::<V4>(maps, IpFamily::V4)?;
        forget_ended::<V6>(maps, IpFamily::V6)?;
        hold()?;
        let all = [flows::of_host::<V4>(maps)?, flows::of_host::<V6>(maps)?].concat();
        conntrack::keep_clear(&all, TRACKED).context("cannot enter our flows into conntrack")?;
        wish::replace(&self.state_dir, Wish::Prepare, Wish::Prepared)
            .context("cannot note that the node is prepared")?;
        self.is_idle = false;
        Ok(())
    }

    /// Enters flows of ours that netfilter does not see into conntrack: it is to serve new
    /// connections beside them, and picks source ports by itself.
    fn keep_clear(&mut self, deadline: u64) -> anyhow::Result<()> {
        self.open()?;
        let Some(maps) = &self.maps else { bail!("the maps are not open") };
        let _ = flows::live::<V4>(maps)? + flows::live::<V6>(maps)?;
        let all = [flows::clear::<V4>(maps)?, flows::clear::<V6>(maps)?].concat();
        conntrack::keep_clear(&all, deadline_in(deadline))
            .context("cannot enter our flows into conntrack")
    }

    /// Serves what is known and waits for its end; true when the agent is to go.
    fn drain(&mut self, deadline: u64) -> anyhow::Result<bool> {
        self.is_idle = false;
        let bits = self.phase() & !phase::MASK;
        self.tell(|status| "draining".clone_into(&mut status.phase));
        // Twice: what is opened meanwhile is entered then.
        self.keep_clear(deadline)?;
        self.enter(phase::PASSIVE | bits)?;
        self.keep_clear(deadline)?;
        let wish = Wish::Release { deadline };
        // Somebody may think better of it.
        while wish::read(&self.state_dir) == Some(wish) {
            if self.told.is_closed() {
                bail!("the agent ends while it waits for the last flow");
            }
            self.open()?;
            let listed = if bits == 0 { Listed::default() } else { self.list(Which::Known)? };
            let Some(maps) = &self.maps else { bail!("the maps are not open") };
            let flows = flows::live::<V4>(maps)? + flows::live::<V6>(maps)?;
            let left = deadline_in(deadline).as_secs();
            self.report(listed, None);
            self.tell(|status| {
                status.flows = Some(flows);
                status.waiting_for = Some(format!("{flows} flows to end, for {left} s at most"));
            });
            if flows == 0 || left == 0 {
                if flows != 0 {
                    tracing::warn!(
                        flows,
                        "the time for a release is over: flows that live are cut"
                    );
                }
                wish::write(&self.state_dir, Wish::Released)
                    .context("cannot note that the node is released")?;
                self.tell(|status| {
                    RELEASED.clone_into(&mut status.phase);
                    status.waiting_for = None;
                });
                self.told.send_modify(|told| told.released = true);
                return Ok(true);
            }
            self.rest(Duration::from_secs(1));
        }
        Ok(false)
    }
}

/// What a person has to do about rules that stand.
const STOP: &str = "kube-proxy to be stopped, so that its rules can go (`sluice takeover --finish` tells that it is)";
const LEGACY: &str = "kube-proxy's chains in legacy iptables to be removed: stop it and run `kube-proxy --cleanup`, since netlink does not reach them";

/// Makes our own table. Where the kernel refuses it, legacy iptables will do: it has chains of type
/// nat for as long as the machine runs.
fn hold() -> anyhow::Result<()> {
    match rules::hold() {
        Err(error) if !rules::listed()?.is_legacy() => {
            Err(error).context("cannot make the nftables table that holds netfilter's connections")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether this process is in the machine's first PID namespace.
fn sees_all_processes() -> bool {
    // `PROC_PID_INIT_INO`: its number is fixed.
    std::fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link == Path::new("pid:[4026531836]"))
}

/// The tuples of a connection as its packets come in, with their bits.
fn tuples<F: Stack>(found: &Translated) -> Option<[Tuple<F::Address>; 2]> {
    let tuple = |source: End, destination: End| {
        Some(Tuple {
            source: F::address(source.0)?,
            destination: F::address(destination.0)?,
            source_port: source.1,
            destination_port: destination.1,
            protocol: found.protocol,
            side: 0,
            reserved: [0; 2],
        })
    };
    Some([tuple(found.client, found.frontend)?, tuple(found.backend, found.seen_as)?])
}

/// Lists a family until a listing is whole, and writes the difference into the maps.
fn list<F: KernelStack>(
    maps: &Maps,
    family: IpFamily,
    before: &Imported<F>,
    (which, margin): (Which, Duration),
    listed: &mut Listed,
) -> anyhow::Result<Imported<F>> {
    let frontends = F::frontends(maps)?;
    let mut after = Imported::<F>::new();
    let mut counts = Listed::default();
    let mut idle = Vec::new();
    for attempt in 1.. {
        after.clear();
        idle.clear();
        counts = Listed::default();
        let whole = translated(family, |found| {
            let Some([original, reply]) = tuples::<F>(&found) else { return };
            let is_taken_up = match which {
                Which::All => true,
                Which::KnownAndOurs => {
                    before.contains_key(&original) || is_ours::<F>(&frontends, &original)
                }
                Which::Known => before.contains_key(&original),
            };
            if !is_taken_up {
                return;
            }
            if found.protocol == protocol::UDP {
                if u64::from(found.left) <= margin.as_secs() {
                    // A datagram that is on its way as netfilter's needs the entry for its answer:
                    // what the maps have is taken out of them first, and forgotten next time.
                    if !before.contains_key(&original) {
                        idle.push(found);
                    }
                    return;
                }
                counts.datagram_flows += 1;
            } else if !found.closing {
                counts.connections += 1;
            }
            let bits = if found.closing { imported::CLOSING } else { 0 };
            after.extend([(original, bits), (reply, bits)]);
        })
        .context("cannot list netfilter's connections")?;
        if whole {
            break;
        }
        if attempt >= LISTINGS {
            bail!(
                "the listing of netfilter's connections was interrupted {LISTINGS} times in a row"
            );
        }
    }
    let insert: Vec<_> = after
        .iter()
        .filter(|(key, bits)| before.get(key) != Some(bits))
        .map(|(key, bits)| (*key, *bits))
        .collect();
    let remove: Vec<_> = before.keys().filter(|key| !after.contains_key(key)).copied().collect();
    F::import(maps, &insert, &remove)
        .context("there is no room for all of netfilter's connections")?;
    if which == Which::KnownAndOurs {
        // The next datagram is ours, which conntrack would take for a part of the old flow.
        conntrack::forget(family, &idle).context("cannot delete idle entries of conntrack")?;
    }
    listed.connections += counts.connections;
    listed.datagram_flows += counts.datagram_flows;
    Ok(after)
}

/// Has conntrack forget the connections to our frontends that it has translated and that have
/// ended. A process of this host may have opened another to the same backend from the source
/// port of one while nothing tracked it; conntrack would give the next packet another port.
fn forget_ended<F: KernelStack>(maps: &Maps, family: IpFamily) -> anyhow::Result<()> {
    let frontends = F::frontends(maps)?;
    let mut ended = Vec::new();
    for _ in 0..LISTINGS {
        let whole = translated(family, |found| {
            let is_its = tuples::<F>(&found)
                .is_some_and(|[original, _]| is_ours::<F>(&frontends, &original));
            if found.closing && is_its {
                ended.push(found);
            }
        })
        .context("cannot list netfilter's connections")?;
        if whole {
            break;
        }
    }
    conntrack::forget(family, &ended).context("cannot delete ended connections of conntrack")
}

/// Whether a packet's destination is a frontend of ours; node ports count at every address.
fn is_ours<F: Stack>(
    frontends: &BTreeSet<ServiceKey<F::Address>>,
    packet: &Tuple<F::Address>,
) -> bool {
    let at = |address| ServiceKey {
        address,
        port: packet.destination_port,
        protocol: packet.protocol,
        reserved: 0,
    };
    frontends.contains(&at(packet.destination)) || frontends.contains(&at(F::Address::default()))
}

fn deadline_in(deadline: u64) -> Duration {
    Duration::from_secs(deadline.saturating_sub(unix_seconds(SystemTime::now())))
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use sluice_common::abi::Ipv4Address;

    use super::*;

    #[test]
    fn an_agent_begins_where_the_last_one_has_left() {
        use phase::{IMPORT, IMPORTED, PASSIVE, SERVE};
        let release = Some(Wish::Release { deadline: 9 });
        for (what, adopted, flag, wish, expected) in [
            ("new maps", None, false, None, SERVE),
            ("new maps, to take over", None, true, None, PASSIVE),
            ("new maps, taken back", None, false, Some(Wish::Takeover), PASSIVE),
            ("served before, with the flag", Some(SERVE | IMPORTED), true, None, SERVE | IMPORTED),
            ("served before", Some(SERVE), false, Some(Wish::Takeover), SERVE),
            ("interrupted", Some(IMPORT | IMPORTED), false, None, PASSIVE | IMPORTED),
            ("interrupted early", Some(PASSIVE), true, None, PASSIVE),
            ("draining", Some(PASSIVE), false, release, PASSIVE),
            ("draining was wanted", Some(SERVE | IMPORTED), true, release, PASSIVE | IMPORTED),
        ] {
            assert_eq!(beginning(adopted, flag, wish), expected, "{what}");
        }
    }

    #[test]
    fn what_is_unfinished_is_gone_on_with() {
        use phase::{IMPORTED, PASSIVE, SERVE};
        let folder = tempfile::tempdir().expect("a folder");
        let is_idle = |word, holding| {
            let (_, walker) =
                begin(word, holding, folder.path().join("maps"), folder.path().to_owned());
            walker.is_idle
        };
        assert!(is_idle(SERVE, false), "nothing is left to do");
        assert!(!is_idle(SERVE, true), "kube-proxy's rules are still to go, or it is awaited");
        assert!(!is_idle(SERVE | IMPORTED, false), "connections of netfilter's are left");
        assert!(!is_idle(PASSIVE, false), "interrupted");
    }

    #[test]
    fn what_a_failed_listing_has_written_is_read_anew() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = folder.path().to_owned();
        let (_takeover, mut walker) = begin(phase::SERVE, true, folder.path().join("none"), state);
        // No maps are there to be opened.
        (walker.known, walker.is_settled) = (true, true);
        assert!(walker.list(Which::All).is_err());
        assert!(!walker.known);
    }

    #[test]
    fn a_connection_is_known_by_its_packets_as_they_come_in() {
        let end = |text: &str| {
            let end: std::net::SocketAddr = text.parse().expect("address and port");
            (end.ip(), end.port())
        };
        let found = Translated {
            protocol: protocol::TCP,
            client: end("198.51.100.7:40000"),
            frontend: end("192.0.2.10:30080"),
            backend: end("10.244.1.10:8080"),
            seen_as: end("192.0.2.10:61234"),
            closing: false,
            left: 30,
        };
        let [original, reply] = tuples::<V4>(&found).expect("IPv4");
        let ip = |address: Ipv4Address| IpAddr::from(address.octets);
        assert_eq!(
            (ip(original.source), ip(original.destination)),
            (found.client.0, found.frontend.0)
        );
        assert_eq!((original.source_port, original.destination_port), (40_000, 30_080));
        assert_eq!((ip(reply.source), ip(reply.destination)), (found.backend.0, found.seen_as.0));
        assert_eq!((reply.source_port, reply.destination_port), (8080, 61_234));
        assert!(tuples::<V6>(&found).is_none());
        let key =
            |address, port| ServiceKey { address, port, protocol: protocol::TCP, reserved: 0 };
        let ours = BTreeSet::from([key(Ipv4Address::default(), 30_080)]);
        assert!(is_ours::<V4>(&ours, &original) && !is_ours::<V4>(&ours, &reply));
    }
}
