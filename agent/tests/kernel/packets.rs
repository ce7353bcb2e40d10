//! One table of packets, run twice: by the packet's path on the host, over plain maps, and by the
//! kernel's programs with `BPF_PROG_TEST_RUN`, over real ones. Both must do what the table says.
//!
//! The kernel's way needs root and the BPF object (`SLUICE_BPF_OBJECT`, else
//! `target/bpf/sluice.o`); without either they fail, unless `SLUICE_TEST_SKIP=1` says to skip them.
//! A test run cannot show where a redirect leads, nor skbs that are not linear, are larger than a
//! page, or leave a checksum to the device.

pub(crate) mod case;
pub(crate) mod cases;
pub(crate) mod convert;
#[path = "../../../common/tests/packets/frame.rs"]
pub(crate) mod frame;
pub(crate) mod host;
#[path = "../../../common/tests/packets/ip.rs"]
pub(crate) mod ip;
pub(crate) mod kernel;
pub(crate) mod show;
pub(crate) mod socket;
pub(crate) mod world;

use std::collections::BTreeSet;
use std::fmt::Write;
use std::net::SocketAddr;

use self::case::{Case, End, Outcome, Program, case, settle};
use self::frame::{TCP, UDP};
use self::kernel::Kernel;
use self::world::{
    Cast, Connection, EDGE, MARK, NET_CLIENTS, NET_MARKED, ONE, UPLINK, address, mac,
};
use sluice_common::abi::{Event, Listening, Range, Ticks, networks, state};
use sluice_common::engine::limit::DEVICE_REJECT_BURST_MS;
use sluice_common::event::Kind;

/// The number of failures that are printed in full.
const SHOWN: usize = 20;

/// Returns how a case failed, with the case itself, or an empty string if it passed.
fn judge(case: &Case, who: &str, mut actual: Outcome) -> String {
    settle(&mut actual, &case.expected);
    let difference = show::difference(who, &actual, &case.expected);
    if difference.is_empty() { String::new() } else { format!("{case}{difference}") }
}

fn report(failures: &[String], all: usize) {
    let mut text = String::new();
    for failure in failures.iter().take(SHOWN) {
        let _ = writeln!(text, "{failure}");
    }
    assert!(
        failures.is_empty(),
        "{} of {all} cases failed, the first {SHOWN} of them:\n\n{text}",
        failures.len()
    );
}

/// Returns the cases whose names contain `SLUICE_PACKET_CASES`, or all. Prints them if the output
/// is not captured.
fn chosen(mut cases: Vec<Case>) -> Vec<Case> {
    if let Ok(word) = std::env::var("SLUICE_PACKET_CASES") {
        cases.retain(|case| case.name.contains(&word));
        assert!(!cases.is_empty(), "no case has {word:?} in its name");
    }
    if std::env::args().any(|argument| argument == "--nocapture") {
        for case in cases.iter().filter(|case| !case.is_cut) {
            println!("{case}");
        }
    }
    cases
}

#[test]
fn the_table_has_a_name_for_each_of_its_cases() {
    let mut cases = cases::all();
    cases.extend(cases::large());
    let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two cases have one name");
    println!("{} cases", cases.len());
}

/// Runs cases on the host at a time of the clock.
fn on_the_host(cases: &[Case], now: Ticks) {
    let failures: Vec<String> = cases
        .iter()
        .map(|case| judge(case, "host", host::run_at(case, now)))
        .filter(|failure| !failure.is_empty())
        .collect();
    report(&failures, cases.len());
}

/// Runs cases in the kernel, if it can be loaded here, and compares the outcomes with the host's.
fn in_the_kernel(load: impl FnOnce() -> anyhow::Result<Kernel>, cases: &[Case]) {
    if kernel::is_skipped() {
        return;
    }
    let mut kernel = load().unwrap_or_else(|error| panic!("{error:?}"));
    let mut failures = Vec::new();
    for case in cases.iter().filter(|case| !case.partial) {
        let mut actual = match kernel.run(case) {
            Ok(Some(actual)) => actual,
            Ok(None) => continue,
            Err(error) => {
                failures.push(format!("{case}  kernel: {error:#}"));
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
            failures.push(format!("{case}{difference}"));
        }
    }
    report(&failures, cases.len());
}

#[test]
fn the_host_does_what_the_table_says() {
    on_the_host(&chosen(cases::with_prefixes()), host::NOW);
}

#[test]
fn the_kernel_does_what_the_table_says_and_the_host_does() {
    in_the_kernel(Kernel::load, &chosen(cases::with_prefixes()));
}

/// The programs of several devices may see a packet at the same side of the stack: the first one
/// translates it.
#[test]
fn what_is_translated_is_left_alone_by_the_next_program() {
    if kernel::is_skipped() {
        return;
    }
    let mut kernel = Kernel::load().unwrap_or_else(|error| panic!("{error:?}"));
    let cases: Vec<Case> = cases::all()
        .into_iter()
        .filter(|case| {
            case.name.contains("along a young masqueraded flow, a") && !is_accelerated(case)
        })
        .filter(|case| case.input != case.expected.frame)
        .collect();
    assert!(cases.len() >= 80, "there are such cases");
    let [ingress, egress] = kernel::TC_DONE;
    let mut failures = Vec::new();
    for case in cases {
        let is_egress = matches!(case.program, Program::Egress | Program::EgressL3);
        let (own, other) = if is_egress { (egress, ingress) } else { (ingress, egress) };
        let mut untouched = case.clone();
        untouched.expected.frame.clone_from(&case.input);
        untouched.expected.counted = Some(Vec::new());
        untouched.expected.flows.clone_from(&case.world.flows);
        for (who, case, word) in
            [("at the same side", &untouched, own), ("at the other side", &case, other)]
        {
            // The kernel runs no program on what is too short.
            let outcome = kernel.run_carrying(case, word).expect("a test run");
            failures.extend(outcome.map(|outcome| judge(case, who, outcome)));
        }
    }
    failures.retain(|failure| !failure.is_empty());
    report(&failures, failures.len());
}

fn is_accelerated(case: &Case) -> bool {
    case.world.settings.networks & networks::ACCELERATE != 0
}

/// A packet that XDP or another device's program has translated is sent around the stack unchanged.
#[test]
fn what_is_translated_goes_around_the_stack_by_the_next_program() {
    if kernel::is_skipped() {
        return;
    }
    let mut kernel = Kernel::load().unwrap_or_else(|error| panic!("{error:?}"));
    let all = cases::all();
    let is_around = |case: &&Case| {
        is_accelerated(case)
            && case.name.contains("along a young masqueraded flow, a")
            && case.program == Program::Ingress
            && case.expected.end == End::Redirect
    };
    let (mut failures, mut tried) = (Vec::new(), 0);
    for case in all.iter().filter(is_around) {
        let name = case.name.trim_end_matches(", accelerated");
        let before =
            all.iter().find(|before| before.name == name).expect("the case without acceleration");
        let mut case = case.clone();
        case.input.clone_from(&before.expected.frame);
        case.expected.counted = Some(Vec::new());
        case.expected.flows.clone_from(&case.world.flows);
        case.expected.embryonic.clone_from(&case.world.embryonic);
        let [ingress, _] = kernel::TC_DONE;
        let outcome =
            kernel.run_carrying(&case, ingress).expect("a test run").expect("a whole packet");
        failures.push(judge(&case, "kernel", outcome));
        tried += 1;
    }
    assert!(tried >= 20, "{tried} such cases");
    failures.retain(|failure| !failure.is_empty());
    report(&failures, tried);
}

/// The entries of most cases were used before the clock was zero, or will be when it is zero again.
#[test]
fn a_machine_that_has_just_booted_does_the_same() {
    let cases = cases::all();
    for now in [0, 1, 2] {
        on_the_host(&cases, now);
    }
    in_the_kernel(|| Kernel::load_at(1), &cases);
}

#[test]
fn ticks_that_wrap_change_nothing() {
    let cases = cases::all();
    for now in [0, 10, Ticks::MAX - 10, Ticks::MAX] {
        on_the_host(&cases, now);
    }
    // They wrap while the cases run.
    in_the_kernel(|| Kernel::load_at(Ticks::MAX), &cases);
}

#[test]
fn a_search_walks_over_every_port_there_is() {
    let cases = cases::large();
    on_the_host(&cases, host::NOW);
    in_the_kernel(Kernel::load_large, &cases);
}

/// The limit is that of `icmp_msgs_per_sec` and `icmp_msgs_burst`: whatever sources a flood has,
/// the node does not answer more.
#[test]
fn icmp_errors_have_a_limit_for_all_clients_of_a_device() {
    if kernel::is_skipped() {
        return;
    }
    let mut kernel = Kernel::load().unwrap_or_else(|error| panic!("{error:?}"));
    for cast in Cast::of(UDP) {
        let of = |ifindex: u32| -> Vec<Case> {
            let client = |host| SocketAddr::new(address(cast.version, NET_CLIENTS, host), 40_001);
            let question = |host| cast.first(client(host), cast.empty).at(mac(ifindex));
            let asks = cast.case("a datagram to a service without backends");
            let asks = asks.world(&cast.world()).tc_ingress(ifindex);
            (1..=250).map(|host| asks.clone().sends(&question(host))).collect()
        };
        kernel.prepare(&cast.world()).expect("the maps are filled");
        let (answered, time) = kernel.redirected(&of(EDGE)).expect("the kernel runs them");
        // The programs' clock moves by the kernel's tick: 10 ms at most.
        let most = DEVICE_REJECT_BURST_MS + time.as_millis() as u32 + 11;
        println!("{}: {answered} of 250 answered in {time:?}, at most {most}", cast.title());
        assert!(
            answered >= DEVICE_REJECT_BURST_MS && answered <= most.min(249),
            "{answered} of 250 in {time:?}"
        );
        let (answered, _) = kernel.redirected(&of(UPLINK)[..1]).expect("the kernel runs it");
        assert_eq!(answered, 1, "another device's clients are not concerned");
    }
}

/// Rules by mark apply to what goes around the stack, from Linux 6.10 on.
#[test]
fn a_mark_counts_for_the_route_of_the_hosts_own_packets() {
    if kernel::is_skipped() {
        return;
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("readable");
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let counts = (numbers.next(), numbers.next()) >= (Some(6), Some(10));
    let mut kernel = Kernel::load().unwrap_or_else(|error| panic!("{error:?}"));
    for cast in Cast::all() {
        let (world, _) = cases::moved(&cast, NET_MARKED);
        let first = cast.first(SocketAddr::new(cast.node, 40_001), cast.frontend);
        let case = cast.case("this host asks a marked route's backend");
        let case = case.world(&world).tc_egress(UPLINK).sends(&first);
        for (mark, is_routed) in [(0, false), (MARK, counts), (MARK + 1, false)] {
            kernel.mark = mark;
            kernel.prepare(&world).expect("the maps are filled");
            let (redirected, _) =
                kernel.redirected(std::slice::from_ref(&case)).expect("the kernel runs it");
            assert_eq!(redirected == 1, is_routed, "{}, mark {mark:#x}", cast.title());
        }
    }
}

/// Returns the cases that cause events, with the events.
fn told() -> Vec<(Case, Vec<Event>)> {
    let all = cases::all().into_iter().filter(|case| !case.partial);
    all.filter_map(|case| {
        let events = host::run(&case).events.unwrap_or_default();
        (!events.is_empty()).then_some((case, events))
    })
    .collect()
}

#[test]
fn every_kind_of_event_but_a_call_is_in_the_table() {
    let told = told();
    for kind in [Kind::Opened, Kind::Proven, Kind::Closing, Kind::Counted] {
        let count = told.iter().filter(|(_, events)| events[0].kind == kind as u8).count();
        assert!(count > 0, "nothing is {}", kind.as_str());
        println!("{}: {count} cases", kind.as_str());
    }
    assert!(told.iter().all(|(_, events)| events.len() == 1), "a packet is told once");
}

#[test]
fn no_event_is_sent_unless_somebody_listens_for_it() {
    if kernel::is_skipped() {
        return;
    }
    let mut kernel = Kernel::load().unwrap_or_else(|error| panic!("{error:?}"));
    let on = Listening { until_ns: u64::MAX, ..Listening::default() };
    let mut tried = [0; 2];
    for (case, expected) in told().into_iter().step_by(7) {
        for (sieve, is_told) in [
            (Listening::default(), false),
            // One who was killed a long time ago.
            (Listening { until_ns: 1, ..on }, false),
            (
                Listening { kinds: 1 << Kind::Counted as u32, ..on },
                expected[0].kind == Kind::Counted as u8,
            ),
            (Listening { port: 9, ..on }, false),
            (on, true),
        ] {
            kernel.listen(&sieve).expect("the sieve is written");
            let outcome = kernel.run(&case).expect("the kernel runs it");
            let Some(events) = outcome.and_then(|outcome| outcome.events) else { continue };
            let wanted = if is_told { expected.clone() } else { Vec::new() };
            assert_eq!(events, wanted, "{}: {sieve:?}", case.name);
            tried[usize::from(is_told)] += 1;
        }
    }
    println!("told {}, not told {}", tried[1], tried[0]);
    assert!(tried[0] > 100 && tried[1] > 50, "{tried:?}");
}

/// Returns the shortest of several times, which are taken in turns: whatever disturbs one disturbs
/// the others.
fn shortest(kernel: &mut Kernel, case: &Case, sieves: &[Listening]) -> Vec<u32> {
    let mut shortest = vec![u32::MAX; sieves.len()];
    for _ in 0..15 {
        for (shortest, sieve) in shortest.iter_mut().zip(sieves) {
            kernel.listen(sieve).expect("the sieve is written");
            let time = kernel.time(case, 100_000).expect("the kernel runs it");
            *shortest = time.min(*shortest);
        }
    }
    shortest
}

#[test]
fn packets_of_an_established_flow_are_no_events_whoever_listens() {
    if kernel::is_skipped() {
        return;
    }
    let mut kernel = Kernel::load().unwrap_or_else(|error| panic!("{error:?}"));
    let on = Listening { until_ns: u64::MAX, ..Listening::default() };
    // Nobody, one who was killed, one who asks for something else, one who asks for everything (and
    // does not read: the ring is full).
    let sieves =
        [Listening::default(), Listening { until_ns: 1, ..on }, Listening { port: 9, ..on }, on];
    for cast in Cast::of(TCP) {
        // A flow to where the packet goes anyway: it is the same packet each time.
        let same =
            Connection { backend: cast.frontend, ..cast.connection() }.state(state::ESTABLISHED);
        let packet = cast.next(cast.client, cast.frontend);
        let world = cast.world().flows(same.forward());
        let established = case("an established flow").world(&world).tc_ingress(EDGE).sends(&packet);
        let mut none = cast.world();
        none.port(ONE).ranges = [Range::DROP; 3];
        let first = cast.first(cast.client, cast.frontend);
        let dropped = case("a drop that is counted").world(&none).tc_ingress(EDGE).sends(&first);
        for (case, world) in [(established, world), (dropped, none)] {
            kernel.prepare(&world).expect("the maps are filled");
            let times = shortest(&mut kernel, &case, &sieves);
            let told = kernel.events().expect("the ring is read").len();
            let ratio = |index: usize| f64::from(times[index]) / f64::from(times[0]);
            println!(
                "{}, {}: nobody {} ns; ratio of a killed listener {:.2}, of one for something else {:.2}, of one for everything {:.2}",
                cast.title(),
                case.name,
                times[0],
                ratio(1),
                ratio(2),
                ratio(3)
            );
            println!("    {told} events were in the ring");
            assert_eq!(told > 0, case.name != "an established flow", "{}", case.name);
        }
    }
}
