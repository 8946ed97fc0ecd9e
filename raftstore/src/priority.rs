//! Priorities of threads.

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
