//! One node as a process of its own: started, killed, asked to stop, and its words kept.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdout, Command},
    sync::watch,
};

use crate::cluster::within;

/// How many lines of a log a failed test shows.
const LINES_SHOWN: usize = 60;

/// What to run and where its data may lie: an integration test gives
/// `env!("CARGO_BIN_EXE_…")` and `env!("CARGO_TARGET_TMPDIR")`.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// The binary.
    pub exe: &'static str,
    /// A directory on a real disk.
    pub scratch: &'static str,
}

impl Program {
    /// A new empty directory, gone with the value.
    ///
    /// # Panics
    /// If the disk refuses.
    pub fn scratch(self) -> tempfile::TempDir {
        tempfile::tempdir_in(self.scratch).expect("the build's directory takes another one")
    }

    /// The command with these arguments; killed with the value that stands for it.
    pub fn command<A: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = A>) -> Command {
        ours(self.exe, arguments)
    }

    /// Runs a command to its end and returns how it ended and everything that it said.
    ///
    /// # Panics
    /// If it does not end.
    pub async fn run<A: AsRef<OsStr>>(self, arguments: impl IntoIterator<Item = A>) -> (ExitStatus, String) {
        let output = within("a command to end", self.command(arguments).output()).await;
        let output = output.expect("the binary starts");
        let said = [output.stdout, output.stderr].concat();
        (output.status, String::from_utf8_lossy(&said).into_owned())
    }
}

/// All files in a directory and below it.
///
/// # Panics
/// If the disk refuses.
pub fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).expect("the directory is there") {
        let path = entry.expect("it lists").path();
        match path.is_dir() {
            true => all.extend(files_in(&path)),
            false => all.push(path),
        }
    }
    all
}

/// What a test sees must not depend on who runs it; who looks for a fault asks for more by PONTOON_TEST_LOG.
fn ours<A: AsRef<OsStr>>(exe: impl AsRef<OsStr>, arguments: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new(exe);
    command.args(arguments).stdin(Stdio::null()).kill_on_drop(true);
    command.env_remove("PONTOON_ADDR").env("NO_COLOR", "1");
    for name in ["PONTOON_TLS_CERT", "PONTOON_TLS_KEY", "PONTOON_TLS_CA"] {
        command.env_remove(name);
    }
    match std::env::var_os("PONTOON_TEST_LOG") {
        Some(filter) => command.env("PONTOON_LOG", filter),
        None => command.env_remove("PONTOON_LOG"),
    };
    command
}

/// A node's process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    child: Child,
    /// What it printed to stdout.
    lines: watch::Receiver<Vec<String>>,
}

/// Keeps what comes from stdout, in the log too.
async fn listen(stdout: ChildStdout, mut log: File, lines: watch::Sender<Vec<String>>) {
    let mut stdout = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = stdout.next_line().await {
        drop(writeln!(log, "{line}"));
        lines.send_modify(|lines| lines.push(line));
    }
}

impl Process {
    /// Starts the program with these arguments. What it says goes to the end of `log`.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(program: Program, name: &str, log: &Path, arguments: &[String]) -> Process {
        Process::begin(program.command(arguments), name, log)
    }

    /// The same by way of another command, whose words end with the program's and its arguments and which becomes the program.
    ///
    /// # Panics
    /// As [`Process::start`].
    pub fn start_by(words: &[String], name: &str, log: &Path) -> Process {
        let (first, rest) = words.split_first().expect("a command has a name");
        Process::begin(ours(first, rest), name, log)
    }

    fn begin(mut command: Command, name: &str, log: &Path) -> Process {
        let file = File::options().create(true).append(true).open(log).expect("a log can be written");
        let stderr = file.try_clone().expect("a file has two handles");
        let mut child = command.stdout(Stdio::piped()).stderr(stderr).spawn().expect("the binary starts");
        let (sender, lines) = watch::channel(Vec::new());
        tokio::spawn(listen(child.stdout.take().expect("stdout is a pipe"), file, sender));
        Process { name: name.to_owned(), log: log.to_owned(), child, lines }
    }

    /// Waits until it has printed a line with `word`.
    ///
    /// # Panics
    /// If it ends without.
    pub async fn prints(&mut self, word: &str) -> String {
        let wanted = |lines: &Vec<String>| lines.iter().any(|line| line.contains(word));
        let printed = within(&format!("{} to print {word:?}", self.name), self.lines.wait_for(wanted)).await;
        let found = printed.ok().and_then(|lines| lines.iter().find(|line| line.contains(word)).cloned());
        found.unwrap_or_else(|| panic!("{} ended without printing {word:?}", self.name))
    }

    /// Stops the process where it stands, as a machine that hangs: sockets stay open, nobody answers.
    pub fn pause(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let id = self.child.id().expect("the process runs");
        let id = rustix::process::Pid::from_raw(id.cast_signed()).expect("a process has an id");
        rustix::process::kill_process(id, signal).expect("a child takes signals");
    }

    /// SIGKILL, and waits until the process is gone.
    pub async fn kill(&mut self) {
        within("a killed process to be gone", self.child.kill()).await.expect("a child can be killed");
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(&mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.ended().await
    }

    /// Waits for the end.
    pub async fn ended(&mut self) -> ExitStatus {
        within(&format!("{} to end", self.name), self.child.wait()).await.expect("a child can be awaited")
    }

    /// How the process ended; `None` while it runs.
    pub fn exit(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be asked")
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let said = self.said();
            let lines: Vec<&str> = said.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES_SHOWN)..];
            eprintln!("\n-- the last words of {}:\n{}", self.name, last.join("\n"));
        }
    }
}
