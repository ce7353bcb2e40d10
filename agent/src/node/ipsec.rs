//! Detects IPsec policies on this node. A packet that goes around the stack would bypass them, and
//! leave unencrypted.

use std::io;

use sluice_common::abi::networks;
use sluice_core::policy::Accelerate;

use crate::node::netlink::{self, Attributes, NETLINK_XFRM, NLM_F_ACK, find};

/// `XFRM_MSG_GETSPDINFO`.
const GET_POLICY_INFO: u16 = 0x25;
/// `XFRMA_SPD_INFO`: `struct xfrmu_spdinfo`, which begins with the numbers of inbound, outbound and
/// forwarding policies.
const POLICY_INFO: u16 = 1;

/// Returns the bit of the settings that keeps packets on the stack, if it is needed.
pub(crate) fn bit(accelerate: Accelerate) -> u32 {
    if accelerate == Accelerate::Off {
        return 0;
    }
    match policies() {
        Ok(0) => 0,
        Ok(_) => networks::IPSEC,
        Err(error) => {
            tracing::debug!(
                "policies of IPsec cannot be counted, so nothing goes around the stack: {error}"
            );
            networks::IPSEC
        }
    }
}

/// Returns the number of policies, without those of single sockets.
fn policies() -> io::Result<u32> {
    let fixed = u32::MAX.to_ne_bytes();
    let message = netlink::message(GET_POLICY_INFO, NLM_F_ACK, &fixed, &Attributes::default());
    let mut count = 0;
    let asked = netlink::ask(NETLINK_XFRM, &message, |payload| {
        count += counted(payload.get(4..).unwrap_or_default());
    });
    match asked {
        // The kernel has no IPsec, or its interface is not loaded.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(0),
        Err(error) => Err(error),
        Ok(()) => Ok(count),
    }
}

fn counted(answer: &[u8]) -> u32 {
    let (words, _) = find(answer, POLICY_INFO).unwrap_or_default().as_chunks::<4>();
    words.iter().take(3).map(|word| u32::from_ne_bytes(*word)).fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_counted_but_for_those_of_sockets() {
        let words =
            |words: [u32; 6]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        let answer = |counts| {
            [&28_u16.to_ne_bytes()[..], &POLICY_INFO.to_ne_bytes(), &words(counts)].concat()
        };
        assert_eq!(counted(&answer([0, 0, 0, 4, 4, 0])), 0);
        assert_eq!(counted(&answer([1, 2, 3, 0, 0, 0])), 6);
        assert_eq!(counted(&[]), 0);
    }

    #[test]
    fn where_nothing_is_accelerated_nobody_asks() {
        assert_eq!(bit(Accelerate::Off), 0);
    }
}
