//! Kernels that guests can boot: what one must be, and the modules that go with it. Whoever imports one looks at it by this, and template-svc
//! again, since it believes nobody.
//!
//! ```text
//!   vmlinux | bzImage --vmlinux()--> ELF with a PVH entry --release()--> "6.1.0-57-cloud-amd64"
//!   lib/modules/RELEASE --Tree::read(), pack()--> /modules/NN-name.ko, in the order in which envd loads them
//! ```
//! A node puts envd behind the modules (`node-svc/src/guest_image.rs`), and boots the ELF directly, without firmware.

mod archive;
mod bzimage;
mod elf;
mod import;
mod modules;

use std::{
    fmt::Write as _,
    io::{self, Read},
    path::PathBuf,
};

pub use archive::check as check_modules;
pub use bzimage::vmlinux;
pub use elf::release;
pub use import::{ImportError, Imported, Importer};
pub use modules::{NEEDS, Need, Tree};

/// Bytes of a kernel, also unpacked. Distributions' have 30 to 80 MiB; it is debug information that has more.
pub const LARGEST_KERNEL: u64 = 256 << 20;
/// Bytes of its modules together: they lie in the memory of every guest while it boots.
pub const LARGEST_MODULES: u64 = 64 << 20;
/// As many as two digits number.
pub const MOST_MODULES: usize = 100;
/// What CPUs kernels are for.
pub const ARCHITECTURE: &str = "x86_64";

/// Guests cannot boot it.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Something else.
    #[error("it is neither an uncompressed kernel (vmlinux, an ELF file) nor a bzImage")]
    NotAKernel,
    /// Of before Linux 2.6.24.
    #[error("the bzImage has boot protocol {major}.{minor}, 2.08 or newer is needed")]
    Protocol {
        /// Before the dot.
        major: u8,
        /// After it.
        minor: u8,
    },
    /// Its header says what cannot be.
    #[error("the bzImage is cut short or damaged: {0}")]
    Image(&'static str),
    /// Nothing of ours unpacks it.
    #[error(
        "the bzImage is packed in a way that is not known; known are gzip, xz, zstd and lz4 (CONFIG_KERNEL_GZIP, _XZ, _ZSTD, _LZ4)"
    )]
    Compression,
    /// What is packed is damaged.
    #[error("{what} does not unpack: {cause}")]
    Unpack {
        /// Of what.
        what: String,
        /// Why.
        cause: io::Error,
    },
    /// More than anybody needs.
    #[error(
        "{what} has more than {most} bytes; debug information is not needed (strip --strip-debug)"
    )]
    TooLarge {
        /// What.
        what: String,
        /// How many there may be.
        most: u64,
    },
    /// No ELF file, or not all of one.
    #[error("the kernel is no whole ELF file: {0}")]
    Elf(object::read::Error),
    /// One that is no kernel, or one for other CPUs.
    #[error("the ELF file is no kernel for {ARCHITECTURE}: {0}")]
    NotBootable(&'static str),
    /// QEMU does not know where it begins.
    #[error(
        "the kernel has no PVH entry (the ELF note XEN_ELFNOTE_PHYS32_ENTRY), by which QEMU boots it: build it with CONFIG_PVH=y"
    )]
    NoPvh,
    /// It does not say which it is.
    #[error("the kernel does not say its version: there is no \"Linux version ...\" in it")]
    NoRelease,
    /// Its modules are others'.
    #[error(
        "{folder} is not of this kernel, {release}: it must be its lib/modules/{release}, or the folder in which that lies"
    )]
    Folder {
        /// What was given.
        folder: PathBuf,
        /// What the kernel says.
        release: String,
    },
    /// A list of modules is not there, as in a package that was unpacked only.
    #[error("{path} is missing: make it by `depmod -b ROOT {release}`")]
    NoDependencies {
        /// Where it was looked for.
        path: PathBuf,
        /// Of which kernel.
        release: String,
    },
    /// A file cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It has not what guests need.
    #[error("the kernel has neither built in nor as modules what guests need: {}", list(.0))]
    Missing(Vec<Need>),
    /// A module is none, or one for another kernel.
    #[error("module {name}: {why}")]
    Module {
        /// Its name.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// More than are numbered.
    #[error("guests need at most {MOST_MODULES} modules of a kernel, these are more")]
    TooManyModules,
    /// What should be the archive of modules is another.
    #[error("the archive of modules: {0}")]
    Archive(String),
}

fn list(needs: &[Need]) -> String {
    let mut text = String::new();
    for Need {
        module,
        option,
        what,
        ..
    } in needs
    {
        let comma = if text.is_empty() { "" } else { ", " };
        // A String takes everything.
        let _ = write!(text, "{comma}{module} ({option}: {what})");
    }
    text
}

/// All that is read, if that is no more than `most`.
pub fn bounded(source: impl Read, what: &str, most: u64) -> Result<Vec<u8>, KernelError> {
    let mut bytes = Vec::new();
    let read = source.take(most.saturating_add(1)).read_to_end(&mut bytes);
    read.map_err(|cause| KernelError::Unpack {
        what: what.to_owned(),
        cause,
    })?;
    if bytes.len() as u64 > most {
        return Err(KernelError::TooLarge {
            what: what.to_owned(),
            most,
        });
    }
    Ok(bytes)
}

/// A reader of xz; what it says of the memory it wants is not believed.
fn xz(packed: &[u8]) -> io::Result<impl Read> {
    /// `xz -9` wants 65 MiB.
    const MOST_MEMORY: u64 = 256 << 20;
    let stream = liblzma::stream::Stream::new_stream_decoder(MOST_MEMORY, 0)?;
    Ok(liblzma::read::XzDecoder::new_stream(packed, stream))
}

/// A reader of the first zstd frame.
fn zstd(packed: &[u8]) -> io::Result<impl Read> {
    Ok(::zstd::stream::read::Decoder::with_buffer(packed)?.single_frame())
}
