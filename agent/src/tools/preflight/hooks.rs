//! Checks of loading the programs and trying the hooks.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::io;

use super::scratch::Tried;
use super::{Check, Outcome};
use crate::node::dataplane::How;

/// The advice if a program is refused.
const REPORT: &str = "please report this with `uname -r` and the message; another kernel of the same series may accept it";

/// Returns one row for each refused program, or the figures of all.
pub(super) fn programs<E: Display>(
    programs: &BTreeMap<String, Result<Option<u32>, E>>,
    map_bytes: u64,
) -> Vec<Check> {
    let mib = map_bytes.div_ceil(1 << 20);
    let mut checks =
        vec![Check::new("maps", Outcome::Yes, format!("created and released: {mib} MiB"))];
    for (name, result) in programs {
        checks.push(match result {
            Ok(Some(count)) => Check::new(
                "program",
                Outcome::Yes,
                format!("loaded, {count} instructions verified"),
            )
            .of(name),
            Ok(None) => Check::new("program", Outcome::Yes, "loaded").of(name),
            Err(error) => {
                Check::new("program", Outcome::No, error.to_string()).of(name).next(REPORT)
            }
        });
    }
    checks
}

/// Returns the checks of the hooks.
pub(super) fn checks(tried: &Tried) -> Vec<Check> {
    if let Some(why) = &tried.ground {
        let check = Check::new("hook", Outcome::Skip, why.clone());
        return vec![check.next("run it as root, outside of a user namespace")];
    }
    let mut checks = vec![classifiers(tried)];
    for (how, result) in &tried.xdp {
        let subject = format!("{} (veth)", how.word());
        checks.push(match result {
            Ok(()) => Check::new("hook", Outcome::Yes, "attached").of(subject),
            Err(error) => {
                Check::new("hook", Outcome::Warn, format!("{error}: tc is used instead of XDP"))
                    .of(subject)
            }
        });
    }
    checks.push(cgroup(tried));
    if let Some(own) = &tried.own_device {
        checks.push(match own {
            Ok(kind) => Check::new("own-device", Outcome::Yes, format!("sluice0 will be of kind {kind}")),
            Err(error) => Check::new(
                "own-device",
                Outcome::No,
                format!("cannot create a dummy or an ifb device: {error}"),
            )
            .next("load the module dummy (modprobe dummy), which minimal images have in linux-modules-extra"),
        });
    }
    if let Some(pins) = &tried.pins {
        checks.push(match pins {
            Ok(what) => Check::new("pins", Outcome::Yes, what.clone()),
            Err(error) => Check::new("pins", Outcome::No, error.clone())
                .next("mount one (mount -t bpf bpf /sys/fs/bpf; in a pod, use a hostPath volume), or give another --pin-path"),
        });
    }
    checks
}

/// Returns the checks if the process may not make namespaces: hooks cannot be tried unseen.
pub(super) fn untried(is_bpffs: bool) -> Vec<Check> {
    const NEXT: &str = "run `sluice preflight` with that capability to try everything; the agent needs it only to \
                        mount a BPF file system";
    let hook = "not tried: hooks are tried in new namespaces, which need CAP_SYS_ADMIN; the agent will report problems";
    let pins = if is_bpffs {
        Check::new("pins", Outcome::Skip, "not tried: the pin path is in a BPF file system")
    } else {
        Check::new("pins", Outcome::No, "the pin path is not in a BPF file system, and mounting one needs CAP_SYS_ADMIN")
            .next("mount one on the node (mount -t bpf bpf /sys/fs/bpf), as systemd does by default; in a pod, use a hostPath volume")
    };
    vec![Check::new("hook", Outcome::Warn, hook).next(NEXT), pins]
}

/// Returns the first failure of some attempts.
fn failure(tries: &BTreeMap<impl Display, io::Result<()>>) -> Option<String> {
    tries.iter().find_map(|(name, result)| Some(format!("{name}: {}", result.as_ref().err()?)))
}

fn classifiers(tried: &Tried) -> Check {
    let check = |result, what: String| Check::new("hook", result, what).of("tc");
    match (failure(&tried.tcx), failure(&tried.clsact)) {
        (None, None) => {
            check(Outcome::Yes, "TCX; clsact where others have filters at egress".to_owned())
        }
        (None, Some(clsact)) => check(
            Outcome::Warn,
            format!(
                "TCX; no clsact, which is needed where others have filters at egress: {clsact}"
            ),
        )
        .next("load the modules sch_ingress and cls_bpf if others use tc filters here"),
        (Some(_), None) if tried.lacks_tcx => {
            check(Outcome::Yes, "clsact: the kernel has no TCX (Linux 6.6)".to_owned())
        }
        (Some(tcx), None) => {
            check(Outcome::No, format!("the kernel has TCX but refuses it: {tcx}"))
                .next("check whether an LSM or a seccomp profile forbids bpf(BPF_LINK_CREATE)")
        }
        (Some(tcx), Some(clsact)) => {
            check(Outcome::No, format!("neither TCX ({tcx}) nor clsact ({clsact})")).next(
                "load the modules sch_ingress and cls_bpf (modprobe), or use Linux 6.6 or newer",
            )
        }
    }
}

fn cgroup(tried: &Tried) -> Check {
    let check = |result, what: String| Check::new("hook", result, what).of("cgroup");
    match &tried.cgroup {
        None => check(Outcome::Skip, "no cgroup to try it on".to_owned()),
        Some(Err(error)) => {
            check(Outcome::Warn, error.clone()).next("give --cgroup a writable directory")
        }
        Some(Ok(programs)) => match failure(programs) {
            None => check(Outcome::Yes, format!("attached {} socket programs", programs.len())),
            Some(error) => check(Outcome::No, error).next(
                "start the agent with --socket-path off, or use a kernel with CONFIG_CGROUP_BPF",
            ),
        },
    }
}

/// Shows the name of a way to attach XDP.
impl Display for How {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.word())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused() -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::EINVAL))
    }

    fn tried(
        tcx: fn() -> io::Result<()>,
        clsact: fn() -> io::Result<()>,
        lacks_tcx: bool,
    ) -> Tried {
        Tried {
            tcx: [("ingress l2".to_owned(), tcx())].into(),
            clsact: [("ingress l2".to_owned(), clsact())].into(),
            lacks_tcx,
            ..Tried::default()
        }
    }

    #[test]
    fn tc_needs_one_of_its_two_ways() {
        let works = || Ok(());
        for (tried, expected, word) in [
            (tried(works, works, false), Outcome::Yes, "TCX;"),
            (tried(works, refused, false), Outcome::Warn, "no clsact"),
            (tried(refused, works, true), Outcome::Yes, "the kernel has no TCX"),
            (tried(refused, works, false), Outcome::No, "TCX is there and refuses"),
            (tried(refused, refused, true), Outcome::No, "neither"),
        ] {
            let check = classifiers(&tried);
            assert!(check.result == expected && check.what.contains(word), "{check:?}");
            assert_eq!(check.next.is_some(), expected != Outcome::Yes, "{check:?}");
        }
    }

    #[test]
    fn a_refused_program_is_named_with_why() {
        let programs: BTreeMap<String, Result<Option<u32>, String>> = [
            ("tc_ingress_l2".to_owned(), Ok(Some(1234))),
            ("xdp_uplink".to_owned(), Err("the verifier says no".to_owned())),
        ]
        .into();
        let checks = super::programs(&programs, 5 << 20);
        assert_eq!(checks[0].what, "made and let go again: 5 MiB");
        assert_eq!(
            (checks[1].result, checks[1].what.as_str()),
            (Outcome::Yes, "loads, 1234 instructions verified")
        );
        assert_eq!(checks[2].name(), "program xdp_uplink");
        assert_eq!(
            (checks[2].result, checks[2].what.as_str()),
            (Outcome::No, "the verifier says no")
        );
    }

    #[test]
    fn without_ground_nothing_is_said_about_hooks() {
        let tried = Tried { ground: Some("no namespace".to_owned()), ..Tried::default() };
        assert_eq!(checks(&tried).len(), 1);
        assert_eq!(checks(&tried)[0].result, Outcome::Skip);
    }
}
