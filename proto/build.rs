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
    prost_build::Config::new()
        .bytes(["."])
        .btree_map(["."])
        // Seldom there, and every group of a node holds a mark or two.
        .boxed(".pontoon.v1.Mark.switched_conf")
        .compile_fds(descriptors)?;
    Ok(())
}
