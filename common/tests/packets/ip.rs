//! Converts addresses between the standard library and a family.

use std::net::IpAddr;

use sluice_common::abi::{Ipv4Address, Ipv6Address};
use sluice_common::event::Wide;
use sluice_common::packet::answer::Answer;
use sluice_common::{V4, V6};

/// A family whose addresses convert from and to the standard library's.
pub(crate) trait Ip: Answer + Wide {
    /// Returns the family's address, if it is of this family.
    fn of(address: IpAddr) -> Option<Self::Address>;
    /// Returns the standard library's address.
    fn ip(address: Self::Address) -> IpAddr;
}

impl Ip for V4 {
    fn of(address: IpAddr) -> Option<Ipv4Address> {
        match address {
            IpAddr::V4(address) => Some(address.into()),
            IpAddr::V6(_) => None,
        }
    }

    fn ip(address: Ipv4Address) -> IpAddr {
        IpAddr::V4(address.into())
    }
}

impl Ip for V6 {
    fn of(address: IpAddr) -> Option<Ipv6Address> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address.into()),
        }
    }

    fn ip(address: Ipv6Address) -> IpAddr {
        IpAddr::V6(address.into())
    }
}
