//! Pages that are made from the code are what the code says. `REWRITE=1 cargo test -p pontoon-node --test pages` makes them anew.

use std::{fs, path::Path};

fn is_up_to_date(page: &str, made: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    if std::env::var_os("REWRITE").is_some() {
        fs::write(&path, made).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == made,
        "docs/{page} is stale: run `REWRITE=1 cargo test -p pontoon-node --test pages`, and commit what it changes"
    );
}

#[test]
fn the_page_of_settings_is_what_the_code_says() {
    is_up_to_date("configuration.md", &pontoon_node::settings::reference());
}

#[test]
fn the_page_of_metrics_is_what_the_code_says() {
    is_up_to_date("metrics.md", &pontoon_node::metrics::reference());
}
