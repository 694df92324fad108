//! `sandmesh kernel`: kernels that templates can be built with, for operators of this machine's deployment.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::Subcommand;
use proto::template::v1::{
    DeleteKernelRequest, ImportKernelRequest, Kernel, ListKernelsRequest,
    kernel_service_client::KernelServiceClient, template_service_client::TemplateServiceClient,
};
use tempfile::TempDir;
use template_svc::kernel::{self, LARGEST_KERNEL, Tree};

use super::template::{as_operator, upload};
use crate::{
    context::{Context, said},
    output,
};

const VMLINUX: &str = "vmlinux";
const MODULES: &str = "modules.cpio";
const LONGEST_NAME: usize = 63;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Take a kernel in, if guests can boot it; under a name that is known, builds get it from then on
    Import {
        /// The kernel: a vmlinux or a bzImage, such as /boot/vmlinuz-VERSION.
        kernel: PathBuf,
        /// Its modules: lib/modules/VERSION as depmod leaves it, or the folder in which that lies.
        #[arg(long, value_name = "DIR")]
        modules: PathBuf,
        /// What builds are to name it by. Default: the version it says itself, with `-` for what no name has.
        #[arg(long)]
        name: Option<String>,
        /// Its version, for people. Default: what it says itself.
        #[arg(long, default_value = "")]
        version: String,
    },
    /// List them
    List,
    /// Remove a name; templates that were built with it keep the kernel
    Delete {
        /// Which.
        name: String,
    },
}

pub(crate) async fn run(context: &Context, command: Command) -> anyhow::Result<()> {
    let operator = as_operator(context)?;
    let mut kernels = KernelServiceClient::new(operator.clone());
    match command {
        Command::Import {
            kernel,
            modules,
            name,
            version,
        } => {
            let spinner = output::spinner("looking at the kernel");
            let looked = tokio::task::spawn_blocking(move || prepare(&kernel, &modules)).await;
            spinner.finish_and_clear();
            let (files, release) = looked??;
            let mut templates = TemplateServiceClient::new(operator);
            let request = ImportKernelRequest {
                name: name.unwrap_or_else(|| name_of(&release)),
                kernel: upload(&mut templates, &files.path().join(VMLINUX)).await?,
                modules: upload(&mut templates, &files.path().join(MODULES)).await?,
                version,
            };
            let answer = kernels.import_kernel(request).await.map_err(said)?;
            let kernel = answer.into_inner().kernel;
            output::print(
                context.format(),
                "sandmesh.template.v1.Kernel",
                kernel.context("the kernel was not answered")?,
                |kernel| println!("{}", kernel.name),
            )?;
        }
        Command::List => {
            let answer = kernels.list_kernels(ListKernelsRequest {}).await;
            output::print(
                context.format(),
                "sandmesh.template.v1.ListKernelsResponse",
                answer.map_err(said)?.into_inner(),
                |answer| {
                    let columns = ["kernel", "version", "for", "size", "imported"];
                    output::table(&columns, answer.kernels.into_iter().map(row).collect());
                },
            )?;
        }
        Command::Delete { name } => {
            let answer = kernels.delete_kernel(DeleteKernelRequest { name }).await;
            output::print(
                context.format(),
                "sandmesh.template.v1.DeleteKernelResponse",
                answer.map_err(said)?.into_inner(),
                |_| println!("deleted"),
            )?;
        }
    }
    Ok(())
}

/// A name for the kernel of a release.
fn name_of(release: &str) -> String {
    let of = |c: char| match c.to_ascii_lowercase() {
        c @ ('a'..='z' | '0'..='9' | '.' | '_' | '-') => c,
        _ => '-',
    };
    release.chars().map(of).take(LONGEST_NAME).collect()
}

fn row(kernel: Kernel) -> Vec<String> {
    let sizes = [kernel.kernel, kernel.modules].into_iter().flatten();
    let size = sizes.map(|artifact| artifact.size_bytes).sum();
    vec![
        kernel.name,
        kernel.version,
        kernel.architecture,
        output::bytes(size),
        output::time(kernel.create_time),
    ]
}

/// Makes of a kernel and its modules what guests boot: a folder with both, and the kernel's release. Blocking.
fn prepare(image: &Path, modules: &Path) -> anyhow::Result<(TempDir, String)> {
    let shown = || image.display().to_string();
    let file = File::open(image).with_context(shown)?;
    let image = kernel::bounded(file, "the kernel", LARGEST_KERNEL).with_context(shown)?;
    let vmlinux = kernel::vmlinux(&image).with_context(shown)?;
    let release = kernel::release(&vmlinux).with_context(shown)?;
    let archive = Tree::read(modules, &release)?.pack()?;
    let files = tempfile::tempdir()?;
    std::fs::write(files.path().join(VMLINUX), vmlinux)?;
    std::fs::write(files.path().join(MODULES), archive)?;
    Ok((files, release))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_become_names() {
        for (release, name) in [
            ("6.1.0-57-cloud-amd64", "6.1.0-57-cloud-amd64"),
            ("6.12.41+deb13-amd64", "6.12.41-deb13-amd64"),
            ("5.15-WSL2", "5.15-wsl2"),
        ] {
            assert_eq!(name_of(release), name);
            assert!(template_svc::names::is_name(name));
        }
        assert_eq!(name_of(&"x".repeat(100)).len(), LONGEST_NAME);
    }
}
