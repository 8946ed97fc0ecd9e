//! `pontoon certs`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pontoon_node::{
    Role,
    certs::{self, AUTHORITY_DAYS, CERTIFICATE_DAYS, CertsError, Made},
};
use pontoon_proto::NodeId;
use serde_json::json;

use super::{Done, Failure, node_id, table};

#[derive(Debug, Subcommand)]
pub(super) enum CertsCommand {
    /// Make the authority of a new cluster.
    Init(InitArgs),
    /// Make the certificate of a node.
    Node(NodeArgs),
    /// Make the certificate of somebody who uses or runs the cluster.
    Client(ClientArgs),
    /// Say whom a certificate speaks for, where, and until when.
    Show {
        /// PEM.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Where the authority and what it signs will lie.
    #[arg(long)]
    dir: PathBuf,
    /// The name of the cluster in its certificates; those of another cluster are not accepted. Default: a random one.
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    /// How long the authority is valid.
    #[arg(long, default_value_t = AUTHORITY_DAYS)]
    days: u32,
}

#[derive(Debug, Args)]
pub(super) struct SignArgs {
    /// Where the authority lies.
    #[arg(long)]
    dir: PathBuf,
    /// How long the certificate is valid.
    #[arg(long, default_value_t = CERTIFICATE_DAYS)]
    days: u32,
    /// Replace the certificate and its key.
    #[arg(long)]
    renew: bool,
}

#[derive(Debug, Args)]
pub(super) struct NodeArgs {
    #[command(flatten)]
    sign: SignArgs,
    /// The id that the node has or will have: 1 founds the cluster, the others join it with one that was never used.
    #[arg(long, value_parser = node_id)]
    id: NodeId,
    /// A host name or address by which others reach the node. May be repeated.
    #[arg(long)]
    host: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct ClientArgs {
    #[command(flatten)]
    sign: SignArgs,
    /// operator runs the cluster, writer and reader use its data, metrics watches it.
    #[arg(long, value_parser = client_role)]
    role: Role,
    /// Who this is: the name in the audit log.
    #[arg(long)]
    name: String,
}

pub(super) fn run(command: CertsCommand) -> Result<Done, Failure> {
    match command {
        CertsCommand::Init(args) => init(args),
        CertsCommand::Node(NodeArgs { sign, id, host }) => {
            let made = certs::issue(&sign.dir, Role::Node, &id.to_string(), &host, sign.days, sign.renew)?;
            let first = "pontoon node --dir D --listen HOST:PORT";
            let others = if id.get() == 1 { "" } else { " --join HOST:PORT" };
            let start = format!("{first}{others} {}", flags(&made, &sign.dir));
            issued(&made, sign.renew, &format!("start the node with it: {start}"))
        }
        CertsCommand::Client(ClientArgs { sign, role, name }) => {
            let made = certs::issue(&sign.dir, role, &name, &[], sign.days, sign.renew)?;
            let next = match role {
                Role::Metrics => format!(
                    "scrape with it: curl --cert {} --key {} --cacert {} https://HOST:PORT/metrics",
                    made.cert.display(),
                    made.key.display(),
                    sign.dir.join("ca.pem").display()
                ),
                _ => format!("use it: pontoon --addr HOST:PORT {} status", flags(&made, &sign.dir)),
            };
            issued(&made, sign.renew, &next)
        }
        CertsCommand::Show { file } => show(&file),
    }
}

fn init(args: InitArgs) -> Result<Done, Failure> {
    let cluster = args.cluster.unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
    let made = certs::init(&args.dir, &cluster, args.days)?;
    let dir = args.dir.display();
    Ok(Done::new(
        format!(
            "the authority of the cluster {cluster} is {} (key {}: keep it away from the nodes)\n\
             next: `pontoon certs node --dir {dir} --id 1 --host HOST`, and \
             `pontoon certs client --dir {dir} --role operator --name NAME`",
            made.cert.display(),
            made.key.display()
        ),
        json!({ "cluster": cluster, "cert": made.cert, "key": made.key }),
    ))
}

fn issued(made: &Made, renewed: bool, next: &str) -> Result<Done, Failure> {
    let shown = certs::show(&made.cert)?;
    let subject = shown.subject.map(|subject| subject.to_string()).unwrap_or_default();
    let next = match renewed {
        true => "who uses it takes it up by itself, a running node within seconds",
        false => next,
    };
    Ok(Done::new(
        format!(
            "{} speaks for {subject} until {} (key {})\nnext: {next}",
            made.cert.display(),
            shown.not_after,
            made.key.display()
        ),
        json!({ "subject": subject, "not_after": shown.not_after, "cert": made.cert, "key": made.key }),
    ))
}

fn flags(made: &Made, dir: &Path) -> String {
    let (cert, key, ca) = (made.cert.display(), made.key.display(), dir.join("ca.pem"));
    format!("--tls-cert {cert} --tls-key {key} --tls-ca {}", ca.display())
}

fn show(file: &Path) -> Result<Done, Failure> {
    let shown = certs::show(file)?;
    let speaks_for = match (&shown.subject, shown.authority) {
        (Some(subject), _) => subject.to_string(),
        (None, true) => "nobody: it is an authority".to_owned(),
        (None, false) => "nobody: it names no role".to_owned(),
    };
    let left = match shown.days_left {
        ..0 => "expired".to_owned(),
        days => format!("{days} days left"),
    };
    let role = shown.subject.as_ref().map(|subject| subject.role.name());
    let row = |name: &str, value: &str| vec![name.to_owned(), value.to_owned()];
    let mut rows = vec![
        row("speaks for", &speaks_for),
        row("role", role.unwrap_or("-")),
        row("valid from", &shown.not_before),
        row("valid until", &format!("{} ({left})", shown.not_after)),
        row("serial", &shown.serial),
    ];
    if !shown.hosts.is_empty() {
        rows.insert(2, row("hosts", &shown.hosts.join(", ")));
    }
    let json = json!({
        "subject": shown.subject.map(|subject| subject.to_string()),
        "role": role,
        "authority": shown.authority,
        "hosts": shown.hosts,
        "not_before": shown.not_before,
        "not_after": shown.not_after,
        "days_left": shown.days_left,
        "serial": shown.serial,
    });
    Ok(Done {
        text: table(&["certificate", &file.display().to_string()], &rows),
        json,
        code: u8::from(shown.days_left < 0),
    })
}

fn client_role(text: &str) -> Result<Role, String> {
    match text.parse()? {
        Role::Node => Err("`pontoon certs node` makes those of nodes".to_owned()),
        role => Ok(role),
    }
}

impl From<CertsError> for Failure {
    fn from(error: CertsError) -> Self {
        let code = match error {
            CertsError::Exists { .. } | CertsError::Missing { .. } | CertsError::Invalid(_) => Self::REFUSED,
            _ => Self::ERROR,
        };
        Failure { code, text: error.to_string() }
    }
}
