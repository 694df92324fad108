//! What a session's root has that its template has not, as a layer of an OCI image (layer.md of the OCI image specification, 1.1).
//!
//! That is what lies on the writable disk, above the template in the overlay: whatever was made or changed, and marks for what was removed
//! (overlayfs.rst, "whiteouts and opaque directories"). It is read below the overlay, by a mount of the disk that has no place in the tree.
//! Nobody may write meanwhile: processes are frozen ([`crate::snapshot`]).

use std::{
    collections::HashMap,
    ffi::{CStr, OsStr},
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use nix::sys::stat::{FileStat, SFlag, major, minor};
use rustix::{
    fs::{lgetxattr, llistxattr},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    },
};
use tar::{Builder, EntryType, Header};

use super::{
    archive,
    folder::{DEEPEST, Folder, MOST_LINKED, kind},
};
use crate::boot;

const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// What the overlay has to say of a file.
const OVERLAY: &[u8] = b"trusted.overlay.";
/// What envd writes for each session anew.
const OWN: [&str; 4] = [
    "etc/hostname",
    "etc/hosts",
    "etc/machine-id",
    "etc/resolv.conf",
];
/// Longest list of names, and longest value (xattr(7)).
const LONGEST_ATTRIBUTE: usize = 64 << 10;
/// In which st_blocks counts (stat(2)).
const BLOCK: i64 = 512;

/// Writes the layer. Blocking.
pub(crate) fn export(to: impl Write) -> io::Result<()> {
    let disk = disk()?;
    let upper = PathBuf::from(format!("/proc/self/fd/{}/upper", disk.as_raw_fd()));
    pack(&upper, to)
}

/// The writable disk, mounted once more where nobody else sees it.
fn disk() -> io::Result<OwnedFd> {
    let device = boot::scratch_disk()?;
    let context = fsopen("ext4", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", device.path().as_os_str().as_bytes())?;
    fsconfig_create(&context)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// Writes what an upper folder of an overlay has.
fn pack(upper: &Path, to: impl Write) -> io::Result<()> {
    let mut packing = Packing {
        sink: Builder::new(to),
        linked: HashMap::new(),
    };
    packing.folder(&Folder::open(upper)?, Path::new(""))?;
    packing.sink.into_inner()?.flush()
}

struct Packing<W: Write> {
    sink: Builder<W>,
    /// Files with several names, by device and inode.
    linked: HashMap<(u64, u64), PathBuf>,
}

/// An error that says of what it is.
#[derive(Debug, thiserror::Error)]
#[error("/{path}: {why}")]
struct Located {
    path: String,
    why: String,
}

fn failed(path: &Path, why: &str) -> io::Error {
    io::Error::other(Located {
        path: path.display().to_string(),
        why: why.to_owned(),
    })
}

impl<W: Write> Packing<W> {
    fn folder(&mut self, folder: &Folder, path: &Path) -> io::Result<()> {
        if path.components().count() > DEEPEST {
            return Err(failed(path, "more than 512 directories in each other"));
        }
        let mut names = folder.names()?;
        names.sort_unstable();
        for name in names {
            let path = path.join(&name);
            if OWN.iter().any(|own| Path::new(own) == path) {
                continue;
            }
            if name.as_bytes().starts_with(WHITEOUT) {
                let why = "a name that begins with .wh. means something else in a layer; rename it";
                return Err(failed(&path, why));
            }
            let stat = match folder.stat(&name) {
                // envd's own uploads may go on: what has gone is not there.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                stat => stat.map_err(|error| failed(&path, &error.to_string()))?,
            };
            self.entry(folder, &name, &path, &stat).map_err(|error| {
                // It may say already which.
                if matches!(error.get_ref(), Some(inner) if inner.is::<Located>()) {
                    error
                } else {
                    failed(&path, &error.to_string())
                }
            })?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        folder: &Folder,
        name: &OsStr,
        path: &Path,
        stat: &FileStat,
    ) -> io::Result<()> {
        let what = kind(stat);
        // A socket is of a program that will not run, and tar has no such entry; but what the template has in its place is not there.
        if what == SFlag::S_IFCHR && stat.st_rdev == 0 || what == SFlag::S_IFSOCK {
            let mark = [WHITEOUT, name.as_bytes()].concat();
            return self.mark(&path.with_file_name(OsStr::from_bytes(&mark)));
        }
        let identity = (stat.st_dev, stat.st_ino);
        if what != SFlag::S_IFDIR
            && let Some(original) = self.linked.get(&identity)
        {
            let mut header = header_of(stat, EntryType::Link);
            return self.sink.append_link(&mut header, path, original);
        }
        let is_opaque = self.attributes(folder, name, stat)?;
        match what {
            SFlag::S_IFREG => self.file(folder.file(name)?, path, stat)?,
            SFlag::S_IFDIR => {
                self.bare(header_of(stat, EntryType::Directory), path)?;
                if is_opaque {
                    self.mark(&path.join(OPAQUE))?;
                }
                return self.folder(&folder.folder(name)?, path);
            }
            SFlag::S_IFLNK => {
                let target = folder.link_target(name)?;
                let mut header = header_of(stat, EntryType::Symlink);
                archive::append_symlink(&mut self.sink, &mut header, path, &target)?;
            }
            SFlag::S_IFIFO => self.bare(header_of(stat, EntryType::Fifo), path)?,
            SFlag::S_IFCHR | SFlag::S_IFBLK => {
                let is_block = what == SFlag::S_IFBLK;
                let entry = if is_block {
                    EntryType::Block
                } else {
                    EntryType::Char
                };
                let mut header = header_of(stat, entry);
                let number = |number: u64| u32::try_from(number).map_err(io::Error::other);
                header.set_device_major(number(major(stat.st_rdev))?)?;
                header.set_device_minor(number(minor(stat.st_rdev))?)?;
                self.bare(header, path)?;
            }
            _ => return Err(failed(path, "is of an unknown kind")),
        }
        if stat.st_nlink > 1 && self.linked.len() < MOST_LINKED {
            self.linked.insert(identity, path.to_owned());
        }
        Ok(())
    }

    fn file(&mut self, mut file: File, path: &Path, stat: &FileStat) -> io::Result<()> {
        let size = u64::try_from(stat.st_size).unwrap_or_default();
        if stat.st_blocks * BLOCK < stat.st_size {
            // With its holes, as GNU tar has them.
            return self.sink.append_file(path, &mut file);
        }
        let mut header = header_of(stat, EntryType::Regular);
        header.set_size(size);
        self.sink
            .append_data(&mut header, path, archive::exactly(&file, size))
    }

    fn bare(&mut self, mut header: Header, path: &Path) -> io::Result<()> {
        self.sink.append_data(&mut header, path, io::empty())
    }

    /// A file that means something by its name.
    fn mark(&mut self, path: &Path) -> io::Result<()> {
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(0);
        self.bare(header, path)
    }

    /// Puts before an entry what its header has no room for; says whether a folder hides what is below it.
    fn attributes(&mut self, folder: &Folder, name: &OsStr, stat: &FileStat) -> io::Result<bool> {
        let place = Path::new("/proc/self/fd")
            .join(folder.as_fd().as_raw_fd().to_string())
            .join(name);
        let mut records: Vec<(String, Vec<u8>)> = Vec::new();
        if stat.st_mtime_nsec != 0 && stat.st_mtime >= 0 {
            let time = format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec);
            records.push(("mtime".into(), time.into_bytes()));
        }
        let mut is_opaque = false;
        for attribute in attributes_of(&place)? {
            let value = || value_of(&place, &attribute);
            let bytes = attribute.to_bytes();
            if let Some(own) = bytes.strip_prefix(OVERLAY) {
                match own {
                    b"opaque" => is_opaque = value()? == b"y",
                    b"redirect" | b"metacopy" => {
                        return Err(io::Error::other(
                            "the overlay has moved it, and only it knows where from",
                        ));
                    }
                    _ => {}
                }
                continue;
            }
            let name = attribute.to_str().ok().filter(|name| !name.contains('='));
            let name = name.ok_or_else(|| {
                io::Error::other("has an attribute whose name cannot be in a layer")
            })?;
            records.push((format!("SCHILY.xattr.{name}"), value()?));
        }
        if !records.is_empty() {
            let records = records.iter();
            self.sink.append_pax_extensions(
                records.map(|(key, value)| (key.as_str(), value.as_slice())),
            )?;
        }
        Ok(is_opaque)
    }
}

fn attributes_of(place: &Path) -> io::Result<Vec<std::ffi::CString>> {
    let mut names = vec![0; LONGEST_ATTRIBUTE];
    let length = match llistxattr(place, &mut names) {
        Err(Errno::OPNOTSUPP) => 0,
        listed => listed?,
    };
    names.truncate(length);
    let names = names.split_inclusive(|byte| *byte == 0);
    names
        .map(|name| {
            let name = CStr::from_bytes_with_nul(name).map_err(io::Error::other)?;
            Ok(name.to_owned())
        })
        .collect()
}

fn value_of(place: &Path, name: &CStr) -> io::Result<Vec<u8>> {
    let mut value = vec![0; LONGEST_ATTRIBUTE];
    let length = lgetxattr(place, name, &mut value)?;
    value.truncate(length);
    Ok(value)
}

fn header_of(stat: &FileStat, kind: EntryType) -> Header {
    let mut header = archive::header_of(stat);
    header.set_entry_type(kind);
    header
}

#[cfg(test)]
mod tests {
    use std::{
        collections::BTreeMap,
        fs,
        io::Read as _,
        os::unix::fs::{FileExt as _, PermissionsExt as _, symlink},
        thread,
    };

    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
        sys::stat::{Mode, makedev, mknod},
    };
    use rustix::fs::{XattrFlags, setxattr};

    use super::*;

    /// An overlay of the kernel's, changed by `change`, in a mount namespace of its own; the layer of its upper folder. Needs root.
    fn layer(change: impl FnOnce(&Path) + Send) -> io::Result<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name);
        let work = || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(none, "/", none, private, none).unwrap();
            // Another file system than that of the test may know no overlays.
            mount(
                Some("tmpfs"),
                folder.path(),
                Some("tmpfs"),
                MsFlags::empty(),
                none,
            )
            .unwrap();
            for name in [
                "lower/gone/below",
                "lower/kept",
                "lower/anew",
                "upper",
                "work",
                "root",
            ] {
                fs::create_dir_all(place(name)).unwrap();
            }
            for name in ["removed", "changed", "kept/there", "anew/old"] {
                fs::write(place("lower").join(name), "old").unwrap();
            }
            let of = |name: &str| place(name).display().to_string();
            let options = format!(
                "lowerdir={},upperdir={},workdir={}",
                of("lower"),
                of("upper"),
                of("work")
            );
            let (overlay, options) = (Some("overlay"), Some(options.as_str()));
            mount(overlay, &place("root"), overlay, MsFlags::empty(), options).unwrap();
            change(&place("root"));
            let mut layer = Vec::new();
            pack(&place("upper"), &mut layer).map(|()| layer)
        };
        thread::scope(|scope| scope.spawn(work).join().unwrap())
    }

    /// Kind and content of each entry, by name; the content of a link is where to.
    fn entries(layer: &[u8]) -> BTreeMap<String, (EntryType, Vec<u8>)> {
        let mut archive = tar::Archive::new(layer);
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().display().to_string();
            let mut content = Vec::new();
            if let Some(target) = entry.link_name_bytes() {
                content = target.into_owned();
            } else {
                entry.read_to_end(&mut content).unwrap();
            }
            (
                name.trim_end_matches('/').to_owned(),
                (entry.header().entry_type(), content),
            )
        });
        entries.collect()
    }

    /// Each is to stay as it is.
    fn targets() -> Vec<String> {
        let short = ["/nowhere", "/", "./a//b/", "..", "/a/../b/."].map(String::from);
        let long = ["../x", "a/./"].map(|part| part.repeat(30));
        short.into_iter().chain(long).collect()
    }

    #[test]
    fn what_was_made_changed_and_removed() {
        let long = "n".repeat(200);
        let packed = layer(|root| {
            fs::remove_file(root.join("removed")).unwrap();
            fs::remove_dir_all(root.join("gone")).unwrap();
            fs::remove_dir_all(root.join("anew")).unwrap();
            fs::create_dir(root.join("anew")).unwrap();
            fs::write(root.join("changed"), "new").unwrap();
            std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
            fs::create_dir(root.join(&long)).unwrap();
            fs::write(root.join(&long).join(&long), "deep").unwrap();
            fs::hard_link(root.join("changed"), root.join("twice")).unwrap();
            for (number, target) in targets().iter().enumerate() {
                symlink(target, root.join(format!("link {number}"))).unwrap();
            }
            mknod(
                &root.join("null"),
                SFlag::S_IFCHR,
                Mode::S_IRUSR,
                makedev(1, 3),
            )
            .unwrap();
            fs::create_dir(root.join("etc")).unwrap();
            fs::write(root.join("etc/hostname"), "this one").unwrap();
            fs::write(root.join("etc/hostnames"), "more").unwrap();
        });
        let packed = entries(&packed.unwrap());
        let is = |name: &str, kind: EntryType, content: &str| {
            let (found, bytes) = &packed[name];
            assert_eq!(*found, kind, "{name}");
            assert_eq!(String::from_utf8_lossy(bytes), content, "{name}");
        };
        is(".wh.removed", EntryType::Regular, "");
        is(".wh.socket", EntryType::Regular, "");
        is(".wh.gone", EntryType::Regular, "");
        is("anew", EntryType::Directory, "");
        is("anew/.wh..wh..opq", EntryType::Regular, "");
        is("changed", EntryType::Regular, "new");
        is("twice", EntryType::Link, "changed");
        for (number, target) in targets().iter().enumerate() {
            is(&format!("link {number}"), EntryType::Symlink, target);
        }
        is("null", EntryType::Char, "");
        is("etc/hostnames", EntryType::Regular, "more");
        is(&format!("{long}/{long}"), EntryType::Regular, "deep");
        for absent in ["kept", "kept/there", "removed", "anew/old", "etc/hostname"] {
            assert!(!packed.contains_key(absent), "{absent}");
        }
    }

    #[test]
    fn modes_owners_times_attributes_and_holes() {
        let packed = layer(|root| {
            let path = root.join("file");
            let file = File::create(&path).unwrap();
            file.write_all_at(b"end", 10 << 20).unwrap();
            std::os::unix::fs::chown(&path, Some(4_000_000), Some(12)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o4711)).unwrap();
            setxattr(&path, "trusted.mine", b"\0\xff=", XattrFlags::empty()).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 42);
            file.set_modified(time).unwrap();
        });
        let packed = packed.unwrap();
        assert!(packed.len() < 1 << 20, "{}", packed.len());
        let mut archive = tar::Archive::new(&*packed);
        let mut entry = archive.entries().unwrap().next().unwrap().unwrap();
        let records = entry.pax_extensions().unwrap().unwrap();
        let records: BTreeMap<_, _> = records
            .map(|record| record.unwrap())
            .map(|record| {
                (
                    record.key().unwrap().to_owned(),
                    record.value_bytes().to_vec(),
                )
            })
            .collect();
        assert_eq!(records["mtime"], b"1000000000.000000042");
        assert_eq!(records["SCHILY.xattr.trusted.mine"], b"\0\xff=");
        let header = entry.header().clone();
        assert_eq!(header.mode().unwrap() & 0o7777, 0o4711);
        assert_eq!(
            (header.uid().unwrap(), header.gid().unwrap()),
            (4_000_000, 12)
        );
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        assert_eq!(content.len(), (10 << 20) + 3);
        assert!(content.ends_with(b"\0end"));
    }

    #[test]
    fn names_that_would_mean_something_else_are_told() {
        let refused = layer(|root| {
            fs::create_dir(root.join("some")).unwrap();
            fs::write(root.join("some/.wh.thing"), "").unwrap();
        });
        let error = refused.unwrap_err().to_string();
        assert!(error.starts_with("/some/.wh.thing: "), "{error}");
    }
}
