//! Shared by the benchmark and the driver that it loads into the kernel.

/// Bytes at the front of a packet that are written anew for each run: every header that a program
/// may change.
pub const HEADERS: usize = 80;

/// Maximum number of flows in one benchmark.
pub const PORTS: u32 = 65_536;

/// Offset of the source port behind Ethernet and an IPv4 header without options.
pub const SOURCE_PORT_AT: usize = 14 + 20;
/// Offset of the destination port.
pub const DESTINATION_PORT_AT: usize = SOURCE_PORT_AT + 2;

/// The packet that the driver writes before each run.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Template {
    /// The first bytes of the frame.
    pub headers: [u64; HEADERS / 8],
    /// Offset of the port that changes with the flow: one of those above, or any other value for
    /// none.
    pub port_at: u32,
    /// Number of flows.
    pub flows: u32,
    /// The flow of the next run.
    pub next: u32,
    /// Unused.
    pub reserved: u32,
}
