//! Loads the object once, without attaching or pinning anything, and measures its programs.

use std::error::Error as _;
use std::fs;
use std::io;
use std::path::Path;

use anyhow::{Context, Result, bail};
use aya::programs::{Program, ProgramError};
use aya::{Btf, Ebpf, EbpfLoader};
use sluice_cluster::packages;
use sluice_common::abi::previous::{self, Round};

use crate::budget::Budget;
use crate::stack;
use crate::workspace::Workspace;

/// The length of the end of a verifier log that is printed; the reason is there.
const LOG_LINES: usize = 40;

struct Weight {
    name: String,
    kind: String,
    /// Instructions after the kernel's own rewriting.
    instructions: u32,
    /// Instructions that the verifier processed on all paths.
    verified: u32,
    /// Bytes of the deepest stack, as kernel 6.1 counts them.
    stack: u32,
}

/// Prints a table of all programs, if this is root and the kernel allows it.
///
/// # Errors
/// If a program does not load or is over its budget.
pub(crate) fn report(workspace: &Workspace, object: &Path) -> Result<()> {
    report_round(workspace, object, None)
}

/// Like [`report`], for each round of a change of layout in which the programs read two layouts.
///
/// # Errors
/// Those of [`report`].
pub(crate) fn report_rounds(workspace: &Workspace, object: &Path) -> Result<()> {
    for round in [Round::Settled, Round::WritesPrevious, Round::WritesCurrent] {
        println!("next layout, {round:?}:");
        report_round(workspace, object, Some(round))?;
    }
    Ok(())
}

fn report_round(workspace: &Workspace, object: &Path, round: Option<Round>) -> Result<()> {
    if !packages::is_root() {
        eprintln!("programs: not weighed, which takes root");
        return Ok(());
    }
    let budget = Budget::read(workspace)?;
    let budget = if round.is_some() { budget.of_both_layouts() } else { budget };
    let mut ebpf = match load_maps(object, round) {
        Ok(ebpf) => ebpf,
        Err(error) if is_forbidden(&error) => {
            eprintln!("programs: not weighed, the kernel refuses bpf() here: {error:#}");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let content = fs::read(object).with_context(|| format!("cannot read {}", object.display()))?;
    let depths =
        stack::depths(&content).with_context(|| format!("cannot read {}", object.display()))?;
    let mut weights = Vec::new();
    let mut complaints = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        let depth =
            depths.get(name).with_context(|| format!("the object has no function {name}"))?;
        match weigh(name, program, depth.bytes) {
            Ok(weight) => weights.push(weight),
            Err(error) => complaints.push(refusal(workspace, name, &error)?),
        }
    }
    weights.sort_by(|a, b| a.name.cmp(&b.name));
    print(&weights, &budget);
    for name in budget.unknown(|name| weights.iter().any(|weight| weight.name == name)) {
        eprintln!("warning: ebpf/budget.toml has a limit for {name}, which is no program");
    }
    let over = weights.iter().filter(|weight| weight.verified > budget.of(&weight.name));
    complaints.extend(
        over.map(|weight| format!("{} is over its budget in ebpf/budget.toml", weight.name)),
    );
    let deep = weights.iter().filter(|weight| weight.stack > budget.stack());
    complaints.extend(deep.map(|weight| {
        let way = depths.get(&weight.name).map(ToString::to_string).unwrap_or_default();
        format!("{}'s stack is over its budget in ebpf/budget.toml: {way}", weight.name)
    }));
    if !complaints.is_empty() {
        bail!("{}", complaints.join("\n"));
    }
    Ok(())
}

fn load_maps(object: &Path, round: Option<Round>) -> Result<Ebpf> {
    let round = round.map(|round| round as u32);
    let mut loader = EbpfLoader::new();
    if let Some(round) = &round {
        let _ = loader.override_global(previous::ROUND, round, true);
    }
    loader
        // No map of ours asks to be pinned by name. If one did, this would make it an error instead
        // of a file in the system's bpffs.
        .default_map_pin_directory("/dev/null")
        .load_file(object)
        .with_context(|| format!("cannot load {}", object.display()))
}

fn is_forbidden(error: &anyhow::Error) -> bool {
    error.chain().filter_map(|cause| cause.downcast_ref::<io::Error>()).any(|error| {
        matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported)
    })
}

fn weigh(name: &str, program: &mut Program, stack: u32) -> Result<Weight, ProgramError> {
    let kind = format!("{:?}", program.prog_type());
    load(program)?;
    let info = program.info()?;
    Ok(Weight {
        name: name.to_owned(),
        kind,
        instructions: info.size_translated().unwrap_or(0) / 8,
        verified: info.verified_instruction_count().unwrap_or(0),
        stack,
    })
}

fn load(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::KProbe(program) => program.load(),
        Program::UProbe(program) => program.load(),
        Program::TracePoint(program) => program.load(),
        Program::SocketFilter(program) => program.load(),
        Program::ReusePortSocketFilter(program) => program.load(),
        Program::Xdp(program) => program.load(),
        Program::SkMsg(program) => program.load(),
        Program::SkSkb(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::CgroupSysctl(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::LircMode2(program) => program.load(),
        Program::PerfEvent(program) => program.load(),
        Program::RawTracePoint(program) => program.load(),
        Program::FlowDissector(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        Program::SkReuseport(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupDevice(program) => program.load(),
        // The only kind of iterator that a load balancer uses.
        Program::Iter(program) => program.load("tcp", &Btf::from_sys_fs()?),
        // These are verified against their attach target, which only their user knows.
        Program::Lsm(_)
        | Program::LsmCgroup(_)
        | Program::BtfTracePoint(_)
        | Program::FEntry(_)
        | Program::FExit(_)
        | Program::Extension(_) => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Writes the whole verifier log to a file, and returns its end with the file's name.
fn refusal(workspace: &Workspace, name: &str, error: &ProgramError) -> Result<String> {
    let log = error.to_string();
    let path = workspace.bpf_target_dir().join(format!("{name}.log"));
    fs::write(&path, &log).with_context(|| format!("cannot write {}", path.display()))?;
    let lines: Vec<_> = log.lines().collect();
    let end = lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default();
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    Ok(format!(
        "{}\n{name} does not load: {cause} (all of the log is in {})",
        end.join("\n"),
        path.display()
    ))
}

fn print(weights: &[Weight], budget: &Budget) {
    let name_width = width("program", weights.iter().map(|weight| weight.name.len()));
    let kind_width = width("type", weights.iter().map(|weight| weight.kind.len()));
    println!(
        "{:name_width$}  {:kind_width$}  {:>12}  {:>9}  {:>9}  {:>5}",
        "program", "type", "instructions", "verified", "budget", "stack"
    );
    for weight in weights {
        let limit = budget.of(&weight.name);
        println!(
            "{:name_width$}  {:kind_width$}  {:>12}  {:>9}  {limit:>9}  {:>5}{}",
            weight.name,
            weight.kind,
            weight.instructions,
            weight.verified,
            weight.stack,
            if weight.verified > limit || weight.stack > budget.stack() { "  OVER" } else { "" }
        );
    }
}

/// Returns the width of a column with this title.
fn width(title: &str, cells: impl Iterator<Item = usize>) -> usize {
    cells.max().unwrap_or(0).max(title.len())
}
