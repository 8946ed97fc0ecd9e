//! Compiles the services over the messages of pontoon-proto, and the descriptors that reflection serves.

use std::{env, error::Error, fs, path::PathBuf};

fn main() -> Result<(), Box<dyn Error>> {
    let schema = PathBuf::from("../proto/schema");
    println!("cargo:rerun-if-changed={}", schema.display());
    let mut files = Vec::new();
    for entry in fs::read_dir(&schema)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "proto") {
            files.push(path);
        }
    }
    files.sort();

    let descriptors = protox::compile(&files, [&schema])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("pontoon.descriptors.bin"), prost::Message::encode_to_vec(&descriptors))?;
    tonic_prost_build::configure()
        .extern_path(".pontoon.v1", "::pontoon_proto::v1")
        .bytes(".")
        .compile_fds(descriptors)?;
    Ok(())
}
