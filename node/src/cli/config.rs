//! `pontoon config`.

use std::path::PathBuf;

use clap::Subcommand;
use pontoon_node::settings::{Settings, default_file};
use serde_json::json;

use super::{Done, Failure, output::table};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print a file with every setting, its default and what it does.
    Default,
    /// Read a file, and say what is in force with it. Refused if anything in it is wrong.
    Check {
        /// The file.
        file: PathBuf,
    },
}

pub(super) fn run(command: ConfigCommand) -> Result<Done, Failure> {
    match command {
        ConfigCommand::Default => {
            let text = default_file();
            Ok(Done::new(text.trim_end(), json!({ "file": text })))
        }
        ConfigCommand::Check { file } => {
            let mut settings = Settings::default();
            settings.file(&file)?;
            settings.together()?;
            let all = settings.in_force();
            let rows: Vec<Vec<String>> = all
                .iter()
                .map(|setting| vec![setting.key.clone(), setting.value.clone(), setting.origin.to_string()])
                .collect();
            let json: Vec<_> = all
                .iter()
                .map(|setting| {
                    json!({ "key": setting.key, "value": setting.value, "from": setting.origin.to_string() })
                })
                .collect();
            Ok(Done::new(table(&["setting", "value", "from"], &rows), json!({ "settings": json })))
        }
    }
}
