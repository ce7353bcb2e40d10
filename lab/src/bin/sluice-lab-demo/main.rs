//! Shows Sluice at work on one node, in under two minutes: real pods, real requests, and a check
//! behind every claim.

mod layout;
mod shares;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use sluice_lab::{AgentOptions, AgentProcess, Event, Lab, Running, remove_kept};

use layout::Layout;
use shares::measure;

/// Sluice at work on one node of network namespaces.
///
/// Lays the node out, sends requests through a service's addresses, takes a backend away under
/// load, and checks everything it shows. Needs root. SLUICE_BIN names the `sluice` binary, if it is
/// not beside this one.
#[derive(Parser)]
struct Cli {
    /// Leave the lab up and the agent running.
    #[arg(long)]
    keep: bool,
    /// Remove what earlier runs with --keep left, and do nothing else.
    #[arg(long, conflicts_with = "keep")]
    down: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = if cli.down { down() } else { demo(cli.keep) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nsluice-lab-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn down() -> Result<()> {
    let removed = remove_kept(None)?;
    println!(
        "{}",
        if removed.is_empty() {
            "no lab was kept".to_owned()
        } else {
            format!("removed {}", removed.join(", "))
        }
    );
    Ok(())
}

/// Prints what happens, with the time since the start.
pub(crate) struct Progress {
    started: Instant,
    colour: bool,
}

impl Progress {
    pub(crate) fn say(&self, text: &str) {
        let seconds = self.started.elapsed().as_secs_f64();
        println!("{}", self.paint("1", &format!("[{seconds:5.2} s] {text}")));
    }

    /// Adds an ANSI attribute to a text, on a terminal.
    pub(crate) fn paint(&self, attribute: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{attribute}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn demo(keep: bool) -> Result<()> {
    let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let progress = Progress { started: Instant::now(), colour };
    let lab = Lab::new("demo")?;
    if keep {
        lab.keep()?;
    }
    let layout = Layout::build(&lab)?;
    progress.say(
        "A node with four pods, a router, a client outside: all of it network namespaces, the servers real.",
    );
    print!("{}", layout.picture());

    let options = AgentOptions {
        manifests: Some(layout.manifests.directory().to_owned()),
        ..AgentOptions::default()
    };
    let begun = Instant::now();
    let mut agent = layout.node.agent(options)?;
    agent.wait_ready(Duration::from_secs(20))?;
    progress.say(&format!(
        "The agent runs on a folder of manifests, and was ready after {} ms.",
        begun.elapsed().as_millis()
    ));

    let before = measure(&layout)?;
    progress.say(&format!("{} requests went through the service's addresses; every answer came from the address that was asked.", before.total()));
    print!("{}", before.chart(&progress, &layout.backend_names()));
    before.check(&layout.backend_names(), &[])?;

    let mut talks = open_talks(&layout)?;
    progress.say(&format!(
        "{} long-lived connections are open: {}.",
        talks.len(),
        describe(&talks)
    ));
    scale_away(&layout, &progress)?;

    let after = measure(&layout)?;
    progress.say(&format!("{} requests later:", after.total()));
    print!("{}", after.chart(&progress, &layout.backend_names()));
    let gone = layout.leaving().name();
    after.check(&layout.staying_names(), &[gone])?;
    survive(&mut talks)?;
    progress.say(&format!("All {} connections are still alive, those to {gone} too: existing connections drain, new ones go elsewhere.", talks.len()));

    outlive_the_agent(&layout, &mut agent, &mut talks, &progress)?;

    progress.say("sluice services");
    println!("{}", indent(&layout.node.sluice(&["services"])?, 24));
    dump_services(&layout, &progress)?;
    finish(&lab, keep, agent, &progress);
    Ok(())
}

/// Kills the agent, shows that its work goes on, and starts it again.
fn outlive_the_agent(
    layout: &Layout,
    agent: &mut AgentProcess,
    talks: &mut [Talk],
    progress: &Progress,
) -> Result<()> {
    let gone = layout.leaving().name();
    agent.kill9()?;
    let orphaned = measure(layout)?;
    orphaned.check(&layout.staying_names(), &[gone])?;
    survive(talks)?;
    progress.say(&format!("The agent was killed with SIGKILL: {} requests were answered without it, and the connections live on.", orphaned.total()));
    let begun = Instant::now();
    agent.restart()?;
    agent.wait_ready(Duration::from_secs(20))?;
    progress
        .say(&format!("It was started again, and ready after {} ms.", begun.elapsed().as_millis()));
    Ok(())
}

/// A connection that should outlive every change, and the backend it leads to.
struct Talk {
    client: Running,
    backend: String,
    answers: u64,
}

/// Opens connections until every backend has some, half from a pod and half from outside.
fn open_talks(layout: &Layout) -> Result<Vec<Talk>> {
    const TALKS_MAX: usize = 60;
    let mut talks: Vec<Talk> = Vec::new();
    let all_served = |talks: &[Talk]| {
        layout
            .backend_names()
            .iter()
            .all(|name| talks.iter().filter(|talk| talk.backend == *name).count() >= 2)
    };
    while !all_served(&talks) {
        ensure!(
            talks.len() < TALKS_MAX,
            "{TALKS_MAX} connections did not reach every backend twice: {}",
            describe(&talks)
        );
        for (client, vip) in [
            (&**layout.client_pod(), layout::cluster_ips()[1]),
            (&**layout.outside(), layout::load_balancer_ips()[1]),
        ] {
            let to = format!("--to={}", std::net::SocketAddr::new(vip, layout::ECHO));
            let mut talk = client.tool(["tcp-client", &to, "--interval-ms=50"])?;
            let first = talk.wait_event("its first answer", Duration::from_secs(5), |event| {
                matches!(event, Event::Reply(_))
            })?;
            let Event::Reply(reply) = first else { bail!("no answer from {vip}") };
            talks.push(Talk { client: talk, backend: reply.name, answers: 0 });
        }
    }
    Ok(talks)
}

fn describe(talks: &[Talk]) -> String {
    let mut counts = std::collections::BTreeMap::new();
    for talk in talks {
        *counts.entry(talk.backend.as_str()).or_insert(0) += 1;
    }
    counts.iter().map(|(name, count)| format!("{count} to {name}")).collect::<Vec<_>>().join(", ")
}

/// Removes a backend from the manifest, and waits until new requests keep away from it.
fn scale_away(layout: &Layout, progress: &Progress) -> Result<()> {
    let gone = layout.leaving().name();
    let begun = Instant::now();
    layout.write_service(false)?;
    loop {
        // A backend of three gets none of 40 requests by chance once in ten million times.
        let replies =
            layout.client_pod().udp_ask((layout::cluster_ips()[1], layout::DNS).into(), 40)?;
        if replies.iter().all(|reply| reply.name != gone) {
            break;
        }
        ensure!(
            begun.elapsed() < Duration::from_secs(10),
            "{gone} still gets requests 10 s after it was taken out of the manifest"
        );
    }
    progress.say(&format!(
        "{gone} was taken out of the manifest; {} ms later 40 requests in a row had kept away from it.",
        begun.elapsed().as_millis()
    ));
    Ok(())
}

/// Checks that every connection has gone on since the last check, with the same backend.
fn survive(talks: &mut [Talk]) -> Result<()> {
    sleep(Duration::from_millis(300));
    for talk in talks {
        let mut answers = 0;
        for event in talk.client.events() {
            match event {
                Event::Broken { reason, at_ms, .. } => {
                    bail!("a connection to {} broke after {at_ms} ms: {reason}", talk.backend)
                }
                Event::Reply(reply) => {
                    ensure!(
                        reply.name == talk.backend,
                        "a connection to {} was answered by {}",
                        talk.backend,
                        reply.name
                    );
                    answers += 1;
                }
                Event::Listening { .. }
                | Event::Connected { .. }
                | Event::Lost { .. }
                | Event::Load(_)
                | Event::Done { .. } => {}
            }
        }
        ensure!(
            answers > talk.answers,
            "a connection to {} got no answer for 300 ms",
            talk.backend
        );
        talk.answers = answers;
    }
    Ok(())
}

/// Shows one pinned map as any tool would see it.
fn dump_services(layout: &Layout, progress: &Progress) -> Result<()> {
    let map = find_pin(&layout.node.pin_path(), "services")
        .context("the agent pinned no map with `services` in its name")?;
    progress.say(&format!("bpftool map dump pinned {}", map.display()));
    let dump = layout.node.run(
        "bpftool",
        [std::ffi::OsStr::new("map"), "dump".as_ref(), "pinned".as_ref(), map.as_os_str()],
    )?;
    ensure!(
        dump.contains("\"port\""),
        "the dump of {} has no field names:\n{}",
        map.display(),
        indent(&dump, 12)
    );
    println!("{}", indent(&dump, 24));
    Ok(())
}

/// Returns the first pinned object below a directory, in the order of names, whose name holds a
/// word.
fn find_pin(directory: &Path, word: &str) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(directory).ok()?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    let named = |path: &&PathBuf| {
        path.is_file()
            && path
                .file_name()
                .is_some_and(|name| name.to_string_lossy().to_lowercase().contains(word))
    };
    entries.iter().find(named).cloned().or_else(|| {
        entries.iter().filter(|path| path.is_dir()).find_map(|path| find_pin(path, word))
    })
}

fn indent(text: &str, lines_max: usize) -> String {
    let mut lines: Vec<String> =
        text.lines().take(lines_max).map(|line| format!("    {line}")).collect();
    let more = text.lines().count().saturating_sub(lines_max);
    if more > 0 {
        lines.push(format!("    ... and {more} lines more"));
    }
    lines.join("\n")
}

fn finish(lab: &Lab, keep: bool, agent: AgentProcess, progress: &Progress) {
    if keep {
        let state = lab.state().display();
        progress.say("Everything shown was checked. The lab stays up, and the agent runs:");
        println!("    enter the node    nsenter --net={state}/ns/n1");
        println!("    enter a pod       nsenter --net={state}/ns/client");
        println!("    the agent         sluice status --pin-path {state}/n1/bpf/sluice");
        println!("    its manifests     {state}/manifests-demo");
        println!("    remove it all     sluice-lab-demo --down");
    } else {
        progress.say("Everything shown was checked; the lab is taken down.");
    }
    // The processes of a kept lab outlive their guards.
    drop(agent);
}
