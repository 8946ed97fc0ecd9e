//! `pontoon completions`, `pontoon man`: what a package installs beside the binary, made from the commands themselves.

use std::{fs, path::Path};

use clap_complete::Shell;
use serde_json::json;

use super::{Done, Failure, command};

/// The script by which a shell completes `pontoon`.
pub(super) fn completions(shell: Shell) -> Done {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "pontoon", &mut script);
    let script = String::from_utf8_lossy(&script).trim_end().to_owned();
    Done::new(script.clone(), json!({ "shell": shell.to_string(), "script": script }))
}

/// Writes a manual page for each command.
pub(super) fn man(dir: &Path) -> Result<Done, Failure> {
    let failed = |error: std::io::Error| Failure::error(format!("{}: {error}", dir.display()));
    fs::create_dir_all(dir).map_err(failed)?;
    clap_mangen::generate_to(command().disable_help_subcommand(true), dir).map_err(failed)?;
    let mut pages = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
        pages.extend((name.starts_with("pontoon") && name.ends_with(".1")).then_some(name));
    }
    pages.sort_unstable();
    let text = format!("{} pages are in {}", pages.len(), dir.display());
    Ok(Done::new(text, json!({ "dir": dir.display().to_string(), "pages": pages })))
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn each_shell_completes_commands_and_flags() {
        for shell in Shell::value_variants() {
            let script = completions(*shell).text;
            for word in ["pontoon", "decommission", "advertise", "finalise"] {
                assert!(script.contains(word), "{shell}: no {word}");
            }
        }
    }

    #[test]
    fn each_command_has_a_page_with_its_examples() {
        let dir = tempfile::tempdir().unwrap();
        let done = man(dir.path()).unwrap();
        let pages = done.json["pages"].as_array().unwrap().len();
        assert!(pages > 50, "{pages}");
        let page = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
        assert!(page("pontoon.1").contains("Exit codes"));
        let node = page("pontoon-node.1");
        assert!(node.contains(".SH OPTIONS") && node.contains("zone=a") && node.contains("snapshot"));
        assert!(page("pontoon-move-start.1").contains("Examples"));
        assert!(!node.contains("end\\-with\\-parent"), "what is hidden stays so");
    }
}
