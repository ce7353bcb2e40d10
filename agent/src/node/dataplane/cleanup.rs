//! Removes every trace of an agent from the kernel.

use std::ffi::CStr;

use super::clsact;
use super::error::Error;
use super::pins::Pins;

/// Detaches every program and removes every pin under the pin path, and our clsact filters from
/// every device. Returns a description of what was done.
///
/// # Errors
///
/// Fails if the kernel refuses; what was removed before stays removed.
pub fn cleanup(pins: &Pins) -> Result<Vec<String>, Error> {
    let mut done = Vec::new();
    // Programs go first, so that those that still run find the maps.
    for (index, name) in devices() {
        if clsact::clean(index)
            .map_err(|cause| Error::attach("(remove) clsact filters", &name, cause))?
        {
            done.push(format!("removed the filters of device {name}"));
        }
    }
    if pins.remove()? {
        done.push(format!("removed links and maps under {}", pins.root().display()));
    }
    Ok(done)
}

/// Returns the ifindex and name of every device.
fn devices() -> Vec<(u32, String)> {
    let mut devices = Vec::new();
    // SAFETY: no arguments; the list ends with an index of zero and is freed below.
    let list = unsafe { libc::if_nameindex() };
    if list.is_null() {
        return devices;
    }
    let mut next = list;
    loop {
        // SAFETY: not beyond the end, which stops the loop.
        let entry = unsafe { &*next };
        if entry.if_index == 0 {
            break;
        }
        // SAFETY: every entry before the end has a name that ends with a zero.
        let name = unsafe { CStr::from_ptr(entry.if_name) };
        devices.push((entry.if_index, name.to_string_lossy().into_owned()));
        // SAFETY: the list goes on until its end.
        next = unsafe { next.add(1) };
    }
    // SAFETY: made by `if_nameindex` above.
    unsafe { libc::if_freenameindex(list) };
    devices
}
