//! Which Firecracker this is, and what it can do.

use std::fmt;

/// A version of Firecracker or its jailer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    release: (u32, u32, u32),
    text: String,
}

impl Version {
    /// What `--version` prints first: `Firecracker v1.10.1`, `Jailer v1.10.1`.
    pub fn parse(said: &str, program: &str) -> Option<Self> {
        let text = said
            .lines()
            .next()?
            .strip_prefix(program)?
            .trim_start()
            .strip_prefix('v')?
            .trim()
            .to_owned();
        // A build of one's own has more after the numbers: 1.14.0-dev, 1.10.1-5-gabcdef.
        let (numbers, _) = text.split_once(['-', '+']).unwrap_or((&text, ""));
        let mut numbers = numbers.splitn(3, '.').map(|number| number.parse().ok());
        let mut next = || numbers.next().flatten();
        let release = (next()?, next()?, next()?);
        Some(Self { release, text })
    }

    fn is_at_least(&self, major: u32, minor: u32) -> bool {
        (self.release.0, self.release.1) >= (major, minor)
    }

    /// Whether this driver knows how to talk to it: snapshots have a versioned format, and balloons can be restored.
    pub fn is_supported(&self) -> bool {
        self.is_at_least(1, 7)
    }

    /// Whether it describes its devices by ACPI, and has a VMGenID. Before, only the kernel's command line names them.
    pub fn has_acpi(&self) -> bool {
        self.is_at_least(1, 8)
    }

    /// Whether the load of a snapshot calls the noting of written pages `track_dirty_pages`.
    pub fn has_new_load_names(&self) -> bool {
        self.is_at_least(1, 13)
    }

    /// Whether its balloon can have free page reporting.
    pub fn has_free_page_reporting(&self) -> bool {
        self.is_at_least(1, 14)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_not_words() {
        let version = |text: &str| Version::parse(text, "Firecracker");
        let old = version("Firecracker v1.6.0\n\nSupported snapshot data format versions: 1.5.0\n");
        assert!(!old.unwrap().is_supported());
        let ten = version("Firecracker v1.10.1\n\n").unwrap();
        assert!(ten.is_supported() && ten.has_acpi() && !ten.has_free_page_reporting());
        assert_eq!(ten.to_string(), "1.10.1");
        let own = version("Firecracker v1.14.0-dev\n").unwrap();
        assert!(own.has_free_page_reporting() && own.has_new_load_names());
        assert!(
            version("Firecracker v2.0.0")
                .unwrap()
                .has_free_page_reporting()
        );
        for nonsense in [
            "",
            "Jailer v1.7.0",
            "Firecracker 1.7.0",
            "Firecracker v1.x.0",
            "Firecracker v1.7",
        ] {
            assert_eq!(version(nonsense), None, "{nonsense}");
        }
    }
}
