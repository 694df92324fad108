//! What a template adds to the command line of its kernel, as template-svc and nodes must agree on it.

/// The longest there may be, in bytes.
pub const LONGEST: usize = 512;

/// Words for a kernel, none of which is the node's; divided by single spaces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelArguments(String);

/// Text that no template may add.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MalformedArguments {
    /// Too much.
    #[error("must be at most {LONGEST} bytes")]
    TooLong,
    /// Something a kernel would not read as a part of a word, or as we do.
    #[error("must be printable ASCII without quotes; {0:?} is not")]
    Character(char),
    /// A word that is not theirs to say.
    #[error("must not have `{word}`: {why}")]
    Refused {
        /// Which.
        word: String,
        /// Why not.
        why: &'static str,
    },
}

/// Names of parameters that are refused, and why; one that ends with a star stands for all that begin so: some of the kernel's take whatever follows
/// (`obsolete_checksetup` of init/main.c). Their meaning is in
/// Documentation/admin-guide/kernel-parameters.txt of Linux.
const REFUSED: [(&[&str], &str); 9] = [
    (
        &["root", "rootfstype", "rootflags", "rootwait", "rootdelay"],
        "the root is the template's image, which envd mounts",
    ),
    (
        &["init", "rdinit", "initrd", "noinitrd*", "initrdmem"],
        "a guest begins with envd, out of the node's initial RAM disk",
    ),
    (
        &["console", "earlycon", "earlyprintk", "8250.*"],
        "the console is the node's, which may have none",
    ),
    (
        &["panic", "reboot"],
        "by how a guest ends its node knows that it has",
    ),
    (
        &["mem", "memmap", "highmem", "crashkernel"],
        "memory is as large as the session says, and laid out by the node",
    ),
    (
        &["maxcpus", "nr_cpus", "possible_cpus", "nosmp"],
        "CPUs are as many as the session says",
    ),
    (
        &[
            "acpi*",
            "pci",
            "apic",
            "noapic",
            "nolapic",
            "virtio_mmio.*",
            "i8042.*",
        ],
        "devices are found where the node has put them",
    ),
    (
        &[
            "clocksource",
            "tsc",
            "notsc*",
            "tsc_early_khz",
            "lpj",
            "no_timer_check*",
            "no_kvmclock",
            "random.*",
        ],
        "clock and entropy are the node's: guests are copies that go on elsewhere and later",
    ),
    (
        &["module_blacklist", "initcall_blacklist", "nomodule"],
        "a guest does not start without its drivers",
    ),
];

/// Also in front of `init`'s own arguments.
const FOR_INIT: &str = "what begins with a dash is for init, which is envd";

impl KernelArguments {
    /// Reads words divided by spaces.
    pub fn parse(text: &str) -> Result<Self, MalformedArguments> {
        if text.len() > LONGEST {
            return Err(MalformedArguments::TooLong);
        }
        // Between quotes spaces would be a part of the word.
        let is_good = |c: &char| matches!(c, ' '..='~') && *c != '"';
        if let Some(character) = text.chars().find(|c| !is_good(c)) {
            return Err(MalformedArguments::Character(character));
        }
        let words: Vec<&str> = text.split(' ').filter(|word| !word.is_empty()).collect();
        for word in &words {
            if let Some(why) = refused(word) {
                let word = (*word).to_owned();
                return Err(MalformedArguments::Refused { word, why });
            }
        }
        Ok(Self(words.join(" ")))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Puts them behind a node's own words.
    pub fn after(&self, own: String) -> String {
        if self.0.is_empty() {
            own
        } else {
            format!("{own} {}", self.0)
        }
    }
}

fn refused(word: &str) -> Option<&'static str> {
    if word.starts_with('-') {
        return Some(FOR_INIT);
    }
    let name = word.split('=').next().unwrap_or_default();
    // To the kernel both are one (`parameq` of kernel/params.c).
    let name = name.replace('-', "_");
    let is_meant = |refused: &&str| match refused.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == **refused,
    };
    let found = REFUSED
        .iter()
        .find(|(names, _)| names.iter().any(&is_meant));
    found.map(|(_, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_kept_in_order() {
        let parsed = KernelArguments::parse("  mitigations=off  sandmesh.test=1 quiet ").unwrap();
        assert_eq!(parsed.as_str(), "mitigations=off sandmesh.test=1 quiet");
        assert_eq!(
            parsed.after("panic=-1".into()),
            "panic=-1 mitigations=off sandmesh.test=1 quiet"
        );
        assert_eq!(
            KernelArguments::parse(&"x".repeat(LONGEST)).map(drop),
            Ok(())
        );
        let none = KernelArguments::parse(" ").unwrap();
        assert_eq!(none, KernelArguments::default());
        assert_eq!(none.after("panic=-1".into()), "panic=-1");
    }

    /// Whichever way it is written, no template takes over what its node says, or keeps its guest from starting.
    #[test]
    fn what_is_the_nodes_is_refused() {
        for text in [
            "root=/dev/vda",
            "init=/bin/sh",
            "rdinit=/bin/sh",
            "console=tty0",
            "panic=0",
            "reboot=t",
            "initrd=x",
            "quiet -- x",
            "--serve",
            "mem=64M",
            "memmap=1M$2M",
            "tsc-early-khz=1",
            "tsc_early-khz=1",
            "acpi=off",
            "virtio_mmio.device=4K@0xd0000000:5",
            "virtio-mmio.device=4K@0xd0000000:5",
            "nosmp",
        ] {
            let refused = KernelArguments::parse(text).unwrap_err();
            assert!(
                matches!(refused, MalformedArguments::Refused { .. }),
                "{text}"
            );
        }
        // The kernel would take the quotes away.
        for (text, character) in [
            ("\"root=/dev/vda\"", '"'),
            ("a\tinit=/bin/sh", '\t'),
            ("a\nb", '\n'),
            ("é", 'é'),
            ("a\0", '\0'),
        ] {
            let refused = KernelArguments::parse(text);
            assert_eq!(refused, Err(MalformedArguments::Character(character)));
        }
        let long = KernelArguments::parse(&"x ".repeat(LONGEST));
        assert_eq!(long, Err(MalformedArguments::TooLong));
        let said = KernelArguments::parse("a root=x").unwrap_err().to_string();
        assert_eq!(
            said,
            "must not have `root=x`: the root is the template's image, which envd mounts"
        );
    }
}
