//! Who is who, from /etc/passwd and /etc/group as text: a static program has no name service to ask (passwd(5), group(5)).

use std::{
    io::Read as _,
    path::{Path, PathBuf},
};

use crate::files;

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) name: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// The user's own group first.
    pub(crate) groups: Vec<u32>,
    pub(crate) home: PathBuf,
    pub(crate) shell: String,
}

const DEFAULT_SHELL: &str = "/bin/sh";
/// Of a database is read.
const LARGEST: u64 = 1 << 20;

/// Finds a user by name or number, which may be without a name; empty means the default: `user` if there is one, else root.
pub(crate) fn find(asked: &str) -> Option<User> {
    if asked.is_empty() {
        return named("user")
            .or_else(|| named("root"))
            .or_else(|| Some(root()));
    }
    named(asked)
        // Who that is needs no file.
        .or_else(|| (asked == "root").then(root))
        .or_else(|| nameless(asked))
}

fn named(asked: &str) -> Option<User> {
    let passwd = database(Path::new("/etc/passwd"));
    let group = database(Path::new("/etc/group"));
    find_in(&passwd, &group, asked)
}

/// Its text. Whoever is root in the guest says what is there: one that is no file, which might never answer or never end, is none.
fn database(path: &Path) -> String {
    let mut bytes = Vec::new();
    if let Ok((file, _)) = files::open(path) {
        // Of one that cannot be read to its end, what came before.
        let _ = file.take(LARGEST).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A number without a name, as images have them. It is nobody's home, so that is the root, as container engines have it.
fn nameless(asked: &str) -> Option<User> {
    let is_number = asked.bytes().all(|byte| byte.is_ascii_digit());
    let uid: u32 = asked
        .parse()
        .ok()
        .filter(|uid| is_number && *uid != u32::MAX)?;
    Some(User {
        name: asked.to_owned(),
        uid,
        gid: uid,
        groups: vec![uid],
        home: "/".into(),
        shell: DEFAULT_SHELL.into(),
    })
}

fn root() -> User {
    User {
        name: "root".into(),
        uid: 0,
        gid: 0,
        groups: vec![0],
        home: "/root".into(),
        shell: DEFAULT_SHELL.into(),
    }
}

fn find_in(passwd: &str, group: &str, asked: &str) -> Option<User> {
    let number: Option<u32> = asked.parse().ok();
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, _, home, shell] = fields.as_slice() else {
            return None;
        };
        let (uid, gid) = (uid.parse().ok()?, gid.parse().ok()?);
        if *name != asked && number != Some(uid) {
            return None;
        }
        Some(User {
            name: (*name).to_owned(),
            uid,
            gid,
            groups: groups_of(group, name, gid),
            home: if home.is_empty() {
                "/".into()
            } else {
                home.into()
            },
            shell: if shell.is_empty() {
                DEFAULT_SHELL.into()
            } else {
                (*shell).to_owned()
            },
        })
    })
}

fn groups_of(group: &str, user: &str, own: u32) -> Vec<u32> {
    let mut groups = vec![own];
    for line in group.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if let [_, _, gid, members] = fields.as_slice()
            && members.split(',').any(|member| member == user)
            && let Ok(gid) = gid.parse()
            && !groups.contains(&gid)
        {
            groups.push(gid);
        }
    }
    groups
}

/// A path as a shell of this user reads it: `~`, `~user`, relative to the home.
pub(crate) fn expand(user: &User, path: &str) -> Option<PathBuf> {
    let Some(rest) = path.strip_prefix('~') else {
        return Some(below(&user.home, path));
    };
    let (name, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let rest = rest.trim_start_matches('/');
    if name.is_empty() {
        return Some(below(&user.home, rest));
    }
    Some(below(&named(name)?.home, rest))
}

/// Joined, but without the slash an empty path would leave at the end.
fn below(home: &Path, path: &str) -> PathBuf {
    if path.is_empty() {
        return home.to_owned();
    }
    home.join(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\nuser:x:1000:1000::/home/user:\n";
    const GROUP: &str = "root:x:0:\naudio:x:29:user,other\nuser:x:1000:\n";

    #[test]
    fn users_are_found_by_name_and_number() {
        let user = find_in(PASSWD, GROUP, "user").unwrap();
        assert_eq!(
            (user.uid, user.groups.as_slice(), user.shell.as_str()),
            (1000, &[1000, 29][..], "/bin/sh")
        );
        assert_eq!(find_in(PASSWD, GROUP, "1000"), Some(user));
        assert_eq!(find_in(PASSWD, GROUP, "nobody"), None);
    }

    #[test]
    fn a_database_that_is_no_file_has_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::os::unix::fs::symlink("/dev/zero", at("endless")).unwrap();
        std::fs::write(at("large"), vec![b'x'; 3 << 20]).unwrap();
        for name in ["fifo", "endless", "missing"] {
            assert_eq!(database(&at(name)), "", "{name}");
        }
        assert_eq!(database(&at("large")).len() as u64, LARGEST);
    }

    #[test]
    fn paths_are_read_as_in_a_shell() {
        let user = find_in(PASSWD, GROUP, "user").unwrap();
        let expanded = |path| expand(&user, path).map(|path| path.to_string_lossy().into_owned());
        assert_eq!(expanded("~"), Some("/home/user".into()));
        assert_eq!(expanded("~/a"), Some("/home/user/a".into()));
        assert_eq!(expanded("~//a"), Some("/home/user/a".into()));
        assert_eq!(expanded("~/"), Some("/home/user".into()));
        assert_eq!(expanded("~root"), Some("/root".into()));
        assert_eq!(expanded("a/b"), Some("/home/user/a/b".into()));
        assert_eq!(expanded("/etc"), Some("/etc".into()));
        assert_eq!(expanded("~root/x"), Some("/root/x".into()));
        assert_eq!(expanded("~no-such-user/x"), None);
    }
}
