//! Packets that are left to netfilter while Sluice takes over from it, or hands back.

use crate::abi::{Tuple, imported, phase};
use crate::family::Family;
use crate::packet::header::protocol;
use crate::packet::parse::Headers;
use crate::reason::Reason;
use crate::tables::Tables;

use super::entry::entry_of;
use super::open::is_opening;

/// Reports whether the entry of a tuple only [notes](super::open::opens_far_pair) that something
/// other than a client of ours has it.
#[inline(always)]
fn is_noted<F: Family, T: Tables<F>>(tuple: &Tuple<F::Address>, tables: &T) -> bool {
    matches!(entry_of(tuple, tables), Some((entry, _)) if entry.translates_source())
}

/// Returns why a packet to a frontend without a flow is left to netfilter during a takeover, or
/// `None` if it is ours. A tuple that was ours (its flow has ended, or its backend is gone) stays
/// ours, because its entry would apply to the next packet.
#[inline(always)]
pub(super) fn left_to_netfilter<F: Family, T: Tables<F>>(
    was_ours: bool,
    headers: &Headers<F>,
    tables: &T,
) -> Option<Reason> {
    let settings = tables.settings()?;
    if settings.phase == phase::SERVE || was_ours && !is_noted(&headers.tuple, tables) {
        return None;
    }
    let opens = headers.tuple.protocol != protocol::UDP && is_opening(headers.tcp_flags);
    if settings.has_imported()
        && let Some(bits) = tables.imported(&headers.tuple)
        && !(opens && bits & imported::CLOSING != 0)
    {
        return Some(Reason::NetfilterFlow);
    }
    match settings.phase & phase::MASK {
        phase::SERVE => None,
        phase::IMPORT if opens => None,
        _ => Some(Reason::NotTaken),
    }
}
