//! Child processes: a command is built by value, run, and its failure is reported exactly.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::ui::Step;

/// A command line under construction; every method takes and returns it.
#[must_use]
pub struct Cmd(Command);

impl From<Command> for Cmd {
    fn from(command: Command) -> Self {
        Self(command)
    }
}

impl Cmd {
    /// Starts a command line with a program.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self(Command::new(program))
    }

    fn with(mut self, change: impl FnOnce(&mut Command) -> &mut Command) -> Self {
        let _: &mut Command = change(&mut self.0);
        self
    }

    /// Adds an argument.
    pub fn arg(self, arg: impl AsRef<OsStr>) -> Self {
        self.with(|command| command.arg(arg))
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(self, args: I) -> Self {
        self.with(|command| command.args(args))
    }

    /// Sets an environment variable.
    pub fn env(self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.with(|command| command.env(name, value))
    }

    /// Sets environment variables.
    pub fn envs<I, K, V>(self, variables: I) -> Self
    where
        I: IntoIterator<Item = (K, V)>,
        K: AsRef<OsStr>,
        V: AsRef<OsStr>,
    {
        self.with(|command| command.envs(variables))
    }

    /// Removes environment variables.
    pub fn without_env<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(self, names: I) -> Self {
        names.into_iter().fold(self, |this, name| this.with(|command| command.env_remove(name)))
    }

    /// Sets the working directory.
    pub fn dir(self, dir: impl AsRef<Path>) -> Self {
        self.with(|command| command.current_dir(dir))
    }

    /// Returns the command as a person would type it, without its environment.
    pub fn line(&self) -> String {
        std::iter::once(self.0.get_program())
            .chain(self.0.get_args())
            .map(OsStr::to_string_lossy)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Returns the underlying command, for callers with needs of their own.
    pub fn into_inner(self) -> Command {
        self.0
    }

    /// Runs it on this terminal.
    ///
    /// # Errors
    /// If it cannot be started or does not exit with 0.
    pub fn run(mut self) -> Result<()> {
        let line = self.line();
        let status = self.0.status().with_context(|| format!("cannot run `{line}`"))?;
        if !status.success() {
            bail!("`{line}`: {status}");
        }
        Ok(())
    }

    /// Runs it and returns its standard output; its standard error goes to this terminal.
    ///
    /// # Errors
    /// If it cannot be started, does not exit with 0, or prints no UTF-8.
    pub fn stdout(self) -> Result<String> {
        self.with(|command| command.stderr(Stdio::inherit())).output()
    }

    /// Runs it silently and returns its standard output, for questions to programs that may be
    /// absent.
    ///
    /// # Errors
    /// Those of [`stdout`](Self::stdout).
    pub fn probe(self) -> Result<String> {
        self.with(|command| command.stderr(Stdio::null())).output()
    }

    /// Runs it silently and returns its standard output; its standard error becomes part of the
    /// error.
    ///
    /// # Errors
    /// Those of [`stdout`](Self::stdout).
    pub fn answer(mut self) -> Result<String> {
        let line = self.line();
        let output =
            self.0.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{line}`"))?;
        if !output.status.success() {
            bail!(
                "`{line}`: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{line}` printed no UTF-8"))
    }

    fn output(mut self) -> Result<String> {
        let line = self.line();
        let output =
            self.0.stdin(Stdio::null()).output().with_context(|| format!("cannot run `{line}`"))?;
        if !output.status.success() {
            bail!("`{line}`: {}", output.status);
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{line}` printed no UTF-8"))
    }

    /// Runs it with its output behind `step`: the newest line, as `note` renders it, is the step's
    /// note, and the whole output is printed only on failure.
    ///
    /// # Errors
    /// If it cannot be started or does not exit with 0.
    pub fn run_behind(
        self,
        step: &Step,
        mut note: impl FnMut(&str) -> Option<String>,
    ) -> Result<()> {
        let line = self.line();
        let (mut output, writer) = io::pipe().context("cannot make a pipe")?;
        let mut child = {
            let errors = writer.try_clone().context("cannot copy a pipe")?;
            // The command holds the pipe's write ends. It is dropped at the end of this block, so
            // that the reader below sees the end of the output.
            let mut command = self
                .with(|command| command.stdin(Stdio::null()).stdout(writer).stderr(errors))
                .into_inner();
            command.spawn().with_context(|| format!("cannot run `{line}`"))?
        };
        let mut captured = Vec::new();
        let mut reader = BufReader::new(output.by_ref());
        loop {
            let start = captured.len();
            if reader.read_until(b'\n', &mut captured)? == 0 {
                break;
            }
            let text = String::from_utf8_lossy(captured.get(start..).unwrap_or_default());
            if let Some(text) = note(text.trim()) {
                step.note(&text);
            }
        }
        let status = child.wait().with_context(|| format!("cannot wait for `{line}`"))?;
        if !status.success() {
            step.interrupt();
            io::stderr().write_all(&captured)?;
            bail!("`{line}`: {status}");
        }
        Ok(())
    }
}

/// Returns the newest line as the note of a step.
pub fn newest_line(line: &str) -> Option<String> {
    (!line.is_empty()).then(|| line.to_owned())
}

/// Returns the first file called `name` in `PATH` or in the directories of administration commands,
/// which a plain `PATH` may lack.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    programs(name).next()
}

/// Returns every file called `name` in `PATH` and the directories of administration commands, in
/// order.
pub fn programs(name: &str) -> impl Iterator<Item = std::path::PathBuf> + use<> {
    let name = name.to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories: Vec<_> = std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(Into::into))
        .collect();
    directories
        .into_iter()
        .map(move |directory| directory.join(&name))
        .filter(|candidate| candidate.is_file())
}
