//! A steady load on services from several places at once, and checks that none of it fails.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::event::{Event, Load};
use crate::namespace::Namespace;
use crate::running::Running;

/// Slightly more than the time that a request may wait for its answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// The size of a load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadSize {
    /// Connections that stay open.
    pub held: u32,
    /// New connections per second.
    pub rate: u32,
    /// The duration of a fault.
    pub seconds: u64,
}

impl LoadSize {
    /// Returns two thousand connections, five hundred new ones per second and a minute of each
    /// fault with `SLUICE_LAB_FULL=1`, otherwise a size that keeps a test run short.
    pub fn of_this_run() -> Self {
        if std::env::var_os("SLUICE_LAB_FULL").is_some_and(|value| value == "1") {
            Self { held: 2000, rate: 500, seconds: 60 }
        } else {
            Self { held: 400, rate: 100, seconds: 5 }
        }
    }
}

/// Clients that hold connections to `tcp-echo` servers behind services, and open new ones.
pub struct LoadClients {
    clients: Vec<Running>,
}

impl LoadClients {
    /// Starts a client in each place, which calls the addresses given with the place in turns and
    /// has its share of the load. Returns when all lasting connections are open.
    ///
    /// # Errors
    /// If one cannot be opened.
    pub fn start(places: &[(&Namespace, Vec<SocketAddr>)], size: LoadSize) -> Result<Self> {
        let share = |number: u32| number.div_ceil(places.len().max(1) as u32);
        let mut clients = Vec::new();
        for (place, addresses) in places {
            let (hold, rate) =
                (format!("--hold={}", share(size.held)), format!("--rate={}", share(size.rate)));
            let to = addresses.iter().map(|address| format!("--to={address}"));
            clients.push(place.tool(["load-client".to_owned(), hold, rate].into_iter().chain(to))?);
        }
        let mut this = Self { clients };
        let all = u64::from(share(size.held)) * places.len() as u64;
        let _ =
            this.wait("all connections are open", |now| now.held == all && now.answered >= all)?;
        let _ = this.unharmed("at the start")?;
        Ok(this)
    }

    /// Returns the results so far.
    pub fn now(&self) -> Load {
        let mut sum = Load::default();
        for client in &self.clients {
            let last =
                client.events().into_iter().rev().find_map(|event| {
                    if let Event::Load(load) = event { Some(load) } else { None }
                });
            sum.add(last.unwrap_or_default());
        }
        sum
    }

    /// Checks that every request so far was answered, nothing failed, and every lasting connection
    /// is alive.
    ///
    /// # Errors
    /// If something has failed, now or before.
    pub fn unharmed(&mut self, when: &str) -> Result<Load> {
        let before = self.now();
        let now = self.wait(&format!("all is answered {when}"), |now| {
            now.opened >= before.tried && now.answered >= before.answered + before.held
        })?;
        ensure!(
            now.held >= before.held,
            "{} of {} connections are left {when}: {now:?}",
            now.held,
            before.held
        );
        Ok(now)
    }

    fn wait(&mut self, what: &str, is_so: impl Fn(&Load) -> bool) -> Result<Load> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for client in &mut self.clients {
                ensure!(
                    client.poll()?.is_none(),
                    "a client ended before {what}: {}",
                    client.stderr()
                );
            }
            let now = self.now();
            ensure!(now.failures() == 0, "before {what}: {now:?}");
            if is_so(&now) {
                return Ok(now);
            }
            ensure!(Instant::now() < deadline, "waited {PATIENCE:?} in vain: {what}: {now:?}");
            sleep(Duration::from_millis(50));
        }
    }
}

/// Causes a fault once per period for some time, and returns how often it did.
///
/// # Errors
/// Those of the fault.
pub fn again_and_again(
    period: Duration,
    total: Duration,
    mut act: impl FnMut() -> Result<()>,
) -> Result<u32> {
    let begun = Instant::now();
    let mut times = 0;
    while begun.elapsed() < total {
        act().with_context(|| format!("after {times} times"))?;
        times += 1;
        sleep((begun + period * times).saturating_duration_since(Instant::now()));
    }
    Ok(times)
}
