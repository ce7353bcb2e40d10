//! One table of packets, run twice: through the packet's path on the host, over plain maps, and
//! through the kernel's programs by `BPF_PROG_TEST_RUN`, over real ones. Both must do what the table says.
//!
//! The kernel's way needs root and the BPF object (`SLUICE_BPF_OBJECT`, else `target/bpf/sluice.o`);
//! without either the test says so and passes. What a test run cannot show: where a redirect leads, and
//! skbs that are not linear, larger than a page, or leave a checksum to the device.

mod packets {
    #[path = "../../../common/tests/packets/bytes.rs"]
    pub(crate) mod bytes;
    pub(crate) mod case;
    pub(crate) mod cases;
    #[path = "../../../common/tests/packets/frame.rs"]
    pub(crate) mod frame;
    pub(crate) mod host;
    #[path = "../../../common/tests/packets/ip.rs"]
    pub(crate) mod ip;
    pub(crate) mod kernel;
    pub(crate) mod show;
    pub(crate) mod socket;
    pub(crate) mod world;
}

use std::collections::BTreeSet;
use std::fmt::Write;

use packets::case::{Case, Outcome, settle};
use packets::kernel::Kernel;
use packets::{cases, host, kernel, show};

/// How a case failed; empty when it did not.
fn judge(case: &Case, who: &str, mut actual: Outcome) -> String {
    settle(&mut actual, &case.expected);
    let difference = show::difference(who, &actual, &case.expected);
    if difference.is_empty() { String::new() } else { format!("{}\n{difference}", case.name) }
}

fn report(failures: &[String], all: usize) {
    let mut text = String::new();
    for failure in failures {
        let _ = writeln!(text, "{failure}");
    }
    assert!(failures.is_empty(), "{} of {all} cases failed:\n\n{text}", failures.len());
}

#[test]
fn the_table_has_a_name_for_each_of_its_cases() {
    let mut cases = cases::all();
    cases.extend(cases::large());
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    println!("{} cases", cases.len());
}

/// Runs cases on the host.
fn on_the_host(cases: &[Case]) {
    let failures: Vec<String> = cases
        .iter()
        .map(|case| judge(case, "host", host::run(case)))
        .filter(|failure| !failure.is_empty())
        .collect();
    report(&failures, cases.len());
}

/// Runs cases in the kernel, if it can be loaded here, and compares with the host.
fn in_the_kernel(load: fn() -> anyhow::Result<Kernel>, cases: &[Case]) {
    if let Some(obstacle) = kernel::obstacle() {
        println!("skipped: {obstacle}");
        return;
    }
    let mut kernel = load().unwrap_or_else(|error| panic!("{error:?}"));
    let mut failures = Vec::new();
    for case in cases.iter().filter(|case| !case.partial) {
        let mut actual = match kernel.run(case) {
            Ok(Some(actual)) => actual,
            Ok(None) => continue,
            Err(error) => {
                failures.push(format!("{}\n  kernel: {error:#}", case.name));
                continue;
            }
        };
        let host = host::run(case);
        settle(&mut actual, &host);
        let failure = judge(case, "kernel", actual.clone());
        if !failure.is_empty() {
            failures.push(failure);
        }
        let difference = show::difference("kernel, compared with the host", &actual, &host);
        if !difference.is_empty() {
            failures.push(format!("{}\n{difference}", case.name));
        }
    }
    report(&failures, cases.len());
}

#[test]
fn the_host_does_what_the_table_says() {
    on_the_host(&cases::with_prefixes());
}

#[test]
fn the_kernel_does_what_the_table_says_and_the_host_does() {
    in_the_kernel(Kernel::load, &cases::with_prefixes());
}

#[test]
fn a_search_walks_over_every_port_there_is() {
    let cases = cases::large();
    on_the_host(&cases);
    in_the_kernel(Kernel::load_large, &cases);
}
