//! Compiles the wire messages with a pure-Rust compiler: no protoc on the machine.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = [
        "schema/entry.proto",
        "schema/peer.proto",
        "schema/meta.proto",
        "schema/command.proto",
        "schema/data.proto",
        "schema/admin.proto",
    ];
    for file in files {
        println!("cargo:rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["schema"])?;
    prost_build::Config::new().bytes(["."]).btree_map(["."]).compile_fds(descriptors)?;
    Ok(())
}
