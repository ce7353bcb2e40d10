//! The kernel programs: entry points around [`sluice_common::path`].
//!
//! A program wraps its context, lets the path decide, and applies the decision. Compiled for any
//! target other than BPF this is an empty program, so that the whole workspace can be checked at
//! once.

#![cfg_attr(target_arch = "bpf", no_std, no_main, feature(asm_experimental_arch))]
#![allow(
    clippy::inline_always,
    reason = "the verifier follows values only through inlined code: what a program calls is part of it"
)]
#![allow(
    clippy::needless_borrows_for_generic_args,
    reason = "a key given by value is copied to the stack"
)]
#![allow(
    clippy::needless_pass_by_value,
    reason = "aya's macros hand an entry point its context by value"
)]
#![allow(
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "helpers take sizes and return sums in types of their own"
)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

#[cfg(target_arch = "bpf")]
mod bpf;

/// There is nothing to run on the host.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}

/// `bpf_fib_lookup` is for GPL-compatible programs only: this crate may be used under the GPL as
/// well.
#[cfg(target_arch = "bpf")]
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
