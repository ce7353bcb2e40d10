//! Takes over from a running kube-proxy, and hands back to it, without breaking a connection.
//!
//! # Takeover
//!
//! 1. *Passive.* The programs are attached and leave everything to netfilter. Its connections are
//!    listed, and each translated one goes into `imported` with both tuples of its incoming
//!    packets. Affinity is imported for clients that kube-proxy has sent to an endpoint.
//! 2. *Importing.* Sluice serves packets that open a TCP connection. Other TCP packets, and UDP,
//!    pass: they may belong to a connection that was opened after its part of the table was listed.
//!    So the connections are listed once more.
//! 3. *Serving.* Sluice serves everything except what is in `imported`. That is listed again and
//!    again until its last connection has ended. kube-proxy's rules are removed once it no longer
//!    runs. A table of Sluice's own then holds the connections that depend on them (see `rules`).
//!
//! # Release
//!
//! *Draining* is passive with flows of Sluice: they are served, and everything else passes to
//! netfilter. When the last has ended, or at the deadline, the agent removes everything and ends.
//! The node is then *released*, and stays so until a takeover is requested.
//!
//! A thread does all this next to the agent's loop, because listings block. It asks the loop to
//! program each phase, and waits for that.

mod affinity;
mod flows;
pub mod request;

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
use request::Request;

/// The name of the phase of a released node.
pub(crate) const RELEASED: &str = "released";
/// The interval at which the thread checks for requests.
const LOOK: Duration = Duration::from_millis(250);
/// The shortest time between two listings. The pause after a listing is at least this many times as
/// long as the listing took.
const PERIOD: Duration = Duration::from_secs(2);
const REST: u32 = 20;
/// A datagram flow that conntrack would forget within this time after the next listing is no longer
/// netfilter's: its next datagram would find neither an entry nor a rule.
const MARGIN: Duration = Duration::from_secs(3);
/// The time for which packets that a program handled in the last phase may be on their way to
/// netfilter.
const GRACE: Duration = Duration::from_millis(100);
/// The attempts to get a complete listing. The kernel interrupts one if the table is resized.
const LISTINGS: u32 = 10;
/// The time for which conntrack keeps an idle connection that was entered: its own default.
const TRACKED: Duration = Duration::from_hours(120);
/// The time for which kube-proxy must be absent to count as stopped, and not as restarting.
const AWAY: Duration = Duration::from_secs(10);
/// The thread's progress, as it reports it to the agent's loop.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The phase to program; see [`phase`].
    pub(crate) phase: u32,
    /// The status for people.
    pub(crate) status: TakeoverStatus,
    /// Whether the agent has to end and to remove everything.
    pub(crate) released: bool,
}

/// The loop's ends of the channels. The thread ends with them.
#[derive(Debug)]
pub(crate) struct Takeover {
    /// The thread's progress.
    pub(crate) progress: watch::Receiver<Progress>,
    /// The phase that is programmed.
    pub(crate) written: watch::Sender<u32>,
    /// Whether the maps hold what the sources say, and the programs are attached.
    pub(crate) ready: watch::Sender<bool>,
}

/// Returns the phase that an agent begins with.
///
/// An interrupted takeover starts again: only an agent that serves everything has nothing to take
/// over.
#[must_use]
pub(crate) fn initial_phase(adopted: Option<u32>, flag: bool, request: Option<Request>) -> u32 {
    match (adopted, request) {
        (Some(word), Some(Request::Release { .. })) => word & !phase::MASK | phase::PASSIVE,
        (Some(word), _) if word & phase::MASK == phase::SERVE => word,
        (Some(word), _) => word & !phase::MASK | phase::PASSIVE,
        (None, Some(Request::Takeover | Request::Release { .. })) => phase::PASSIVE,
        (None, _) if flag => phase::PASSIVE,
        (None, _) => phase::SERVE,
    }
}

/// Starts the thread with the phase that is programmed.
///
/// # Errors
///
/// Fails if the thread cannot be started.
pub(crate) fn start(word: u32, maps: PathBuf, state_dir: PathBuf) -> anyhow::Result<Takeover> {
    // A kernel whose tables cannot be listed has none of Sluice's.
    let holding = rules::find().is_ok_and(|found| found.holding);
    if !holding {
        // A reboot undoes a preparation.
        request::replace(&state_dir, Request::Prepared, Request::Prepare)
            .context("cannot record that the node is not prepared")?;
    }
    let (takeover, worker) = begin(word, holding, maps, state_dir);
    let _thread = std::thread::Builder::new()
        .name("takeover".to_owned())
        .spawn(move || worker.run())
        .context("cannot start a thread")?;
    Ok(takeover)
}

/// Makes both ends of the channels. `holding` is whether Sluice's own table exists.
fn begin(word: u32, holding: bool, maps: PathBuf, state_dir: PathBuf) -> (Takeover, Worker) {
    let first = Progress { phase: word, status: TakeoverStatus::default(), released: false };
    let (progress_sender, progress) = watch::channel(first);
    let (written, written_of_thread) = watch::channel(word);
    let (ready, ready_of_thread) = watch::channel(false);
    let worker = Worker {
        progress: progress_sender,
        written: written_of_thread,
        ready: ready_of_thread,
        folder: maps,
        state_dir,
        maps: None,
        is_settled: false,
        v4: BTreeMap::new(),
        v6: BTreeMap::new(),
        known: false,
        // Sluice's own table shows that kube-proxy's rules are still to be removed. The rules alone
        // do not: they may be there to stay, for an agent that serves next to kube-proxy.
        is_idle: word == phase::SERVE && !holding,
        interval: PERIOD,
        seen_running: None,
    };
    (Takeover { progress, written, ready }, worker)
}

/// The connections of netfilter that are in the maps.
type Imported<F> = BTreeMap<Tuple<<F as sluice_common::Family>::Address>, u32>;

/// The counts of a listing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Listed {
    /// Live connections of TCP and SCTP.
    connections: u64,
    /// Datagram flows.
    datagram_flows: u64,
    /// Entries in the maps, including those of ended connections.
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

/// The connections that a listing imports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Which {
    /// All translated connections: whoever has translated them, Sluice has not.
    All,
    /// Known connections, and those to Sluice's frontends, which were opened by packets that the
    /// programs left to netfilter. Idle datagram flows are forgotten.
    KnownAndOurs,
    /// Only known connections, while all new ones belong to netfilter.
    Known,
}

struct Worker {
    progress: watch::Sender<Progress>,
    written: watch::Receiver<u32>,
    ready: watch::Receiver<bool>,
    /// The directory where the maps are pinned.
    folder: PathBuf,
    state_dir: PathBuf,
    maps: Option<Maps>,
    /// Whether these maps are the ones that the agent stays with. Until it is ready, it may replace
    /// them.
    is_settled: bool,
    v4: Imported<V4>,
    v6: Imported<V6>,
    /// Whether `v4` and `v6` are what the maps hold.
    known: bool,
    /// Whether nothing is left to do until the next request.
    is_idle: bool,
    /// The time from one listing to the next.
    interval: Duration,
    /// The time at which kube-proxy was last seen running.
    seen_running: Option<Instant>,
}

impl Worker {
    fn run(mut self) {
        while !self.progress.is_closed() {
            match self.step() {
                Ok(true) => return,
                Ok(false) => self.update_status(|status| status.problem = None),
                Err(error) if self.progress.is_closed() => {
                    tracing::debug!("{error:#}");
                    return;
                }
                Err(error) => {
                    let text = format!("{error:#}");
                    if self.progress.borrow().status.problem.as_ref() != Some(&text) {
                        tracing::warn!("{text}; trying again");
                    }
                    self.update_status(|status| status.problem = Some(text));
                }
            }
            self.rest(if self.is_idle { LOOK } else { self.interval });
        }
    }

    /// Does what is due. Returns whether the node is released.
    fn step(&mut self) -> anyhow::Result<bool> {
        let mut request = request::read(&self.state_dir);
        let now = self.phase() & phase::MASK;
        if let Some(Request::Release { deadline }) = request {
            return self.drain(deadline);
        }
        if now != phase::SERVE {
            self.take_over()?;
            if self.phase() & phase::MASK != phase::SERVE {
                return Ok(false);
            }
        }
        if request == Some(Request::Takeover) {
            self.is_idle = false;
            request::done(&self.state_dir, Request::Takeover)
                .context("cannot remove the fulfilled request")?;
        }
        if request == Some(Request::Prepare) {
            self.prepare()?;
            request = Some(Request::Prepared);
        }
        if !self.is_idle || request == Some(Request::Finish) {
            self.clean_up(request)?;
        }
        self.update_status(|status| "serving".clone_into(&mut status.phase));
        Ok(false)
    }

    /// Sleeps until the request changes, or the time is over.
    fn rest(&self, rest: Duration) {
        let (until, before) = (Instant::now() + rest, request::read(&self.state_dir));
        while Instant::now() < until
            && !self.progress.is_closed()
            && request::read(&self.state_dir) == before
        {
            std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
        }
    }

    fn update_status(&self, change: impl FnOnce(&mut TakeoverStatus)) {
        let mut status = self.progress.borrow().status.clone();
        change(&mut status);
        let _ = publish_part(&self.progress, |progress| &mut progress.status, status);
    }

    fn phase(&self) -> u32 {
        self.progress.borrow().phase
    }

    /// Has the loop program a phase, and waits until it has.
    fn enter(&self, word: u32) -> anyhow::Result<()> {
        let _ = publish_part(&self.progress, |progress| &mut progress.phase, word);
        self.wait("the phase to be programmed", || *self.written.borrow() == word)
    }

    fn wait(&self, what: &str, is_done: impl Fn() -> bool) -> anyhow::Result<()> {
        while !is_done() {
            if self.progress.is_closed() {
                bail!("the agent ended while waiting for {what}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn open(&mut self) -> anyhow::Result<()> {
        if !self.is_settled {
            // Read first: maps that are opened while the agent becomes ready may be those that it
            // has just replaced.
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
        self.update_status(|status| {
            "passive".clone_into(&mut status.phase);
            status.waiting_for = Some("the programs to be attached with complete maps".to_owned());
            status.flows = None;
        });
        // A release that is requested in the meantime takes precedence.
        let ready = self.ready.clone();
        let state_dir = self.state_dir.clone();
        self.wait("the programs", || {
            *ready.borrow() || matches!(request::read(&state_dir), Some(Request::Release { .. }))
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
        self.update_status(|status| {
            "importing".clone_into(&mut status.phase);
            status.waiting_for = None;
        });
        let flipped = started.elapsed();
        std::thread::sleep(GRACE);
        let listed = self.list(Which::All)?;
        let more = self.import_affinity()?;
        self.report(listed, None);
        // Reported before the node becomes ready, so that nobody sees it ready and not serving.
        self.update_status(|status| "serving".clone_into(&mut status.phase));
        self.enter(phase::SERVE | listed.bits())?;
        tracing::info!(
            connections = listed.connections,
            datagram_flows = listed.datagram_flows,
            affinity_clients = clients + more,
            new_connections_after_ms = flipped.as_millis(),
            serving_after_ms = started.elapsed().as_millis(),
            "took over; netfilter keeps the connections that it translates"
        );
        Ok(())
    }

    fn import_affinity(&self) -> anyhow::Result<usize> {
        let maps = Maps::open(&self.folder, Access::Read)?;
        let kernel = Kernel::new(maps);
        let image = kernel.read().context("cannot read the maps")?;
        affinity::import(kernel.maps(), &image, now()).context("cannot take over session affinity")
    }

    /// Lists netfilter's connections, and brings the maps in step with them.
    fn list(&mut self, which: Which) -> anyhow::Result<Listed> {
        let listed = self.list_both(which);
        // A part may have been written. It would stay forever if nobody read it again.
        self.known &= listed.is_ok();
        listed
    }

    fn list_both(&mut self, which: Which) -> anyhow::Result<Listed> {
        self.open()?;
        let Some(maps) = &self.maps else { bail!("the maps are not open") };
        if !self.known {
            self.v4 = V4::maps(maps).read_imported()?.into_iter().collect();
            self.v6 = V6::maps(maps).read_imported()?.into_iter().collect();
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
        self.update_status(|status| {
            status.connections = listed.connections;
            status.datagram_flows = listed.datagram_flows;
            if let Some(found) = found {
                status.kube_proxy = found.words();
                status.holding = found.holding;
            }
        });
    }

    /// Whether kube-proxy is known to be stopped: somebody has said so, or its process was seen and
    /// is gone. Only some agents can see the processes of the whole machine.
    fn is_gone(&mut self, request: Option<Request>) -> bool {
        if request == Some(Request::Finish) {
            return true;
        }
        if !sees_all_processes() {
            return false;
        }
        if kube_proxy::running().is_some() {
            self.seen_running = Some(Instant::now());
        }
        // A process that was never seen may be part of another one. Whoever stops that has to say
        // so.
        let is_gone = self.seen_running.is_some_and(|seen| seen.elapsed() >= AWAY);
        if is_gone {
            self.seen_running = None;
        }
        is_gone
    }

    /// Removes what has ended: netfilter's connections, then kube-proxy's rules, and last the table
    /// that holds connections.
    fn clean_up(&mut self, request: Option<Request>) -> anyhow::Result<()> {
        // What is begun here is finished, whoever has requested it.
        self.is_idle = false;
        let which = if request == Some(Request::Finish) { Which::All } else { Which::KnownAndOurs };
        let listed = self.list(which)?;
        self.enter(phase::SERVE | listed.bits())?;
        let mut found = rules::listed()?;
        if found.balances() && self.is_gone(request) {
            hold()?;
            rules::remove(&found, false).context("cannot remove kube-proxy's rules")?;
            if let Some(words) = found.words() {
                tracing::info!(
                    "removed {words}; a table of Sluice's own holds the connections that depend on them"
                );
            }
            found = rules::listed()?;
        }
        if request == Some(Request::Finish) {
            request::done(&self.state_dir, Request::Finish)
                .context("cannot remove the fulfilled request")?;
        }
        let mut waiting = None;
        if found.is_legacy() {
            waiting = Some(LEGACY.to_owned());
        } else if found.balances() {
            waiting = Some(STOP.to_owned());
        } else if request == Some(Request::Prepared) {
            waiting = Some("kube-proxy to be started, and for `sluice release`".to_owned());
        } else if listed.lives() {
            waiting = Some("netfilter's last connections to end".to_owned());
        } else {
            rules::remove(&found, true).context("cannot remove kube-proxy's last rules")?;
            if rules::let_go()
                .context("cannot remove the table that held netfilter's connections")?
            {
                tracing::info!("netfilter's last connection has ended: the takeover is complete");
            }
            found = rules::listed()?;
            // A connection that has just ended may send a last packet. It is left alone for as long
            // as conntrack knows it.
            self.is_idle = listed.entries == 0;
        }
        self.report(listed, Some(&found));
        self.update_status(|status| status.waiting_for = waiting);
        Ok(())
    }

    /// Enters the connections of this host's own sockets into conntrack, before kube-proxy has it
    /// translate new ones. Connections that it has not tracked before would be new to it.
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.open()?;
        let Some(maps) = &self.maps else { bail!("the maps are not open") };
        forget_ended::<V4>(maps, IpFamily::V4)?;
        forget_ended::<V6>(maps, IpFamily::V6)?;
        hold()?;
        let all = [flows::of_host::<V4>(maps)?, flows::of_host::<V6>(maps)?].concat();
        conntrack::keep_clear(&all, TRACKED)
            .context("cannot enter Sluice's flows into conntrack")?;
        request::replace(&self.state_dir, Request::Prepare, Request::Prepared)
            .context("cannot record that the node is prepared")?;
        self.is_idle = false;
        Ok(())
    }

    /// Enters Sluice's flows that netfilter does not see into conntrack. It is about to serve new
    /// connections next to them, and picks source ports by itself.
    fn enter_flows(&mut self, deadline: u64) -> anyhow::Result<()> {
        self.open()?;
        let Some(maps) = &self.maps else { bail!("the maps are not open") };
        let _ = flows::live::<V4>(maps)? + flows::live::<V6>(maps)?;
        let all = [flows::clear::<V4>(maps)?, flows::clear::<V6>(maps)?].concat();
        conntrack::keep_clear(&all, deadline_in(deadline))
            .context("cannot enter Sluice's flows into conntrack")
    }

    /// Serves known flows and waits for their end. Returns whether the node is released.
    fn drain(&mut self, deadline: u64) -> anyhow::Result<bool> {
        self.is_idle = false;
        let bits = self.phase() & !phase::MASK;
        self.update_status(|status| "draining".clone_into(&mut status.phase));
        // Twice, to enter the flows that are opened in between.
        self.enter_flows(deadline)?;
        self.enter(phase::PASSIVE | bits)?;
        self.enter_flows(deadline)?;
        let request = Request::Release { deadline };
        // The request may be withdrawn.
        while request::read(&self.state_dir) == Some(request) {
            if self.progress.is_closed() {
                bail!("the agent ended while waiting for the last flow");
            }
            self.open()?;
            let listed = if bits == 0 { Listed::default() } else { self.list(Which::Known)? };
            let Some(maps) = &self.maps else { bail!("the maps are not open") };
            let flows = flows::live::<V4>(maps)? + flows::live::<V6>(maps)?;
            let left = deadline_in(deadline).as_secs();
            self.report(listed, None);
            self.update_status(|status| {
                status.flows = Some(flows);
                status.waiting_for = Some(format!("{flows} flows to end, for at most {left} s"));
            });
            if flows == 0 || left == 0 {
                if flows != 0 {
                    tracing::warn!(
                        flows,
                        "the release has reached its timeout: live flows are cut"
                    );
                }
                request::write(&self.state_dir, Request::Released)
                    .context("cannot record that the node is released")?;
                self.update_status(|status| {
                    RELEASED.clone_into(&mut status.phase);
                    status.waiting_for = None;
                });
                self.progress.send_modify(|progress| progress.released = true);
                return Ok(true);
            }
            self.rest(Duration::from_secs(1));
        }
        Ok(false)
    }
}

/// The request to an operator if rules remain.
pub(crate) const STOP: &str = "kube-proxy to be stopped, so that its rules can be removed (then run `sluice takeover --finish`)";
pub(crate) const LEGACY: &str = "kube-proxy's chains in legacy iptables to be removed: stop it and run `kube-proxy --cleanup` (Sluice cannot remove them over netlink)";

/// Makes Sluice's own table. If the kernel refuses it, legacy iptables is enough: its chains of
/// type nat stay until the machine reboots.
fn hold() -> anyhow::Result<()> {
    match rules::hold() {
        Err(error) if !rules::listed()?.is_legacy() => {
            Err(error).context("cannot make the nftables table that holds netfilter's connections")
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Whether this process is in the machine's initial PID namespace.
fn sees_all_processes() -> bool {
    // `PROC_PID_INIT_INO`, a fixed number.
    std::fs::read_link("/proc/self/ns/pid").is_ok_and(|link| link == Path::new("pid:[4026531836]"))
}

/// Returns the tuples of a connection's incoming packets.
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

/// A complete listing of a family.
struct Listing<F: sluice_common::Family> {
    after: Imported<F>,
    counts: Listed,
    /// Datagram flows that conntrack is about to forget, and that are not in the maps.
    idle: Vec<Translated>,
}

/// Lists a family's connections until a listing is complete.
fn list_whole<F: Stack>(
    family: IpFamily,
    before: &Imported<F>,
    margin: Duration,
    is_imported: impl Fn(&Tuple<F::Address>) -> bool,
) -> anyhow::Result<Listing<F>> {
    for _ in 0..LISTINGS {
        let mut after = Imported::<F>::new();
        let mut counts = Listed::default();
        let mut idle = Vec::new();
        let is_whole = translated(family, |found| {
            let Some([original, reply]) = tuples::<F>(&found) else { return };
            if !is_imported(&original) {
                return;
            }
            if found.protocol == protocol::UDP {
                if u64::from(found.left) <= margin.as_secs() {
                    // A datagram on its way through netfilter needs the entry for its answer. So an
                    // entry is first removed from the maps, and the flow is forgotten at the next
                    // listing.
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
        if is_whole {
            return Ok(Listing { after, counts, idle });
        }
    }
    bail!("the listing of netfilter's connections was interrupted {LISTINGS} times in a row")
}

/// Lists a family's connections, and writes the difference to the maps.
fn list<F: KernelStack>(
    maps: &Maps,
    family: IpFamily,
    before: &Imported<F>,
    (which, margin): (Which, Duration),
    listed: &mut Listed,
) -> anyhow::Result<Imported<F>> {
    let frontends = F::maps(maps).read_frontends()?;
    let is_imported = |original: &Tuple<F::Address>| match which {
        Which::All => true,
        Which::KnownAndOurs => before.contains_key(original) || is_ours::<F>(&frontends, original),
        Which::Known => before.contains_key(original),
    };
    let Listing { after, counts, idle } = list_whole::<F>(family, before, margin, is_imported)?;
    let insert: Vec<_> = after
        .iter()
        .filter(|(key, bits)| before.get(key) != Some(bits))
        .map(|(key, bits)| (*key, *bits))
        .collect();
    let remove: Vec<_> = before.keys().filter(|key| !after.contains_key(key)).copied().collect();
    F::maps(maps)
        .import(&insert, &remove)
        .context("the maps have no room for all of netfilter's connections")?;
    if which == Which::KnownAndOurs {
        // The next datagram is Sluice's, and conntrack would take it for a part of the old flow.
        conntrack::forget(family, &idle).context("cannot delete idle entries of conntrack")?;
    }
    listed.connections += counts.connections;
    listed.datagram_flows += counts.datagram_flows;
    Ok(after)
}

/// Has conntrack forget ended connections to Sluice's frontends. While nothing tracked it, a
/// process of this host may have opened another connection to the same backend from the source port
/// of one of them. conntrack would give its next packet another port.
fn forget_ended<F: KernelStack>(maps: &Maps, family: IpFamily) -> anyhow::Result<()> {
    let frontends = F::maps(maps).read_frontends()?;
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

/// Whether a packet's destination is a frontend of Sluice. Node ports count at every address.
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
        let release = Some(Request::Release { deadline: 9 });
        for (what, adopted, flag, request, expected) in [
            ("new maps", None, false, None, SERVE),
            ("new maps, to take over", None, true, None, PASSIVE),
            ("new maps, taken back", None, false, Some(Request::Takeover), PASSIVE),
            ("served before, with the flag", Some(SERVE | IMPORTED), true, None, SERVE | IMPORTED),
            ("served before", Some(SERVE), false, Some(Request::Takeover), SERVE),
            ("interrupted", Some(IMPORT | IMPORTED), false, None, PASSIVE | IMPORTED),
            ("interrupted early", Some(PASSIVE), true, None, PASSIVE),
            ("draining", Some(PASSIVE), false, release, PASSIVE),
            ("draining was wanted", Some(SERVE | IMPORTED), true, release, PASSIVE | IMPORTED),
        ] {
            assert_eq!(initial_phase(adopted, flag, request), expected, "{what}");
        }
    }

    #[test]
    fn what_is_unfinished_is_gone_on_with() {
        use phase::{IMPORTED, PASSIVE, SERVE};
        let folder = tempfile::tempdir().expect("a folder");
        let is_idle = |word, holding| {
            let (_, worker) =
                begin(word, holding, folder.path().join("maps"), folder.path().to_owned());
            worker.is_idle
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
        let (_takeover, mut worker) = begin(phase::SERVE, true, folder.path().join("none"), state);
        // There are no maps to open.
        (worker.known, worker.is_settled) = (true, true);
        assert!(worker.list(Which::All).is_err());
        assert!(!worker.known);
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
