//! Compiles the `.proto` files in pure Rust (protox), so that no system `protoc` is needed.

use std::{env, error::Error, fs, path::PathBuf};

use prost::Message as _;

const FILES: [&str; 8] = [
    "sandmesh/session/v1/session.proto",
    "sandmesh/key/v1/key.proto",
    "sandmesh/template/v1/template.proto",
    "sandmesh/node/v1/node.proto",
    "sandmesh/envd/v1/process.proto",
    "sandmesh/envd/v1/filesystem.proto",
    "sandmesh/envd/v1/port.proto",
    "sandmesh/envd/v1/system.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    for file in FILES {
        println!("cargo:rerun-if-changed={file}");
    }
    let mut compiler = protox::Compiler::new(["."])?;
    compiler.include_imports(true).include_source_info(true);
    compiler.open_files(FILES)?;
    let descriptors = compiler.file_descriptor_set();

    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(
        out.join("sandmesh.bin"),
        compiler.encode_file_descriptor_set(),
    )?;
    tonic_prost_build::configure()
        .bytes(".sandmesh.envd.v1.ProcessOutput.data")
        .bytes(".sandmesh.envd.v1.ReadResponse.data")
        .bytes(".sandmesh.envd.v1.WriteRequest.data")
        .bytes(".sandmesh.envd.v1.ForwardRequest.data")
        .bytes(".sandmesh.envd.v1.ForwardResponse.data")
        .bytes(".sandmesh.envd.v1.SendInputRequest.data")
        .bytes(".sandmesh.envd.v1.ExportLayerResponse.data")
        .bytes(".sandmesh.node.v1.ExportSessionResponse.data")
        .bytes(".sandmesh.node.v1.MakeTemplateSnapshotResponse.output")
        .bytes(".sandmesh.template.v1.UploadSourceRequest.data")
        .bytes(".sandmesh.template.v1.UploadFilesRequest.data")
        .bytes(".sandmesh.template.v1.FetchArtifactResponse.data")
        .skip_debug([
            ".sandmesh.template.v1.RegistryLogin",
            ".sandmesh.template.v1.BuildSecret",
        ])
        .build_transport(false)
        .compile_fds(descriptors)?;

    // A guest must not learn the shape of what is behind the node, so envd reflects on its own package only.
    let mut envd_only = prost_types::FileDescriptorSet::default();
    let all = prost_types::FileDescriptorSet::decode(&*compiler.encode_file_descriptor_set())?;
    for file in all.file {
        if file.package().starts_with("google.") || file.package() == "sandmesh.envd.v1" {
            envd_only.file.push(file);
        }
    }
    fs::write(out.join("envd.bin"), envd_only.encode_to_vec())?;
    Ok(())
}
