//! The dataplane on the real kernel: loads the built-in object under a BPF file system of its own.
//!
//! Needs root and a binary with the BPF object; without either it fails, unless
//! `SLUICE_TEST_SKIP=1` says to skip it.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sluice::node::dataplane::{Access, Digests, Kernel, Layout, Loaded, Maps, Pins, Xdp, load};
use sluice_common::abi::{
    Backend, Class, Name, NodeAddress, Origin, Origins, Range, Service, ServiceKey, backend,
    frontend, node_address, policy,
};
use sluice_core::image::{Dataplane, FamilyWrite, Image, PERMITTED, SourceKey, Write, diff};
use sluice_lab::skipped;

/// A BPF file system that is removed with the test.
struct Bpffs(PathBuf);

impl Bpffs {
    fn new(name: &str) -> Option<Self> {
        // SAFETY: no arguments.
        if unsafe { libc::geteuid() } != 0 && skipped("a BPF file system needs root") {
            return None;
        }
        let path = std::env::temp_dir().join(format!("sluice-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a folder");
        Some(Self(path))
    }

    /// Loads with small maps, some of them of the given sizes.
    fn load(&self, sizes: &[(&str, u32)]) -> Option<Loaded> {
        let mut all =
            BTreeMap::from([("flows_v4".to_owned(), 1024), ("flows_v6".to_owned(), 1024)]);
        all.extend(sizes.iter().map(|(map, size)| ((*map).to_owned(), *size)));
        match load(&Pins::new(&self.0), &all, Xdp::Off, Layout::Current) {
            Ok(loaded) => Some(loaded),
            Err(sluice::node::dataplane::Error::NoObject)
                if skipped("the agent was built without the BPF object: `cargo xtask build`") =>
            {
                None
            }
            Err(error) => panic!("{error}"),
        }
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn text<const N: usize>(text: &str) -> [u8; N] {
    let mut bytes = [0; N];
    for (to, from) in bytes.iter_mut().zip(text.bytes()) {
        *to = from;
    }
    bytes
}

/// Returns an image with one service port, two backends and 61 slots.
fn image() -> Image {
    let mut image = Image::default();
    let address = |last| Ipv4Addr::new(10, 0, 0, last).into();
    let key = ServiceKey { address: address(9), port: 80, protocol: 6, reserved: 0 };
    let _ = image.v4.services.insert(key, Service { service_port: 1, kind: frontend::CLUSTER_IP });
    for id in 1..=2_u8 {
        let flags = backend::SERVING | if id == 1 { backend::LOCAL } else { 0 };
        let backend =
            Backend { address: address(id), port: 8080, generation: 1, service_port: 1, flags };
        let _ = image.v4.backends.insert(u32::from(id), backend);
        let mut origins = Origins::default();
        origins.frontends[0] = Origin { address: address(9), port: 80, reserved: 0 };
        let key = ServiceKey { address: address(id), port: 8080, protocol: 6, reserved: 0 };
        let _ = image.v4.origins.insert(key, origins);
    }
    let _ = image.slots.insert(160, (0..61).map(|slot| slot % 2 + 1).collect());
    let port = image.ports.entry(1).or_default();
    port.ranges[Class::Internal as usize] = Range::new(160, 61).0;
    let name = Name {
        namespace: text("default"),
        service: text("web"),
        port: text("http"),
        number: 80,
        protocol: 6,
        family: 4,
    };
    let _ = image.names.insert(1, name);
    let port = image.ports.entry(1).or_default();
    (port.affinity_seconds, port.flags) = (10_800, policy::SOURCE_RANGES);
    let sources = [(0, [0, 0, 0, 0]), (24, [203, 0, 113, 0]), (32, [203, 0, 113, 9])];
    for (length, network) in sources {
        let key = SourceKey { service_port: 1, length, network: Ipv4Addr::from(network).into() };
        let _ = image.v4.source_ranges.insert(key, PERMITTED);
        let network = Ipv4Addr::from(network).to_ipv6_mapped();
        let key = SourceKey { service_port: 70_000, length: length + 96, network: network.into() };
        let _ = image.v6.source_ranges.insert(key, PERMITTED);
    }
    let node = NodeAddress { flags: node_address::NODE_PORTS };
    let _ = image.v4.node_addresses.insert(address(200), node);
    let _ = image.v6.node_addresses.insert(Ipv6Addr::LOCALHOST.into(), NodeAddress::default());
    image.node_ports.extend([(468, 1), (1_023, 1 << 63)]);
    image.lanes.extend([(5, 1), (6, 0b110), (31, 2)]);
    image
}

#[test]
fn an_image_is_written_read_back_adopted_and_cleared() {
    let Some(bpffs) = Bpffs::new("image") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    assert!(!loaded.filled, "new maps hold no image");
    assert_eq!(loaded.kernel.read().expect("readable maps"), Image::default());

    let wanted = image();
    loaded.kernel.apply(&diff(&Image::default(), &wanted)).expect("writable maps");
    assert_eq!(loaded.kernel.read().expect("readable maps"), wanted);
    drop(loaded);

    let mut adopted = bpffs.load(&[]).expect("a second agent");
    assert!(adopted.filled, "maps of this layout are adopted");
    assert_eq!(adopted.kernel.read().expect("readable maps"), wanted);

    let read_only =
        Maps::open(&Pins::new(&bpffs.0).maps(), Access::Read).expect("maps for readers");
    assert_eq!(Kernel::new(read_only).read().expect("readable maps"), wanted);

    adopted.kernel.apply(&diff(&wanted, &Image::default())).expect("writable maps");
    assert_eq!(adopted.kernel.read().expect("readable maps"), Image::default());
}

#[test]
fn maps_of_another_size_are_replaced_with_their_content() {
    let Some(bpffs) = Bpffs::new("sizes") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    let wanted = image();
    loaded.kernel.apply(&diff(&Image::default(), &wanted)).expect("writable maps");
    drop(loaded);
    for sizes in [[("flows_v4", 2048)], [("slots", 4096)]] {
        let loaded = bpffs.load(&sizes).expect("other sizes");
        assert!(loaded.filled, "{sizes:?}");
        assert_eq!(loaded.kernel.read().expect("readable maps"), wanted, "{sizes:?}");
        assert!(
            Pins::new(&bpffs.0).maps_new().exists(),
            "the old maps stay until the programs are switched"
        );
        loaded.hooks.commit().expect("commit");
        assert!(!Pins::new(&bpffs.0).maps_new().exists());
        let again = bpffs.load(&sizes).expect("the same sizes again");
        assert_eq!(again.kernel.read().expect("readable maps"), wanted, "{sizes:?}");
    }
}

#[test]
fn pins_of_another_layout_stay_until_the_programs_are_switched() {
    let Some(bpffs) = Bpffs::new("layout") else { return };
    let Some(loaded) = bpffs.load(&[]) else { return };
    drop(loaded);
    let pins = Pins::new(&bpffs.0);
    let (own, other) =
        (pins.maps().parent().map(Path::to_owned).expect("a parent"), bpffs.0.join("v9999"));
    std::fs::rename(&own, &other).expect("a rename");
    let loaded = bpffs.load(&[]).expect("the own layout");
    assert!(!loaded.filled, "maps of another layout are not adopted");
    assert!(other.join("maps/slots").exists());
    loaded.hooks.commit().expect("commit");
    assert!(!other.exists());
    assert!(pins.maps().join("slots").exists());
}

#[test]
fn a_failing_write_says_which_and_keeps_the_ones_before_it() {
    let Some(bpffs) = Bpffs::new("fail") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    let good = Write::Listing { lane: 3, bits: 1 };
    let bad = Write::V4(FamilyWrite::BackendFlags { id: u32::MAX, flags: 1 });
    let error = loaded.kernel.apply(&[good, bad]).expect_err("no such element");
    assert_eq!(error.done, 1);
    assert!(error.to_string().contains("backends_v4"), "{error}");
    assert_eq!(loaded.kernel.read().expect("readable maps").lanes, BTreeMap::from([(3, 1)]));
}

#[test]
fn many_writes_go_in_batches() {
    let Some(bpffs) = Bpffs::new("many") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    let mut wanted = Image::default();
    for number in 0..10_000_u32 {
        let address = Ipv4Addr::from_bits(0x0a00_0000 + number).into();
        let key = ServiceKey { address, port: 80, protocol: 6, reserved: 0 };
        let _ =
            wanted.v4.services.insert(key, Service { service_port: 1, kind: frontend::CLUSTER_IP });
        let _ = wanted.v4.backends.insert(
            number + 1,
            Backend { address, port: 1, generation: 1, service_port: 1, flags: backend::SERVING },
        );
    }
    let begun = std::time::Instant::now();
    loaded.kernel.apply(&diff(&Image::default(), &wanted)).expect("writable maps");
    println!("20000 writes in {:?}", begun.elapsed());
    assert_eq!(loaded.kernel.read().expect("readable maps"), wanted);
}

/// Whether all steps of the audit find the maps as they should be.
fn is_held(kernel: &Kernel, image: &Image) -> bool {
    let mut known = Digests::default();
    let mut holds = |step| kernel.holds(step, image, &mut known).expect("readable maps");
    (0..Kernel::AUDIT_STEPS).all(&mut holds)
}

#[test]
fn the_audit_finds_every_entry_that_differs() {
    let Some(bpffs) = Bpffs::new("audit") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    let wanted = image();
    loaded.kernel.apply(&diff(&Image::default(), &wanted)).expect("writable maps");
    assert!(is_held(&loaded.kernel, &wanted));
    let service = ServiceKey {
        address: Ipv4Addr::new(10, 0, 0, 9).into(),
        port: 80,
        protocol: 6,
        reserved: 0,
    };
    let mut others: Vec<(&str, Image)> = Vec::new();
    let mut other = |what, change: &dyn Fn(&mut Image)| {
        let mut image = wanted.clone();
        change(&mut image);
        others.push((what, image));
    };
    other("a key less", &|image| {
        let _ = image.v4.services.remove(&service);
    });
    other("a key more", &|image| {
        let _ = image.v4.services.insert(
            ServiceKey { port: 81, ..service },
            Service { service_port: 1, kind: frontend::CLUSTER_IP },
        );
    });
    other("another value", &|image| {
        if let Some(found) = image.v4.services.get_mut(&service) {
            found.kind = frontend::NODE_PORT;
        }
    });
    other("a slot", &|image| {
        if let Some(slot) = image.slots.get_mut(&160).and_then(|slots| slots.get_mut(60)) {
            *slot += 1;
        }
    });
    other("a backend", &|image| {
        if let Some(found) = image.v4.backends.get_mut(&2) {
            found.flags |= backend::HOST;
        }
    });
    other("an origin", &|image| {
        let _ = image.v4.origins.pop_first();
    });
    other("a source range of IPv6", &|image| {
        let _ = image.v6.source_ranges.pop_last();
    });
    other("a node address", &|image| {
        let _ = image.v6.node_addresses.pop_first();
    });
    other("a port's flags", &|image| {
        if let Some(port) = image.ports.get_mut(&1) {
            port.flags = 0;
        }
    });
    other("a name", &|image| {
        if let Some(name) = image.names.get_mut(&1) {
            name.number = 81;
        }
    });
    other("a lane", &|image| {
        let _ = image.lanes.insert(31, 1);
    });
    other("a node port", &|image| {
        let _ = image.node_ports.remove(&468);
    });
    for (what, image) in others {
        loaded.kernel.apply(&diff(&wanted, &image)).expect("writable maps");
        assert!(is_held(&loaded.kernel, &image), "{what}: as it is");
        assert!(!is_held(&loaded.kernel, &wanted), "{what} was not found");
        loaded.kernel.apply(&diff(&image, &wanted)).expect("writable maps");
        assert!(is_held(&loaded.kernel, &wanted), "{what}: repaired");
    }
}

/// Returns the processor time that this thread has used, in the kernel too.
fn processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct is live.
    let _ = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    let nanoseconds = time.tv_nsec.unsigned_abs();
    Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_nanos(nanoseconds)
}

/// Fills the maps as 250 000 endpoints of 2 500 Services do, and measures the audit.
#[test]
fn the_audit_of_many_endpoints_is_cheap() {
    const ENDPOINTS: u32 = 250_000;
    const SERVICES: u32 = 2_500;
    let Some(bpffs) = Bpffs::new("audit-many") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    let mut wanted = Image::default();
    for number in 0..ENDPOINTS {
        let (address, id) = (Ipv4Addr::from_bits(0x0a00_0000 + number).into(), number + 1);
        let service_port = number % SERVICES + 1;
        let backend =
            Backend { address, port: 8080, generation: 1, service_port, flags: backend::SERVING };
        let _ = wanted.v4.backends.insert(id, backend);
        let mut origins = Origins::default();
        origins.frontends[0] = Origin {
            address: Ipv4Addr::from_bits(0x0b00_0000 + service_port).into(),
            port: 80,
            reserved: 0,
        };
        let key = ServiceKey { address, port: 8080, protocol: 6, reserved: 0 };
        let _ = wanted.v4.origins.insert(key, origins);
        let _ = wanted.lanes.insert(number, 0b10);
    }
    for service_port in 1..=SERVICES {
        let address = Ipv4Addr::from_bits(0x0b00_0000 + service_port).into();
        let key = ServiceKey { address, port: 80, protocol: 6, reserved: 0 };
        let _ =
            wanted.v4.services.insert(key, Service { service_port, kind: frontend::CLUSTER_IP });
        // Nearly all slots that there are.
        let (start, size) = ((service_port - 1) * 3_200, 3_199_u16);
        let ids = (0..u32::from(size)).map(|slot| slot % 100 * SERVICES + service_port).collect();
        let _ = wanted.slots.insert(start, ids);
        let port = wanted.ports.entry(service_port).or_default();
        port.ranges[Class::Internal as usize] = Range::new(start, size).0;
        let name = Name {
            namespace: text("default"),
            service: text(&format!("web-{service_port}")),
            port: text("http"),
            number: 80,
            protocol: 6,
            family: 4,
        };
        let _ = wanted.names.insert(service_port, name);
    }
    loaded.kernel.apply(&diff(&Image::default(), &wanted)).expect("writable maps");
    // The first round also adds up the image, which the others need not.
    let mut known = Digests::default();
    for round in 0..3 {
        let begun = processor_time();
        for step in 0..Kernel::AUDIT_STEPS {
            let begun = processor_time();
            let is_held = loaded.kernel.holds(step, &wanted, &mut known).expect("readable maps");
            assert!(is_held, "step {step}");
            let took = processor_time().saturating_sub(begun);
            println!("round {round}, step {step}: {took:?}");
        }
        let took = processor_time().saturating_sub(begun);
        println!("round {round}: all steps in {took:?} of a core");
    }
    let _ = wanted.v4.origins.pop_last();
    assert!(!is_held(&loaded.kernel, &wanted), "one of {ENDPOINTS}");
}

#[test]
fn a_dump_has_named_fields() {
    let Some(bpffs) = Bpffs::new("dump") else { return };
    let Some(mut loaded) = bpffs.load(&[]) else { return };
    loaded.kernel.apply(&diff(&Image::default(), &image())).expect("writable maps");
    let map = Pins::new(&bpffs.0).maps().join("services_v4");
    let Ok(output) = Command::new("bpftool").args(["map", "dump", "pinned"]).arg(&map).output()
    else {
        assert!(skipped("no bpftool: install Debian's package bpftool"));
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    for field in ["\"address\"", "\"port\": 80", "\"protocol\": 6", "\"service_port\": 1"] {
        assert!(text.contains(field), "{field} in {text}");
    }
}
