//! With which certificate a command, or a node, shows itself.

use std::path::PathBuf;

use clap::Args;
use pontoon_node::TlsFiles;

use super::Failure;

/// Where the flags may come from.
pub(crate) const TLS_VARIABLES: [&str; 3] = ["PONTOON_TLS_CERT", "PONTOON_TLS_KEY", "PONTOON_TLS_CA"];

/// A certificate, its key, and whose certificates are accepted. All three or none.
#[derive(Debug, Args, Clone, Default)]
pub(crate) struct TlsArgs {
    /// The certificate to show, PEM. `pontoon certs` makes one; a running node takes a new one up by itself.
    #[arg(long, global = true, env = "PONTOON_TLS_CERT", value_name = "FILE", help_heading = "TLS")]
    tls_cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, global = true, env = "PONTOON_TLS_KEY", value_name = "FILE", help_heading = "TLS")]
    tls_key: Option<PathBuf>,
    /// The authority of the cluster, PEM.
    #[arg(long, global = true, env = "PONTOON_TLS_CA", value_name = "FILE", help_heading = "TLS")]
    tls_ca: Option<PathBuf>,
}

/// The same for the cluster that a log is copied from, where that is another.
#[derive(Debug, Args, Clone, Default)]
pub(crate) struct FromTlsArgs {
    /// The certificate to show there. Without these three the ones of --tls-cert are shown.
    #[arg(long, value_name = "FILE")]
    from_tls_cert: Option<PathBuf>,
    /// Its private key.
    #[arg(long, value_name = "FILE")]
    from_tls_key: Option<PathBuf>,
    /// The authority of that cluster.
    #[arg(long, value_name = "FILE")]
    from_tls_ca: Option<PathBuf>,
}

impl TlsArgs {
    pub(crate) fn files(self) -> Result<Option<TlsFiles>, Failure> {
        together("--tls", [self.tls_cert, self.tls_key, self.tls_ca])
    }
}

impl FromTlsArgs {
    pub(crate) fn files(self, else_these: Option<&TlsFiles>) -> Result<Option<TlsFiles>, Failure> {
        let given = together("--from-tls", [self.from_tls_cert, self.from_tls_key, self.from_tls_ca])?;
        Ok(given.or_else(|| else_these.cloned()))
    }
}

fn together(flag: &str, files: [Option<PathBuf>; 3]) -> Result<Option<TlsFiles>, Failure> {
    TlsFiles::together(files).map_err(|missing| {
        let text = format!("{flag}-cert, {flag}-key and {flag}-ca go together: {flag}-{missing} is missing");
        Failure::new(Failure::REFUSED, text)
    })
}
