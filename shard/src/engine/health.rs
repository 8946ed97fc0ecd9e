//! Whether an engine still works. From the first failed write or sync on nothing succeeds: what reached the disk is not
//! known, and only the next open can tell.

use std::sync::{
    OnceLock,
    atomic::{AtomicBool, Ordering},
};

use crate::error::Error;

/// The state that every engine over real files shares.
#[derive(Debug, Default)]
pub(super) struct Health {
    failure: OnceLock<String>,
    closed: AtomicBool,
}

impl Health {
    /// # Errors
    /// [`Error::Closed`] and [`Error::Poisoned`].
    pub(super) fn check(&self) -> Result<(), Error> {
        match (self.is_closed(), self.failure.get()) {
            (true, _) => Err(Error::Closed),
            (false, Some(_)) => Err(Error::Poisoned),
            (false, None) => Ok(()),
        }
    }

    /// Passes a result of the engine on; the first error stays.
    pub(super) fn note<T, E: Into<Error>>(&self, result: Result<T, E>) -> Result<T, Error> {
        result.map_err(|error| {
            let error = error.into();
            self.failure.get_or_init(|| error.to_string());
            error
        })
    }

    pub(super) fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }
}
