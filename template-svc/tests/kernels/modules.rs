use std::{
    fs,
    path::{Path, PathBuf},
};

use cpio::newc;
use template_svc::kernel::{KernelError, MOST_MODULES, NEEDS, Tree, check_modules};

use crate::made::{RELEASE, gzip, module, module_saying, xz, zstd};

/// What a distribution has of modules; the rest is built in.
const MODULES: &str = "\
kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/block/virtio_blk.ko.xz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko.gz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/fs/erofs/erofs.ko.zst: kernel/lib/libcrc32c.ko
kernel/lib/libcrc32c.ko:
kernel/crypto/crc32c_generic.ko:
kernel/fs/ntfs/ntfs.ko:
";
const AT_LAST: [&str; 8] = [
    "00-virtio_ring",
    "01-virtio",
    "02-virtio_mmio",
    "03-virtio_blk",
    "04-virtio_rng",
    "05-crc32c_generic",
    "06-libcrc32c",
    "07-erofs",
];

fn tree() -> (tempfile::TempDir, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("lib/modules").join(RELEASE);
    fs::create_dir_all(&folder).unwrap();
    for path in MODULES.lines().filter_map(|line| line.split(':').next()) {
        let module = module(RELEASE);
        let packed = match Path::new(path).extension().unwrap().to_str() {
            Some("xz") => xz(&module),
            Some("gz") => gzip(&module),
            Some("zst") => zstd(&module),
            _ => module,
        };
        let path = folder.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, packed).unwrap();
    }
    let is_module = |name: &str| {
        AT_LAST
            .iter()
            .any(|last| last.ends_with(&format!("-{name}")))
    };
    let builtin = NEEDS.iter().filter(|need| !is_module(need.module));
    let builtin: Vec<_> = builtin
        .map(|need| format!("kernel/drivers/{}.ko\n", need.module.replace('_', "-")))
        .collect();
    let builtin = builtin.concat();
    fs::write(folder.join("modules.dep"), MODULES).unwrap();
    fs::write(folder.join("modules.builtin"), builtin).unwrap();
    fs::write(
        folder.join("modules.softdep"),
        "# Soft\nsoftdep libcrc32c pre: crc32c post: other\n",
    )
    .unwrap();
    fs::write(
        folder.join("modules.alias"),
        "# Aliases\nalias crc32c crc32c-generic\n",
    )
    .unwrap();
    (root, folder)
}

fn pack(folder: &Path) -> Result<Vec<u8>, KernelError> {
    Tree::read(folder, RELEASE)?.pack()
}

fn names(archive: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = archive;
    loop {
        let entry = newc::Reader::new(rest).unwrap();
        if entry.entry().is_trailer() {
            return names;
        }
        names.push(entry.entry().name().to_owned());
        rest = entry.finish().unwrap();
    }
}

#[test]
fn modules_come_after_what_they_need() {
    let (root, folder) = tree();
    let archive = pack(&folder).unwrap();
    let expected = AT_LAST.map(|name| format!("modules/{name}.ko"));
    assert_eq!(
        names(&archive),
        [&["modules".to_owned()], &expected[..]].concat()
    );
    check_modules(&archive, RELEASE).unwrap();
    // By the folder in which lib/modules is, it is the same.
    assert!(pack(root.path()).unwrap() == archive);
    let error = check_modules(&archive, "6.1.0-56-cloud-amd64").unwrap_err();
    assert!(matches!(error, KernelError::Module { .. }), "{error}");
}

#[test]
fn all_that_is_missing_is_named_with_its_option() {
    let (_root, folder) = tree();
    let list = fs::read_to_string(folder.join("modules.dep")).unwrap();
    let list = list
        .lines()
        .filter(|line| !line.starts_with("kernel/drivers/block"));
    fs::write(
        folder.join("modules.dep"),
        list.collect::<Vec<_>>().join("\n"),
    )
    .unwrap();
    let builtin = fs::read_to_string(folder.join("modules.builtin")).unwrap();
    let builtin = builtin
        .replace("kernel/drivers/overlay.ko\n", "")
        .replace("unix", "other");
    fs::write(folder.join("modules.builtin"), builtin).unwrap();
    assert_eq!(
        pack(&folder).unwrap_err().to_string(),
        "the kernel has neither built in nor as modules what guests need: virtio_blk (CONFIG_VIRTIO_BLK: disks), \
         overlay (CONFIG_OVERLAY_FS: a disk upon the root)"
    );
}

#[test]
fn a_tree_of_another_kernel_is_refused() {
    let (root, folder) = tree();
    let other = root.path().join("lib/modules/5.0");
    fs::rename(&folder, &other).unwrap();
    let error = pack(&other).unwrap_err();
    assert!(matches!(error, KernelError::Folder { .. }), "{error}");
    fs::rename(&other, &folder).unwrap();
    // Its name alone proves nothing.
    fs::write(folder.join("kernel/lib/libcrc32c.ko"), module("5.0")).unwrap();
    let error = pack(&folder).unwrap_err().to_string();
    assert_eq!(
        error,
        format!("module libcrc32c: it is for the kernel \"5.0\", not for {RELEASE}")
    );
    for bytes in [
        &b"text"[..],
        &module(RELEASE)[..100],
        &module_saying(b"license=GPL\0"),
        &module_saying(format!("vermagic={RELEASE}x SMP \0").as_bytes()),
    ] {
        fs::write(folder.join("kernel/lib/libcrc32c.ko"), bytes).unwrap();
        let error = pack(&folder).unwrap_err();
        assert!(matches!(error, KernelError::Module { .. }), "{error}");
    }
}

#[test]
fn a_tree_that_depmod_has_not_seen_is_told_so() {
    let (_root, folder) = tree();
    fs::remove_file(folder.join("modules.dep")).unwrap();
    let error = pack(&folder).unwrap_err().to_string();
    let advice = format!("modules.dep is missing: make it by `depmod -b ROOT {RELEASE}`");
    assert!(error.ends_with(&advice), "{error}");
}

/// Nothing outside of its folder is read, and nothing that goes round in circles is followed for ever.
#[test]
fn lists_that_lead_astray_are_refused() {
    let (root, folder) = tree();
    fs::write(root.path().join("erofs.ko"), module(RELEASE)).unwrap();
    for path in ["../../../erofs.ko", "/erofs.ko"] {
        let list = MODULES.replace("kernel/fs/erofs/erofs.ko.zst", path);
        fs::write(folder.join("modules.dep"), list).unwrap();
        let error = pack(&folder).unwrap_err();
        assert!(matches!(error, KernelError::Module { .. }), "{error}");
    }
    let circle = MODULES.replace(
        "libcrc32c.ko:\n",
        "libcrc32c.ko: kernel/fs/erofs/erofs.ko.zst\n",
    );
    fs::write(folder.join("modules.dep"), circle).unwrap();
    assert_eq!(names(&pack(&folder).unwrap()).len(), AT_LAST.len() + 1);
    let chain = |length: usize| {
        let link = |number| format!("m{number}.ko: m{}.ko\n", number + 1);
        let chain: String = (0..length).map(link).collect();
        MODULES.replace("libcrc32c.ko:\n", "libcrc32c.ko: m0.ko\n") + &chain
    };
    fs::write(folder.join("modules.dep"), chain(10_000)).unwrap();
    let error = pack(&folder).unwrap_err();
    assert!(error.to_string().contains("deep"), "{error}");
    let many: Vec<_> = (0..=MOST_MODULES)
        .map(|number| format!("m{number}.ko:\n"))
        .collect();
    let many = many.concat();
    let all: Vec<String> = (0..=MOST_MODULES)
        .map(|number| format!("m{number}.ko"))
        .collect();
    let list = MODULES.replace(
        "libcrc32c.ko:\n",
        &format!("libcrc32c.ko: {}\n", all.join(" ")),
    );
    fs::write(folder.join("modules.dep"), list + &many).unwrap();
    let error = pack(&folder).unwrap_err();
    assert!(matches!(error, KernelError::TooManyModules), "{error}");
}

/// Made by hand, as whoever means ill would.
fn archive(entries: &[Entry]) -> Vec<u8> {
    use std::io::Write as _;
    let mut archive = Vec::new();
    for (entry, bytes) in entries {
        let size = u32::try_from(bytes.len()).unwrap();
        let mut entry = entry.clone().write(archive, size);
        entry.write_all(bytes).unwrap();
        archive = entry.finish().unwrap();
    }
    newc::trailer(archive).unwrap()
}

type Entry<'a> = (newc::Builder, &'a [u8]);

fn folder(mode: u32) -> Entry<'static> {
    (newc::Builder::new("modules").mode(mode), b"")
}

fn file<'a>(name: &str, bytes: &'a [u8]) -> Entry<'a> {
    (newc::Builder::new(name).mode(FILE), bytes)
}

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_644;
const LINK: u32 = 0o120_777;
const DEVICE: u32 = 0o060_644;

/// A node puts it in front of envd: it may hold modules, and nothing that the kernel would take for something else.
#[test]
fn an_archive_holds_modules_and_nothing_else() {
    let module = module(RELEASE);
    let first = || file("modules/00-a.ko", &module);
    let first_like = |change: fn(newc::Builder) -> newc::Builder| {
        let (entry, bytes) = first();
        (change(entry), bytes)
    };
    let good = archive(&[folder(FOLDER), first()]);
    check_modules(&good, RELEASE).unwrap();
    check_modules(&archive(&[folder(FOLDER)]), RELEASE).unwrap();
    for entries in [
        vec![],
        vec![first()],
        vec![folder(LINK)],
        vec![folder(FILE)],
    ] {
        assert!(check_modules(&archive(&entries), RELEASE).is_err());
    }
    for (number, entries) in [
        vec![file("init", &module)],
        vec![file("modules/01-a.ko", &module)],
        vec![file("modules/00-../../init.ko", &module)],
        vec![file("modules/00-.ko", &module)],
        vec![first(), folder(FOLDER)],
        vec![first(), first()],
        vec![first_like(|it| it.mode(LINK))],
        vec![first_like(|it| it.mode(DEVICE))],
        vec![first_like(|it| it.nlink(2))],
        vec![file("modules/00-a.ko", b"no module")],
    ]
    .into_iter()
    .enumerate()
    {
        let entries = [vec![folder(FOLDER)], entries].concat();
        let refused = check_modules(&archive(&entries), RELEASE);
        assert!(refused.is_err(), "{number}");
    }
    let names: Vec<String> = (0..=MOST_MODULES)
        .map(|number| format!("modules/{number:02}-a.ko"))
        .collect();
    let mut many = vec![folder(FOLDER)];
    many.extend(names.iter().map(|name| file(name, &module)));
    let error = check_modules(&archive(&many), RELEASE).unwrap_err();
    assert!(matches!(error, KernelError::TooManyModules), "{error}");
    for more in [&good[..], b"\0\0\0\0", b"x"] {
        assert!(check_modules(&[&good[..], more].concat(), RELEASE).is_err());
    }
    for end in 0..good.len() {
        assert!(check_modules(&good[..end], RELEASE).is_err(), "{end}");
    }
    for at in 0..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 0x41;
        // It must not panic, whatever comes of it.
        drop(check_modules(&damaged, RELEASE));
    }
}
