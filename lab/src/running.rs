//! A process of the lab that ends with its guard.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::event::{Event, Reply};
use crate::shared::Shared;

const POLL: Duration = Duration::from_millis(5);
/// The time that a process has to end by itself. Other tests may keep the processors busy.
const GRACE: Duration = Duration::from_secs(10);

/// A started process, leader of its own group. Dropping this kills the group, unless the lab is
/// kept.
pub struct Running {
    shared: Arc<Shared>,
    what: String,
    child: Child,
    ended: Option<ExitStatus>,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Running {
    pub(crate) fn start(
        shared: &Arc<Shared>,
        namespace: &str,
        mut command: Command,
    ) -> Result<Self> {
        let program = PathBuf::from(command.get_program());
        let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let log =
            shared.state.join("log").join(format!("{:03}-{namespace}-{program}", shared.number()));
        let (stdout, stderr) = (log.with_added_extension("out"), log.with_added_extension("err"));
        let create = |path: &PathBuf| {
            File::create(path).with_context(|| format!("cannot make the log {}", path.display()))
        };
        let what = format!("{program} in {namespace}");
        let child = command
            .stdin(Stdio::null())
            .stdout(create(&stdout)?)
            .stderr(create(&stderr)?)
            .spawn()
            .with_context(|| {
                format!("cannot start {what}: is it installed, and the lab {} still up?", shared.id)
            })?;
        Ok(Self { shared: Arc::clone(shared), what, child, ended: None, stdout, stderr })
    }

    /// Returns the id of the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns its standard output so far.
    pub fn stdout(&self) -> String {
        fs::read(&self.stdout)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Returns its standard error so far.
    pub fn stderr(&self) -> String {
        fs::read(&self.stderr)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Returns the events that a `sluice-lab-server` has reported so far. Lines that are no event,
    /// or not complete yet, are left out.
    pub fn events(&self) -> Vec<Event> {
        self.stdout().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Returns the replies that a client of `sluice-lab-server` has received so far.
    pub fn replies(&self) -> Vec<Reply> {
        let reply = |event| if let Event::Reply(reply) = event { Some(reply) } else { None };
        self.events().into_iter().filter_map(reply).collect()
    }

    /// Waits until a client has received more than this number of further replies.
    ///
    /// # Errors
    /// If they do not arrive in time, or the process ends first.
    pub fn goes_on(&mut self, more_than: usize, timeout: Duration) -> Result<()> {
        let last = self.replies().len();
        self.wait_until("it goes on", timeout, |this| {
            (this.replies().len() > last + more_than).then_some(())
        })
    }

    /// Waits for an event, which may have been reported already.
    ///
    /// # Errors
    /// If it does not arrive in time, or the process ends first.
    pub fn wait_event(
        &mut self,
        what: &str,
        timeout: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        self.wait_until(what, timeout, |this| this.events().into_iter().find(|event| wanted(event)))
    }

    /// Waits until a closure returns something.
    ///
    /// # Errors
    /// If it does not in time, or the process ends first.
    pub fn wait_until<T>(
        &mut self,
        what: &str,
        timeout: Duration,
        answer: impl Fn(&Self) -> Option<T>,
    ) -> Result<T> {
        let deadline = Instant::now() + timeout;
        loop {
            // Polled before the closure runs, so that output before the end counts.
            let ended = self.poll()?;
            if let Some(answer) = answer(self) {
                return Ok(answer);
            }
            if let Some(status) = ended {
                bail!("{} ended ({status}) before {what}\n{}", self.what, self.last_words());
            }
            if Instant::now() > deadline {
                bail!(
                    "waited {timeout:?} in vain for {what} from {}\n{}",
                    self.what,
                    self.last_words()
                );
            }
            sleep(POLL);
        }
    }

    /// Returns the end of its output, for an error message.
    fn last_words(&self) -> String {
        let tail = |text: String| {
            text.lines()
                .rev()
                .take(12)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<Vec<_>>()
                .join("\n  ")
        };
        format!(
            "its output ends:\n  {}\nits errors end:\n  {}",
            tail(self.stdout()),
            tail(self.stderr())
        )
    }

    /// Returns the exit status if it has ended.
    pub fn poll(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended =
                self.child.try_wait().with_context(|| format!("cannot wait for {}", self.what))?;
        }
        Ok(self.ended)
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// If it is still running after `timeout`.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.poll()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} runs on after {timeout:?}\n{}", self.what, self.last_words());
            }
            sleep(POLL);
        }
    }

    /// Waits until it ends or a condition holds, and returns whether it has ended.
    ///
    /// # Errors
    /// If neither happens in time.
    pub(crate) fn wait_first(
        &mut self,
        timeout: Duration,
        is_so: impl Fn(&Self) -> bool,
    ) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            if self.poll()?.is_some() {
                return Ok(true);
            }
            if is_so(self) {
                return Ok(false);
            }
            if Instant::now() > deadline {
                bail!("{} runs on after {timeout:?}\n{}", self.what, self.last_words());
            }
            sleep(POLL);
        }
    }

    /// Sends a signal (`libc::SIGTERM`, ...) to the process alone.
    pub fn signal(&mut self, signal: i32) -> Result<()> {
        if self.poll()?.is_none() {
            self.send(self.child_id(), signal)
                .with_context(|| format!("cannot send signal {signal} to {}", self.what))?;
        }
        Ok(())
    }

    /// Sends it SIGTERM, and kills its group if it has not ended after ten seconds.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        if let Ok(status) = self.wait(GRACE) {
            return Ok(status);
        }
        self.kill()
    }

    /// Kills its process group (SIGKILL) and waits for its end.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.poll()? {
            return Ok(status);
        }
        // Not reaped yet, so the id is still this group's.
        let _ = self.send(-self.child_id(), libc::SIGKILL);
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.what))?;
        self.ended = Some(status);
        Ok(status)
    }

    fn child_id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    #[expect(clippy::unused_self, reason = "called only where the child is known not to be reaped")]
    fn send(&self, target: i32, signal: i32) -> io::Result<()> {
        // SAFETY: kill(2) takes plain numbers; the caller knows that the id is the child's, which
        // is not reaped.
        if unsafe { libc::kill(target, signal) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.shared.kept() {
            let _ = self.kill();
        }
    }
}
