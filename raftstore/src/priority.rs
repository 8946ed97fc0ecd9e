//! Priorities of threads.

/// What is worked on without [`step_aside`], in bytes: a fraction of a millisecond.
pub(crate) const WITHOUT_A_LOOK: usize = 64 << 10;

/// Lets this thread, and those that it starts from now on, do their work in what others leave of the cores: nicer than before by so many of
/// the system's levels, of which each is a fifth less. On Linux a priority belongs to a thread; elsewhere, or where it is forbidden, nothing changes.
pub fn give_way(nicer: i32) {
    #[cfg(target_os = "linux")]
    if let Ok(own) = rustix::process::getpriority_process(None) {
        let _ = rustix::process::setpriority_process(None, own + nicer);
    }
    #[cfg(not(target_os = "linux"))]
    let _ = nicer;
}

/// Lets those go first who wait for this core, and costs next to nothing if nobody does. For long work, between pieces of a
/// fraction of a millisecond: how nice a thread is decides how much of the core it gets, not how soon somebody who wakes up gets
/// the core from it. That may take until the system's next tick, some milliseconds later.
pub fn step_aside() {
    std::thread::yield_now();
}
