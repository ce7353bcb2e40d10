//! Limits the rate of ICMP errors, as the kernel's own limits do.

use crate::abi::{RejectBucket, RejectKey};
use crate::family::Family;

use super::adapter::Adapter;

/// One ICMP error a second to one client, as with `net.ipv4.icmp_ratelimit`...
pub const REJECT_COST_MS: u32 = 1_000;
/// ...after a burst of six.
pub const REJECT_BURST_MS: u32 = 6_000;
/// A thousand ICMP errors a second by one device, as with `net.ipv4.icmp_msgs_per_sec`...
pub const DEVICE_REJECT_COST_MS: u32 = 1;
/// ...after a burst of fifty, as with `net.ipv4.icmp_msgs_burst`.
pub const DEVICE_REJECT_BURST_MS: u32 = 50;

/// Takes one ICMP error from the buckets of a client and of the device by which it leaves, or from
/// neither if one is empty. A function of its own, so that it has a stack frame to itself.
#[inline(never)]
pub fn may_answer<F: Family, A: Adapter<F>>(adapter: &mut A, key: &RejectKey) -> bool {
    let now_ms = adapter.now_ms();
    let (client, may_client) = take_token(adapter.bucket(key), now_ms);
    let device_key = device_reject_key(adapter.ifindex());
    let (device, may_device) = take_device_token(adapter.bucket(&device_key), now_ms);
    if !may_client || !may_device {
        return false;
    }
    adapter.set_bucket(key, &client);
    adapter.set_bucket(&device_key, &device);
    true
}

/// Takes the cost of one ICMP error from a client's bucket; returns false if there is not enough
/// credit.
#[inline(always)]
pub fn take_token(bucket: Option<RejectBucket>, now_ms: u32) -> (RejectBucket, bool) {
    take(bucket, now_ms, Rate { cost_ms: REJECT_COST_MS, burst_ms: REJECT_BURST_MS })
}

/// As [`take_token`], from the bucket of the device by which the error leaves. Each device has its
/// own, so that a flood by one, from whatever forged sources, takes nothing from the clients of
/// another.
#[inline(always)]
pub fn take_device_token(bucket: Option<RejectBucket>, now_ms: u32) -> (RejectBucket, bool) {
    take(bucket, now_ms, Rate { cost_ms: DEVICE_REJECT_COST_MS, burst_ms: DEVICE_REJECT_BURST_MS })
}

/// The rate of a token bucket, in milliseconds of credit.
#[derive(Clone, Copy)]
struct Rate {
    /// The cost of one ICMP error.
    cost_ms: u32,
    /// The most that a bucket holds.
    burst_ms: u32,
}

#[inline(always)]
fn take(
    bucket: Option<RejectBucket>,
    now_ms: u32,
    Rate { cost_ms, burst_ms }: Rate,
) -> (RejectBucket, bool) {
    let credit = match bucket {
        Some(bucket) => {
            let refill = now_ms.wrapping_sub(bucket.refilled_ms).min(burst_ms);
            bucket.credit_ms.wrapping_add(refill).min(burst_ms)
        }
        None => burst_ms,
    };
    let allowed = credit >= cost_ms;
    let credit_ms = if allowed { credit.wrapping_sub(cost_ms) } else { credit };
    (RejectBucket { refilled_ms: now_ms, credit_ms }, allowed)
}

/// Returns the key of a device's bucket among the clients'. No source address looks like it, since
/// none is multicast.
#[inline(always)]
pub fn device_reject_key(ifindex: u32) -> RejectKey {
    let [a, b, c, d] = ifindex.to_be_bytes();
    let ones = 0xff;
    RejectKey {
        address: [
            ones, ones, ones, ones, ones, ones, ones, ones, ones, ones, ones, ones, a, b, c, d,
        ],
    }
}
