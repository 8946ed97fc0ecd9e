//! What a node's process is configured with: a file, then variables of the environment, then flags; the later one wins.
//!
//! ```text
//!  pontoon.toml ──> PONTOON_… ──> --flags ──> Settings ──> NodeConfig
//! ```
//!
//! There is one table of all settings (`settings/table.rs`): the file, the variables, the flags, the default file and the reference page are
//! made from it, so none of them can know of a setting that another does not.

mod file;
mod page;
mod table;
mod value;

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
};

use table::{Kind, LOG_FILTER, SPAN_SAMPLE, Setting, TABLE};

pub use page::{default_file, reference};

use crate::{
    config::NodeConfig,
    process::{LogFormat, SpanExport},
    tls::TlsFiles,
};

/// What every variable of the environment begins with.
const PREFIX: &str = "PONTOON_";
/// Variables that are read elsewhere: by every command, and by whoever looks for the file.
const OTHERS: [&str; 2] = ["PONTOON_ADDR", "PONTOON_CONFIG"];
/// A name that differs from a known one in so many letters was meant to be it.
const NEAR: usize = 2;

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A line of the file.
    File {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
    },
    /// A variable of the environment.
    Variable(String),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{} line {line}", path.display()),
            Origin::Variable(name) | Origin::Flag(name) => f.write_str(name),
        }
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// The file cannot be read.
    #[error("the configuration {} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("{origin} is not TOML: {reason}")]
    Syntax {
        /// Where.
        origin: Origin,
        /// What the parser said.
        reason: String,
    },
    /// There is no such setting.
    #[error("{origin}: there is no setting {key}{}; `pontoon config default` lists all", hint(nearest))]
    Unknown {
        /// Where.
        origin: Origin,
        /// The name.
        key: String,
        /// A setting that may have been meant.
        nearest: Option<&'static str>,
    },
    /// A value does not fit its setting.
    #[error("{origin}: {key} = {value:?}: {reason}")]
    Value {
        /// Where.
        origin: Origin,
        /// The setting.
        key: &'static str,
        /// What was said.
        value: String,
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// Nobody said what nobody can guess.
    #[error("{key} is not set: say {flag}, {variable}, or {key} in a file that --config names")]
    Missing {
        /// The setting.
        key: &'static str,
        /// Its flag.
        flag: &'static str,
        /// Its variable.
        variable: String,
    },
    /// Settings that are right by themselves and not together.
    #[error("the settings do not go together: {0}")]
    Together(String),
}

fn hint(nearest: &Option<&'static str>) -> String {
    nearest.map_or_else(String::new, |nearest| format!(", did you mean {nearest}?"))
}

/// A setting as it is in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InForce {
    /// Its name.
    pub key: String,
    /// Its value, as it was written; empty: whatever the node finds fit.
    pub value: String,
    /// Who said so.
    pub origin: Origin,
}

/// The settings of one process.
///
/// # Examples
/// ```
/// use pontoon_node::settings::Settings;
///
/// let mut settings = Settings::default();
/// settings.flag("--dir", "data")?;
/// settings.flag("--listen", "127.0.0.1:7400")?;
/// let config = settings.check()?;
/// assert_eq!(config.listen, "127.0.0.1:7400");
/// # Ok::<(), pontoon_node::settings::SettingsError>(())
/// ```
#[derive(Debug, Clone)]
pub struct Settings {
    node: NodeConfig,
    tls: TlsParts,
    log_format: LogFormat,
    log_filter: String,
    otel: Otel,
    said: BTreeMap<String, (String, Origin)>,
}

/// The files of [`TlsFiles`], as far as they were named.
#[derive(Debug, Clone, Default)]
struct TlsParts {
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    ca: Option<PathBuf>,
}

/// Where spans go.
#[derive(Debug, Clone)]
struct Otel {
    endpoint: Option<String>,
    sample: f64,
}

impl TlsParts {
    /// All or none.
    fn files(&self) -> Result<Option<TlsFiles>, SettingsError> {
        TlsFiles::together([self.cert.clone(), self.key.clone(), self.ca.clone()]).map_err(|missing| {
            SettingsError::Together(format!("of tls.cert, tls.key and tls.ca, tls.{missing} is missing"))
        })
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            node: NodeConfig::new("", ""),
            tls: TlsParts::default(),
            log_format: LogFormat::default(),
            log_filter: LOG_FILTER.to_owned(),
            otel: Otel { endpoint: None, sample: SPAN_SAMPLE },
            said: BTreeMap::new(),
        }
    }
}

impl Settings {
    /// Reads a file.
    ///
    /// # Errors
    /// [`SettingsError`] with the line of the first thing that is wrong.
    pub fn file(&mut self, path: &Path) -> Result<(), SettingsError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SettingsError::Unreadable { path: path.to_owned(), source })?;
        for file::Line { key, value, line } in file::read(path, &text)? {
            self.set(&key, &value, Origin::File { path: path.to_owned(), line })?;
        }
        Ok(())
    }

    /// Reads variables of the environment, and returns a warning for each that looks like a misspelt one. Others than ours are passed
    /// over.
    ///
    /// # Errors
    /// [`SettingsError::Value`].
    pub fn variables(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Vec<String>, SettingsError> {
        let mut warnings = Vec::new();
        for (name, value) in variables {
            if !name.starts_with(PREFIX) || OTHERS.contains(&name.as_str()) {
                continue;
            }
            match TABLE.iter().find(|setting| setting.variable() == name) {
                // An empty variable is how a shell takes one back.
                Some(_) if value.is_empty() => {}
                Some(setting) if setting.kind == Kind::Labels => {
                    for label in value.split(',') {
                        self.apply(setting, label, Origin::Variable(name.clone()))?;
                    }
                }
                Some(setting) => self.apply(setting, &value, Origin::Variable(name))?,
                None => {
                    let near = nearest(&name, TABLE.iter().map(Setting::variable));
                    warnings.extend(near.map(|near| format!("{name} means nothing, did you mean {near}?")));
                }
            }
        }
        Ok(warnings)
    }

    /// Takes a flag of the command line. `--set` takes KEY=VALUE for any setting.
    ///
    /// # Errors
    /// [`SettingsError::Value`], [`SettingsError::Unknown`].
    pub fn flag(&mut self, flag: &str, value: &str) -> Result<(), SettingsError> {
        let origin = Origin::Flag(flag.to_owned());
        if flag == "--set" {
            let unknown =
                || SettingsError::Unknown { origin: origin.clone(), key: value.to_owned(), nearest: None };
            let (key, value) = value.split_once('=').ok_or_else(unknown)?;
            return self.set(key, value, origin);
        }
        match TABLE.iter().find(|setting| setting.flag == Some(flag)) {
            Some(setting) => self.apply(setting, value, origin),
            None => Err(SettingsError::Unknown { origin, key: flag.to_owned(), nearest: None }),
        }
    }

    fn set(&mut self, key: &str, value: &str, origin: Origin) -> Result<(), SettingsError> {
        // A label is named by whoever sets it.
        if let Some((table, name)) = key.split_once('.')
            && let Some(setting) =
                TABLE.iter().find(|setting| setting.kind == Kind::Labels && setting.key == table)
        {
            return self.apply(setting, &format!("{name}={value}"), origin);
        }
        match TABLE.iter().find(|setting| setting.key == key) {
            Some(setting) => self.apply(setting, value, origin),
            None => {
                let nearest = nearest(key, TABLE.iter().map(|setting| setting.key));
                Err(SettingsError::Unknown { origin, key: key.to_owned(), nearest })
            }
        }
    }

    fn apply(&mut self, setting: &'static Setting, text: &str, origin: Origin) -> Result<(), SettingsError> {
        (setting.set)(self, text).map_err(|reason| SettingsError::Value {
            origin: origin.clone(),
            key: setting.key,
            value: text.to_owned(),
            reason,
        })?;
        let (key, value) = match (setting.kind, text.split_once('=')) {
            (Kind::Labels, Some((name, value))) => (format!("{}.{name}", setting.key), value),
            _ => (setting.key.to_owned(), text),
        };
        self.said.insert(key, (value.to_owned(), origin));
        Ok(())
    }

    /// The configuration of the node, if nothing is missing.
    ///
    /// # Errors
    /// [`SettingsError::Missing`], [`SettingsError::Together`].
    pub fn check(&self) -> Result<NodeConfig, SettingsError> {
        for setting in TABLE.iter().filter(|setting| setting.needed) {
            if !self.said.contains_key(setting.key) {
                return Err(SettingsError::Missing {
                    key: setting.key,
                    flag: setting.flag.unwrap_or("--set"),
                    variable: setting.variable(),
                });
            }
        }
        self.together()?;
        let mut config = self.node.clone();
        config.tls = self.tls.files()?;
        config.settings = self.in_force();
        Ok(config)
    }

    /// Whether what was said goes together. A file need not say everything.
    ///
    /// # Errors
    /// [`SettingsError::Together`].
    pub fn together(&self) -> Result<(), SettingsError> {
        self.tls.files()?;
        if self.otel.endpoint.is_some() && !SpanExport::BUILT {
            return Err(SettingsError::Together(SpanExport::MISSING.to_owned()));
        }
        self.node.raft.validate().map_err(|error| SettingsError::Together(format!("[raft] {error}")))
    }

    /// How log lines look.
    pub fn log_format(&self) -> LogFormat {
        self.log_format
    }

    /// Which log lines there are.
    pub fn log_filter(&self) -> &str {
        &self.log_filter
    }

    /// Where spans go, if anywhere.
    pub fn spans(&self) -> Option<SpanExport> {
        let instance = self.node.advertise.as_ref().unwrap_or(&self.node.listen).clone();
        let Otel { endpoint, sample } = self.otel.clone();
        endpoint.map(|endpoint| SpanExport { endpoint, sample, instance })
    }

    /// Every setting with its value and who said so. No value is a secret: keys and certificates are named by their files.
    pub fn in_force(&self) -> Vec<InForce> {
        let in_force = |key: &str, default: &str| {
            let (value, origin) =
                self.said.get(key).cloned().unwrap_or((default.to_owned(), Origin::Default));
            InForce { key: key.to_owned(), value, origin }
        };
        let plain = TABLE.iter().filter(|setting| setting.kind != Kind::Labels);
        let mut all: Vec<InForce> = plain.map(|setting| in_force(setting.key, setting.default)).collect();
        let known = |key: &str| TABLE.iter().any(|setting| setting.key == key);
        all.extend(self.said.keys().filter(|key| !known(key)).map(|key| in_force(key, "")));
        all
    }
}

/// The name that was probably meant.
fn nearest<N: AsRef<str>>(name: &str, known: impl Iterator<Item = N>) -> Option<N> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let distance = |known: &str| {
        let whole = strsim::damerau_levenshtein(name, known);
        // The right name in the wrong table is near, too.
        if last(name) == last(known) { whole.min(NEAR) } else { whole }
    };
    let far = NEAR.max(name.len() / 5);
    known
        .map(|known| (distance(known.as_ref()), known))
        .filter(|(distance, _)| *distance <= far)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<Settings, String> {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pontoon.toml");
        std::fs::write(&path, text).unwrap();
        let mut settings = Settings::default();
        settings
            .file(&path)
            .map(|()| settings)
            .map_err(|error| error.to_string().replace(&scratch.path().display().to_string(), ""))
    }

    #[test]
    fn flags_win_over_variables_and_those_over_the_file() {
        let mut settings = file(
            "dir = \"of the file\"\nlisten = \"127.0.0.1:1\"\nadvertise = \"localhost:1\"\n\
             [labels]\nzone = \"a\"\nrack = \"7\"\n[raft]\ntick = \"50ms\"\n",
        )
        .unwrap();
        let variables = [("PONTOON_LISTEN", "127.0.0.1:2"), ("PONTOON_ADVERTISE", "localhost:2")];
        let variables = variables.into_iter().chain([("PONTOON_LABELS", "zone=b,host=h"), ("HOME", "/")]);
        let owned = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert!(settings.variables(owned).unwrap().is_empty());
        settings.flag("--advertise", "localhost:3").unwrap();
        settings.flag("--set", "raft.core_threads=2").unwrap();

        let config = settings.check().unwrap();
        assert_eq!(config.dir, Path::new("of the file"));
        assert_eq!(
            (config.listen.as_str(), config.advertise.as_deref()),
            ("127.0.0.1:2", Some("localhost:3"))
        );
        let labels: Vec<_> = config.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(labels, ["host=h", "rack=7", "zone=b"]);
        assert_eq!((config.raft.tick.as_millis(), config.raft.core_threads), (50, 2));
        let origin = |key: &str| {
            config.settings.iter().find(|setting| setting.key == key).map(|found| found.origin.to_string())
        };
        assert_eq!(origin("raft.tick").unwrap(), "/pontoon.toml line 8".replace('/', &of_file(&config)));
        assert_eq!(origin("labels.zone").as_deref(), Some("PONTOON_LABELS"));
        assert_eq!(origin("advertise").as_deref(), Some("--advertise"));
        assert_eq!(origin("log.format").as_deref(), Some("default"));
    }

    fn of_file(config: &NodeConfig) -> String {
        let of = |setting: &InForce| match &setting.origin {
            Origin::File { path, .. } => path.parent().map(|parent| format!("{}/", parent.display())),
            _ => None,
        };
        config.settings.iter().find_map(of).unwrap()
    }

    #[test]
    fn unknown_names_are_refused_with_the_nearest_one() {
        let refused = |text: &str| file(text).unwrap_err();
        let found = refused("dir = \"d\"\n[raft]\ntik = \"50ms\"\n");
        assert_eq!(
            found,
            "/pontoon.toml line 3: there is no setting raft.tik, did you mean raft.tick?; `pontoon config default` lists all"
        );
        let found = refused("lissten = \"127.0.0.1:1\"\n");
        assert!(found.contains("line 1") && found.contains("did you mean listen?"), "{found}");
        let found = refused("[wal]\nreserve = \"1GiB\"\n");
        assert!(found.contains("did you mean disk.reserve?"), "{found}");
        let found = refused("[elephants]\ntrunk = 1\n");
        assert!(found.contains("elephants.trunk") && !found.contains("did you mean"), "{found}");

        let mut settings = Settings::default();
        let variables =
            [("PONTOON_LISTNE".to_owned(), "x".to_owned()), ("PONTOON_SIM_SEEDS".to_owned(), "9".to_owned())];
        let warnings = settings.variables(variables).unwrap();
        assert_eq!(warnings, ["PONTOON_LISTNE means nothing, did you mean PONTOON_LISTEN?"]);
        let error = settings.flag("--set", "raft.tok=1s").unwrap_err().to_string();
        assert!(error.contains("--set") && error.contains("raft.tick"), "{error}");
    }

    #[test]
    fn bad_values_name_the_key_and_the_line() {
        for (text, words) in [
            ("[raft]\n\ntick = \"fast\"", &["line 3", "raft.tick", "\"fast\"", "100ms"][..]),
            ("[raft]\ncore_threads = -1", &["line 2", "raft.core_threads", "-1"]),
            ("[raft]\nleader_lease = \"perhaps\"", &["line 2", "raft.leader_lease", "true or false"]),
            ("[disk]\nreserve = \"much\"", &["line 2", "disk.reserve", "512MiB"]),
            ("engine = \"paper\"", &["line 1", "engine", "fjall or sled"]),
            ("[log]\nformat = \"xml\"", &["line 2", "log.format", "text or json"]),
            ("[snapshots]\nbudget = \"some\"", &["line 2", "snapshots.budget", "slow, normal"]),
            ("listen = \"nowhere\"", &["line 1", "listen", "HOST:PORT"]),
            ("listen = [1]", &["line 1", "listen"]),
            ("dir = \"d", &["line 1", "not TOML"]),
            ("dir = \"d\"\ndir = \"e\"", &["line 2", "not TOML"]),
        ] {
            let refused = file(text).unwrap_err();
            for word in words {
                assert!(refused.contains(word), "{text:?} does not say {word:?}: {refused}");
            }
        }
    }

    #[test]
    fn what_is_missing_or_does_not_go_together_is_named() {
        let error = Settings::default().check().unwrap_err().to_string();
        assert!(error.contains("dir is not set") && error.contains("PONTOON_DIR"), "{error}");
        let settings = file("dir = \"d\"\nlisten = \"localhost:1\"\n[raft]\nelection_ticks = 2\n").unwrap();
        let error = settings.check().unwrap_err().to_string();
        assert!(error.contains("[raft]") && error.contains("election_ticks"), "{error}");
        let error = file("[tls]\ncert = \"c\"\nca = \"a\"\n").unwrap().together().unwrap_err().to_string();
        assert!(error.contains("tls.key is missing"), "{error}");
    }
}
