//! Attaches classifiers as clsact filters, for kernels without TCX and for places behind a foreign
//! filter.
//!
//! A filter belongs to the device, so it outlives the agent. A later agent finds it by its fixed
//! priority and handle, and replaces its program between two packets.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::node::netlink::{
    self, Attributes, NETLINK_ROUTE, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, find, text,
};

/// The direction in which packets pass the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From the device into the stack.
    Ingress,
    /// From the stack to the device.
    Egress,
}

impl Direction {
    /// Returns the word for people and pins.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }

    /// Returns the priority: first at ingress and last at egress, so that other filters see real
    /// addresses.
    fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => 0xfff0,
        }
    }
}

/// The handle of our filters, unlike the small numbers that the kernel and other programs choose.
const HANDLE: u32 = 0x51_0cb5;
/// The prefix of our filters' names.
const PREFIX: &str = "sluice_";

const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const DIRECT_ACTION: u32 = 1;

/// A filter as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The position among the device's filters.
    pub priority: u16,
    /// The number within the priority.
    pub handle: u32,
    /// The kind: `bpf`, `flower`, ...
    pub kind: String,
    /// The program's name, for `bpf`.
    pub name: String,
    /// The program's id, for `bpf`; else 0.
    pub program: u32,
}

impl Filter {
    /// Whether one of our agents made it.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.handle == HANDLE && self.kind == "bpf" && self.name.starts_with(PREFIX)
    }
}

/// Encodes a `struct tcmsg`, the fixed part of each message, which names a place on a device.
fn place(device: u32, handle: u32, parent: u32, info: u32) -> Vec<u8> {
    // Family and padding first.
    [0, device, handle, parent, info].iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Sends a message, and calls `each` with the payload of every answer.
fn talk(
    (kind, flags): (u16, u16),
    place: &[u8],
    attributes: &Attributes,
    each: impl FnMut(&[u8]),
) -> io::Result<()> {
    netlink::ask(NETLINK_ROUTE, &netlink::message(kind, flags, place, attributes), each)
}

/// Returns the number at a position of an answer.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    netlink::number(bytes.get(at..))
}

fn parse(device: u32, direction: Direction, payload: &[u8]) -> Option<Filter> {
    // The kernel lists all filters of a block, including those of other devices or places.
    if word(payload, 4)? != device || word(payload, 12)? != direction.parent() {
        return None;
    }
    let handle = word(payload, 8)?;
    let attributes = payload.get(20..)?;
    let options = find(attributes, TCA_OPTIONS);
    // Handle 0 is the priority itself, listed before its filters.
    (handle != 0).then(|| Filter {
        priority: (word(payload, 16).unwrap_or_default() >> 16) as u16,
        handle,
        kind: text(find(attributes, TCA_KIND)),
        name: text(options.and_then(|options| find(options, TCA_BPF_NAME))),
        program: options
            .and_then(|options| netlink::number(find(options, TCA_BPF_ID)))
            .unwrap_or_default(),
    })
}

/// Lists the filters at one side of a device: none if it has no clsact.
///
/// # Errors
///
/// Fails if the kernel refuses the listing.
pub fn filters(device: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let mut filters = Vec::new();
    let place = place(device, 0, direction.parent(), 0);
    let result = talk((RTM_GETTFILTER, NLM_F_DUMP), &place, &Attributes::default(), |payload| {
        filters.extend(parse(device, direction, payload));
    });
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP)
            ) =>
        {
            Ok(filters)
        }
        result => result.map(|()| filters),
    }
}

fn protocol_all(priority: u16) -> u32 {
    u32::from(priority) << 16 | u32::from(0x0003_u16.to_be())
}

/// Attaches a program, or replaces that of an earlier agent.
///
/// # Errors
///
/// Fails if the kernel refuses clsact or the filter.
pub fn attach(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> io::Result<()> {
    let qdisc = Attributes::default().text(TCA_KIND, "clsact");
    let at = place(device, CLSACT_HANDLE, TC_H_CLSACT, 0);
    match talk((RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL), &at, &qdisc, |_| ()) {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let options = Attributes::default()
        .with(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes())
        .text(TCA_BPF_NAME, &format!("{PREFIX}{name}"))
        .with(TCA_BPF_FLAGS, &DIRECT_ACTION.to_ne_bytes());
    let filter = Attributes::default().text(TCA_KIND, "bpf").nest(TCA_OPTIONS, &options);
    let at = place(device, HANDLE, direction.parent(), protocol_all(direction.priority()));
    talk((RTM_NEWTFILTER, NLM_F_ACK | NLM_F_CREATE), &at, &filter, |_| ())
}

/// Removes our filter from one side of a device, and returns whether there was one.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn detach(device: u32, direction: Direction) -> io::Result<bool> {
    let ours: Vec<Filter> =
        filters(device, direction)?.into_iter().filter(Filter::is_ours).collect();
    for filter in &ours {
        let info = protocol_all(filter.priority);
        let at = place(device, filter.handle, direction.parent(), info);
        talk((RTM_DELTFILTER, NLM_F_ACK), &at, &Attributes::default(), |_| ())?;
    }
    Ok(!ours.is_empty())
}

/// Removes our filters from a device, and also clsact if it is empty then.
///
/// # Errors
///
/// Fails if the kernel refuses.
pub fn clean(device: u32) -> io::Result<bool> {
    let found = detach(device, Direction::Ingress)? | detach(device, Direction::Egress)?;
    let empty = filters(device, Direction::Ingress)?.is_empty()
        && filters(device, Direction::Egress)?.is_empty();
    if found && empty {
        let at = place(device, CLSACT_HANDLE, TC_H_CLSACT, 0);
        talk((RTM_DELQDISC, NLM_F_ACK), &at, &Attributes::default(), |_| ())?;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_filter_is_recognised_as_ours() {
        let options = Attributes::default().text(TCA_BPF_NAME, "sluice_tc_ingress_l2");
        let attributes = Attributes::default().text(TCA_KIND, "bpf").nest(TCA_OPTIONS, &options);
        let place = place(7, HANDLE, Direction::Ingress.parent(), protocol_all(1));
        let payload = [&place, attributes.bytes()].concat();
        let filter = parse(7, Direction::Ingress, &payload);
        assert!(filter.as_ref().is_some_and(Filter::is_ours), "{filter:?}");
        assert_eq!(filter.map(|filter| filter.priority), Some(1));
        assert_eq!(parse(7, Direction::Egress, &payload), None);
    }

    #[test]
    fn another_handle_is_not_ours() {
        let filter = Filter {
            priority: 1,
            handle: 1,
            kind: "bpf".to_owned(),
            name: "sluice_x".to_owned(),
            program: 1,
        };
        assert!(!filter.is_ours());
    }
}
