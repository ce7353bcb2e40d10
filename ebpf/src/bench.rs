//! Programs that the benchmark runs the kernel programs with: a driver that writes each packet anew
//! and tail-calls the program under test, and programs that do nothing, to measure the driver's own
//! cost.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]
#![allow(clippy::inline_always, reason = "the verifier follows values only through inlined code")]
#![allow(
    clippy::needless_pass_by_value,
    reason = "aya's macros hand an entry point its context by value"
)]
#![allow(clippy::cast_possible_wrap, reason = "helpers take sizes in types of their own")]

/// There is nothing to run on the host.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// `bpf_tail_call` is available to GPL-compatible programs only if the called program is one.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[cfg(target_arch = "bpf")]
mod driver {
    #![allow(non_upper_case_globals, reason = "a map's name is what `bpftool map` shows")]

    use aya_ebpf::EbpfContext;
    use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_PASS};
    use aya_ebpf::btf_maps::Array;
    use aya_ebpf::helpers::generated::bpf_xdp_adjust_meta;
    use aya_ebpf::macros::{btf_map, classifier, map, xdp};
    use aya_ebpf::maps::ProgramArray;
    use aya_ebpf::programs::{TcContext, XdpContext};
    use sluice_common::bench::{DESTINATION_PORT_AT, HEADERS, PORTS, SOURCE_PORT_AT, Template};

    /// The packet as it is written for each run.
    #[btf_map]
    static template: Array<Template, 1> = Array::new();
    /// The values for [`Template::port_at`], one packet after the other; big endian.
    #[btf_map]
    static ports: Array<u16, { PORTS as usize }> = Array::new();
    /// The tc program under test.
    #[map]
    static tc_target: ProgramArray = ProgramArray::with_max_entries(1, 0);
    /// The XDP program under test.
    #[map]
    static xdp_target: ProgramArray = ProgramArray::with_max_entries(1, 0);

    /// Writes the packet of the next run.
    #[inline(always)]
    fn make(data: usize, end: usize) -> Option<()> {
        if data + HEADERS > end {
            return None;
        }
        let packet = template.get_ptr_mut(0)?;
        // SAFETY: the array's only element; one CPU at a time runs the driver.
        let packet = unsafe { &mut *packet };
        for word in 0..HEADERS / 8 {
            // SAFETY: within the frame, as asked above; the machine writes unaligned words.
            unsafe { *((data + word * 8) as *mut u64) = packet.headers[word] };
        }
        let next = packet.next;
        packet.next = if next + 1 < packet.flows { next + 1 } else { 0 };
        let port = *ports.get(next)?;
        // The verifier wants each place by itself.
        match packet.port_at as usize {
            SOURCE_PORT_AT => write::<SOURCE_PORT_AT>(data, port),
            DESTINATION_PORT_AT => write::<DESTINATION_PORT_AT>(data, port),
            _ => (),
        }
        Some(())
    }

    /// Writes a port within the headers.
    #[inline(always)]
    fn write<const AT: usize>(data: usize, port: u16) {
        const { assert!(AT + 2 <= HEADERS) };
        // SAFETY: the caller has asked whether the frame holds all headers; the machine writes
        // unaligned words.
        unsafe { *((data + AT) as *mut u16) = port };
    }

    #[classifier]
    fn drive_tc(ctx: TcContext) -> i32 {
        if make(ctx.data(), ctx.data_end()).is_none() {
            return 2;
        }
        // SAFETY: the context is valid while the program runs; nothing is carried over from the
        // last run.
        unsafe { (*ctx.skb.skb).cb[0] = 0 };
        // SAFETY: the slot holds a tc program.
        unsafe { tc_target.tail_call(&ctx, 0) };
        2
    }

    #[xdp]
    fn drive_xdp(ctx: XdpContext) -> u32 {
        // Remove what the last run put in front of the frame.
        let before = ctx.data().wrapping_sub(ctx.metadata());
        if before != 0 {
            // SAFETY: the context is valid while the program runs.
            let _ = unsafe { bpf_xdp_adjust_meta(ctx.as_ptr().cast(), before as i32) };
        }
        if make(ctx.data(), ctx.data_end()).is_none() {
            return XDP_ABORTED;
        }
        // SAFETY: the slot holds an XDP program.
        unsafe { xdp_target.tail_call(&ctx, 0) };
        XDP_ABORTED
    }

    #[classifier]
    fn nothing_tc(_: TcContext) -> i32 {
        -1
    }

    #[xdp]
    fn nothing_xdp(_: XdpContext) -> u32 {
        XDP_PASS
    }
}
