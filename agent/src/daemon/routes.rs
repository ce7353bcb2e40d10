//! Keeps the routes of VIPs, Sluice's own device, and the MTUs of routes that the programs know.
//!
//! It runs next to the attacher: going through many routes must not delay a device.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::watch;

use crate::daemon::audit::{Drift, Found, Part};
use crate::node::backoff::Backoff;
use crate::node::dataplane::RouteMtus;
use crate::node::devices::own::{OwnRoutes, Place, Routable};
use crate::node::devices::watch::Watched;
use crate::node::devices::{OWN, Role, Survey};
use crate::node::publish::publish;

/// The pauses between retries.
const RETRY: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
/// The shortest time between two passes over all routes: pods that come and go change them all the
/// time.
const ROUTES_PERIOD: Duration = Duration::from_secs(2);
/// The longest time between two passes over all routes. The kernel sends no message when it drops
/// the routes of a device that goes down, or of an address that is removed.
const ROUTES_RESYNC: Duration = Duration::from_secs(20);
/// The time between two audits of Sluice's own device and of the maps of routes' MTUs.
const AUDIT_PERIOD: Duration = Duration::from_secs(15);
/// The time between two checks of the neighbours that packets to external VIPs wait for.
const NEIGHBOURS_PERIOD: Duration = Duration::from_secs(3);

/// Sluice's own device, as the programs are to know it.
#[derive(Debug)]
pub(super) struct OwnDevice {
    /// Its ifindex, or 0 if there never was one and the programs do without.
    pub(super) index: watch::Sender<u32>,
    /// `/proc/sys`, or the node's, mounted elsewhere.
    pub(super) proc_sys: PathBuf,
}

impl OwnDevice {
    /// Makes the device again if somebody has removed it. Returns whether that was so.
    async fn restore(&self, own: &OwnRoutes, survey: &Survey, drift: &Drift) -> io::Result<bool> {
        let before = *self.index.borrow();
        let is_there = survey.devices.get(&before).is_some_and(|device| device.role == Role::Own);
        if before == 0 || is_there || *survey == Survey::default() || !drift.may_repair() {
            return Ok(false);
        }
        // A device that the survey has not seen yet is found, and not made twice.
        let made = own.prepare(&self.proc_sys).await.map_err(|error| {
            io::Error::new(
                error.kind(),
                format!(
                    "Sluice's own device {OWN} is gone and cannot be made again, so held fragments \
                     and packets that are too big are dropped: {error}"
                ),
            )
        });
        if !made.as_ref().is_ok_and(|index| *index == before) {
            let repair = made.as_ref().map(|_| ());
            drift.report(Part::OwnDevice, vec![Found::new(OWN, "the device is gone", repair)]);
        }
        let index = made?;
        if index != before {
            let _ = self.index.send_replace(index);
        }
        Ok(index != before)
    }

    /// Examines whether the device is up and has its settings, and repairs both.
    async fn audit(&self, own: &OwnRoutes, drift: &Drift) {
        if *self.index.borrow() == 0 || !drift.may_repair() {
            return;
        }
        match own.repair_device(&self.proc_sys).await {
            // Without the device, [`Self::restore`] reports.
            None => {}
            Some(found) => {
                let found = found.into_iter().map(|(what, repair)| Found::new(OWN, what, repair));
                drift.report(Part::OwnDevice, found.collect());
            }
        }
    }
}

/// Keeps Sluice's own device, the routes of VIPs through it, and the MTUs of other routes in the
/// maps, until the inputs end. All of it stays after that. `report` holds the present problem.
pub(super) async fn route_vips(
    mut own: OwnRoutes,
    device: OwnDevice,
    mut mtus: RouteMtus,
    mut routable: watch::Receiver<Routable>,
    mut watched: watch::Receiver<Watched>,
    report: watch::Sender<Option<String>>,
    drift: Drift,
) {
    let mut retry = RETRY;
    let mut seen = 0;
    let mut place = Place::default();
    let mut checked = tokio::time::Instant::now();
    let mut neighbours_due = checked + NEIGHBOURS_PERIOD;
    let mut audit_due = checked + AUDIT_PERIOD;
    loop {
        let now = routable.borrow_and_update().clone();
        let Watched { survey, routes, .. } = watched.borrow_and_update().clone();
        let made = device.restore(&own, &survey, &drift).await;
        if audit_due <= tokio::time::Instant::now() {
            device.audit(&own, &drift).await;
            if drift.may_repair() {
                drift.report(Part::RouteMtus, audit_mtus(&mut mtus));
            }
            audit_due = tokio::time::Instant::now() + AUDIT_PERIOD;
        }
        let before = std::mem::replace(&mut place, Place::of(&survey));
        let due = if routes == seen { ROUTES_RESYNC } else { ROUTES_PERIOD };
        if matches!(made, Ok(true)) || place != before || checked.elapsed() >= due {
            own.routes_changed();
            (seen, checked) = (routes, tokio::time::Instant::now());
        }
        let mut result = Ok(());
        if neighbours_due <= tokio::time::Instant::now() {
            result = own.probe_neighbours().await;
            neighbours_due = tokio::time::Instant::now() + NEIGHBOURS_PERIOD;
        }
        // Before the first survey the node has no address that a route could name.
        if result.is_ok() && survey != Survey::default() && drift.may_repair() {
            result = own.keep(&now, &place).await;
            let lost = lost_routes(&mut own, &result);
            // With the device all its routes are gone, and a failure lasts until it is overcome.
            let has_device = survey.devices.contains_key(&*device.index.borrow());
            if has_device && !matches!(made, Ok(true)) && (result.is_ok() || !lost.is_empty()) {
                drift.report(Part::Routes, lost);
            }
        }
        let unrouted = |error| format!("cannot keep the routes of VIPs through {OWN}: {error}");
        let mut problem = made.err().map(|error| error.to_string()).or(result.err().map(unrouted));
        if let Some(found) = own.mtus() {
            let unwritten = |error| format!("cannot write the MTUs of routes: {error}");
            problem = problem.or(mtus.write(found).err().map(unwritten));
        }
        let failed = problem.is_some();
        let _ = publish(&report, problem);
        let pause = if failed {
            retry.failed()
        } else {
            retry.reset();
            ROUTES_PERIOD.saturating_sub(checked.elapsed())
        };
        let ended = tokio::select! {
            changed = routable.changed() => changed.is_err(),
            changed = watched.changed(), if routes == seen => changed.is_err(),
            () = tokio::time::sleep(pause), if failed || routes != seen => false,
            () = tokio::time::sleep_until(checked + ROUTES_RESYNC) => false,
            () = tokio::time::sleep_until(audit_due) => false,
            () = tokio::time::sleep_until(neighbours_due), if !now.vips.external.is_empty() => false,
        };
        if ended {
            return;
        }
    }
}

/// Returns the routes that were there, were wanted, and were gone all the same, as one finding for
/// each family: with a device that goes down go all its routes.
fn lost_routes(own: &mut OwnRoutes, kept: &io::Result<()>) -> Vec<Found> {
    let (v4, v6): (Vec<_>, Vec<_>) =
        own.take_lost().into_iter().partition(|network| network.addr().is_ipv4());
    let found = |(family, lost): (&str, Vec<IpNet>)| {
        let what = match &lost[..] {
            [] => return None,
            [one] => format!("the route to {one} is gone or another one"),
            [first, more @ ..] => format!(
                "the route to {first} is gone or another one, and so are {} more",
                more.len()
            ),
        };
        Some(Found {
            place: format!("{family} by {OWN}"),
            what,
            failure: kept.as_ref().err().map(ToString::to_string),
        })
    };
    [("IPv4", v4), ("IPv6", v6)].into_iter().filter_map(found).collect()
}

/// Compares the maps of routes' MTUs with what they should hold; the next write repairs them.
fn audit_mtus(mtus: &mut RouteMtus) -> Vec<Found> {
    match mtus.audit() {
        Ok(differing) => differing
            .into_iter()
            .map(|(map, count)| {
                Found::new(map, format!("entries: {count} differ"), Ok::<(), String>(()))
            })
            .collect(),
        Err(error) => vec![Found::new("route_mtus", "they cannot be compared", Err(error))],
    }
}
