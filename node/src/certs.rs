//! Certificates for a cluster of one's own: an authority, and what it signs for nodes and clients.
//!
//! ```text
//!  DIR/ca.pem  DIR/ca.key          the authority; keep the key away from the nodes
//!  DIR/node-3.pem  .key            pontoon://CLUSTER/node/3, with the names and addresses by which the node is reached
//!  DIR/operator-ann.pem  .key      pontoon://CLUSTER/operator/ann
//! ```
//!
//! Keys are readable by their owner alone. Nothing is overwritten, unless it is to be renewed.

use std::{
    fs::{self, File},
    io::{self, Write},
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use x509_parser::{certificate::X509Certificate, extensions::GeneralName, prelude::FromDer};

use crate::{
    roles::Role,
    tls::{Subject, TlsError, alternative_names, certificates},
};

/// How long an authority is valid unless it is said otherwise, in days.
pub const AUTHORITY_DAYS: u32 = 3_650;
/// How long the certificates that it signs are.
pub const CERTIFICATE_DAYS: u32 = 365;
/// The clocks of a cluster may differ by as much.
const EARLIER: Duration = Duration::hours(1);
const CA: &str = "ca";
/// How the authority's own subject names the cluster.
const AUTHORITY: &str = "pontoon authority of ";

/// Why a certificate was not made. Every message names the file and the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertsError {
    /// The file is there already.
    #[error("{} exists and is not overwritten; {next}", path.display())]
    Exists {
        /// Which.
        path: PathBuf,
        /// The next step.
        next: String,
    },
    /// There is no authority here, or no certificate to renew.
    #[error("{} does not exist; {next}", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
        /// The next step.
        next: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What was asked for makes no certificate.
    #[error("{0}")]
    Invalid(String),
    /// A file is not legible.
    #[error(transparent)]
    File(#[from] TlsError),
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The certificate.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A certificate as it is on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    /// Whom it speaks for; `None` for an authority, and for what is no certificate of a cluster.
    pub subject: Option<Subject>,
    /// Whether it signs others.
    pub authority: bool,
    /// The names and addresses that its holder is reached by.
    pub hosts: Vec<String>,
    /// Since when it is valid, RFC 3339.
    pub not_before: String,
    /// Until when it is valid, RFC 3339.
    pub not_after: String,
    /// Days that are left, negative once it has expired.
    pub days_left: i64,
    /// Its number.
    pub serial: String,
}

/// Makes the authority of a cluster in `dir`, which is made if it is missing.
///
/// # Errors
/// [`CertsError::Exists`] if there is one.
pub fn init(dir: &Path, cluster: &str, days: u32) -> Result<Made, CertsError> {
    // Checks the name.
    Subject::new(cluster, Role::Operator, "x").map_err(CertsError::Invalid)?;
    fs::create_dir_all(dir).map_err(|source| CertsError::Io { path: dir.to_owned(), source })?;
    let mut params = valid_for(days)?;
    params.distinguished_name.push(DnType::CommonName, format!("{AUTHORITY}{cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.self_signed(&key).map_err(failed)?;
    let made = files(dir, CA);
    let next = "it is the authority of a cluster: name another --dir".to_owned();
    refuse_existing(&made, &next)?;
    write_new(&made.key, key.serialize_pem().as_bytes(), 0o600, &next)?;
    write_new(&made.cert, certificate.pem().as_bytes(), 0o644, &next)?;
    Ok(made)
}

/// Makes a certificate for a holder, signed by the authority in `dir`. `hosts` are the names and addresses by which a node is
/// reached; clients have none. With `renew` a certificate of the same holder is replaced, key and all; its hosts stay if
/// none are given.
///
/// # Errors
/// [`CertsError::Exists`] and [`CertsError::Missing`], by `renew`; [`CertsError::Invalid`] for names that are none, and for
/// a node without hosts.
pub fn issue(
    dir: &Path,
    role: Role,
    name: &str,
    hosts: &[String],
    days: u32,
    renew: bool,
) -> Result<Made, CertsError> {
    let ca = files(dir, CA);
    let missing = |path: &Path| CertsError::Missing {
        path: path.to_owned(),
        next: format!("make an authority first: `pontoon certs init --dir {}`", dir.display()),
    };
    let cluster = cluster_of(&ca.cert).map_err(|error| match error {
        CertsError::File(TlsError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            missing(&ca.cert)
        }
        other => other,
    })?;
    let subject = Subject::new(&cluster, role, name).map_err(CertsError::Invalid)?;
    let made = files(dir, &format!("{role}-{}", subject.name));
    let next = "add --renew to replace it, or choose another name".to_owned();
    let mut hosts = hosts.to_vec();
    match renew {
        false => refuse_existing(&made, &next)?,
        true if !made.cert.exists() => {
            return Err(CertsError::Missing {
                path: made.cert,
                next: "leave --renew out to make it".to_owned(),
            });
        }
        true if hosts.is_empty() => hosts = show(&made.cert)?.hosts,
        true => {}
    }
    if role == Role::Node && hosts.is_empty() {
        return Err(CertsError::Invalid(
            "a node needs --host, the name or address by which others reach it; it may be repeated"
                .to_owned(),
        ));
    }

    let mut params = valid_for(days)?;
    params.distinguished_name.push(DnType::OrganizationName, cluster.as_str());
    params.distinguished_name.push(DnType::OrganizationalUnitName, role.name());
    params.distinguished_name.push(DnType::CommonName, subject.name.as_str());
    params.subject_alt_names = vec![SanType::URI(subject.to_string().try_into().map_err(failed)?)];
    for host in &hosts {
        params.subject_alt_names.push(match host.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(dns_name(host)?.try_into().map_err(failed)?),
        });
    }
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = match role {
        Role::Node => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        _ => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.use_authority_key_identifier_extension = true;

    let read = |path: &Path| {
        fs::read_to_string(path).map_err(|source| CertsError::Io { path: path.to_owned(), source })
    };
    if !ca.key.exists() {
        return Err(missing(&ca.key));
    }
    let unusable = |error: rcgen::Error| {
        CertsError::Invalid(format!("the authority in {} cannot sign: {error}", dir.display()))
    };
    let signer = KeyPair::from_pem(&read(&ca.key)?).map_err(unusable)?;
    let issuer = Issuer::from_ca_cert_pem(&read(&ca.cert)?, signer).map_err(unusable)?;
    let key = KeyPair::generate().map_err(failed)?;
    let certificate = params.signed_by(&key, &issuer).map_err(failed)?;
    let (key, certificate) = (key.serialize_pem(), certificate.pem());
    match renew {
        false => {
            write_new(&made.key, key.as_bytes(), 0o600, &next)?;
            write_new(&made.cert, certificate.as_bytes(), 0o644, &next)?;
        }
        true => {
            // Both whole before either takes its place. A node that looks between the two renames keeps what it has.
            let (new_key, new_cert) =
                (made.key.with_extension("key.new"), made.cert.with_extension("pem.new"));
            let next = "it was left behind by a renewal that did not end: remove it".to_owned();
            write_new(&new_key, key.as_bytes(), 0o600, &next)?;
            write_new(&new_cert, certificate.as_bytes(), 0o644, &next)?;
            for (from, to) in [(&new_key, &made.key), (&new_cert, &made.cert)] {
                fs::rename(from, to).map_err(|source| CertsError::Io { path: to.clone(), source })?;
            }
        }
    }
    Ok(made)
}

/// Says what a certificate is: the first one of a PEM file.
///
/// # Errors
/// If the file cannot be read.
pub fn show(path: &Path) -> Result<Shown, CertsError> {
    let chain = certificates(path)?;
    let (_, certificate) = X509Certificate::from_der(&chain[0]).map_err(|error| illegible(path, error))?;
    let hosts = alternative_names(&certificate).filter_map(|name| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => address(bytes).map(|address| address.to_string()),
        _ => None,
    });
    let validity = certificate.validity();
    let left = validity.not_after.timestamp() - OffsetDateTime::now_utc().unix_timestamp();
    Ok(Shown {
        subject: Subject::of_certificate(&chain[0]).ok(),
        authority: certificate.is_ca(),
        hosts: hosts.collect(),
        not_before: written(validity.not_before.to_datetime()),
        not_after: written(validity.not_after.to_datetime()),
        days_left: left.div_euclid(86_400),
        serial: certificate.raw_serial_as_string(),
    })
}

fn written(time: OffsetDateTime) -> String {
    time.format(&Rfc3339).unwrap_or_else(|_| time.to_string())
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// The cluster that an authority was made for.
fn cluster_of(path: &Path) -> Result<String, CertsError> {
    let chain = certificates(path)?;
    let (_, certificate) = X509Certificate::from_der(&chain[0]).map_err(|error| illegible(path, error))?;
    let name = certificate.subject().iter_common_name().next().and_then(|name| name.as_str().ok());
    let cluster = name.and_then(|name| name.strip_prefix(AUTHORITY)).map(str::to_owned);
    cluster.ok_or_else(|| {
        CertsError::Invalid(format!(
            "{} was not made by `pontoon certs init`: name its --dir",
            path.display()
        ))
    })
}

fn illegible(path: &Path, error: impl std::fmt::Display) -> CertsError {
    TlsError::Unusable { path: path.to_owned(), reason: format!("it is not legible ({error})") }.into()
}

fn dns_name(host: &str) -> Result<String, CertsError> {
    match rustls::pki_types::DnsName::try_from(host) {
        Ok(_) => Ok(host.to_owned()),
        Err(_) => Err(CertsError::Invalid(format!(
            "{host} is neither a host name nor an address; give a --host without a port"
        ))),
    }
}

fn valid_for(days: u32) -> Result<CertificateParams, CertsError> {
    if !(1..=36_500).contains(&days) {
        return Err(CertsError::Invalid(format!("--days {days} must be from 1 to 36500")));
    }
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - EARLIER;
    params.not_after = now + Duration::days(days.into());
    Ok(params)
}

fn files(dir: &Path, stem: &str) -> Made {
    // The stem may have dots of its own.
    Made { cert: dir.join(format!("{stem}.pem")), key: dir.join(format!("{stem}.key")) }
}

fn refuse_existing(made: &Made, next: &str) -> Result<(), CertsError> {
    match [&made.cert, &made.key].into_iter().find(|path| path.exists()) {
        Some(path) => Err(CertsError::Exists { path: path.clone(), next: next.to_owned() }),
        None => Ok(()),
    }
}

fn write_new(path: &Path, content: &[u8], mode: u32, next: &str) -> Result<(), CertsError> {
    let write = || -> io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(mode).open(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => CertsError::Exists { path: path.to_owned(), next: next.to_owned() },
        _ => CertsError::Io { path: path.to_owned(), source },
    })
}

fn failed(error: rcgen::Error) -> CertsError {
    CertsError::Invalid(format!("no certificate can be made: {error}"))
}
