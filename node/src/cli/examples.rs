//! Examples of each command, shown by its `--help` and in its manual page. A test parses every one of them.

use clap::Command;

/// By the words of the command. What follows a `#` is said about it.
const EXAMPLES: &[(&str, &[&str])] = &[
    (
        "demo",
        &["pontoon demo", "pontoon demo --size small --json", "pontoon demo --data films.rdf.gz --keep"],
    ),
    (
        "node",
        &[
            "pontoon node --dir n1 --listen 127.0.0.1:7400",
            "pontoon node --dir n2 --listen 127.0.0.1:7401 --join 127.0.0.1:7400 --label zone=a",
            "pontoon node --config /etc/pontoon/pontoon.toml",
        ],
    ),
    ("config default", &["pontoon config default"]),
    ("config check", &["pontoon config check /etc/pontoon/pontoon.toml"]),
    ("load", &["pontoon load films.rdf.gz", "pontoon load films.nq --skip-bad 10"]),
    ("backup", &["pontoon backup /backups", "pontoon backup films.tar --predicate name,genre"]),
    ("backup list", &["pontoon backup list /backups"]),
    ("backup prune", &["pontoon backup prune /backups --keep 7 --dry-run"]),
    ("backup verify", &["pontoon backup verify /backups"]),
    ("verify", &["pontoon verify /backups", "pontoon verify films.tar --deep"]),
    ("restore", &["pontoon restore /backups", "pontoon restore films.tar --predicate name --as name2"]),
    ("export", &["pontoon export films.nq.gz", "pontoon export names.nq --predicate name"]),
    ("engine status", &["pontoon engine status"]),
    ("engine switch", &["pontoon engine switch sled --node n1,n2"]),
    ("get", &["pontoon get name _:film.1", "pontoon get name film/1 --max-lag 2s"]),
    ("put", &["pontoon put name film/1 Metropolis"]),
    ("delete", &["pontoon delete name film/1"]),
    (
        "cas",
        &["pontoon cas name film/1 --absent Metropolis", "pontoon cas name film/1 --expect Metropolis M"],
    ),
    ("scan", &["pontoon scan name --prefix film/ --limit 20"]),
    ("log create", &["pontoon log create events --replicas 3"]),
    ("log drop", &["pontoon log drop events"]),
    ("log list", &["pontoon log list"]),
    (
        "log append",
        &["pontoon log append events one two", "pontoon log append events --expect-offset 12 three"],
    ),
    ("log read", &["pontoon log read events --from 0 --limit 10"]),
    ("log tail", &["pontoon log tail events --from 0"]),
    ("log truncate", &["pontoon log truncate events --below 1000"]),
    ("log reset", &["pontoon log reset events --at 0"]),
    ("log mirror", &["pontoon log mirror events --from-cluster 127.0.0.1:8400"]),
    ("status", &["pontoon status", "pontoon status --problems --json"]),
    ("nodes", &["pontoon nodes"]),
    ("predicates", &["pontoon predicates --json"]),
    ("predicate create", &["pontoon predicate create name --replicas 3"]),
    ("predicate drop", &["pontoon predicate drop name"]),
    ("decommission", &["pontoon decommission n3"]),
    ("recover plan", &["pontoon recover plan --lost n2,n3 --json"]),
    ("recover apply", &["pontoon recover apply plan.json"]),
    ("recover verify", &["pontoon recover verify plan.json"]),
    ("groups", &["pontoon groups", "pontoon groups --problem"]),
    (
        "move start",
        &[
            "pontoon move start name --from 1 --to 4 --dry-run",
            "pontoon move start name --to 4 --learner",
            "pontoon move start name --from 4 --remove",
        ],
    ),
    ("move list", &["pontoon move list --all"]),
    ("move watch", &["pontoon move watch 1"]),
    ("move cancel", &["pontoon move cancel 1"]),
    ("rules show", &["pontoon rules show"]),
    ("rules set", &["pontoon rules set rules.toml"]),
    ("rules check", &["pontoon rules check rules.toml"]),
    ("drain", &["pontoon drain n2 --wait", "pontoon drain n2 --cancel"]),
    ("rebalance plan", &["pontoon rebalance plan --by bytes"]),
    ("rebalance apply", &["pontoon rebalance apply 0e19fe5d"]),
    ("explain", &["pontoon explain name", "pontoon explain name --node 3"]),
    ("events", &["pontoon events --follow"]),
    ("debug bundle", &["pontoon debug bundle b.tar.gz"]),
    ("debug group", &["pontoon debug group 7"]),
    (
        "debug profile",
        &["pontoon debug profile --node n2", "pontoon debug profile --heap --seconds 30 --out stacks.txt"],
    ),
    ("certs init", &["pontoon certs init --dir certs --cluster films"]),
    ("certs node", &["pontoon certs node --dir certs --id 1 --host db1.example.com --host 127.0.0.1"]),
    ("certs client", &["pontoon certs client --dir certs --role operator --name ann"]),
    ("certs show", &["pontoon certs show certs/node-1.pem"]),
    ("audit", &["pontoon audit --follow", "pontoon audit --dir n1 --limit 20"]),
    ("upgrade status", &["pontoon upgrade status"]),
    ("upgrade finalise", &["pontoon upgrade finalise 2"]),
    ("version", &["pontoon version --json"]),
    ("completions", &["pontoon completions bash", "pontoon completions zsh"]),
    ("man", &["pontoon man /usr/local/share/man/man1"]),
    ("bench", &["pontoon bench", "pontoon bench --json"]),
    ("bench move", &["pontoon bench move"]),
    ("wal stat", &["pontoon wal stat n1"]),
    ("wal dump", &["pontoon wal dump n1 --group 7 --payload text"]),
    ("wal verify", &["pontoon wal verify n1"]),
    ("wal repair", &["pontoon wal repair n1 --write n1-repaired"]),
    ("wal key new", &["pontoon wal key new keys"]),
    ("wal key rotate", &["pontoon wal key rotate keys"]),
];

/// Adds its examples to each command.
pub(super) fn add(command: Command) -> Command {
    add_at(command, "")
}

fn add_at(command: Command, path: &str) -> Command {
    let found = EXAMPLES.iter().find(|(words, _)| *words == path);
    let mut command = match found {
        Some((_, examples)) => {
            let lines: String = examples.iter().map(|example| format!("\n  {example}")).collect();
            let heading = if examples.len() == 1 { "Example" } else { "Examples" };
            command.after_help(format!("{heading}:{lines}"))
        }
        None => command,
    };
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    for name in names {
        let below = if path.is_empty() { name.clone() } else { format!("{path} {name}") };
        command = command.mut_subcommand(&name, |sub| add_at(sub, &below));
    }
    command
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::Cli;

    /// Each command that does something, by its words.
    fn leaves(command: &Command, path: &str, found: &mut BTreeSet<String>) {
        for sub in command.get_subcommands() {
            let path = format!("{path} {}", sub.get_name()).trim().to_owned();
            if !sub.is_subcommand_required_set() {
                found.insert(path.clone());
            }
            leaves(sub, &path, found);
        }
    }

    #[test]
    fn every_command_has_examples_and_each_is_understood() {
        let mut found = BTreeSet::new();
        leaves(&Cli::command(), "", &mut found);
        let with: BTreeSet<String> = EXAMPLES.iter().map(|(words, _)| (*words).to_owned()).collect();
        assert_eq!(found, with);
        for (words, examples) in EXAMPLES {
            for example in *examples {
                assert!(example.starts_with(&format!("pontoon {words}")), "{example}");
                let parsed = Cli::try_parse_from(example.split(' '));
                assert!(parsed.is_ok(), "{example}: {}", parsed.unwrap_err());
            }
        }
    }

    #[test]
    fn every_command_and_every_flag_says_what_it_is() {
        fn check(command: &Command, path: &str, silent: &mut Vec<String>) {
            let path = format!("{path} {}", command.get_name());
            if command.get_about().is_none() {
                silent.push(path.clone());
            }
            let args = command.get_arguments().filter(|arg| !arg.is_hide_set() && arg.get_help().is_none());
            silent.extend(args.map(|arg| format!("{path} {}", arg.get_id())));
            command.get_subcommands().for_each(|sub| check(sub, &path, silent));
        }
        let mut silent = Vec::new();
        check(&Cli::command(), "", &mut silent);
        assert!(silent.is_empty(), "without a word: {silent:#?}");
    }
}
