//! What the kernel's routing tables say.

use core::ffi::c_void;

use aya_ebpf::bindings::bpf_fib_lookup as Question;
use aya_ebpf::helpers::generated::bpf_fib_lookup;
use sluice_common::{Family, V4, V6};

use super::decide::{Decide, Scratch};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
/// The device that output routing starts from: a lookup as if sent by this host, without binding it to a device.
const LOOPBACK: u32 = 1;
const SUCCESS: i64 = 0;
const NO_NEIGHBOUR: i64 = 7;
const FRAG_NEEDED: i64 = 8;
/// `BPF_FIB_LOOKUP_OUTPUT`.
const OUTPUT: u32 = 2;

/// A family whose routes can be asked for.
pub(super) trait Fib: Decide {
    /// Fills in family and addresses of a question.
    fn fill(question: &mut Question, source: &Self::Address, destination: &Self::Address);
}

impl Fib for V4 {
    #[inline(always)]
    fn fill(question: &mut Question, source: &Self::Address, destination: &Self::Address) {
        question.family = AF_INET;
        let [source, ..] = V4::words(source);
        let [destination, ..] = V4::words(destination);
        question.__bindgen_anon_3.ipv4_src = source;
        question.__bindgen_anon_4.ipv4_dst = destination;
    }
}

impl Fib for V6 {
    #[inline(always)]
    fn fill(question: &mut Question, source: &Self::Address, destination: &Self::Address) {
        question.family = AF_INET6;
        question.__bindgen_anon_3.ipv6_src = V6::words(source);
        question.__bindgen_anon_4.ipv6_dst = V6::words(destination);
    }
}

/// Asks with a program's context; answers the status, and the rest in the question.
#[inline(always)]
fn lookup<F: Fib>(
    ctx: *mut c_void,
    question: &mut Question,
    source: &F::Address,
    destination: &F::Address,
    ifindex: u32,
    flags: u32,
) -> i64 {
    F::fill(question, source, destination);
    question.ifindex = ifindex;
    // SAFETY: the helper reads and writes the question within its size.
    unsafe { bpf_fib_lookup(ctx, question, size_of::<Question>() as i32, flags) }
}

#[inline(always)]
fn question() -> Question {
    // SAFETY: plain integers: zero is a value.
    unsafe { core::mem::zeroed() }
}

/// The device by which packets of this host to a destination leave; `None` where there is none, or where that is this host.
#[inline(never)]
pub(super) fn route<F: Fib>(ctx: *mut c_void, source: &F::Address, destination: &F::Address) -> Option<u32> {
    let mut question = question();
    let status = lookup::<F>(ctx, &mut question, source, destination, LOOPBACK, 0);
    // Without a neighbour so far, or for a packet beyond its MTU, the device is known all the same.
    matches!(status, SUCCESS | NO_NEIGHBOUR | FRAG_NEEDED).then_some(question.ifindex)
}

/// The link-layer address of a neighbour on a device; `None` where it is not known, or not behind this device.
#[inline(always)]
pub(super) fn neighbour<F: Fib>(
    ctx: *mut c_void,
    source: &F::Address,
    destination: &F::Address,
    ifindex: u32,
) -> Option<[u8; 6]> {
    let mut question = question();
    let status = lookup::<F>(ctx, &mut question, source, destination, ifindex, OUTPUT);
    (status == SUCCESS && question.ifindex == ifindex).then_some(question.dmac)
}

/// Asks where packets of the flow that is decided about would leave, and notes the answers for the path.
#[inline(never)]
pub(super) fn ask<F: Fib>(ctx: *mut c_void) {
    let Some(scratch) = F::scratch() else { return };
    // SAFETY: this CPU's own; nothing else takes a reference here.
    let Scratch { decision, asked, .. } = unsafe { &mut *scratch };
    let flow = &decision.flow;
    asked.routes.to_backend = route::<F>(ctx, &flow.source, &flow.destination).unwrap_or(0);
    asked.routes.to_client = route::<F>(ctx, &flow.destination, &flow.source).unwrap_or(0);
    asked.has_routes = 1;
}
