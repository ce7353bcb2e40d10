//! Entry points, one for each hook.

mod clock;
mod connections;
mod count;
mod decide;
mod events;
mod fib;
#[cfg(feature = "both-layouts")]
mod layouts;
mod maps;
mod record;
mod run;
mod sctp;
mod skb;
mod socket;
mod socket_lookup;
mod tables;
mod tc;
mod xdp;

use aya_ebpf::macros::{cgroup_sock_addr, classifier, sock_ops, xdp};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext, TcContext, XdpContext};

/// Packets that enter the node, or leave a pod, on a device with an Ethernet header.
#[classifier]
pub(crate) fn tc_ingress_l2(ctx: TcContext) -> i32 {
    tc::run::<14, false>(ctx.skb.skb)
}

/// Packets that leave the node, or enter a pod, on a device with an Ethernet header.
#[classifier]
pub(crate) fn tc_egress_l2(ctx: TcContext) -> i32 {
    tc::run::<14, true>(ctx.skb.skb)
}

/// As `tc_ingress_l2`, on a device without a link header.
#[classifier]
pub(crate) fn tc_ingress_l3(ctx: TcContext) -> i32 {
    tc::run::<0, false>(ctx.skb.skb)
}

/// As `tc_egress_l2`, on a device without a link header.
#[classifier]
pub(crate) fn tc_egress_l3(ctx: TcContext) -> i32 {
    tc::run::<0, true>(ctx.skb.skb)
}

/// Packets from outside, before the kernel has made an skb of them.
#[xdp]
pub(crate) fn xdp_uplink(ctx: XdpContext) -> u32 {
    xdp::run(ctx.ctx)
}

/// connect() of an IPv4 socket.
#[cgroup_sock_addr(connect4)]
pub(crate) fn connect4(ctx: SockAddrContext) -> i32 {
    socket::connect4(ctx.sock_addr)
}

/// connect() of an IPv6 socket, to an IPv6 or a mapped IPv4 address.
#[cgroup_sock_addr(connect6)]
pub(crate) fn connect6(ctx: SockAddrContext) -> i32 {
    socket::connect6(ctx.sock_addr)
}

/// sendto() and sendmsg() with an address, on IPv4 or with a mapped address.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn sendmsg4(ctx: SockAddrContext) -> i32 {
    socket::sendmsg4(ctx.sock_addr)
}

/// sendto() and sendmsg() with an address, on IPv6.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn sendmsg6(ctx: SockAddrContext) -> i32 {
    socket::sendmsg6(ctx.sock_addr)
}

/// The sender's address that recvfrom() and recvmsg() show, on an IPv4 socket.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn recvmsg4(ctx: SockAddrContext) -> i32 {
    socket::recvmsg4(ctx.sock_addr)
}

/// The sender's address that recvfrom() and recvmsg() show, on an IPv6 socket.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn recvmsg6(ctx: SockAddrContext) -> i32 {
    socket::recvmsg6(ctx.sock_addr)
}

/// getpeername() of an IPv4 socket.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn getpeername4(ctx: SockAddrContext) -> i32 {
    socket::getpeername4(ctx.sock_addr)
}

/// getpeername() of an IPv6 socket.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn getpeername6(ctx: SockAddrContext) -> i32 {
    socket::getpeername6(ctx.sock_addr)
}

/// A TCP connection begins, changes its state, or has what it sent acknowledged.
#[sock_ops]
pub(crate) fn connection(ctx: SockOpsContext) -> u32 {
    connections::run(ctx.ops)
}
