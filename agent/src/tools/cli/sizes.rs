//! How many flows a machine remembers by default.

/// Flows of a small machine, as the maps are declared.
pub(super) const FLOWS_MIN: u32 = sluice_common::abi::FLOWS_MAX / 2;
/// As conntrack's rule has it for connections.
const FLOWS_PER_CPU: u64 = 32_768;
/// What a flow takes: two entries in the map of each family, which are allocated when it is made.
const FLOW_BYTES: u64 = 600;
/// One part of so many of the machine's memory is for flows at most.
const MEMORY_SHARE: u64 = 256;

/// How many flows this machine remembers.
pub(super) fn flows() -> u32 {
    // SAFETY: the calls have no preconditions.
    let [cpus, pages, page] =
        [libc::_SC_NPROCESSORS_CONF, libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe {
            // What the system does not know counts as nothing.
            u64::try_from(libc::sysconf(name)).unwrap_or_default()
        });
    flows_of(cpus, pages.saturating_mul(page))
}

fn flows_of(cpus: u64, memory_bytes: u64) -> u32 {
    let wanted = cpus.saturating_mul(FLOWS_PER_CPU).min(memory_bytes / MEMORY_SHARE / FLOW_BYTES);
    u32::try_from(wanted).unwrap_or(u32::MAX).clamp(FLOWS_MIN, super::FLOWS_LIMIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_remembers_flows_by_its_cpus_within_its_memory() {
        const GIB: u64 = 1 << 30;
        for (cpus, memory, flows) in [
            (0, 0, 131_072),
            (2, 4 * GIB, 131_072),
            (16, 16 * GIB, 131_072),
            (16, 64 * GIB, 447_392),
            (16, 128 * GIB, 524_288),
            (64, 512 * GIB, 2_097_152),
            (4_096, u64::MAX, 16_777_216),
        ] {
            assert_eq!(flows_of(cpus, memory), flows, "{cpus} CPUs, {memory} bytes");
        }
    }
}
