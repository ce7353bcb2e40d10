//! kubectl, called as the cluster's administrator in the namespace of the outside client.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Result;

use crate::namespace::Namespace;
use crate::network::OUTSIDE_CLIENT;
use crate::process::Cmd;
use crate::state::State;

/// kubectl of a cluster.
#[derive(Clone)]
pub(crate) struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
    namespace: Namespace,
}

impl Kubectl {
    /// Uses the link that `up` made to the program.
    pub(crate) fn new(state: &State) -> Self {
        Self {
            program: state.programs().join("kubectl"),
            kubeconfig: state.kubeconfig(),
            namespace: Namespace::named(state, OUTSIDE_CLIENT),
        }
    }

    fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Cmd {
        Cmd::new(&self.program).arg("--kubeconfig").arg(&self.kubeconfig).args(args)
    }

    /// Runs it and returns its standard output.
    ///
    /// # Errors
    /// If it fails, with its standard error.
    pub(crate) fn run<S: AsRef<OsStr> + Sync>(&self, args: impl AsRef<[S]>) -> Result<String> {
        let command = self.command(args.as_ref());
        self.namespace.enter(move || command.answer())
    }

    /// Runs it and passes its standard output to `on_line` line by line, until it ends or `on_line`
    /// returns `false`.
    pub(crate) fn follow(
        &self,
        args: &[&str],
        mut on_line: impl FnMut(&str) -> bool + Send,
    ) -> Result<()> {
        let mut command = self.command(args).into_inner();
        self.namespace.enter(move || {
            let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
            let lines =
                child.stdout.take().into_iter().flat_map(|output| BufReader::new(output).lines());
            for line in lines {
                if !on_line(&line?) {
                    child.kill()?;
                }
            }
            let _status = child.wait()?;
            Ok(())
        })
    }

    /// Runs it with a timeout of five seconds, for questions that may fail.
    pub(crate) fn ask<const N: usize>(&self, args: [&str; N]) -> Result<String> {
        let args: Vec<_> = args.into_iter().chain(["--request-timeout=5s"]).collect();
        self.run(&args)
    }

    /// Applies manifests from a file or, with `-k`, a directory.
    pub(crate) fn apply(&self, flag: &str, path: &Path) -> Result<()> {
        let args: [&OsStr; 4] =
            ["apply".as_ref(), flag.as_ref(), path.as_os_str(), "--server-side".as_ref()];
        self.run(args).map(drop)
    }
}
