//! Who a certificate speaks for: one URI among its alternative names, `pontoon://CLUSTER/ROLE/NAME`.

use std::{fmt, str::FromStr};

use pontoon_proto::NodeId;
use x509_parser::{
    certificate::X509Certificate,
    extensions::GeneralName,
    prelude::{FromDer, ParsedExtension},
};

use crate::roles::Role;

const SCHEME: &str = "pontoon://";
const WORD_MOST: usize = 64;

/// Who a certificate speaks for. A node's name is its id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The name of the cluster that the certificate was made for.
    pub cluster: String,
    /// What its holder may do.
    pub role: Role,
    /// Who its holder is, within the role.
    pub name: String,
}

impl Subject {
    /// Checks the parts of a name that is to be.
    ///
    /// # Errors
    /// Says which part is not one.
    pub fn new(cluster: &str, role: Role, name: &str) -> Result<Subject, String> {
        check_word("cluster", cluster)?;
        check_word("name", name)?;
        if role == Role::Node {
            let id: NodeId = name.parse().map_err(|_| format!("a node's name is its id, not {name}"))?;
            return Ok(Subject { cluster: cluster.to_owned(), role, name: id.get().to_string() });
        }
        Ok(Subject { cluster: cluster.to_owned(), role, name: name.to_owned() })
    }

    /// The node that the certificate speaks for, if it is a node's.
    pub fn node(&self) -> Option<NodeId> {
        (self.role == Role::Node).then(|| self.name.parse().ok()).flatten()
    }

    /// Reads the subject of a certificate in DER.
    ///
    /// # Errors
    /// If there is none, or more than one.
    pub fn of_certificate(der: &[u8]) -> Result<Subject, String> {
        let (_, certificate) =
            X509Certificate::from_der(der).map_err(|error| format!("it is not legible: {error}"))?;
        let uris = alternative_names(&certificate).filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
            _ => None,
        });
        match uris.collect::<Vec<_>>()[..] {
            [uri] => uri.parse(),
            [] => Err(format!("it names no role ({SCHEME}CLUSTER/ROLE/NAME): make one with `pontoon certs`")),
            _ => Err("it names more than one role".to_owned()),
        }
    }
}

/// Until when a certificate in DER is valid, in seconds since 1970; `None` if it is not legible.
pub(super) fn expires(der: &[u8]) -> Option<i64> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    Some(certificate.validity().not_after.timestamp())
}

/// The alternative names of a certificate; none if it has none that are legible.
pub(crate) fn alternative_names<'a>(
    certificate: &'a X509Certificate<'a>,
) -> impl Iterator<Item = &'a GeneralName<'a>> {
    certificate.extensions().iter().flat_map(|extension| match extension.parsed_extension() {
        ParsedExtension::SubjectAlternativeName(names) => names.general_names.as_slice(),
        _ => &[],
    })
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.cluster, self.role, self.name)
    }
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text} is not {SCHEME}CLUSTER/ROLE/NAME");
        let parts: Vec<&str> = text.strip_prefix(SCHEME).ok_or_else(wrong)?.split('/').collect();
        match parts[..] {
            [cluster, role, name] => Subject::new(cluster, role.parse()?, name),
            _ => Err(wrong()),
        }
    }
}

/// Words go into file names, logs and URIs as they are.
fn check_word(what: &str, word: &str) -> Result<(), String> {
    let plain = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
    match word.chars().all(plain) && (1..=WORD_MOST).contains(&word.len()) && !word.starts_with('.') {
        true => Ok(()),
        false => Err(format!(
            "the {what} {word:?} must have 1 to {WORD_MOST} letters, digits, '-', '_' or '.', and not begin with '.'"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_is_written_as_it_is_read() {
        for text in ["pontoon://prod/node/3", "pontoon://prod-1/operator/ann.b"] {
            assert_eq!(text.parse::<Subject>().unwrap().to_string(), text);
        }
        let node: Subject = "pontoon://c/node/n3".parse().unwrap();
        assert_eq!((node.node(), node.to_string()), (NodeId::new(3).ok(), "pontoon://c/node/3".to_owned()));
        assert_eq!("pontoon://c/reader/3".parse::<Subject>().unwrap().node(), None);
    }

    #[test]
    fn what_is_no_subject_is_refused() {
        for text in [
            "",
            "pontoon://c/node/0",
            "pontoon://c/node/three",
            "pontoon://c/node/4294967296",
            "pontoon://c/root/ann",
            "pontoon://c/reader/",
            "pontoon:///reader/a",
            "pontoon://c/reader/a/b",
            "pontoon://c/reader/../a",
            "pontoon://c/reader/a b",
            "spiffe://c/reader/a",
        ] {
            assert!(text.parse::<Subject>().is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_that_are_no_certificate_are_refused() {
        assert!(Subject::of_certificate(b"").is_err());
        assert!(Subject::of_certificate(&[0x30, 0x82, 0xff, 0xff, 1, 2, 3]).is_err());
    }
}
