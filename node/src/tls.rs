//! TLS between nodes and for clients: both sides show a certificate of the cluster's authority, and each certificate says who
//! its holder is ([`Subject`]).
//!
//! ```text
//!  cert, key, ca ── read, checked as a whole ──> Credentials ──> the next handshakes, both ways
//!        └── changed ── read again ── not good: a warning, the old ones stay
//! ```
//!
//! - TLS 1.3 alone. No session is resumed: each connection shows its certificate to the authority that is trusted now.
//! - New files are taken up without a restart, if they speak for the same holder. What stands, stands: a connection keeps the
//!   certificates that it was made with.

mod accept;
mod dial;
mod subject;
#[cfg(test)]
mod tests;

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, RwLock},
    time::{Duration, SystemTime},
};

use pontoon_proto::NodeId;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use serde::Deserialize;
use tokio::{sync::watch, time::sleep};
use tracing::{info, warn};

pub(crate) use accept::{Door, Incoming};
pub(crate) use dial::Dialer;
pub use subject::Subject;
pub(crate) use subject::alternative_names;

/// How often a node looks whether its files have changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What is larger is no certificate.
const FILE_MOST: u64 = 1 << 20;

/// Where the certificates of one holder lie, as PEM. `pontoon certs` makes such files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsFiles {
    /// The holder's certificate, and after it whatever stands between it and the authority.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The authorities whose certificates are accepted.
    pub ca: PathBuf,
}

/// Why certificates cannot be used. Every message names the file and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} cannot be used: {reason}", path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The certificate is somebody else's.
    #[error("{} speaks for {found}, not for {expected}; give each node its own certificate", path.display())]
    OtherHolder {
        /// The certificate.
        path: PathBuf,
        /// Whom it speaks for.
        found: String,
        /// Whom it should speak for.
        expected: String,
    },
}

/// The certificates of this process, as they are now.
#[derive(Debug)]
pub(crate) struct Tls {
    files: TlsFiles,
    now: RwLock<Arc<Credentials>>,
    looks: Mutex<Looks>,
}

/// The files as they were at the last look, and when they were last judged.
#[derive(Debug)]
struct Looks {
    last: Stamp,
    judged: Stamp,
}

/// What one reading of the files gave.
#[derive(Debug)]
pub(crate) struct Credentials {
    pub(crate) subject: Subject,
    /// Seconds since 1970.
    pub(crate) expires: i64,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
}

/// By what a file that was replaced is told.
type Stamp = [Option<(SystemTime, u64, u64)>; 3];

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// If one of them cannot be used, or they do not belong together.
    pub(crate) fn open(files: TlsFiles) -> Result<Arc<Tls>, TlsError> {
        let judged = stamp(&files);
        let now = RwLock::new(Arc::new(read(&files)?));
        Ok(Arc::new(Tls { files, now, looks: Mutex::new(Looks { last: judged, judged }) }))
    }

    pub(crate) fn now(&self) -> Arc<Credentials> {
        self.now.read().expect("never poisoned: held only to assign").clone()
    }

    pub(crate) fn subject(&self) -> Subject {
        self.now().subject.clone()
    }

    /// Checks that the certificate is this node's; `why` says what makes it this node.
    ///
    /// # Errors
    /// [`TlsError::OtherHolder`].
    pub(crate) fn must_be(&self, node: NodeId, why: &str) -> Result<(), TlsError> {
        let subject = self.subject();
        match subject.node() {
            Some(id) if id == node => Ok(()),
            _ => Err(TlsError::OtherHolder {
                path: self.files.cert.clone(),
                found: subject.to_string(),
                expected: format!("{node}, {why}"),
            }),
        }
    }

    /// Takes new files up if they have changed and rest since the last look: whoever replaces several files does so one after
    /// the other. Files that are not good change nothing. Blocks.
    pub(crate) fn refresh(&self) {
        let now = stamp(&self.files);
        {
            let mut looks = self.looks.lock().expect("never poisoned: held only to compare");
            let rests = std::mem::replace(&mut looks.last, now) == now;
            if !rests || looks.judged == now {
                return;
            }
            looks.judged = now;
        }
        let old = self.now();
        let taken = read(&self.files).and_then(|new| match new.subject == old.subject {
            true => Ok(new),
            false => Err(TlsError::OtherHolder {
                path: self.files.cert.clone(),
                found: new.subject.to_string(),
                expected: old.subject.to_string(),
            }),
        });
        match taken {
            Ok(new) => {
                info!(subject = %new.subject, cert = %self.files.cert.display(), "new certificates are in force");
                *self.now.write().expect("never poisoned: held only to assign") = Arc::new(new);
            }
            Err(error) => warn!(%error, "new certificates are not taken, the old ones stay in force"),
        }
    }

    /// Looks after the files until the node stops.
    pub(crate) async fn watch(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            let tls = self.clone();
            if tokio::task::spawn_blocking(move || tls.refresh()).await.is_err() {
                return;
            }
        }
    }
}

impl TlsFiles {
    /// Certificate, key and authority, where all of them or none were named.
    ///
    /// # Errors
    /// Which one is missing: `cert`, `key` or `ca`.
    pub fn together(files: [Option<PathBuf>; 3]) -> Result<Option<TlsFiles>, &'static str> {
        match files {
            [None, None, None] => Ok(None),
            [Some(cert), Some(key), Some(ca)] => Ok(Some(TlsFiles { cert, key, ca })),
            [None, ..] => Err("cert"),
            [_, None, _] => Err("key"),
            _ => Err("ca"),
        }
    }

    fn each(&self) -> [&Path; 3] {
        [&self.cert, &self.key, &self.ca]
    }
}

fn stamp(files: &TlsFiles) -> Stamp {
    use std::os::unix::fs::MetadataExt;
    files.each().map(|path| {
        let metadata = fs::metadata(path).ok()?;
        Some((metadata.modified().ok()?, metadata.len(), metadata.ino()))
    })
}

/// Reads the files and checks that they belong together: the key is the certificate's, an authority that is trusted has
/// signed it, it is valid now, and it says who its holder is.
fn read(files: &TlsFiles) -> Result<Credentials, TlsError> {
    let unusable = |path: &Path, reason: String| TlsError::Unusable { path: path.to_owned(), reason };
    let chain = certificates(&files.cert)?;
    let pem = content(&files.key)?;
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| unusable(&files.key, format!("it holds no private key in PEM ({error})")))?;
    let mut roots = RootCertStore::empty();
    for authority in certificates(&files.ca)? {
        roots.add(authority).map_err(|error| unusable(&files.ca, error.to_string()))?;
    }
    let roots = Arc::new(roots);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider())
        .build()
        .map_err(|error| unusable(&files.ca, error.to_string()))?;

    let expires = subject::expires(&chain[0]).unwrap_or(0);
    let subject = Subject::of_certificate(&chain[0]).map_err(|reason| unusable(&files.cert, reason))?;
    verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()).map_err(|error| {
        let ca = files.ca.display();
        unusable(
            &files.cert,
            format!("it is not valid under {ca} ({error}); make a new one with `pontoon certs`"),
        )
    })?;
    let mismatch = |error: rustls::Error| {
        unusable(&files.key, format!("it is not the key of {} ({error})", files.cert.display()))
    };
    let mut server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider knows TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain.clone(), key.clone_key())
        .map_err(mismatch)?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;

    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("the provider knows TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .map_err(mismatch)?;
    client.alpn_protocols = vec![b"h2".to_vec()];
    client.resumption = rustls::client::Resumption::disabled();
    Ok(Credentials { subject, expires, server: Arc::new(server), client: Arc::new(client) })
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// The certificates of a PEM file, at least one.
pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = content(path)?;
    let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let reason = match read {
        Ok(certificates) if !certificates.is_empty() => return Ok(certificates),
        Ok(_) => "it holds no certificate in PEM".to_owned(),
        Err(error) => format!("it is not legible as PEM ({error})"),
    };
    Err(TlsError::Unusable { path: path.to_owned(), reason })
}

fn content(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Io { path: path.to_owned(), source };
    let size = fs::metadata(path).map_err(failed)?.len();
    if size > FILE_MOST {
        let reason = format!("it has {size} bytes, which no certificate has");
        return Err(TlsError::Unusable { path: path.to_owned(), reason });
    }
    fs::read(path).map_err(failed)
}
