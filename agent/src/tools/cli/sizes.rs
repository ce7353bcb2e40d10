//! The default number of flows that the maps hold.

/// The number of flows on a small machine: the declared size of the maps.
pub(super) const FLOWS_MIN: u32 = sluice_common::abi::FLOWS_MAX / 2;
/// The flows per CPU, as kube-proxy sets conntrack's maximum.
const FLOWS_PER_CPU: u64 = 32_768;
/// The memory of a flow: two entries in the map of each family, allocated when the map is made.
const FLOW_BYTES: u64 = 600;
/// Flows take at most this fraction of the machine's memory.
const MEMORY_SHARE: u64 = 256;

/// Returns the number of flows for this machine.
pub(super) fn flows() -> u32 {
    // SAFETY: the calls have no preconditions.
    let [cpus, pages, page] =
        [libc::_SC_NPROCESSORS_CONF, libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe {
            // A value that the system does not know (-1) counts as 0.
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
