//! Processes that are measured.

use std::{
    fs,
    process::{Child, Command},
    time::Duration,
};

use crate::Outcome;

/// A process that is killed when this goes.
pub(crate) struct Member(Child);

impl Member {
    pub(crate) fn spawn(command: &mut Command) -> Outcome<Member> {
        let program = command.get_program().to_owned();
        Ok(Member(command.spawn().map_err(|error| format!("{} does not start: {error}", program.display()))?))
    }

    pub(crate) fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// SIGKILL, as if its machine had gone.
    pub(crate) fn kill(&mut self) -> Outcome<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }

    /// Processor time that it has used.
    pub(crate) fn cpu(&self) -> Outcome<Duration> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.0.id()))?;
        // Behind the name, which may hold anything: fields 3 and up; user and system time are 14 and 15.
        let fields = stat.rsplit_once(')').ok_or("a strange /proc stat")?.1;
        let ticks =
            fields.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
        let per_second = rustix::param::clock_ticks_per_second();
        Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        // Gone already: nothing is left to kill.
        let _ = self.kill();
    }
}

/// Processor time of all that still run.
pub(crate) fn cpu_of(members: &[Member]) -> Outcome<Duration> {
    members.iter().map(Member::cpu).sum()
}

/// A port that nobody uses at the moment.
pub(crate) fn free_port() -> Outcome<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
