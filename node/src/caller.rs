//! Who calls: what a connection's certificate says, or somebody on this machine.

use std::{fmt, net::SocketAddr, sync::Arc};

use axum::http;
use pontoon_proto::NodeId;
use tonic::{Extensions, Status};

use crate::{
    roles::{Role, words},
    tls::Subject,
};

/// Who is at the other end of a connection. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    /// `None` without TLS: somebody on this machine, who is trusted with everything.
    subject: Option<Arc<Subject>>,
    /// Where the connection comes from.
    pub(crate) address: Option<SocketAddr>,
}

impl Caller {
    pub(crate) fn new(subject: Option<Subject>, address: Option<SocketAddr>) -> Self {
        Caller { subject: subject.map(Arc::new), address }
    }

    /// The caller of a request.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` if the connection says nothing of it: such a call did not come through the door.
    pub(crate) fn of(extensions: &Extensions) -> Result<Caller, Status> {
        extensions.get::<Caller>().cloned().ok_or_else(unknown)
    }

    /// The same of a request that no service has taken yet.
    ///
    /// # Errors
    /// As [`Caller::of`].
    pub(crate) fn of_parts(extensions: &http::Extensions) -> Result<Caller, Status> {
        extensions.get::<Caller>().cloned().ok_or_else(unknown)
    }

    /// What the caller may do; `None` for everything.
    pub(crate) fn role(&self) -> Option<Role> {
        self.subject.as_ref().map(|subject| subject.role)
    }

    /// Checks that the caller is one of these.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`, naming the role that is needed.
    pub(crate) fn must_be(&self, roles: &[Role], what: &str) -> Result<(), Status> {
        match self.role() {
            Some(role) if !roles.contains(&role) => Err(Status::permission_denied(format!(
                "{what} needs the role {}, which {self} has not: use a certificate of that role (`pontoon certs client`)",
                words(roles)
            ))),
            _ => Ok(()),
        }
    }

    /// Checks that the caller may write.
    ///
    /// # Errors
    /// As [`Caller::must_be`].
    pub(crate) fn must_write(&self, what: &str) -> Result<(), Status> {
        self.must_be(&[Role::Node, Role::Operator, Role::Writer], what)
    }

    /// Checks that the caller is this node: a node speaks for itself alone.
    ///
    /// # Errors
    /// `PERMISSION_DENIED`.
    pub(crate) fn must_speak_for(&self, node: u64) -> Result<(), Status> {
        match &self.subject {
            Some(subject) if subject.node().map(NodeId::get) != Some(node) => {
                Err(Status::permission_denied(format!("{self} does not speak for node n{node}")))
            }
            _ => Ok(()),
        }
    }
}

fn unknown() -> Status {
    Status::permission_denied("who calls is not known")
}

/// As logs name it: `operator ann`, `n3`, `local`.
impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.subject.as_deref() {
            None => f.write_str("local"),
            Some(Subject { role: Role::Node, name, .. }) => write!(f, "n{name}"),
            Some(Subject { role, name, .. }) => write!(f, "{role} {name}"),
        }
    }
}
