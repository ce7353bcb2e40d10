//! What the benchmark and the driver that it loads into the kernel share.

/// Bytes at the front of a packet that are made anew for each run: every header that a program may
/// change.
pub const HEADERS: usize = 80;

/// Flows that one benchmark can go through.
pub const PORTS: u32 = 65_536;

/// Where the ports stand behind Ethernet and an IPv4 header without options.
pub const SOURCE_PORT_AT: usize = 14 + 20;
/// ... and the destination's.
pub const DESTINATION_PORT_AT: usize = SOURCE_PORT_AT + 2;

/// A packet that the driver makes before each run.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Template {
    /// The first bytes of the frame.
    pub headers: [u64; HEADERS / 8],
    /// Which port changes with the flow: one of the places above, else none.
    pub port_at: u32,
    /// How many flows there are.
    pub flows: u32,
    /// The flow of the next run.
    pub next: u32,
    /// Unused.
    pub reserved: u32,
}
