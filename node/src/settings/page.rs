//! The default file and the reference page, both made from the table.

use std::fmt::Write;

use super::table::{Kind, Setting, TABLE};

/// Comments are broken at this column.
const WIDTH: usize = 100;

fn table_of(setting: &Setting) -> &'static str {
    match (setting.kind, setting.key.split_once('.')) {
        (Kind::Labels, _) => setting.key,
        (_, Some((table, _))) => table,
        (_, None) => "",
    }
}

fn name_of(setting: &Setting) -> &'static str {
    setting.key.split_once('.').map_or(setting.key, |(_, name)| name)
}

fn written(setting: &Setting) -> String {
    match (setting.kind, setting.key, setting.default) {
        (Kind::Labels, ..) => "zone = \"a\"".to_owned(),
        (Kind::Number | Kind::Share | Kind::Switch, _, default) => {
            format!("{} = {default}", name_of(setting))
        }
        // What has no default gets an example.
        (_, "dir", _) => "dir = \"data\"".to_owned(),
        (_, "listen", _) => "listen = \"127.0.0.1:7400\"".to_owned(),
        (_, "disk.reserve", _) => "reserve = \"512MiB\"".to_owned(),
        (_, _, default) => format!("{} = {default:?}", name_of(setting)),
    }
}

/// A configuration file that says everything and changes nothing: every setting is there as a comment, with its default, but for the two
/// that have none.
pub fn default_file() -> String {
    let mut text = String::from(
        "# The configuration of a node: `pontoon node --config FILE`. Variables of the environment win over this file, and flags\n\
         # over both. A setting that is commented out has the value that stands there; an empty one is found at the start.\n",
    );
    let mut table = "";
    for setting in TABLE {
        if table_of(setting) != table {
            table = table_of(setting);
            let _ = write!(text, "\n[{table}]\n");
        }
        text.push('\n');
        for line in broken(setting.help) {
            let _ = writeln!(text, "# {line}");
        }
        let comment = if setting.needed { "" } else { "#" };
        let _ = writeln!(text, "{comment}{}", written(setting));
    }
    text
}

fn broken(text: &str) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.len() - 1;
        match lines[last].len() + word.len() < WIDTH {
            true if lines[last].is_empty() => lines[last].push_str(word),
            true => {
                let _ = write!(lines[last], " {word}");
            }
            false => lines.push(word.to_owned()),
        }
    }
    lines
}

/// The page `docs/configuration.md`.
pub fn reference() -> String {
    let mut text = String::from(
        "# Configuration\n\n\
         <!-- Made from the code: REWRITE=1 cargo test -p pontoon-node --test pages -->\n\n\
         A node is configured by a TOML file (`pontoon node --config FILE`, or `PONTOON_CONFIG`), by variables of the environment and by\n\
         flags; the later one wins. `pontoon config default` prints a file with every setting, `pontoon config check FILE` reads one and says\n\
         what is in force and who said so. A setting that does not exist is refused with the nearest that does, a bad value with the line.\n\n\
         Sizes are a number of bytes or one with KiB, MiB, GiB or TiB; times have ms, s, m or h. Every setting has a variable, and a flag of\n\
         its own or `--set KEY=VALUE`. No setting is a secret: keys are named by their files. `--replace NODE` takes the place of a lost node\n\
         and is for one start only, so it is a flag and no setting.\n",
    );
    let mut table = "nothing yet";
    for setting in TABLE {
        if table_of(setting) != table {
            table = table_of(setting);
            let _ = match table {
                "" => write!(text, "\n## At the top\n"),
                table => write!(text, "\n## [{table}]\n"),
            };
            text.push_str("\n| setting | kind | default | flag | variable | |\n|---|---|---|---|---|---|\n");
        }
        let code = |text: &str| if text.is_empty() { String::new() } else { format!("`{text}`") };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            code(setting.key),
            setting.kind.word(),
            if setting.needed { "must be set".to_owned() } else { code(setting.default) },
            code(setting.flag.unwrap_or_default()),
            code(&setting.variable()),
            setting.help.replace('|', "\\|"),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::Settings;
    use super::*;

    #[test]
    fn the_default_file_is_taken_and_so_is_each_line_of_it_without_its_comment() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("pontoon.toml");
        let mut settings = Settings::default();
        std::fs::write(&path, default_file()).unwrap();
        settings.file(&path).unwrap();
        settings.check().unwrap();
        let open: String = default_file()
            .lines()
            .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
            .filter(|line| !line.ends_with("= \"\""))
            .map(|line| format!("{line}\n"))
            .collect();
        std::fs::write(&path, open).unwrap();
        let mut settings = Settings::default();
        settings.file(&path).unwrap();
        settings.check().unwrap();
        let said = settings
            .in_force()
            .iter()
            .filter(|setting| setting.origin != super::super::Origin::Default)
            .count();
        let given = TABLE.iter().filter(|setting| setting.needed || !setting.default.is_empty()).count();
        assert!(said >= given, "{said} of {given} stand in it");
    }
}
