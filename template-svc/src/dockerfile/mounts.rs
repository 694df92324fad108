//! `RUN --mount`: of what can be mounted, secrets. The words and their defaults are those of `BuildKit` (Dockerfile reference, "RUN --mount=type=secret").

use super::{DockerfileError, LONGEST_PATH, Place, words};

/// Mounts of one `RUN`.
pub(super) const MOST_MOUNTS: usize = 64;
/// Where a secret lies that does not say.
const PLACE: &str = "/run/secrets";
const MODE: u32 = 0o400;
const LONGEST_ID: usize = 128;
const LONGEST_NAME: usize = 255;

/// A secret that a step is lent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Secret {
    /// Which.
    pub id: String,
    /// The file it is, absolute.
    pub target: Option<String>,
    /// The variable it is.
    pub env: Option<String>,
    /// Whether the step fails without it.
    pub is_required: bool,
    /// Permissions of the file.
    pub mode: u32,
    /// Owner of the file.
    pub uid: u32,
    /// Group of the file.
    pub gid: u32,
}

/// Whether a secret may be called so: its name is a file's, too.
pub fn is_secret_id(id: &str) -> bool {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=LONGEST_ID).contains(&id.len()) && id.bytes().all(is_known) && !matches!(id, "." | "..")
}

/// One, before variables are known.
#[derive(Debug, Clone)]
pub(super) struct Mount {
    place: Place,
    /// Names and values, in order.
    fields: Vec<(String, Option<String>)>,
}

impl Mount {
    /// Of what stands after `--mount=`.
    pub(super) fn read(place: Place, text: &str) -> Result<Self, DockerfileError> {
        let fields = text.split(',').map(|field| match field.split_once('=') {
            Some((name, value)) => (name.to_ascii_lowercase(), Some(value.to_owned())),
            None => (field.to_ascii_lowercase(), None),
        });
        let fields: Vec<_> = fields.collect();
        let kinds = fields.iter().filter(|(name, _)| name == "type");
        let kind = kinds.filter_map(|(_, value)| value.as_deref()).next_back();
        // As with BuildKit, one that does not say is of another kind.
        let kind = kind.unwrap_or("bind");
        if kind != "secret" {
            let message =
                format!("RUN --mount=type={kind} cannot be built yet: only type=secret can");
            return Err(place.error(message));
        }
        let mount = Self { place, fields };
        let is_variable = |value: &String| value.contains('$');
        let mut values = mount.fields.iter().filter_map(|(_, value)| value.as_ref());
        if !values.any(is_variable) {
            // What is wrong is told before a build begins.
            mount.secret("/", |value| Ok(value.to_owned()))?;
        }
        Ok(mount)
    }

    /// What it means where that is the folder, and `word` knows the variables.
    pub(super) fn secret(
        &self,
        cwd: &str,
        word: impl Fn(&str) -> Result<String, DockerfileError>,
    ) -> Result<Secret, DockerfileError> {
        let wrong = |why: String| self.place.error(format!("RUN --mount=type=secret: {why}"));
        let (mut id, mut target, mut env) = (None, None, None);
        let (mut mode, mut uid, mut gid, mut is_required) = (MODE, 0, 0, false);
        for (name, value) in &self.fields {
            let value = value.as_deref().map(&word).transpose()?;
            let Some(value) = value else {
                if name == "required" {
                    is_required = true;
                    continue;
                }
                return Err(wrong(format!("expected {name}=VALUE")));
            };
            let number = || {
                let number = value.parse().ok();
                // The last is nobody's (chown(2)).
                let number = number.filter(|number| *number != u32::MAX);
                number.ok_or_else(|| wrong(format!("expected {name}=NUMBER, not {value:?}")))
            };
            match name.as_str() {
                "type" => {}
                "id" | "source" | "src" => id = Some(value),
                "target" | "destination" | "dst" => target = Some(value),
                "env" => env = Some(value),
                "uid" => uid = number()?,
                "gid" => gid = number()?,
                "mode" => {
                    let octal = u32::from_str_radix(&value, 8);
                    let octal = octal.ok().filter(|octal| *octal <= 0o7777);
                    let expected = || {
                        wrong(format!(
                            "expected octal permissions after mode=, not {value:?}"
                        ))
                    };
                    mode = octal.ok_or_else(expected)?;
                }
                "required" => {
                    is_required = match value.as_str() {
                        "1" | "t" | "T" | "true" | "True" | "TRUE" => true,
                        "0" | "f" | "F" | "false" | "False" | "FALSE" => false,
                        _ => {
                            return Err(wrong(format!(
                                "expected required=true or required=false, not {value:?}"
                            )));
                        }
                    }
                }
                _ => {
                    return Err(wrong(format!(
                        "{name} is not known: id, target, env, required, mode, uid and gid are"
                    )));
                }
            }
        }
        let target = target.filter(|target| !target.is_empty());
        let named = || {
            let target = target.as_deref().unwrap_or_default();
            target.rsplit('/').next().unwrap_or_default().to_owned()
        };
        let id = id.unwrap_or_else(named);
        if !is_secret_id(&id) {
            return Err(wrong(format!(
                "expected an id of 1-{LONGEST_ID} characters [A-Za-z0-9._-], not {id:?}"
            )));
        }
        if let Some(env) = env.as_deref().filter(|env| !is_variable_name(env)) {
            return Err(wrong(format!(
                "expected the name of a variable after env=, not {env:?}"
            )));
        }
        let target = match (target, &env) {
            (Some(target), _) => Some(words::join(cwd, &target)),
            (None, Some(_)) => None,
            (None, None) => Some(format!("{PLACE}/{id}")),
        };
        if target
            .as_deref()
            .is_some_and(|it| it == "/" || it.len() > LONGEST_PATH || it.contains('\0'))
        {
            return Err(wrong(format!(
                "expected the path of a file, of at most {LONGEST_PATH} bytes, after target="
            )));
        }
        Ok(Secret {
            id,
            target,
            env,
            is_required,
            mode,
            uid,
            gid,
        })
    }
}

fn is_variable_name(name: &str) -> bool {
    let is_known = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let begins_well = name.bytes().next().is_some_and(|it| !it.is_ascii_digit());
    begins_well && name.len() <= LONGEST_NAME && name.bytes().all(is_known)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const HERE: Place = Place { line: 3, column: 5 };

    fn read(text: &str) -> Result<Secret, DockerfileError> {
        Mount::read(HERE, text)?.secret("/srv", |value| Ok(value.replace("$x", "X")))
    }

    #[test]
    fn a_secret_in_all_its_forms() {
        let usual = Secret {
            id: "npm".into(),
            target: Some("/run/secrets/npm".into()),
            env: None,
            is_required: false,
            mode: 0o400,
            uid: 0,
            gid: 0,
        };
        assert_eq!(read("type=secret,id=npm").unwrap(), usual);
        assert_eq!(read("id=npm,type=secret,required=false").unwrap(), usual);
        let at = |target: &str| Secret {
            target: Some(target.into()),
            ..usual.clone()
        };
        for name in ["target", "dst", "destination"] {
            let text = format!("type=secret,id=npm,{name}=/root/.npmrc");
            assert_eq!(read(&text).unwrap(), at("/root/.npmrc"));
        }
        assert_eq!(
            read("type=secret,src=npm,target=sub/../a").unwrap(),
            at("/srv/a")
        );
        assert_eq!(read("type=secret,target=/etc/npm").unwrap(), at("/etc/npm"));
        let variable = Secret {
            target: None,
            env: Some("TOKEN".into()),
            is_required: true,
            ..usual.clone()
        };
        assert_eq!(
            read("type=secret,id=npm,env=TOKEN,required").unwrap(),
            variable
        );
        let both = Secret {
            target: Some("/X".into()),
            ..variable
        };
        let text = "TYPE=secret,id=npm,env=TOKEN,required=true,target=/$x";
        assert_eq!(read(text).unwrap(), both);
        let owned = Secret {
            mode: 0o440,
            uid: 1000,
            gid: 33,
            ..usual
        };
        assert_eq!(
            read("type=secret,id=npm,mode=0440,uid=1000,gid=33").unwrap(),
            owned
        );
    }

    #[rstest]
    #[case("type=cache,target=/x", "RUN --mount=type=cache cannot be built yet")]
    #[case("type=bind,target=/x", "RUN --mount=type=bind")]
    #[case("target=/x", "RUN --mount=type=bind")]
    #[case("type=tmpfs,target=/x", "RUN --mount=type=tmpfs")]
    #[case("type=ssh", "RUN --mount=type=ssh")]
    #[case("", "RUN --mount=type=bind")]
    #[case("type=secret", "expected an id")]
    #[case("type=secret,id=a/b", "expected an id")]
    #[case("type=secret,id=..", "expected an id")]
    #[case("type=secret,id=", "expected an id")]
    #[case("type=secret,id=a,from=b", "from is not known")]
    #[case("type=secret,id=a,ro", "expected ro=VALUE")]
    #[case("type=secret,id=a,mode=u+r", "octal")]
    #[case("type=secret,id=a,mode=17777", "octal")]
    #[case("type=secret,id=a,uid=me", "uid=NUMBER")]
    #[case("type=secret,id=a,gid=4294967295", "gid=NUMBER")]
    #[case("type=secret,id=a,env=A-B", "variable")]
    #[case("type=secret,id=a,env=1A", "variable")]
    #[case("type=secret,id=a,env=", "variable")]
    #[case("type=secret,id=a,required=yes", "required=true")]
    #[case("type=secret,id=a,target=/", "path of a file")]
    fn what_it_does_not_mean_is_told_with_its_place(#[case] text: &str, #[case] said: &str) {
        let error = Mount::read(HERE, text).unwrap_err();
        assert_eq!((error.line, error.column), (3, 5));
        assert!(error.message.contains(said), "{error}");
    }
}
